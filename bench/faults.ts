// SPDX-License-Identifier: MIT
/**
 * What a fault costs callers that have nothing to do with it: how long an open
 * of another disk takes during the fault, compared with the same open without
 * it. Both are measured in turns, in one run.
 *
 *   make bench-faults [QUICK=1]
 */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'

import { blk } from '../test/helpers/blk.js'
import { ROOT } from '../test/helpers/root.js'
import {
  CLI,
  cleanUp,
  cleanup,
  daemon,
  end,
  type Helper,
  helper,
  machine,
  median,
  number,
  percentile,
  printTable,
  QUICK,
  resident,
  temporary,
} from './common.js'

const RESULT = join(ROOT, 'build/bench-faults.json')
const MANAGER = join(ROOT, 'test/helpers/manager.py')
const NOBODY = '65534'
const STUCK = 200
const ASKERS = 100
/** Rounds of either kind, in turns. */
const ROUNDS = QUICK ? 5 : 15
const ROUND_SECONDS = '0.5'
/** At most so many opens in one round. */
const ROUND_OPENS = '5000'
/** Long enough for everything begun before to end. */
const SETTLE_MS = 200
/** Longer than a round, so that the callers hang for all of it. */
const OPEN_TIMEOUT_S = '2'

interface Row {
  figure: string
  quiet: number
  fault: number
  unit: string
  ratio: number
  goal: string
}

const rows: Row[] = []

function diskseq(kname: string): string {
  return readFileSync(`/sys/class/block/${kname}/diskseq`, 'utf8').trim()
}

/** Makes a loop device; returns its diskseq. */
function disk(): string {
  const file = join(temporary('disk'), 'disk.img')
  writeFileSync(file, '')
  truncateSync(file, 1 << 20)
  const path = execFileSync('losetup', ['--find', '--show', file], { encoding: 'utf8' }).trim()
  cleanup(() => execFileSync('losetup', ['--detach', path]))
  return diskseq(path.slice('/dev/'.length))
}

/** Makes loop devices on one file; returns their diskseqs. */
async function disks(count: number, file: string): Promise<string[]> {
  await helper('loops', String(count), file)
  const mine = readdirSync('/sys/class/block').filter((kname) => {
    try {
      return readFileSync(`/sys/class/block/${kname}/loop/backing_file`, 'utf8').trim() === file
    } catch {
      return false // no loop device, or not bound
    }
  })
  return mine.map(diskseq)
}

interface Opens {
  readonly p50: number
  readonly p99: number
}

/** @param cold each open is the disk's first one */
async function opens(path: string, cold: boolean): Promise<Opens> {
  const { p50_ns, p99_ns, errors } = await blk(
    'openlat',
    '--path',
    path,
    '--count',
    ROUND_OPENS,
    '--seconds',
    ROUND_SECONDS,
    '--warmup',
    '20',
    ...(cold ? ['--close-immediately'] : []),
  )
  if (Object.keys(errors).length > 0) throw new Error(`an open of a disk that is well: ${JSON.stringify(errors)}`)
  return { p50: p50_ns / 1000, p99: p99_ns / 1000 }
}

/** Measures opens without the fault and with it, in turns. */
async function compare(
  what: string,
  goal: string,
  path: string,
  { begin, stop }: { begin: () => Promise<unknown>; stop: () => Promise<unknown> },
  cold = false,
): Promise<void> {
  const quiet: Opens[] = []
  const fault: Opens[] = []
  for (let i = 0; i < ROUNDS; i++) {
    quiet.push(await opens(path, cold))
    await begin()
    await sleep(SETTLE_MS)
    fault.push(await opens(path, cold))
    await stop()
    await sleep(SETTLE_MS)
  }
  for (const share of ['p50', 'p99'] as const) {
    const [before, during] = [quiet, fault].map((rounds) => median(rounds.map((round) => round[share]))) as [number, number]
    const row = {
      figure: `${what}, ${share}`,
      quiet: before,
      fault: during,
      unit: 'us',
      ratio: during / before,
      goal: share === 'p99' ? goal : '',
    }
    rows.push(row)
  }
}

const toggle = (asker: Helper) => ({ begin: () => asker.ask(), stop: () => asker.ask() })

async function stuck(): Promise<void> {
  const directory = temporary('hung')
  const server = await helper('hungfs', directory)
  const other = disk()
  const names = await disks(STUCK, join(directory, 'disk'))
  const mountpoint = temporary('mount')
  const { child } = await daemon(mountpoint, { args: ['--open-timeout', OPEN_TIMEOUT_S] })
  cleanup(() => end(child))
  cleanup(() => server.child.kill('SIGUSR2')) // before anything that waits for the disks
  const callers = await helper('abuse', '--dir', mountpoint, '--kinds', 'open', '--threads', String(STUCK), '--names', names.join())
  const fault = {
    begin: async () => {
      server.child.kill('SIGUSR1')
      await sleep(50)
      await callers.ask()
    },
    stop: async () => {
      server.child.kill('SIGUSR2')
      await callers.ask()
    },
  }
  for (const cold of [false, true]) {
    await compare(`open${cold ? ' and close' : ''}, ${STUCK} other disks hang`, '<= 1.5', join(mountpoint, other), fault, cold)
  }
}

const ALL = 'names,numbers,stat,open,list'

async function abuse(): Promise<void> {
  const path = disk()
  const memory = await abused(path, undefined, [
    ['names', 'random names'],
    ['numbers', 'random numbers'],
    ['stat', 'stat of disks'],
    ['open', 'open of disks'],
    ['list', 'listing'],
    [ALL, 'all of that'],
    [`${ALL},mkdir`, 'and mkdir', ''],
  ])
  rows.push(memory)
  await abused(path, 'as-they-come', [[ALL, 'all of that, answered as they come', '']])
}

/** @returns the daemon's memory before and after */
async function abused(
  name: string,
  twin: string | undefined,
  kinds: readonly (readonly [kinds: string, what: string, goal?: string])[],
): Promise<Row> {
  const mountpoint = temporary('mount')
  const { child } = await daemon(mountpoint, { ...(twin !== undefined && { twin }) })
  cleanup(() => end(child))
  const memory = () => resident(child.pid as number)
  const before = memory()
  for (const [kind, what, goal = '<= 5'] of kinds) {
    const askers = await helper('abuse', '--dir', mountpoint, '--uid', NOBODY, '--threads', String(ASKERS), '--kinds', kind)
    await compare(`open by root, ${ASKERS} threads of another user: ${what}`, goal, join(mountpoint, name), toggle(askers))
    await askers.end()
  }
  const after = memory()
  return { figure: 'resident memory, after all of that', quiet: before, fault: after, unit: 'MiB', ratio: after / before, goal: '' }
}

/** A daemon under a service manager, which restarts it when it ends and stores its descriptors. */
async function managed(mountpoint: string): Promise<{ end(how: 'term' | 'kill'): Promise<void> }> {
  const child = spawn('python3', [MANAGER, process.execPath, CLI, 'mount', '-f', '--log-level', 'error', '--fd-store', mountpoint], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]()
  const ready = async () => {
    for (let line = await lines.next(); line.value !== 'ready'; line = await lines.next()) {
      if (line.done) throw new Error('the daemon does not start')
    }
  }
  cleanup(async () => {
    child.stdin.end('stop\n')
    await once(child, 'exit')
    execFileSync('umount', ['--lazy', mountpoint])
  })
  await ready()
  return {
    end: async (how) => {
      child.stdin.write(`${how}\n`)
      await ready()
    },
  }
}

/** How long an open waits while one daemon follows another, compared with the start of Node.js, both under load. */
async function restart(): Promise<void> {
  const mountpoint = temporary('mount')
  const [path, others] = [join(mountpoint, disk()), disk()]
  const { end } = await managed(mountpoint)
  const load = await helper('abuse', '--dir', mountpoint, '--kinds', 'open', '--threads', '2', '--names', others)
  await load.ask()
  for (const how of ['term', 'kill'] as const) {
    const bare: number[] = []
    const waits: number[] = []
    for (let i = 0; i < ROUNDS; i++) {
      const began = performance.now()
      await once(spawn(process.execPath, ['-e', '0']), 'exit')
      bare.push(performance.now() - began)
      const opener = blk('openlat', '--path', path, '--count', '1000000', '--seconds', '1')
      await sleep(SETTLE_MS)
      await end(how)
      const { max_ns, errors } = await opener
      if (Object.keys(errors).length > 0) throw new Error(`an open failed: ${JSON.stringify(errors)}`)
      waits.push(max_ns / 1e6)
    }
    const what = how === 'term' ? 'a restart' : 'a SIGKILL'
    const goal = how === 'term' ? '<= 3' : ''
    for (const [figure, share] of [
      [`longest wait in ${what} / bare node -e 0, median`, 0.5],
      ['the longest of them', 1],
    ] as const) {
      const [quiet, fault] = [median(bare), percentile(waits, share)]
      rows.push({ figure, quiet, fault, unit: 'ms', ratio: fault / quiet, goal })
    }
  }
}

function print(): void {
  printTable([
    ['figure', 'quiet', 'fault', 'unit', 'ratio', 'goal'],
    ...rows.map((row) => [row.figure, number(row.quiet), number(row.fault), row.unit, number(row.ratio), row.goal]),
  ])
}

const wanted = process.argv.slice(2)
try {
  console.log(`${machine}\n`)
  for (const [name, measure] of Object.entries({ restart, stuck, abuse })) {
    if (wanted.length === 0 || wanted.includes(name)) await measure()
    await cleanUp()
  }
  print()
  mkdirSync(join(ROOT, 'build'), { recursive: true })
  writeFileSync(RESULT, `${JSON.stringify({ machine, rows }, null, 2)}\n`)
} finally {
  await cleanUp()
}
