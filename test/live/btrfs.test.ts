// SPDX-License-Identifier: MIT
/**
 * btrfs has the kernel look up paths of devices, and sets the times of what it finds. It must find the
 * device node, because the kernel cannot write back the FUSE inode of a device. The device is the
 * right one in both cases. (That the kernel does crash with an inode of ours: test/vm/cases/stack.ts.)
 */
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'

import t, { type Test } from 'tap'

import { blkPath } from '../helpers/blk.js'
import { cleanup, type LoopDisk, loopDisk, openDevices, run, startTree, type Twin, until } from '../helpers/tree.js'

const skip = existsSync('/dev/btrfs-control') ? false : 'this kernel has no btrfs'

/** The kernel's error for each path that it looks up for btrfs. `hidden`: the device node is covered by a file. */
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
  t.strictSame(await found(t, undefined, false), ['EINVAL', 'EINVAL', 'ENOENT'], 'the device has no btrfs on it')
})

t.test('the kernel finds it by the device node', { skip }, async (t) => {
  t.strictSame(
    await found(t, undefined, true),
    ['ENOTBLK', 'ENOTBLK', 'ENOENT'],
    'with the node hidden, the kernel finds the file that hides it',
  )
})

t.test('twin: without that, the kernel finds it by an inode of ours', { skip }, async (t) => {
  t.strictSame(await found(t, 'own-inodes', true), ['EINVAL', 'EINVAL', 'ENOENT'])
})
