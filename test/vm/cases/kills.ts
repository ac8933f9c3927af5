// SPDX-License-Identifier: MIT
/**
 * The daemon, its guard, or both are killed again and again, and the package is upgraded again and
 * again, while disks come and go. Callers that wait are answered, and none gets an error or another
 * disk. Afterwards the state of the machine shows that nothing has added up.
 */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import type { Outcome, Vm } from '../vm.js'
import { DAEMON } from './restart.js'

const DAEMONS = SHORT ? 10 : 60
const GUARDS = SHORT ? 3 : 20
const UPGRADES = SHORT ? 1 : 20
/** Disks held open through the tree, more than fit into one message (SCM_MAX_FD, 253). */
const DISKS = 400
/** A load that leaves the machine time for new daemons, each of which takes seconds under emulation. */
const CHURN = '--recyclers 1 --openers 2 --devices 4 --live-us 140000'
/** As many busy loops, none of which waits, leave everything else about a third of the processors. */
const BUSY = 'for ((i = 0; i < 2 * $(nproc); i++)); do (while :; do :; done) & done'

/** The least time that a daemon needs before it is ready, in ms. */
const NODE_ALONE = 'began=$(date +%s%N); node -e 0; echo $((($(date +%s%N) - began) / 1000000))'

const GUARD = 'systemctl show -P MainPID diskseqfs'

interface Way {
  readonly what: string
  readonly times: number
  /** Shell commands: they end the processes; {@link PAUSE} follows. */
  readonly script: string
  readonly busy?: boolean
}

const ways: readonly Way[] = [
  { what: 'the daemon, once a second', times: DAEMONS, script: `pkill -KILL -P $(${GUARD}) -f '^[^ ]*node' || true; sleep 1` },
  { what: 'the guard', times: GUARDS, script: 'kill -KILL $old; another_guard' },
  { what: 'both at once', times: GUARDS, script: `kill -STOP $old; kill -KILL $(${DAEMON}) $old; another_guard` },
  {
    what: 'the daemon, on a third of a processor',
    times: SHORT ? 1 : 5,
    script: `pkill -KILL -P $(${GUARD}) -f '^[^ ]*node'; another_daemon; sleep 10`,
    busy: true,
  },
]

const WAITS = `
  another_guard() {
    # The service manager may have other things to do for minutes; the tree has somebody who answers meanwhile.
    for ((i = 0; i < 6000; i++)); do
      [ "$(${GUARD})" != "$old" ] && [ -n "$(${DAEMON})" ] && break
      sleep 0.1
    done
    another_daemon
  }
  another_daemon() {
    for ((i = 0; i < 1200; i++)); do
      now=$(${DAEMON})
      [ "\${now:-$daemon}" != "$daemon" ] && return
      sleep 0.1
    done
    return 1
  }`

function figures({ status, output }: Outcome): Record<string, any> {
  if (status !== 0) throw new Error(output)
  return JSON.parse(output)
}

/** Opens a disk that stays, and disks that come and go, until it is told to stop. */
function load(vm: Vm) {
  const until = 'until [ -e /run/enough ]; do sleep 0.2; done; kill -TERM $!; wait $! || true'
  const steady = vm.start(`/share/blk openlat --path /dev/mapper/vm-srv --count 100000000 --pause-ms 20 --close-immediately & ${until}`)
  const churn = vm.start(`/share/blk churn --mode tree --dir /dev/disk/by-diskseq --seconds 100000 ${CHURN} & ${until}`)
  return async () => {
    await vm.run('touch /run/enough')
    const result = { steady: figures(await steady.ended()), recycled: figures(await churn.ended()) }
    await vm.run('rm /run/enough')
    return result
  }
}

async function again(t: Test, vm: Vm, { what, times, script, busy }: Way): Promise<void> {
  const enough = load(vm)
  const loops = busy ? vm.start(`${BUSY}; until [ -e /run/enough ]; do sleep 0.2; done; kill $(jobs -p)`) : undefined
  const program = busy ? await vm.run(NODE_ALONE) : ''
  await vm.run(
    `${WAITS}
    for ((n = 0; n < ${times}; n++)); do
      old=$(${GUARD}); daemon=$(${DAEMON})
      ${script}
    done
    another_daemon
    sleep 10`,
    (780 + times * 60) * 1000,
  )
  const { steady, recycled } = await enough()
  await loops?.ended()
  const longest = Math.max(steady['max_ns'] / 1e9, recycled['max_open_us'] / 1e6)
  const compared = busy ? `, where Node.js needs ${(Number(program) / 1000).toFixed(1)} s for no program at all` : ''
  note(t, `${what}, ${times} times: ${recycled['opens_ok']} opens, longest wait ${longest.toFixed(1)} s${compared}`)
  t.equal(recycled['wrong_diskseq'] + recycled['wrong_data'], 0, `${what}: no open reached another disk`)
  t.strictSame(steady['errors'], {}, `${what}: no open of a disk that is there has failed`)
  t.strictSame(
    Object.keys(recycled['errors']).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'),
    [],
    `${what}: no errno but those for a disk that is gone`,
  )
  t.ok(recycled['opens_ok'] > 10, `${what}: disks were opened`)
}

/** How many of the disks can be opened, and how often the journal says that something could not be stored. */
const STATE = `
    n=0
    for d in $(cat /run/diskseqs); do (: </dev/disk/by-diskseq/$d) && n=$((n + 1)); done
    echo $n
    journalctl -b -u diskseqfs -o cat --no-pager | grep -c 'not kept\\|cannot tell\\|does not fit' || true`

/** Many disks are in use, so that there is more to hand over than fits into a message. */
async function upgrades(t: Test, vm: Vm): Promise<void> {
  await vm.run(
    `
    dpkg-deb -R /share/diskseqfs.deb /run/upgrade
    truncate -s 1M /run/disk
    for ((i = 0; i < ${DISKS}; i++)); do losetup --find --show /run/disk; done >/run/disks
    for d in $(cat /run/disks); do cat /sys/block/\${d#/dev/}/diskseq; done >/run/diskseqs
    # Where there is much to do, it does not answer for so long.
    for ((i = 0; i < 10; i++)); do udevadm settle --timeout=120 && break; done
    setsid bash -c 'fd=20; for n in $(cat /run/diskseqs); do eval "exec $fd</dev/disk/by-diskseq/$n"; fd=$((fd + 1)); done; touch /run/held; exec sleep infinity' >/run/holder.log 2>&1 </dev/null &
    echo $! >/run/holder
    for ((i = 0; i < 600; i++)); do [ -e /run/held ] && break; sleep 0.1; done`,
    1_800_000,
  )
  const outcomes: string[] = []
  for (let i = 0; i < UPGRADES; i++) {
    outcomes.push(
      await vm.run(
        `${WAITS}
        sed -i 's/^Version: .*/Version: 0.9.${i}/' /run/upgrade/DEBIAN/control
        dpkg-deb -Zgzip -z1 -b /run/upgrade /run/upgrade.deb >/dev/null
        old=$(${GUARD}); daemon=$(${DAEMON})
        dpkg -i /run/upgrade.deb >/dev/null 2>&1
        another_guard
        ${STATE}`,
        300_000,
      ),
    )
  }
  t.strictSame(
    outcomes,
    outcomes.map(() => `${DISKS}\n0\n`),
    `${UPGRADES} upgrades`,
  )
  note(t, `upgraded ${UPGRADES} times with ${DISKS} disks open`)
  await vm.run(
    `kill $(cat /run/holder); for d in $(cat /run/disks); do losetup -d $d; done; rm -rf /run/held /run/upgrade* /run/disk*; udevadm settle --timeout=300`,
    300_000,
  )
}

// Once each: restart.ts; again and again: test/live/handover.test.ts.
const shortOn = 'none'

export const kills: readonly Case[] = [
  ...ways.map((way) => ({ name: `killed again and again: ${way.what}`, shortOn, run: (t: Test, vm: Vm) => again(t, vm, way) }) as const),
  { name: 'upgraded again and again', shortOn, run: upgrades },
]
