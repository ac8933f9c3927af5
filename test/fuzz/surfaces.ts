// SPDX-License-Identifier: MIT
/**
 * The parts that take bytes from outside, one surface each: how inputs for it are made, and what
 * must hold for any input. The rules are written down here a second time, in other words than in
 * src/, and both must agree.
 */
import { Access, granted } from '../../src/gate/access.js'
import { CloseWatch } from '../../src/gate/closes.js'
import {
  directoryId,
  inodeId,
  linkId,
  type LinkKind,
  linkName,
  nodeName,
  parseDiskSeq,
  parseId,
  parseName,
} from '../../src/devices/names.js'
import { E } from '../../src/util/errno.js'
import { type Call, Intents, someCall } from '../../src/gate/intent.js'
import type { Logger } from '../../src/util/log.js'
import { type Native, native as real, type SeenThread, type ThreadCredentials } from '../../src/native.js'
import { SharedState, STATE_SIZE } from '../../src/handover/shared-state.js'
import { type Device, parseDevice, Sysfs } from '../../src/devices/sysfs.js'
import { UeventSocket } from '../../src/devices/uevents.js'
import { PinStore } from '../../src/handover/pin-store.js'
import type { Choices } from './choices.js'
import * as make from './generators.js'
import { type Legacy, World, type WorldOptions } from './world.js'

/** One input is one or more pieces; those of most surfaces have one. */
export type Input = readonly Buffer[]

export interface Surface {
  readonly name: string
  /** @param index the index of the piece in its input */
  piece(c: Choices, index: number): Buffer
  /** Throws if a rule does not hold. */
  check(input: Input): void | Promise<void>
  /** The largest number of pieces of an input; each counts as one. */
  readonly pieces: number
  /** How many inputs the long form has under way at a time, if more than one. For inputs that wait in real time. */
  readonly atOnce?: number
}

/** A whole input. */
export function generate(surface: Surface, c: Choices): Input {
  return Array.from({ length: surface.pieces }, (_, i) => surface.piece(c, i))
}

/** Throws if a rule does not hold. */
export function must(holds: boolean, what: string): asserts holds {
  if (!holds) throw new Error(what)
}

const quiet = { error() {}, warn() {}, info() {}, debug() {} } as unknown as Logger

function single(name: string, generate: (c: Choices) => Buffer, check: (bytes: Buffer) => void): Surface {
  return { name, pieces: 1, piece: generate, check: ([bytes]) => check(bytes as Buffer) }
}

const STEPS_AT_ONCE = 64

/** Episodes of requests, while anything may happen to disks and callers. */
export function requests(twin: WorldOptions = {}): Surface {
  return {
    name: 'FUSE requests',
    pieces: 1000,
    piece: make.item,
    async check(input) {
      const world = new World(twin)
      await world.start()
      await play(world, input)
      await world.end()
      world.recycle()
    },
  }
}

async function play(world: World, input: Input): Promise<void> {
  for (let i = 0; i < input.length; i++) {
    world.take(input[i] as Buffer)
    if (world.failure !== undefined) {
      world.close()
      throw world.failure
    }
    if (i % STEPS_AT_ONCE === STEPS_AT_ONCE - 1) await world.step()
  }
  await world.step()
}

/** A daemon dies, its state is tampered with (the first piece), and another one takes over. */
export const handover: Surface = {
  name: 'hand-over',
  pieces: 24,
  // The second daemon has pins that it releases after the hold.
  atOnce: 32,
  piece: (c, index) => (index > 0 ? make.item(c, index) : c.oneIn(4) ? Buffer.alloc(0) : make.patches(c)),
  async check([changes = Buffer.alloc(0), ...steps]) {
    const before = new World()
    await before.start()
    const half = steps.length >> 1
    await play(before, steps.slice(0, half))
    const legacy: Legacy = { ...before.die(), damaged: changes.length > 0 }
    before.close()
    patch(legacy.memory, changes)
    const after = new World({ from: legacy })
    await after.start()
    await play(after, steps.slice(half))
    await after.end()
    // Does not recycle the memory of the first daemon, which may have timers that write to it.
    after.recycle()
  },
}

function patch(memory: ArrayBuffer, changes: Buffer): void {
  const bytes = new Uint8Array(memory)
  for (let at = 0; at + 5 <= changes.length;) {
    const content = changes.subarray(at + 5, at + 5 + (changes[at + 4] as number))
    const to = changes.readUInt32LE(at)
    if (to + content.length <= bytes.length) bytes.set(content, to)
    at += 5 + content.length
  }
}

/** The memory alone: what is read from it is within bounds, and it goes on to work. */
export function state(open: (memory: ArrayBuffer) => SharedState = (memory) => new SharedState(memory)): Surface {
  const { layout } = real
  const memory = new ArrayBuffer(STATE_SIZE)
  return single('shared memory', make.patches, (changes) => {
    clearSlots(memory)
    const first = new SharedState(memory)
    first.mount = { mountpoint: '/dev/disk/by-diskseq', device: '0:53', pidNamespace: 1 }
    for (let i = 0; i < 4; i++) first.store(Buffer.alloc(48, i))
    first.store(Buffer.alloc(5000))
    const place = first.takePin(13n << 12n)
    for (let tid = 1; tid < 4; tid++) first.pinnedFor(place, { tid, call: 257, outlasts: false }, false)
    patch(memory, changes)
    const next = open(memory)
    void next.compatible
    const { mount } = next
    must(mount === undefined || mount.mountpoint !== '', 'a mount without a path')
    for (const { message, slot } of next.unanswered()) {
      must(message.length >= 40 && message.length <= layout.STATE_REQUEST_MAX, `a request of ${message.length} bytes`)
      message.header()
      next.interrupt(slot)
      next.drop(slot)
    }
    must(next.unanswered().length === 0, 'requests that were dropped are still there')
    for (const { index, callers } of next.pinRecords()) {
      must(callers.length <= 14, `${callers.length} callers`)
      for (let tid = 90; tid < 93; tid++) next.pinnedFor(index, { tid, call: 2, outlasts: true }, true)
      next.notPinnedFor(index, 91)
      const seen = next.pinRecords().find((record) => record.index === index)
      must(seen?.more === true || (seen?.callers.some(({ tid }) => tid === 92) ?? false), 'a caller was not written down')
      next.dropPin(index)
    }
    must(next.pinRecords().length === 0, 'pins that were dropped are still there')
    const slot = next.store(Buffer.alloc(48, 7))
    const again = new SharedState(memory).unanswered().find((each) => each.slot === slot)
    must(slot < 0 || (again?.message.bytes.every((byte) => byte === 7) ?? false), 'a request was not kept')
  })
}

const spare = new ArrayBuffer(STATE_SIZE)

/** Clears the slots. They are taken from the front, so the rest stays as it is. */
function clearSlots(memory: ArrayBuffer): void {
  const { layout } = real
  new Uint8Array(memory, 0, layout.STATE_SMALL_AT + 32 * layout.STATE_SMALL_SIZE).fill(0)
  new Uint8Array(memory, layout.STATE_BIG_AT, make.SLOTS_TOUCHED * layout.STATE_BIG_SIZE).fill(0)
  new Uint8Array(memory, layout.STATE_PINS_AT, 32 * layout.STATE_PIN_SIZE).fill(0)
}

/** The contents of an earlier daemon's sockets. */
export const pinStore: Surface = single('pinStore', make.vaultMessages, (bytes) => {
  const open = new Set<number>()
  let nextFd = 10
  const opened = () => (open.add(nextFd), nextFd++)
  type Queue = { text: Buffer; count: number }[]
  const queues = new Map<number, Queue>()
  /** The queue that each descriptor came out of. */
  const queueOf = new Map<number, Queue>()
  let at = 0
  const byte = () => bytes[at++] ?? 0
  while (at < bytes.length) {
    const queue = Array.from({ length: Math.min(byte(), 8) }, () => {
      const count = Math.min(byte(), 8)
      const length = byte()
      at += length
      return { text: bytes.subarray(at - length, at), count }
    })
    queues.set(opened(), queue)
  }
  const sockets = [...queues.keys()]
  const native: Pick<Native, 'selfSocket' | 'sendDescriptors' | 'receiveDescriptors' | 'close'> = {
    selfSocket: () => {
      const fd = opened()
      queues.set(fd, [])
      return fd
    },
    sendDescriptors: (fd, text, fds) => (queues.get(fd)?.push({ text: Buffer.from(text), count: fds.length }), text.length),
    receiveDescriptors: (fd, into, peek) => {
      const queue = queues.get(fd)
      const message = peek ? queue?.[0] : queue?.shift()
      if (message === undefined) return -E.EAGAIN
      const fds = Array.from({ length: message.count }, opened)
      for (const each of fds) queueOf.set(each, queue as Queue)
      return [message.text.copy(into), ...fds]
    },
    close: (fd) => {
      must(open.delete(fd), `descriptor ${fd} was closed, and is not open`)
      return 0
    },
  }
  clearSlots(spare)
  const memory = new SharedState(spare)
  for (let i = 0; i < 4; i++) memory.takePin(BigInt(i))
  const pinStore = new PinStore({ native, state: memory, store: () => {}, log: quiet })
  const pins = pinStore.takeOver(sockets)
  must(new Set(pins.map(({ place }) => place)).size === pins.length, 'two pins at one place')
  must(memory.pinRecords().length === pins.length, 'pins are written down that are not there')
  for (const { fd, place } of pins) {
    native.close(fd)
    pinStore.drop(place)
  }
  for (let i = 0; i < 3; i++) pinStore.drop(pinStore.put(7n, 1))
  // Messages behind a pin are unknown; no daemon puts any there.
  const known = new Set(pins.map(({ fd }) => queueOf.get(fd)))
  must(
    [...queues.values()].every((queue) => queue.length === 0 || known.has(queue)),
    'descriptors wait in a socket that nobody takes them from',
  )
  pinStore.close()
  must(open.size === 0, `${open.size} descriptors are left`)
})

export const names = (parse = parseName): Surface =>
  single('names', make.name, (bytes) => {
    const text = bytes.toString('latin1')
    const parsed = parse(text)
    const [, first = '', kind, second = ''] = /^([^p-]*)(-part|p)?(.*)$/s.exec(text) ?? []
    const decimal = (digits: string, most: number) =>
      digits.length >= 1 && digits.length <= most && [...digits].every((d) => d >= '0' && d <= '9') && digits[0] !== '0'
    const isName = decimal(first, 20) && BigInt(first) < 2n ** 64n && (kind === undefined ? second === '' : decimal(second, 5))
    must((parsed !== undefined) === isName, `${JSON.stringify(text)} is ${isName ? 'a' : 'no'} name`)
    if (parsed === undefined) return
    const { diskseq, partition, symlink } = parsed
    must((symlink ? linkName : nodeName)(diskseq, partition) === text, `${JSON.stringify(text)} is not canonical`)
    must(parseDiskSeq(first) === diskseq, 'the number is another')
    const kinds: readonly LinkKind[] = ['part', 'waiting', 'unknown']
    const kernel = partition === 0 ? [inodeId(diskseq, 0, 7)] : [0, 7, 0xfffff].map((minor) => inodeId(diskseq, partition, minor))
    const ids = [...kernel, ...(partition === 0 ? kinds.slice(1) : kinds).map((kind) => linkId(diskseq, partition, kind))]
    const some = ids.filter((id) => id !== undefined)
    must(new Set(some).size === some.length, `one id for two things of ${text}`)
    for (const id of some) {
      must(id > 1n && id < 2n ** 64n, `inode id ${id}`)
      const back = parseId(id)
      must(back?.diskseq === diskseq && back.partition === partition && remade(back) === id, `inode id ${id} is another's`)
    }
  })

/** The id made again from its parts. */
const remade = (parsed: NonNullable<ReturnType<typeof parseId>>) =>
  parsed.kind === 'inode'
    ? inodeId(parsed.diskseq, parsed.partition, parsed.minor ?? 0)
    : parsed.kind === 'directory'
      ? directoryId(parsed.diskseq)
      : linkId(parsed.diskseq, parsed.partition, parsed.kind)

export const nodeIds: Surface = single(
  'node ids',
  (c) => {
    const bytes = Buffer.alloc(8)
    bytes.writeBigUInt64LE(BigInt.asUintN(64, make.anId(c)))
    return bytes
  },
  (bytes) => {
    if (bytes.length < 8) return
    const id = bytes.readBigUInt64LE()
    const parsed = parseId(id)
    if (parsed === undefined) return
    must(parsed.diskseq >= 1n && parsed.diskseq < 2n ** 64n, `diskseq ${parsed.diskseq}`)
    must(remade(parsed) === id, `inode id ${id} is taken for one that it is not`)
  },
)

/** The first byte says who the sender is. */
export const uevents: Surface = single(
  'uevents',
  (c) => Buffer.concat([Buffer.from([c.below(8)]), make.uevent(c)]),
  (bytes) => {
    const [sender = 0] = bytes
    const message = bytes.subarray(1)
    const changed: string[] = []
    let waiting = true
    let lost = 0
    const socket = new UeventSocket({
      native: {
        Poll: class {
          pause() {}
          resume() {}
          close() {}
        },
        ueventOpen: () => 5,
        close: () => 0,
        ueventReceive: (_, into, from) => {
          if (!waiting) return -E.EAGAIN
          waiting = false
          from.set([sender === 6 ? 4711 : 0, sender === 5 ? 2 : 1, sender === 7 || message.length > into.length ? 1 : 0])
          into.fill(0xff)
          return message.copy(into)
        },
      },
      listener: {
        changed: (knames) => void changed.push(...knames),
        numbered: (_, diskseq) => must(diskseq >= 1n && diskseq < 2n ** 64n, `diskseq ${diskseq}`),
        lost: () => void lost++,
      },
      log: quiet,
    })
    socket.open()
    socket.drain()
    socket.close()
    const truncated = sender === 7 || message.length > 8192
    const kernels = sender !== 5 && sender !== 6
    must(lost === (truncated && kernels ? 1 : 0), 'a message that was cut off went unnoticed, or one that was not')
    const parts = message.toString('latin1').split('\0')
    const path = parts
      .slice(1, -1)
      .find((part) => part.startsWith('DEVPATH=') && part.length > 8)
      ?.slice(8)
    const component = path?.split('/').at(-1) ?? ''
    const block = parts.at(-1) === '' && /^[a-z]+@\//.test(parts[0] as string) && parts.slice(1, -1).includes('SUBSYSTEM=block')
    const expected = kernels && !truncated && block && !['', '.', '..'].includes(component) ? [component] : []
    must(
      changed.length === expected.length && changed[0] === expected[0],
      `names ${JSON.stringify(changed)}, not ${JSON.stringify(expected)}`,
    )
    must(
      changed.every((kname) => !kname.includes('/') && !kname.includes('\0')),
      'a name that leads elsewhere',
    )
  },
)

export const sysfs: Surface = single('sysfs', make.sysfsText, (bytes) => {
  const native = {
    readFile: (_: string, into: Uint8Array) => bytes.copy(into),
    openFile: () => 5,
    readAgain: (_: number, into: Uint8Array) => bytes.copy(into),
    close: () => 0,
    scanBlock: (_: string, done: Parameters<Native['scanBlock']>[1]) => {
      const list = ['loop0', bytes.toString('utf8'), true]
      done(0, () => list.splice(0), 0)
    },
  }
  const files = new Sysfs(native)
  const device = files.read('loop0')
  let scanned: Device[] = []
  files.scan((_, devices) => (scanned = devices))
  must(JSON.stringify(scanned, big) === JSON.stringify(device === undefined ? [] : [device], big), 'a scan sees another device')
  if (device === undefined) return
  must(files.shows(device), 'it is not shown')
  files.removable(device)
  const lines = bytes.toString('utf8').split('\n')
  const first = (key: string) => lines.find((line) => line.startsWith(`${key}=`))?.slice(key.length + 1)
  const { major, minor, diskseq, partition, devname, name } = device
  must(first('DISKSEQ') === String(diskseq) && diskseq >= 1n && diskseq < 2n ** 64n, `diskseq ${diskseq}`)
  must(
    Number(first('MAJOR')) === major && Number(first('MINOR')) === minor && Number.isInteger(major) && Number.isInteger(minor),
    `${major}:${minor}`,
  )
  must(devname !== '' && first('DEVNAME') === devname, `inode ${devname}`)
  must(
    first('DEVTYPE') === (partition === 0 ? 'disk' : 'partition') && Number.isInteger(partition) && partition >= 0,
    `partition ${partition}`,
  )
  must(partition > 99999 || parseName(name)?.diskseq === diskseq, `${name} is no name`)
  must(parseDevice('loop0', lines.join('\n')) !== undefined, 'it is not seen again')
})

const big = (_: string, value: unknown) => (typeof value === 'bigint' ? String(value) : value)

const TID = 4711
/** Eight registers, as a line shows a call. */
const LINE = /^(-1|0|[1-9]\d*)((?: 0x[0-9a-f]{1,16}){8})\n$/
const OUTSIDE = /^-1 0x[0-9a-f]{1,16} 0x[0-9a-f]{1,16}\n$/
const { syscalls, O_PATH } = real
const O_CREAT = 0o100
const O_EXCL = 0o200
const O_DIRECTORY = 0o200000

/** For calls that open a file: the index of the path argument, and the flags (a number is their index). */
const OPEN: Readonly<Record<string, { path: number; flags: number | 'of creat' | 'elsewhere' }>> = {
  open: { path: 0, flags: 1 },
  openat: { path: 1, flags: 2 },
  creat: { path: 0, flags: 'of creat' },
  openat2: { path: 1, flags: 'elsewhere' },
  open_by_handle_at: { path: 1, flags: 2 },
}
const RING = 'io_uring_enter'
/** All other known calls open nothing. In these the first argument is no pointer but a descriptor, or a number. */
const LATER: Readonly<Record<string, number>> = { fanotify_mark: 4, symlinkat: 2, symlink: 1 }
const BY_DESCRIPTOR =
  /^(fstat|newfstatat|statx|readlinkat|faccessat2?|f(get|list|set|remove)xattr|\w+xattrat|fstatfs|inotify_add_watch|name_to_handle_at|open_tree|file_[gs]etattr|execveat|fchmodat2?|fchownat|futimesat|utimensat|mkdirat|mknodat|linkat|renameat2?|unlinkat)$/
const pointerOf = (name: string) => OPEN[name]?.path ?? LATER[name] ?? (BY_DESCRIPTOR.test(name) ? 1 : 0)
const nameOf = new Map(Object.entries(syscalls).map(([name, number]) => [number, name]))

/** What a line shows, and whether that is believed. */
function expectedIntent(text: string, confirmed: boolean): string {
  const [, number, words = ''] = LINE.exec(text) ?? []
  const name = number === undefined ? undefined : nameOf.get(Number(number))
  // None of these has a path.
  if (name === undefined || [RING, 'fchmod', 'fchown', 'ioctl'].includes(name)) return 'unknown'
  const registers = words.trim().split(' ').map(BigInt)
  // An io_uring worker has no program counter, and its other registers are from another thread.
  if (registers.at(-1) === 0n) return 'unknown'
  if ((registers[pointerOf(name)] as bigint) < 1n << 32n && !confirmed) return 'unknown'
  const opening = OPEN[name]
  if (opening === undefined) return 'inspect'
  const { flags: where } = opening
  const flags = where === 'of creat' ? O_CREAT : where === 'elsewhere' ? 0 : Number((registers[where] as bigint) & 0x7fffffffn)
  const creates = (flags & O_CREAT) !== 0 && (flags & O_EXCL) !== 0
  return creates || (flags & (O_PATH | O_DIRECTORY)) !== 0 ? 'inspect' : 'open'
}

/** Whether a line shows an ioctl(2) for btrfs, also of a 32-bit program. */
function isForBtrfs(text: string): boolean {
  const [, number, words = ''] = LINE.exec(text) ?? []
  if (number === undefined || ![syscalls['ioctl'], 54].includes(Number(number))) return false
  const registers = words.trim().split(' ').map(BigInt)
  return registers.at(-1) !== 0n && (((registers[1] as bigint) >> 8n) & 0xffn) === 0x94n
}

const STACK_64 = '[<0>] do_syscall_64+0x82/0x190\n[<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e\n'
const STACK_32 = '[<0>] do_int80_emulation+0x88/0x150\n[<0>] asm_int80_emulation+0x1a/0x20\n'

/** Garbage is unknown: a caller that is not surely seen to only look may open. */
export const syscallFiles = (intentsOf: (native: Native) => Intents = (native) => new Intents(native)): Surface =>
  single('/proc/TID/syscall', make.syscallLine, (bytes) => {
    for (const stack of [STACK_64, STACK_32, '']) {
      const native = {
        ...real,
        openFile: () => 5,
        readAgain: (_: number, into: Uint8Array) => bytes.copy(into),
        readFile: (_: string, into: Uint8Array) => Buffer.from(stack).copy(into),
        close: () => 0,
      }
      const intents = intentsOf(native as Native)
      const call = intents.of(TID)
      const text = bytes.toString('latin1')
      const expected = expectedIntent(text, stack === STACK_64)
      must(call.intent === expected, `${JSON.stringify(text)} is ${expected}, not ${call.intent}`)
      must(call.setsTimes === isForBtrfs(text), `${JSON.stringify(text)} is ${call.setsTimes ? '' : 'not '}taken for btrfs`)
      must(call.intent !== 'unknown' || (call.locks && call.keeps), 'an unknown call is taken for a harmless one')
      must(!call.shape || (call.locks && call.intent === 'inspect'), 'a call that changes the shape does not')
      must(call.print !== 0 || !LINE.test(text), `${JSON.stringify(text)} cannot be told from others`)
      intents.outlastsInode(call)
      intents.isUdevWorker(TID)
      intents.arrives(TID)
      intents.close()
    }
  })

const BUSY = 'running'
/** Lines by which callers were known. */
const KNOWN = ['openat', RING, 'newfstatat'].map(
  (name) => `${syscalls[name]} 0x3 0x7f0000000000 0x80000 0x0 0x0 0x0 0x7ffd1a2b3c48 0x7f12d4e5a6b7\n`,
)
const intentsIn = (text: string) =>
  new Intents({
    ...real,
    openFile: () => 5,
    readAgain: (_: number, into: Uint8Array) => Buffer.from(text).copy(into),
    close: () => 0,
  } as Native)

const STACKS = ['', 'io_issue_sqe', '__io_issue_sqe', 'io_cqring_wait', 'fuse_do_getattr'].map((name) => name && `[<0>] ${name}+0x1/0x2\n`)

/** What threads are seen doing, for callers in calls of each kind: in doubt they are still in their calls. */
export const threadLooks: Surface = single(
  'threads',
  (c) => {
    const text = c.oneIn(4) ? Buffer.from(c.pick([...KNOWN, 'running\n', ''])) : make.syscallLine(c)
    return Buffer.concat([Buffer.from([c.below(256)]), text])
  },
  (bytes) => {
    const [how = 0] = bytes
    const text = bytes.toString('latin1', 1)
    const stack = STACKS[how % STACKS.length] as string
    const state = ['S', 'D', 'R', ''][(how >> 2) & 3] as string
    const memory = [0, 0x1000, -1, 2 ** 47][(how >> 4) & 3] as number
    const userUs = [-1, 0, 5, 1e15][(how >> 6) & 3] as number
    const seen: SeenThread = [text, stack, state, memory, userUs, 7]
    const intents = new Intents(real)
    const opens = (number: number) => OPEN[nameOf.get(number) ?? ''] !== undefined
    const number = Number(LINE.exec(text)?.[1])
    const check = (call: Call, own: string | undefined) => {
      const ring = nameOf.get(call.number) === RING
      const opening = call.intent === 'open' && opens(number)
      let expected: boolean
      if (text === '') expected = memory !== 0
      else if (text.startsWith(BUSY)) expected = true
      else if (!OUTSIDE.test(text) && !LINE.test(text)) expected = true
      else if (ring) expected = stack === '' || /_issue_/.test(stack)
      else if (OUTSIDE.test(text)) expected = false
      // A thread that sleeps in an open(2) before the device is open is in a request of ours.
      else if (own === undefined && opening) expected = state !== 'S' || stack === '' || /fuse/.test(stack)
      else if (own === undefined) expected = number === call.number
      else expected = text === own || (opening && state === 'D')
      const may = intents.mayStillBeIn(call, seen)
      must(may === expected, `${JSON.stringify(seen)}: ${expected ? 'perhaps still in' : 'out of'} call ${call.number}`)
      if (!text.startsWith(BUSY)) return
      const later: SeenThread = [text, stack, state, memory, userUs + 1, 7]
      const faulted: SeenThread = [text, stack, state, memory, userUs, 8]
      must(intents.mayStillBeIn(call, seen), 'a thread is out of its call for no reason')
      must(intents.mayStillBeIn(call, later) === (ring || userUs < 0), 'a thread that has been elsewhere is not')
      must(intents.mayStillBeIn(call, faulted) === ring, 'nor is one that has touched memory')
    }
    for (const own of KNOWN) check(intentsIn(own).of(TID), own)
    check(someCall('open', syscalls['openat']), undefined)
    check(someCall('unknown', 165), undefined)
    must(!intents.mayStillBeIn(someCall('open'), undefined), 'a thread that is gone is in a call')
  },
)

const CALLER = { tid: TID, uid: 60001, gid: 60001 }
const NODE = { mode: 0o060660, uid: 0, gid: make.NODE_GROUP }

/** What is found of a thread's credentials: only what is certain counts against it. */
export const credentials: Surface = single(
  'credentials',
  (c) => c.bytes(5),
  (bytes) => {
    const [uid = 0, gid = 0, capabilities = 0, groups = 0, member = 0] = bytes
    const found: ThreadCredentials | undefined =
      uid % 8 === 7
        ? undefined
        : [
            uid % 4 === 0 ? 0 : 60001,
            gid % 4 === 0 ? 0 : 60001,
            BigInt(capabilities) | (BigInt(groups & 0x20) << 16n),
            groups * 1000,
            member % 2 === 1,
          ]
    const native = {
      credentials: (_: number, __: readonly number[], done: (found: ThreadCredentials | undefined) => void) => done(found),
      readFile: () => -E.ENOENT,
      userNamespace: () => undefined,
    }
    // Nothing is known about the user namespaces; then a capability counts.
    const access = new Access(native)
    for (const purpose of ['open', 'by number', 'unclear'] as const) {
      let may: boolean | undefined
      access.mayOpen(CALLER, NODE, purpose, (answer) => (may = answer))
      const certain = found !== undefined && found[0] === CALLER.uid && found[1] === CALLER.gid && purpose !== 'unclear'
      const can = certain && ((found[4] ?? false) || (found[2] & 6n) !== 0n || (purpose === 'by number' && (found[2] & (1n << 21n)) !== 0n))
      must(may === (!certain || can), `${JSON.stringify(found, big)}: ${may ? 'may' : 'may not'} open`)
    }
  },
)

export const acls: Surface = single('ACLs', make.acl, (bytes) => {
  const inode = { ...NODE, mode: 0o060670, acl: bytes }
  const may = granted(inode, CALLER.uid, new Set([CALLER.gid]))
  const whole = bytes.length >= 4 && bytes.readUInt32LE(0) === 2 && bytes.length % 8 === 4
  must(whole || may, 'what is no ACL refuses somebody')
})

export const closes: Surface = single('inotify', make.inotifyEvents, (bytes) => {
  let readable = () => {}
  const told: string[] = []
  const watch = new CloseWatch({
    native: {
      Poll: class {
        constructor(_: number, ready: () => void) {
          readable = ready
        }
        pause() {}
        resume() {}
        close() {}
      },
      read: (_, into) => bytes.copy(into),
      close: () => 0,
      inotifyAdd() {},
      inotifyRemove: () => 0,
    },
    fd: 5,
    root: -1,
    listener: { closed: (name) => void told.push(name), closedByKernelName: (_, name) => void told.push(name), lost() {} },
    log: quiet,
    fdinfo: () => 'inotify wd:2 ino:d400 sdev:38 mask:8\n',
  })
  readable()
  watch.close()
  must(
    told.every((name) => !name.includes('\0')),
    'a name with more behind it',
  )
})

export const SURFACES: readonly Surface[] = [
  requests(),
  handover,
  state(),
  pinStore,
  names(),
  nodeIds,
  uevents,
  sysfs,
  syscallFiles(),
  threadLooks,
  credentials,
  acls,
  closes,
]
