// SPDX-License-Identifier: MIT
/**
 * btrfs has the kernel look up paths of devices, and set the times of what it finds: then it must find
 * the device's own node, as FUSE cannot have the inode of a device written back. The device
 * is the right one all the same. (That it does crash with one of ours: test/vm/cases/stack.ts.)
 */
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'

import t, { type Test } from 'tap'

import { blkPath } from '../helpers/blk.js'
import { cleanup, type LoopDisk, loopDisk, openDevices, run, startTree, type Twin, until } from '../helpers/tree.js'

const skip = existsSync('/dev/btrfs-control') ? false : 'this kernel has no btrfs'

/** What the kernel says of each path when it has looked it up for btrfs; where the device's own node is hidden. */
async function scan(t: Test, disk: LoopDisk, paths: readonly string[], hidden: boolean): Promise<string[]> {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-btrfs-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const file = join(directory, 'no-device')
  writeFileSync(file, '')
  const script = `${hidden ? 'mount --bind "$2" "$1"' : ':'}; shift 2; for path; do ${blkPath()} btrfs-scan --path "$path"; done`
  const { code, stdout, stderr } = await run('unshare', ['--mount', 'sh', '-euc', script, 'sh', disk.path, file, ...paths])
  t.strictSame({ code, stderr }, { code: 0, stderr: '' })
  return stdout.trimEnd().split('\n')
}

async function found(t: Test, twin: Twin | undefined, hidden: boolean): Promise<string[]> {
  const disk = loopDisk(t)
  const { mountpoint, pid } = await startTree(t, twin === undefined ? {} : { twin })
  const paths = [join(mountpoint, disk.diskseq()), join(mountpoint, '.dm', disk.diskseq(), basename(disk.path))]
  const before = openDevices(pid).length
  const result = await scan(t, disk, [...paths, join(mountpoint, '4000000000')], hidden)
  await until(() => openDevices(pid).length === before)
  return result
}

t.test('the kernel finds the device', { skip }, async (t) => {
  t.strictSame(await found(t, undefined, false), ['EINVAL', 'EINVAL', 'ENOENT'], 'which is no btrfs')
})

t.test("by the device's own node", { skip }, async (t) => {
  t.strictSame(await found(t, undefined, true), ['ENOTBLK', 'ENOTBLK', 'ENOENT'], 'where it is hidden, what hides it')
})

t.test('twin: or by an inode of ours', { skip }, async (t) => {
  t.strictSame(await found(t, 'own-inodes', true), ['EINVAL', 'EINVAL', 'ENOENT'])
})
