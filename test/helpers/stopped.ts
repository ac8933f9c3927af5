/** A caller that was answered, and is stopped before it opens the device, as it has no processor. */
import { copyFileSync } from 'node:fs'
import { join } from 'node:path'

import type { Test } from 'tap'

import { blkPath } from './blk.js'
import { cleanup, loopDisk, run, type RunningTree, startBlkAt, startTree, type Twin, until } from './tree.js'

/** How long a disk's number is wanted, ms: callers are waited for longer; and less long than one is stopped. */
const WANTED_MS = 500
const WANTED_MAX_MS = 3000

/**
 * Has somebody stopped there, whose disk goes away, so that another disk may get its number.
 *
 * @param meanwhile what else happens before that
 * @param program another one than blk
 */
export async function stoppedCaller(
  t: Test,
  twin: Twin,
  meanwhile: (tree: RunningTree) => unknown = () => {},
  program = blkPath(),
): Promise<{ recycled: boolean; opened: 'its disk' | 'another disk' }> {
  const disk = loopDisk(t)
  const other = `${disk.file}.other`
  copyFileSync(disk.file, other)
  const tree = await startTree(t, { twin })
  const asked = disk.diskseq()
  const caller = await startBlkAt(t, program, 'open-stopped', '--path', join(tree.mountpoint, asked))
  await meanwhile(tree)
  disk.detach()
  const recycle = async () => (await run('losetup', [disk.path, other])).code === 0
  const recycled = await until(recycle, twin === 'none' ? WANTED_MS : WANTED_MAX_MS).then(() => true, () => false)
  if (recycled) cleanup(t, () => run('losetup', ['--detach', disk.path]))
  const { stopped, error, diskseq } = JSON.parse(await caller.ask()) as { stopped: boolean; error: number; diskseq: number }
  t.ok(stopped, 'until now')
  t.equal(error, 0)
  return { recycled, opened: String(diskseq) === asked ? 'its disk' : 'another disk' }
}
