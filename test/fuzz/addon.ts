// SPDX-License-Identifier: MIT
/**
 * Calls each function of the addon with arguments that TypeScript lets pass and that no caller
 * would use: buffers without room, descriptors of something else, text with NULs in it, more
 * descriptors than there is room for. It runs with the addon that is built with sanitizers
 * (addon.cc), which report errors. It also has the addon parse text of the kernel's; what must hold
 * for that is written down here a second time.
 *
 *   node addon.js CALLS SEED [TWIN]
 */
import { constants, mkdtempSync, readdirSync, rmSync, writeFileSync, openSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { native } from '../../src/native.js'
import { type Choices, Random } from './choices.js'
import { NODE_GROUP, statText, statusText } from './generators.js'

const [calls = '10000', seed = '1', twin] = process.argv.slice(2)
const c: Choices = new Random(Number(seed))

if (twin !== undefined) {
  const twins = native as unknown as Record<string, (argument: unknown) => void>
  twins[twin]?.(twin === 'overrun' ? new Uint8Array(64) : 1)
  // The search for leaks happens at the end.
  process.exit()
}

const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-addon-'))
const file = join(directory, 'file')
writeFileSync(file, 'x'.repeat(5000))

/** Descriptors of each kind that does not block; new ones join them for a while. */
const standing = [
  -1,
  -2147483648,
  2147483647,
  99999,
  openSync(file, 'r+'),
  openSync(directory, 'r'),
  openSync('/dev/null', 'r+'),
  openSync('/dev/zero', 'r+'),
  openSync('/proc/self/status', 'r'),
  native.openDirectory('/dev'),
  native.openNode(native.openDirectory('/dev'), 'null'),
  native.selfSocket(),
  native.selfSocket(),
  native.sharedMemory(8192),
  native.ueventOpen(4096),
]
/** A directory for nodes, and one for links. */
const nodes = native.makeNodes()
const own = openSync(mkdtempSync(join(directory, 'links-')), 'r')
const opened: number[] = []
const fd = () => (opened.length > 0 && c.oneIn(3) ? c.pick(opened) : c.pick(standing))
/** Keeps a descriptor for later calls. Only of those opened here: others are Node's. */
const keep = (result: number) => {
  if (result >= 0) opened.push(result)
  while (opened.length > 40) native.close(opened.shift() as number)
  return result
}

const size = () => c.pick([0, 1, 2, 7, 8, 11, 12, 13, 16, 100, 255, 4095, 4096, 4097, 65536, 1 << 20])
const number = () =>
  c.pick([0, 1, -1, 7, 0.5, 4096, 2 ** 31 - 1, -(2 ** 31), 2 ** 32 - 1, 2 ** 53, 1e300, -1e300, NaN, Infinity, -Infinity])
const bytes = () => {
  const whole = new Uint8Array(size())
  return c.oneIn(4) ? whole.subarray(c.below(whole.length + 1)) : whole
}
const text = () =>
  c.pick([
    '',
    '\0',
    'a\0b',
    '/',
    '.',
    '..',
    '../x',
    file,
    directory,
    `${directory}/none`,
    `${file}\0/x`,
    '/dev/null',
    'null',
    'zero',
    'loop0',
    '@',
    '@x',
    '@\0',
    'x'.repeat(107),
    'x'.repeat(108),
    `@${'x'.repeat(106)}`,
    `@${'x'.repeat(107)}`,
    'x'.repeat(4096),
    'x'.repeat(70000),
    '\ud800',
    '\u{10ffff}',
    'user.a',
    'system.posix_acl_access',
    '/proc/self/syscall',
    '/proc/self/status',
    '/sys/class/block',
  ])
/** Places without a mount, which cannot be mounted at either: that directory is never made. */
const nowhere = () => c.pick(['', '\0', `${directory}/missing/none`, `${directory}/missing/none\0x`, 'x'.repeat(5000)])
/** Addresses without a guard, and without any other socket that does not answer. */
const nobody = () => c.pick(['', '\0', `${directory}/none`, file, 'x'.repeat(107), 'x'.repeat(108), 'x'.repeat(200)])

let waiting = 0
/** Callbacks count themselves off. */
const later = <T extends unknown[]>(use: (...results: T) => void = () => {}) => {
  waiting++
  return (...results: T) => {
    waiting--
    use(...results)
  }
}
/** Reads all of a scan, and past its end. */
const drained = (_: number, next: () => unknown[]) => {
  while (next().length > 0) continue
  next()
}
/** For a call that has a descriptor among its results. */
const fdLater = (at: number) => later((...results: unknown[]) => void keep(results[at] as number))

/** Functions that only the addon with sanitizers has. */
interface Parsers {
  parseStatus(text: Uint8Array, groups: number[]): [uid: number, gid: number, capabilities: bigint, ...member: boolean[]] | undefined
  parseStat(text: Uint8Array): [startCode: number, state: string]
}
const parsers = native as unknown as Parsers

function must(holds: boolean, what: string): asserts holds {
  if (!holds) throw new Error(what)
}

/** /proc/TID/status: a process name that looks like a line of it must not count as one. */
function checkStatus(text: Buffer): void {
  const found = parsers.parseStatus(text, [NODE_GROUP, 61001])
  const lines = text.toString('latin1').split('\n').slice(1)
  const all = (field: string) => lines.filter((line) => line.startsWith(`${field}:\t`)).map((line) => line.slice(field.length + 2))
  const [uids, gids, groups, effective] = ['Uid', 'Gid', 'Groups', 'CapEff'].map(all) as [string[], string[], string[], string[]]
  // The kernel writes each field once.
  if ([uids, gids, groups, effective].some((field) => field.length > 1)) return
  const shown = JSON.stringify(text.toString('latin1'))
  if ([uids, gids, groups, effective].some((field) => field.length === 0))
    return must(found === undefined, `${shown}: something is missing`)
  const ids = /^\d+\t\d+\t\d+\t(\d{1,9})$/
  const [, uid] = ids.exec(uids[0] as string) ?? []
  const [, gid] = ids.exec(gids[0] as string) ?? []
  const plain = /^(\d{1,9} )* ?$/.test(groups[0] as string) && /^[0-9a-f]{16}$/.test(effective[0] as string)
  if (uid === undefined || gid === undefined || !plain) return
  must(found !== undefined, `${shown}: nothing is found`)
  const [foundUid, foundGid, capabilities, ...member] = found
  must(foundUid === Number(uid) && foundGid === Number(gid), `${shown}: ${foundUid}:${foundGid}`)
  must(capabilities === BigInt(`0x${effective[0]}`), `${shown}: capabilities ${capabilities}`)
  const own = (groups[0] as string)
    .split(' ')
    .filter((group) => group !== '')
    .map(Number)
  must(member[0] === own.includes(NODE_GROUP) && member[1] === own.includes(61001), `${shown}: groups ${member}`)
}

/** /proc/TID/stat: the name in it may be anything. */
function checkStat(text: Buffer): void {
  const [startCode, state] = parsers.parseStat(text)
  const shown = text.toString('latin1').replace(/\0.*$/s, '')
  if (shown.length !== text.length) return
  const fields = shown.slice(shown.lastIndexOf(')') + 2).split(' ')
  if (shown[shown.lastIndexOf(')') + 1] !== ' ' || !fields.slice(0, 30).every((field) => /^(-?\d{1,15}|[A-Z])\n?$/.test(field))) return
  must((state === '') === (fields[0] === ''), `${JSON.stringify(shown)}: state ${state}`)
  must(startCode === (fields.length > 23 ? Number(fields[23]) : -1), `${JSON.stringify(shown)}: start code ${startCode}`)
}

/** Found something once: a process whose name makes it look like a member of the disk's group, or capable. */
const STATUS_CASES = [
  '4e616d653a090d47726f7570733a09360d0a53746174653a09532028736c656570696e67290a47726f7570733a09363130303120200a4361704566663a09303030303030303030303030303030300a436170426e643a09303030303031666666666666666666660a',
  '4e616d653a090d4361704566663a09320d0a53746174653a09532028736c656570696e67290a47726f7570733a09363130303120200a4361704566663a09303030303030303030303030303030300a436170426e643a09303030303031666666666666666666660a',
  '4e616d653a09780a53746174653a09532028736c656570696e67290a47726f7570733a09363130303120200a4361704566663a093030',
]

const listens = () => c.pick([`${directory}/listens`, ...['', '\0', '@', `${directory}/none/x`, 'x'.repeat(108)]])

const FUNCTIONS: Readonly<Record<string, () => unknown>> = {
  // Neither blocks, as nothing here waits for anything else.
  read: () => native.read(fd(), bytes()),
  write: () => native.write(c.pick([standing[4], -1, 99999, standing[6], standing[11]]) as number, bytes(), number()),
  close: () => native.close(opened.pop() ?? -1),
  readFile: () => native.readFile(text(), bytes()),
  openFile: () => keep(native.openFile(text())),
  readAgain: () => native.readAgain(fd(), bytes()),
  openDirectory: () => keep(native.openDirectory(text())),
  lockFile: () =>
    keep(native.lockFile(c.pick([nowhere(), directory, `${directory}/lock`, '/dev/null', '/proc/self/comm', '', '\0']) as string)),
  unlock: () => native.unlock(fd()),
  openNode: () => keep(native.openNode(fd(), text())),
  fstat: () => native.fstat(fd(), new Float64Array(c.pick([0, 1, 11, 12, 13]))),
  statNode: () => native.statNode(fd(), text(), new Float64Array(c.pick([0, 1, 11, 12, 13]))),
  fchmod: () => native.fchmod(c.pick([-1, 99999, standing[4]]) as number, number()),
  fchown: () => native.fchown(c.pick([-1, 99999, standing[4]]) as number, number(), number()),
  futimens: () => native.futimens(c.pick([-1, 99999, standing[4]]) as number, number(), number(), number(), number()),
  getxattr: () => native.getxattr(fd(), text(), bytes()),
  listxattr: () => native.listxattr(fd(), bytes()),
  setxattr: () => native.setxattr(c.pick([-1, standing[4]]) as number, text(), bytes(), number()),
  removexattr: () => native.removexattr(c.pick([-1, standing[4]]) as number, text()),
  openDevice: () =>
    native.openDevice(fd(), c.pick([text(), 'null', 'zero']), constants.O_RDONLY, c.oneIn(2), c.pick([-1, 99999, nodes]), fdLater(1)),
  makeNodes: () => native.close(native.makeNodes()),
  identify: () => native.identify(fd(), c.oneIn(2), later()),
  statFile: () => native.statFile(fd(), later()),
  duplicate: () => keep(native.duplicate(fd())),
  // Without a file: nothing is bound.
  attachLoop: () => (c.oneIn(10) ? native.attachLoop(c.pick([-1, 99999]), number(), c.u64(), c.u64(), number(), fdLater(2)) : 0),
  // Calls that change nothing: a list, and what there is to say of a device (libdevmapper.h).
  deviceMapper: () => {
    const target = () => ({ start: c.u64(), length: c.u64(), type: text(), params: text() })
    const targets = Array.from({ length: c.below(3) }, target)
    const [type, major] = [c.pick([6, 13, -1, 99]), c.pick([-1, 0, 253, 4095])]
    native.deviceMapper(type, c.below(256), major, number(), text(), text(), text(), c.u64(), targets, later())
  },
  closeFile: () => native.closeFile(opened.pop() ?? -1, later()),
  closeDevice: () => native.closeDevice(opened.pop() ?? -1, later()),
  readSoon: () => native.readSoon(fd(), bytes(), c.pick([0, 1, 100]), c.oneIn(2)),
  diskseq: () => native.diskseq(fd()),
  scanBlock: () => (c.oneIn(10) ? native.scanBlock(c.oneIn(2) ? '/sys/class/block' : c.pick([directory, '', 'a\0b']), later(drained)) : 0),
  inotifyWatch: () => native.inotifyWatch(text(), c.below(2 ** 32), fdLater(1)),
  inotifyAdd: () => native.inotifyAdd(c.pick(standing), c.pick(standing), c.u64(), c.below(2 ** 32), later()),
  inotifyRemove: () => native.inotifyRemove(c.pick(standing), number()),
  // Only in its own directory.
  changeLinks: () => {
    const path = () => c.pick(['a', 'a/b', 'a/b/c', '', 'x'.repeat(300), 'a//b', '/nowhere/x'])
    const changes = Array.from({ length: c.below(6) }, () => [path(), c.pick(['', 'to', '../to', 'x'.repeat(5000)])]).flat()
    native.changeLinks(c.pick([-1, own]), c.pick([0o700, 0o755, -1]), c.oneIn(8) ? changes.slice(1) : changes, later())
  },
  listLinks: () => native.listLinks(c.pick([-1, own]), c.below(4), later()),
  cloneMount: () => native.cloneMount(c.pick([nowhere(), '', '\0']), text(), fdLater(1)),
  mount: () => native.mount(text(), nowhere(), c.pick(['no-such-fs', '', '\0']), number(), text()),
  unmount: () => native.unmount(nowhere(), number(), later()),
  look: () => native.look(c.pick(['', '\0', '/', file, 'x'.repeat(5000)]), later()),
  pickMount: () => native.pickMount(c.pick([nowhere(), '/', '/proc']), fdLater(1)),
  // Not for a descriptor that pickMount has found: that is of this system.
  prune: () => native.prune(c.pick(standing), later()),
  lookAtThreads: () => {
    // Its own threads, those of other processes, and none.
    const threads = Array.from({ length: c.below(6) }, () => [c.pick([process.pid, 1, 2, process.ppid, number()]), c.oneIn(2)]).flat()
    native.lookAtThreads(c.oneIn(4) ? threads.slice(1) : threads, later())
  },
  credentials: () => native.credentials(c.pick([process.pid, 1, 2, number()]), Array.from({ length: c.below(4) }, number), later()),
  setSlice: () => native.setSlice(number()),
  userNamespace: () => native.userNamespace(c.pick([process.pid, 1, 2, number()])),
  parseStatus: () => checkStatus(statusText(c)),
  parseStat: () => checkStat(statText(c)),
  ueventOpen: () => keep(native.ueventOpen(number())),
  ueventReceive: () => native.ueventReceive(fd(), bytes(), new Uint32Array(c.below(5))),
  datagramOpen: () => keep(native.datagramOpen(text())),
  datagramSend: () => native.datagramSend(fd(), text()),
  packetConnect: () => keep(native.packetConnect(nobody())),
  packetListen: () => keep(native.packetListen(listens())),
  streamConnect: () => keep(native.streamConnect(nobody())),
  streamListen: () => keep(native.streamListen(listens())),
  sendBuffer: () => native.sendBuffer(fd(), number()),
  peerUser: () => native.peerUser(fd()),
  acceptConnection: () => keep(native.acceptConnection(fd())),
  sharedMemory: () => keep(native.sharedMemory(c.pick([0, 1, 4096, 65536, -1, NaN, 2 ** 53, 1e300]))),
  mapMemory: () => {
    const length = c.pick([0, 1, 4096, 8192, 65536, -1, NaN, 2 ** 53, 1e300])
    const memory = native.mapMemory(fd(), length)
    if (typeof memory !== 'number') new Uint8Array(memory)[memory.byteLength - 1] = 1
  },
  selfSocket: () => keep(native.selfSocket()),
  sendDescriptors: () =>
    native.sendDescriptors(
      fd(),
      text(),
      Array.from({ length: c.pick([0, 1, 2, 252, 253, 254, 1000]) }, () => c.pick(standing.slice(4))),
    ),
  receiveDescriptors: () => {
    const socket = native.selfSocket()
    const count = c.pick([0, 1, 2, 253])
    for (let i = c.below(3); i > 0; i--) native.sendDescriptors(socket, text(), Array(count).fill(standing[6]))
    for (let i = c.below(4); i > 0; i--) {
      const found = native.receiveDescriptors(c.oneIn(8) ? fd() : socket, bytes(), c.oneIn(2))
      if (typeof found !== 'number') for (const each of found.slice(1)) native.close(each)
    }
    native.close(socket)
  },
  awaitMessage: () => {
    const socket = native.selfSocket()
    // None of the sockets that it is called with stays without a message.
    native.sendDescriptors(socket, 'x', [])
    native.awaitMessage(c.oneIn(8) ? 1_000_000 : socket)
    native.close(socket)
  },
  Poll: () => {
    try {
      const poll = new native.Poll(fd(), () => {}, c.oneIn(2))
      for (let i = c.below(4); i > 0; i--) c.pick([() => poll.pause(), () => poll.resume(), () => poll.close()])()
      poll.close()
    } catch (error) {
      if (!/^cannot poll the descriptor/.test((error as Error).message)) throw error
    }
  },
}

const missing = Object.entries(native)
  .filter(([name, value]) => typeof value === 'function' && !(name in FUNCTIONS))
  .map(([name]) => name)
const untested = missing.filter((name) => !['overrun', 'useAfterFree', 'overflow', 'leak'].includes(name))
if (untested.length > 0) throw new Error(`no arguments for ${untested}`)

const descriptors = () => readdirSync('/proc/self/fd').length
const settled = async () => {
  do await new Promise((resolve) => setImmediate(resolve))
  while (waiting > 0)
}
const closeAll = async () => {
  await settled()
  for (const each of opened.splice(0)) native.close(each)
}

const names = Object.keys(FUNCTIONS)
const rounds = Math.ceil(Number(calls) / 200)
for (const text of STATUS_CASES) checkStatus(Buffer.from(text, 'hex'))
let before = 0
for (let round = 0; round <= rounds; round++) {
  for (let i = 0; i < 200; i++) FUNCTIONS[c.pick(names)]?.()
  // The messages in the standing sockets hold descriptors, too.
  for (const socket of [standing[11], standing[12]] as number[]) {
    for (let found; typeof (found = native.receiveDescriptors(socket, new Uint8Array(1), false)) !== 'number';) {
      for (const each of found.slice(1)) native.close(each)
    }
  }
  await closeAll()
  if (round === 0) before = descriptors()
}
const left = descriptors() - before
rmSync(directory, { recursive: true })
console.log(JSON.stringify({ inputs: rounds * 200, functions: names.length, descriptors: left }))
process.exit(left > 0 ? 1 : 0)
