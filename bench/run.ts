/**
 * What the tree costs, against what it cannot be cheaper than: each figure is
 * a ratio of two things measured in turns, in one run, on this machine.
 *
 *   make bench [QUICK=1]
 */
import { execFileSync, spawn } from 'node:child_process'
import { mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { join } from 'node:path'

import { blk, blkPath } from '../test/helpers/blk.js'
import { ROOT } from '../test/helpers/root.js'
import { cleanUp, cleanup, daemon, end, machine, median, number, percentile, printTable, QUICK, resident, temporary } from './common.js'

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
  printTable([
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
  ])
}

try {
  console.log(`${machine}\n`)
  const mountpoint = temporary('mount')
  const { child } = await daemon(mountpoint)
  cleanup(() => end(child))
  await latency(mountpoint, child.pid as number)
  await listing(mountpoint)
  await startup()
  print()
  mkdirSync(join(ROOT, 'build'), { recursive: true })
  writeFileSync(RESULT, `${JSON.stringify({ machine, rows }, null, 2)}\n`)
} finally {
  await cleanUp()
}
