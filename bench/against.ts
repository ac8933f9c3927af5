// SPDX-License-Identifier: MIT
/**
 * Compares this code with an earlier commit, in turns, in one run on this machine. Only the ratios
 * count.
 *
 *   make bench-against OLD=COMMIT [QUICK=1]
 */
import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { blk } from '../test/helpers/blk.js'
import { ROOT } from '../test/helpers/root.js'
import { cleanUp, cleanup, CLI, daemon, end, loops, machine, median, number, printTable, QUICK, temporary } from './common.js'

const RESULT = join(ROOT, 'build/bench-against.json')
const COMMIT = process.env['OLD'] ?? ''
const TURNS = QUICK ? 3 : 9
const CLIENTS = 8
const COLD = 16

const SIDES = ['old', 'new'] as const
type Side = (typeof SIDES)[number]

interface Row {
  readonly figure: string
  readonly unit: string
  readonly old: number
  readonly new: number
  /** The median of new / old in each turn; of old / new where more is better. */
  readonly ratio: number
}
const rows: Row[] = []

/** @param measure both, in one turn */
async function compare(figure: string, unit: string, measure: (turn: number) => Promise<Each<number>>, high = false): Promise<void> {
  const found: Each<number>[] = []
  for (let turn = 0; turn < TURNS; turn++) found.push(await measure(turn))
  rows.push({
    figure,
    unit,
    old: median(found.map((each) => each.old)),
    new: median(found.map((each) => each.new)),
    ratio: median(found.map((each) => (high ? each.old / each.new : each.new / each.old))),
  })
}

/** Builds the commit beside this one; returns the path of its program. */
function build(): string {
  const directory = temporary('old')
  execFileSync('git', ['clone', '--quiet', '--shared', '--no-checkout', ROOT, directory])
  execFileSync('git', ['-C', directory, 'checkout', '--quiet', COMMIT])
  execFileSync('make', ['-C', directory, 'build'], { stdio: ['ignore', 'ignore', 'inherit'] })
  return join(directory, 'dist/cli.js')
}

type Each<T> = Readonly<Record<Side, T>>

/** The two sides take turns at being first. */
async function inTurns<T>(turn: number, measure: (side: Side) => Promise<T>): Promise<Record<Side, T>> {
  const found: Partial<Record<Side, T>> = {}
  for (const side of turn % 2 === 0 ? SIDES : [...SIDES].reverse()) found[side] = await measure(side)
  return found as Record<Side, T>
}

/** Serves the trees of both. The daemons are started anew for each turn, so that the scheduler places them anew, too. */
async function withTrees<T>(turn: number, mountpoints: Each<string>, use: () => Promise<T>): Promise<T> {
  const daemons = await inTurns(turn, async (side) => (await daemon(mountpoints[side], { program: programs[side] })).child)
  try {
    return await use()
  } finally {
    for (const side of SIDES) await end(daemons[side])
  }
}

const programs = { old: '', new: CLI }

async function main(): Promise<void> {
  programs.old = build()
  const mountpoints = { old: temporary('tree'), new: temporary('tree') }
  const diskseq = (device: string) => readFileSync(`/sys/class/block/${device.slice(5)}/diskseq`, 'utf8').trim()
  /** A device for each: a device that one daemon holds open, the other one opens faster. */
  const paths = async (count: number) => {
    const { devices } = await loops(2 * count)
    const names = (side: Side) => devices.filter((_, i) => SIDES[i % 2] === side).map((device) => join(mountpoints[side], diskseq(device)))
    return SIDES.map((side) => `${side}=${names(side).join()}`)
  }
  const measure = (figure: string, unit: string, args: readonly string[], of: (found: any) => number, high = false) =>
    compare(
      figure,
      unit,
      (turn) =>
        withTrees(turn, mountpoints, async () => {
          const found = await blk(args[0]!, ...args.slice(1))
          for (const side of SIDES) if (Object.keys(found[side].errors).length > 0) throw new Error(JSON.stringify(found))
          return { old: of(found['old']), new: of(found['new']) }
        }),
      high,
    )
  const p50 = (found: { p50_ns: number }) => found.p50_ns / 1000
  await measure('warm open', 'us', ['cold-open', '--rounds', '20000', '--', ...(await paths(1))], p50)
  await measure('cold open', 'us', ['cold-open', '--rounds', '10', '--pause-ms', '150', '--', ...(await paths(COLD))], p50)
  const clients = ['throughput', '--clients', String(CLIENTS), '--seconds', '3', '--', ...(await paths(CLIENTS))]
  await measure(`opens by ${CLIENTS} clients`, '1/s', clients, ({ opens_per_s }: { opens_per_s: number }) => opens_per_s, true)

  // How soon a device is free after its close.
  const count = ['--count', QUICK ? '20' : '60']
  const zram = readFileSync('/sys/class/zram-control/hot_add', 'utf8').trim()
  cleanup(() => writeFileSync('/sys/class/zram-control/hot_remove', zram))
  const [loop = ''] = (await loops(1, 8 << 20)).devices
  for (const [figure, args] of [
    ['zram device free after a close', ['exclusive-zram', '--nr', zram]],
    ['partition free after a close', ['exclusive-part', '--loop', loop.slice('/dev/loop'.length)]],
  ] as const) {
    const measure = async (side: Side): Promise<number> => {
      const { failed, p50_us } = await blk(args[0], ...args.slice(1), '--dir', mountpoints[side], ...count)
      if (failed > 0) throw new Error(`${figure}: of the ${side} one it is not in ${failed} cases`)
      return p50_us
    }
    await compare(figure, 'us', (turn) => withTrees(turn, mountpoints, () => inTurns(turn, measure)))
  }

  console.log(`\n${machine}; ${TURNS} turns; ${COMMIT} against this\n`)
  printTable([
    ['', 'old', 'new', 'unit', 'ratio (less is better)'],
    ...rows.map((row) => [row.figure, number(row.old), number(row.new), row.unit, row.ratio.toFixed(3)]),
  ])
  mkdirSync(join(ROOT, 'build'), { recursive: true })
  writeFileSync(RESULT, JSON.stringify({ machine, commit: COMMIT, rows }, null, 2))
}

try {
  await main()
} finally {
  await cleanUp()
}
