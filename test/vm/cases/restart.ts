// SPDX-License-Identifier: MIT
/** The daemon is restarted, killed, upgraded, and made to hang, while the tree is in use. */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { links, LEFT_ALONE } from '../links.js'
import { note } from '../findings.js'
import type { Outcome, Vm } from '../vm.js'

/** Long enough for all that happens meanwhile; and a load that leaves the machine time for it. */
const CHURN_S = 60
const CHURN = '--recyclers 1 --openers 2 --devices 4 --live-us 500000'
const PAUSE_MS = 20
/** How long the guard waits for an answer of the daemon (-h), plus what emulation adds. */
const HUNG_S = 60
/** How long the service manager must fail to answer to count as blocked. */
const BLOCKED_S = 30

/** The process id of the daemon that serves, which its guard reports to the service manager. */
export const DAEMON = "systemctl show -P StatusText diskseqfs | sed -n 's/.*(daemon \\([0-9]*\\))$/\\1/p'"

const MOUNT_ID = 'awk \'$5 == "/dev/disk/by-diskseq" { print $1 }\' /proc/self/mountinfo'

/** Shell: `another` waits until there is a daemon that serves and is not the one in `$before`. */
export const ANOTHER = `
  another() {
    for ((i = 0; i < 6000; i++)); do
      now=$(${DAEMON})
      [ "\${now:-$before}" != $before ] && systemctl -q is-active diskseqfs && return
      sleep 0.1
    done
    return 1
  }`

async function served(t: Test, vm: Vm, how: string, script: string): Promise<void> {
  const again = await vm.run(`${ANOTHER}\nbefore=$(${DAEMON})\n${script}\nanother && echo again`, 1_200_000)
  t.match(again, /again\n$/, how)
}

/** Each way in which a daemon ends and the next one takes over its mount. */
async function endings(t: Test, vm: Vm): Promise<void> {
  await served(t, vm, 'restarted', 'systemctl restart diskseqfs')
  await served(t, vm, 'killed', `kill -KILL $(${DAEMON})`)
  await served(
    t,
    vm,
    'killed, and the next one before it answers',
    `kill -KILL $(${DAEMON})
     for ((i = 0; i < 600; i++)); do
       next=$(pgrep -P $(systemctl show -P MainPID diskseqfs) -f '^[^ ]*node') && [ "$next" != $before ] && break
       sleep 0.05
     done
     kill -KILL $next`,
  )
  await served(t, vm, 'its guard killed', 'systemctl kill --kill-who=main -s KILL diskseqfs')
  await served(t, vm, 'both killed', `guard=$(systemctl show -P MainPID diskseqfs); kill -STOP $guard; kill -KILL $(${DAEMON}) $guard`)
  await served(t, vm, 'upgraded', 'dpkg -i /run/upgrade.deb')
}

/** The same package, as a newer version. */
const UPGRADE = `
  dpkg-deb -R /share/diskseqfs.deb /run/upgrade
  sed -i 's/^Version: .*/&+upgrade/' /run/upgrade/DEBIAN/control
  dpkg-deb -Zgzip -z1 -b /run/upgrade /run/upgrade.deb
  rm -r /run/upgrade`

function figures({ status, output }: Outcome): Record<string, any> {
  if (status !== 0) throw new Error(output)
  return JSON.parse(output)
}

async function inUse(t: Test, vm: Vm): Promise<void> {
  const mount = await vm.run(MOUNT_ID)
  await vm.run(UPGRADE)
  const churn = vm.start(`/share/blk churn --mode tree --dir /dev/disk/by-diskseq --seconds ${CHURN_S} ${CHURN}`)
  const opener = vm.start(`
    /share/blk openlat --path /dev/mapper/vm-srv --count 100000000 --pause-ms ${PAUSE_MS} --close-immediately &
    until [ -e /run/enough ]; do sleep 0.2; done
    kill -TERM $!
    wait $! || true
    rm /run/enough`)
  await endings(t, vm)
  await vm.run('touch /run/enough')
  const steady = figures(await opener.ended())
  const recycled = figures(await churn.ended(2 * CHURN_S * 1000 + 60_000))
  t.equal(await vm.run(MOUNT_ID), mount, 'the mount is the same one')
  t.strictSame(steady['errors'], {}, 'no open of a disk that is there has failed')
  t.equal(recycled['wrong_diskseq'] + recycled['wrong_data'], 0, 'no open reached another disk')
  t.strictSame(
    Object.keys(recycled['errors']).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'),
    [],
    'no errno but those for a disk that is gone',
  )
  t.ok(recycled['opens_ok'] > 10, `${recycled['opens_ok']} opens of recycled disks`)
  note(
    t,
    `restarted, killed three times, upgraded: 0 wrong of ${recycled['opens_ok']}, longest wait ${(steady['max_ns'] / 1e9).toFixed(1)} s`,
  )
}

/**
 * The service manager stats the source of each mount when something is mounted. As long as it gets
 * no answer, it does nothing at all.
 */
async function hung(t: Test, vm: Vm): Promise<void> {
  const outcome = await vm.run(
    `
    ${ANOTHER}
    before=$(${DAEMON})
    guard=$(systemctl show -P MainPID diskseqfs)
    kill -STOP $guard $before
    mount -t tmpfs diskseqfs-test /mnt
    umount /mnt
    timeout ${BLOCKED_S} systemctl is-active diskseqfs || echo "status $?"
    kill -CONT $guard
    timeout ${HUNG_S} systemctl show -P Type diskseqfs
    another && echo again
    journalctl -b -u diskseqfs -o cat --no-pager | grep -c 'does not answer any more'`,
    (BLOCKED_S + 2 * HUNG_S + 60) * 1000,
  )
  t.equal(outcome, 'status 124\nnotify\nagain\n1\n', 'a daemon that hangs blocks the service manager until the guard has it killed')
}

/**
 * All processes that could answer are killed, while the service manager has much to look at. The mount goes, and comes
 * back.
 */
async function whole(t: Test, vm: Vm): Promise<void> {
  await served(
    t,
    vm,
    'everything killed',
    `udevadm trigger --subsystem-match=block
     systemctl kill -s KILL diskseqfs
     timeout ${HUNG_S} systemctl show -P Type diskseqfs`,
  )
  await vm.run('udevadm settle')
  t.ok((await links(vm)).tree.length > 5, 'names lead into the tree again')
}

/** The daemon does not answer, and the service is to end: nothing waits for the daemon. */
async function stopped(t: Test, vm: Vm): Promise<void> {
  const outcome = await vm.run(
    `
    kill -STOP $(${DAEMON})
    timeout ${HUNG_S} systemctl stop diskseqfs && systemctl show -P Result diskseqfs
    findmnt -n /dev/disk/by-diskseq || echo no mount
    pgrep -f '^[^ ]*node.*diskseqfs mount' || echo no daemon`,
    (HUNG_S + 60) * 1000,
  )
  t.equal(outcome, 'success\nno mount\nno daemon\n', 'a service whose daemon hangs can be stopped')
  t.strictSame((await links(vm)).tree, [], 'the names lead to the bare devices')
  await vm.run('systemctl start diskseqfs; udevadm settle')
}

export const restart: Case = {
  name: 'restart: systemctl, SIGKILL, upgrade, hang',
  shortOn: 'bookworm',
  async run(t, vm) {
    await inUse(t, vm)
    await whole(t, vm)
    await hung(t, vm)
    await stopped(t, vm)
    const { tree, stock, left, wrong } = await links(vm)
    t.ok(tree.length > 5, `${tree.length} links into the tree`)
    t.strictSame({ stock, left, wrong }, { stock: [], left: LEFT_ALONE, wrong: [] }, 'and no others')
  },
}
