// SPDX-License-Identifier: MIT
/**
 * The guarantee itself. Disks are recycled as fast as the kernel allows, and six openers open them
 * by number. Half of the openers are SCHED_IDLE, and so are preempted between the answer and the
 * open as often as possible. Each descriptor must be the disk in its name. Without the pins, and
 * through plain symlinks as udev makes them, the same run must show wrong opens: otherwise it
 * proves nothing.
 */
import { mkdtempSync, rmdirSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { addCounts } from '../helpers/blk.js'
import { churnRuns } from '../helpers/churn.js'
import { LONG, twoForms } from '../helpers/long.js'
import { startTree } from '../helpers/tree.js'

const SECONDS = LONG ? 30 : 2
const TWIN_SECONDS = 3
const OPENS_MIN = LONG ? 20_000 : 500
const RECYCLES_MIN = LONG ? 1000 : 200

interface Options {
  readonly mode?: 'tree' | 'links'
  readonly parts: boolean
  readonly seconds: number
  readonly more?: readonly string[]
  readonly lives?: number
  /** Ends the test when this holds: see {@link churnRuns}. */
  readonly until: (sum: Counts) => boolean
}

const FIELDS = [
  'opens_ok',
  'opens_ok_idle',
  'opens_ok_part',
  'wrong_diskseq',
  'wrong_data',
  'wrong_part',
  'recycles',
  'minor_moves',
] as const

interface Counts extends Record<(typeof FIELDS)[number], number> {
  readonly errors: Record<string, number>
}

async function churn(t: Test, dir: string, { mode = 'tree', parts, seconds, more = [], lives, until }: Options): Promise<Counts> {
  const sum = { ...Object.fromEntries(FIELDS.map((field) => [field, 0])), errors: {} } as Counts
  const args = ['--mode', mode, '--dir', dir, '--seconds', String(seconds), ...(parts ? ['--parts'] : []), ...more]
  for await (const result of churnRuns(args, lives)) {
    for (const field of FIELDS) sum[field] += result[field]
    addCounts(sum.errors, result['errors'])
    if (until(sum)) break
  }
  const { opens_ok, opens_ok_idle, wrong_diskseq, wrong_data, recycles, errors } = sum
  t.comment(
    `${t.name}: ${opens_ok} opens right (${opens_ok_idle} by SCHED_IDLE), ` +
      `${wrong_diskseq} wrong disks, ${wrong_data} wrong contents, ` +
      `${recycles} disks recycled, errors ${JSON.stringify(errors)}`,
  )
  return sum
}

for (const parts of [false, true]) {
  const what = parts ? 'partitions' : 'disks'

  t.test(twoForms(`${what}: every open reaches the disk in its name`), async (t) => {
    const tree = await startTree(t)
    const until = (sum: Counts) =>
      sum.opens_ok >= OPENS_MIN && sum.opens_ok_idle > 0 && sum.recycles > RECYCLES_MIN && (!parts || sum.minor_moves > 0)
    const result = await churn(t, tree.mountpoint, { parts, seconds: SECONDS, until })
    t.equal(result.wrong_diskseq, 0, 'no open reached another disk')
    t.equal(result.wrong_data, 0, "no open read another disk's data")
    t.ok(result.opens_ok >= OPENS_MIN, `at least ${OPENS_MIN} opens`)
    t.ok(result.opens_ok_idle > 0, 'some of them by SCHED_IDLE openers')
    t.ok(result.recycles > RECYCLES_MIN, 'numbers were reused all the time')
    t.strictSame(
      Object.keys(result.errors).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'),
      [],
      'no errno but those for a disk that is gone',
    )
    if (parts) t.ok(result.minor_moves > 0, 'partition numbers moved between disks')
  })

  t.test(`${what}, twin: plain symlinks let wrong opens through`, async (t) => {
    const dir = mkdtempSync(join(tmpdir(), 'diskseqfs-links-'))
    t.teardown(() => rmdirSync(dir))
    const result = await churn(t, dir, { mode: 'links', parts, seconds: TWIN_SECONDS, until: ({ wrong_diskseq }) => wrong_diskseq > 0 })
    t.ok(result.wrong_diskseq > 0, 'opens reached other disks')
  })
}

t.test('disks, twin: without pins, wrong opens get through', async (t) => {
  const tree = await startTree(t, { twin: 'no-pins', expectErrors: true })
  const result = await churn(t, tree.mountpoint, { parts: false, seconds: TWIN_SECONDS, until: ({ wrong_diskseq }) => wrong_diskseq > 0 })
  t.ok(result.wrong_diskseq > 0, 'opens reached other disks')
})

// A partition's number is free for others some ms after the partition is gone (an RCU grace
// period). So answers must be late here to be wrong, and there must be enough other partitions to
// take the number.
const MANY = { parts: true, seconds: TWIN_SECONDS, lives: 20_000, more: ['--devices', '16', '--slots', '32'] }

t.test('partitions: late answers are right as well', async (t) => {
  const tree = await startTree(t, { twin: 'none+slow' })
  const result = await churn(t, tree.mountpoint, { ...MANY, until: ({ opens_ok_part }) => opens_ok_part > 100 })
  t.equal(result.wrong_diskseq + result.wrong_data, 0, 'no open reached another disk')
  t.ok(result.opens_ok_part > 100, 'more than a hundred partitions opened')
})

t.test('partitions, twin: with only the whole disk pinned, wrong opens get through', async (t) => {
  const tree = await startTree(t, { twin: 'whole-disk-pins+slow', expectErrors: true })
  const result = await churn(t, tree.mountpoint, { ...MANY, until: ({ wrong_part }) => wrong_part > 0 })
  t.ok(result.wrong_part > 0, 'opens reached other partitions')
})
