// SPDX-License-Identifier: MIT
/** The service: stopped, started, with the links switched off, and removed from the system. */
import type { Test } from 'tap'

import type { Change } from '../../helpers/guard.js'
import { type Case, SHORT } from '../case.js'
import { links, LEFT_ALONE } from '../links.js'
import { note } from '../findings.js'
import { withLink } from '../twin.js'
import type { Vm } from '../vm.js'
import { DAEMON } from './restart.js'

async function inTree(t: Test, vm: Vm, when: string): Promise<void> {
  await vm.run('udevadm settle')
  const { tree, stock, left, wrong } = await links(vm)
  t.ok(tree.length > 5, `${when}: ${tree.length} links into the tree`)
  t.strictSame(
    { stock, left, wrong },
    { stock: [], left: LEFT_ALONE, wrong: [] },
    `${when}: and no others, except for devices that are left alone`,
  )
}

async function stockLinks(t: Test, vm: Vm, when: string): Promise<void> {
  await vm.run('udevadm settle')
  const { tree, stock, wrong } = await links(vm)
  t.ok(stock.length > 5, `${when}: ${stock.length} links to the device nodes`)
  t.strictSame({ tree, wrong }, { tree: [], wrong: [] }, `${when}: and no others`)
}

const BEGIN = 'date +@%s >/run/began'
/**
 * Warnings of udev itself since {@link BEGIN}, or in this boot, not of the programs that it runs (lvm, multipath). Left out: modules that
 * come and go (libkmod), and udev's own links in /run/udev/watch of a device that went meanwhile.
 */
export const UDEV_WARNINGS =
  "journalctl -b --since $(cat /run/began 2>/dev/null || echo @0) -q --no-pager -p warning -t systemd-udevd -t '(udev-worker)' -o cat | grep -v '^PV\\|^VG\\|/sys/module/\\|filter\\|inotify watch, ignoring: No such file' || true"

/** Links into the tree that no event made. */
const MINE = `
  mkdir /dev/mine
  ln -s "$(readlink /dev/mapper/vm-home)" /dev/mine/home
  ln -s /dev/disk/by-diskseq/4000000000 /dev/mine/none
  readlink /dev/mine/*`

/** Options that an administrator sets, right and wrong ones. */
async function options(t: Test, vm: Vm): Promise<void> {
  const restart = (given: string) => `echo 'DISKSEQFS_OPTIONS="${given}"' >/etc/default/diskseqfs; systemctl restart diskseqfs`
  const served = `
    for ((i = 0; i < 600; i++)); do
      daemon=$(${DAEMON})
      [ "\${daemon:-$before}" != $before ] && break
      sleep 0.1
    done
    tr '\\0' ' ' </proc/$daemon/cmdline | sed 's/.* mount //'`
  await vm.run('cp -p /etc/default/diskseqfs /run/options')
  t.equal(
    await vm.run(`before=$(${DAEMON}); ${restart('--open-timeout 11  --log-level debug')}; ${served}`),
    '-f --open-timeout 11 --log-level debug ',
    'the daemon has the options in /etc/default/diskseqfs',
  )
  const wrong = await vm.run(`
    before=$(${DAEMON}); ${restart('--open-timeout never')}
    for ((i = 0; i < 600; i++)); do
      journalctl -b -u diskseqfs -o cat --no-pager | grep -q "option '--open-timeout <seconds>' argument 'never' is invalid" && break
      sleep 0.1
    done
    [ $(${DAEMON}) = $before ] && dd if=/dev/mapper/vm-srv of=/dev/null count=1 status=none && echo served`)
  t.equal(wrong, 'served\n', 'with a mistake in them the previous daemon goes on, and the journal says what is wrong')
  await vm.run(`before=$(${DAEMON}); mv /run/options /etc/default/diskseqfs; systemctl restart diskseqfs; ${served} >/dev/null`)
}

const LIMITS = '/run/systemd/system/diskseqfs.service.d/limits.conf'

/** How a stop and a start end if the service gets a twentieth of a processor. */
async function starved(vm: Vm, timeLimits?: string): Promise<string> {
  try {
    if (timeLimits) {
      await vm.run(`mkdir -p $(dirname ${LIMITS}); printf '[Service]\n${timeLimits}\n' >${LIMITS}; systemctl daemon-reload`)
    }
    return await vm.run(`
      systemctl set-property --runtime diskseqfs CPUQuota=5%
      systemctl stop diskseqfs || true; systemctl show -P Result diskseqfs
      systemctl start diskseqfs || true; systemctl show -P Result diskseqfs`)
  } finally {
    await vm.run(`
      systemctl set-property --runtime diskseqfs CPUQuota=; rm -f ${LIMITS}; systemctl daemon-reload
      systemctl stop diskseqfs; systemctl reset-failed diskseqfs || true; systemctl start diskseqfs`)
  }
}

/** Ends all processes that have a device open, while others open it by its name. */
const KILL_USERS = `
  daemon=$(${DAEMON}) guard=$(systemctl show -P MainPID diskseqfs)
  dmsetup create killed --table '0 2048 zero'
  (for ((i = 0; i < 100; i++)); do : </dev/mapper/killed; done) & openers=$!
  while kill -0 $openers 2>/dev/null; do fuser -sk /dev/$(basename $(readlink -f /dev/mapper/killed)) || true; done
  dmsetup remove --retry killed
  [ "$(${DAEMON})" = $daemon ] && echo same daemon
  [ "$(systemctl show -P MainPID diskseqfs)" = $guard ] && echo same guard`

/** Devices that go while there is no tree; and where names lead for a process that read them just before the stop. */
const WALKERS = `
  dmsetup create goes --table '0 2048 zero'; truncate -s 4M /run/goes.img
  echo ',,' | sfdisk -q /run/goes.img; losetup --partscan --find --show /run/goes.img >/run/goes.disk; udevadm settle
  find /dev/mapper -lname '/dev/disk/*' -printf '%p %l\\n' >/run/read
  mkdir /run/beneath; mount --bind /dev /run/beneath; cd /run/beneath/disk/by-diskseq
  mkdir .dm/4000000000; ln -s ../../../../dm-0 .dm/4000000000/dm-0; ln -s ../../dm-0 4000000000; ln -s ../../dm-0 4000000000p1
  cd /; umount /run/beneath; rmdir /run/beneath`
const WALK_ON =
  'while read name target; do [ $(stat -L -c %t:%T $name) = "$(stat -L -c %t:%T $target)" ] || echo $name $target; done </run/read 2>&1'
const RULES = '/usr/lib/udev/rules.d/59-diskseqfs.rules'
const GONE = "find /dev/disk/by-diskseq -name '4000000000*'"
const REMOVE = `
  dm=$(basename $(readlink -f /dev/mapper/goes)); loop=$(basename $(cat /run/goes.disk))
  dmsetup remove goes; losetup --detach /dev/$loop; udevadm settle
  find /dev/disk/by-diskseq -type l \\( -path '*/.dm/*' -o -name '*p1' \\) -printf '%P %l\\n' | grep -wE "$dm|$loop|\${loop}p1" || true`

export const service: Case = {
  name: 'service: stop, start, links switched off',
  shortOn: 'bookworm',
  async run(t, vm) {
    await vm.run(BEGIN)
    await inTree(t, vm, 'installed')
    t.equal(await vm.run('systemctl show -P Type -P WatchdogUSec diskseqfs'), 'notify\n30s\n')
    const exposure = await vm.run('systemd-analyze security --no-pager diskseqfs.service | tail -n 1')
    // A unit's restrictions may not allow it to ask for them.
    const slice = await vm.run('awk \'$1 == "se.slice" { print $3 }\' /proc/$(' + DAEMON + ')/sched')
    if (vm.release !== 'bookworm') t.equal(slice, '100000\n', 'it has short time slices')
    note(t, exposure.replace(/^\S+\s|\S+\s*$/g, '').trim())

    await options(t, vm)
    t.equal(
      await vm.run(KILL_USERS),
      'same daemon\nsame guard\n',
      'fuser -k of a device does not end the daemon or the guard, which hold it for others',
    )

    // What is open through the tree, mounted or used for swap, stays so.
    const mine = await vm.run(MINE)
    await vm.run(WALKERS)
    await vm.run('systemctl stop diskseqfs')
    await stockLinks(t, vm, 'stopped')
    t.equal(await vm.run('readlink /dev/mine/*'), mine, 'links that another program made are left alone')
    await vm.run('rm -r /dev/mine')
    t.equal(await vm.run('findmnt -n /dev/disk/by-diskseq || echo no mount'), 'no mount\n')
    await vm.run('udevadm settle')
    t.match(await vm.run('readlink /dev/disk/by-diskseq/1'), /^\.\.\/\.\.\/vda\n$/, "stopped: udev's own links are in disk/by-diskseq")

    t.equal(await vm.run(WALK_ON), '', 'a process that has read a name before finds its device beneath')
    t.equal(await vm.run(GONE), '', 'beneath there is nothing of devices that are gone')
    t.equal(await vm.run(REMOVE), '', 'each link goes with its device, or its medium')
    await vm.run('systemctl start diskseqfs')
    if (!SHORT) {
      await vm.run(WALKERS)
      const sweeps: Change = ['  if (has_daemon()) return 0;\n  DIR *tree', '  return 0;\n  DIR *tree']
      const atOnce: Change = [
        '  unlock();\n  return result;\n}\n\nstatic unsigned long long event_diskseq',
        '  unlock();\n  if (!*event->claimed && *event->before && !has_daemon()) system("rm -rf " DIRECTORIES);\n  return result;\n}\n\nstatic unsigned long long event_diskseq',
      ]
      const left = await withLink(t, vm, [sweeps, atOnce], async () => {
        await vm.run('systemctl stop diskseqfs; udevadm settle')
        return [await vm.run(WALK_ON), await vm.run(GONE)]
      })
      t.not(left[0], '', 'twin: it does not if the link is removed as soon as the name has changed')
      t.not(left[1], '', 'twin: if the program does not remove them, links of devices that are gone stay')
      await vm.run(`systemctl start diskseqfs; ${REMOVE}; ${WALKERS}; systemctl stop diskseqfs; udevadm settle`)
      await vm.run(`sed -i.kept '/diskseqfs-link/d' ${RULES}; udevadm control --reload`)
      t.match(await vm.run(REMOVE), /loop\d+p1[^]*dm-|dm-[^]*loop\d+p1/, 'twin: without the rules the links of removed devices stay')
      await vm.run(`mv ${RULES}.kept ${RULES}; udevadm control --reload; systemctl start diskseqfs`)
    }
    await inTree(t, vm, 'started')
    if (!SHORT) {
      t.equal(await starved(vm), 'success\nsuccess\n', 'it stops and starts within its time if it gets little of the processor')
      const quick = 'TimeoutStopSec=3\\nTimeoutStartSec=3'
      t.equal(await starved(vm, quick), 'timeout\ntimeout\n', 'twin: with 3 s, it does not')
      await inTree(t, vm, 'started again')
    }
    for (const unit of ['dev-mapper-vm\\x2dhome.device', 'dev-disk-by\\x2ddiskseq-1.device']) {
      t.equal(await vm.run(`systemctl is-active '${unit}'`), 'active\n', unit)
    }

    await vm.run(
      'ln -s /dev/null /etc/udev/rules.d/61-diskseqfs.rules; systemctl stop diskseqfs; systemctl start diskseqfs; udevadm settle',
    )
    await stockLinks(t, vm, 'switched off')
    await vm.run('udevadm trigger --settle /dev/vda')
    t.match(await vm.run('udevadm info -q property /dev/vda'), /^DISKSEQ=1$/m, "systemd's property is left alone")
    t.equal(await vm.run("systemctl is-active 'dev-disk-by\\x2ddiskseq-1.device'"), 'active\n', 'its unit is left alone')
    await vm.run('rm /etc/udev/rules.d/61-diskseqfs.rules; udevadm control --reload; systemctl stop diskseqfs; systemctl start diskseqfs')
    await inTree(t, vm, 'switched on')

    t.equal(await vm.run(UDEV_WARNINGS), '', 'udev gave no warning')
    const warned = await vm.run(`
      echo 'NO_SUCH_KEY=="1"' >/etc/udev/rules.d/98-wrong.rules; udevadm control --reload; udevadm trigger --settle /dev/vda
      rm /etc/udev/rules.d/98-wrong.rules; udevadm control --reload
      ${UDEV_WARNINGS}`)
    t.match(warned, /98-wrong/, 'twin: it warns of a wrong rule')
    t.equal(await vm.run('systemctl --failed --no-legend'), '', 'no unit has failed')
  },
}

/** Mounted by one of a device's links, all of which lead into the tree. */
const MOUNTED = `
  echo 'KERNEL=="loop*", ENV{DISKSEQFS_LINK}="all"' >/etc/udev/rules.d/60-diskseqfs-all.rules; udevadm control --reload
  truncate -s 8M /run/kept.img; mke2fs -q -t ext4 -L kept /run/kept.img
  losetup --find --show /run/kept.img >/run/kept.disk; udevadm settle
  mkdir /run/kept; echo 'LABEL=kept /run/kept ext4 noauto 0 0' >>/etc/fstab; systemctl daemon-reload
  mount /run/kept
  findmnt -no SOURCE /run/kept | grep -q '^/dev/disk/by-diskseq/.dm/'`
const IS_MOUNTED = 'udevadm settle; sleep 3; mountpoint -q /run/kept'
const UNMOUNT = `
  umount /run/kept 2>/dev/null || true; losetup --detach $(cat /run/kept.disk); rm -r /run/kept.img /run/kept.disk /run/kept /etc/udev/rules.d/60-diskseqfs-all.rules
  sed -i '/^LABEL=kept /d' /etc/fstab; systemctl daemon-reload; udevadm settle`
const KEPT_NAMES = '/run/udev/rules.d/61-diskseqfs-removed.rules'

export const removal: Case = {
  name: 'remove and purge',
  shortOn: 'bookworm',
  async run(t, vm) {
    await vm.run(MOUNTED)
    await vm.run('ln -s /dev/disk/by-diskseq/.dm/4000000000/dm-9 /dev/mapper/gone; dpkg -r diskseqfs')
    t.equal(
      await vm.run(`${IS_MOUNTED} && echo mounted`),
      'mounted\n',
      'a file system that fstab mounts by a path in the tree stays mounted',
    )
    if (vm.release === 'bookworm') {
      const twin = `rm ${KEPT_NAMES}; udevadm control --reload; udevadm trigger --subsystem-match=block; ${IS_MOUNTED} || echo unmounted`
      t.equal(await vm.run(twin), 'unmounted\n', 'twin: if it loses that name, systemd unmounts it')
    }
    await vm.run(`${UNMOUNT}; rm -f ${KEPT_NAMES}; udevadm control --reload`)
    t.equal(
      await vm.run('for path in /dev/mapper/gone /dev/disk/by-diskseq/.dm; do [ ! -L $path ] && [ ! -e $path ] || echo $path; done'),
      '',
      'names of devices that are gone are removed, and everything beneath',
    )
    await stockLinks(t, vm, 'removed')
    await vm.run('udevadm settle')
    t.match(await vm.run('readlink /dev/disk/by-diskseq/1'), /vda/, "udev's own links are back")
    t.equal(await vm.run('findmnt -n /dev/disk/by-diskseq || echo no mount'), 'no mount\n')
    // What udev stored about its devices while the rules were there must not have an effect now.
    t.equal(await vm.run('grep -l DISKSEQFS_LINKS=. /run/udev/data/b* || true'), '', "udev's database")
    await vm.run('dpkg -P diskseqfs')
    t.equal(
      await vm.run("find / -xdev -name '*diskseqfs*' -not -path '/share/*' -not -path '/tmp/*' -not -path '/var/log/*'"),
      '',
      'purged: nothing is left',
    )
    t.equal(await vm.run("systemctl list-units --failed --no-legend '*diskseq*'"), '', 'no unit of ours has failed')

    const node = (await vm.run("dpkg-query -W -f '${Version}' nodejs")).trim()
    const nodeIs = (version: string) => `sed -i '/^Package: nodejs$/,/^$/ s/^Version: .*/Version: ${version}/' /var/lib/dpkg/status`
    const { status, output } = await vm.attempt(`${nodeIs('18.20.4')}; dpkg -i /share/diskseqfs.deb`)
    t.equal(status, 1, 'an old Node.js: the package is not configured')
    t.match(
      output,
      /diskseqfs depends on nodejs \(>= 20\); however:\s+Version of nodejs on system is 18\.20\.4/,
      'dpkg says which it needs',
    )
    await stockLinks(t, vm, 'not configured')

    await vm.run(`${nodeIs(node)}; dpkg --configure -a; udevadm settle`)
    await inTree(t, vm, 'installed again')
  },
}
