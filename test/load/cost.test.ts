// SPDX-License-Identifier: MIT
/**
 * What a request costs, where that can be counted or compared. These tests catch a change that
 * makes it several times dearer. For the cost itself, see `make bench`.
 */
import { readFileSync, statSync } from 'node:fs'
import { join } from 'node:path'

import t from 'tap'

import { blk } from '../helpers/blk.js'
import { loopDisk, type RunningTree, startTree } from '../helpers/tree.js'

const OPENS = 2000
/** Room for the devices of other programs, which come and go, and for the reports of pool threads. */
const SPARE = 1.2

/** System calls that read and that write, of the whole daemon so far: proc(5), /proc/PID/io. */
function calls({ pid }: RunningTree): { reads: number; writes: number } {
  const text = readFileSync(`/proc/${pid}/io`, 'utf8')
  const field = (name: string) => Number(new RegExp(`^${name}: (\\d+)$`, 'm').exec(text)?.[1])
  return { reads: field('syscr'), writes: field('syscw') }
}

async function each(tree: RunningTree, use: () => unknown): Promise<{ reads: number; writes: number }> {
  await use()
  const before = calls(tree)
  await use()
  const after = calls(tree)
  return { reads: (after.reads - before.reads) / OPENS, writes: (after.writes - before.writes) / OPENS }
}

t.test('a warm open is one request: read, a look at the caller, and one answer', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  const { reads, writes } = await each(tree, () => blk('openlat', '--path', path, '--count', String(OPENS), '--close-immediately'))
  t.ok(writes <= SPARE, `${writes.toFixed(2)} answers`)
  // The request, the caller's state, an empty look for the next request, opens and closes.
  t.ok(reads <= 4 * SPARE, `${reads.toFixed(2)} reads`)
})

t.test('a look is two requests, and opens no file for them', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  const { reads, writes } = await each(tree, () => {
    for (let i = 0; i < OPENS; i++) statSync(path)
  })
  t.ok(writes <= 2 * SPARE, `${writes.toFixed(2)} answers`)
  // For each: the request, the caller's state, the device's uevent file, its backing file, an empty look.
  t.ok(reads <= 2 * 5 * SPARE, `${reads.toFixed(2)} reads`)
})

t.test('an open costs a few context switches', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const result = await blk(
    'latency',
    '--tree',
    join(tree.mountpoint, disk.diskseq()),
    '--dev',
    disk.path,
    '--seconds',
    '3',
    '--pin',
    'split',
  )
  const ratio = (name: string) => result[name].p50_ns / result['rtt'].p50_ns
  t.ok(ratio('open_tree') < 5, `an open takes ${ratio('open_tree').toFixed(1)} times what a message to another process and back takes`)
  t.ok(ratio('stat_tree') < 10, `a stat ${ratio('stat_tree').toFixed(1)} times`)
})
