// SPDX-License-Identifier: MIT
/**
 * Programs that are given a path in the tree, and show it to others. It works for them as the
 * device node would, and the path stays the same, although the daemon has the kernel forget each
 * name that is not in use.
 */
import { spawn } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { blk } from '../helpers/blk.js'
import {
  cleanup,
  type LoopDisk,
  loopDisk,
  openDevices,
  run,
  type RunningBlk,
  type RunningTree,
  sleep,
  startBlk,
  startTree,
  until,
} from '../helpers/tree.js'

/** Enough time for unused names to have been dropped several times. */
const PRUNED_MS = 2000
/** Another test measures how soon exactly a disk is free after its last user. */
const FREE_MS = 1000

/** Runs a program that must succeed. */
async function must(t: Test, file: string, ...args: string[]): Promise<string> {
  const { code, stdout, stderr } = await run(file, args)
  t.equal(code, 0, `${file} succeeds ${stderr}`)
  return stdout
}

function scratch(t: Test): string {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-consumer-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  return directory
}

async function letGo(t: Test, tree: RunningTree): Promise<void> {
  await until(() => openDevices(tree.pid).length === 0, FREE_MS)
  t.pass('the daemon does not hold the disk any more')
}

const bound = (disk: LoopDisk) => existsSync(`/sys/block/${disk.kname}/loop/backing_file`)

const swaps = () => readFileSync('/proc/swaps', 'utf8')

t.test('swap', async (t) => {
  const disk = loopDisk(t, { size: 8 << 20 })
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  await must(t, 'mkswap', path)
  cleanup(t, () => (swaps().includes(tree.mountpoint) || swaps().includes(disk.path) ? run('swapoff', [disk.path]) : {}))
  await must(t, 'swapon', path)
  t.match(swaps(), `${path} `, '/proc/swaps shows the path in the tree')
  await sleep(PRUNED_MS)
  t.match(swaps(), new RegExp(`^${path} `, 'm'), 'and keeps showing it')
  t.notMatch(swaps(), /deleted/, 'not as deleted')
  await must(t, 'swapoff', path)
  t.notMatch(swaps(), tree.mountpoint, 'swapoff takes it by that path')
  await letGo(t, tree)
})

const mountSource = (target: string) =>
  readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) => line.split(' '))
    .find((fields) => fields[4] === target)
    ?.at(-2)

t.test('mkfs, mount, fsck', async (t) => {
  const disk = loopDisk(t, { size: 16 << 20 })
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  const target = join(scratch(t), 'mnt')
  mkdirSync(target)
  await must(t, 'mkfs.ext4', '-q', '-L', 'by-diskseq', path)
  t.equal((await must(t, 'e2label', path)).trim(), 'by-diskseq')
  t.match(await must(t, 'blkid', '-p', '-o', 'export', path), /^TYPE=ext4$/m)
  cleanup(t, () => (mountSource(target) === undefined ? {} : run('umount', ['-l', target])))
  await must(t, 'mount', '-t', 'ext4', path, target)
  t.equal(mountSource(target), path, 'the mount table shows the path in the tree')
  writeFileSync(join(target, 'hello'), 'world')
  await must(t, 'sync', '-f', target)
  await sleep(PRUNED_MS)
  t.equal(mountSource(target), path, 'and keeps showing it')
  await must(t, 'umount', target)
  await letGo(t, tree)
  await must(t, 'fsck.ext4', '-fn', path)
  await must(t, 'mount', '-t', 'ext4', '-o', 'ro', disk.path, target)
  t.equal(readFileSync(join(target, 'hello'), 'utf8'), 'world', 'what was written is on the disk')
  await must(t, 'umount', target)
  const began = performance.now()
  disk.detach()
  await until(() => !bound(disk), FREE_MS)
  t.comment(`detached after ${(performance.now() - began).toFixed(1)} ms`)
})

t.test('the backing file of a loop device', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  const upper = loopDisk(t, { file: path })
  const backing = () => readFileSync(`/sys/block/${upper.kname}/loop/backing_file`, 'utf8').trim()
  t.equal(backing(), path, 'sysfs shows the path in the tree')
  await sleep(PRUNED_MS)
  t.equal(backing(), path, 'and keeps showing it')
  t.equal((await must(t, 'losetup', '--noheadings', '--output', 'BACK-FILE', '--list', upper.path)).trim(), path, 'losetup shows it too')
  const through = join(tree.mountpoint, upper.diskseq())
  await must(t, 'dd', 'if=/dev/zero', `of=${through}`, 'bs=4096', 'count=1', 'conv=notrunc,fsync')
  upper.detach()
  await letGo(t, tree)
})

/** Where the process's one descriptor beyond the standard three leads. */
function heldPath(holder: RunningBlk): string {
  const links = readdirSync(`/proc/${holder.pid}/fd`).map((fd) => readlinkSync(`/proc/${holder.pid}/fd/${fd}`))
  return links.find((link) => !/^(pipe|socket|anon_inode):|^\/dev\/null$/.test(link)) ?? ''
}

t.test('/proc/PID/fd of a program that has it open', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  const holder = await startBlk(t, 'hold', '--path', path)
  t.equal(heldPath(holder), path)
  await sleep(PRUNED_MS)
  t.equal(heldPath(holder), path, 'the path is the same after names were dropped')
  t.strictSame(JSON.parse(await holder.ask()), { diskseq: Number(disk.diskseq()) }, 'it can be opened again through the descriptor')
  await holder.end()
  await letGo(t, tree)
})

t.test('twin: if names are invalidated, a name in use is shown as deleted', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t, { twin: 'inval-entry' })
  const path = join(tree.mountpoint, disk.diskseq())
  const holder = await startBlk(t, 'hold', '--path', path)
  const upper = loopDisk(t, { file: path })
  await sleep(PRUNED_MS)
  t.equal(heldPath(holder), `${path} (deleted)`)
  t.equal(readFileSync(`/sys/block/${upper.kname}/loop/backing_file`, 'utf8').trim(), `${path} (deleted)`)
})

t.test('a bind mount of a node', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t, { args: ['--hold', '1'] })
  const target = join(scratch(t), 'node')
  writeFileSync(target, '')
  await must(t, 'mount', '--bind', join(tree.mountpoint, disk.diskseq()), target)
  cleanup(t, () => run('umount', ['-l', target]))
  const opened = async () => {
    const holder = await startBlk(t, 'hold', '--path', target)
    return (JSON.parse(await holder.end()) as { diskseq: number }).diskseq
  }
  t.equal(await opened(), Number(disk.diskseq()), 'it leads to the disk')
  await sleep(PRUNED_MS)
  t.equal(await opened(), Number(disk.diskseq()), 'also after names were dropped')
  disk.detach()
  // The mount keeps the name in use; so the daemon keeps the disk until the hold is over.
  await until(() => !bound(disk), 3000)
  const { errors } = await blk('openlat', '--path', target, '--count', '1')
  t.strictSame(errors, { ENXIO: 1 }, 'it leads nowhere once the disk is gone')
})

t.test('direct and exclusive access, locks, copies', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  const directory = scratch(t)
  const content = Buffer.alloc(8192, 'diskseqfs ')
  const source = join(directory, 'source')
  writeFileSync(source, content)

  await t.test('dd with O_DIRECT', async (t) => {
    await must(t, 'dd', `if=${source}`, `of=${path}`, 'bs=4096', 'seek=16', 'oflag=direct', 'conv=notrunc')
    const copy = join(directory, 'copy')
    await must(t, 'dd', `if=${path}`, `of=${copy}`, 'bs=4096', 'skip=16', 'count=2', 'iflag=direct')
    t.ok(readFileSync(copy).equals(content), 'reads what was written')
    t.ok(
      readFileSync(disk.file)
        .subarray(65536, 65536 + content.length)
        .equals(content),
      'the disk has it',
    )
  })

  await t.test('dd without conv=notrunc, which opens with O_CREAT and O_TRUNC', async (t) => {
    await must(t, 'dd', `if=${source}`, `of=${path}`, 'bs=4096')
    await must(t, 'cmp', '-n', String(content.length), source, path)
  })

  await t.test('O_EXCL', async (t) => {
    const exclusive = async (which: string) =>
      (await blk('openlat', '--path', which, '--count', '1', '--flags', 'excl'))['errors'] as Record<string, number>
    const holder = await startBlk(t, 'hold', '--path', path, '--flags', 'excl')
    t.strictSame(await exclusive(path), { EBUSY: 1 }, 'keeps out others that come through the tree')
    t.strictSame(await exclusive(disk.path), { EBUSY: 1 }, 'and those that use the device node')
    await holder.end()
    t.strictSame(await exclusive(path), {}, 'and keeps out none once it is closed')
    const other = await startBlk(t, 'hold', '--path', disk.path, '--flags', 'excl')
    t.strictSame(await exclusive(path), { EBUSY: 1 }, 'the device node keeps out those that use the tree')
    await other.end()
  })

  await t.test('flock', async (t) => {
    await must(t, 'flock', '-n', path, 'true')
    const { code } = await run('flock', ['-n', path, 'flock', '-n', path, 'true'])
    t.equal(code, 1, 'a second lock through the tree is refused')
  })

  await t.test('cp', async (t) => {
    const copy = join(directory, 'sparse')
    await must(t, 'cp', '--sparse=always', path, copy)
    await must(t, 'cmp', path, copy)
    t.equal((await must(t, 'blockdev', '--getsize64', path)).trim(), String(1 << 20))
  })
  await letGo(t, tree)
})

t.test('io_uring', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  for (const how of [[], ['--worker']]) {
    const result = await blk('uring-open', '--path', path, ...how)
    t.strictSame(result, { error: 0, diskseq: Number(disk.diskseq()) }, `opens the disk ${how.join('')}`)
    await letGo(t, tree)
  }
  disk.detach()
  t.equal((await blk('uring-open', '--path', path))['error'], 2, 'ENOENT once it is gone')
})

t.test('programs that are killed leave nothing behind', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const path = join(tree.mountpoint, disk.diskseq())
  const killed: Promise<unknown>[] = []
  for (let i = 0; i < 20; i++) {
    const child = spawn('sh', ['-c', 'exec sleep 60 <"$0"', path], { stdio: 'ignore' })
    cleanup(t, () => child.kill('SIGKILL'))
    killed.push(new Promise((resolve) => child.on('close', resolve)))
    await until(() => openDevices(child.pid as number).length > 0, 10_000)
    child.kill('SIGKILL')
  }
  await Promise.all(killed)
  await letGo(t, tree)
})
