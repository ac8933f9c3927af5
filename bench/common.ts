// SPDX-License-Identifier: MIT
/** What the benchmarks share. */
import { type ChildProcess, spawn } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { cpus, release, tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'

import { blkPath } from '../test/helpers/blk.js'
import { ROOT } from '../test/helpers/root.js'

export const QUICK = process.env['QUICK'] === '1'
export const CLI = join(ROOT, 'dist/cli.js')
const TWIN = join(ROOT, 'test/helpers/twin-daemon.mjs')

export const machine = `${cpus().length} x ${cpus()[0]?.model.trim()}, Linux ${release()}, Node ${process.version}`

const cleanups: (() => unknown)[] = []

/** Registers `undo` to run at the end, last registered first. */
export function cleanup(undo: () => unknown): void {
  cleanups.push(undo)
}

/** Runs all of them, even if one fails. */
export async function cleanUp(): Promise<void> {
  for (let undo = cleanups.pop(); undo !== undefined; undo = cleanups.pop()) {
    try {
      await undo()
    } catch (error) {
      console.error(error)
      process.exitCode = 1
    }
  }
}

/** Nearest rank. */
export function percentile(samples: readonly number[], share: number): number {
  const sorted = [...samples].sort((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] as number
}

export const median = (samples: readonly number[]) => percentile(samples, 0.5)

export function temporary(name: string): string {
  const directory = mkdtempSync(join(tmpdir(), `diskseqfs-bench-${name}-`))
  cleanup(() => rmSync(directory, { recursive: true }))
  return directory
}

/**
 * Starts a daemon; resolves when it says that the tree answers, with the ms that took.
 *
 * @param twin what is switched off, see twin-daemon.mjs
 * @param program another program than this project's
 */
export async function daemon(
  mountpoint: string,
  { args = [], twin, program = CLI }: { args?: string[]; twin?: string; program?: string } = {},
): Promise<{ child: ChildProcess; ms: number }> {
  const began = performance.now()
  const command = twin === undefined ? [program, 'mount', '-f', '--log-format', 'json', mountpoint] : [TWIN, twin, mountpoint]
  const child = spawn(process.execPath, [...command, ...args], {
    stdio: ['ignore', 'ignore', 'pipe'],
  })
  const ms = await new Promise<number>((resolve, reject) => {
    let text = ''
    child.stderr?.on('data', (chunk: Buffer) => {
      text += chunk.toString()
      if (text.includes('"msg":"mounted"')) resolve(performance.now() - began)
    })
    child.on('exit', () => reject(new Error(`the daemon ended:\n${text}`)))
  })
  return { child, ms }
}

/** A subcommand of the C helper that runs until its stdin closes. */
export interface Helper {
  readonly child: ChildProcess
  /** Sends a line and returns the next one that it prints. */
  ask(): Promise<string>
  /** Closes its stdin and waits. */
  end(): Promise<void>
}

/** Starts one and waits for its first line, which says that it is ready. It ends with the benchmark. */
export async function helper(...args: string[]): Promise<Helper> {
  const child = spawn(blkPath(), args, { stdio: ['pipe', 'pipe', 'inherit'] })
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]()
  const ended = new Promise<void>((resolve) => child.on('close', () => resolve()))
  const line = async () => {
    const { value, done } = await lines.next()
    if (done) throw new Error(`blk ${args.join(' ')} ended`)
    return value as string
  }
  const end = () => {
    child.stdin.end()
    return ended
  }
  cleanup(end)
  await line()
  return {
    child,
    ask: () => {
      child.stdin.write('\n')
      return line()
    },
    end,
  }
}

/**
 * Makes loop devices that share one file. They go at the end of the benchmark, or with `detach`. They are
 * writable, as most disks are: a read-only one may become another disk while it is open (LOOP_CHANGE_FD), so
 * that the kernel has to ask each time.
 */
export async function loops(count: number, size = 1 << 20): Promise<{ devices: string[]; detach: () => Promise<void> }> {
  const file = join(temporary('disk'), 'disk.img')
  writeFileSync(file, '')
  truncateSync(file, size)
  const { end } = await helper('loops', String(count), file, 'writable')
  const devices = readdirSync('/sys/block').filter((name) => backing(name) === file)
  return { devices: devices.map((name) => `/dev/${name}`), detach: end }
}

function backing(name: string): string | undefined {
  try {
    return readFileSync(`/sys/block/${name}/loop/backing_file`, 'utf8').trim()
  } catch {
    return undefined // no loop device, or one without a file, or gone
  }
}

export async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  child.removeAllListeners('exit')
  const ended = new Promise((resolve) => child.on('exit', resolve))
  child.kill('SIGTERM')
  await ended
}

/** Resident memory, MiB. */
export function resident(pid: number): number {
  return Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024
}

export const number = (value: number | undefined) => (value === undefined ? '' : value.toFixed(value < 10 ? 2 : 1))

export function printTable(cells: readonly (readonly string[])[]): void {
  const widths = cells[0]!.map((_, i) => Math.max(...cells.map((row) => row[i]!.length)))
  for (const row of cells) {
    console.log(
      row
        .map((cell, i) => cell.padEnd(widths[i]!))
        .join('  ')
        .trimEnd(),
    )
  }
}
