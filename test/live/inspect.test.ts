// SPDX-License-Identifier: MIT
/**
 * Looking at a node opens nothing: no disk spins up, and no reset, remove or detach is refused or
 * put off because of an `ls -l`.
 */
import { accessSync, existsSync, lstatSync, readlinkSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { blk } from '../helpers/blk.js'
import { type LoopDisk, loopDisk, openDevices, run, startTree, type Twin, until, watchNode, zramDisk } from '../helpers/tree.js'

/** Each command is run on each node. Its exit code does not matter: readlink of a device fails, for example. */
const COMMANDS = [
  'ls -l "$1"',
  'ls -lZ "$1"',
  'stat "$1"',
  'stat -L "$1"',
  'stat -f "$1"',
  'test -e "$1"',
  'test -r "$1"',
  'test -w "$1"',
  'test -b "$1"',
  'readlink "$1"',
  'readlink -f "$1"',
  'realpath "$1"',
  'getfattr -d -m- "$1"',
  'getfacl -p "$1"',
  'find "$1" -ls',
  'find -L "$1" -ls',
]

const ROUNDS = 3
const RESETS = 100
const DETACHES = 50

/** Runs all of the above, and the calls by themselves, many times over. */
async function inspect(t: Test, root: string, names: readonly string[]): Promise<void> {
  for (let round = 0; round < ROUNDS; round++) {
    for (const name of names) {
      const path = join(root, name)
      const { stderr } = await run('sh', ['-c', `${COMMANDS.join(' >&2; ')} >&2`, 'sh', path])
      t.notMatch(stderr, /No such file|Input\/output error|not implemented/, `each program finds ${name}`)
      for (let i = 0; i < 100; i++) look(path)
      const { errors } = await blk('openlat', '--path', path, '--flags', 'path', '--count', '100')
      t.strictSame(errors, {}, `O_PATH opens of ${name}`)
    }
    await run('ls', ['-l', root])
    await run('find', [root, '-ls'])
    await run('df', [root]) // not of a node: df would open(2) it
  }
}

function look(path: string): void {
  statSync(path)
  lstatSync(path)
  accessSync(path)
  existsSync(path)
  try {
    readlinkSync(path)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EINVAL') throw error
  }
}

async function disks(t: Test) {
  const zram = zramDisk(t)
  const loop = loopDisk(t)
  loop.addPartition(2, 64, 128)
  const part = `${loop.diskseq()}p2`
  const link = `${loop.diskseq()}-part2`
  return {
    zram,
    loop,
    names: [zram.diskseq(), loop.diskseq(), part, link],
    devices: [zram.path, loop.path, `${loop.path}p2`],
  }
}

t.test('inspecting a node never opens its device', async (t) => {
  const { names, devices } = await disks(t)
  const tree = await startTree(t)
  const watches = await Promise.all(devices.map((path) => watchNode(t, path, tree)))
  await inspect(t, tree.mountpoint, names)
  for (const [i, seen] of watches.entries()) {
    t.strictSame(await seen(), { open: 0, close_write: 0, close_nowrite: 0 }, `${devices[i]} was never opened`)
  }
  t.strictSame(openDevices(tree.pid), [], 'the daemon has no device open')
})

t.test('twin: if the daemon does not see what the caller does, inspecting opens devices', async (t) => {
  const { names, devices } = await disks(t)
  const tree = await startTree(t, { twin: 'no-inspect' })
  const watches = await Promise.all(devices.map((path) => watchNode(t, path, tree)))
  for (const name of names) look(join(tree.mountpoint, name))
  for (const [i, seen] of watches.entries()) t.ok((await seen()).open > 0, `${devices[i]} was opened`)
})

async function lookedAtWhileRunning(t: Test, twin: Twin): Promise<number> {
  const loop = loopDisk(t)
  const tree = await startTree(t, { twin })
  const seen = await watchNode(t, loop.path, tree)
  look(join(tree.mountpoint, loop.diskseq()))
  return (await seen()).open
}

t.test('the daemon waits until a caller sleeps, to see that it only looks', async (t) => {
  t.equal(await lookedAtWhileRunning(t, 'callers-run'), 0, 'the device was not opened')
})

t.test('twin: if it does not wait, the device is opened', async (t) => {
  t.ok((await lookedAtWhileRunning(t, 'callers-run-unknown')) > 0, 'the device was opened')
})

/** @returns how often the reset was refused because the device was open */
async function resets(t: Test, rounds: number, twin?: Twin): Promise<number> {
  const zram = zramDisk(t)
  const tree = await startTree(t, twin === undefined ? {} : { twin })
  let refused = 0
  for (let i = 0; i < rounds; i++) {
    look(join(tree.mountpoint, zram.diskseq()))
    try {
      zram.reset()
      writeFileSync(`/sys/block/${zram.kname}/disksize`, String(1 << 20))
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EBUSY') throw error
      refused++
    }
  }
  return refused
}

t.test('a disk that is looked at can be reset at any moment', async (t) => {
  t.equal(await resets(t, RESETS), 0, `${RESETS} resets, each right after a look`)
})

t.test('twin: if the daemon does not see what the caller does, resets are refused', async (t) => {
  t.ok((await resets(t, 10, 'no-inspect')) > 0, 'EBUSY')
})

const bound = (loop: LoopDisk) => existsSync(`/sys/block/${loop.kname}/loop/backing_file`)

/** @returns how many loop devices were still bound when losetup -d had returned */
async function detaches(t: Test, rounds: number, twin?: Twin): Promise<number> {
  const tree = await startTree(t, twin === undefined ? {} : { twin })
  let late = 0
  for (let i = 0; i < rounds; i++) {
    const loop = loopDisk(t)
    const path = join(tree.mountpoint, loop.diskseq())
    look(path)
    loop.detach(path)
    if (bound(loop)) late++
  }
  return late
}

t.test('a loop device that is looked at is detached at once', async (t) => {
  t.equal(await detaches(t, DETACHES), 0, `${DETACHES} detaches, each right after a look`)
})

t.test('twin: if the daemon does not see what the caller does, detaching is put off', async (t) => {
  t.ok((await detaches(t, 10, 'no-inspect')) > 0, 'still bound after losetup -d')
})

/** @returns how often deleting the partition was refused because it was open */
async function deletions(t: Test, rounds: number, twin?: Twin): Promise<number> {
  const loop = loopDisk(t)
  const tree = await startTree(t, twin === undefined ? {} : { twin })
  let refused = 0
  for (let i = 0; i < rounds; i++) {
    loop.addPartition(1, 64, 128)
    const path = join(tree.mountpoint, `${loop.diskseq()}p1`)
    for (const name of [path, join(tree.mountpoint, `${loop.diskseq()}-part1`)]) look(name)
    try {
      loop.deletePartition(1, path)
    } catch (error) {
      if (!/Device or resource busy/.test(String(error))) throw error
      refused++
      await until(() => openDevices(tree.pid).length === 0)
      loop.deletePartition(1)
    }
  }
  return refused
}

t.test('a partition that is looked at can be deleted at any moment', async (t) => {
  t.equal(await deletions(t, DETACHES), 0, `${DETACHES} deletions, each right after a look`)
})

t.test('twin: if the daemon does not see what the caller does, deleting is refused', async (t) => {
  t.ok((await deletions(t, 10, 'no-inspect')) > 0, 'EBUSY')
})
