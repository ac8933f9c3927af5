// SPDX-License-Identifier: MIT
/**
 * The FUSE session on /dev/fuse: reads requests, calls the tree, writes one
 * answer to each. It knows the protocol and nothing about disks.
 */
import {
  FUSE_MAJOR,
  FUSE_MINOR_MIN,
  IN_HEADER_SIZE,
  type InHeader,
  InitFlag,
  Message,
  OUT_HEADER_SIZE,
  Opcode,
  ReplyBuffer,
  SetattrValid,
  type Attr,
  type Entry,
  UNANSWERED,
  type Validity,
} from './wire.js'
import { monotonicMs } from '../util/clock.js'
import { E, errnoName } from '../util/errno.js'
import { FairQueue } from './fair-queue.js'
import type { Logger } from '../util/log.js'
import type { Native, Poll } from '../native.js'
import { BusyPoll, WAIT_US } from './busy-poll.js'
import { Metrics } from './metrics.js'
import type { RequestStore } from './request-store.js'
import { WireLog } from './wire-log.js'
import type { AttrChange, KernelCache, Reply, Transport, TreeOperations } from './transport.js'

/** What FUSE_WRITE may carry. Nothing here is written to; the kernel insists on a page. */
const MAX_WRITE = 4096

/** Answers are at most a directory listing of 32 pages, or a list of xattrs. */
export const PAYLOAD_MAX = 128 * 1024

/**
 * How many daemons may die with the same request unanswered before that request is blamed, and
 * refused.
 */
const TRIES_MAX = 5
/**
 * After a daemon has served for this long, ms, the requests it took over count as harmless: a later crash is
 * not blamed on them.
 */
const TRIAL_MS = 50

/** After so many ticks, ms each, without a request there is no caller left in a mount that is gone; and the most that are waited for. */
const QUIET_TICK_MS = 50
const QUIET_TICKS = 3
const QUIET_TICKS_MAX = 20

/** Requests handled in one turn of the event loop. */
const BATCH = 64

/** How long one turn of the event loop may last while requests keep coming, ms. */
const ROUND_MS = 1

/** Requests that may wait for their turn; any more are answered as they come. */
const WAITING_MAX = 2048

/** fuse_setattr_in, 88 bytes */
const SETATTR_IN_SIZE = 88

/** The smallest body that each handler accepts; anything shorter is refused with EIO. */
const BODY_MIN: Readonly<Record<number, number>> = {
  [Opcode.LOOKUP]: 1,
  [Opcode.FORGET]: 8,
  [Opcode.SETATTR]: SETATTR_IN_SIZE,
  [Opcode.SETXATTR]: 8,
  [Opcode.GETXATTR]: 8,
  [Opcode.LISTXATTR]: 8,
  [Opcode.REMOVEXATTR]: 1,
  [Opcode.INIT]: 16,
  [Opcode.READDIR]: 24,
  [Opcode.RELEASEDIR]: 8,
  [Opcode.INTERRUPT]: 8,
  [Opcode.BATCH_FORGET]: 8,
}

/** Requests that would change the shape of the tree: refused to everybody. */
const SHAPE_CHANGES: ReadonlySet<number> = new Set([
  Opcode.SYMLINK,
  Opcode.MKNOD,
  Opcode.MKDIR,
  Opcode.RMDIR,
  Opcode.RENAME,
  Opcode.RENAME2,
  Opcode.LINK,
  Opcode.CREATE,
  Opcode.TMPFILE,
])

/** The answer to one request. Sending it frees the request's slot. */
class SessionReply implements Reply {
  answered = false
  /** Where the request is stored while it waits. */
  slot = -1
  private listener: (() => void) | undefined
  private interrupted = false

  private readonly began = monotonicMs()

  constructor(
    private readonly session: FuseSession,
    private readonly unique: bigint,
    private readonly opcode: number,
  ) {}

  entry(entry: Entry): boolean {
    return this.send(0, this.session.out.entry(entry))
  }
  attr(attr: Attr, valid: Validity): boolean {
    return this.send(0, this.session.out.attr(attr, valid))
  }
  open(handle: bigint): boolean {
    return this.send(0, this.session.out.open(handle))
  }
  data(bytes: Uint8Array): void {
    this.send(0, this.session.out.data(bytes))
  }
  xattrSize(size: number): void {
    this.send(0, this.session.out.xattrSize(size))
  }
  statfs(nameLength: number): void {
    this.send(0, this.session.out.statfs(nameLength))
  }
  init(flags: number): void {
    this.send(0, this.session.out.init(flags, MAX_WRITE))
  }
  ok(): void {
    this.send(0, 0)
  }
  error(errno: number): void {
    this.send(errno, 0)
  }
  onInterrupt(listener: () => void): void {
    this.listener = listener
    if (this.interrupted) listener()
  }
  interrupt(): void {
    if (this.interrupted) return
    this.interrupted = true
    this.session.requests.interrupt(this.slot)
    this.listener?.()
  }

  private send(error: number, payload: number): boolean {
    if (this.answered) throw new Error('a request was answered twice')
    this.answered = true
    const taken = this.session.send(this.unique, error, payload)
    this.session.requests.drop(this.slot)
    this.session.metrics.answer(this.opcode, error, monotonicMs() - this.began)
    return taken
  }
}

/** A request that was read, and waits for its user's turn. */
interface Waiting {
  readonly unique: bigint
  readonly slot: number
  readonly length: number
  interrupted: boolean
}

export interface FuseSessionParts {
  readonly native: Calls
  /** /dev/fuse, non-blocking, already given to mount(2); owned from now on. */
  readonly fd: number
  /** Stores requests for a daemon that takes over. */
  readonly requests: RequestStore
  readonly log: Logger
}

type Calls = Pick<Native, 'Poll' | 'read' | 'readSoon' | 'write' | 'close'>

/**
 * Reads requests, has them answered in turns, and writes the answers. Buffers, slots and the order of requests are one
 * state: half of it in another class would be reached into for each request, where every microsecond counts.
 */
export class FuseSession implements Transport, KernelCache {
  /** Shared by all answers: each is written before the next is begun. */
  readonly out = new ReplyBuffer(OUT_HEADER_SIZE + PAYLOAD_MAX)
  readonly ended: Promise<void>
  readonly metrics = new Metrics()

  /** Requests read and not yet answered, for FUSE_INTERRUPT. */
  private readonly pending = new Map<bigint, SessionReply>()
  /**
   * Requests of users; root's are answered first, so that no user can delay them. LOOKUPs come before other
   * requests: while one waits, its caller may hold the directory's lock, and root
   * may wait for that lock.
   */
  private readonly lookups = new FairQueue<Waiting>()
  private readonly waiting = new FairQueue<Waiting>()
  private readonly busyPoll = new BusyPoll()
  private readonly native: Calls
  private fd: number
  readonly requests: RequestStore
  private readonly log: Logger
  private readonly wireLog: WireLog | undefined
  /** Whether the kernel can be told to forget one inode, as far as is known. */
  private prunes = true
  private turn: NodeJS.Immediate | undefined
  /** Requests read so far. */
  private taken = 0
  private trial: NodeJS.Timeout | undefined
  private operations: TreeOperations | undefined
  private poll: Poll | undefined
  private started: { resolve: () => void; reject: (error: Error) => void } | undefined
  private end!: () => void

  constructor({ native, fd, requests, log }: FuseSessionParts) {
    this.native = native
    this.fd = fd
    this.requests = requests
    this.log = log
    this.wireLog = WireLog.of(log)
    this.ended = new Promise((resolve) => {
      this.end = resolve
    })
  }

  start(operations: TreeOperations): Promise<void> {
    this.operations = operations
    return new Promise((resolve, reject) => {
      this.started = { resolve, reject }
      this.poll = new this.native.Poll(this.fd, () => this.readable())
    })
  }

  /**
   * Goes on where an earlier daemon ended: answers the requests it had read, and serves.
   * The kernel has already agreed on the protocol with that daemon.
   */
  resume(operations: TreeOperations): void {
    this.operations = operations
    for (const { message, slot, tries, interrupted } of this.requests.unanswered()) {
      this.replay(message, slot, tries, interrupted)
    }
    operations.turnEnds()
    this.poll = new this.native.Poll(this.fd, () => this.readable())
    this.trial = setTimeout(() => this.requests.resetTries(), TRIAL_MS)
  }

  private replay(message: Message, slot: number, tries: number, interrupted: boolean): void {
    const header = message.header()
    if (tries > TRIES_MAX) {
      this.log.error({ opcode: header.opcode, tries }, 'daemons end in the middle of a request; it is refused')
      if (!UNANSWERED.has(header.opcode)) this.send(header.unique, E.EIO, 0)
      return this.requests.drop(slot)
    }
    if (UNANSWERED.has(header.opcode)) this.requests.drop(slot) // as in handle()
    const reply = this.handle(message, UNANSWERED.has(header.opcode) ? -1 : slot)
    if (interrupted) reply?.interrupt()
  }

  /** Reads no more requests. */
  pause(): void {
    this.poll?.close()
    this.poll = undefined
    clearImmediate(this.turn)
    this.turn = undefined
    clearTimeout(this.trial)
  }

  /** As {@link pause}; the next daemon answers what is left, and blames no crash on it. */
  pauseForHandOver(): void {
    this.pause()
    this.requests.resetTries()
  }

  /** Undoes {@link pause} or {@link pauseForHandOver}, if no other daemon has read requests. */
  goOn(): void {
    this.poll = new this.native.Poll(this.fd, () => this.readable())
    this.turn = setImmediate(() => this.again())
  }

  /**
   * For a mount that is gone: resolves when no request is under way and none comes any more. A caller that had walked
   * into the mount before still asks, and would fail with ECONNABORTED. A process that asks on and on, by a
   * directory that it has open there, is not waited for for ever.
   */
  whenQuiet(): Promise<void> {
    let before = -1
    let quiet = 0
    let ticks = 0
    return new Promise((resolve) => {
      const timer = setInterval(() => {
        quiet = this.taken === before && this.pending.size === 0 ? quiet + 1 : 0
        before = this.taken
        if (quiet < QUIET_TICKS && ++ticks < QUIET_TICKS_MAX && this.fd >= 0) return
        clearInterval(timer)
        resolve()
      }, QUIET_TICK_MS)
    })
  }

  close(): void {
    if (this.fd < 0) return
    this.pause()
    this.native.close(this.fd)
    this.fd = -1
    this.pending.clear()
    this.lookups.clear()
    this.waiting.clear()
    this.started?.reject(new Error('the FUSE connection was closed before it was ready'))
    this.started = undefined
    this.end()
  }

  /**
   * Reads what there is, then answers one request that waits. While LOOKUPs wait it goes on: a LOOKUP and
   * another request in turns, each after reading again, so that root is
   * answered first.
   */
  private readable(): void {
    const end = monotonicMs() + ROUND_MS
    for (let first = this.lookups; ; first = first === this.lookups ? this.waiting : this.lookups) {
      this.take()
      if (this.poll === undefined) break
      const next = first.take() ?? this.lookups.take() ?? this.waiting.take()
      if (next === undefined) break
      const reply = this.handle(new Message(this.requests.stored(next.slot, next.length), next.length), next.slot)
      if (next.interrupted) reply?.interrupt()
      if (this.lookups.size === 0 || monotonicMs() >= end) break
    }
    this.operations?.turnEnds()
    // The rest after other events have been handled, of disks that were opened, for example.
    if (this.queued > 0) this.turn ??= setImmediate(() => this.again())
  }

  private get queued(): number {
    return this.lookups.size + this.waiting.size
  }

  private again(): void {
    this.turn = undefined
    this.readable()
  }

  private take(): void {
    const end = monotonicMs() + ROUND_MS
    for (let i = 0; i < BATCH && this.poll !== undefined; i++) {
      let n = this.native.read(this.fd, this.requests.landing)
      let alone = i === 0 && this.queued === 0
      if (n === -E.EAGAIN && this.queued === 0) {
        n = this.await(end)
        alone = true
      }
      if (n >= 0) {
        this.taken++
        const message = new Message(this.requests.landing, n)
        if (alone || !this.mayWait(message)) this.handle(message)
        this.requests.clear()
        continue
      }
      switch (-n) {
        case E.EAGAIN:
          return
        case E.EINTR:
        case E.ENOENT: // the request was interrupted before it was read
          continue
        case E.ENODEV: // unmounted, or aborted
          this.close()
          return
        default:
          this.log.error({ errno: errnoName(n) }, 'reading /dev/fuse failed; the tree ends here')
          this.close()
          return
      }
    }
  }

  /** Polls for the next request, and for disks that are being opened, before the event loop sleeps. */
  private await(end: number): number {
    const { busyPoll } = this
    const began = monotonicMs()
    if (began >= end) return -E.EAGAIN
    const pays = busyPoll.pays()
    const n = this.native.readSoon(this.fd, this.requests.landing, WAIT_US, pays)
    if (pays && n !== -E.EINTR) busyPoll.waited(n >= 0, monotonicMs() - began)
    return n
  }

  /** Queues a request, unless it is root's or one that takes no answer. */
  private mayWait(message: Message): boolean {
    if (message.length < IN_HEADER_SIZE || message.uid === 0 || this.queued >= WAITING_MAX) return false
    const { uid, opcode, unique } = message.header()
    if (UNANSWERED.has(opcode)) return false
    const slot = this.requests.store(message.bytes.subarray(0, message.length))
    if (slot < 0) return false
    const queue = opcode === Opcode.LOOKUP ? this.lookups : this.waiting
    queue.add(uid, { unique, slot, length: message.length, interrupted: false })
    return true
  }

  /** FUSE_INTERRUPT: the caller of a request wants to give up. */
  private interrupt(unique: bigint): void {
    const reply = this.pending.get(unique)
    if (reply !== undefined) return reply.interrupt()
    // Neither: it was answered already, as the kernel sends a request before its interrupt.
    const isIt = (request: Waiting) => request.unique === unique
    const waiting = this.waiting.find(isIt) ?? this.lookups.find(isIt)
    if (waiting === undefined) return
    waiting.interrupted = true
    this.requests.interrupt(waiting.slot)
  }

  /** Writes the header and sends what {@link out} holds. */
  send(unique: bigint, error: number, payload: number): boolean {
    this.pending.delete(unique)
    if (this.fd < 0) return false
    const n = this.native.write(this.fd, this.out.bytes, this.out.header(unique, error, payload))
    this.wireLog?.answer(unique, error, n)
    if (n >= 0) return true
    // ENOENT: the caller is gone. ENODEV: the mount is.
    if (n !== -E.ENOENT && n !== -E.ENODEV) {
      this.log.error({ errno: errnoName(n), unique: String(unique) }, 'the kernel refused an answer')
    }
    return false
  }

  /** See {@link KernelCache}. The kernel answers whether it has the inode. */
  invalidate(nodeid: bigint): boolean {
    if (this.fd < 0) return false
    const n = this.native.write(this.fd, this.out.bytes, this.out.invalidateInode(nodeid))
    this.wireLog?.notify('INVAL_INODE', nodeid, n)
    return n !== -E.ENOENT
  }

  /** See {@link KernelCache}. An older kernel says EINVAL. */
  prune(nodeid: bigint): boolean {
    if (!this.prunes || this.fd < 0) return false
    const n = this.native.write(this.fd, this.out.bytes, this.out.pruneInode(nodeid))
    this.wireLog?.notify('PRUNE', nodeid, n)
    this.prunes = n !== -E.EINVAL
    return this.prunes
  }

  /**
   * Everything that arrives on the descriptor. Public for tests of malformed requests.
   *
   * @param slot where the request is kept, if it is
   * @returns the reply that is still to be given
   */
  handle(message: Message, slot = -1): SessionReply | undefined {
    if (message.length < IN_HEADER_SIZE) {
      this.log.error({ length: message.length }, 'a FUSE request without a whole header was dropped')
      return undefined
    }
    const header = message.header()
    this.metrics.request(header.opcode)
    this.wireLog?.request(header, message, !UNANSWERED.has(header.opcode))
    const reply = new SessionReply(this, header.unique, header.opcode)
    reply.slot = slot
    // Not twice: what is forgotten twice may be forgotten too early.
    if (UNANSWERED.has(header.opcode)) this.requests.clear()
    try {
      if (header.length !== message.length || message.bodySize < (BODY_MIN[header.opcode] ?? 0)) {
        throw new MalformedRequest(header, message.length)
      }
      this.dispatch(header, message, reply)
    } catch (error) {
      if (!(error instanceof MalformedRequest)) {
        this.log.error({ err: error, opcode: header.opcode }, 'a request failed unexpectedly')
      } else {
        this.log.error({ opcode: header.opcode, length: message.length }, error.message)
      }
      if (!reply.answered && !UNANSWERED.has(header.opcode)) reply.error(E.EIO)
    }
    if (reply.answered || UNANSWERED.has(header.opcode)) return undefined
    this.pending.set(header.unique, reply)
    if (reply.slot < 0) reply.slot = this.requests.store(message.bytes.subarray(0, message.length))
    return reply
  }

  private dispatch(header: InHeader, message: Message, reply: SessionReply): void {
    const { opcode, nodeid } = header
    if (opcode === Opcode.INIT) return this.init(message, reply)
    const operations = this.operations
    if (operations === undefined) return reply.error(E.EIO)
    switch (opcode) {
      case Opcode.LOOKUP:
        return operations.lookup(header, nodeid, text(header, message, 0), reply)
      case Opcode.GETATTR:
        return operations.getattr(header, nodeid, reply)
      case Opcode.FORGET:
        return operations.forget(nodeid, message.u64(0))
      case Opcode.BATCH_FORGET: {
        const count = message.u32(0)
        if (8 + count * 16 > message.bodySize) throw new MalformedRequest(header, message.length)
        for (let i = 0; i < count; i++) {
          operations.forget(message.u64(8 + i * 16), message.u64(16 + i * 16))
        }
        return
      }
      case Opcode.INTERRUPT:
        return this.interrupt(message.u64(0))
      case Opcode.SETATTR:
        return operations.setattr(header, nodeid, attrChange(message), reply)
      case Opcode.READLINK:
        return operations.readlink(header, nodeid, reply)
      case Opcode.OPENDIR:
        return operations.opendir(nodeid, reply)
      case Opcode.READDIR:
        return operations.readdir(nodeid, message.u64(8), Math.min(message.u32(16), PAYLOAD_MAX), reply)
      case Opcode.RELEASEDIR:
      case Opcode.FSYNCDIR:
        return reply.ok()
      case Opcode.STATFS:
        return operations.statfs(reply)
      case Opcode.GETXATTR:
        return operations.getxattr(header, nodeid, text(header, message, 8), message.u32(0), reply)
      case Opcode.LISTXATTR:
        return operations.listxattr(header, nodeid, message.u32(0), reply)
      case Opcode.SETXATTR: {
        const size = message.u32(0)
        const name = text(header, message, 8)
        const at = 8 + name.length + 1
        if (at + size > message.bodySize) throw new MalformedRequest(header, message.length)
        return operations.setxattr(header, nodeid, name, message.data(at, size), message.u32(4), reply)
      }
      case Opcode.REMOVEXATTR:
        return operations.removexattr(header, nodeid, text(header, message, 0), reply)
      case Opcode.UNLINK:
        return operations.unlink(header, reply)
      case Opcode.DESTROY:
        return reply.ok()
      default:
        return reply.error(SHAPE_CHANGES.has(opcode) ? E.EPERM : E.ENOSYS)
    }
  }

  private init(message: Message, reply: SessionReply): void {
    const major = message.u32(0)
    const minor = message.u32(4)
    const flags = message.u32(12)
    const wanted = InitFlag.PARALLEL_DIROPS | InitFlag.POSIX_ACL
    if (major > FUSE_MAJOR) {
      // The kernel asks again with the version it is told.
      return reply.init(0)
    }
    if (major < FUSE_MAJOR || minor < FUSE_MINOR_MIN || (flags & wanted) !== wanted) {
      reply.error(E.EPROTO)
      this.started?.reject(new Error(`the kernel's FUSE protocol ${major}.${minor} is too old for diskseqfs`))
    } else {
      reply.init(wanted)
      this.started?.resolve()
    }
    this.started = undefined
  }
}

class MalformedRequest extends Error {
  constructor(header: InHeader, length: number) {
    super(`malformed FUSE request: opcode ${header.opcode}, header says ${header.length} bytes, ${length} read`)
  }
}

function text(header: InHeader, message: Message, offset: number): string {
  const value = message.bodySize > offset ? message.string(offset) : undefined
  if (value === undefined) throw new MalformedRequest(header, message.length)
  return value
}

function attrChange(message: Message): AttrChange {
  const valid = message.u32(0)
  const time = (set: number, now: number, seconds: number, ns: number) => {
    if ((valid & set) === 0) return undefined
    return (valid & now) !== 0 ? ('now' as const) : ([message.i64(seconds), message.u32(ns)] as const)
  }
  const atime = time(SetattrValid.ATIME, SetattrValid.ATIME_NOW, 32, 56)
  const mtime = time(SetattrValid.MTIME, SetattrValid.MTIME_NOW, 40, 60)
  return {
    ...((valid & SetattrValid.MODE) !== 0 && { mode: message.u32(68) }),
    ...((valid & SetattrValid.UID) !== 0 && { uid: message.u32(76) }),
    ...((valid & SetattrValid.GID) !== 0 && { gid: message.u32(80) }),
    ...((valid & SetattrValid.SIZE) !== 0 && { size: true }),
    ...(atime !== undefined && { atime }),
    ...(mtime !== undefined && { mtime }),
  }
}
