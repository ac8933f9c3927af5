// SPDX-License-Identifier: MIT
/** Scarce resources: descriptors, memory, processor time, and a clock that is right. */
import {
  closeSync,
  existsSync,
  fstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmdirSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { native } from '../../src/native.js'
import { E } from '../../src/util/errno.js'
import { mountsAt } from '../../src/util/mountpoint.js'
import { blk } from '../helpers/blk.js'
import {
  cleanup,
  cli,
  descriptors,
  diskseqOf,
  errorOf,
  hangingFile,
  loopDisk,
  manyDisks,
  openDevices,
  run,
  type RunningTree,
  sleep,
  startBlk,
  startTree,
  type Twin,
  until,
  zramDisk,
} from '../helpers/tree.js'

const NOBODY = '65534'
/** uapi/linux/inotify.h */
const IN_OPEN = 0x20

/** Descriptors that the daemon may have; it needs some thirty itself. */
const NOFILE = 96
const FEW = 48
/** A limit below all that are in use: a descriptor that gets free is not below it either. */
const NONE = 8
const DISKS = 150

/** Makes more disks than the daemon has descriptors for. */
async function manyDisksFewDescriptors(t: Test, twin?: Twin, nofile = NOFILE) {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-disks-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const file = join(directory, 'disk.img')
  writeFileSync(file, '')
  truncateSync(file, 1 << 20)
  const devices = await manyDisks(t, DISKS, file)
  const tree = await startTree(t, {
    limits: [`--nofile=${nofile}:${nofile}`],
    expectErrors: true,
    ...(twin && { twin }),
  })
  const disks = devices.map((device) => ({ device, path: join(tree.mountpoint, diskseqOf(device)) }))
  return { tree, disks }
}

const limit = async (tree: RunningTree, nofile: number) => {
  const { code } = await run('prlimit', [`--pid=${tree.pid}`, `--nofile=${nofile}:`])
  if (code !== 0) throw new Error('prlimit')
}

/** Opens each, one after another; the errors. */
const openErrors = (disks: readonly { path: string }[]) =>
  disks.map(({ path }) => errorOf(() => openSync(path, 'r'))).filter((error) => error !== '')

t.test('more disks may be in use than there are descriptors', async (t) => {
  const { disks } = await manyDisksFewDescriptors(t)
  const open: number[] = []
  cleanup(t, () => open.forEach((fd) => closeSync(fd)))
  const wrong: string[] = []
  const errors: string[] = []
  for (const { device, path } of disks) {
    const error = errorOf(() => {
      const fd = openSync(path, 'r')
      open.push(fd)
      if (fstatSync(fd).rdev !== statSync(device).rdev) wrong.push(path)
    })
    if (error !== '') errors.push(error)
  }
  t.strictSame(wrong, [], 'no other disk was opened')
  t.strictSame(errors, [], 'a disk that is open needs no pin')
})

t.test('without descriptors an open fails, and the log says why; later it works again', async (t) => {
  const { tree, disks } = await manyDisksFewDescriptors(t)
  await limit(tree, NONE)
  // Each open fails after a second, so they all run at once.
  const { stdout } = await run('bash', [
    '-c',
    'export LC_ALL=C; for path; do { : <"$path"; } 2>&1 & done; wait',
    'bash',
    ...disks.map(({ path }) => path),
  ])
  t.equal(stdout.match(/Input\/output error$/gm)?.length, DISKS, 'each fails')
  await until(() => tree.log().some((line) => line['errno'] === 'EMFILE'))
  t.pass('the log says what is missing')
  t.ok((await run('ls', [tree.mountpoint])).stdout.split('\n').length > DISKS, 'the directory can be read')
  const late = loopDisk(t)
  t.not(
    errorOf(() => statSync(join(tree.mountpoint, late.diskseq()))),
    'ENOENT',
    'a new disk is not reported as missing',
  )
  await limit(tree, NOFILE)
  t.strictSame(openErrors(disks), [], 'all can be opened again, one after another')
  await until(() => errorOf(() => statSync(join(tree.mountpoint, late.diskseq()))) === '', 5000)
  t.pass('the new disk is there')
})

t.test('twin: if the daemon does not notice that descriptors are missing, it denies that disks exist', async (t) => {
  const { tree, disks } = await manyDisksFewDescriptors(t, 'exhaustion-unnoticed')
  const errors: string[] = []
  // The remaining descriptors are enough to look at the caller. Some of the used ones may be open
  // for a moment only, which leaves one for a disk too. So it is tried with one fewer each time.
  const denied = () => errors.some((error) => error === 'ENXIO' || error === 'ENOENT')
  for (let i = 0; i < 4 && !denied(); i++) {
    await limit(tree, descriptors(tree.pid).length - i)
    errors.push(...openErrors(disks))
    await limit(tree, NOFILE)
  }
  // ENXIO if the kernel has the name from before, ENOENT if it asks for it again.
  t.ok(denied(), `a disk that exists is said to be gone, not ${[...new Set(errors)]}`)
})

/** Opens disks one after another, several times as many as there are descriptors. */
async function oneAfterAnother(t: Test, twin?: Twin): Promise<string[]> {
  const { disks } = await manyDisksFewDescriptors(t, twin, FEW)
  return [1, 2, 3, 4, 5].flatMap(() => openErrors(disks))
}

t.test('a caller that opens disks faster than their pins end waits for descriptors', async (t) => {
  t.strictSame(await oneAfterAnother(t), [])
})

t.test('twin: without that some opens fail', async (t) => {
  t.ok((await oneAfterAnother(t, 'tries-once')).length > 0)
})

/**
 * The daemon has no descriptor left, and stands still for longer than it retries. It gets some a moment after it goes on.
 */
async function stoodStill(t: Test, twin?: Twin): Promise<string> {
  const { tree, disks } = await manyDisksFewDescriptors(t, twin)
  await limit(tree, NONE)
  const opened = open((disks[0] as { path: string }).path).then(
    (file) => file.close().then(() => ''),
    (error: NodeJS.ErrnoException) => error.code ?? '',
  )
  await sleep(10)
  process.kill(tree.pid, 'SIGSTOP')
  cleanup(t, () => errorOf(() => process.kill(tree.pid, 'SIGCONT')))
  await sleep(1500)
  process.kill(tree.pid, 'SIGCONT')
  await sleep(30)
  await limit(tree, NOFILE)
  return opened
}

t.test('a daemon that gets no processor does not give up because of that', async (t) => {
  t.equal(await stoodStill(t), '')
})

t.test('twin: a daemon that goes by the clock does', async (t) => {
  t.equal(await stoodStill(t, 'tries-by-clock'), 'EIO')
})

/** Where cgroups are made, and the file that has their memory limit. */
const [CGROUPS, LIMIT] = existsSync('/sys/fs/cgroup/memory/memory.limit_in_bytes')
  ? ['/sys/fs/cgroup/memory', 'memory.limit_in_bytes']
  : ['/sys/fs/cgroup', 'memory.max']

/** A cgroup whose processes may take so much more memory than they have; undefined if that is not possible here. */
function memoryGroup(t: Test, mib: number): { add(pid: number): void } | undefined {
  const directory = join(CGROUPS, `diskseqfs-test-${process.pid}`)
  if (errorOf(() => mkdirSync(directory)) !== '') return undefined
  cleanup(t, () => until(() => errorOf(() => rmdirSync(directory)) !== 'EBUSY'))
  if (errorOf(() => writeFileSync(join(directory, LIMIT), String(mib * 1048576))) !== '') return undefined
  return { add: (pid) => writeFileSync(join(directory, 'cgroup.procs'), String(pid)) }
}

const NO_LIMIT = 'not tested: memory cannot be limited here (no cgroups that can be written to)'
const MEMORY_MIB = 96
const ASKED_MS = 4000

/** Whether the daemon still serves after a hundred threads have asked for all names. */
async function survives(t: Test, twin: Twin): Promise<boolean | undefined> {
  const group = memoryGroup(t, MEMORY_MIB)
  if (group === undefined) return undefined
  zramDisk(t)
  const tree = await startTree(t, { twin })
  group.add(tree.pid)
  // A killed daemon leaves a dead mount.
  cleanup(t, () => (existsSync(`/proc/${tree.pid}/exe`) ? undefined : run('umount', ['--lazy', tree.mountpoint])))
  const nobody = await startBlk(t, 'abuse', '--dir', tree.mountpoint, '--uid', NOBODY)
  await nobody.ask()
  const end = performance.now() + ASKED_MS
  while (existsSync(`/proc/${tree.pid}/exe`) && performance.now() < end) await sleep(50)
  await nobody.end()
  return errorOf(() => statSync(tree.mountpoint)) === ''
}

t.test('with little memory the daemon goes on serving', async (t) => {
  const served = await survives(t, 'none')
  if (served === undefined) return t.comment(NO_LIMIT)
  t.ok(served, `it goes on with ${MEMORY_MIB} MiB more than it started with`)
})

t.test('twin: a daemon that remembers each request does not', async (t) => {
  const served = await survives(t, 'hoards')
  if (served === undefined) return t.comment(NO_LIMIT)
  t.notOk(served, 'it was killed')
})

/**
 * A caller that the daemon cannot see has a disk open for longer than the hold. The daemon is stopped for most of
 * that time.
 */
async function stopped(t: Test, { twin, hold, ms }: { twin: Twin; hold: number; ms: number }) {
  const held = loopDisk(t)
  const other = zramDisk(t)
  const tree = await startTree(t, { twin, args: ['--hold', String(hold)] })
  await startBlk(t, 'hold', '--path', join(tree.mountpoint, held.diskseq()))
  await sleep(100)
  const callers = await startBlk(
    t,
    'abuse',
    '--dir',
    tree.mountpoint,
    '--threads',
    '12',
    '--kinds',
    'open,stat,list',
    '--names',
    other.diskseq(),
  )
  await callers.ask()
  await sleep(200)
  process.kill(tree.pid, 'SIGSTOP')
  cleanup(t, () => errorOf(() => process.kill(tree.pid, 'SIGCONT')))
  await sleep(ms)
  process.kill(tree.pid, 'SIGCONT')
  await sleep(1500)
  const pinned = openDevices(tree.pid).includes(held.path)
  return { tree, held, pinned, callers: JSON.parse(await callers.end()) as Record<string, { n: number; max_ms: number; errors: object }> }
}

t.test('a daemon that was stopped answers callers that waited, and keeps the pins that are in use', async (t) => {
  const { tree, held, pinned, callers } = await stopped(t, { twin: 'none+unseen', hold: 5, ms: 10_000 })
  for (const what of ['open', 'stat', 'list']) {
    const { n, max_ms, errors } = callers[what] as { n: number; max_ms: number; errors: object }
    t.strictSame(errors, {}, `${n} times ${what}`)
    t.ok(max_ms > 9000, 'some waited')
  }
  t.ok(pinned, 'the disk is still held')
  await until(() => !openDevices(tree.pid).includes(held.path), 10_000)
  t.pass('the disk is released when its time is over')
})

t.test('twin: a hold that goes by the clock has ended', async (t) => {
  const { pinned } = await stopped(t, { twin: 'hold-by-clock+unseen', hold: 3, ms: 4000 })
  t.notOk(pinned, 'the disk is not held any more')
})

const released = (tree: RunningTree, path: string) =>
  until(() => !openDevices(tree.pid).includes(path), 2000).then(
    () => true,
    () => false,
  )

t.test('a wall clock that jumps changes nothing', async (t) => {
  const { file, hang, recover } = await hangingFile(t)
  const hung = loopDisk(t, { file })
  const disk = loopDisk(t)
  const tree = await startTree(t, { twin: 'clock-jumps+unseen', args: ['--open-timeout', '1', '--hold', '2'] })
  cleanup(t, recover)
  const path = join(tree.mountpoint, disk.diskseq())
  const fd = openSync(path, 'r')
  await sleep(100)
  t.ok(openDevices(tree.pid).includes(disk.path), 'a disk in use is held')
  t.ok(await until(() => !openDevices(tree.pid).includes(disk.path), 6000).then(() => true), 'it is held for a while only')
  closeSync(fd)
  closeSync(openSync(path, 'r'))
  t.ok(await released(tree, disk.path), 'a disk that is not in use is released')
  const late = zramDisk(t)
  t.equal(
    errorOf(() => statSync(join(tree.mountpoint, late.diskseq()))),
    '',
    'a new disk is there',
  )
  t.equal(
    errorOf(() => statSync(join(tree.mountpoint, '4000000000'))),
    'ENOENT',
    'a disk that does not exist is not there',
  )
  await hang()
  const began = performance.now()
  const { errors } = await blk('openlat', '--path', join(tree.mountpoint, hung.diskseq()), '--count', '1')
  t.strictSame(errors, { ETIMEDOUT: 1 }, 'a disk that hangs is ETIMEDOUT')
  t.ok(performance.now() - began >= 950, 'after the timeout')
  t.match(readFileSync('/proc/self/mountinfo', 'utf8'), tree.mountpoint, 'it is still mounted')
})

t.test('twin: if the daemon goes by that clock, disks are not released', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t, { twin: 'wall-clock', args: ['--hold', '2'] })
  closeSync(openSync(join(tree.mountpoint, disk.diskseq()), 'r'))
  t.notOk(await released(tree, disk.path))
})

t.test('without an inotify instance for it, it says whose limit that is', async (t) => {
  const mountpoint = mkdtempSync(join(tmpdir(), 'diskseqfs-test-'))
  cleanup(t, () => rmdirSync(mountpoint))
  const watches: number[] = []
  cleanup(t, () => watches.forEach((fd) => native.close(fd)))
  const watch = () => new Promise<[number, number]>((resolve) => native.inotifyWatch('/', IN_OPEN, (...result) => resolve(result)))
  let error
  for (let fd; ([error, fd] = await watch())[0] === 0;) watches.push(fd)
  t.equal(error, E.EMFILE, `${watches.length} instances`)
  const { code, stderr } = await cli('mount', '-f', mountpoint)
  t.equal(code, 1)
  t.match(stderr, /inotify failed on .*: EMFILE; root's programs .*raise fs\.inotify\.max_user_instances/)
  t.strictSame(mountsAt(mountpoint), [])
})
