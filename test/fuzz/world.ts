// SPDX-License-Identifier: MIT
/**
 * The whole daemon from session to pins, with a kernel that it cannot tell from a real one, except
 * that this one sends anything. The rules that must hold in any case are checked here, as answers
 * go out and when all is over.
 */
import { setImmediate as turn, setTimeout as sleep } from 'node:timers/promises'

import { IN_HEADER_SIZE, Opcode, OUT_HEADER_SIZE, UNANSWERED } from '../../src/fuse/wire.js'
import { Access } from '../../src/gate/access.js'
import { Crowd } from '../../src/gate/crowd.js'
import { Daemon } from '../../src/daemon/daemon.js'
import { DeadNames } from '../../src/tree/dead-names.js'
import { DeviceNodes } from '../../src/devices/device-node.js'
import { DM_ID, DM_NAME, parseDiskSeq, type ParsedId, parseId, parseName } from '../../src/devices/names.js'
import { E } from '../../src/util/errno.js'
import { Gate } from '../../src/gate/gate.js'
import { Intents } from '../../src/gate/intent.js'
import type { Logger } from '../../src/util/log.js'
import { native as real, type Native, type SeenThread, STAT } from '../../src/native.js'
import { InodeTable } from '../../src/gate/inode.js'
import { PinOpener } from '../../src/gate/pin.js'
import { PinLifetime } from '../../src/gate/pin-lifetime.js'
import { Registry, type RegistryListener } from '../../src/devices/registry.js'
import { FuseSession, PAYLOAD_MAX } from '../../src/fuse/session.js'
import { SharedState, STATE_SIZE } from '../../src/handover/shared-state.js'
import { Sysfs } from '../../src/devices/sysfs.js'
import { Tree } from '../../src/tree/tree.js'
import { TakenOverPins } from '../../src/gate/taken-over-pins.js'
import { PinStore } from '../../src/handover/pin-store.js'
import { DISKS, DISKSEQ_FIRST, EVENT, NODE_GROUP, PARTITIONS, TID_FIRST, TIDS } from './generators.js'

const FUSE_FD = 3
const S_IFBLK = 0o060000
const S_IFMT = 0o170000
const S_IFDIR = 0o040000
const S_IFLNK = 0o120000
const FUSE_ROOT_ID = 1n
const FUSE_NOTIFY_INVAL_INODE = 2
const FUSE_NOTIFY_PRUNE = 9
/** linux/errno.h; Node.js does not have it. */
const ENOMEDIUM = 123
/** EHWPOISON is the last one. */
const ERRNO_MAX = 133
/** How often {@link World.goOn} goes on. */
const WALKS_MAX = 4
/** A wait longer than this is taken for a hang, in ms. */
const HANG_MS = 15_000

/** Memory of worlds that are over, to be used again: to allocate that much each time costs more than all else. */
const spare: ArrayBuffer[] = []

export function takeMemory(): ArrayBuffer {
  const memory = spare.pop() ?? new ArrayBuffer(STATE_SIZE)
  new Uint8Array(memory).fill(0)
  return memory
}

export interface Message {
  readonly text: Buffer
  /** What the descriptors of a message refer to. */
  readonly files: readonly File[]
}

type File =
  | { readonly kind: 'other' }
  | { readonly kind: 'device'; readonly device: Disk }
  | { readonly kind: 'text'; readonly path: string }
  | { readonly kind: 'socket'; readonly queue: Message[] }

/** A disk or partition. One that takes another's place is another object. */
interface Disk {
  readonly kname: string
  readonly major: number
  readonly minor: number
  readonly partition: number
  diskseq: bigint
  bound: boolean
  removable: boolean
  readonly xattrs: Map<string, Uint8Array>
  /** How its open ends: an errno, or 0. With `mood`, it ends late, never, or as another device. */
  errno: number
  mood: 'prompt' | 'late' | 'never' | 'another'
  /** Replaces what sysfs should show. */
  nonsense?: string
}

const line = (name: string, first: string, second: string, third = '0x0') =>
  `${real.syscalls[name]} ${first} ${second} ${third} 0x0 0x0 0x0 0x7ffd1a2b3c48 0x7f12d4e5a6b7\n`
const RUNNING = 'running\n'
const OPENS = line('openat', '0xffffff9c', '0x7f0000000000', '0x80000')

/** What threads are seen doing. */
const CALLS = [
  OPENS,
  line('newfstatat', '0xffffff9c', '0x7f0000000000', '0x7ffd1a2b3c48'),
  '165 0x7f0000000000 0x7f0000000000 0x0 0x0 0x0 0x0 0x7ffd1a2b3c48 0x7f12d4e5a6b7\n',
  RUNNING,
  '-1 0x7ffd1a2b3c48 0x7f12d4e5a6b7\n',
  'garbage',
  '',
  line('openat', '0xffffff9c', '0x7f0000000000', `0x${real.O_PATH.toString(16)}`),
  line('openat2', '0xffffff9c', '0x7f0000000000', '0x7ffd1a2b3c48'),
  line('mkdirat', '0xffffff9c', '0x7f0000000000', '0x1ff'),
  line('newfstatat', '0xffffff9c', '0x8048000', '0x0'),
  line('name_to_handle_at', '0xffffff9c', '0x7f0000000000', '0x0'),
  line('io_uring_enter', '0x3', '0x1', '0x1'),
  line('ioctl', '0x3', '0x5000940a', '0x7f0000000000'),
]

const STRANGER = 1000

/** Whether a request comes from a user that is surely not allowed to open a disk. */
const isStranger = (request: Buffer) => request.readUInt32LE(24) === STRANGER && request.readUInt32LE(28) === STRANGER

/** Threads' kernel stacks. */
const STACKS = ['[<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e\n', '', '[<0>] link_path_walk+0x1/0x2\n', '[<0>] io_issue_sqe+0x1/0x2\n']

/** A name that the kernel may give a device. */
const KERNEL_NAME = /^(?:loop\d+(?:p\d+)?|sd[a-z]\d*)$/

const isDirectory = (id: bigint) => id === FUSE_ROOT_ID || id === DM_ID || parseId(id)?.kind === 'directory'

/** Whether a name in a directory may have been answered with that id. */
function fits(directory: bigint, name: string, id: bigint): boolean {
  const found = parseId(id)
  if (directory === FUSE_ROOT_ID) {
    if (name === DM_NAME) return id === DM_ID
    const wanted = parseName(name)
    const same = found !== undefined && found.diskseq === wanted?.diskseq && found.partition === wanted.partition
    return same && found.kind !== 'directory' && found.kind !== 'kernel' && wanted.symlink === (found.kind === 'part')
  }
  if (directory === DM_ID)
    return found?.diskseq === parseDiskSeq(name) && (found?.kind === 'directory' || found?.kind === 'waiting') && found.partition === 0
  const parent = parseId(directory)
  return (
    parent?.kind === 'directory' &&
    found?.diskseq === parent.diskseq &&
    ['inode', 'kernel', 'unknown', 'own'].includes(found.kind) &&
    KERNEL_NAME.test(name)
  )
}

/** A request whose answer the kernel waits for. */
interface Waiting {
  readonly opcode: number
  readonly nodeid: bigint
  readonly name: string
  /** The payload that it has room for. */
  readonly room: number
  readonly cookie: bigint
  /** For a caller that is in an open(2) and may open the disk: how much had happened to threads by then. */
  readonly opens: number
  /** Whether it must not be kept waiting, as the kernel may hold a lock for it. */
  readonly atOnce: boolean
  /** The caller's ids, as in its header. */
  readonly caller: Buffer
  /** The name that the caller is on the way to, and how often it has asked for it. */
  readonly walk: { readonly name: string; readonly directory: bigint; readonly times: number } | undefined
}

export interface WorldOptions {
  /** Defences to switch off. */
  readonly session?: typeof FuseSession
  readonly opener?: typeof PinOpener
  /** State that an earlier daemon has left. */
  readonly from?: Legacy
}

/** What a daemon leaves to the next one. */
export interface Legacy {
  readonly memory: ArrayBuffer
  readonly disks: readonly Disk[]
  readonly sockets: readonly Message[][]
  readonly counts: ReadonlyMap<bigint, bigint>
  readonly waiting: ReadonlyMap<bigint, readonly Waiting[]>
  /** Whether its memory has been tampered with: then there may be answers to requests that nobody made. */
  readonly damaged: boolean
}

export class World {
  /** The first rule that was broken. */
  failure: Error | undefined
  readonly memory: ArrayBuffer
  private readonly state: SharedState
  private readonly session: FuseSession
  private readonly inodes = new InodeTable()
  private readonly registry: Registry
  private readonly lifetime: PinLifetime
  private readonly crowd: Crowd
  private readonly dead: DeadNames
  private readonly opener: PinOpener
  private readonly intents: Intents
  private readonly sysfs: Sysfs
  private readonly pinStore: PinStore
  private readonly tree: Tree

  private disks: Disk[] = []
  private readonly files = new Map<number, File>()
  private nextFd = 100
  private nextDiskSeq = DISKSEQ_FIRST
  private nextUnique = 1n << 40n
  private readonly doing: number[] = Array.from({ length: TIDS }, (_, i) => i % 3)
  private turns = 0
  private reads: Uint8Array[] = []
  private ready = () => {}
  private calm = false
  /** Calls that are started only when all comes to its end. */
  private readonly never: (() => void)[] = []
  private writeErrno = 0
  private nodeErrno = 0
  private scanErrno = 0
  /** Whether the kernel forgets what it is told to forget. */
  private forgetful = true
  /** Whether the kernel is too old to be told so. */
  private old = false
  /** Whether looks at threads take for ever. */
  private looksHang = false
  private readonly sockets: Message[][]

  /** The kernel's lookup counts. */
  private readonly counts = new Map<bigint, bigint>()
  private readonly waiting = new Map<bigint, Waiting[]>()
  /** Numbers of requests in memory that was tampered with. */
  private readonly doubtful = new Set<bigint>()

  constructor(private readonly options: WorldOptions = {}) {
    const { from } = options
    this.memory = from?.memory ?? takeMemory()
    this.sockets = from?.sockets.map((queue) => [...queue]) ?? []
    if (from === undefined) {
      for (let i = 0; i < DISKS; i++) this.addDisk(i)
    } else {
      this.disks = from.disks.map((disk) => ({ ...disk }))
      this.nextDiskSeq += 1000n
      this.nextUnique += 1n << 32n
      for (const [id, count] of from.counts) this.counts.set(id, count)
      for (const [unique, waiting] of from.waiting) this.waiting.set(unique, [...waiting])
    }
    const native = this.native()
    const log = this.log()
    const settings = { lingerMs: 1, holdSeconds: from === undefined ? 1 : 0.02, openTimeoutMs: 30, lookupsWait: false }
    const sysfs = (this.sysfs = new Sysfs(native))
    const registry = (this.registry = new Registry(sysfs, log))
    this.state = new SharedState(this.memory)
    if (from?.damaged) this.doubt(this.state)
    this.pinStore = new PinStore({ native, state: this.state, store: () => {}, log })
    const devnodes = new DeviceNodes(native, this.open({ kind: 'other' }))
    const opener = (this.opener = new (options.opener ?? PinOpener)(native, devnodes.directory, this.pinStore))
    const intents = (this.intents = new Intents(native))
    const session = (this.session = new (options.session ?? FuseSession)({ native, fd: FUSE_FD, requests: this.state, log }))
    const { inodes } = this
    const lifetime = (this.lifetime = new PinLifetime({
      native,
      inodes,
      opener,
      intents,
      state: this.state,
      kernel: session,
      options: settings,
      log,
    }))
    const crowd = (this.crowd = new Crowd(session, intents))
    this.dead = new DeadNames(
      (id) => session.prune(id),
      () => lifetime.pruneAll(),
    )
    const access = new Access(native)
    const gate = new Gate({ registry, sysfs, inodes, devnodes, opener, lifetime, intents, access, crowd, options: settings, log })
    this.tree = new Tree({
      registry,
      sysfs,
      inodes,
      devnodes,
      gate,
      crowd,
      lifetime,
      intents,
      whenReady: (_, ready) => ready(),
      takesOver: from !== undefined,
    })
  }

  /** The parts of the daemon that matter here. */
  private daemon(): RegistryListener {
    const { lifetime, inodes, registry, dead, state } = this
    return Object.assign(Object.create(Daemon.prototype) as Daemon, {
      ...{ inodes, registry, dead, transport: this.session },
      answers: { lifetime },
      handOver: { state },
      directories: { appeared() {}, vanished() {} },
    })
  }

  async start(): Promise<void> {
    await this.registry.start()
    this.registry.listener = this.daemon()
    if (this.options.from === undefined) {
      this.session.start(this.tree).catch(() => {})
    } else {
      const { inodes, registry, opener, lifetime, intents, pinStore } = this
      const native = this.native()
      const takenOver = new TakenOverPins({ native, inodes, registry, opener, lifetime, intents, pinStore, holdSeconds: 0.02 })
      const sockets = this.sockets.map((queue) => this.open({ kind: 'socket', queue }))
      for (const pin of pinStore.takeOver(sockets)) takenOver.takeOver(pin)
    }
    this.lifetime.start(this.open({ kind: 'other' }))
    if (this.options.from !== undefined) this.session.resume(this.tree)
  }

  /** One step of an episode, see {@link item}. */
  take(step: Buffer): void {
    if (step[0] === EVENT) this.happen(step)
    else this.receive(step.subarray(1))
  }

  private receive(bytes: Buffer, walk?: Waiting['walk']): void {
    if (bytes.length >= IN_HEADER_SIZE) {
      // No kernel gives a number to two requests at once.
      if (this.waiting.has(bytes.readBigUInt64LE(8))) return
      this.book(bytes, walk)
    }
    this.reads.push(bytes)
    this.ready()
    const late = bytes.length >= IN_HEADER_SIZE ? this.waiting.get(bytes.readBigUInt64LE(8)) : undefined
    if (late?.some(({ atOnce }) => atOnce)) this.wrong('a LOOKUP waits', bytes)
  }

  /** Notes what the kernel knows about a request that it sends. */
  private book(bytes: Buffer, walk?: Waiting['walk']): void {
    const opcode = bytes.readUInt32LE(4)
    const unique = bytes.readBigUInt64LE(8)
    const nodeid = bytes.readBigUInt64LE(16)
    const body = bytes.subarray(IN_HEADER_SIZE)
    const whole = bytes.readUInt32LE(0) === bytes.length
    if (opcode === Opcode.FORGET && whole && body.length >= 8) this.forget(nodeid, body.readBigUInt64LE(0))
    if (opcode === Opcode.BATCH_FORGET && whole && body.length >= 8) {
      const count = body.readUInt32LE(0)
      if (8 + 16 * count <= body.length) {
        for (let at = 8; at < 8 + 16 * count; at += 16) this.forget(body.readBigUInt64LE(at), body.readBigUInt64LE(at + 8))
      }
    }
    if (UNANSWERED.has(opcode)) return
    const end = body.indexOf(0)
    const room = whole && body.length >= 24 ? body.readUInt32LE(16) : 0
    const does = this.threadDoes(bytes.readUInt32LE(32))
    const root = bytes.readUInt32LE(24) === 0
    const waiting = {
      opcode,
      opens: does === OPENS && this.nodeErrno === 0 && !isStranger(bytes) ? this.turns : -1,
      atOnce: root && opcode === Opcode.LOOKUP && does !== RUNNING,
      caller: Buffer.from(bytes.subarray(24, IN_HEADER_SIZE)),
      walk: opcode === Opcode.LOOKUP ? { name: body.toString('latin1', 0, Math.max(0, end)), directory: nodeid, times: 0, ...walk } : walk,
      nodeid,
      name: body.toString('latin1', 0, Math.max(0, end)),
      room: opcode === Opcode.READDIR ? Math.min(room, PAYLOAD_MAX) : PAYLOAD_MAX,
      cookie: whole && body.length >= 16 ? body.readBigUInt64LE(8) : 0n,
    }
    const others = this.waiting.get(unique)
    if (others === undefined) this.waiting.set(unique, [waiting])
    else others.push(waiting)
  }

  /** Notes the numbers of the requests that are in the memory. */
  private doubt(state: SharedState): void {
    const { unanswered } = SharedState.prototype
    state.unanswered = () => {
      const found = unanswered.call(state)
      for (const { message } of found) this.doubtful.add(message.header().unique)
      return found
    }
  }

  private forget(id: bigint, count: bigint): void {
    const left = (this.counts.get(id) ?? 0n) - count
    if (left > 0n) this.counts.set(id, left)
    else this.counts.delete(id)
  }

  /** Checks an answer as fuse_dev_do_write (fs/fuse/dev.c) does, and more. */
  private answered(bytes: Buffer): number {
    if (bytes.length < OUT_HEADER_SIZE || bytes.readUInt32LE(0) !== bytes.length)
      return this.wrong('an answer has another length than it says', bytes)
    if (bytes.length > OUT_HEADER_SIZE + PAYLOAD_MAX) return this.wrong('an answer is too long', bytes)
    const error = bytes.readInt32LE(4)
    const unique = bytes.readBigUInt64LE(8)
    if (unique === 0n && error > 0) return this.notified(error, bytes)
    if (error > 0 || error < -ERRNO_MAX) return this.wrong(`error ${error}`, bytes)
    if (error !== 0 && bytes.length !== OUT_HEADER_SIZE) return this.wrong('an error has a payload', bytes)
    const queue = this.waiting.get(unique)
    const waiting = queue?.shift()
    if (queue?.length === 0) this.waiting.delete(unique)
    if (waiting === undefined) return this.options.from?.damaged ? -E.ENOENT : this.wrong('an answer that nobody waits for', bytes)
    if (this.writeErrno !== 0) {
      const errno = this.writeErrno
      this.writeErrno = 0
      return -errno
    }
    // A request in memory that was tampered with may have the number of another one.
    if (error === 0 && !this.doubtful.has(unique)) this.check(waiting, bytes.subarray(OUT_HEADER_SIZE), bytes)
    return bytes.length
  }

  /** Checks a notification as fuse_notify (fs/fuse/dev.c) does. */
  private notified(code: number, bytes: Buffer): number {
    const body = bytes.subarray(OUT_HEADER_SIZE)
    if (body.length !== 24) return this.wrong(`a notification of ${body.length} bytes`, bytes)
    if (code === FUSE_NOTIFY_INVAL_INODE) {
      const id = body.readBigUInt64LE(0)
      if (!isDirectory(id) && parseId(id)?.kind !== 'inode') return this.wrong('attributes of nothing were taken back', bytes)
      // Never the content: the kernel might wait for another process.
      if (body.readBigInt64LE(8) >= 0n) return this.wrong('content was taken back', bytes)
      return id === FUSE_ROOT_ID || id === DM_ID || this.counts.has(id) ? bytes.length : -E.ENOENT
    }
    if (code !== FUSE_NOTIFY_PRUNE) return this.wrong(`notification ${code}`, bytes)
    if (this.old) return -E.EINVAL
    const id = body.readBigUInt64LE(16)
    if (body.readUInt32LE(0) !== 1 || body.readUInt32LE(4) !== 0 || body.readBigUInt64LE(8) !== 0n)
      return this.wrong('a prune of what?', bytes)
    const kind = parseId(id)?.kind
    if (kind !== 'inode' && kind !== 'directory') return this.wrong('the kernel was told to forget what is no device', bytes)
    if (this.forgetful && !this.calm) setImmediate(() => this.drop(id))
    return bytes.length
  }

  /** The kernel forgets an inode. */
  private drop(id: bigint): void {
    const count = this.counts.get(id)
    if (count === undefined || this.calm) return
    const forget = Buffer.alloc(IN_HEADER_SIZE + 8)
    forget.writeUInt32LE(forget.length, 0)
    forget.writeUInt32LE(Opcode.FORGET, 4)
    forget.writeBigUInt64LE(id, 16)
    forget.writeBigUInt64LE(count, IN_HEADER_SIZE)
    this.receive(forget)
  }

  /** The kernel goes on for a caller that was answered, as it does for open(2), and for symlinks. */
  private goOn({ caller, walk }: Waiting, opcode: number, nodeid: bigint, body: Buffer): void {
    if (walk === undefined || walk.times >= WALKS_MAX || this.calm) return
    const header = Buffer.alloc(IN_HEADER_SIZE - caller.length)
    header.writeUInt32LE(IN_HEADER_SIZE + body.length, 0)
    header.writeUInt32LE(opcode, 4)
    header.writeBigUInt64LE(this.nextUnique, 8)
    header.writeBigUInt64LE(nodeid, 16)
    this.nextUnique += 2n
    const request = Buffer.concat([header, caller, body])
    setImmediate(() => this.calm || this.receive(request, { ...walk, times: walk.times + 1 }))
  }

  /** The length of the payload of a success. */
  private static readonly SIZES: Readonly<Record<number, number>> = {
    [Opcode.LOOKUP]: 128,
    [Opcode.GETATTR]: 104,
    [Opcode.SETATTR]: 104,
    [Opcode.OPENDIR]: 16,
    [Opcode.STATFS]: 80,
    [Opcode.INIT]: 64,
    [Opcode.RELEASEDIR]: 0,
    [Opcode.FSYNCDIR]: 0,
    [Opcode.DESTROY]: 0,
    [Opcode.SETXATTR]: 0,
    [Opcode.REMOVEXATTR]: 0,
  }

  private check(waiting: Waiting, payload: Buffer, bytes: Buffer): void {
    const { opcode, nodeid, name } = waiting
    const size = World.SIZES[opcode]
    if (size !== undefined && payload.length !== size)
      return void this.wrong(`opcode ${opcode} answered with ${payload.length} bytes`, bytes)
    switch (opcode) {
      case Opcode.LOOKUP: {
        const id = payload.readBigUInt64LE(0)
        const parsed = parseId(id)
        if (!fits(nodeid, name, id)) return void this.wrong('a name that is none was found, or under another id', bytes)
        if (isDirectory(id)) return this.checkAttr(id, payload.subarray(40), false, bytes)
        if (parsed === undefined) return
        if (payload.readBigUInt64LE(16) !== 0n || payload.readUInt32LE(32) !== 0) return void this.wrong('a name may be cached', bytes)
        if (payload.readBigUInt64LE(24) !== 0n) return void this.wrong('attributes are valid for long', bytes)
        this.counts.set(id, (this.counts.get(id) ?? 0n) + 1n)
        if (payload.readBigUInt64LE(8) !== BigInt(payload.readUInt32LE(40 + 76)))
          return void this.wrong('an inode is taken for one with another number', bytes)
        const trusted = payload.readUInt32LE(36) !== 0
        if (parsed.kind !== 'inode') this.goOn(waiting, parsed.kind === 'unknown' ? Opcode.GETATTR : Opcode.READLINK, id, Buffer.alloc(16))
        else if (!trusted && this.threadDoes(waiting.caller.readUInt32LE(8)) === OPENS)
          this.goOn(waiting, Opcode.GETATTR, id, Buffer.alloc(16))
        return this.checkAttr(id, payload.subarray(40), trusted, bytes)
      }
      case Opcode.GETATTR: {
        if (!isDirectory(nodeid) && (payload.readBigUInt64LE(0) !== 0n || payload.readUInt32LE(8) !== 0)) {
          return void this.wrong('attributes that were asked for are valid', bytes)
        }
        return this.checkAttr(nodeid, payload.subarray(16), waiting.opens === this.turns, bytes)
      }
      case Opcode.READDIR:
        return this.checkDirents(waiting, payload, bytes)
      case Opcode.READLINK: {
        const text = payload.toString('latin1')
        const link = parseId(nodeid)
        const target = parseName(text)
        if (link?.kind === 'own') {
          const leads = text.startsWith('/dev/') && KERNEL_NAME.test(text.slice('/dev/'.length))
          if (!leads || !this.isPinned(link)) this.wrong("a link leads to a device's own inode that is not pinned", bytes)
          return
        }
        const leads = link?.kind === 'kernel' ? KERNEL_NAME.test(text) : target !== undefined && !target.symlink
        if (!leads) return void this.wrong('a link leads to no name', bytes)
        this.goOn(waiting, Opcode.LOOKUP, waiting.walk?.directory ?? FUSE_ROOT_ID, Buffer.from(`${payload.toString('latin1')}\0`, 'latin1'))
      }
    }
  }

  /** @param opens whether the answer lets the caller open the device: then its pin must stand behind it */
  private checkAttr(id: bigint, attr: Buffer, opens: boolean, bytes: Buffer): void {
    if (isDirectory(id)) {
      const directory = (attr.readUInt32LE(60) & S_IFMT) === S_IFDIR && attr.readBigUInt64LE(0) === id
      return directory ? undefined : void this.wrong('a directory is something else', bytes)
    }
    if (attr.readBigUInt64LE(0) !== id) return void this.wrong('attributes of another inode', bytes)
    const inode = parseId(id)
    const rdev = attr.readUInt32LE(76)
    const type = attr.readUInt32LE(60) & S_IFMT
    const symlink = inode?.kind === 'part' || inode?.kind === 'waiting' || inode?.kind === 'kernel' || inode?.kind === 'own'
    if (type !== (symlink ? S_IFLNK : S_IFBLK)) return void this.wrong(`an inode of type ${type}`, bytes)
    if (inode?.kind !== 'inode') {
      if (rdev !== 0 || (opens && inode?.kind === 'unknown')) this.wrong('what is no device may be opened', bytes)
      return
    }
    // The kernel never changes the number of an inode.
    if (inode.minor !== undefined && inode.minor !== (rdev & 0xff)) return void this.wrong('an inode has the number of another', bytes)
    if (opens && !this.isPinned(inode, rdev)) this.wrong('a caller may open what is not pinned', bytes)
  }

  /** Whether the device is open, with that number if one is given. */
  private isPinned({ diskseq, partition }: ParsedId, rdev?: number): boolean {
    for (const file of this.files.values()) {
      if (file.kind !== 'device') continue
      const { device } = file
      const same = device.diskseq === diskseq && device.partition === partition
      if (same && (rdev === undefined || rdev === ((device.minor & 0xff) | (device.major << 8)))) return true
    }
    return false
  }

  private checkDirents({ room, cookie, nodeid }: Waiting, payload: Buffer, bytes: Buffer): void {
    if (payload.length > room) return void this.wrong('more directory entries than there is room for', bytes)
    let last = cookie
    for (let at = 0; at < payload.length;) {
      const length = payload.readUInt32LE(at + 16)
      const name = payload.toString('latin1', at + 24, at + 24 + length)
      const next = payload.readBigUInt64LE(at + 8)
      if (next <= last) return void this.wrong('directory entries out of order', bytes)
      const known = nodeid === FUSE_ROOT_ID || nodeid === DM_ID ? parseName(name) !== undefined : KERNEL_NAME.test(name)
      if (name !== '.' && name !== '..' && !known) return void this.wrong('a directory entry that is no name', bytes)
      last = next
      at += (24 + length + 7) & ~7
    }
  }

  private wrong(what: string, bytes?: Uint8Array): number {
    const shown = bytes === undefined ? '' : `: ${Buffer.from(bytes.subarray(0, 160)).toString('hex')}`
    this.failure ??= new Error(what + shown)
    return -E.EINVAL
  }

  // What happens to the world.

  private addDisk(i: number): void {
    const diskseq = this.nextDiskSeq++
    const kname = i % 2 === 0 ? `loop${i}` : `sd${String.fromCharCode(97 + i)}`
    const common = { bound: true, errno: 0, mood: 'prompt' as const, removable: i === 3 }
    this.disks.push({ ...common, kname, major: 7, minor: i, partition: 0, diskseq, xattrs: new Map() })
    for (let p = 1; p <= PARTITIONS; p++) {
      const partition = i % 2 === 0 ? `${kname}p${p}` : `${kname}${p}`
      this.disks.push({ ...common, kname: partition, major: 259, minor: 16 * i + p, partition: p, diskseq, xattrs: new Map() })
    }
  }

  private family(i: number): Disk[] {
    const disk = this.disks.find(({ partition, minor }) => partition === 0 && minor === i)
    return this.disks.filter(({ diskseq }) => diskseq === disk?.diskseq)
  }

  private removeDisk(i: number): string[] {
    const family = this.family(i)
    this.disks = this.disks.filter((disk) => !family.includes(disk))
    return family.map(({ kname }) => kname)
  }

  private happen(step: Buffer): void {
    const [, what = 0, a = 0, b = 0, d = 0] = step
    const i = a % DISKS
    const disk = this.disks[a % Math.max(1, this.disks.length)]
    switch (what % 16) {
      case 1:
        return this.registry.changed(new Set(this.removeDisk(i)))
      case 2: {
        const gone = this.removeDisk(i)
        this.addDisk(i)
        return this.registry.changed(new Set([...gone, ...this.family(i).map(({ kname }) => kname)]))
      }
      case 3: {
        // A change of medium, without an event.
        const diskseq = this.nextDiskSeq++
        for (const each of this.family(i)) each.diskseq = diskseq
        return
      }
      case 4:
        if (disk !== undefined) disk.errno = b % 3 === 0 ? 0 : ([E.EIO, E.ENXIO, ENOMEDIUM, E.EBUSY, E.EMFILE][d % 5] as number)
        return
      case 5:
        if (disk !== undefined) disk.mood = (['prompt', 'late', 'never', 'another'] as const)[b % 4] as Disk['mood']
        return
      case 6:
        this.writeErrno = [E.ENOENT, E.ENOENT, E.ENODEV, E.EINVAL][b % 4] as number
        return
      case 7:
        this.nodeErrno = [E.EMFILE, E.ENOENT, E.ENOMEM][b % 3] as number
        return
      case 8:
        this.doing[a % TIDS] = b % CALLS.length
        this.turns++
        return
      case 9:
        if (disk !== undefined) {
          const nonsense = [
            '',
            'DISKSEQ=0\n',
            'MAJOR=x\n',
            '\0'.repeat(99),
            `MAJOR=7\nMINOR=0\nDEVNAME=loop0\nDEVTYPE=disk\nDISKSEQ=${13 + d}\n`,
          ]
          if (b % 2 === 0) delete disk.nonsense
          else disk.nonsense = nonsense[d % nonsense.length] as string
        }
        return
      case 10:
        this.scanErrno = E.EMFILE
        return this.registry.lost()
      case 11:
        return this.registry.changed(new Set([disk?.kname ?? 'x', String.fromCharCode(b, d)]))
      case 12:
        for (const inode of this.inodes) this.lifetime.closedByUser(inode)
        return
      case 13:
        this.looksHang = b % 4 === 0
        return
      case 14:
        this.forgetful = b % 2 === 0
        this.old ||= d % 4 === 0
        return
      case 15:
        if (disk !== undefined) disk.bound = b % 2 === 0
        return
      default:
        return
    }
  }

  // The kernel, as the addon calls it.

  private open(file: File): number {
    const fd = this.nextFd++
    this.files.set(fd, file)
    return fd
  }

  private text(path: string): string | number {
    const proc = /^\/proc\/(\d+)\/(\w+)$/.exec(path)
    if (proc !== null) {
      const i = Number(proc[1]) - TID_FIRST
      if (this.calm || i < 0 || i >= TIDS) return -E.ENOENT
      if (proc[2] === 'syscall') return CALLS[this.doing[i] as number] as string
      if (proc[2] === 'comm') return i === 1 ? '(udev-worker)\n' : 'x\n'
      if (proc[2] === 'stack') return STACKS[i % STACKS.length] as string
      return -E.ENOENT
    }
    const sys = /^\/sys\/class\/block\/([^/]*)\/(.*)$/.exec(path)
    const disk = this.disks.find(({ kname }) => kname === sys?.[1])
    if (disk === undefined) return -E.ENOENT
    if (sys?.[2] === 'uevent') return disk.nonsense ?? ueventText(disk)
    if (sys?.[2] === 'loop/backing_file') return disk.bound ? '/tmp/disk\n' : -E.ENOENT
    return sys?.[2]?.endsWith('removable') ? (disk.removable ? '1\n' : '0\n') : -E.ENOENT
  }

  /** What a thread does; undefined for a thread that is gone. */
  private threadDoes(tid: number): string | undefined {
    const text = this.text(`/proc/${tid}/syscall`)
    return typeof text === 'number' ? undefined : text
  }

  private seen(tid: number): SeenThread | undefined {
    const text = this.threadDoes(tid)
    if (text === undefined) return undefined
    const i = tid - TID_FIRST
    return [text, STACKS[i % STACKS.length] as string, i % 2 === 0 ? 'S' : 'D', i === 5 ? 0 : 0x1000, i === 6 ? this.nextFd : -1, i]
  }

  private fill(into: Uint8Array, text: string | number): number {
    if (typeof text === 'number') return text
    return Buffer.from(text, 'latin1').copy(into)
  }

  private device(fd: number): Disk | undefined {
    const file = this.files.get(fd)
    return file?.kind === 'device' ? file.device : undefined
  }

  private queue(fd: number): Message[] | undefined {
    const file = this.files.get(fd)
    return file?.kind === 'socket' ? file.queue : undefined
  }

  private native(): Native {
    const setReady = (ready: () => void) => (this.ready = ready)
    const byName = (name: string) => this.disks.find(({ kname }) => kname === name)
    const inode = (name: string) => {
      const errno = this.nodeErrno
      this.nodeErrno = 0
      return errno !== 0 ? errno : (byName(name) ?? E.ENOENT)
    }
    const stat = (device: { major: number; minor: number }, into: Float64Array) => {
      into[STAT.MODE] = S_IFBLK | 0o660
      into[STAT.UID] = 0
      into[STAT.GID] = NODE_GROUP
      into[STAT.RDEV_MAJOR] = device.major
      into[STAT.RDEV_MINOR] = device.minor
      return 0
    }
    const calls: Partial<Native> = {
      Poll: class {
        constructor(_: number, ready: () => void) {
          setReady(ready)
        }
        pause() {}
        resume() {}
        close() {
          setReady(() => {})
        }
      },
      read: (_, into) => {
        const next = this.reads.shift()
        if (next === undefined) return -E.EAGAIN
        into.set(next)
        return next.length
      },
      write: (_, from, length) => this.answered(Buffer.from(from.slice(0, length))),
      close: (fd) => {
        if (fd !== FUSE_FD && !this.files.delete(fd)) this.wrong(`descriptor ${fd} was closed, and is not open`)
        return 0
      },
      readFile: (path, into) => this.fill(into, this.text(path)),
      openFile: (path) => {
        const text = this.text(path)
        return typeof text === 'number' ? text : this.open({ kind: 'text', path })
      },
      readAgain: (fd, into) => {
        const file = this.files.get(fd)
        return file?.kind === 'text' ? this.fill(into, this.text(file.path)) : -E.EBADF
      },
      openNode: (_, name) => {
        const device = inode(name)
        return typeof device === 'number' ? -device : this.open({ kind: 'device', device: { ...device, diskseq: 0n } })
      },
      statNode: (_, name, into) => {
        const device = inode(name)
        return typeof device === 'number' ? -device : stat(device, into)
      },
      fstat: (fd, into) => {
        const device = this.device(fd)
        return device === undefined ? -E.EBADF : stat(device, into)
      },
      fchmod: () => 0,
      fchown: () => 0,
      futimens: (_, ...times) => (times.every(Number.isFinite) ? 0 : -E.EINVAL),
      getxattr: (fd, name, into) => {
        const value = this.device(fd)?.xattrs.get(name)
        if (value === undefined) return -E.ENODATA
        if (into.length > 0) into.set(value)
        return value.length
      },
      listxattr: (fd, into) => {
        const names = Buffer.from([...(this.device(fd)?.xattrs.keys() ?? [])].map((name) => `${name}\0`).join(''), 'latin1')
        if (into.length > 0) into.set(names)
        return names.length
      },
      setxattr: (fd, name, value) => {
        if (name === '') return -E.ERANGE
        this.device(fd)?.xattrs.set(name, value)
        return 0
      },
      removexattr: (fd, name) => (this.device(fd)?.xattrs.delete(name) ? 0 : -E.ENODATA),
      makeNodes: () => -E.EPERM,
      openDevice: (_, name, __, ___, ____, done) => {
        const finish = () => {
          const device = byName(name)
          const errno = device === undefined ? E.ENXIO : device.errno
          if (device === undefined || errno !== 0) return done(errno, -1, 0, 0, 0n, '')
          if (device.kname.startsWith('loop') && !device.bound) return done(E.ENXIO, -1, 0, 0, 0n, '')
          const shown = device.mood === 'another' ? (this.disks[0] ?? device) : device
          done(0, this.open({ kind: 'device', device }), device.major, device.minor, shown.diskseq, ueventText(shown))
        }
        const mood = byName(name)?.mood
        if (this.calm || mood === 'prompt' || mood === 'another' || mood === undefined) setImmediate(finish)
        else if (mood === 'late') setTimeout(finish, 5)
        else this.never.push(finish)
      },
      closeDevice: (fd, done) => {
        if (this.device(fd) === undefined || !this.files.delete(fd)) this.wrong(`device ${fd} was closed, and is not open`)
        setImmediate(done)
      },
      diskseq: (fd) => this.device(fd)?.diskseq ?? -E.EBADF,
      scanBlock: (_, done) => {
        const errno = this.scanErrno
        this.scanErrno = 0
        const list =
          errno !== 0
            ? []
            : this.disks.flatMap((disk) => [disk.kname, disk.nonsense ?? ueventText(disk), disk.bound || !disk.kname.startsWith('loop')])
        setImmediate(done, errno, () => list.splice(0), 0)
      },
      readSoon: () => -E.EAGAIN,
      prune: (_, done) => {
        if (this.forgetful) for (const id of this.counts.keys()) setImmediate(() => this.drop(id))
        setImmediate(done, 0)
      },
      lookAtThreads: (threads, done) => {
        const asked = threads.filter((_, i) => i % 2 === 0) as number[]
        const finish = () => done(asked.map((tid) => this.seen(tid)))
        if (this.looksHang && !this.calm) this.never.push(finish)
        else setImmediate(finish)
      },
      credentials: (tid, groups, done) => {
        const i = tid - TID_FIRST
        const nothing = this.calm || i < 0 || i >= TIDS || i === 2
        const capabilities = i === 4 ? 1n << 21n : i === 5 ? 2n : 0n
        setImmediate(
          done,
          nothing
            ? undefined
            : [STRANGER, STRANGER, capabilities, i === 6 ? 65536 : 3, ...groups.map((gid) => i === 3 && gid === NODE_GROUP)],
        )
      },
      setSlice: () => 0,
      userNamespace: (tid) => (tid === TID_FIRST + 5 ? STRANGER + 1 : tid === TID_FIRST + 6 ? -1 : undefined),
      selfSocket: () => this.open({ kind: 'socket', queue: this.addSocket() }),
      sendDescriptors: (fd, text, fds) => {
        const files = fds.map((each) => this.files.get(each))
        if (files.includes(undefined)) this.wrong('a descriptor was sent that is not open')
        this.queue(fd)?.push({ text: Buffer.from(text), files: files as File[] })
        return text.length
      },
      receiveDescriptors: (fd, into, peek) => {
        const queue = this.queue(fd)
        const message = peek ? queue?.[0] : queue?.shift()
        if (message === undefined) return -E.EAGAIN
        return [message.text.copy(into), ...message.files.map((file) => this.open(file))]
      },
      syscalls: real.syscalls,
      O_PATH: real.O_PATH,
      UTIME_NOW: real.UTIME_NOW,
      UTIME_OMIT: real.UTIME_OMIT,
    }
    return calls as Native
  }

  private addSocket(): Message[] {
    const queue: Message[] = []
    this.sockets.push(queue)
    return queue
  }

  /** Malformed requests may be logged. An unexpected error is a failure. */
  private log(): Logger {
    const error = (fields: { err?: unknown }, text?: string) => {
      if (fields.err !== undefined) this.failure ??= new Error(`${text}: ${(fields.err as Error).stack}`)
    }
    return { error, warn() {}, info() {}, debug() {} } as unknown as Logger
  }

  // The end.

  /** Lets the daemon do what waits for the event loop. */
  async step(): Promise<void> {
    await turn()
    await turn()
  }

  private async until(done: () => boolean, what: () => string): Promise<void> {
    const began = performance.now()
    while (!done()) {
      if (performance.now() - began > HANG_MS) throw new Error(`hangs: ${what()}`)
      await sleep(1)
    }
  }

  /** The state that a daemon leaves if it dies now. */
  die(): Legacy {
    const { layout } = real
    const memory = takeMemory()
    // The memory beyond these has not been touched by so few requests.
    for (const [start, size] of [
      [0, layout.STATE_SMALL_AT + 256 * layout.STATE_SMALL_SIZE],
      [layout.STATE_BIG_AT, 4 * layout.STATE_BIG_SIZE],
      [layout.STATE_PINS_AT, 256 * layout.STATE_PIN_SIZE],
    ] as const) {
      new Uint8Array(memory, start, size).set(new Uint8Array(this.memory, start, size))
    }
    return {
      memory,
      disks: this.disks,
      sockets: this.sockets.map((queue) => [...queue]),
      counts: new Map(this.counts),
      waiting: new Map(
        [...this.waiting].map(([unique, waiting]) => [unique, waiting.map((each) => ({ ...each, opens: -1, atOnce: false }))]),
      ),
      damaged: false,
    }
  }

  /** Each request gets an answer, and the kernel forgets all inodes. Then nothing must be left. */
  async end(): Promise<void> {
    this.calm = true
    this.writeErrno = this.nodeErrno = 0
    for (const disk of this.disks) disk.mood = 'prompt'
    const finish = () => this.never.splice(0).forEach((start) => start())
    await this.until(
      () => (finish(), (this.options.from?.damaged ?? false) || this.waiting.size === 0),
      () => `${this.waiting.size} requests without an answer, the first of opcode ${[...this.waiting.values()][0]?.[0]?.opcode}`,
    )
    await this.until(
      () => this.hidden(this.session, 'pending') === 0,
      () => 'requests are pending',
    )
    if (this.options.from === undefined) {
      for (const inode of this.inodes) {
        if (BigInt(inode.nlookup) !== (this.counts.get(inode.id) ?? 0n))
          this.wrong(`inode ${inode.name} counts ${inode.nlookup} lookups, the kernel ${this.counts.get(inode.id)}`)
      }
    }
    for (const inode of this.inodes) if (inode.takenOver) this.counts.set(inode.id, 1n << 40n)
    for (const [id, count] of this.counts) this.tree.forget(id, count)
    await this.until(
      () => (finish(), this.lifetime['hold'](), this.inodes.size === 0 && this.opener.count === 0),
      () => {
        const inodes = [...this.inodes].map(({ name, attempts, pin, nlookup, takenOver }) => ({
          name,
          attempts,
          pinned: pin !== undefined,
          nlookup,
          takenOver,
        }))
        return `left: ${JSON.stringify(inodes)}, ${this.opener.count} devices`
      },
    )
    const left = {
      requests: this.inUse('small') + this.inUse('big'),
      pins: this.options.from?.damaged ? 0 : this.inUse('pins'),
    }
    for (const [what, count] of Object.entries(left)) if (count > 0) this.wrong(`${count} ${what} are left`)
    // Pins without a known caller are released after the hold.
    if (this.options.from !== undefined) await sleep(25)
    this.close()
    await this.step()
    const open = [...this.files.values()].filter(({ kind }) => kind !== 'other')
    if (open.length > 0) this.wrong(`${open.length} descriptors are left: ${open.map(({ kind }) => kind)}`)
    if (this.failure !== undefined) throw this.failure
  }

  close(): void {
    this.calm = true
    this.never.splice(0).forEach((start) => start())
    this.lifetime.close()
    this.crowd.close()
    this.dead.close()
    this.intents.close()
    this.registry.close()
    this.sysfs.close()
    this.session.close()
    this.pinStore.close()
  }

  /** Its memory is not used any more. */
  recycle(): void {
    spare.push(this.memory)
  }

  private hidden(of: object, field: string): number {
    return (of as Record<string, { size: number }>)[field]?.size ?? 0
  }

  private inUse(field: string): number {
    return (this.state as unknown as Record<string, { inUse(): number[] }>)[field]?.inUse().length ?? 0
  }
}

function ueventText({ kname, major, minor, diskseq, partition }: Disk): string {
  const type = partition === 0 ? 'DEVTYPE=disk' : `DEVTYPE=partition\nPARTN=${partition}`
  return `MAJOR=${major}\nMINOR=${minor}\nDEVNAME=${kname}\n${type}\nDISKSEQ=${diskseq}\n`
}
