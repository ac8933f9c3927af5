// SPDX-License-Identifier: MIT
/**
 * A disk that hangs is a problem only for callers that want that disk. They get an error in bounded
 * time, can be killed before that, and no other process notices.
 *
 * The disk is a loop device on a file whose filesystem stops answering. The daemon asks the loop
 * device for its status before it believes that it holds the right disk, and that waits for the
 * filesystem.
 */
import { spawn } from 'node:child_process'
import { existsSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'

import t, { type Test } from 'tap'

import { blk, blkPath } from '../helpers/blk.js'
import { twinGuard } from '../helpers/guard.js'
import { LONG, twoForms } from '../helpers/long.js'
import {
  cleanup,
  diskseqOf,
  errorOf,
  hangingFile,
  loopDisk,
  manyDisks,
  openDevices,
  resident,
  type RunningTree,
  sleep,
  startBlk,
  startManaged,
  startTree,
  threads,
  type Twin,
  until,
  zramDisk,
} from '../helpers/tree.js'

const OPEN_TIMEOUT_S = 2
/** How much longer than the timeout a caller may wait, on a busy machine. */
const SLACK_MS = 1000
/** The longest delay for all others. */
const BOUND_MS = 1000

/** The number of openat2(2), the same on all architectures. */
const OPENAT2 = 437

/** The system call that a thread is in, and its arguments. */
const callOf = (pid: number, tid: string) => readFileSync(`/proc/${pid}/task/${tid}/syscall`, 'utf8')

interface Stuck {
  readonly tree: RunningTree
  /** Paths in the tree. */
  readonly stuck: string[]
  readonly other: string
  hang(): Promise<void>
  recover(): void
}

async function setup(
  t: Test,
  { twin, timeout = OPEN_TIMEOUT_S, disks = 1 }: { twin?: Twin; timeout?: number; disks?: number } = {},
): Promise<Stuck> {
  const { file, hang, recover } = await hangingFile(t)
  const loops = Array.from({ length: disks }, () => loopDisk(t, { file }))
  const zram = zramDisk(t)
  const tree = await startTree(t, { args: ['--open-timeout', String(timeout)], ...(twin && { twin }) })
  // Runs before the other cleanups: nothing that waits for the disk can end before.
  cleanup(t, recover)
  return {
    tree,
    stuck: loops.map((loop) => join(tree.mountpoint, loop.diskseq())),
    other: join(tree.mountpoint, zram.diskseq()),
    hang,
    recover,
  }
}

interface Caller {
  kill(signal: NodeJS.Signals): void
  /** Its exit code (null if it was killed), and how long it took. */
  readonly ended: Promise<{ code: number | null; ms: number; out: string }>
}

/** Starts a program that opens a path; by default once, from C. */
function call(t: Test, path: string, file = blkPath(), args = ['openlat', '--count', '1', '--path', path]): Caller {
  const began = performance.now()
  const child = spawn(file, args, { stdio: ['ignore', 'pipe', 'ignore'] })
  let out = ''
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  const ended = new Promise<Awaited<Caller['ended']>>((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (code) => resolve({ code, ms: performance.now() - began, out }))
  })
  cleanup(t, async () => {
    child.kill('SIGKILL')
    await ended
  })
  return { kill: (signal) => void child.kill(signal), ended }
}

const complaints = (tree: RunningTree) => tree.log().filter((line) => line['level'] !== 'info' && line['msg'] !== undefined)

t.test('an open of a disk that hangs fails in time, and works again when the disk does', async (t) => {
  const { tree, stuck, hang, recover } = await setup(t)
  const path = stuck[0] as string
  t.strictSame((await blk('openlat', '--path', path, '--count', '1'))['errors'], {}, 'it can be opened before')
  await until(() => openDevices(tree.pid).length === 0)
  await hang()
  const { ms, out } = await call(t, path).ended
  t.strictSame(JSON.parse(out)['errors'], { ETIMEDOUT: 1 }, 'ETIMEDOUT')
  t.comment(`after ${ms.toFixed(0)} ms`)
  t.ok(ms >= OPEN_TIMEOUT_S * 1000 - 50, 'not before the timeout')
  t.ok(ms <= OPEN_TIMEOUT_S * 1000 + SLACK_MS, 'and not long after the timeout')
  await until(() => complaints(tree).length > 0, 2000)
  const lines = complaints(tree)
  t.equal(lines.length, 1, 'the log has one line about it')
  t.match(lines[0], { level: 'warn', diskseq: basename(path), errno: 'ETIMEDOUT', reason: /did not answer/ })
  const before = threads(tree.pid).length
  await Promise.all(Array.from({ length: 10 }, () => call(t, path).ended))
  t.ok(threads(tree.pid).length <= before, 'more attempts take no more threads')
  recover()
  await until(() => errorOf(() => openSync(path, 'r')) === '', 5000)
  t.pass('it can be opened again')
})

t.test('a caller that hangs can be killed, and interrupted', async (t) => {
  const { stuck, hang } = await setup(t, { timeout: 8 })
  await hang()
  for (const signal of ['SIGKILL', 'SIGTERM', 'SIGINT'] as const) {
    for (const after of [5, 50, 500]) {
      const caller = call(t, stuck[0] as string)
      await sleep(after)
      const killed = performance.now()
      caller.kill(signal)
      const { code } = await caller.ended
      const ms = performance.now() - killed
      t.ok(ms < 1000, `${signal} after ${after} ms ends it within a second (${ms.toFixed(0)} ms), code ${code}`)
    }
  }
  const dd = call(t, stuck[0] as string, 'dd', ['if=/dev/zero', `of=${stuck[0]}`, 'count=1'])
  await sleep(300)
  const killed = performance.now()
  dd.kill('SIGTERM')
  await dd.ended
  t.ok(performance.now() - killed < 1000, 'so does a program that would create the file')
})

t.test('twin: if the daemon does not hear that callers want to give up, they stay', async (t) => {
  const { stuck, hang } = await setup(t, { timeout: 4, twin: 'no-interrupts' })
  await hang()
  const caller = call(t, stuck[0] as string)
  await sleep(300)
  caller.kill('SIGKILL')
  const ended = await Promise.race([caller.ended.then(() => true), sleep(1500).then(() => false)])
  t.equal(ended, false, 'killed, and still there a second later')
  await caller.ended
})

/**
 * What other processes do meanwhile, for some seconds, each call in a process of its own. -> how long each took
 * at most
 */
async function delays({ tree, stuck, other }: Stuck, seconds: number): Promise<Map<string, number>> {
  const found = await blk(
    'delays',
    '--dir',
    tree.mountpoint,
    '--hung',
    basename(stuck[0] as string),
    '--other',
    basename(other),
    '--seconds',
    String(seconds),
  )
  const max = new Map<string, number>()
  for (const [what, { max_ms, unexpected }] of Object.entries(found)) {
    max.set(what, max_ms)
    if (Object.keys(unexpected).length > 0) max.set(`${what} gives ${JSON.stringify(unexpected)}`, Infinity)
  }
  return max
}

async function nobodyWaits(t: Test, setting: Stuck, seconds: number, boundMs = BOUND_MS): Promise<void> {
  for (const [what, ms] of await delays(setting, seconds)) {
    t.ok(ms < boundMs, `${what}: ${ms.toFixed(0)} ms at most`)
  }
}

t.test('one disk that hangs, and fifty callers of it, delay no other caller', async (t) => {
  const setting = await setup(t)
  const { tree, stuck, hang, recover } = setting
  const path = stuck[0] as string
  await blk('openlat', '--path', setting.other, '--count', '5')
  const before = threads(tree.pid).length
  await hang()
  const callers = [
    ...Array.from({ length: 40 }, () => call(t, path, blkPath(), ['openlat', '--count', '3', '--path', path])),
    ...Array.from({ length: 10 }, () =>
      call(t, path, 'sh', ['-c', 'for i in 1 2 3; do dd if=/dev/zero of="$1" count=1; done', 'sh', path]),
    ),
  ]
  await sleep(200)
  const opens = blk('openlat', '--path', setting.other, '--count', '200', '--close-immediately')
  await nobodyWaits(t, setting, 4)
  const { max_ns, errors } = await opens
  t.strictSame(errors, {}, '200 opens of another disk')
  t.ok(max_ns / 1e6 < BOUND_MS, `${(max_ns / 1e6).toFixed(0)} ms at most`)
  t.ok(threads(tree.pid).length <= before + 8, `${threads(tree.pid).length - before} threads more than before`)
  recover()
  await Promise.all(callers.map((caller) => caller.ended))
  t.pass('all callers end')
})

t.test('twin: if lookups wait for the disk, others wait with them', async (t) => {
  const setting = await setup(t, { twin: 'lookups-wait' })
  await setting.hang()
  const caller = call(t, setting.stuck[0] as string)
  await sleep(200)
  const max = await delays(setting, 1)
  t.comment(JSON.stringify([...max]))
  t.ok((max.get('mkdir') ?? 0) > BOUND_MS, 'a mkdir waits')
  const innocent = ['open', 'open with O_CREAT', 'open of a missing name', 'stat', 'listing']
  t.ok(
    innocent.some((what) => (max.get(what) ?? 0) > BOUND_MS),
    'others wait for that mkdir',
  )
  await caller.ended
})

const MANY = 24

t.test('many disks that hang delay no other caller', async (t) => {
  const setting = await setup(t, { disks: MANY })
  const { tree, stuck, hang } = setting
  await blk('openlat', '--path', setting.other, '--count', '5')
  const before = threads(tree.pid).length
  await hang()
  const callers = stuck.flatMap((path) => [call(t, path), call(t, path)])
  await sleep(200)
  await nobodyWaits(t, setting, 1)
  const more = threads(tree.pid).length - before
  t.ok(more >= MANY - 8 && more <= MANY + 8, `${more} threads for ${MANY} disks`)
  for (const { ended } of callers) {
    const { ms, out } = await ended
    if (ms > OPEN_TIMEOUT_S * 1000 + SLACK_MS || !out.includes('ETIMEDOUT')) t.fail(`a caller: ${ms} ms, ${out}`)
  }
})

const HUNDREDS = LONG ? 200 : 60
const LONG_TIMEOUT_S = 3
/** Far below the timeout, and far above the delay on a machine that is busy with hundreds of callers. */
const WIDE_BOUND_MS = 1500

interface Hundreds extends Stuck {
  /** Paths in /dev of the disks that can hang. */
  readonly devices: string[]
}

/** Hundreds of disks on a file of a filesystem that can be made to hang, and one disk that works. */
async function setupHundreds(t: Test, { twin, disks = HUNDREDS }: { twin?: Twin; disks?: number } = {}): Promise<Hundreds> {
  const { file, hang, recover } = await hangingFile(t)
  const devices = await manyDisks(t, disks, file)
  const zram = zramDisk(t)
  const tree = await startTree(t, { args: ['--open-timeout', String(LONG_TIMEOUT_S)], ...(twin && { twin }) })
  cleanup(t, recover)
  return {
    tree,
    devices,
    stuck: devices.map((path) => join(tree.mountpoint, diskseqOf(path))),
    other: join(tree.mountpoint, zram.diskseq()),
    hang,
    recover,
  }
}

/** Two callers of each disk, which come again as soon as they have an answer. */
async function callersOf({ tree, stuck }: Stuck, t: Test) {
  const names = stuck.map((path) => basename(path)).join()
  const callers = await startBlk(
    t,
    'abuse',
    '--dir',
    tree.mountpoint,
    '--kinds',
    'open',
    '--threads',
    String(2 * HUNDREDS),
    '--names',
    names,
  )
  await callers.ask()
  return callers
}

/** How much longer than the timeout any of hundreds of callers may wait. */
const BUSY_MS = 5000
/** Threads of the daemon that may come and go beside its own pool. */
const THREADS_SLACK = 16
const MORE_MIB = 100

t.test(twoForms('hundreds of disks that hang delay no other caller, take a thread each, and come back'), async (t) => {
  const setting = await setupHundreds(t)
  const { tree, stuck, other, hang, recover } = setting
  await blk('openlat', '--path', other, '--count', '5')
  const before = { threads: threads(tree.pid).length, mib: resident(tree.pid) }
  await hang()
  const callers = await callersOf(setting, t)
  await sleep(500)
  await nobodyWaits(t, setting, 1, WIDE_BOUND_MS)
  // Waits until each caller has come a second time.
  await sleep(4000)
  const { max_ns, errors } = await blk('openlat', '--path', other, '--count', '200', '--close-immediately')
  t.strictSame(errors, {}, '200 opens of another disk')
  t.ok(max_ns / 1e6 < WIDE_BOUND_MS, `${(max_ns / 1e6).toFixed(1)} ms at most`)
  const more = threads(tree.pid).length - before.threads
  t.ok(more <= HUNDREDS + THREADS_SLACK, `${more} threads for ${HUNDREDS} disks`)
  const mib = resident(tree.pid) - before.mib
  t.ok(mib < MORE_MIB, `${mib.toFixed(0)} MiB`)
  recover()
  const { open } = JSON.parse(await callers.end()) as { open: { n: number; max_ms: number; errors: Record<string, number> } }
  t.strictSame(Object.keys(open.errors), ['ETIMEDOUT'], `callers got ETIMEDOUT, ${open.errors['ETIMEDOUT']} times`)
  t.ok(open.max_ms < LONG_TIMEOUT_S * 1000 + BUSY_MS, `after ${open.max_ms} ms at the latest`)
  const failed = stuck.map((path) => errorOf(() => openSync(path, 'r'))).filter((error) => error !== '')
  t.strictSame(failed, [], 'all can be opened again')
  await until(() => openDevices(tree.pid).length === 0, 10_000)
  await until(() => threads(tree.pid).length <= before.threads + THREADS_SLACK, 15_000)
  t.pass('nothing is held any more, and the threads are gone')
})

t.test('twin: if each caller has the disk opened anew, threads grow with the callers', async (t) => {
  const setting = await setupHundreds(t, { twin: 'opens-alone' })
  const before = threads(setting.tree.pid).length
  await setting.hang()
  const callers = await callersOf(setting, t)
  await sleep(1000)
  const more = threads(setting.tree.pid).length - before
  t.ok(more > HUNDREDS * 1.5, `${more} threads for ${HUNDREDS} disks`)
  setting.recover()
  await callers.end()
})

t.test('disks of which not even open(2) returns delay no other caller', async (t) => {
  const setting = await setupHundreds(t, { disks: MANY })
  const { tree, devices, stuck, hang, recover } = setting
  await hang()
  const stall = await startBlk(t, 'loop-stall', ...devices)
  const callers = stuck.map((path) => call(t, path))
  await sleep(300)
  const inOpen = threads(tree.pid).filter((tid) => callOf(tree.pid, tid).startsWith(`${OPENAT2} `))
  t.equal(inOpen.length, MANY, 'the daemon is in open(2) of each')
  await nobodyWaits(t, setting, 1, WIDE_BOUND_MS)
  for (const { ended } of callers) {
    const { ms, out } = await ended
    if (ms > LONG_TIMEOUT_S * 1000 + BUSY_MS || !out.includes('ETIMEDOUT')) t.fail(`a caller: ${ms} ms, ${out}`)
  }
  recover()
  await stall.end()
  t.strictSame(stuck.map((path) => errorOf(() => openSync(path, 'r'))).filter(Boolean), [], 'all can be opened again')
})

t.test('twin: with one thread for all disks, others wait', async (t) => {
  const { stuck, other, hang } = await setup(t, { twin: 'one-thread' })
  await hang()
  const caller = call(t, stuck[0] as string)
  await sleep(200)
  const { max_ns, errors } = await blk('openlat', '--path', other, '--count', '1')
  t.ok(max_ns / 1e6 > BOUND_MS || errors['ETIMEDOUT'] > 0, 'an open of another disk waits')
  await caller.ended
})

// A LOOKUP of these calls looks like one that must have a pin, or must have one itself. Meanwhile
// the kernel holds a lock of the directory, for some of them exclusively.
for (const [who, start] of [
  ['mount(2)', (t: Test, path: string, dir: string) => call(t, path, blkPath(), ['mount', '--path', path, '--dir', dir])],
  ['io_uring_enter(2)', (t: Test, path: string) => call(t, path, blkPath(), ['uring-open', '--path', path])],
  ['unlink(2)', (t: Test, path: string) => call(t, path, 'unlink', [path])],
  ['mkdir(2)', (t: Test, path: string) => call(t, path, 'mkdir', [path])],
  ['chmod(2)', (t: Test, path: string) => call(t, path, 'chmod', ['600', path])],
] as const) {
  t.test(`a call of ${who} on a disk that hangs delays no other caller`, async (t) => {
    const setting = await setup(t, { timeout: 4 })
    const dir = mkdtempSync(join(tmpdir(), 'diskseqfs-mnt-'))
    cleanup(t, () => rmSync(dir, { recursive: true }))
    await setting.hang()
    const caller = start(t, setting.stuck[0] as string, dir)
    await sleep(200)
    await nobodyWaits(t, setting, 1)
    const { ms } = await caller.ended
    t.ok(ms < 4000 + SLACK_MS, `it ends in time, after ${ms.toFixed(0)} ms`)
  })
}

t.test('a daemon that is told to stop while a disk hangs removes its mount at once', async (t) => {
  const { tree, stuck, hang, recover } = await setup(t, { timeout: 8 })
  await hang()
  const caller = call(t, stuck[0] as string)
  await sleep(200)
  const mounted = () => readFileSync('/proc/self/mountinfo', 'utf8').includes(` ${tree.mountpoint} `)
  t.ok(mounted(), 'mounted')
  const stopped = tree.stop()
  await until(() => !mounted(), 1000)
  t.pass('the mount is gone')
  const { ms } = await caller.ended
  t.ok(ms < 2000, 'the caller is released')
  recover()
  t.equal(await stopped, 0, 'the daemon ends once the disk lets it')
})

/** The argument of ioctl(2); linux/loop.h. */
const LOOP_GET_STATUS64 = '0x4c05'
/** Far below what a guard that asks for answers takes to notice that there are none. */
const NEXT_MS = 10_000

/** Whether another disk is opened soon after a daemon was killed of which a thread waits for a disk, and so cannot end. */
async function openedSoon(t: Test, program?: string): Promise<boolean> {
  const { file, hang, recover } = await hangingFile(t)
  const hung = loopDisk(t, { file })
  const zram = zramDisk(t)
  const tree = await startManaged(t, { expectErrors: true, ...(program !== undefined && { program }) })
  cleanup(t, recover)
  await hang()
  call(t, join(tree.mountpoint, hung.diskseq()))
  const pid = tree.pid()
  await until(() => threads(pid).some((tid) => callOf(pid, tid).includes(` ${LOOP_GET_STATUS64} `)), 10_000)
  const ready = tree.ready()
  process.kill(pid, 'SIGKILL')
  await sleep(500)
  t.ok(existsSync(`/proc/${pid}/task`) && threads(pid).length > 0, 'it is still there')
  const opened = blk('openlat', '--path', join(tree.mountpoint, zram.diskseq()), '--count', '1')
  const soon = await Promise.race([opened.then(({ errors }) => Object.keys(errors).length === 0), sleep(NEXT_MS, false, { ref: false })])
  recover()
  await opened
  if (soon) t.ok(tree.ready() > ready, 'by the next daemon')
  return soon
}

t.test('a daemon that is killed while a disk hangs has its successor at once', async (t) => {
  t.ok(await openedSoon(t))
})

t.test('twin: if the guard waits until it has ended, it has not', async (t) => {
  t.notOk(await openedSoon(t, twinGuard(t, 'if (serving.killed || has_exited(&serving)) {', 'if (serving.killed) {')))
})
