/** A daemon of the test's own, on a mount point of its own, and real devices to serve. */
import { type ChildProcess, execFile, execFileSync, spawn } from 'node:child_process'
import { mkdtempSync, readFileSync, rmdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'

import type { Test } from 'tap'

import { ROOT } from './root.js'

export const CLI = join(ROOT, 'dist/cli.js')
const TWIN = join(ROOT, 'test/helpers/twin-daemon.mjs')

/** What is switched off; `+slow` has the daemon answer late. See twin-daemon.mjs. */
export type Twin = `${Mechanism}${'' | '+slow'}`
type Mechanism =
  | 'none'
  | 'no-pins'
  | 'whole-disk-pins'
  | 'no-loop-check'
  | 'no-inspect'
  | 'always-inspect'
  | 'no-access-rule'
  | 'no-prune'
  | 'no-touch'

export interface RunningTree {
  readonly mountpoint: string
  readonly pid: number
  /** Its log so far, one object for each line. */
  log(): Record<string, any>[]
  /** SIGTERM, and wait; the exit code. */
  stop(): Promise<number | null>
}

/**
 * Starts a daemon and waits until it answers. It is stopped when the test
 * ends, and a log line of level error fails the test.
 *
 * @param twin the safety mechanism to switch off
 * @param args more arguments for `diskseqfs mount -f`
 */
export async function startTree(
  t: Test,
  { twin, args = [], expectErrors = false }: { twin?: Twin; args?: string[]; expectErrors?: boolean } = {},
): Promise<RunningTree> {
  const mountpoint = mkdtempSync(join(tmpdir(), 'diskseqfs-test-'))
  const command = twin === undefined ? [CLI, 'mount', '-f', mountpoint, ...args] : [TWIN, twin, mountpoint]
  const child = spawn(process.execPath, command, { stdio: ['ignore', 'pipe', 'pipe'] })
  let text = ''
  child.stderr.on('data', (chunk: Buffer) => (text += chunk.toString()))
  const log = () =>
    text
      .split('\n')
      .filter((line) => line.startsWith('{'))
      .map((line) => JSON.parse(line) as Record<string, any>)
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  const stop = async () => {
    if (child.exitCode === null) child.kill('SIGTERM')
    const code = await Promise.race([ended, sleep(15_000).then(() => undefined)])
    if (code === undefined) {
      child.kill('SIGKILL')
      throw new Error(`the daemon did not stop:\n${text}`)
    }
    return code
  }
  t.teardown(async () => {
    await stop()
    rmdirSync(mountpoint)
    const errors = log().filter((line) => line['level'] === 'error')
    if (errors.length > 0 && !expectErrors) throw new Error(`the daemon logged errors:\n${text}`)
  })
  for (let i = 0; !text.includes('"msg":"mounted"'); i++) {
    if (child.exitCode !== null || i > 1000) throw new Error(`the daemon did not start:\n${text}`)
    await sleep(10)
  }
  return { mountpoint, pid: child.pid as number, log, stop }
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
  detach(): void
  /** Adds partition `number` by ioctl (this needs no partition table). Sectors of 512 bytes. */
  addPartition(number: number, start: number, length: number): void
  deletePartition(number: number): void
}

const sysfsDiskseq = (kname: string) => readFileSync(`/sys/class/block/${kname}/diskseq`, 'utf8').trim()

/** A loop device on a file of its own; detached when the test ends. */
export function loopDisk(t: Test, { size = 1 << 20, args = [] }: { size?: number; args?: string[] } = {}): LoopDisk {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-disk-'))
  const file = join(directory, 'disk.img')
  writeFileSync(file, '')
  truncateSync(file, size)
  const path = execFileSync('losetup', ['--find', '--show', ...args, file], { encoding: 'utf8' }).trim()
  const kname = path.slice('/dev/'.length)
  let attached = true
  const detach = () => {
    if (attached) execFileSync('losetup', ['--detach', path])
    attached = false
  }
  t.teardown(() => {
    detach()
    rmSync(directory, { recursive: true })
  })
  return {
    kname,
    path,
    file,
    diskseq: () => sysfsDiskseq(kname),
    detach,
    addPartition: (number, start, length) =>
      void execFileSync('addpart', [path, String(number), String(start), String(length)]),
    deletePartition: (number) => void execFileSync('delpart', [path, String(number)]),
  }
}

export interface ZramDisk extends TestDisk {
  readonly number: number
  reset(): void
}

/** A new zram device with a size; removed when the test ends. */
export function zramDisk(t: Test, { size = 1 << 20 }: { size?: number } = {}): ZramDisk {
  const number = Number(readFileSync('/sys/class/zram-control/hot_add', 'utf8'))
  const kname = `zram${number}`
  writeFileSync(`/sys/block/${kname}/disksize`, String(size))
  t.teardown(async () => {
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
 * Runs a program to its end. Never synchronously against a tree whose daemon
 * this process would have to serve; a daemon here is always another process.
 */
export async function run(
  file: string,
  args: string[] = [],
  options: { uid?: number; gid?: number; env?: NodeJS.ProcessEnv } = {},
): Promise<Output> {
  try {
    const { stdout, stderr } = await promisify(execFile)(file, args, { encoding: 'utf8', timeout: 60_000, ...options })
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

/** Waits until `condition` holds; fails after `ms`. */
export async function until(condition: () => boolean | Promise<boolean>, ms = 5000): Promise<void> {
  const end = Date.now() + ms
  while (!(await condition())) {
    if (Date.now() > end) throw new Error(`not within ${ms} ms: ${condition}`)
    await sleep(2)
  }
}

export { sleep, type ChildProcess }
