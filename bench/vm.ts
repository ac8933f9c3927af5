// SPDX-License-Identifier: MIT
/**
 * Measures beside udev, in a virtual machine with a Debian release: how soon a
 * new disk can be opened by its sequence number, and what an event of the kernel
 * costs the daemon and udev. On the stock system a disk is opened by udev's link
 * and by the tree in C; with the package, by the tree.
 */
import { copyFileSync } from 'node:fs'
import { join } from 'node:path'

import { blkPath } from '../test/helpers/blk.js'
import { packagePath, Vm } from '../test/vm/vm.js'
import { cleanup, median } from './common.js'
import { PEER } from './peers.js'

const DIRECTORY = '/dev/disk/by-diskseq'
const PEER_DIRECTORY = '/run/peer'
const ROUNDS = 50
/** Loop devices, each of which comes, is bound, is released and goes. */
const STORM = 2500
const STORM_TIMEOUT_MS = 1_800_000

export interface Times {
  /** From the return of LOOP_CONFIGURE to an open of the right disk, us. */
  readonly p50: number
  readonly p99: number
}

/** Medians of how long dmsetup takes, us. */
export interface NameCost {
  readonly create: number
  readonly remove: number
}

export interface BesideUdev {
  readonly machine: string
  readonly tree: Times
  /** The tree in C. */
  readonly peer: Times
  /** udev's link, tried until it is there. */
  readonly link: Times
  /** The link, after `udevadm settle`. */
  readonly settled: Times
  readonly events: number
  /** Processor time for each event of the storm, us. */
  readonly daemonUs: number
  readonly udevUs: number
  /** What a name costs with the package, and with the package's service stopped. */
  readonly named: NameCost
  readonly unnamed: NameCost
  /** Medians of how long it takes from a file to a path by diskseq, us; starting Node.js alone, which is in the first. */
  readonly attach: number
  readonly losetup: number
  readonly node: number
}

const ATTACHES = 15

/** Prints how long a command takes, us, again and again; `after` is not part of it. */
const timesOf = (command: string, after: string) => `
  truncate -s 1M /run/attach.img
  measured() { ${command}; }
  for ((i = 0; i < ${ATTACHES}; i++)); do
    udevadm settle
    began=$(date +%s%N); path=$(measured); echo took $((($(date +%s%N) - began) / 1000))
    ${after}
  done
  rm /run/attach.img`

/** The link is there some time after losetup(8) has ended. */
const LOSETUP = `
  loop=$(losetup --find --show /run/attach.img)
  path=${DIRECTORY}/$(cat /sys/block/\${loop#/dev/}/diskseq)
  udevadm wait --timeout=60 $path
  echo $loop`

async function timeOf(vm: Vm, command: string, after = ':'): Promise<number> {
  const output = await vm.run(timesOf(command, after), 600_000)
  return median([...output.matchAll(/^took (\d+)$/gm)].map((match) => Number(match[1])))
}

const NAMES = 30
const NAME_ROUNDS = 4

/** Each of `create` and `remove` waits until udev is done with the device. */
const DMSETUP = `
  ms() { local began=$(date +%s%N); "\${@:2}"; echo $1 $((($(date +%s%N) - began) / 1000)); }
  udevadm settle
  for ((i = 0; i < ${NAMES}; i++)); do
    ms create dmsetup create cost --table '0 2048 zero'
    ms remove dmsetup remove --retry cost
  done`

/** With the service, and without, in turns. */
async function nameCosts(vm: Vm): Promise<{ named: NameCost; unnamed: NameCost }> {
  const found = { named: '', unnamed: '' }
  for (let round = 0; round < NAME_ROUNDS; round++) {
    found.named += await vm.run(`systemctl start diskseqfs; ${DMSETUP}`, 600_000)
    found.unnamed += await vm.run(`systemctl stop diskseqfs; ${DMSETUP}`, 600_000)
  }
  await vm.run('systemctl start diskseqfs; udevadm settle')
  const medianOf = (text: string, what: string) =>
    median([...text.matchAll(new RegExp(`^${what} (\\d+)$`, 'gm'))].map((match) => Number(match[1])))
  const cost = (text: string): NameCost => ({ create: medianOf(text, 'create'), remove: medianOf(text, 'remove') })
  return { named: cost(found.named), unnamed: cost(found.unnamed) }
}

async function appear(vm: Vm, directory: string, first = ''): Promise<Times> {
  const output = await vm.run(`/share/blk appear --dir ${directory} --rounds ${ROUNDS} --between "udevadm settle" ${first}`, 600_000)
  const { p50_ns, p99_ns } = JSON.parse(output)
  return { p50: p50_ns / 1000, p99: p99_ns / 1000 }
}

/** Processor time of services since they were started, us, and how many uevents there have been. */
async function spent(vm: Vm): Promise<number[]> {
  const output = await vm.run(`
    for unit in diskseqfs systemd-udevd; do
      sed -n 's/^usage_usec //p' /sys/fs/cgroup$(systemctl show -P ControlGroup $unit)/cpu.stat
    done
    cat /sys/kernel/uevent_seqnum`)
  return output.trim().split('\n').map(Number)
}

export async function besideUdev(): Promise<BesideUdev> {
  const vm = await Vm.create('trixie')
  cleanup(() => vm.destroy())
  copyFileSync(blkPath(), join(vm.share, 'blk'))
  copyFileSync(PEER, join(vm.share, 'server'))
  copyFileSync(packagePath(), join(vm.share, 'diskseqfs.deb'))
  await vm.boot()
  const link = await appear(vm, DIRECTORY)
  const settled = await appear(vm, DIRECTORY, '--first "udevadm settle"')
  const losetup = await timeOf(vm, LOSETUP, 'losetup --detach $path')
  await vm.run(`
    mkdir ${PEER_DIRECTORY}
    setsid /share/server ${PEER_DIRECTORY} </dev/null >/dev/null 2>&1 &
    for i in $(seq 100); do mountpoint -q ${PEER_DIRECTORY} && exit; sleep 0.1; done
    exit 1`)
  const peer = await appear(vm, PEER_DIRECTORY)
  await vm.run(`umount ${PEER_DIRECTORY}`)
  await vm.run('dpkg -i /share/diskseqfs.deb && udevadm settle')
  const names = await nameCosts(vm)
  const attach = await timeOf(vm, 'diskseqfs attach --grace 0 /run/attach.img')
  const node = await timeOf(vm, 'node -e 0')
  const tree = await appear(vm, DIRECTORY)
  const before = await spent(vm)
  await vm.run(
    `truncate -s 1M /tmp/disk && /share/blk loops ${STORM} /tmp/disk </dev/null && udevadm settle --timeout=1800`,
    STORM_TIMEOUT_MS,
  )
  const after = await spent(vm)
  const [daemonUs = NaN, udevUs = NaN, events = NaN] = after.map((value, i) => value - before[i]!)
  const kernel = (await vm.run('uname -r')).trim()
  return {
    machine: `QEMU, two emulated processors, Debian trixie, Linux ${kernel}`,
    tree,
    peer,
    link,
    settled,
    events,
    daemonUs: daemonUs / events,
    udevUs: udevUs / events,
    ...names,
    attach,
    losetup,
    node,
  }
}
