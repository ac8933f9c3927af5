// SPDX-License-Identifier: MIT
/**
 * Device-mapper tables that name their device by its path in the tree. libdm passes the path on as
 * it is, and the kernel looks it up in the ioctl (DM_TABLE_LOAD, lookup_bdev): a caller that takes
 * the device by number, as mount(2) does. While the numbers of the disks are used again, each table
 * must have the disk in the name, or fail.
 */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import { TWIN_MOUNTPOINT, withTwin } from '../twin.js'
import type { Vm } from '../vm.js'
import { figures, parse, type Result, UDEV_PAUSES, UDEV_RESUMES, wrong } from './churn.js'

const TREE = '/dev/disk/by-diskseq'
const SECONDS = SHORT ? 15 : 60
/** A busy machine needs more rounds. */
const ROUNDS_MAX = 5
/** The errnos for a disk that is gone. Linux 6.1 turns each errno that the path is refused with into ENODEV. */
const GONE = ['ENOENT', 'ENXIO', 'ENODEV']
const TABLES_MIN = 100
/** How long a disk lives at most; half of that on average. An emulated machine takes its time for a table. */
const LIVE_US = 1_000_000

/**
 * Loads tables and removes them, while disks are recycled. Two programs keep the processors busy,
 * so every second caller waits for a processor after it was answered. Only a pin keeps the disk's
 * number from another disk meanwhile.
 */
async function load(vm: Vm, directory: string, enough: (result: Result) => boolean): Promise<Result[]> {
  const results: Result[] = []
  while (results.length < ROUNDS_MAX && !results.some(enough)) {
    const output = await vm.run(`
      for i in 1 2; do (while :; do :; done) & done
      trap 'kill $(jobs -p); ${UDEV_RESUMES}' EXIT
      ${UDEV_PAUSES}
      /share/blk churn --mode tree --way dm-table --dir ${directory} --seconds ${SECONDS} --live-us ${LIVE_US} --recyclers 1 --openers 8`)
    results.push(parse(output))
  }
  return results
}

/** The usual program for it. */
async function dmsetup(t: Test, vm: Vm): Promise<void> {
  const output = await vm.run(`
    truncate -s 1M /run/table.img
    loop=$(losetup --find --show /run/table.img)
    diskseq=$(cat /sys/block/\${loop#/dev/}/diskseq)
    table="0 8 linear ${TREE}/$diskseq 0"
    trap 'dmsetup remove table; losetup --detach $loop; rm /run/table.img' EXIT
    dmsetup create table --table "$table"
    dm=$(dmsetup info --columns --noheadings --separator : -o major,minor table)
    [ "$(cat /sys/dev/block/$dm/slaves/*/diskseq)" = $diskseq ] && echo "its disk"
    dmsetup remove table
    losetup --detach $loop
    trap 'rm /run/table.img' EXIT
    dmsetup create table --table "$table" 2>&1 | sed -n 's/.*failed: //p' || true`)
  t.match(
    output,
    /^its disk\nNo such (file or directory|device)\n$/,
    'dmsetup makes a table of the disk in the name, and none once that disk is gone',
  )
}

export const tables: Case = {
  name: 'tables that name a disk by path',
  shortOn: 'trixie',
  async run(t: Test, vm: Vm) {
    await dmsetup(t, vm)
    const results = await load(vm, TREE, ({ opens_ok }) => opens_ok >= TABLES_MIN)
    for (const result of results) {
      note(t, figures(result))
      t.comment(JSON.stringify(result))
      t.equal(wrong(result), 0, 'no table got another disk')
      t.strictSame(
        Object.keys(result.errors).filter((errno) => !GONE.includes(errno)),
        [],
        'no errno but those for a disk that is gone',
      )
      t.strictSame(result.read_errors, {}, 'each table shows which disk it has')
    }
    const last = results.at(-1)!
    t.ok(last.opens_ok >= TABLES_MIN, 'tables were made')
    t.ok(last.recycles > 5, 'while numbers were used again')

    const twin = await withTwin(vm, 'no-pins', () => load(vm, TWIN_MOUNTPOINT, (result) => wrong(result) > 0))
    note(t, `without pins: ${twin.map(figures).join('; ')}`)
    t.ok(wrong(twin.at(-1)!) > 0, 'twin: without pins tables get other disks')
    t.equal(await vm.run('dmsetup ls | grep -c churn-table || true'), '0\n', 'no device is left behind')
  },
}
