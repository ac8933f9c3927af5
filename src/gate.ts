/**
 * The gate: may this caller have this node now? A caller that opens gets an
 * answer only while the daemon itself holds that very device open, verified on
 * the descriptor; one that inspects gets what sysfs and /dev show, and opens
 * nothing.
 */
import { Access } from './access.js'
import { monotonicMs } from './clock.js'
import type { DeviceNodes, NodeStat } from './devnode.js'
import { E, errnoName, Exhausted } from './errno.js'
import { type Call, type Intents, RUNNING } from './intent.js'
import { type Logger, LogLimit } from './log.js'
import type { Node, NodeTable, Opening } from './node.js'
import type { Pin, PinOpener, PinResult } from './pin.js'
import type { Reaper } from './reaper.js'
import type { Registry } from './registry.js'
import { type Device, sameDevice, type Sysfs } from './sysfs.js'
import type { Caller } from './transport.js'

/** The gate's answer. `stat` and `device` belong together; pinned: the number stays that device's. */
export type Verdict =
  | { readonly device: Device; readonly stat: NodeStat; readonly pinned: boolean }
  /** The disk is slow: have the caller wait where it holds up nobody, see {@link Gate.settle}. */
  | { readonly later: true }
  | { readonly errno: number }

/** A request at the gate. */
export interface Attempt {
  readonly caller: Caller
  readonly node: Node
  /**
   * `lookup`: the kernel asks for the name. It may hold the directory's lock,
   * so no disk is waited for here for long. A caller in open(2) is asked for
   * again, for the attributes, without that lock, and waits there; any other
   * is sent away to come again.
   * `getattr`: it asks for the attributes of an inode it has.
   * `change`: owner, mode or times are to be set, through a pin.
   */
  readonly kind: 'lookup' | 'getattr' | 'change'
  /** Tells how the gate can be told that the caller gives up. */
  readonly onInterrupt: (listener: () => void) => void
  /** @returns false where nobody was left to take a device */
  readonly done: (verdict: Verdict) => boolean
  /** Monotonic ms: until when the caller is given time to go to sleep. */
  asleepBy?: number
  /** Monotonic ms: until when there may be a descriptor again. */
  spareBy?: number
}

export interface GateOptions {
  /** How long a caller waits for a disk that does not answer, ms. */
  readonly openTimeoutMs: number
  /** How long a LOOKUP waits for the disk before the wait goes on where no lock is held, ms. */
  readonly lookupPatienceMs: number
}

export const LOOKUP_PATIENCE_MS = 10

/**
 * How long a caller that does not sleep yet is waited for, ms, and how often it
 * is looked at. It lacks nothing: it has no processor to go on with.
 */
const RUNNING_MAX_MS = 500
const RUNNING_LOOK_MS = 1

/**
 * For how long an attempt is made again where there is no descriptor left, ms, and
 * how often: who opens one disk after another is faster than their pins end.
 */
const EXHAUSTED_MAX_MS = 20
const EXHAUSTED_LOOK_MS = 2

/** A signal ends a wait for a disk when it has lasted this long, ms: not each SIGCHLD is meant for us. */
const INTERRUPT_AFTER_MS = 100
const HUNG = 'the disk did not answer; is it hung?'
/** A name may be given to another number (a new partition table) while it is being opened; not for ever. */
const ATTEMPTS_MAX = 4

export class Gate {
  private readonly refusals: LogLimit

  constructor(
    private readonly registry: Registry,
    private readonly sysfs: Sysfs,
    private readonly nodes: NodeTable,
    private readonly devnodes: DeviceNodes,
    private readonly opener: PinOpener,
    private readonly reaper: Reaper,
    private readonly intents: Intents,
    private readonly access: Access,
    private readonly options: GateOptions,
    private readonly log: Logger,
  ) {
    this.refusals = new LogLimit((suppressed) => {
      log.warn({ suppressed }, 'more opens were refused than are logged')
    })
  }

  admit(attempt: Attempt): void {
    attempt.node.attempts++
    this.step(attempt, () => this.decide(attempt, 1))
  }

  /** One step of an attempt: whatever begins on the event loop begins here. */
  private step(attempt: Attempt, take: () => void): void {
    try {
      take()
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      // Of the files that are kept open for speed, none is needed.
      this.intents.close()
      this.sysfs.close()
      attempt.spareBy ??= monotonicMs() + EXHAUSTED_MAX_MS
      if (monotonicMs() < attempt.spareBy) {
        setTimeout(() => this.step(attempt, () => this.decide(attempt, 1)), EXHAUSTED_LOOK_MS)
        return
      }
      if (this.refusals.take()) this.log.error({ errno: errnoName(error.errno) }, 'out of resources')
      this.finish(attempt, { errno: E.EIO })
    }
  }

  private decide(attempt: Attempt, tries: number): void {
    const device = this.registry.find(attempt.node.name)
    if (device !== undefined) return this.admitDevice(attempt, device, tries)
    this.registry.findSlowly(attempt.node.name, attempt.node.diskseq, (found) => {
      this.step(attempt, () => {
        if (typeof found === 'object') return this.admitDevice(attempt, found, tries)
        if (found !== 0) throw new Exhausted(found)
        this.refuse(attempt, this.intents.of(attempt.caller.tid), E.ENOENT, 'no such disk (any more)')
      })
    })
  }

  private admitDevice(attempt: Attempt, device: Device, tries: number): void {
    const { node, caller } = attempt
    const call = this.intents.of(caller.tid)
    if (call === RUNNING && attempt.kind !== 'change') {
      attempt.asleepBy ??= monotonicMs() + RUNNING_MAX_MS
      if (monotonicMs() < attempt.asleepBy) {
        setTimeout(() => this.step(attempt, () => this.decide(attempt, tries)), RUNNING_LOOK_MS)
        return
      }
    }
    const opens = attempt.kind === 'change' || call.intent !== 'inspect'
    if (!opens) return this.inspect(attempt, call, device, tries)
    if (attempt.kind !== 'change' && !this.mayOpen(caller, node, device)) {
      // The kernel is about to refuse. It would do so by attributes that may
      // change before it looks at them, so say it here.
      if (attempt.kind === 'getattr' && call.intent === 'open') return void this.finish(attempt, { errno: E.EACCES })
      return this.inspect(attempt, call, device, tries)
    }
    // The inode has another number than the name has now; it is never
    // updated. The kernel looks the name up again.
    if (attempt.kind === 'getattr' && !this.inodeIs(node, device)) {
      return void this.finish(attempt, { errno: E.ESTALE })
    }
    const pin = node.pin
    if (pin !== undefined) {
      if (sameDevice(pin.device, device) && this.opener.current(pin)) {
        // Only an open asks a drive whether its medium is another one
        // (disk_clear_events, 6.18); a pin that is open already does not learn of it.
        if (this.removable(node, device)) return this.wait(attempt, call, device, tries)
        return this.admitPinned(attempt, call, pin)
      }
      this.reaper.unpin(node)
      this.registry.refresh(device.kname)
      return this.again(attempt, call, tries, 'its diskseq changed')
    }
    this.wait(attempt, call, device, tries)
  }

  /** Looked at when an open finds a pin: the first open of a disk need not wait for it. */
  private removable(node: Node, device: Device): boolean {
    return (node.removable ??= this.sysfs.removable(device))
  }

  /** Which number an earlier daemon gave a partition's inode is not known; that of a disk never changes. */
  private inodeIs(node: Node, device: Device): boolean {
    if (node.last !== undefined) return sameDevice(node.last.device, device)
    return !node.inherited || node.partition === 0
  }

  private admitPinned(attempt: Attempt, call: Call, pin: Pin): void {
    const { node } = attempt
    const stat = this.devnodes.stat(pin.fd)
    node.last = { device: pin.device, stat }
    this.reaper.answering(node, attempt.caller, call)
    const taken = this.finish(attempt, { device: pin.device, stat, pinned: true })
    if (!taken) this.reaper.notAnswered(node, attempt.caller)
    else if (node.known) this.reaper.answered(node, attempt.caller, call)
  }

  /** Answers without opening anything. */
  private inspect(attempt: Attempt, call: Call, device: Device, tries: number): void {
    const stat = this.sysfs.shows(device) ? this.devnodes.statOf(device) : undefined
    if (stat === undefined) {
      this.registry.refresh(device.kname)
      return this.again(attempt, call, tries, 'it is gone')
    }
    this.reaper.inspected()
    if (attempt.kind === 'lookup') attempt.node.last = { device, stat }
    this.finish(attempt, { device, stat, pinned: false })
  }

  /** The device was not what its name says: answer as for a name nobody has, if so it is. */
  private again(attempt: Attempt, call: Call, tries: number, reason: string): void {
    if (tries < ATTEMPTS_MAX) return this.decide(attempt, tries + 1)
    this.refuse(attempt, call, E.ENOENT, reason)
  }

  private mayOpen(caller: Caller, node: Node, device: Device): boolean {
    if (caller.uid === 0) return true
    const check = (fd: number, { mode, uid, gid }: NodeStat) => {
      const acl = this.devnodes.acl(fd)
      return this.access.mayOpen(caller, { mode, uid, gid, ...(acl !== undefined && { acl }) })
    }
    const pin = node.pin
    if (pin !== undefined) return check(pin.fd, this.devnodes.stat(pin.fd))
    return this.devnodes.with(device, check) ?? true
  }

  /**
   * Waits for the device to be opened, with all others who do.
   *
   * @param any whether it may have been opened before the attempt began
   */
  private wait(attempt: Attempt, call: Call, device: Device, tries: number, any = false): void {
    const { node, kind, caller } = attempt
    const joined = node.opening !== undefined
    const limit = kind === 'lookup' ? this.options.lookupPatienceMs : this.options.openTimeoutMs
    this.await(this.opening(node, device), limit, attempt.onInterrupt, (end) => {
      this.step(attempt, () => {
        if (end === 'interrupted') return void this.finish(attempt, { errno: E.EINTR })
        if (end !== 'late') {
          // Whatever is under way now has begun since.
          if (joined && !any && 'pin' in end && this.removable(node, device)) return this.wait(attempt, call, device, tries, true)
          return this.waited(attempt, call, device, tries, end)
        }
        if (kind !== 'lookup') return this.refuse(attempt, call, E.ETIMEDOUT, HUNG)
        if (call.intent === 'open') return this.admitUnpinned(attempt, call, device, tries)
        // It comes again: what it waits for must not be gone by then.
        this.reaper.answered(node, caller, call)
        this.finish(attempt, { later: true })
      })
    })
  }

  /**
   * Waits until the open under way for a node has ended, well or badly.
   *
   * @param done gets 0, or the errno for a caller that waited too long
   */
  settle(name: string, onInterrupt: Attempt['onInterrupt'], done: (errno: number) => void): void {
    const opening = this.nodes.named(name)?.opening
    if (opening === undefined) return done(0)
    this.await(opening, this.options.openTimeoutMs, onInterrupt, (end) => {
      if (end === 'late' && this.refusals.take()) this.log.warn({ diskseq: name, reason: HUNG }, 'refused an open')
      done(end === 'late' ? E.ETIMEDOUT : end === 'interrupted' ? E.EINTR : 0)
    })
  }

  /** Ends in one of three ways, and once. */
  private await(
    opening: Opening,
    limitMs: number,
    onInterrupt: Attempt['onInterrupt'],
    done: (end: PinResult | 'late' | 'interrupted') => void,
  ): void {
    const began = monotonicMs()
    const timers: NodeJS.Timeout[] = []
    const end = (how: PinResult | 'late' | 'interrupted') => {
      if (!opening.waiters.delete(end)) return
      timers.forEach(clearTimeout)
      done(how)
    }
    opening.waiters.add(end)
    timers.push(setTimeout(end, limitMs, 'late'))
    onInterrupt(() => {
      const rest = began + INTERRUPT_AFTER_MS - monotonicMs()
      timers.push(setTimeout(end, Math.max(0, rest), 'interrupted'))
    })
  }

  private waited(attempt: Attempt, call: Call, device: Device, tries: number, outcome: PinResult): void {
    if ('pin' in outcome) return this.admitPinned(attempt, call, outcome.pin)
    if ('mismatch' in outcome) return this.again(attempt, call, tries, outcome.mismatch)
    Exhausted.check(-outcome.errno)
    // Its own errno, unless it went away meanwhile.
    const now = this.registry.find(attempt.node.name)
    if (now !== undefined && sameDevice(now, device)) {
      return this.refuse(attempt, call, outcome.errno, `it cannot be opened: ${errnoName(outcome.errno)}`)
    }
    this.again(attempt, call, tries, 'it is gone')
  }

  /**
   * Lets an open(2) go on without a pin, with attributes that are already
   * stale: it must ask for them before it opens, and waits there.
   */
  private admitUnpinned(attempt: Attempt, call: Call, device: Device, tries: number): void {
    const { node, caller } = attempt
    const stat = this.devnodes.statOf(device)
    if (stat === undefined) {
      this.registry.refresh(device.kname)
      return this.again(attempt, call, tries, 'it is gone')
    }
    node.last = { device, stat }
    const taken = this.finish(attempt, { device, stat, pinned: false })
    if (taken && node.known) this.reaper.answered(node, caller, call)
  }

  private opening(node: Node, device: Device): Opening {
    if (node.opening !== undefined && sameDevice(node.opening.device, device)) return node.opening
    const opening: Opening = { device, waiters: new Set() }
    node.opening = opening
    this.opener.open(device, (result) => this.opened(node, opening, result))
    return opening
  }

  private opened(node: Node, opening: Opening, result: PinResult): void {
    const latest = node.opening === opening
    if (latest) node.opening = undefined
    if ('pin' in result) {
      const { pin } = result
      if (!latest || (node.pin !== undefined && !sameDevice(node.pin.device, pin.device))) {
        return this.superseded(node, opening, pin)
      }
      if (node.pin === undefined) {
        node.pin = pin
      } else {
        this.opener.close(pin)
        result = { pin: node.pin }
      }
    } else {
      this.registry.refresh(opening.device.kname)
    }
    // As if one lookup more were out: an answer that nobody takes must not end
    // the pin that the next one stands on.
    node.nlookup++
    for (const waiter of [...opening.waiters]) waiter(result)
    node.nlookup--
    this.reaper.settled(node)
  }

  /** The name got another device while this one was being opened. */
  private superseded(node: Node, opening: Opening, pin: Pin): void {
    this.opener.close(pin)
    for (const waiter of [...opening.waiters]) waiter({ mismatch: 'it was replaced' })
    this.nodes.release(node)
  }

  private refuse(attempt: Attempt, call: Call, errno: number, reason: string): void {
    const { node, caller, kind } = attempt
    if (call.intent !== 'inspect' && this.refusals.take()) {
      this.log[errno === E.ENOENT ? 'info' : 'warn'](
        { diskseq: node.name, tid: caller.tid, uid: caller.uid, errno: errnoName(errno), reason },
        'refused an open',
      )
    }
    // Through an inode that the kernel has: the name was there, its disk is not.
    const gone = kind === 'getattr' && errno === E.ENOENT && call.intent !== 'inspect'
    this.finish(attempt, { errno: gone ? E.ENXIO : errno })
  }

  private finish(attempt: Attempt, verdict: Verdict): boolean {
    const taken = attempt.done(verdict)
    attempt.node.attempts--
    this.nodes.release(attempt.node)
    return taken
  }
}
