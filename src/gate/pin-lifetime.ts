// SPDX-License-Identifier: MIT
/**
 * When pins end: when their callers are done, whatever the kernel still remembers.
 *
 * - Who was answered is looked at until it is seen out of its call: soon after the last
 *   answer, then ever more rarely. What it opened meanwhile, it holds itself.
 * - Whoever has the inode already may open without asking while attributes are valid
 *   that the kernel was told. So before callers are looked at, these are taken
 *   back (FUSE_NOTIFY_INVAL_INODE).
 * - A caller that cannot be seen is done when the kernel has forgotten the inode, and
 *   some ms later where it may open by number; or after `hold`. For these, and for one
 *   that runs on and on after a close, the kernel is made to forget.
 *
 * So nobody keeps a pin by having the inode: an O_PATH descriptor, a bind mount, an
 * inotify watch.
 */
import { monotonicMs } from '../util/clock.js'
import { errnoName } from '../util/errno.js'
import { type Call, type Intents, someCall } from './intent.js'
import type { Logger } from '../util/log.js'
import type { Native } from '../native.js'
import type { Inode, InodeTable } from './inode.js'
import type { PinOpener } from './pin.js'
import type { SharedState } from '../handover/shared-state.js'
import type { Caller, KernelCache } from '../fuse/transport.js'

export interface PinLifetimeOptions {
  /** How long a pin outlives the inode where it was for a caller that cannot be seen, ms. */
  readonly lingerMs: number
  /** How long such a caller is waited for where the kernel does not forget the inode, s. */
  readonly holdSeconds: number
}

/**
 * From the last answer, or close, to the first look at the callers, ms: of a disk that is opened
 * again and again, so that it is found open; and of others, whose user may want to
 * remove the device right after it has closed it.
 */
const QUIET_MS = 2
const FIRST_LOOK_MS = 1
/** In one open: for the name, for that once more where the kernel had another inode of it, and for the attributes. */
const ANSWERS_OF_ONE = 3
/**
 * While others are answered, whose time looks and closes would take, they are put off; each for
 * so long, ms, and not for longer than this in all.
 */
const ELSEWHERE_MS = 0.5
const OVERDUE_MAX_MS = 5
/** Not so where nobody else was answered for so long, ms: whoever has closed a disk may want it for himself at once. */
const ALONE_MS = 2
/** Looks right after a close that follow each other without a pause, as a caller that still runs is mostly about to end; and at how many callers at most. */
const LOOKS_IN_A_ROW = 5
const CALLERS_IN_A_ROW = 2
/** A look comes twice as late each time, up to this, ms. */
const LOOK_DELAY_MAX_MS = 32
/** But not where a caller ends soon, and whoever has waited for that wants the disk for himself; for so long, ms. */
const GOING_ON_LOOK_MS = 2
const SOON_MS = 1000
/** A caller takes some 10 us to look at: where there are many, looks take a tenth of a processor at most. */
const LOOK_DELAY_MS_PER_CALLER = 0.1
/** Of inodes that are looked at at a time. */
const LOOK_AT_ONCE = 64
/**
 * A look that has taken this long, ms, stands at a thread that began an execve(2) at that
 * very moment, or has no processor: the others are looked at without it.
 */
const LOOK_STUCK_MS = 50
/**
 * Looks under way at a time, each on a thread of its own. Where the callers of an inode hold
 * them up, two are stuck for that inode: with others, and alone. So whoever may open fewer
 * than half as many inodes holds up nobody else's.
 */
const LOOKS_MAX = 512
/** Callers that are remembered of an inode before it is looked at though it is not quiet. */
const CALLERS_MAX = 256
/** Of an inode that waits to be forgotten: attempts come twice as late each time, up to this, ms. */
const PRUNE_DELAY_MAX_MS = 1000
/** A hold is counted in ticks, so that a clock that jumps costs one tick, not the hold. */
const TICK_MS = 1000

/** One look, at the callers of some inodes. */
interface Look {
  readonly inodes: readonly Inode[]
  readonly began: number
  stuck: boolean
}

export interface PinLifetimeParts {
  readonly native: Pick<Native, 'prune' | 'close' | 'lookAtThreads'>
  readonly inodes: InodeTable
  /** Closes the pins. */
  readonly opener: PinOpener
  /** What callers are doing. */
  readonly intents: Intents
  /** Where it is written down whom a pin was taken for. */
  readonly state: Pick<SharedState, 'pinnedFor' | 'notPinnedFor'>
  /** The kernel's. */
  readonly kernel: KernelCache
  readonly options: PinLifetimeOptions
  readonly log: Logger
}

export class PinLifetime {
  /** Pinned inodes. */
  private readonly active = new Set<Inode>()
  private readonly looks = new Set<Look>()
  /** The inode that a thread was answered about last, in an open(2). */
  private readonly openers = new Map<number, Inode>()
  private answeredAt = -Infinity
  /** Of which inode; and when another one was, before that. */
  private lastAnswered: Inode | undefined
  private othersAnsweredAt = -Infinity
  private timer: NodeJS.Timeout | undefined
  private timerAt = Infinity
  private tick: NodeJS.Timeout | undefined
  private mountFd = -1
  private pruning = false
  private closed = false
  private readonly drained: (() => void)[] = []

  constructor(private readonly parts: PinLifetimeParts) {}

  /** @param mountFd from {@link Native.pickMount}; owned from now on */
  start(mountFd: number): void {
    this.mountFd = mountFd
  }

  /** Drops every pin. */
  close(): void {
    this.closed = true
    clearTimeout(this.timer)
    clearInterval(this.tick)
    for (const inode of this.parts.inodes) {
      inode.nlookup = 0
      if (inode.pin !== undefined) this.parts.opener.close(inode.pin)
      inode.pin = undefined
    }
    this.active.clear()
    if (this.mountFd >= 0 && !this.pruning) this.parts.native.close(this.mountFd)
    this.mountFd = -1
  }

  /**
   * The mount is gone, and nobody asks any more. Calls back when all who were answered
   * are out of their calls.
   */
  whenDrained(done: () => void): void {
    this.drained.push(done)
    this.checkDrained()
  }

  private checkDrained(): void {
    if (this.active.size > 0 || this.drained.length === 0) return
    for (const done of this.drained.splice(0)) done()
  }

  /** A pin that an earlier daemon had. */
  takenOver(inode: Inode): void {
    if (inode.unseen) this.startHold(inode)
    this.watch(inode, 0)
  }

  /** An opener is about to be answered: whoever takes over must know of it. */
  answering(inode: Inode, caller: Caller, call: Call): void {
    if (inode.pin?.place === undefined) return
    const { intents } = this.parts
    this.parts.state.pinnedFor(
      inode.pin.place,
      { tid: caller.tid, call: call.number, outlasts: intents.outlastsInode(call) },
      !intents.isSeen(call),
    )
  }

  /** It had gone, or another daemon had answered it. */
  notAnswered(inode: Inode, caller: Caller): void {
    if (inode.pin?.place !== undefined) this.parts.state.notPinnedFor(inode.pin.place, caller.tid)
    if (inode.pin !== undefined && !this.active.has(inode)) this.watch(inode, QUIET_MS)
  }

  /** An opener was answered, or is about to be: from here the pin must stay, or come. */
  answered(inode: Inode, caller: Caller, call: Call): void {
    if (this.parts.intents.isSeen(call)) {
      this.remember(inode, caller.tid, call)
    } else {
      inode.unseen = true
      this.startHold(inode)
    }
    if (inode !== this.lastAnswered) this.othersAnsweredAt = this.answeredAt
    this.lastAnswered = inode
    this.answeredAt = monotonicMs()
    if (inode.pin === undefined) {
      inode.usedAt = this.answeredAt
      return
    }
    this.used(inode, this.answeredAt)
    const due = inode.lookAt
    this.watch(inode, this.isBusy(inode) ? QUIET_MS : FIRST_LOOK_MS)
    // Those that are done must not pile up while others come.
    if ((inode.callers?.size ?? 0) >= CALLERS_MAX) inode.lookAt = Math.min(due, inode.lookAt)
  }

  private used(inode: Inode, now: number): void {
    inode.closed = false
    inode.looksInARow = 0
    inode.streak = now - inode.usedAt < QUIET_MS ? inode.streak + 1 : 1
    inode.usedAt = now
  }

  /** It is opened again and again. */
  private isBusy(inode: Inode): boolean {
    return inode.streak > ANSWERS_OF_ONE
  }

  /** A caller in an open(2) is told of an inode that is not pinned yet. It is to ask for the attributes. */
  told(inode: Inode, { tid }: Caller, call: Call): void {
    call.asks = true
    this.remember(inode, tid, call)
  }

  /** A thread that opens one device is done with the one before: one open(2) opens one. */
  private remember(inode: Inode, tid: number, call: Call): void {
    const before = this.openers.get(tid)
    if (before !== undefined && before !== inode && before.callers?.get(tid)?.intent === 'open') {
      before.callers.delete(tid)
      if (before.callers.size === 0 && before.pin !== undefined) this.watch(before, 0)
    }
    if (call.intent === 'open') this.openers.set(tid, inode)
    else this.openers.delete(tid)
    inode.callers ??= new Map()
    inode.callers.set(tid, call)
    if (this.parts.intents.endsSoon(call)) inode.goesOn = true
  }

  /**
   * The call of a caller that was {@link told}: when it comes to ask, it need not be looked
   * at once more. It may have gone on to another open(2) meanwhile, through a
   * descriptor, so that it is in one is all that is said of it.
   */
  expected(inode: Inode, { tid }: Caller): Call | undefined {
    const call = inode.callers?.get(tid)
    return call?.asks ? someCall('open', call.number) : undefined
  }

  /** An attempt to pin it has ended, and those who waited for it have been answered. */
  attempted(inode: Inode): void {
    if (inode.pin !== undefined) this.watch(inode, QUIET_MS)
    else this.unpin(inode)
  }

  /** Somebody closed it. */
  closedByUser(inode: Inode): void {
    if (!this.active.has(inode)) return
    inode.closed = true
    const busy = this.isBusy(inode)
    this.watch(inode, busy ? QUIET_MS : 0)
    if (busy) return
    inode.looksInARow = LOOKS_IN_A_ROW - 1
    this.lookAtThoseDue(this.isAlone(inode))
  }

  /** Nobody was answered about another inode in the ms before it was answered about this one: looks take nobody's time. */
  private isAlone(inode: Inode): boolean {
    return inode === this.lastAnswered && this.answeredAt - this.othersAnsweredAt >= ALONE_MS
  }

  /** Has its callers looked at some ms from now. */
  private watch(inode: Inode, delay: number): void {
    this.active.add(inode)
    inode.lookDelay = FIRST_LOOK_MS
    inode.lookAt = monotonicMs() + delay
    this.arm(inode.lookAt)
  }

  /** Has the timer go off at `due`, or before. */
  private arm(due: number): void {
    if (due >= this.timerAt || this.closed) return
    clearTimeout(this.timer)
    this.timerAt = due
    this.timer = setTimeout(
      () => {
        this.timerAt = Infinity
        this.lookAtThoseDue()
      },
      Math.max(0, Math.ceil(due - monotonicMs())),
    )
  }

  /** @param alone whether it takes nobody's time */
  private lookAtThoseDue(alone = false): void {
    const now = monotonicMs()
    let next = Infinity
    let going = 0
    for (const look of this.looks) {
      if (!look.stuck && now - look.began >= LOOK_STUCK_MS) this.giveUp(look)
      if (look.stuck) continue
      going++
      next = Math.min(next, look.began + LOOK_STUCK_MS)
    }
    const due: Inode[] = []
    let overdue = 0
    for (const inode of this.active) {
      if (inode.looking) continue
      if (inode.lookAt > now || due.length === LOOK_AT_ONCE) {
        next = Math.min(next, Math.max(inode.lookAt, now + 1))
        continue
      }
      due.push(inode)
      overdue = Math.max(overdue, now - inode.lookAt)
    }
    if (due.length > 0 && !alone && now - this.answeredAt < ELSEWHERE_MS && overdue < OVERDUE_MAX_MS) return this.arm(now + 1)
    // One after another: all of them are over in some microseconds.
    if (due.length > 0 && (going > 0 || this.looks.size >= LOOKS_MAX)) next = Math.min(next, now + 1)
    else if (due.length > 0) this.look(due)
    this.arm(next)
  }

  private look(inodes: readonly Inode[]): void {
    const asked: { inode: Inode; tid: number; call: Call }[] = []
    /** Each thread once, and whether its stack is needed. */
    const threads = new Map<number, boolean>()
    for (const inode of inodes) {
      // Now, whoever is seen elsewhere has not got in by attributes that were valid.
      if (inode.trusted) this.distrust(inode)
      for (const [tid, call] of inode.callers ?? []) {
        asked.push({ inode, tid, call })
        threads.set(tid, threads.get(tid) === true || this.parts.intents.wantsStack(call))
      }
    }
    if (asked.length === 0) {
      for (const inode of inodes) this.judge(inode)
      return
    }
    const look: Look = { inodes, began: monotonicMs(), stuck: false }
    this.looks.add(look)
    for (const inode of inodes) inode.looking = true
    this.parts.native.lookAtThreads([...threads].flat(), (seen) => {
      this.looks.delete(look)
      if (this.closed) return
      const found = new Map([...threads.keys()].map((tid, i) => [tid, seen[i]]))
      for (const { inode, tid, call } of asked) {
        // Not if it has been answered again since.
        if (inode.callers?.get(tid) !== call) continue
        const late = this.parts.intents.endsSoon(call) && monotonicMs() - inode.usedAt > this.parts.options.holdSeconds * 1000
        if (late || !this.parts.intents.mayStillBeIn(call, found.get(tid))) this.gone(inode, tid)
      }
      for (const inode of inodes) {
        // Those of a look that was given up have been looked at since, one by one.
        if (!look.stuck || inodes.length === 1) inode.looking = false
        if (inode.pin !== undefined && !inode.looking) this.judge(inode)
      }
      this.arm(monotonicMs())
    })
    this.arm(look.began + LOOK_STUCK_MS)
  }

  private gone(inode: Inode, tid: number): void {
    inode.callers?.delete(tid)
    if (this.openers.get(tid) === inode) this.openers.delete(tid)
  }

  /** The inodes that it was for are looked at one by one; one by itself waits for the look to end. */
  private giveUp(look: Look): void {
    look.stuck = true
    if (look.inodes.length === 1) return
    for (const inode of look.inodes) {
      inode.looking = false
      if (!this.active.has(inode)) continue
      if (this.looks.size < LOOKS_MAX) this.look([inode])
      else inode.lookAt = monotonicMs() + LOOK_DELAY_MAX_MS
    }
  }

  /** Ends a pin that nobody needs any more. */
  private judge(inode: Inode): void {
    const now = monotonicMs()
    if (inode.lookAt > now) return this.arm(inode.lookAt)
    const left = inode.callers?.size ?? 0
    if (left === 0 && !inode.unseen && inode.lingerUntil <= now) {
      if (!inode.trusted) return this.unpin(inode)
      this.distrust(inode)
    }
    if (left === 0 && inode.unseen && inode.known && !this.haveForgotten(inode)) return
    // Who runs on and on is not seen to leave its call: if nobody has the inode any more, it has.
    if (left > 0 && inode.closed && inode.known && inode.lookDelay > FIRST_LOOK_MS) {
      this.parts.kernel.prune(inode.id)
      inode.closed = false
    }
    if (left > 0 && left <= CALLERS_IN_A_ROW && inode.looksInARow > 0 && this.isAlone(inode)) {
      inode.looksInARow--
      return this.look([inode])
    }
    const limit =
      left === 0 && inode.unseen ? PRUNE_DELAY_MAX_MS : inode.goesOn && now - inode.usedAt < SOON_MS ? GOING_ON_LOOK_MS : LOOK_DELAY_MAX_MS
    inode.lookAt = Math.max(now + inode.lookDelay, now + left * LOOK_DELAY_MS_PER_CALLER)
    if (left === 0 && !inode.unseen) inode.lookAt = Math.max(now + 1, inode.lingerUntil)
    inode.lookDelay = Math.min(inode.lookDelay * 2, limit)
    this.arm(inode.lookAt)
  }

  /**
   * Has the kernel forget an inode, for the sake of callers that cannot be seen.
   *
   * @returns false where it had forgotten it before, which an earlier daemon may have been told
   */
  private haveForgotten(inode: Inode): boolean {
    if (inode.takenOver && inode.nlookup === 0 && !this.parts.kernel.invalidate(inode.id)) {
      inode.takenOver = false
      this.forgotten(inode)
      return false
    }
    if (!this.parts.kernel.prune(inode.id)) this.pruneAll()
    return true
  }

  /** The kernel has to ask again for the attributes of an inode. */
  distrust(inode: Inode): void {
    inode.trusted = false
    this.parts.kernel.invalidate(inode.id)
  }

  /** The kernel has dropped an inode, and says how many lookups were answered with it. */
  forget(inode: Inode, count: number): void {
    inode.nlookup = Math.max(0, inode.nlookup - count)
    if (inode.known) {
      // Of one that was taken over this says less than it seems to: it may be the inode that
      // an earlier daemon gave out, dropped before this one answered a lookup.
      if (inode.takenOver && inode.pin === undefined) this.parts.inodes.release(inode)
      else if (inode.takenOver) this.watch(inode, QUIET_MS)
      return
    }
    this.forgotten(inode)
  }

  private forgotten(inode: Inode): void {
    // Whoever comes now gets another inode.
    inode.reopenable = inode.trusted = false
    for (const [tid, call] of inode.callers ?? []) {
      if (!this.parts.intents.outlastsInode(call)) this.gone(inode, tid)
    }
    if (inode.unseen && !inode.moreCallers) {
      inode.unseen = false
      inode.lingerUntil = monotonicMs() + this.parts.options.lingerMs
    }
    if (inode.pin === undefined) this.parts.inodes.release(inode)
    else this.watch(inode, 0)
  }

  /** Ends an inode's pin and what was remembered for its sake. */
  unpin(inode: Inode): void {
    const pin = inode.pin
    inode.pin = undefined
    for (const tid of inode.callers?.keys() ?? []) this.gone(inode, tid)
    inode.callers = undefined
    inode.unseen = inode.moreCallers = inode.goesOn = false
    this.active.delete(inode)
    if (this.active.size === 0) {
      clearInterval(this.tick)
      this.tick = undefined
      this.openers.clear()
    }
    if (pin !== undefined) this.parts.opener.close(pin)
    this.parts.inodes.release(inode)
    this.checkDrained()
  }

  /** Has the kernel drop all names that nobody uses; for kernels that cannot be told which. */
  pruneAll(): void {
    if (this.mountFd < 0 || this.pruning) return
    this.pruning = true
    const fd = this.mountFd
    this.parts.native.prune(fd, (error) => {
      this.pruning = false
      if (this.mountFd < 0) return void this.parts.native.close(fd)
      if (error !== 0) this.parts.log.error({ errno: errnoName(error) }, 'the kernel did not drop its unused names')
    })
  }

  private startHold(inode: Inode): void {
    inode.unseenTicks = 0
    if (this.closed) return // an open that came to its end after that
    this.tick ??= setInterval(() => this.hold(), TICK_MS)
  }

  private hold(): void {
    for (const inode of this.active) {
      if (!inode.unseen || ++inode.unseenTicks < this.parts.options.holdSeconds) continue
      this.parts.log.debug({ diskseq: inode.name }, 'still in use after the hold; its user holds the device')
      inode.unseen = inode.moreCallers = false
      this.watch(inode, 0)
    }
  }
}
