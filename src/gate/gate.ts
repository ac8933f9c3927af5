// SPDX-License-Identifier: MIT
/**
 * The gate decides: may this caller have this disk now? A caller that opens is
 * answered only while the daemon itself holds the same device open, verified on
 * the descriptor. A caller that inspects is answered from sysfs and /dev, and nothing
 * is opened for it.
 *
 * During a LOOKUP the kernel may hold the directory's lock, and every other process waits
 * for it. So a LOOKUP is answered with what is known: it does not wait for a disk,
 * a search of sysfs, or a descriptor. If more is needed, the caller is sent to a place where it
 * waits without the lock:
 *
 * - open(2) gets the inode with attributes that are already stale. It must ask for them
 *   before it opens (GETATTR), and is answered there, with a pin;
 * - other calls get a symlink to the same name, wait when they read it (READLINK), and then
 *   look up the name again;
 * - calls that follow no symlinks get an inode that nobody can open, wait when they ask for its
 *   attributes, and are told to look again (ESTALE).
 */
import { LRUCache } from 'lru-cache'

import { Access, type Permissions, type Purpose } from './access.js'
import type { Crowd } from './crowd.js'
import type { DeviceNodes, NodeStat } from '../devices/device-node.js'
import type { NodeId } from '../devices/names.js'
import { E, errnoName, Exhausted } from '../util/errno.js'
import { type Call, GOING_ON, type Intents, RUNNING, someCall } from './intent.js'
import { type Logger, LogLimit } from '../util/log.js'
import { type Inode, InodeTable, type Opening } from './inode.js'
import type { Pin, PinOpener, PinResult } from './pin.js'
import type { PinLifetime } from './pin-lifetime.js'
import type { Registry } from '../devices/registry.js'
import { Openings } from './openings.js'
import type { LookupRequest, Name, InodeRequest, Request, Shown, WaitRequest } from './requests.js'
import { Sleepers } from './sleepers.js'
import { type Device, sameDevice, type Sysfs } from '../devices/sysfs.js'
import type { Caller } from '../fuse/transport.js'

export interface GateOptions {
  /** How long a caller waits for a disk that does not answer, ms. */
  readonly openTimeoutMs: number
  /** Whether a LOOKUP waits, for transports that cannot send callers elsewhere. */
  readonly lookupsWait: boolean
}

/** A request under way that may wait. The caller's system call cannot change until it is answered. */
interface Attempt extends Request {
  readonly kind: 'getattr' | 'change' | 'wait'
  readonly name: Name
  /** The inode that the kernel asks for, or that of the device that is waited for. */
  inode: Inode | undefined
  /** Starts the decision again, after what was known has turned out to be wrong. */
  readonly decide: (call: Call) => void
  readonly done: InodeRequest['done']
  tries: number
  /** How often no descriptor was left for it. */
  exhausted: number
}

/** What was found out while a caller waited for a name, for its next LOOKUP. */
interface Walked {
  readonly print: number
  readonly allowed: boolean
}

/**
 * Retries when no descriptor is left, and the time between two, ms, at first and later: a process that opens one disk
 * after another is faster than pins end. In all a second; longer for a daemon that gets little processor time,
 * as pins then take longer to end, too.
 */
const EXHAUSTED_MAX = 55
const EXHAUSTED_FIRST_MS = 2
const EXHAUSTED_LATER_MS = 20

const HUNG = 'the disk did not answer; is it hung?'
const GONE = 'no such disk (any more)'
/** Retries when a name gets another device number (a new partition table) while it is being opened. */
const ATTEMPTS_MAX = 4
/**
 * How many results of waits are remembered, and for how long, ms. After a wait the kernel looks up the name again,
 * twice (the first answer is another inode than the symlink's). A caller that comes later
 * waits again.
 */
const WALKED_MAX = 4096
const WALKED_MS = 1000

/** Changes of owner or mode: the kernel has checked that the caller may. */
const CHANGES = someCall('open')

export interface GateParts {
  readonly registry: Registry
  readonly sysfs: Sysfs
  readonly inodes: InodeTable
  readonly devnodes: DeviceNodes
  readonly opener: PinOpener
  readonly lifetime: PinLifetime
  readonly intents: Intents
  readonly access: Access
  readonly crowd: Crowd
  readonly options: GateOptions
  readonly log: Logger
}

/**
 * The decision for each kind of request. LOOKUP, GETATTR and READLINK are three places in which one open is decided, and
 * they take most steps in common: in several classes, these would call each other back and forth.
 */
export class Gate {
  private readonly refusals: LogLimit
  private readonly walked = new LRUCache<string, Walked>({ max: WALKED_MAX, ttl: WALKED_MS })
  private readonly sleepers = new Sleepers((caller) => this.callOf(caller))
  private readonly openings: Openings
  /** Opens that were refused, by the reason; reasons are few. */
  readonly refused = new Map<string, number>()

  constructor(private readonly parts: GateParts) {
    this.openings = new Openings({ ...parts, openTimeoutMs: parts.options.openTimeoutMs })
    this.refusals = new LogLimit((suppressed) => {
      parts.log.warn({ suppressed }, 'more opens were refused than are logged')
    })
  }

  /** LOOKUP. Answered at once, unless the caller was preempted before it went to sleep. */
  lookup(request: LookupRequest): void {
    this.whenAsleep(request.caller, (call) => {
      if (call.setsTimes) request.done({ own: true })
      else this.tryLookup(request, this.asGoingOn(request, call))
    })
  }

  /** The caller's call; {@link GOING_ON} for a program that looks at a path and goes on by another one. */
  private asGoingOn(request: LookupRequest | WaitRequest, call: Call): Call {
    if (!request.byKernelName || !this.parts.intents.goesOn(request.caller.tid, call)) return call
    if (call.follows) return GOING_ON
    // A caller that follows no symlinks (realpath(3)) cannot be sent to wait: the device is pinned as soon as possible.
    if (request.caller.uid === 0) this.begin(request)
    return call
  }

  /** Starts to open a device for a caller that goes on by another name. */
  private begin({ name, caller }: Name & Request): void {
    const { registry, inodes, lifetime } = this.parts
    const device = registry.find(name)
    const inode = device === undefined ? undefined : inodes.of(device)
    if (device === undefined || inode === undefined) return
    if (this.openings.pinOf(inode) === undefined) this.openings.of(inode, device)
    lifetime.answered(inode, caller, GOING_ON)
  }

  /** LOOKUP of anything but a device: a directory, a symlink, or nothing. */
  lookupOther(caller: Caller, directory: NodeId): void {
    if (caller.uid === 0) return
    const call = this.callOf(caller)
    if (call.locks && this.locks(caller, call)) this.parts.crowd.locks(caller, directory)
  }

  /** Whether a call that may hold the directory's lock exclusively does: a confirmed 64-bit call that is not known to lock it does not. */
  private locks({ uid, tid }: Caller, call: Call): boolean {
    const { intents } = this.parts
    if (uid === 0) return false
    return call.intent !== 'unknown' || call.number < 0 || intents.isIoUring(call) || !intents.confirms(tid)
  }

  private tryLookup(request: LookupRequest, call: Call): void {
    try {
      this.decideLookup(request, call, 1)
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      this.later(request, call)
    }
  }

  /** GETATTR: to show the attributes, or before the inode is opened. */
  getattr(request: InodeRequest): void {
    const attempt = this.attemptOn(request, 'getattr')
    const call = this.parts.lifetime.expected(request.inode, request.caller) ?? this.callOf(request.caller)
    if (call !== RUNNING) return this.step(attempt, () => attempt.decide(call))
    this.sleepers.add(request.caller, (asleep) => this.step(attempt, () => attempt.decide(asleep)))
  }

  /** A change of owner, mode, times or xattrs, which needs a pin. */
  change(request: InodeRequest): void {
    const attempt = this.attemptOn(request, 'change')
    this.step(attempt, () => attempt.decide(CHANGES))
  }

  private attemptOn({ caller, inode, onInterrupt, done }: InodeRequest, kind: 'getattr' | 'change'): Attempt {
    inode.attempts++
    const decide = (call: Call) => this.decideInode(attempt, inode, call)
    const attempt: Attempt = { caller, onInterrupt, kind, name: inode, inode, decide, done, tries: 0, exhausted: 0 }
    return attempt
  }

  /** READLINK or GETATTR of a caller that was sent to wait. */
  wait(request: WaitRequest): void {
    this.whenAsleep(request.caller, (call) => this.waitFor(request, this.asGoingOn(request, call)))
  }

  private waitFor(request: WaitRequest, call: Call): void {
    const { caller, onInterrupt } = request
    const decide = (again: Call) => this.decideWait(attempt, again)
    const done: Attempt['done'] = (verdict) => (request.done('errno' in verdict ? verdict.errno : 0), true)
    const attempt: Attempt = { caller, onInterrupt, kind: 'wait', name: request, inode: undefined, decide, done, tries: 0, exhausted: 0 }
    this.step(attempt, () => decide(call))
  }

  private whenAsleep(caller: Caller, then: (call: Call) => void): void {
    const call = this.callOf(caller)
    if (call === RUNNING) this.sleepers.add(caller, then)
    else then(call)
  }

  private callOf({ tid, uid }: Caller): Call {
    return this.parts.intents.of(tid, uid !== 0)
  }

  /**
   * One step of an attempt. Everything that the event loop starts goes through here.
   *
   * @param again the retry when no descriptor was left
   */
  private step(attempt: Attempt, take: () => void, again = take): void {
    try {
      take()
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      // Files that stay open for speed are not needed.
      this.parts.intents.close()
      this.parts.sysfs.close()
      if (attempt.exhausted++ < EXHAUSTED_MAX) {
        setTimeout(() => this.step(attempt, again), Math.min(EXHAUSTED_FIRST_MS * attempt.exhausted, EXHAUSTED_LATER_MS))
        return
      }
      if (this.refusals.take()) this.parts.log.error({ errno: errnoName(error.errno) }, 'out of resources')
      this.finish(attempt, { errno: E.EIO })
    }
  }

  // LOOKUP

  private decideLookup(request: LookupRequest, call: Call, tries: number): void {
    const { registry, inodes, crowd } = this.parts
    if (call.locks && this.locks(request.caller, call)) crowd.locks(request.caller, request.directory)
    const device = registry.find(request.name)
    if (device === undefined) {
      if (call.shape || registry.lacks(request.name, request.diskseq)) return this.noSuchName(request, call, GONE)
      return this.later(request, call)
    }
    const inode = inodes.of(device)
    if (inode === undefined) return this.noSuchName(request, call, GONE)
    const walked = call.intent === 'unknown' ? this.walkedBy(request.caller, inode, call) : undefined
    const looks = call.intent === 'inspect' || walked?.allowed === false
    try {
      const stat = looks ? this.look(device) : this.statOf(inode, device)
      if (stat !== undefined && !looks) return this.lookupToOpen(request, call, walked, inode, device, stat)
      if (stat !== undefined) return this.answerUnpinned(request, call, inode, device, stat)
    } finally {
      inodes.release(inode)
    }
    registry.refresh(device.kname)
    if (tries < ATTEMPTS_MAX) return this.decideLookup(request, call, tries + 1)
    this.noSuchName(request, call, 'it is gone')
  }

  /** The inode's attributes; undefined if the device is gone. */
  private statOf(inode: Inode, device: Device): NodeStat | undefined {
    this.openings.pinOf(inode)
    return this.parts.devnodes.statOf(device)
  }

  private lookupToOpen(request: LookupRequest, call: Call, walked: Walked | undefined, inode: Inode, device: Device, stat: NodeStat): void {
    const { caller } = request
    const { pin } = inode
    const may = walked !== undefined || (!call.blind && (this.parts.access.certain(caller, stat) || this.purpose(call) === 'unclear'))
    // Only an open checks a drive for another medium
    // (disk_clear_events, 6.18); an existing pin does not notice one.
    if (pin !== undefined && may && (walked !== undefined || !this.openings.removable(inode, device))) {
      return this.answerPinned(request, call, inode, pin, stat)
    }
    if (!may || pin !== undefined) return this.lookupNotPinned(request, call, may, inode, device, stat)
    const begins = inode.opening === undefined
    const opening = this.openings.of(inode, device)
    if (begins) opening.begunFor = caller.tid
    // It may be open by the time the caller waits for it.
    if (caller.uid !== 0 || !begins || this.parts.options.lookupsWait) {
      return this.lookupNotPinned(request, call, may, inode, device, stat)
    }
    this.openings.thisTurn(opening, (end) => {
      const opened = end !== undefined && 'pin' in end ? this.parts.devnodes.statOf(end.pin.device) : undefined
      if (end === undefined || !('pin' in end) || opened === undefined) {
        return this.lookupNotPinned(request, call, may, inode, device, stat)
      }
      this.answerPinned(request, call, inode, end.pin, opened)
    })
  }

  /** Sends the caller to wait elsewhere; an open(2) waits when it asks for the attributes. */
  private lookupNotPinned(request: LookupRequest, call: Call, may: boolean, inode: Inode, device: Device, stat: NodeStat): void {
    if (call.intent === 'unknown') return this.later(request, call)
    if (may) this.parts.lifetime.told(inode, request.caller, call)
    this.answerUnpinned(request, call, inode, device, stat)
  }

  /** See {@link Openings.turnEnds}. */
  turnEnds(): void {
    this.openings.turnEnds()
  }

  private later(request: LookupRequest, call: Call): void {
    if (!this.parts.options.lookupsWait) return void request.done({ later: true, follows: call.follows })
    const done = (errno: number) => {
      if (errno === 0) this.tryLookup(request, call)
      else request.done({ errno })
    }
    this.waitFor({ ...request, done }, call)
  }

  private noSuchName(request: LookupRequest, call: Call, reason: string): void {
    this.logRefusal(request, request.caller, call, E.ENOENT, reason)
    request.done({ errno: E.ENOENT })
  }

  private answerUnpinned(request: LookupRequest, call: Call, inode: Inode, device: Device, stat: NodeStat): void {
    if (this.mayKeep(request.caller, call)) this.makeReopenable(inode)
    inode.last = { device, stat }
    inode.attempts++
    request.done({ inode, device, stat, trusted: false })
    inode.attempts--
  }

  private answerPinned(request: LookupRequest, call: Call, inode: Inode, pin: Pin, stat: NodeStat): void {
    const { lifetime } = this.parts
    if (this.mayKeep(request.caller, call)) this.makeReopenable(inode)
    // Only processes that have it open hold the inode, and for them the disk stays the same.
    const trusted = !inode.reopenable && !(inode.changes ??= this.parts.sysfs.changes(pin.device))
    inode.last = { device: pin.device, stat }
    if (trusted) inode.trusted = true
    lifetime.answering(inode, request.caller, call)
    if (request.done({ inode, device: pin.device, stat, trusted })) lifetime.answered(inode, request.caller, call)
    else lifetime.notAnswered(inode, request.caller)
  }

  /**
   * Whether the caller may hold the inode after its call without having the disk open: by a call that
   * keeps it, or, for users other than root, by reopening an open descriptor with O_PATH.
   */
  private mayKeep({ uid }: Caller, { keeps }: Call): boolean {
    return keeps || uid !== 0
  }

  /** From now on the kernel must ask before each open: a process may hold the inode. */
  private makeReopenable(inode: Inode): void {
    if (inode.reopenable) return
    inode.reopenable = true
    if (inode.trusted) this.parts.lifetime.distrust(inode)
  }

  // GETATTR, and changes

  private decideInode(attempt: Attempt, inode: Inode, call: Call): void {
    const { registry, intents } = this.parts
    const { caller, kind } = attempt
    const device = registry.find(inode.name)
    if (device === undefined) return this.search(attempt, call)
    const inspects = kind === 'getattr' && this.inspects(caller, call, device)
    // The name has another device number now; an inode's number never changes.
    if (!InodeTable.is(inode, device)) return void this.finish(attempt, { errno: inspects ? E.ENOENT : E.ESTALE })
    if (inspects) return this.inspect(attempt, call, inode, device)
    if (kind === 'change') return this.pin(attempt, call, inode, device)
    this.whenAllowed(attempt, call, device, (may) => {
      if (may) return this.pin(attempt, call, inode, device)
      if (intents.isOpening(call)) return void this.finish(attempt, { errno: E.EACCES })
      this.inspect(attempt, call, inode, device)
    })
  }

  /** Whether a caller that asks for attributes certainly does not open the device. */
  private inspects(caller: Caller, call: Call, device: Device): boolean {
    const { intents, devnodes } = this.parts
    if (call.intent !== 'inspect' || intents.isOpening(call)) return false
    if (caller.uid === 0) return true
    // If it may not open the device, the kernel refuses the open.
    const stat = devnodes.statOf(device)
    return (stat !== undefined && Access.hopeless(caller, stat)) || this.looksOnly(caller, call)
  }

  /** The same, without a look at its rights. */
  private looksOnly({ uid, tid }: Caller, call: Call): boolean {
    const { intents } = this.parts
    return call.intent === 'inspect' && !intents.isOpening(call) && (uid === 0 || intents.confirms(tid))
  }

  /** Finds out whether the device may be opened for this caller. */
  private whenAllowed(attempt: Attempt, call: Call, device: Device, then: (may: boolean) => void): void {
    const { caller } = attempt
    if (caller.uid === 0) return then(true)
    const permissions = this.permissions(device)
    if (permissions === undefined) return this.again(attempt, call, device, 'it is gone')
    this.parts.access.mayOpen(caller, permissions, this.purpose(call), (may) => this.step(attempt, () => then(may)))
  }

  private purpose(call: Call): Purpose {
    const { intents } = this.parts
    if (intents.isIoUring(call)) return 'unclear'
    return intents.isOpening(call) ? 'open' : 'by number'
  }

  private permissions(device: Device): Permissions | undefined {
    const { devnodes } = this.parts
    const read = (fd: number, { mode, uid, gid }: NodeStat): Permissions => {
      const acl = devnodes.acl(fd)
      return { mode, uid, gid, ...(acl !== undefined && { acl }) }
    }
    return devnodes.with(device, read)
  }

  /** Answers without opening anything. */
  private inspect(attempt: Attempt, call: Call, inode: Inode, device: Device): void {
    const stat = this.look(device)
    if (stat === undefined) return this.again(attempt, call, device, 'it is gone')
    inode.last = { device, stat }
    this.finish(attempt, { inode, device, stat, trusted: false })
  }

  private look(device: Device): NodeStat | undefined {
    const { sysfs, devnodes } = this.parts
    return sysfs.shows(device) ? devnodes.statOf(device) : undefined
  }

  /** @param fresh whether the device was opened after the attempt began, so that its medium is the current one */
  private pin(attempt: Attempt, call: Call, inode: Inode, device: Device, fresh = false): void {
    const pin = this.openings.pinOf(inode)
    if (pin !== undefined && (fresh || !this.openings.removable(inode, device))) return this.finishPinned(attempt, call, inode, pin)
    this.open(attempt, call, inode, device, () => this.pin(attempt, call, inode, device, true))
  }

  private finishPinned(attempt: Attempt, call: Call, inode: Inode, pin: Pin): void {
    const { lifetime, devnodes } = this.parts
    const { caller, kind } = attempt
    const stat = devnodes.statOf(pin.device)
    if (stat === undefined) return this.again(attempt, call, pin.device, 'it is gone')
    inode.last = { device: pin.device, stat }
    lifetime.answering(inode, caller, call)
    const taken = this.finish(attempt, { inode, device: pin.device, stat, trusted: false })
    if (!taken) lifetime.notAnswered(inode, caller)
    else if (kind === 'getattr') lifetime.answered(inode, caller, call)
  }

  // READLINK, and GETATTR of what is not known yet

  private decideWait(attempt: Attempt, call: Call): void {
    const { registry, inodes } = this.parts
    const device = registry.find(attempt.name.name)
    if (device === undefined) return this.search(attempt, call)
    const inode = inodes.of(device)
    this.holdInode(attempt, inode)
    // An open(2) waits for the disk when it asks for the attributes.
    if (inode === undefined || call.intent !== 'unknown') return this.lookAgain(attempt)
    this.whenAllowed(attempt, call, device, (may) => {
      if (!may && call.setsTimes) return void this.finish(attempt, { errno: E.EACCES })
      if (!may) return this.walkedTo(attempt, call, inode, false)
      // The caller looks up the name again: until then the pin must stay.
      const pinned = () => {
        this.parts.lifetime.answered(inode, attempt.caller, call)
        this.walkedTo(attempt, call, inode, true)
      }
      if (this.openings.pinOf(inode) !== undefined && !this.openings.removable(inode, device)) pinned()
      else this.open(attempt, call, inode, device, pinned)
    })
  }

  private walkedTo(attempt: Attempt, { print }: Call, inode: Inode, allowed: boolean): void {
    this.walked.set(walkKey(attempt.caller, inode), { print, allowed })
    this.lookAgain(attempt)
  }

  private walkedBy(caller: Caller, inode: Inode, call: Call): Walked | undefined {
    const walked = this.walked.get(walkKey(caller, inode))
    return walked?.print === call.print ? walked : undefined
  }

  /** Makes a caller that waited look up the name again. */
  private lookAgain(attempt: Attempt): void {
    this.finish(attempt, { errno: 0 })
  }

  // What they share

  /** Holds an inode while the attempt is under way, and releases the one before. */
  private holdInode(attempt: Attempt, inode: Inode | undefined): void {
    const before = attempt.inode
    attempt.inode = inode
    if (inode !== undefined) inode.attempts++
    if (before === undefined) return
    before.attempts--
    this.parts.inodes.release(before)
  }

  /** Searches sysfs for an unknown name: a disk may get a new diskseq without an event. */
  private search(attempt: Attempt, call: Call): void {
    const { name, diskseq } = attempt.name
    this.parts.registry.findSlowly(name, diskseq, (device) => {
      this.step(attempt, () => {
        if (typeof device === 'object' && ++attempt.tries < ATTEMPTS_MAX) return attempt.decide(call)
        if (typeof device === 'number' && device !== 0) throw new Exhausted(device)
        // With O_CREAT the kernel would now create a file, if the caller had not been sent to wait.
        const creates = attempt.kind === 'wait' && call.intent === 'open' && call.locks && !call.blind
        this.refuse(attempt, call, creates ? (attempt.caller.uid === 0 ? E.EPERM : E.EACCES) : E.ENOENT, GONE)
      })
    })
  }

  /** The device was not what its name says: reads it again and starts over; ENOENT after a few times. */
  private again(attempt: Attempt, call: Call, device: Device, reason: string): void {
    this.parts.registry.refresh(device.kname)
    if (++attempt.tries < ATTEMPTS_MAX) return attempt.decide(call)
    this.refuse(attempt, call, E.ENOENT, reason)
  }

  /**
   * Waits for the device to be opened, together with all other attempts that do.
   *
   * @param pinned called when it is open; any other outcome is answered here
   * @param any whether an open that began before this attempt will do
   */
  private open(attempt: Attempt, call: Call, inode: Inode, device: Device, pinned: () => void, any = false): void {
    const joined = inode.opening !== undefined && !this.began(inode.opening, attempt)
    const opened = (end: PinResult | 'late' | 'interrupted') => {
      if (end === 'interrupted') return void this.finish(attempt, { errno: E.EINTR })
      if (end === 'late') return this.refuse(attempt, call, E.ETIMEDOUT, HUNG)
      if (!('pin' in end)) return this.notOpened(attempt, call, inode, device, end)
      // An open that is under way now began after this attempt.
      if (joined && !any && this.openings.removable(inode, device)) return this.open(attempt, call, inode, device, pinned, true)
      pinned()
    }
    const again = () => this.open(attempt, call, inode, device, pinned, any)
    this.openings.await(this.openings.of(inode, device), attempt.onInterrupt, (end) => this.step(attempt, () => opened(end), again))
  }

  /** Whether this caller's own LOOKUP began it. True once, as the thread goes on to other devices. */
  private began(opening: Opening, { caller, kind }: Attempt): boolean {
    if (kind !== 'getattr' || caller.tid === 0 || opening.begunFor !== caller.tid) return false
    opening.begunFor = 0
    return true
  }

  private notOpened(attempt: Attempt, call: Call, inode: Inode, device: Device, end: Exclude<PinResult, { pin: Pin }>): void {
    if ('mismatch' in end) return this.again(attempt, call, device, end.mismatch)
    Exhausted.check(-end.errno)
    // The device's own errno, unless the device went away meanwhile.
    const now = this.parts.registry.find(inode.name)
    if (now === undefined || !sameDevice(now, device)) return this.again(attempt, call, device, 'it is gone')
    this.refuse(attempt, call, end.errno, `it cannot be opened: ${errnoName(end.errno)}`)
  }

  private refuse(attempt: Attempt, call: Call, errno: number, reason: string): void {
    this.logRefusal(attempt.name, attempt.caller, call, errno, reason)
    // For an inode that the kernel has: the name existed, its disk is gone. A caller that may be
    // about to open it must not get attributes.
    const gone = attempt.kind !== 'wait' && errno === E.ENOENT && !this.looksOnly(attempt.caller, call)
    this.finish(attempt, { errno: gone ? E.ENXIO : errno })
  }

  private logRefusal({ name }: Name, { tid, uid }: Caller, call: Call, errno: number, reason: string): void {
    if (call.intent === 'inspect') return
    this.refused.set(reason, (this.refused.get(reason) ?? 0) + 1)
    if (!this.refusals.take()) return
    const level = errno === E.ENOENT ? 'info' : 'warn'
    this.parts.log[level]({ diskseq: name, tid, uid, errno: errnoName(errno), reason }, 'refused an open')
  }

  private finish(attempt: Attempt, verdict: Shown | { readonly errno: number }): boolean {
    const taken = attempt.done(verdict)
    this.holdInode(attempt, undefined)
    return taken
  }
}

const walkKey = ({ tid }: Caller, { id }: Inode) => `${tid} ${id}`
