// SPDX-License-Identifier: MIT
/** A caller that was answered, and that gets no processor before it opens the device. */
import { copyFileSync } from 'node:fs'
import { join } from 'node:path'

import type { Test } from 'tap'

import { blkPath } from './blk.js'
import { cleanup, loopDisk, run, type RunningTree, sleep, startBlkAt, startTree, type Twin } from './tree.js'

/**
 * How long the test tries to get a disk's number, in ms: less than the daemon waits for callers, and less than
 * the caller is stopped.
 */
const WANTED_MS = 500
const WANTED_MAX_MS = 3000

interface Stopped {
  /** What else happens before the disk goes away. */
  readonly meanwhile?: (tree: RunningTree) => unknown
  /** The caller's program, if it is not blk. */
  readonly program?: string
  /** Arguments of the daemon. */
  readonly args?: string[]
  /** How long the number must not become free, in ms. */
  readonly wantedMs?: number
}

/**
 * Stops a caller there and removes its disk, so that another disk may get its number. -> whether it
 * got it, and what the caller opens
 */
export async function stoppedCaller(
  t: Test,
  twin: Twin,
  { meanwhile = () => {}, program = blkPath(), args = [], wantedMs = WANTED_MS }: Stopped = {},
): Promise<{ recycled: boolean; opened: 'its disk' | 'another disk' }> {
  const disk = loopDisk(t)
  const other = `${disk.file}.other`
  copyFileSync(disk.file, other)
  const tree = await startTree(t, { twin, args })
  const asked = disk.diskseq()
  const caller = await startBlkAt(t, program, 'open-stopped', '--path', join(tree.mountpoint, asked))
  await meanwhile(tree)
  disk.detach()
  // By the clock, as what the daemon and the caller do meanwhile goes by it as well.
  const end = Date.now() + (twin === 'none' ? wantedMs : WANTED_MAX_MS)
  let recycled = false
  while (!recycled && Date.now() < end) {
    recycled = (await run('losetup', [disk.path, other])).code === 0
    if (!recycled) await sleep(2)
  }
  if (recycled) cleanup(t, () => run('losetup', ['--detach', disk.path]))
  const { stopped, error, diskseq } = JSON.parse(await caller.ask()) as { stopped: boolean; error: number; diskseq: number }
  t.ok(stopped, 'until now')
  t.equal(error, 0)
  return { recycled, opened: String(diskseq) === asked ? 'its disk' : 'another disk' }
}
