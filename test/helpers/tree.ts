// SPDX-License-Identifier: MIT
/** A daemon of the test's own, on a mount point of its own, and real devices to serve. */
import { type ChildProcess, execFile, execFileSync, spawn, spawnSync } from 'node:child_process'
import {
  chmodSync,
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmdirSync,
  rmSync,
  statfsSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'

import tap, { type Test } from 'tap'

import { TRANSPORTS } from '../../src/fuse/transport.js'
import { blkPath } from './blk.js'
import { ROOT } from './root.js'

export const CLI = join(ROOT, 'dist/cli.js')
export const TWIN_DAEMON = join(ROOT, 'test/helpers/twin-daemon.mjs')

/**
 * The mechanism that is switched off. `+slow`: the daemon answers late. `+unseen`: it does not see its callers. See
 * twin-daemon.mjs.
 */
export type Twin = `${Mechanism}${'' | '+slow' | '+unseen'}`
type Mechanism =
  | 'none'
  | 'opens-late'
  | 'no-pins'
  | 'own-inodes'
  | 'faults-of-all'
  | 'workers-believed'
  | 'code-alone'
  | 'no-recall'
  | 'whole-disk-pins'
  | 'no-loop-check'
  | 'no-media-check'
  | 'callers-run'
  | 'callers-run-unknown'
  | 'no-inspect'
  | 'always-inspect'
  | 'no-access-rule'
  | 'no-touch'
  | 'inval-entry'
  | 'lookups-wait'
  | 'one-thread'
  | 'no-interrupts'
  | 'no-pin-store'
  | 'leases-forgotten'
  | 'leases-ask-files'
  | 'peers-believed'
  | 'calls-at-once'
  | 'dies-bound'
  | 'dies-held'
  | 'dies-stored'
  | 'no-journal'
  | 'mute'
  | 'deaf'
  | 'opens-alone'
  | 'hold-by-clock'
  | 'no-draining'
  | 'as-they-come'
  | 'clock-jumps'
  | 'wall-clock'
  | 'exhaustion-unnoticed'
  | 'small-buffer'
  | 'small-buffer-unnoticed'
  | 'hoards'
  | 'tries-once'
  | 'tries-by-clock'
  | 'openers-keep-nothing'
  | 'unwary'
  | 'ends-at-once'
  | 'no-prune'
  | 'hold-for-all'
  | 'may-not-open'
  | 'one-user'
  | 'waits-always'
  | 'no-hold'
  | 'no-comeback'
  | 'lock-on-mountpoint'
  | 'one-lock-for-all'
  | 'any-proc'
  | 'removable-drives'
  | 'removable-drives-anew'
  | 'always-looked-at'
  | 'purpose-open'
  | 'running-is-in'
  | 'no-walk-memory'
  | 'valid-attributes'
  | 'numbers-believed'
  | 'no-confirm'
  | 'linger-only'
  | 'one-inode-per-name'
  | 'on-loop-looks'
  | 'no-crowd'
  | 'unwatched'
  | 'nodes-in-dev'
  | 'done-when-seen'
  | 'no-links-beneath'
  | 'waits-for-links'
  | 'readable-root'
  | 'scan-in-lookup'
  | 'callers-by-forget'

/** The lock of a mount point that nothing is mounted at. */
export function lockOf(mountpoint: string): string {
  const found = statSync(mountpoint, { bigint: true, throwIfNoEntry: false })
  return `/run/diskseqfs/${found?.dev}:${found?.ino}@${statSync('/proc/self/ns/mnt').ino}.lock`
}

/** Removes a mount point, and the lock that a killed daemon has left. */
function removeMountpoint(mountpoint: string): void {
  rmSync(lockOf(mountpoint), { force: true })
  rmdirSync(mountpoint)
}

export interface RunningTree {
  readonly mountpoint: string
  readonly pid: number
  /** Its log so far, one object for each line. */
  log(): Record<string, any>[]
  /** Sends SIGTERM and waits; the exit code. */
  stop(): Promise<number | null>
  /** The exit code. */
  readonly ended: Promise<number | null>
}

/** What a daemon logs from now on. */
interface Log {
  text(): string
  /** One object for each line. */
  lines(): Record<string, any>[]
  /** Waits until the daemon is there. */
  started(there: () => boolean): Promise<void>
  /** Fails the test if the log has an error. */
  check(): void
}

function gather(child: ChildProcess): Log {
  let text = ''
  child.stderr?.on('data', (chunk: Buffer) => (text += chunk.toString()))
  const lines = () =>
    text
      .split('\n')
      .filter((line) => line.startsWith('{'))
      .map((line) => JSON.parse(line) as Record<string, any>)
  return {
    text: () => text,
    lines,
    started: async (there) => {
      for (let i = 0; !there(); i++) {
        if (child.exitCode !== null || i > 1000) throw new Error(`the daemon did not start:\n${text}`)
        await sleep(10)
      }
    },
    check: () => {
      if (lines().some((line) => line['level'] === 'error')) throw new Error(`the daemon logged errors:\n${text}`)
    },
  }
}

/** Without NODE_OPTIONS, by which tap loads itself into each node that is started. */
const { NODE_OPTIONS: _, ...ENVIRONMENT } = process.env

const cleanups = new WeakMap<Test, (() => unknown)[]>()

/**
 * Runs `undo` when the test ends, in reverse order of registration. Each one runs even if one
 * before it fails; with t.teardown() alone the rest would be left out.
 */
export function cleanup(t: Test, undo: () => unknown): void {
  let undos = cleanups.get(t)
  if (undos === undefined) {
    const mine: (() => unknown)[] = (undos = [])
    cleanups.set(t, mine)
    t.teardown(async () => {
      const failures: unknown[] = []
      for (let next = mine.pop(); next !== undefined; next = mine.pop()) {
        try {
          await next()
        } catch (error) {
          failures.push(error)
        }
      }
      if (failures.length > 0) throw failures[0]
    })
  }
  undos.push(undo)
}

/**
 * Starts a daemon and waits until it answers. It is stopped when the test
 * ends, and a log line of level error fails the test.
 *
 * @param twin the safety mechanism to switch off
 * @param args more arguments for `diskseqfs mount -f`; a twin knows only --open-timeout, --hold, --guard and --note-answers
 * @param limits arguments of prlimit(1) for the daemon
 * @param apart runs it in a pid namespace of its own, with the /proc of that or of the outer one; `pid` is then its parent's
 * @param parent where the mount point is made
 * @param before runs at the mount point before the daemon starts
 */
export async function startTree(
  t: Test,
  {
    twin,
    args = [],
    expectErrors = false,
    limits = [],
    apart,
    before = async () => {},
    parent = tmpdir(),
  }: {
    parent?: string
    twin?: Twin
    args?: string[]
    expectErrors?: boolean
    limits?: string[]
    apart?: 'own proc' | 'outer proc' | undefined
    before?: (mountpoint: string) => Promise<void>
  } = {},
): Promise<RunningTree> {
  const mountpoint = mkdtempSync(join(parent, 'diskseqfs-test-'))
  chmodSync(mountpoint, 0o755)
  await before(mountpoint)
  const command = twin === undefined ? [CLI, 'mount', '-f', mountpoint, ...args] : [TWIN_DAEMON, twin, mountpoint, ...args]
  const [file, ...given] = [
    ...(limits.length > 0 ? ['prlimit', ...limits] : []),
    ...(apart ? [blkPath(), 'pid-namespace', ...(apart === 'own proc' ? ['--own-proc'] : [])] : []),
    process.execPath,
    ...command,
  ]
  const child = spawn(file as string, given, { stdio: ['ignore', 'pipe', 'pipe'], env: ENVIRONMENT })
  const log = gather(child)
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  const stop = async () => {
    if (child.exitCode === null) child.kill('SIGTERM')
    const code = await Promise.race([ended, sleep(15_000, undefined, { ref: false })])
    if (code === undefined) {
      child.kill('SIGKILL')
      throw new Error(`the daemon did not stop:\n${log.text()}`)
    }
    return code
  }
  cleanup(t, async () => {
    await stop()
    removeMountpoint(mountpoint)
    if (!expectErrors) log.check()
  })
  await log.started(() => log.text().includes('"msg":"mounted"'))
  const pid = child.pid as number
  // The mount shows only in the daemon's mount namespace.
  const root = apart === 'own proc' ? `/proc/${readFileSync(`/proc/${pid}/task/${pid}/children`, 'latin1').trim()}/root` : ''
  return { mountpoint: root + mountpoint, pid, log: log.lines, stop, ended }
}

/** Runs a test that does not depend on the transport, once for each transport. */
export function onEachTransport(name: string, test: (t: Test, args: string[]) => Promise<void>): void {
  for (const transport of TRANSPORTS) {
    tap.test(`${name} (${transport})`, (t) => test(t, ['--transport', transport]))
  }
}

const MANAGER = join(ROOT, 'test/helpers/manager.py')
const GUARD = join(ROOT, 'native/diskseqfs-guard')

export interface ManagedTree {
  readonly mountpoint: string
  /** Process id of the manager, which starts guards. */
  readonly manager: number
  /** The guard that runs now, which starts daemons. */
  guard(): number
  /** The daemon that serves now. */
  pid(): number
  /** How many daemons were ready. */
  ready(): number
  /** Ends the daemon that serves now; the guard starts the next. */
  end(signal: 'SIGKILL' | 'SIGTERM'): void
  /** Ends the guard; the manager starts the next. */
  endGuard(signal: 'SIGKILL' | 'SIGTERM'): void
  /** While this is true, daemons that are started wait. */
  hold(held: boolean): void
  log(): Record<string, any>[]
  /** What the guards have printed. */
  said(): string
}

interface Managed {
  readonly twin?: Twin
  /** More arguments for the daemon. */
  readonly args?: readonly string[]
  readonly expectErrors?: boolean
  /** More arguments for the guard. */
  readonly guardArgs?: readonly string[]
  /** A guard other than the real one. */
  readonly program?: string
  /** Where the mount point is made. */
  readonly parent?: string
  /** Node's own arguments for the daemon. */
  readonly node?: readonly string[]
  /** How many descriptors the manager stores. */
  readonly storeMax?: number
  /** How long it takes for each message. */
  readonly messageMs?: number
}

/** Waits as long as the file exists. */
const HELD = 'while [ -e "$0" ]; do sleep 0.02; done; exec "$@"'

/** Kills all at once, before the guard can notice that others have gone. */
export function killAtOnce(guard: number, others: readonly number[]): void {
  process.kill(guard, 'SIGSTOP')
  for (const pid of others) process.kill(pid, 'SIGKILL')
  process.kill(guard, 'SIGKILL')
}

/**
 * A daemon that a guard starts anew whenever it ends. A service manager starts the guard anew. All
 * are stopped when the test ends, and the mount is removed.
 */
export async function startManaged(
  t: Test,
  {
    twin,
    args = [],
    expectErrors = false,
    guardArgs = [],
    program = GUARD,
    parent = tmpdir(),
    node = [],
    storeMax = 8192,
    messageMs = 0,
  }: Managed = {},
): Promise<ManagedTree> {
  const mountpoint = mkdtempSync(join(parent, 'diskseqfs-test-'))
  const hold = `${mountpoint}.hold`
  const daemon = twin === undefined ? [CLI, 'mount', '-f', mountpoint, ...args] : [TWIN_DAEMON, twin, mountpoint, ...args]
  const command = [program, ...guardArgs, '/bin/sh', '-c', HELD, hold, process.execPath, ...node, ...daemon]
  const env = { ...ENVIRONMENT, STORE_MAX: String(storeMax), MESSAGE_MS: String(messageMs) }
  const child = spawn('python3', [MANAGER, ...command], { stdio: 'pipe', env })
  let said = ''
  child.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()))
  const log = gather(child)
  const ended = new Promise((resolve) => child.on('close', resolve))
  const last = (pattern: RegExp) => Number([...said.matchAll(pattern)].at(-1)?.[1])
  const pid = () => last(/^status .*\(daemon (\d+)\)$/gm)
  cleanup(t, async () => {
    rmSync(hold, { force: true })
    child.stdin.end('stop\n')
    await until(() => said.includes('ended') || child.signalCode !== null, 15_000).catch(() => child.kill('SIGKILL'))
    spawnSync('umount', ['--lazy', '--force', '--quiet', mountpoint])
    // The log is closed only when the daemon has ended as well.
    const code = await Promise.race([ended, sleep(15_000, 'late', { ref: false })])
    if (code === 'late') process.kill(pid(), 'SIGKILL')
    removeMountpoint(mountpoint)
    if (code === 'late') throw new Error(`the daemon did not stop:\n${log.text()}`)
    if (!expectErrors) log.check()
  })
  const ready = () => said.split('\n').filter((line) => /^status serving \/.*daemon/.test(line)).length
  await log.started(() => ready() > 0)
  return {
    mountpoint,
    manager: child.pid as number,
    guard: () => last(/^pid (\d+)$/gm),
    pid,
    ready,
    end: (signal) => process.kill(pid(), signal),
    endGuard: (signal) => child.stdin.write(signal === 'SIGKILL' ? 'kill\n' : 'term\n'),
    hold: (held) => (held ? writeFileSync(hold, '') : rmSync(hold, { force: true })),
    log: log.lines,
    said: () =>
      log
        .text()
        .split('\n')
        .filter((line) => line.startsWith('diskseqfs-guard:'))
        .join('\n'),
  }
}

/** A directory of the test's own. */
export function scratch(t: Test): string {
  const path = mkdtempSync(join(tmpdir(), 'diskseqfs-scratch-'))
  cleanup(t, () => rmSync(path, { recursive: true }))
  return path
}

/** A file with that text at its beginning, and as its name. */
export function image(directory: string, text: string, size = 1 << 20): string {
  const file = join(directory, text)
  writeFileSync(file, text)
  truncateSync(file, size)
  return file
}

/** A file of a filesystem that can be made to hang. A test that stops a daemon of its disks registers `recover` as a cleanup after it. */
export async function hangingFile(t: Test) {
  const directory = scratch(t)
  const server = await startBlk(t, 'hungfs', directory)
  return {
    file: join(directory, 'disk'),
    /** From when it resolves on, whoever asks waits. */
    hang: () => {
      server.kill('SIGUSR1')
      return sleep(100)
    },
    recover: () => void server.kill('SIGUSR2'),
  }
}

/** A symlink in /dev/mapper, as udev would make it. */
export function mapperLink(t: Test, name: string, target: string): string {
  const existed = existsSync('/dev/mapper')
  mkdirSync('/dev/mapper', { recursive: true })
  const path = `/dev/mapper/${name}`
  symlinkSync(target, path)
  cleanup(t, () => {
    rmSync(path)
    if (!existed) rmdirSync('/dev/mapper')
  })
  return path
}

export interface TestDisk {
  /** `loop3` */
  readonly kname: string
  /** `/dev/loop3` */
  readonly path: string
  /** Its diskseq now, from sysfs. */
  diskseq(): string
}

export interface LoopDisk extends TestDisk {
  readonly file: string
  /** @param look a path that is looked at right before */
  detach(look?: string): void
  /** Adds partition `number` by ioctl (this needs no partition table). Sectors of 512 bytes. */
  addPartition(number: number, start: number, length: number): void
  /** @param look a path that is looked at right before */
  deletePartition(number: number, look?: string): void
  /** All of those that {@link addPartition} has added. */
  deletePartitions(): void
}

const sysfsDiskseq = (kname: string) => readFileSync(`/sys/class/block/${kname}/diskseq`, 'utf8').trim()

/**
 * A loop device on a file of its own, or on `file`; detached when the test ends.
 *
 * @param args more arguments for losetup
 */
export function loopDisk(t: Test, { size = 1 << 20, args = [], file }: { size?: number; args?: string[]; file?: string } = {}): LoopDisk {
  if (file === undefined) {
    const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-disk-'))
    cleanup(t, () => rmSync(directory, { recursive: true }))
    file = join(directory, 'disk.img')
    writeFileSync(file, '')
    truncateSync(file, size)
  }
  const path = execFileSync(blkPath(), ['loop-new'], { encoding: 'utf8' }).trim()
  cleanup(t, () => void execFileSync(blkPath(), ['loop-remove', path]))
  execFileSync('losetup', [...args, path, file])
  const kname = path.slice('/dev/'.length)
  const partitions = new Set<number>()
  const partition = (...args: (string | number)[]) => void execFileSync(blkPath(), ['partition', ...args.map(String)], { encoding: 'utf8' })
  const deletePartition = (number: number, look?: string) => {
    partition('del', path, number, ...(look === undefined ? [] : [look]))
    partitions.delete(number)
  }
  const deletePartitions = () => {
    for (const number of partitions) deletePartition(number)
  }
  let attached = true
  const detach = (look?: string) => {
    // The kernel leaves partitions on the device, which then counts as in use.
    deletePartitions()
    if (attached) execFileSync(blkPath(), ['loop-detach', path, ...(look === undefined ? [] : [look])])
    attached = false
  }
  cleanup(t, () => detach())
  return {
    kname,
    path,
    file,
    diskseq: () => sysfsDiskseq(kname),
    detach,
    addPartition: (number, start, length) => {
      partition('add', path, number, start, length)
      partitions.add(number)
    },
    deletePartition,
    deletePartitions,
  }
}

/**
 * Gives partition 1 of a disk another device number, as the one that it had goes to somebody else: to a partition of `other`,
 * or to a test that runs beside this one.
 */
export async function renumber(disk: LoopDisk, other: LoopDisk): Promise<void> {
  const node = `${disk.path}p1`
  const before = numberOf(statSync(node).rdev)
  const isTaken = () => existsSync(`/sys/dev/block/${before}`)
  do {
    // A pin ends some ms after the partition has been reached.
    await until(() => errorOf(() => disk.deletePartition(1)) === '')
    // The kernel frees the number a moment later, and gives the lowest one that is free.
    for (let number = 1; !isTaken(); number = (number % PARTITIONS) + 1) {
      if (number === 1) other.deletePartitions()
      other.addPartition(number, number * 8, 8)
      await sleep(2)
    }
    disk.addPartition(1, 64, 64)
  } while (numberOf(statSync(node).rdev) === before)
}

/** Partitions of {@link renumber} at a time. */
const PARTITIONS = 12

export interface ZramDisk extends TestDisk {
  readonly number: number
  reset(): void
}

/** A new zram device with a size; removed when the test ends. */
export function zramDisk(t: Test, { size = 1 << 20 }: { size?: number } = {}): ZramDisk {
  const number = Number(readFileSync('/sys/class/zram-control/hot_add', 'utf8'))
  const kname = `zram${number}`
  cleanup(t, async () => {
    for (let i = 0; ; i++) {
      try {
        writeFileSync('/sys/class/zram-control/hot_remove', String(number))
        return
      } catch (error) {
        if (i > 200) throw error
        await sleep(10) // still open for a moment
      }
    }
  })
  writeFileSync(`/sys/block/${kname}/disksize`, String(size))
  return {
    number,
    kname,
    path: `/dev/${kname}`,
    diskseq: () => sysfsDiskseq(kname),
    reset: () => writeFileSync(`/sys/block/${kname}/reset`, '1'),
  }
}

export interface Output {
  readonly code: number
  readonly stdout: string
  readonly stderr: string
}

/**
 * Runs a program to its end, asynchronously. (A synchronous call would hang if this process had to
 * serve the tree. A daemon here is always another process.)
 */
export async function run(
  file: string,
  args: string[] = [],
  options: { uid?: number; gid?: number; env?: NodeJS.ProcessEnv } = {},
): Promise<Output> {
  try {
    const { stdout, stderr } = await promisify(execFile)(file, args, { encoding: 'utf8', timeout: 60_000, env: ENVIRONMENT, ...options })
    return { code: 0, stdout, stderr }
  } catch (error) {
    const { code, stdout, stderr } = error as { code?: number; stdout?: string; stderr?: string }
    if (typeof code !== 'number') throw error
    return { code, stdout: stdout ?? '', stderr: stderr ?? '' }
  }
}

/** Runs the command line of this project. */
export function cli(...args: string[]): Promise<Output> {
  return run(process.execPath, [CLI, ...args])
}

/** A subcommand of the C helper that runs until its stdin closes. */
export interface RunningBlk {
  readonly pid: number
  /** Sends a line and returns the next one that it prints. */
  ask(): Promise<string>
  kill(signal: NodeJS.Signals): void
  /** Closes its stdin and waits; the last line it printed. */
  end(): Promise<string>
}

/** Time limit for one answer of a helper, which may have to make or remove ten thousand disks. */
const HELPER_MS = 120_000

/** Starts such a subcommand and waits for its first line, which says that it is ready. */
export function startBlk(t: Test, ...args: string[]): Promise<RunningBlk> {
  return startBlkAt(t, blkPath(), ...args)
}

/** The same with another program. */
export async function startBlkAt(t: Test, path: string, ...args: string[]): Promise<RunningBlk> {
  const child = spawn(path, args, { stdio: ['pipe', 'pipe', 'pipe'] })
  let out = ''
  let err = ''
  let ended = false
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (err += chunk.toString()))
  child.stdin.on('error', () => {}) // it ended by itself; its stderr says why
  const closed = new Promise<void>((resolve) =>
    child.on('close', () => {
      ended = true
      resolve()
    }),
  )
  let taken = 0
  const lines = () => out.split('\n').slice(0, -1)
  const line = async () => {
    await until(() => ended || lines().length > taken, HELPER_MS)
    const next = lines()[taken++]
    if (next === undefined) throw new Error(`blk ${args.join(' ')} ended: ${err}`)
    return next
  }
  const end = async () => {
    child.stdin.end()
    const killer = setTimeout(() => child.kill('SIGKILL'), HELPER_MS)
    await closed
    clearTimeout(killer)
    if (err !== '') throw new Error(`blk ${args.join(' ')}: ${err}`)
    return lines().at(-1) ?? ''
  }
  cleanup(t, end)
  await line()
  return {
    pid: child.pid as number,
    ask: () => {
      child.stdin.write('\n')
      return line()
    },
    kill: (signal) => void child.kill(signal),
    end,
  }
}

export interface Seen {
  readonly open: number
  readonly close_write: number
  readonly close_nowrite: number
}

/** By then a watcher has been told, in ms. No event says that none will come. */
export const TOLD_MS = 500

/**
 * Watches a node with inotify, and opens of the device by a tree's daemon. The result returns what was seen since its last
 * call.
 */
export async function watchNode(t: Test, path: string, tree?: { readonly pid: number }): Promise<() => Promise<Seen>> {
  const watch = await startBlk(t, 'watch', '--path', path, ...(tree === undefined ? [] : ownNode(tree.pid, statSync(path).rdev)))
  let before: Seen = { open: 0, close_write: 0, close_nowrite: 0 }
  return async () => {
    const now = JSON.parse(await watch.ask()) as Seen
    const since = {
      open: now.open - before.open,
      close_write: now.close_write - before.close_write,
      close_nowrite: now.close_nowrite - before.close_nowrite,
    }
    before = now
    return since
  }
}

/** Resident memory of a process, MiB. */
export function resident(pid: number): number {
  return Number(/^VmRSS:\s+(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024
}

/** The thread ids of a process. */
export const threads = (pid: number) => readdirSync(`/proc/${pid}/task`)
/** The open descriptors of a process. */
export const descriptors = (pid: number) => readdirSync(`/proc/${pid}/fd`)

/**
 * Whether a process has a device open by that node: fuser(1) and lsof(8) ask this, and `fuser -k` then ends the
 * process.
 */
export function uses(pid: number, node: string): boolean {
  const { dev, ino } = statSync(node)
  return descriptors(pid).some((fd) => {
    const found = statSync(`/proc/${pid}/fd/${fd}`, { throwIfNoEntry: false })
    return found?.dev === dev && found.ino === ino
  })
}

/** Makes many disks, all on one file; they are removed when the test ends. -> their paths in /dev */
export async function manyDisks(t: Test, count: number, file: string): Promise<string[]> {
  await startBlk(t, 'loops', String(count), file)
  return boundTo(file).map((kname) => `/dev/${kname}`)
}

/** The loop devices that are bound to a file, by the kernel's names. */
export const boundTo = (file: string) =>
  readdirSync('/sys/block').filter((kname) => kname.startsWith('loop') && backingFile(kname) === file)

function backingFile(kname: string): string | undefined {
  try {
    return readFileSync(`/sys/block/${kname}/loop/backing_file`, 'utf8').trim()
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code === 'ENOENT' || code === 'ENXIO' || code === 'ENODEV') return undefined // not bound, or gone
    throw error
  }
}

/** The diskseq that a device in /dev has now. */
export const diskseqOf = (path: string) => sysfsDiskseq(path.slice('/dev/'.length))

/** Devices that a process has open now, by its descriptors in /proc. */
export function openDevices(pid: number): string[] {
  const found: string[] = []
  for (const fd of descriptors(pid)) {
    const path = openDevice(pid, fd)
    // The number may go to another file between the two reads, so they are done twice.
    if (path !== undefined && path === openDevice(pid, fd)) found.push(path)
  }
  return found
}

function openDevice(pid: number, fd: string): string | undefined {
  try {
    if (!statSync(`/proc/${pid}/fd/${fd}`).isBlockDevice()) return undefined
    // An O_PATH descriptor of a node does not open the device.
    const flags = /^flags:\s*(\d+)$/m.exec(readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'utf8'))?.[1] ?? '0'
    return (Number.parseInt(flags, 8) & O_PATH) === 0 ? pathOf(statSync(`/proc/${pid}/fd/${fd}`).rdev) : undefined
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error // closed meanwhile
    return undefined
  }
}

/** gnu_dev_makedev */
const numberOf = (rdev: number) => `${(rdev >> 8) & 0xfff}:${(rdev & 0xff) | ((rdev >>> 12) & 0xfff00)}`

function pathOf(rdev: number): string {
  const sysfs = `/sys/dev/block/${numberOf(rdev)}`
  return existsSync(sysfs) ? `/dev/${basename(readlinkSync(sysfs))}` : `${numberOf(rdev)}, which is gone`
}

const TMPFS_MAGIC = 0x01021994

/**
 * Arguments that name the node by which a daemon opens a device: the directory of such nodes (makeNodes in
 * `src/native.ts`), and its name there.
 */
function ownNode(pid: number, rdev: number): string[] {
  const links = descriptors(pid).map((fd) => `/proc/${pid}/fd/${fd}`)
  const isNodes = (link: string) => readlinkSync(link) === '/' && statfsSync(link).type === TMPFS_MAGIC
  const nodes = links.find((link) => existsSync(link) && isNodes(link))
  return nodes === undefined ? [] : ['--directory', nodes, '--name', numberOf(rdev)]
}

/** asm-generic/fcntl.h; the same on all 64-bit architectures this builds for */
const O_PATH = 0o10000000

/** The error of a call, '' if it succeeds; a descriptor that it returns is closed. */
export function errorOf(call: () => unknown): string {
  try {
    const result = call()
    if (typeof result === 'number') closeSync(result)
    return ''
  } catch (error) {
    return (error as NodeJS.ErrnoException).code ?? String(error)
  }
}

/** Waits until `condition` holds; fails after `ms`. */
export async function until(condition: () => boolean | Promise<boolean>, ms = 30_000): Promise<void> {
  for (let waited = 0, last = Date.now(); !(await condition());) {
    if (waited > ms) throw new Error(`not within ${ms} ms: ${condition}`)
    await sleep(2)
    const now = Date.now()
    waited += Math.min(now - last, ROUND_MAX_MS)
    last = now
  }
}

/** What counts of the time between two looks at a condition: in the rest this process got no processor. */
const ROUND_MAX_MS = 50

/** A part of {@link sleepInRounds}. */
const SLEEP_MS = 8

/** Sleeps until the timers of this process, which get no processor on a busy machine either, have had that time. */
export async function sleepInRounds(ms: number): Promise<void> {
  for (let left = ms; left > 0; left -= SLEEP_MS) await sleep(Math.min(left, SLEEP_MS))
}

/** What a daemon of twin-daemon.mjs reports about itself now. */
export async function report(tree: RunningTree): Promise<Record<string, any>> {
  const reports = () => tree.log().filter((line) => line['msg'] === 'remembered')
  const before = reports().length
  process.kill(tree.pid, 'SIGUSR2')
  await until(() => reports().length > before)
  return reports().at(-1) as Record<string, any>
}

export { sleep, type ChildProcess }
