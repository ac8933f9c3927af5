// SPDX-License-Identifier: MIT
/**
 * The second path of each device, `.dm/N/K`, which ends in the kernel's name. It leads to the same device,
 * inode and pin as the first path, and closes are seen there as well. A program that goes on by another
 * name, as libmount does, finds the same disk until it is done.
 */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import {
  chmodSync,
  closeSync,
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  realpathSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'

import t, { type Test } from 'tap'

import { DM_NAME } from '../../src/devices/names.js'
import { addCounts } from '../helpers/blk.js'
import { churnRuns } from '../helpers/churn.js'
import { LONG, twoForms } from '../helpers/long.js'
import {
  cleanup,
  errorOf,
  type LoopDisk,
  loopDisk,
  openDevices,
  run,
  sleep,
  startManaged,
  startTree,
  TOLD_MS,
  type Twin,
  until,
  watchNode,
  zramDisk,
  uses,
} from '../helpers/tree.js'

const directoryOf = (mountpoint: string, disk: { diskseq(): string }) => join(mountpoint, DM_NAME, disk.diskseq())
const pathOf = (mountpoint: string, disk: { path: string; diskseq(): string }, part = '') =>
  join(directoryOf(mountpoint, disk), basename(disk.path) + part)

t.test('both paths are one device', async (t) => {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  const zram = zramDisk(t)
  const { mountpoint, pid } = await startTree(t)
  const pairs: [string, string][] = [
    [join(mountpoint, disk.diskseq()), pathOf(mountpoint, disk)],
    [join(mountpoint, `${disk.diskseq()}p1`), pathOf(mountpoint, disk, 'p1')],
    [join(mountpoint, zram.diskseq()), pathOf(mountpoint, zram)],
  ]
  for (const [first, second] of pairs) {
    t.strictSame(statSync(second), statSync(first), `${second}: one inode, with the same attributes`)
    const fds = [first, second].map((path) => openSync(path, 'r'))
    const pinned = openDevices(pid)
    t.strictSame(pinned, [...new Set(pinned)], 'and one pin')
    for (const fd of fds) closeSync(fd)
    chmodSync(second, 0o640)
    t.equal(statSync(first).mode & 0o777, 0o640, 'a change shows on the other path')
    chmodSync(first, 0o600)
  }
  t.strictSame(
    readdirSync(directoryOf(mountpoint, disk)),
    [basename(disk.path), `${basename(disk.path)}p1`],
    'the directory of a disk has it and its partitions',
  )
  t.ok(readdirSync(join(mountpoint, DM_NAME)).includes(zram.diskseq()))
  t.notOk(readdirSync(mountpoint).includes(DM_NAME), 'the directory .dm is not listed')
  t.equal(await realpath(pathOf(mountpoint, disk)), pathOf(mountpoint, disk), 'it is no symlink')
})

const realpath = async (path: string) => (await run('realpath', [path])).stdout.trim()

t.test('a path that belongs to no disk does not exist', async (t) => {
  const [disk, other] = [loopDisk(t), loopDisk(t)]
  const { mountpoint } = await startTree(t)
  const directory = directoryOf(mountpoint, disk)
  const wrong = [
    [directory, basename(other.path)],
    [directory, disk.diskseq()],
    [directory, `${basename(disk.path)}p1`],
    [directory, 'loop'],
    [directory, '..loop'],
    [directory, 'x'.repeat(255)],
    [join(mountpoint, DM_NAME), `0${disk.diskseq()}`],
    [join(mountpoint, DM_NAME), `${disk.diskseq()}p1`],
    [join(mountpoint, DM_NAME), '4000000000'],
    [join(mountpoint, DM_NAME), basename(disk.path)],
    [join(mountpoint, DM_NAME), DM_NAME],
    [mountpoint, basename(disk.path)],
  ] as const
  for (const [where, name] of wrong)
    t.equal(
      errorOf(() => statSync(join(where, name))),
      'ENOENT',
      join(where, name),
    )
  const gone = pathOf(mountpoint, other)
  const seen = statSync(gone).ino
  other.detach()
  t.match(
    errorOf(() => openSync(gone, 'r')),
    /^(ENOENT|ENXIO)$/,
    'the path of a disk that is gone does not exist',
  )
  const next = loopDisk(t)
  t.equal(next.path, other.path, 'the next disk has the same kernel name')
  t.match(
    errorOf(() => openSync(gone, 'r')),
    /^(ENOENT|ENXIO)$/,
    'the next disk is not found by the old path',
  )
  t.not(statSync(pathOf(mountpoint, next)).ino, seen)
  for (const change of [() => mkdirSync(join(directory, 'x')), () => rmSync(pathOf(mountpoint, disk))]) t.equal(errorOf(change), 'EPERM')
})

t.test('a disk without any uevent is found, without a search', async (t) => {
  const { mountpoint } = await startTree(t, { twin: 'deaf' })
  const disk = loopDisk(t)
  closeSync(openSync(pathOf(mountpoint, disk), 'r'))
  t.pass('opened')
})

/** The number of right opens to wait for, however long a busy machine takes. */
const ENOUGH = LONG ? 1000 : 100

async function churn(t: Test, mountpoint: string, parts: boolean) {
  const sum = { right: 0, wrong: 0, errors: {} as Record<string, number> }
  const args = ['--mode', 'tree', '--dir', mountpoint, '--seconds', LONG ? '2' : '0.5', '--kernel-names', ...(parts ? ['--parts'] : [])]
  for await (const found of churnRuns(args)) {
    sum.right += found.opens_ok
    sum.wrong += found.wrong_diskseq + found.wrong_data
    addCounts(sum.errors, found['errors'])
    if (sum.right >= ENOUGH || sum.wrong > 0) break
  }
  t.comment(`${t.name}: ${JSON.stringify(sum)}`)
  return sum
}

for (const parts of [false, true]) {
  t.test(twoForms(`${parts ? 'partitions' : 'disks'} that come and go: every open reaches the right one`), async (t) => {
    const { mountpoint } = await startTree(t)
    const { right, wrong, errors } = await churn(t, mountpoint, parts)
    t.equal(wrong, 0)
    t.ok(right >= ENOUGH, `${right} right`)
    t.strictSame(
      Object.keys(errors).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'),
      [],
      'no errno but those for a disk that is gone',
    )
  })
}

t.test('twin: without pins, wrong opens get through', async (t) => {
  const { mountpoint } = await startTree(t, { twin: 'no-pins', expectErrors: true })
  t.ok((await churn(t, mountpoint, false)).wrong > 0)
})

/** How often a writer that closes a disk by its second path was seen at the device node. */
async function told(t: Test, disk: LoopDisk, mountpoint: string): Promise<number> {
  const seen = await watchNode(t, disk.path)
  closeSync(openSync(pathOf(mountpoint, disk), 'r+'))
  await sleep(TOLD_MS)
  return (await seen()).close_write
}

t.test('a writer is seen at the device node, the first time and each other time', async (t) => {
  const disk = loopDisk(t)
  const { mountpoint, pid } = await startTree(t)
  for (let i = 0; i < 3; i++) t.equal(await told(t, disk, mountpoint), 1)
  await until(() => openDevices(pid).length === 0)
})

t.test('twin: it is not seen if the directory is not watched', async (t) => {
  const disk = loopDisk(t)
  const { mountpoint } = await startTree(t, { twin: 'unwatched' })
  t.equal(await told(t, disk, mountpoint), 0)
})

t.test('a writer is seen after a restart, even if it had the disk open before', async (t) => {
  const [before, after] = [loopDisk(t), loopDisk(t)]
  const tree = await startManaged(t)
  const fd = openSync(pathOf(tree.mountpoint, before), 'r+')
  const seen = await watchNode(t, before.path)
  for (const signal of ['SIGKILL', 'SIGTERM'] as const) {
    const ready = tree.ready()
    tree.end(signal)
    await until(() => tree.ready() > ready, 20_000)
  }
  closeSync(fd)
  await sleep(TOLD_MS)
  t.equal((await seen()).close_write, 1)
  for (const disk of [before, after]) t.equal(await told(t, disk, tree.mountpoint), 1)
})

t.test('directories of disks that are gone are not watched', async (t) => {
  const { mountpoint, pid } = await startTree(t)
  const watches = () =>
    run('sh', ['-c', `grep -c ^inotify /proc/${pid}/fdinfo/* | awk -F: '{ n += $2 } END { print n }'`]).then(({ stdout }) => Number(stdout))
  for (let i = 0; i < 20; i++) {
    const disk = loopDisk(t)
    closeSync(openSync(pathOf(mountpoint, disk), 'r'))
    disk.detach()
  }
  await until(async () => (await watches()) === 1)
  t.pass('only the root is watched')
})

/** A path for a program of that name; removed when the test ends. */
function programPath(t: Test, name: string): string {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-looker-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  chmodSync(directory, 0o755)
  return join(directory, name)
}

/** Starts a program of that name. It looks at a path, says so, and ends when its stdin does. */
async function looker(t: Test, name: string, path: string, user: { uid?: number; gid?: number } = {}): Promise<ChildProcess> {
  const program = programPath(t, name)
  writeFileSync(program, '#!/bin/sh\n[ -b "$1" ] && echo seen\nread -r _\n')
  chmodSync(program, 0o755)
  const child = spawn(program, [path], { ...user, stdio: ['pipe', 'pipe', 'inherit'] })
  cleanup(t, () => void child.kill())
  await once(child.stdout!, 'data')
  return child
}

interface Looked {
  /** Whether the disk is pinned while the program lives, and some ms after its end. */
  readonly held: boolean
  readonly after: boolean
}

async function looked(t: Test, name: string, twin?: Twin, path = pathOf): Promise<Looked> {
  const disk = loopDisk(t)
  const { mountpoint, pid } = await startTree(t, twin ? { twin } : {})
  const program = await looker(t, name, path(mountpoint, disk))
  const held = openDevices(pid).includes(disk.path)
  await sleep(200)
  const still = openDevices(pid).includes(disk.path)
  if (held !== still) throw new Error(`held ${held}, then ${still}`)
  program.stdin?.end()
  await once(program, 'close')
  await sleep(50)
  return { held, after: openDevices(pid).includes(disk.path) }
}

t.test('a disk that a program has looked at is pinned until the program ends, if it is one that goes on by name', async (t) => {
  for (const name of ['mount', 'umount', 'swapon', 'systemd-fsck', 'mount.test']) {
    t.strictSame(await looked(t, name), { held: true, after: false }, name)
  }
  for (const name of ['df', 'mounter', 'systemd']) t.strictSame(await looked(t, name), { held: false, after: false }, name)
})

t.test('so is a disk that such a program has resolved with realpath(3), which follows no symlink', async (t) => {
  const disk = loopDisk(t)
  const { mountpoint, pid } = await startTree(t)
  const program = programPath(t, 'btrfs')
  copyFileSync(realpathSync('/usr/bin/perl'), program)
  const child = spawn(program, ['-e', 'readlink($ARGV[0]); $| = 1; print "seen\n"; <STDIN>', pathOf(mountpoint, disk)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  cleanup(t, () => void child.kill())
  await once(child.stdout, 'data')
  await until(() => openDevices(pid).includes(disk.path))
  await sleep(200)
  t.ok(openDevices(pid).includes(disk.path), 'it is held')
  child.stdin.end()
  await once(child, 'close')
  await until(() => openDevices(pid).length === 0)
})

/** Whether the daemon counts as a user of the device node while it holds the device for a program. */
async function isUser(t: Test, twin?: Twin): Promise<boolean> {
  const disk = loopDisk(t)
  const { mountpoint, pid } = await startTree(t, twin ? { twin } : {})
  const program = await looker(t, 'mount', pathOf(mountpoint, disk))
  t.ok(openDevices(pid).includes(disk.path), 'the daemon holds the device')
  const found = uses(pid, disk.path)
  program.kill()
  return found
}

t.test('a daemon that holds a device for others is no user of its device node', async (t) => {
  t.notOk(await isUser(t))
})

t.test('twin: if it opens the device by that node, `fuser -k` would end the daemon', async (t) => {
  t.ok(await isUser(t, 'nodes-in-dev'))
})

t.test('a disk that was looked at by its first path is not pinned, as no name is looked up for that', async (t) => {
  t.strictSame(await looked(t, 'mount', undefined, (mountpoint, disk) => join(mountpoint, disk.diskseq())), { held: false, after: false })
})

t.test('twin: it is not pinned if looking counts as all that the program does', async (t) => {
  t.strictSame(await looked(t, 'mount', 'done-when-seen'), { held: false, after: false })
})

t.test("a device number that a program goes on with does not become another disk's meanwhile", async (t) => {
  const disk = loopDisk(t)
  const { mountpoint, pid } = await startTree(t)
  const program = await looker(t, 'mount', pathOf(mountpoint, disk))
  disk.detach()
  t.not(loopDisk(t).path, disk.path, 'the next disk has another number')
  program.kill('SIGKILL')
  await until(() => openDevices(pid).length === 0)
  t.pass('the number is free when the program ends')
})

t.test('a program cannot pin what it may not open, whatever its name', async (t) => {
  const disk = loopDisk(t)
  const { mountpoint, pid } = await startTree(t)
  await looker(t, 'mount', pathOf(mountpoint, disk), { uid: 65534, gid: 65534 })
  t.strictSame(openDevices(pid), [])
})

t.test('the second path works with the library as well', async (t) => {
  const disk = loopDisk(t)
  const { mountpoint } = await startTree(t, { args: ['--transport', 'fuse-native'] })
  closeSync(openSync(pathOf(mountpoint, disk), 'r'))
  t.strictSame(readdirSync(directoryOf(mountpoint, disk)), [basename(disk.path)])
  t.equal(
    errorOf(() => statSync(join(mountpoint, disk.diskseq(), 'x'))),
    'ENOTDIR',
  )
  t.equal(
    errorOf(() => statSync(join(directoryOf(mountpoint, disk), 'loop'))),
    'ENOENT',
  )
})
