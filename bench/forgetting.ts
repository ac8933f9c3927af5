// SPDX-License-Identifier: MIT
/**
 * What it costs to make the kernel forget one of many disk names that it has cached: by FUSE_NOTIFY_PRUNE
 * (Linux 6.18), compared with dropping all names, the only way on older kernels. Both are measured in
 * turns, in one run.
 *
 *   make bench-forgetting [QUICK=1] [DISKS=10000]
 */
import { spawn } from 'node:child_process'
import { mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'

import { ROOT } from '../test/helpers/root.js'
import { cleanUp, cleanup, loops, machine, median, number, percentile, printTable, QUICK, temporary } from './common.js'

const RESULT = join(ROOT, 'build/bench-forgetting.json')
const PEER = join(ROOT, 'bench/peers/forgetting.mjs')
const DISKS = Number(process.env['DISKS'] ?? (QUICK ? 1000 : 10_000))
const ROUNDS = QUICK ? 5 : 20
const KINDS = { one: 'FUSE_NOTIFY_PRUNE', all: 'dropping all names' } as const
type Kind = keyof typeof KINDS

interface Cost {
  readonly names: number
  readonly forgets: number
  readonly ms: number
  readonly cpuMs: number
}

/** Serves the tree; returns a function that makes the kernel forget names. */
async function serve(mountpoint: string): Promise<(kind: Kind) => Promise<Cost>> {
  const child = spawn(process.execPath, [PEER, mountpoint], { stdio: ['pipe', 'pipe', 'inherit'] })
  const ended = new Promise((resolve) => child.on('close', resolve))
  cleanup(() => {
    child.stdin.end()
    return ended
  })
  const lines = createInterface(child.stdout)[Symbol.asyncIterator]()
  const next = async () => {
    const { value, done } = await lines.next()
    if (done) throw new Error('the daemon ended')
    return value as string
  }
  await next()
  return async (kind) => {
    child.stdin.write(`${kind}\n`)
    return JSON.parse(await next()) as Cost
  }
}

async function main(): Promise<void> {
  const mountpoint = temporary('mount')
  const forgetting = await serve(mountpoint)
  const { devices } = await loops(DISKS)
  const paths = devices.map((device) => {
    const diskseq = readFileSync(`/sys/class/block/${device.slice('/dev/'.length)}/diskseq`, 'utf8').trim()
    return join(mountpoint, diskseq)
  })
  const found: Record<Kind, Cost[]> = { one: [], all: [] }
  for (let i = 0; i < ROUNDS; i++) {
    for (const kind of ['one', 'all'] as const) {
      // Makes the kernel cache all names again.
      for (const path of paths) statSync(path)
      found[kind].push(await forgetting(kind))
    }
  }
  const of = (kind: Kind, field: keyof Cost) => found[kind].map((cost) => cost[field])
  console.log(`${machine}; ${median(of('one', 'names'))} names\n`)
  printTable([
    ['to forget one name', 'FORGETs', 'us, p50', 'p99', 'us of processor time'],
    ...(['one', 'all'] as const).map((kind) => [
      KINDS[kind],
      String(median(of(kind, 'forgets'))),
      ...[median(of(kind, 'ms')), percentile(of(kind, 'ms'), 0.99), median(of(kind, 'cpuMs'))].map((ms) => number(ms * 1000)),
    ]),
  ])
  mkdirSync(join(ROOT, 'build'), { recursive: true })
  writeFileSync(RESULT, `${JSON.stringify({ machine, found }, null, 2)}\n`)
}

try {
  await main()
} finally {
  await cleanUp()
}
