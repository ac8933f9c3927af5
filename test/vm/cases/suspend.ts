// SPDX-License-Identifier: MIT
/**
 * The system goes to sleep while processes open and look at disks through the tree: it does so each
 * time. Of the sleep only the freezing of all processes takes place (pm_test).
 */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'
import { ANOTHER, DAEMON } from './restart.js'

const TIMES = SHORT ? 3 : 20
const TWIN_TIMES = 3
/** How much longer than a stock system's a sleep may take; more on a machine that does other work. */
const LATER_MS = SHORT ? 10_000 : 3000

/** Two processes that open and two that look, and four that open as fast as they can, until a file appears. */
const USERS = `
  echo freezer >/sys/power/pm_test
  user() { until [ -e /run/rested ]; do "$@" || echo "$*" >>/run/failed; sleep 0.1; done; }
  reads() { : </dev/mapper/vm-srv; }
  looks() { stat -L /dev/mapper/vm-home >/dev/null && df /srv >/dev/null; }
  for ((i = 0; i < 2; i++)); do user reads & user looks & done
  openers=
  for ((i = 0; i < 4; i++)); do
    /share/blk openlat --path /dev/mapper/vm-srv --count 100000000 --seconds 3600 --close-immediately >/dev/null & openers+=" $!"
  done
  trap 'touch /run/rested; kill $openers; wait; rm -f /run/rested /run/failed; echo none >/sys/power/pm_test' EXIT`

interface Sleeps {
  readonly failed: number
  /** How long they took, in ms. */
  readonly median: number
}

/** @param by what sends the system to sleep, and fails if it does not */
async function sleeps(vm: Vm, by: string, times: number): Promise<Sleeps> {
  const output = await vm.run(
    `${USERS}
    failed=0
    for ((i = 0; i < ${times}; i++)); do
      began=$(date +%s%N)
      { ${by}; } 2>/dev/null || failed=$((failed + 1))
      echo took $((($(date +%s%N) - began) / 1000000))
      sleep 0.5
    done
    [ ! -e /run/failed ] || sort /run/failed | uniq -c >&2
    echo "failed $failed"`,
    1_200_000,
  )
  const took = [...output.matchAll(/^took (\d+)$/gm)].map((match) => Number(match[1])).sort((a, b) => a - b)
  return { failed: Number(/^failed (\d+)$/m.exec(output)?.[1]), median: took[took.length >> 1] ?? NaN }
}

const SUSPEND = 'systemctl start systemd-suspend.service'
/** systemd does not hibernate if no `resume=` says where from; so its steps are done by hand. */
const HIBERNATE = `
  hooks() { for hook in /usr/lib/systemd/system-sleep/*; do [ ! -x "$hook" ] || "$hook" $1 hibernate; done; }
  hooks pre; slept=0; echo disk >/sys/power/state || slept=1; hooks post; [ $slept = 0 ]`
const KINDS = [
  { what: 'suspend', by: SUSPEND, times: TIMES },
  { what: 'hibernate', by: HIBERNATE, times: SHORT ? 1 : 5 },
]

async function allKinds(vm: Vm): Promise<Sleeps[]> {
  const results: Sleeps[] = []
  for (const { by, times } of KINDS) results.push(await sleeps(vm, by, times))
  return results
}

/** A group of processes that open and look all the time is frozen (the cgroup freezer), and goes on. */
const FREEZES = `
  use='while :; do : </dev/mapper/vm-srv && stat -L /dev/mapper/vm-home >/dev/null || echo failed; done'
  trap 'systemctl stop frozen' EXIT
  systemd-run -q --unit=frozen bash -c "$use & $use & $use"
  failed=0
  for ((i = 0; i < ${TIMES}; i++)); do
    systemctl freeze frozen && sleep 0.2 && systemctl thaw frozen || failed=$((failed + 1))
    sleep 0.3
  done
  echo $failed $(journalctl -b -q -u frozen -o cat --no-pager | grep -cx failed)`

/** While the tree is covered, the service is restarted and its daemon killed. */
const MEANWHILE = `
  ${ANOTHER}
  mounts() { findmnt -rno FSTYPE --mountpoint /dev/disk/by-diskseq | tr '\n' ' '; echo; }
  /usr/lib/systemd/system-sleep/diskseqfs pre suspend
  mounts
  before=$(${DAEMON}); systemctl restart diskseqfs; another
  [ -b /dev/mapper/vm-srv ] && dd if=/dev/mapper/vm-srv of=/dev/null count=1 status=none && mounts
  before=$(${DAEMON}); kill -KILL $before; another
  [ -b /dev/mapper/vm-srv ] && dd if=/dev/mapper/vm-srv of=/dev/null count=1 status=none && mounts
  /usr/lib/systemd/system-sleep/diskseqfs post suspend
  [ -b /dev/mapper/vm-srv ] && dd if=/dev/mapper/vm-srv of=/dev/null count=1 status=none && mounts`

export const suspend: Case = {
  name: 'suspend while disks are opened and looked at',
  shortOn: 'none',
  before: allKinds,
  async run(t: Test, vm: Vm, before: unknown) {
    const ours = await allKinds(vm)
    for (const [i, { what, times }] of KINDS.entries()) {
      const [{ failed, median }, stock] = [ours[i] as Sleeps, (before as Sleeps[])[i] as Sleeps]
      note(t, `${times} times ${what}: ${failed} failed, median ${median} ms; stock: ${stock.failed} and ${stock.median} ms`)
      t.equal(failed, 0, `${what}: it goes to sleep each time`)
      // Five programs run for it, which takes an emulated machine a second. The kernel waits 20 s for a process that
      // cannot be frozen.
      t.ok(median < stock.median + LATER_MS, `${what}: ${median} ms, ${stock.median} on a stock system`)
    }
    t.equal(await vm.run('findmnt -n -o FSTYPE /dev/disk/by-diskseq'), 'fuse.diskseqfs\n', 'the tree is there, once')
    await vm.run('udevadm settle')
    t.match(await vm.run('readlink /dev/mapper/vm-srv'), /by-diskseq/)
    t.equal(
      await vm.run(MEANWHILE),
      'fuse.diskseqfs devtmpfs \nfuse.diskseqfs devtmpfs \nfuse.diskseqfs devtmpfs \nfuse.diskseqfs \n',
      'with a restart and a crash meanwhile the same mount is there again',
    )
    t.equal(await vm.run(FREEZES, 600_000), '0 0\n', `processes that open and look are frozen, ${TIMES} times, and no call fails`)
    const twin = await sleeps(vm, 'echo freeze >/sys/power/state', TWIN_TIMES)
    t.ok(twin.failed > 0, `twin: of ${TWIN_TIMES} times that are not announced, ${twin.failed} fail`)
  },
}
