// SPDX-License-Identifier: MIT
/** `diskseqfs status`: what the daemon has done, and holds. */
import { closeSync, openSync, statSync } from 'node:fs'
import { join } from 'node:path'

import t from 'tap'

import { Metrics, quantile } from '../../src/fuse/metrics.js'
import { Opcode } from '../../src/fuse/wire.js'
import { stoppedCaller } from '../helpers/stopped.js'
import { cli, errorOf, loopDisk, run, startBlk, startTree } from '../helpers/tree.js'

interface Status {
  readonly pid: number
  readonly tookOver: boolean
  readonly now: Readonly<Record<string, number>>
  readonly requests: Readonly<Record<string, number>>
  readonly answers: Readonly<Record<string, number>>
  readonly refusals: Readonly<Record<string, number>>
  readonly times: {
    readonly count: number
    readonly sumUSec: number
    readonly p50USec: number
    readonly p99USec: number
    readonly buckets: number[]
  }
  readonly uevents: { readonly received: number; readonly losses: number }
  readonly pins: readonly { readonly name: string; readonly why: string }[]
}

const statusOf = async (tree: string): Promise<Status> => {
  const { code, stdout, stderr } = await cli('status', '--tree', tree, '--json')
  if (code !== 0) throw new Error(stderr)
  return JSON.parse(stdout) as Status
}

t.test('what it counts is what was done', async (t) => {
  const tree = await startTree(t)
  const before = await statusOf(tree.mountpoint)
  t.match(before, { pid: tree.pid, tookOver: false, refusals: {} })
  const disk = loopDisk(t)
  const path = join(tree.mountpoint, disk.diskseq())
  for (let i = 0; i < 20; i++) closeSync(openSync(path, 'r'))
  for (let i = 0; i < 5; i++)
    t.equal(
      errorOf(() => statSync(join(tree.mountpoint, `${4_000_000_000 + i}`))),
      'ENOENT',
    )
  const after = await statusOf(tree.mountpoint)
  t.ok((after.requests['LOOKUP'] ?? 0) - (before.requests['LOOKUP'] ?? 0) >= 6, 'names that were looked up')
  t.ok((after.answers['ENOENT'] ?? 0) - (before.answers['ENOENT'] ?? 0) >= 5)
  t.ok(after.uevents.received > before.uevents.received, 'events of the new disk')
  t.equal(after.uevents.losses, 0)
  t.equal(
    after.times.buckets.reduce((sum, n) => sum + n, 0),
    after.times.count,
  )
  t.ok(after.times.count > before.times.count && after.times.p50USec <= after.times.p99USec && after.times.sumUSec > 0)
})

t.test('opens that were refused, by the reason', async (t) => {
  const tree = await startTree(t)
  const disk = loopDisk(t)
  const path = join(tree.mountpoint, disk.diskseq())
  const held = await startBlk(t, 'hold', '--flags', 'path', '--path', path)
  disk.detach()
  await run('head', ['-c1', path])
  t.match((await statusOf(tree.mountpoint)).refusals, { 'no such disk (any more)': Number })
  await held.end()
})

t.test('pins, and why each stands', async (t) => {
  let seen: Status | undefined
  await stoppedCaller(t, 'none', { meanwhile: async (tree) => (seen = await statusOf(tree.mountpoint)) })
  t.match(seen, { now: { pins: 1 }, pins: [{ callers: 1, why: 'caller' }] })
})

t.test('for people, and for Prometheus', async (t) => {
  const tree = await startTree(t)
  const disk = loopDisk(t)
  closeSync(openSync(join(tree.mountpoint, disk.diskseq()), 'r'))
  const text = (await cli('status', '--tree', tree.mountpoint)).stdout
  for (const line of [
    /^.*: version \d.*, process \d+, for \d+ s$/m,
    /^now: devices \d+, /m,
    /^requests: .*LOOKUP \d+/m,
    /^refused opens: none$/m,
  ]) {
    t.match(text, line)
  }
  const metrics = (await cli('status', '--tree', tree.mountpoint, '--prometheus')).stdout
  const lines = metrics.trimEnd().split('\n')
  for (const line of lines) t.match(line, /^(# (HELP|TYPE) diskseqfs_\w+ .+|diskseqfs_\w+\{mountpoint="[^"]+"(,\w+="[^"]*")*\} [\d.e+-]+)$/)
  const value = (name: string) =>
    Number(
      lines
        .find((line) => line.startsWith(`diskseqfs_${name}`))
        ?.split(' ')
        .at(-1),
    )
  t.ok(value('requests_total{') > 0 && value('devices{') > 0)
  const buckets = lines.filter((line) => line.startsWith('diskseqfs_answer_seconds_bucket')).map((line) => Number(line.split(' ').at(-1)))
  t.strictSame(
    buckets,
    buckets.toSorted((a, b) => a - b),
    'each has those before it',
  )
  t.equal(buckets.at(-1), value('answer_seconds_count'))
  const names = lines.filter((line) => line.startsWith('# TYPE')).map((line) => line.split(' ')[2])
  t.equal(new Set(names).size, names.length, 'no name twice')
  t.match(await cli('status', '--json', '--prometheus'), { code: 2, stderr: /cannot be used with/ })
})

t.test('times fall into buckets by powers of two', async (t) => {
  const metrics = new Metrics()
  for (const us of [0, 0.5, 1, 1.5, 2, 3, 4, 5, 1000, 3e12]) metrics.answer(Opcode.LOOKUP, 0, us / 1000)
  metrics.answer(Opcode.STATFS, 0, 1)
  const { times } = metrics
  t.strictSame([times.count, times.buckets.slice(0, 4), times.buckets[10], times.buckets[31]], [10, [3, 2, 2, 1], 1, 1])
  t.equal(quantile(times, 0.5), 2)
  t.equal(quantile(times, 0.99), 2 ** 31)
  t.equal(quantile(new Metrics().times, 0.5), undefined)
  t.strictSame(metrics.answers, { ok: 11 })
})
