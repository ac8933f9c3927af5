// SPDX-License-Identifier: MIT
/** The service is stopped and started with many device-mapper devices: no name is dead meanwhile. */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { links, LEFT_ALONE } from '../links.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'
import { type Deed, inWords, watched } from '../watch.js'
import { DAEMON } from './restart.js'

const FEW = 50
const MANY = SHORT ? 200 : 800
/** How much the time for each device may grow: for a larger index, but not for another look at all devices. */
const GROWTH = 2
/** How often each name must be looked at, at least. */
const LOOKS_MIN = 5

/** Makes the devices from $1 to $2, without a name until udev has seen them. */
const MAKE = `
  make() {
    local i
    for ((i = $1; i < $2; i++)); do dmsetup create --noudevsync many-$i --table '0 2048 zero'; done
    udevadm settle --timeout=1200
    for ((i = $1; i < $2; i++)); do
      [[ $(readlink /dev/mapper/many-$i) == /dev/disk/by-diskseq/* ]] || { echo "many-$i -> $(readlink /dev/mapper/many-$i)"; return 1; }
    done
  }`

interface Stop {
  /** Time of the program that gives names back, and of the whole stop. */
  readonly link: number
  readonly stop: number
}

/** Stops the service, and starts it. A process that opens names one after another meanwhile gets the right disks. */
async function stops(t: Test, vm: Vm, count: number): Promise<Stop> {
  const outcome = await vm.run(
    `
    ms() { local began=$(date +%s%N); "$@"; echo $((($(date +%s%N) - began) / 1000000)); }
    opens() {
      local i failed=0 n=0
      until [ -e /run/enough ]; do
        for ((i = 0; i < ${count}; i += 7)); do
          n=$((n + 1))
          (: </dev/mapper/many-$i) || failed=$((failed + 1))
        done
      done
      echo $failed >/run/failed
    }
    opens 2>/run/failures & opener=$!
    stop=$(ms systemctl stop diskseqfs)
    ! findmnt -n /dev/disk/by-diskseq
    dead=0
    for ((i = 0; i < ${count}; i++)); do [ -e /dev/mapper/many-$i ] || dead=$((dead + 1)); done
    touch /run/enough; wait $opener
    result=$(systemctl show -P Result diskseqfs)
    systemctl start diskseqfs
    udevadm settle --timeout=1200
    # With names that lead into a tree that is there.
    link=$(ms /usr/lib/udev/diskseqfs-link stock)
    udevadm trigger --subsystem-match=block; udevadm settle --timeout=1200
    echo $(cat /run/failed) $dead $result $link $stop
    sort /run/failures | uniq -c | head
    rm /run/enough /run/failed /run/failures`,
    1_800_000,
  )
  const [figures = '', ...failures] = outcome.trim().split('\n')
  const [failed, dead, result, link, stop] = figures.split(' ')
  for (const failure of failures) note(t, failure.trim())
  t.strictSame({ failed, dead, result }, { failed: '0', dead: '0', result: 'success' }, `${count} devices: no open failed, no name is dead`)
  return { link: Number(link), stop: Number(stop) }
}

/** Each must leave mounts and swap as they are, and each name with its device. */
const DEEDS: readonly Deed[] = [
  { what: 'stop', script: 'systemctl stop diskseqfs' },
  { what: 'start', script: 'systemctl start diskseqfs' },
  { what: 'restart', script: 'systemctl restart diskseqfs' },
  { what: 'the daemon is killed', script: `kill -KILL $(${DAEMON}); sleep 5` },
  { what: 'the guard is killed', script: 'kill -KILL $(systemctl show -P MainPID diskseqfs); sleep 5' },
  { what: 'upgrade', script: 'dpkg -i /share/diskseqfs.deb >/dev/null' },
  { what: 'removal', script: 'dpkg -r diskseqfs >/dev/null' },
  { what: 'installation', script: 'dpkg -i /share/diskseqfs.deb >/dev/null' },
]
/** When the tree comes to a running system, udev removes its own names first. */
const COMES = ['start', 'installation']

async function inUse(t: Test, vm: Vm): Promise<void> {
  // Only some of the many devices, so that each is looked at often.
  const names = '/dev/mapper/vm-* /dev/mapper/many-*0'
  for (const result of await watched(vm, DEEDS, names, 'home.mount srv.mount')) {
    note(t, inWords(result))
    t.strictSame(result.troubles, [], `${result.what}: nothing is unmounted or switched off`)
    if (!COMES.includes(result.what)) t.strictSame(result.gaps, [], `${result.what}: all names lead to their devices all the time`)
    t.ok(result.looks >= LOOKS_MIN, `${result.what}: the names were looked at`)
  }
}

export const many: Case = {
  name: 'many: the service is stopped with many device-mapper devices',
  // Takes udev minutes.
  shortOn: 'none',
  async run(t, vm) {
    try {
      await vm.run(`${MAKE}; make 0 ${FEW}`, 600_000)
      const few = await stops(t, vm, FEW)
      await vm.run(`${MAKE}; make ${FEW} ${MANY}`, 1_800_000)
      const all = await stops(t, vm, MANY)
      await inUse(t, vm)
      const growth = all.link / MANY / (few.link / FEW)
      t.ok(growth < GROWTH, `for each device ${growth.toFixed(1)} times as long with ${MANY} as with ${FEW}`)
      note(t, `stopped with ${MANY} devices: ${all.stop} ms, of which names ${all.link} ms; with ${FEW}: ${few.stop}, ${few.link} ms`)
    } finally {
      await vm.run(`for d in /dev/mapper/many-*; do dmsetup remove --noudevsync \${d##*/}; done; udevadm settle --timeout=1200`, 1_800_000)
    }
    const { tree, stock, left, wrong } = await links(vm)
    t.ok(tree.length > 5)
    t.strictSame({ stock, left, wrong }, { stock: [], left: LEFT_ALONE, wrong: [] })
  },
}
