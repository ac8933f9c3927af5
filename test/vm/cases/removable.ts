// SPDX-License-Identifier: MIT
/**
 * A removable drive that takes its time for each command, as optical drives and card readers do.
 * Only an open can tell whether its medium has changed, so each walk to its name waits for one, and
 * then the answer stands. That works up to --open-timeout for an open; beyond it the caller gets
 * ETIMEDOUT, and no other process notices.
 */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { OPEN_TIMEOUT_S, opener, SLACK_S } from '../opener.js'
import { note } from '../findings.js'
import { TWIN_MOUNTPOINT, withTwin } from '../twin.js'
import type { Outcome, Vm } from '../vm.js'

/** The drive's delay for each command, in ms. */
const DELAYS_MS = [20, 60]
/**
 * The same, with delays where an open needs seconds: it takes two commands, and waits for a third if the kernel is polling
 * the drive.
 */
const SLOW_MS = SHORT ? [500] : [1000, 2500]
const ROUNDS = SHORT ? 1 : 3
/** An open takes some seconds longer than --open-timeout. */
const TOO_SLOW_MS = 8000
/** A mount may succeed even without the memory: seen once in six runs. */
const TWIN_TRIES = 5
const ROUND_TIMEOUT_MS = 10 * 60_000
const TREE = '/dev/disk/by-diskseq'

const DELAY = '/sys/bus/pseudo/drivers/scsi_debug/delay'

/** Sets the drive's delay. The kernel refuses that (EBUSY) while a command is under way, such as one of its own polls. */
const setDelay = (ms: number) => `
  hz=$(sed -n s/^CONFIG_HZ=//p /boot/config-$(uname -r))
  for ((i = 0; i < 1200; i++)); do
    echo $((${ms} * hz / 1000)) 2>/dev/null >${DELAY} && break
    sleep 0.1
  done
  [ $(cat ${DELAY}) = $((${ms} * hz / 1000)) ]`

interface Drive {
  /** Its device node, and its name in the tree. */
  readonly node: string
  readonly diskseq: string
}

/** Calls `use` with a drive that has a file system. */
async function withDrive<T>(vm: Vm, delayMs: number, use: (drive: Drive) => Promise<T>): Promise<T> {
  const output = await vm.run(`
    modprobe scsi_debug removable=1 dev_size_mb=16
    for ((i = 0; i < 600; i++)); do
      disk=$(ls /sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*:*/block 2>/dev/null) && [ -n "$disk" ] && break
      sleep 0.1
    done
    udevadm settle
    mkfs.ext4 -q -F -O ^has_journal /dev/$disk >/dev/null
    udevadm settle
    ${setDelay(delayMs)}
    echo /dev/$disk $(cat /sys/block/$disk/diskseq)`)
  const [node, diskseq] = output.trim().split('\n').at(-1)!.split(' ') as [string, string]
  try {
    return await use({ node, diskseq })
  } finally {
    await vm.attempt(`
      ${setDelay(0)}
      umount -q /mnt
      udevadm settle
      for ((i = 0; i < 100; i++)); do rmmod scsi_debug && break; sleep 0.1; done`)
  }
}

const mount = (path: string) => `mount ${path} /mnt`
/** Gives the type: otherwise mount(8) looks for it on the disk first, which takes ten more commands. */
const mountKnown = (path: string) => `mount -t ext4 -o ro ${path} /mnt`
const read = (path: string) => `dd if=${path} of=/dev/null bs=4k count=1 status=none`

/** Runs the commands one after another, and returns how long that took, in ms. */
async function timed(t: Test, vm: Vm, what: string, commands: readonly string[]): Promise<number> {
  const { status, output } = await vm.attempt(
    `
    set -e
    udevadm settle
    began=$(date +%s%N)
    ${commands.join('\n')}
    echo $((($(date +%s%N) - began) / 1000000))`,
    ROUND_TIMEOUT_MS,
  )
  t.equal(status, 0, `${what}: ${output}`)
  return Number(output.trim().split('\n').at(-1))
}

const once = (path: string) => [mountKnown(path), 'umount /mnt', read(path)]

/** A command takes seconds, and an open takes less than --open-timeout. */
async function slow(t: Test, vm: Vm, delay: number): Promise<void> {
  await withDrive(vm, delay, async ({ node, diskseq }) => {
    const stock = await timed(t, vm, `${delay} ms for a command, the device node`, once(node))
    const ours = await timed(t, vm, `${delay} ms for a command, the tree`, once(`${TREE}/${diskseq}`))
    note(
      t,
      `${delay} ms a command: a mount and an open in ${(ours / 1000).toFixed(1)} s, ` +
        `${(ours / stock).toFixed(2)} times as long as by ${node}`,
    )
  })
}

/** An open takes longer than --open-timeout; later the drive is quick again. */
async function tooSlow(t: Test, vm: Vm): Promise<void> {
  await withDrive(vm, TOO_SLOW_MS, async ({ diskseq }) => {
    const path = `${TREE}/${diskseq}`
    const others = opener(vm)
    const began = Date.now()
    const [opened, mounted] = await Promise.all([
      vm.attempt(`${read(path)} 2>&1 | sed 's/.*: //'; stat -c %F ${path}`),
      vm.run(`/share/blk mount --path ${path} --dir /mnt`),
    ])
    const seconds = (Date.now() - began) / 1000
    t.equal(
      opened.output,
      'Connection timed out\nblock special file\n',
      'a caller that opens a drive that is too slow gets ETIMEDOUT, and may look at the drive',
    )
    t.equal(mounted, '{"error":110}\n', 'a caller that mounts it gets ETIMEDOUT, too')
    t.ok(seconds < OPEN_TIMEOUT_S + SLACK_S, `after ${seconds.toFixed(0)} s`)
    const { errors, n, max_ns } = await others()
    t.strictSame(errors, {}, `meanwhile another disk was opened ${n} times`)
    t.ok(max_ns / 1e9 < OPEN_TIMEOUT_S, 'no open of the other disk waited for the drive')
    note(t, `${TOO_SLOW_MS} ms a command: ETIMEDOUT after ${seconds.toFixed(0)} s; others waited ${Math.round(max_ns / 1e6)} ms at most`)
    await vm.run(setDelay(0))
    await timed(t, vm, 'once the drive is quick, it can be used again', once(path))
  })
}

export const removable: Case = {
  name: 'removable drive',
  shortOn: 'none',
  async run(t: Test, vm: Vm) {
    for (const delay of DELAYS_MS) {
      await withDrive(vm, delay, async ({ diskseq }) => {
        const path = `${TREE}/${diskseq}`
        const round = [mount(path), 'umount /mnt', read(path)]
        const ms = await timed(t, vm, `${delay} ms for a command`, Array.from({ length: ROUNDS }, () => round).flat())
        note(t, `${delay} ms a command: ${ROUNDS} mounts and opens in ${ms} ms`)
      })
    }
    for (const delay of SLOW_MS) await slow(t, vm, delay)
    await tooSlow(t, vm)
    await withTwin(vm, 'no-walk-memory', () =>
      withDrive(vm, DELAYS_MS[0]!, async ({ diskseq }) => {
        let outcome: Outcome
        let tries = 0
        do outcome = await vm.attempt(`timeout 60 ${mount(`${TWIN_MOUNTPOINT}/${diskseq}`)}; status=$?; umount -q /mnt; exit $status`)
        while (outcome.status === 0 && ++tries < TWIN_TRIES)
        t.not(outcome.status, 0, `if each answer has the drive asked anew, mount fails: ${outcome.output.trim()}`)
      }),
    )
  },
}
