// SPDX-License-Identifier: MIT
/**
 * What the tree costs, compared with the same tree served by other programs
 * (see peers/), with clients that open and verify a device themselves, and with
 * the least that it could cost. Each figure is measured in turns, in one run,
 * on this machine; only the ratios count.
 *
 *   make bench [QUICK=1] [DISKS=10000]
 *
 * QUICK=1: fewer rounds, and nothing in a virtual machine.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { cpus } from 'node:os'
import { join } from 'node:path'

import { blk } from '../test/helpers/blk.js'
import { ROOT } from '../test/helpers/root.js'
import { AT_ONCE, attachMany, statusCost } from './broker.js'
import { CLI, cleanUp, daemon, end, loops, machine, median, number, percentile, printTable, QUICK, resident, temporary } from './common.js'
import { type Kind, KINDS, startPeer } from './peers.js'
import { besideUdev } from './vm.js'

const RESULT = join(ROOT, 'build/bench.json')
const DISKS = Number(process.env['DISKS'] ?? 10_000)
const CLIENTS = 8
const COLD = 16

const OURS = 'diskseqfs'

/** One figure of one candidate. */
interface Row {
  readonly figure: string
  readonly who: string
  readonly p50: number
  readonly p99?: number
  readonly unit: string
}

/** What our figure may be at most, or must be at least, as a multiple of another program's. */
interface Goal {
  readonly figure: string
  readonly share: 'p50' | 'p99'
  readonly against: string
  readonly most?: number
  readonly least?: number
}

const most = (figure: string, against: string, most: number, share: Goal['share'] = 'p50'): Goal => ({ figure, share, against, most })
const least = (figure: string, against: string, least: number): Goal => ({ figure, share: 'p50', against, least })

const FIGURE = {
  open: 'warm open, two processors',
  openSame: 'warm open, one processor',
  stat: 'stat, two processors',
  statSame: 'stat, one processor',
  cold: 'cold open',
  clients: `opens by ${CLIENTS} clients`,
  scale: `warm open, ${DISKS.toLocaleString('en')} disks`,
  list: `list ${DISKS.toLocaleString('en')} names`,
  ready: 'ready after start',
  readyMany: `ready after start, ${DISKS.toLocaleString('en')} disks, more than with few`,
  memory: 'resident memory',
  memoryMany: 'resident memory, for each 1,000 disks',
  io1: 'random reads of 4 KiB, queue depth 1',
  io32: 'random reads of 4 KiB, queue depth 32',
  attach: 'a file attached',
  attachMany: `${AT_ONCE} files attached at once, and the start of a client`,
  status: `processor time for a look at the status, ${DISKS.toLocaleString('en')} disks`,
  appear: 'new disk to open (virtual machine)',
  uevent: 'processor time for a uevent (virtual machine)',
  create: 'dmsetup create (virtual machine)',
  remove: 'dmsetup remove (virtual machine)',
  attachUdev: 'a file attached (virtual machine)',
}
const PINGPONG = 'pipe ping-pong'
const NODE = 'node -e 0'
const ONE_THREAD = 'one thread of C, one after another'
const LINK = "udev's link"
const UDEVD = 'systemd-udevd'
const STOPPED = 'service stopped'

const GOALS: readonly Goal[] = [
  most(FIGURE.open, PINGPONG, 1.3),
  most(FIGURE.open, 'c', 1.1),
  most(FIGURE.open, 'fuse-native', 0.5),
  most(FIGURE.open, 'c', 1.5, 'p99'),
  most(FIGURE.cold, 'c', 1.5),
  most(FIGURE.stat, 'c', 1.3),
  least(FIGURE.clients, 'c', 0.9),
  least(FIGURE.clients, 'fuse-native', 2),
  most(FIGURE.scale, 'with few disks', 1.1),
  most(FIGURE.list, 'c', 1.5),
  most(FIGURE.ready, NODE, 1.6),
  most(FIGURE.readyMany, 'a second', 1),
  most(FIGURE.memory, 'bare node', 1.25),
  most(FIGURE.memoryMany, 'a MiB', 1),
  most(FIGURE.attachMany, ONE_THREAD, 1.3),
  most(FIGURE.status, 'a millisecond', 1),
  most(FIGURE.appear, LINK, 1 / 20),
  most(FIGURE.uevent, UDEVD, 1),
  most(FIGURE.create, STOPPED, 1.15),
  most(FIGURE.remove, STOPPED, 1.15),
]

const rows: Row[] = []

interface Peer {
  readonly kind: Kind
  readonly mountpoint: string
  readonly child: ChildProcess
  readonly ms: number
}

/** The diskseq of /dev/NAME. */
const diskseq = (device: string) => readFileSync(`/sys/class/block/${device.slice(5)}/diskseq`, 'utf8').trim()
const within = ({ mountpoint }: Peer, device: string) => join(mountpoint, diskseq(device))

function add(figure: string, unit: string, values: readonly (readonly [who: string, p50: number, p99?: number])[]): void {
  for (const [who, p50, p99] of values) rows.push({ figure, who, p50, ...(p99 !== undefined && { p99 }), unit })
}

/** A part of what the C helper printed; an error if anything in it has failed. */
function part(result: Record<string, any>, name: string): Record<string, number> {
  const found = result[name]
  if (Object.keys(found.errors).length > 0) throw new Error(`${name}: ${JSON.stringify(found.errors)}`)
  return found
}

const us = (result: Record<string, any>, name: string): [number, number] => {
  const { p50_ns, p99_ns } = part(result, name) as { p50_ns: number; p99_ns: number }
  return [p50_ns / 1000, p99_ns / 1000]
}

const SERIES: Readonly<Record<Kind, string>> = { [OURS]: 'tree', c: 'c', 'fuse-native': 'fuse-native' }

async function warm(peers: readonly Peer[]): Promise<void> {
  // A device for each: what one program holds open, another one opens faster.
  const [plain, careful, ...own] = (await loops(2 + peers.length)).devices
  const path = (kind: Kind) => {
    const i = peers.findIndex((peer) => peer.kind === kind)
    return within(peers[i]!, own[i]!)
  }
  for (const where of ['split', 'same'] as const) {
    for (const { child } of peers) execFileSync('taskset', ['-apc', where === 'split' ? '1' : '0', String(child.pid)])
    const result = await blk(
      'latency',
      '--tree',
      path(OURS),
      '--dev',
      plain!,
      '--seconds',
      QUICK ? '8' : '40',
      '--pin',
      where,
      '--',
      ...peers.filter(({ kind }) => kind !== OURS).map(({ kind }) => `${SERIES[kind]}=${path(kind)}`),
      `careful=careful:${careful}`,
    )
    const [open, stat] = where === 'split' ? [FIGURE.open, FIGURE.stat] : [FIGURE.openSame, FIGURE.statSame]
    add(open, 'us', [
      ...peers.map(({ kind }) => [kind, ...us(result, `open_${SERIES[kind]}`)] as const),
      ['careful client', ...us(result, 'open_careful')],
      ['open of /dev/loopN', ...us(result, 'open_dev')],
      [PINGPONG, ...us(result, 'rtt')],
    ])
    add(stat, 'us', [
      ...peers.map(({ kind }) => [kind, ...us(result, `stat_${SERIES[kind]}`)] as const),
      ['stat of /dev/loopN', ...us(result, 'stat_dev')],
      [PINGPONG, ...us(result, 'rtt')],
    ])
  }
  for (const { child } of peers) execFileSync('taskset', ['-apc', `0-${cpus().length - 1}`, String(child.pid)])
}

async function cold(peers: readonly Peer[]): Promise<void> {
  const ways: (readonly [who: string, paths: (devices: string[]) => string[]])[] = [
    ...peers.map((peer) => [peer.kind, (devices: string[]) => devices.map((device) => within(peer, device))] as const),
    ['careful client', (devices) => devices.map((device) => `careful:${device}`)],
    ['open of /dev/loopN', (devices) => devices],
  ]
  const { devices } = await loops(ways.length * COLD)
  const result = await blk(
    'cold-open',
    '--rounds',
    QUICK ? '8' : '40',
    '--pause-ms',
    '1500', // the other programs hold them for a second
    '--',
    ...ways.map(([, paths], i) => `${i}=${paths(devices.slice(i * COLD, (i + 1) * COLD)).join()}`),
  )
  add(
    FIGURE.cold,
    'us',
    ways.map(([who], i) => [who, ...us(result, String(i))]),
  )
}

async function throughput(peers: readonly Peer[]): Promise<void> {
  const { devices } = await loops(CLIENTS)
  const ways: (readonly [who: string, paths: string[]])[] = [
    ...peers.map((peer) => [peer.kind, devices.map((device) => within(peer, device))] as const),
    ['careful client', devices.map((device) => `careful:${device}`)],
    ['open of /dev/loopN', devices],
  ]
  const result = await blk(
    'throughput',
    '--clients',
    String(CLIENTS),
    '--seconds',
    QUICK ? '3' : '15',
    '--',
    ...ways.map(([, paths], i) => `${i}=${paths.join()}`),
  )
  add(
    FIGURE.clients,
    '1/s',
    ways.map(([who], i) => [who, part(result, String(i))['opens_per_s']!]),
  )
}

/** What an open, a listing, a start and memory cost with many disks. */
async function scale(peers: readonly Peer[]): Promise<void> {
  const own = peers.find(({ kind }) => kind === OURS)!
  const [device] = (await loops(1)).devices
  const path = within(own, device!)
  const open = async () => {
    const result = await blk('latency', '--tree', path, '--dev', device!, '--seconds', QUICK ? '2' : '6', '--pin', 'split')
    // In ping-pongs, as what else the machine does slows them down, too.
    return us(result, 'open_tree')[0] / us(result, 'rtt')[0]
  }
  const few: number[] = []
  const many: number[] = []
  const start = { few: await starts(), many: await starts(0) }
  for (let i = 0; i < (QUICK ? 1 : 3); i++) {
    few.push(await open())
    const { detach } = await loops(DISKS)
    many.push(await open())
    if (i === 0) {
      await listing(peers)
      add(FIGURE.status, 'us', [
        [OURS, await statusCost(own.child.pid as number, own.mountpoint)],
        ['a millisecond', 1000],
      ])
      start.many = await starts()
    }
    await detach()
    few.push(await open())
  }
  add(FIGURE.scale, 'x ping-pong', [
    [OURS, median(many)],
    ['with few disks', median(few)],
  ])
  const { ms, memory, bareMs, bareMemory } = start.few
  add(FIGURE.ready, 'ms', [
    [OURS, median(ms), percentile(ms, 0.99)],
    [NODE, median(bareMs), percentile(bareMs, 0.99)],
  ])
  add(FIGURE.memory, 'MiB', [
    [OURS, median(memory)],
    ['bare node', median(bareMemory)],
  ])
  add(FIGURE.readyMany, 's', [
    [OURS, (median(start.many.ms) - median(ms)) / 1000],
    ['a second', 1],
  ])
  add(FIGURE.memoryMany, 'MiB', [
    [OURS, ((median(start.many.memory) - median(memory)) * 1000) / DISKS],
    ['a MiB', 1],
  ])
}

async function listing(peers: readonly Peer[]): Promise<void> {
  const plain = temporary('names')
  for (const name of readdirSync(peers[0]!.mountpoint)) writeFileSync(join(plain, name), '')
  const directories = [...peers.map(({ kind, mountpoint }) => [kind, mountpoint] as const), ['the same names as files', plain] as const]
  const samples = new Map<string, number[]>(directories.map(([who]) => [who, []]))
  for (let i = 0; i < (QUICK ? 20 : 100); i++) {
    for (const [who, directory] of directories) {
      const began = performance.now()
      const { length } = readdirSync(directory)
      samples.get(who)!.push(performance.now() - began)
      if (length < DISKS) throw new Error(`${who} lists ${length} of ${DISKS} disks`)
    }
  }
  add(
    FIGURE.list,
    'ms',
    directories.map(([who]) => [who, median(samples.get(who)!), percentile(samples.get(who)!, 0.99)]),
  )
}

interface Starts {
  readonly ms: number[]
  readonly memory: number[]
  readonly bareMs: number[]
  readonly bareMemory: number[]
}

/** Starts of the daemon and of Node.js with nothing to do, in turns. */
async function starts(count = QUICK ? 5 : 15): Promise<Starts> {
  const found: Starts = { ms: [], memory: [], bareMs: [], bareMemory: [] }
  for (let i = 0; i < count; i++) {
    const began = performance.now()
    execFileSync(process.execPath, ['-e', '0'])
    found.bareMs.push(performance.now() - began)
    const { child, ms } = await daemon(temporary('mount'))
    found.ms.push(ms)
    found.memory.push(resident(child.pid as number))
    await end(child)
    const idle = spawn(process.execPath, ['-e', 'console.log(1); setInterval(() => {}, 1e6)'], {
      stdio: ['ignore', 'pipe', 'ignore'],
    })
    await new Promise((resolve) => idle.stdout.once('data', resolve))
    found.bareMemory.push(resident(idle.pid as number))
    await end(idle)
  }
  return found
}

/** Reads by the name in the tree and by the device's own, in turns: once the file is open, the tree has no part in it. */
async function io(peers: readonly Peer[]): Promise<void> {
  const own = peers.find(({ kind }) => kind === OURS)!
  const [device] = (await loops(1, 256 << 20)).devices
  const ways = [
    [OURS, within(own, device!)],
    ['on the device', device!],
  ] as const
  for (const [figure, depth] of [
    [FIGURE.io1, 1],
    [FIGURE.io32, 32],
  ] as const) {
    const found = new Map<string, number[]>(ways.map(([who]) => [who, []]))
    for (let i = 0; i < (QUICK ? 2 : 6); i++) {
      for (const [who, path] of ways) {
        const output = execFileSync('fio', [
          '--name=read',
          `--filename=${path}`,
          '--readonly',
          '--rw=randread',
          '--bs=4k',
          '--ioengine=libaio',
          '--direct=1',
          `--iodepth=${depth}`,
          '--time_based',
          `--runtime=${QUICK ? 1 : 3}`,
          '--output-format=json',
        ])
        found.get(who)!.push(JSON.parse(output.toString()).jobs[0].read.iops)
      }
    }
    add(
      figure,
      '1/s',
      ways.map(([who]) => [who, median(found.get(who)!)]),
    )
  }
}

/** From the command to the path; starting Node.js, which is most of it, apart. */
async function attaches(peers: readonly Peer[]): Promise<void> {
  const { mountpoint } = peers.find(({ kind }) => kind === OURS)!
  const file = join(temporary('attach'), 'disk.img')
  writeFileSync(file, Buffer.alloc(1 << 20))
  const ways: readonly (readonly [who: string, command: readonly [string, ...string[]]])[] = [
    [OURS, [process.execPath, CLI, 'attach', '--tree', mountpoint, '--grace', '0', file]],
    ['losetup --find --show', ['losetup', '--find', '--show', file]],
    [NODE, [process.execPath, '-e', '0']],
  ]
  const found = new Map<string, number[]>(ways.map(([who]) => [who, []]))
  for (let i = 0; i < (QUICK ? 5 : 15); i++) {
    for (const [who, [program, ...args]] of ways) {
      const began = performance.now()
      const said = execFileSync(program, args, { encoding: 'utf8' }).trim()
      found.get(who)!.push(performance.now() - began)
      if (program === 'losetup') execFileSync('losetup', ['--detach', said])
    }
  }
  add(
    FIGURE.attach,
    'ms',
    ways.map(([who]) => [who, median(found.get(who)!)]),
  )
  const { ours, bare } = await attachMany(mountpoint)
  const client = median(found.get(NODE)!)
  add(FIGURE.attachMany, 'ms', [
    [OURS, ours + client],
    [ONE_THREAD, bare + client],
    [NODE, client],
  ])
}

/** What can only be compared in a virtual machine. */
async function machineWithUdev(): Promise<string> {
  const { machine, tree, peer, link, settled, daemonUs, udevUs, named, unnamed, attach, losetup, node } = await besideUdev()
  add(FIGURE.appear, 'us', [
    [OURS, tree.p50, tree.p99],
    ['c', peer.p50, peer.p99],
    [LINK, link.p50, link.p99],
    [`udevadm settle, then ${LINK}`, settled.p50, settled.p99],
  ])
  add(FIGURE.uevent, 'us', [
    [OURS, daemonUs],
    [UDEVD, udevUs],
  ])
  for (const [figure, what] of [
    [FIGURE.create, 'create'],
    [FIGURE.remove, 'remove'],
  ] as const) {
    add(figure, 'us', [
      [OURS, named[what]],
      [STOPPED, unnamed[what]],
    ])
  }
  add(FIGURE.attachUdev, 'us', [
    [OURS, attach],
    [`losetup, then ${LINK}`, losetup],
    [NODE, node],
  ])
  return machine
}

const ratioOf = (own: Row, row: Row, share: Goal['share']) => own[share]! / row[share]!

interface Verdict {
  readonly goal: Goal
  readonly ratio: number
  readonly met: boolean
}

function verdicts(): Verdict[] {
  const measured = ({ figure }: Goal) => rows.some((row) => row.figure === figure)
  return GOALS.filter(measured).map((goal) => {
    const of = (who: string) => rows.find((row) => row.figure === goal.figure && row.who === who)!
    const ratio = ratioOf(of(OURS), of(goal.against), goal.share)
    return { goal, ratio, met: goal.most === undefined ? ratio >= goal.least! : ratio <= goal.most }
  })
}

function print(): void {
  printTable([
    ['figure', 'who', 'p50', 'p99', 'unit', `${OURS} / it`],
    ...rows.map((row) => {
      const own = rows.find(({ figure, who }) => figure === row.figure && who === OURS)!
      return [row.figure, row.who, number(row.p50), number(row.p99), row.unit, row === own ? '' : number(ratioOf(own, row, 'p50'))]
    }),
  ])
  console.log()
  printTable([
    ['goal', 'against', 'ratio', 'wanted', ''],
    ...verdicts().map(({ goal, ratio, met }) => [
      `${goal.figure}, ${goal.share}`,
      goal.against,
      number(ratio),
      goal.most === undefined ? `>= ${goal.least}` : `<= ${goal.most}`,
      met ? 'met' : 'missed',
    ]),
  ])
}

try {
  console.log(`${machine}\n`)
  const peers: Peer[] = []
  for (const kind of KINDS) {
    const mountpoint = temporary('mount')
    peers.push({ kind, mountpoint, ...(await startPeer(kind, mountpoint)) })
  }
  await warm(peers)
  await cold(peers)
  await throughput(peers)
  await io(peers)
  await attaches(peers)
  await scale(peers)
  if (!QUICK) console.log(`${await machineWithUdev()}\n`)
  print()
  mkdirSync(join(ROOT, 'build'), { recursive: true })
  writeFileSync(RESULT, `${JSON.stringify({ machine, rows, goals: verdicts() }, null, 2)}\n`)
} finally {
  await cleanUp()
}
