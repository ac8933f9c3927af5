// SPDX-License-Identifier: MIT
/**
 * udev watches a device node for writers that close it, to look again at what is on the disk.
 * Writers that come through the tree are seen there too.
 */
import { closeSync, fdatasyncSync, openSync, writeSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { loopDisk, openDevices, run, type Seen, sleep, startTree, TOLD_MS, type Twin, until, watchNode, zramDisk } from '../helpers/tree.js'

async function setup(t: Test, twin?: Twin) {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  const zram = zramDisk(t)
  const tree = await startTree(t, twin ? { twin } : {})
  const n = disk.diskseq()
  return {
    tree,
    zram,
    targets: [
      { name: 'a loop device', device: disk.path, path: join(tree.mountpoint, n) },
      { name: 'a partition', device: `${disk.path}p1`, path: join(tree.mountpoint, `${n}p1`) },
      { name: 'the symlink of a partition', device: `${disk.path}p1`, path: join(tree.mountpoint, `${n}-part1`) },
      { name: 'a zram device', device: zram.path, path: join(tree.mountpoint, zram.diskseq()) },
    ],
  }
}

/** What a watch of the device has seen once all is quiet. */
async function after(seen: () => Promise<Seen>): Promise<Seen> {
  await sleep(TOLD_MS)
  return seen()
}

t.test('a writer that closes a node of the tree is seen at the device node', async (t) => {
  const { targets } = await setup(t)
  for (const { name, device, path } of targets) {
    const seen = await watchNode(t, device)
    const fd = openSync(path, 'r+')
    writeSync(fd, 'hello')
    fdatasyncSync(fd)
    t.equal((await after(seen)).close_write, 0, `${name}: not before it is closed`)
    closeSync(fd)
    let told = 0
    await until(async () => (told += (await seen()).close_write) > 0, 2000)
    t.equal(told + (await after(seen)).close_write, 1, `${name}: once, when it is closed`)
    await run('dd', ['if=/dev/zero', `of=${path}`, 'bs=512', 'count=1', 'conv=notrunc'])
    t.equal((await after(seen)).close_write, 1, `${name}: dd`)
    await run('mkfs.ext2', ['-q', path])
    t.ok((await after(seen)).close_write >= 1, `${name}: mkfs`)
  }
})

t.test('it is seen only after the written data can be read', async (t) => {
  const { targets } = await setup(t)
  const { path, device } = targets[0]!
  const seen = await watchNode(t, device)
  await run('mkfs.ext2', ['-q', '-L', 'watched', path])
  await until(async () => (await seen()).close_write > 0, 2000)
  t.match((await run('blkid', ['-p', device])).stdout, /LABEL="watched"/, 'blkid on the device node sees the new filesystem')
})

t.test('a reader that closes a node is not seen', async (t) => {
  const { targets } = await setup(t)
  for (const { name, device, path } of targets) {
    const seen = await watchNode(t, device)
    for (let i = 0; i < 10; i++) closeSync(openSync(path, 'r'))
    await run('blkid', ['-p', path])
    t.equal((await after(seen)).close_write, 0, name)
  }
})

t.test('twin: if udev is not told, the writer is not seen', async (t) => {
  const { targets } = await setup(t, 'no-touch')
  for (const { name, device, path } of targets) {
    const seen = await watchNode(t, device)
    closeSync(openSync(path, 'r+'))
    t.equal((await after(seen)).close_write, 0, name)
  }
})

t.test('each writer of many is reported, sooner or later', async (t) => {
  const { tree, targets } = await setup(t)
  const { device, path } = targets[3]!
  const seen = await watchNode(t, device)
  for (let i = 0; i < 100; i++) closeSync(openSync(path, 'r+'))
  const { close_write } = await after(seen)
  t.ok(close_write >= 1 && close_write <= 101, `${close_write} for 100 writers in quick succession`)
  closeSync(openSync(path, 'r+'))
  t.ok((await after(seen)).close_write >= 1, 'a last writer after all of them is reported')
  await until(() => openDevices(tree.pid).length === 0, 1000)
})

t.test('the report does not revive a disk that is gone, nor write to a read-only one', async (t) => {
  const tree = await startTree(t)
  const readOnly = loopDisk(t, { args: ['--read-only'] })
  const seen = await watchNode(t, readOnly.path)
  try {
    closeSync(openSync(join(tree.mountpoint, readOnly.diskseq()), 'r+'))
  } catch (error) {
    t.match(error, { code: /EACCES|EPERM|EROFS/ }, 'a read-only disk cannot be opened for writing')
  }
  await after(seen)
  for (let i = 0; i < 20; i++) {
    const disk = loopDisk(t)
    const fd = openSync(join(tree.mountpoint, disk.diskseq()), 'r+')
    disk.detach()
    closeSync(fd)
  }
  await sleep(TOLD_MS)
  t.strictSame(openDevices(tree.pid), [], 'the daemon has no device open')
})
