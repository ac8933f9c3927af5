// SPDX-License-Identifier: MIT
/** What the daemon needs and may not get: descriptors, memory, the processor, a clock that is right. */
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

import { blk } from '../helpers/blk.js'
import {
  cleanup,
  descriptors,
  diskseqOf,
  errorOf,
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

/** Descriptors the daemon may have; it needs some thirty itself. */
const NOFILE = 96
const FEW = 48
/** All it has are in use then, and numbers that get free are not below this. */
const NONE = 8
const DISKS = 150

/** More disks than the daemon has descriptors for. */
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

/** Errors of opening each, one after another. */
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
  t.strictSame(errors, [], 'who has a disk open holds it himself')
})

t.test('without descriptors an open fails, and says why; it comes back', async (t) => {
  const { tree, disks } = await manyDisksFewDescriptors(t)
  await limit(tree, NONE)
  // Each after a second: all at once.
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
    'a new disk is not said to be missing',
  )
  await limit(tree, NOFILE)
  t.strictSame(openErrors(disks), [], 'all can be opened again, one after another')
  await until(() => errorOf(() => statSync(join(tree.mountpoint, late.diskseq()))) === '', 5000)
  t.pass('the new one is there')
})

t.test('twin: if it is not noticed that descriptors are missing, disks are denied', async (t) => {
  const { tree, disks } = await manyDisksFewDescriptors(t, 'exhaustion-unnoticed')
  const errors: string[] = []
  // Who asks can be looked at with what is left. Some of those that it has may be for a
  // moment only, so that one is left for a disk too: then with one fewer.
  const denied = () => errors.some((error) => error === 'ENXIO' || error === 'ENOENT')
  for (let i = 0; i < 4 && !denied(); i++) {
    await limit(tree, descriptors(tree.pid).length - i)
    errors.push(...openErrors(disks))
    await limit(tree, NOFILE)
  }
  // ENXIO where the kernel has the name from before, ENOENT where it asks for it again.
  t.ok(denied(), `a disk that is there is said to be gone, not ${[...new Set(errors)]}`)
})

/** As many opens of disks after one another as there are descriptors several times over. */
async function oneAfterAnother(t: Test, twin?: Twin): Promise<string[]> {
  const { disks } = await manyDisksFewDescriptors(t, twin, FEW)
  return [1, 2, 3, 4, 5].flatMap(() => openErrors(disks))
}

t.test('who opens disks one after another, faster than their pins end, waits for them', async (t) => {
  t.strictSame(await oneAfterAnother(t), [])
})

t.test('twin: without that some opens fail', async (t) => {
  t.ok((await oneAfterAnother(t, 'tries-once')).length > 0)
})

/** The daemon has no descriptor left, stands still for longer than it tries again, and gets some a moment after it goes on. */
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

t.test('a daemon that gets no processor does not give up for it', async (t) => {
  t.equal(await stoodStill(t), '')
})

t.test('twin: one that goes by the clock does', async (t) => {
  t.equal(await stoodStill(t, 'tries-by-clock'), 'EIO')
})

/** Where groups of processes are made, and the file that has their limit. */
const [CGROUPS, LIMIT] = existsSync('/sys/fs/cgroup/memory/memory.limit_in_bytes')
  ? ['/sys/fs/cgroup/memory', 'memory.limit_in_bytes']
  : ['/sys/fs/cgroup', 'memory.max']

/** A group of processes that may take so much more memory than they have; undefined where there is no such thing. */
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

/** Whether it still serves when a hundred threads have asked for all there is. */
async function survives(t: Test, twin: Twin): Promise<boolean | undefined> {
  const group = memoryGroup(t, MEMORY_MIB)
  if (group === undefined) return undefined
  zramDisk(t)
  const tree = await startTree(t, { twin })
  group.add(tree.pid)
  // A daemon that is killed leaves a dead mount.
  cleanup(t, () => (existsSync(`/proc/${tree.pid}/exe`) ? undefined : run('umount', ['--lazy', tree.mountpoint])))
  const nobody = await startBlk(t, 'abuse', '--dir', tree.mountpoint, '--uid', NOBODY)
  await nobody.ask()
  const end = performance.now() + ASKED_MS
  while (existsSync(`/proc/${tree.pid}/exe`) && performance.now() < end) await sleep(50)
  await nobody.end()
  return errorOf(() => statSync(tree.mountpoint)) === ''
}

t.test('with little memory it serves whoever asks', async (t) => {
  const served = await survives(t, 'none')
  if (served === undefined) return t.comment(NO_LIMIT)
  t.ok(served, `it goes on with ${MEMORY_MIB} MiB more than it started with`)
})

t.test('twin: one that remembers what it is asked does not', async (t) => {
  const served = await survives(t, 'hoards')
  if (served === undefined) return t.comment(NO_LIMIT)
  t.notOk(served, 'it was killed')
})

/** Somebody who cannot be seen has a disk open for longer than the hold, for most of which the daemon is stopped. */
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

t.test('a daemon that was stopped answers who waited meanwhile, and holds on to what is in use', async (t) => {
  const { tree, held, pinned, callers } = await stopped(t, { twin: 'none+unseen', hold: 5, ms: 10_000 })
  for (const what of ['open', 'stat', 'list']) {
    const { n, max_ms, errors } = callers[what] as { n: number; max_ms: number; errors: object }
    t.strictSame(errors, {}, `${n} times ${what}`)
    t.ok(max_ms > 9000, 'some waited')
  }
  t.ok(pinned, 'the disk is still held')
  await until(() => !openDevices(tree.pid).includes(held.path), 10_000)
  t.pass('until its time is over')
})

t.test('twin: a hold that goes by the clock is over', async (t) => {
  const { pinned } = await stopped(t, { twin: 'hold-by-clock+unseen', hold: 3, ms: 4000 })
  t.notOk(pinned, 'the disk is not held any more')
})

const released = (tree: RunningTree, path: string) =>
  until(() => !openDevices(tree.pid).includes(path), 2000).then(
    () => true,
    () => false,
  )

t.test('a wall clock that jumps changes nothing', async (t) => {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-hung-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const server = await startBlk(t, 'hungfs', directory)
  const hung = loopDisk(t, { file: join(directory, 'disk') })
  const disk = loopDisk(t)
  const tree = await startTree(t, { twin: 'clock-jumps+unseen', args: ['--open-timeout', '1', '--hold', '2'] })
  cleanup(t, () => server.kill('SIGUSR2'))
  const path = join(tree.mountpoint, disk.diskseq())
  const fd = openSync(path, 'r')
  await sleep(100)
  t.ok(openDevices(tree.pid).includes(disk.path), 'a disk in use is held')
  t.ok(await until(() => !openDevices(tree.pid).includes(disk.path), 6000).then(() => true), 'for a while')
  closeSync(fd)
  closeSync(openSync(path, 'r'))
  t.ok(await released(tree, disk.path), 'one that is not in use is let go of')
  const late = zramDisk(t)
  t.equal(
    errorOf(() => statSync(join(tree.mountpoint, late.diskseq()))),
    '',
    'a new disk is there',
  )
  t.equal(
    errorOf(() => statSync(join(tree.mountpoint, '4000000000'))),
    'ENOENT',
    'what is not there is not',
  )
  server.kill('SIGUSR1')
  await sleep(100)
  const began = performance.now()
  const { errors } = await blk('openlat', '--path', join(tree.mountpoint, hung.diskseq()), '--count', '1')
  t.strictSame(errors, { ETIMEDOUT: 1 }, 'a disk that hangs is ETIMEDOUT')
  t.ok(performance.now() - began >= 950, 'after the timeout')
  t.match(readFileSync('/proc/self/mountinfo', 'utf8'), tree.mountpoint, 'it is still mounted')
})

t.test('twin: if the daemon went by that clock, disks were not let go of', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t, { twin: 'wall-clock', args: ['--hold', '2'] })
  closeSync(openSync(join(tree.mountpoint, disk.diskseq()), 'r'))
  t.notOk(await released(tree, disk.path))
})
