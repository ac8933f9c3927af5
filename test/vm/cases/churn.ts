// SPDX-License-Identifier: MIT
/**
 * The tree's own churn test (test/live/churn.test.ts) on the release's kernel. Disks are recycled
 * as fast as possible, each is opened by its sequence number, and each descriptor must be the disk
 * in its name. Beside it, the same through the links that udev makes on the stock system. On
 * kernels before 6.11 a daemon that does not check that a loop device is bound must show wrong
 * opens.
 */

import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import { TWIN_MOUNTPOINT, withTwin } from '../twin.js'
import type { Vm } from '../vm.js'

const TREE = '/dev/disk/by-diskseq'
const SECONDS = SHORT ? 8 : 15
/** udev needs time for each disk, so this is how long they live at most. */
const LINKED_LIVE_US = 200_000

export interface Result {
  readonly opens: number
  readonly opens_ok: number
  readonly opens_ok_part: number
  readonly wrong_diskseq: number
  readonly wrong_data: number
  readonly recycles: number
  readonly minor_moves: number
  readonly errors: Record<string, number>
  readonly read_errors: Record<string, number>
}

/**
 * In seconds there are more events than udev can handle in minutes, and it would leave the tests
 * little of an emulated processor. So it is paused meanwhile, and restarted without these events.
 */
const UDEV_UNITS = 'systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd.service'
export const UDEV_PAUSES = 'udevadm control --stop-exec-queue'
export const UDEV_RESUMES = `systemctl stop ${UDEV_UNITS}; systemctl start ${UDEV_UNITS}; udevadm settle`

export function parse(output: string): Result {
  return JSON.parse(output.slice(output.indexOf('{"mode"')).split('\n')[0] as string) as Result
}

/** Recycles as fast as possible. */
async function churn(vm: Vm, options = ''): Promise<Result> {
  const output = await vm.run(
    `
    trap '${UDEV_RESUMES}' EXIT
    ${UDEV_PAUSES}
    /share/blk churn --mode tree --dir ${TREE} --seconds ${SECONDS} ${options}
    `,
  )
  return parse(output)
}

/** Recycles at udev's pace: in mode "udev" each disk is opened once udev has made its link. */
async function churnWithUdev(vm: Vm, mode: 'tree' | 'udev'): Promise<Result> {
  const output = await vm.run(
    `
    trap 'udevadm settle --timeout=120' EXIT
    /share/blk churn --mode ${mode} --dir ${TREE} --seconds ${SECONDS} --live-us ${LINKED_LIVE_US}
    `,
  )
  return parse(output)
}

/** A daemon without the check of loop devices, on a mount point of its own. */
function churnWithoutLoopCheck(vm: Vm): Promise<Result> {
  return withTwin(vm, 'no-loop-check', async () => {
    const output = await vm.run(`
      trap '${UDEV_RESUMES}' EXIT
      ${UDEV_PAUSES}
      /share/blk churn --mode tree --dir ${TWIN_MOUNTPOINT} --seconds ${SECONDS}`)
    return parse(output)
  })
}

export const wrong = (result: Result): number => result.wrong_diskseq + result.wrong_data
export const figures = (result: Result): string => `${wrong(result)} wrong, ${result.opens_ok} right, ${result.recycles} disks recycled`

export const churnCase: Case = {
  name: 'churn',
  shortOn: 'trixie',
  before: (vm) => churnWithUdev(vm, 'udev'),
  async run(t: Test, vm: Vm, before: unknown) {
    const stock = before as Result
    let right = 0
    for (const what of ['disks', 'partitions']) {
      const result = await churn(vm, what === 'partitions' ? '--parts' : '')
      note(t, `${what}: ${figures(result)}`)
      t.comment(JSON.stringify(result))
      t.equal(result.wrong_diskseq, 0, `${what}: no open reached another disk`)
      t.equal(result.wrong_data, 0, `${what}: no open read another disk's data`)
      right += result.opens_ok
      t.ok(result.recycles > 100, `${what}: numbers were reused all the time`)
      if (what === 'partitions') t.ok(result.minor_moves > 0, 'partition numbers moved between disks')
      t.strictSame(
        Object.keys(result.errors).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'),
        [],
        `${what}: no errno but those for a disk that is gone`,
      )
    }
    const slow = await churnWithUdev(vm, 'tree')
    note(t, `disks that live ${LINKED_LIVE_US / 2000} ms on average: ${figures(slow)}; stock udev's links: ${figures(stock)}`)
    t.equal(wrong(slow), 0, 'disks that live longer: no open reached another disk')
    // Counts all runs together. An emulated daemon may hear of disks faster than it can answer that
    // they are gone, and then only the slow ones can be opened.
    t.ok(right + slow.opens_ok > 100, 'enough disks were opened')
    t.ok(wrong(stock) > 0, "udev's links reached other disks")

    const twin = await churnWithoutLoopCheck(vm)
    const kernel = (await vm.run('uname -r')).trim()
    note(t, `without the look at loop devices, Linux ${kernel}: ${figures(twin)}`)
    const [major = 0, minor = 0] = kernel.split('.').map(Number)
    if (major < 6 || (major === 6 && minor < 11)) t.ok(wrong(twin) > 0, 'the check of loop devices is needed')
    // Left bound, that is: an open of a node while its device goes makes the driver add the device
    // again, empty (loop_probe; udev's workers do this too on a stock system).
    t.equal(await vm.run('losetup --noheadings --output NAME'), '', 'no loop device is left bound')
  },
}
