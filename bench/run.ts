/**
 * What the tree costs, against what it cannot be cheaper than: each figure is
 * a ratio of two things measured in turns, in one run, on this machine.
 *
 *   make bench [QUICK=1]
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { cpus, release, tmpdir } from 'node:os'
import { join } from 'node:path'

import { blk, blkPath } from '../test/helpers/blk.js'
import { ROOT } from '../test/helpers/root.js'

const QUICK = process.env['QUICK'] === '1'
const CLI = join(ROOT, 'dist/cli.js')
const RESULT = join(ROOT, 'build/bench.json')
const DISKS = 1000

interface Row {
  figure: string
  p50: number
  p99?: number
  unit: string
  against: string
  baseline: number
  ratio: number
  goal?: string
}

const rows: Row[] = []
const cleanups: (() => void | Promise<void>)[] = []

/** Nearest rank. */
function percentile(samples: readonly number[], share: number): number {
  const sorted = [...samples].sort((a, b) => a - b)
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] as number
}

const median = (samples: readonly number[]) => percentile(samples, 0.5)

function temporary(name: string): string {
  const directory = mkdtempSync(join(tmpdir(), `diskseqfs-bench-${name}-`))
  cleanups.push(() => rmSync(directory, { recursive: true }))
  return directory
}

/** Starts a daemon; resolves when it says that the tree answers, with the ms that took. */
async function daemon(mountpoint: string): Promise<{ child: ChildProcess; ms: number }> {
  const began = performance.now()
  const child = spawn(process.execPath, [CLI, 'mount', '-f', '--log-format', 'json', mountpoint], {
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

async function end(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  child.removeAllListeners('exit')
  const ended = new Promise((resolve) => child.on('exit', resolve))
  child.kill('SIGTERM')
  await ended
}

/** Resident memory, MiB. */
function resident(pid: number): number {
  return Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024
}

async function latency(mountpoint: string, pid: number): Promise<void> {
  const file = join(temporary('disk'), 'disk.img')
  writeFileSync(file, '')
  truncateSync(file, 1 << 20)
  const device = execFileSync('losetup', ['--find', '--show', file], { encoding: 'utf8' }).trim()
  try {
    const diskseq = readFileSync(`/sys/class/block/${device.slice(5)}/diskseq`, 'utf8').trim()
    // Two processes that talk cost a few us on one processor and ten times that
    // across two: so say where they run, and compare like with like.
    for (const pin of ['split', 'same'] as const) {
      execFileSync('taskset', ['-apc', pin === 'split' ? '1' : '0', String(pid)], { stdio: 'ignore' })
      const result = await blk(
        'latency',
        '--tree', join(mountpoint, diskseq),
        '--dev', device,
        '--seconds', QUICK ? '3' : '15',
        '--pin', pin,
      )
      const where = pin === 'split' ? 'two processors' : 'one processor'
      const us = (name: string, share: string) => result[name][`${share}_ns`] / 1000
      const against = (figure: string, name: string, other: string, label: string, goal?: string) =>
        rows.push({
          figure: `${figure}, ${where}`,
          p50: us(name, 'p50'),
          p99: us(name, 'p99'),
          unit: 'us',
          against: label,
          baseline: us(other, 'p50'),
          ratio: us(name, 'p50') / us(other, 'p50'),
          ...(goal !== undefined && { goal }),
        })
      against('warm open', 'open_tree', 'rtt', 'pipe ping-pong', pin === 'split' ? '<= 1.5' : undefined)
      against('warm open', 'open_tree', 'open_dev', 'open of /dev/loopN')
      against('stat', 'stat_tree', 'rtt', 'pipe ping-pong')
    }
    execFileSync('taskset', ['-apc', `0-${cpus().length - 1}`, String(pid)], { stdio: 'ignore' })
  } finally {
    execFileSync('losetup', ['--detach', device])
  }
}

async function listing(mountpoint: string): Promise<void> {
  const file = join(temporary('many'), 'disk.img')
  writeFileSync(file, '')
  truncateSync(file, 1 << 20)
  const loops = spawn(blkPath(), ['loops', String(DISKS), file], { stdio: ['pipe', 'pipe', 'inherit'] })
  try {
    await new Promise<void>((resolve, reject) => {
      loops.stdout.once('data', () => resolve())
      loops.once('exit', () => reject(new Error('the loop devices could not be made')))
    })
    const names = readdirSync(mountpoint)
    if (names.length < DISKS) throw new Error(`only ${names.length} of ${DISKS} disks are listed`)
    const plain = temporary('names')
    for (const name of names) writeFileSync(join(plain, name), '')
    const tree: number[] = []
    const other: number[] = []
    for (let i = 0; i < (QUICK ? 50 : 300); i++) {
      for (const [directory, samples] of [[mountpoint, tree], [plain, other]] as const) {
        const began = performance.now()
        readdirSync(directory)
        samples.push(performance.now() - began)
      }
    }
    rows.push({
      figure: `list ${names.length} names`,
      p50: median(tree),
      p99: percentile(tree, 0.99),
      unit: 'ms',
      against: 'the same names as files',
      baseline: median(other),
      ratio: median(tree) / median(other),
    })
  } finally {
    const ended = new Promise((resolve) => loops.on('exit', resolve))
    loops.stdin.end()
    await ended
  }
}

async function startup(): Promise<void> {
  const bare: number[] = []
  const ready: number[] = []
  const memory: number[] = []
  const bareMemory: number[] = []
  for (let i = 0; i < (QUICK ? 5 : 15); i++) {
    const began = performance.now()
    execFileSync(process.execPath, ['-e', '0'])
    bare.push(performance.now() - began)
    const { child, ms } = await daemon(temporary('mount'))
    ready.push(ms)
    memory.push(resident(child.pid as number))
    await end(child)
    const idle = spawn(process.execPath, ['-e', 'console.log(1); setInterval(() => {}, 1e6)'], {
      stdio: ['ignore', 'pipe', 'ignore'],
    })
    await new Promise((resolve) => idle.stdout.once('data', resolve))
    bareMemory.push(resident(idle.pid as number))
    await end(idle)
  }
  rows.push({
    figure: 'ready after start',
    p50: median(ready),
    p99: percentile(ready, 0.99),
    unit: 'ms',
    against: 'node -e 0',
    baseline: median(bare),
    ratio: median(ready) / median(bare),
  })
  rows.push({
    figure: 'resident memory',
    p50: median(memory),
    unit: 'MiB',
    against: 'bare node',
    baseline: median(bareMemory),
    ratio: median(memory) / median(bareMemory),
  })
}

function print(): void {
  const number = (value: number | undefined) => (value === undefined ? '' : value.toFixed(value < 10 ? 2 : 1))
  const cells = [
    ['figure', 'p50', 'p99', 'unit', 'against', 'its p50', 'ratio', 'goal'],
    ...rows.map((row) => [
      row.figure,
      number(row.p50),
      number(row.p99),
      row.unit,
      row.against,
      number(row.baseline),
      number(row.ratio),
      row.goal ?? '',
    ]),
  ]
  const widths = cells[0]!.map((_, i) => Math.max(...cells.map((row) => row[i]!.length)))
  for (const row of cells) {
    console.log(row.map((cell, i) => cell.padEnd(widths[i]!)).join('  ').trimEnd())
  }
}

try {
  const machine = `${cpus().length} x ${cpus()[0]?.model.trim()}, Linux ${release()}, Node ${process.version}`
  console.log(`${machine}\n`)
  const mountpoint = temporary('mount')
  const { child } = await daemon(mountpoint)
  cleanups.unshift(() => end(child))
  await latency(mountpoint, child.pid as number)
  await listing(mountpoint)
  await startup()
  print()
  mkdirSync(join(ROOT, 'build'), { recursive: true })
  writeFileSync(RESULT, `${JSON.stringify({ machine, rows }, null, 2)}\n`)
} finally {
  for (const cleanup of cleanups) await cleanup()
}
