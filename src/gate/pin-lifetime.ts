// SPDX-License-Identifier: MIT
/**
 * Decides when a pin ends: when its callers are done, whatever the kernel still remembers.
 *
 * - A caller that was answered is watched until it has left its system call: first soon after the
 *   answer, then less and less often. If it opened the device, it now holds the device itself.
 * - While the kernel's copy of the attributes is valid, any process that has the inode can open it
 *   without a request. So the attributes are invalidated (FUSE_NOTIFY_INVAL_INODE) before callers are watched.
 * - A caller that cannot be seen is done when the kernel has forgotten the inode (some ms later if
 *   it may open by number), or after `hold`. For such callers, and for one that keeps running
 *   after a close, the kernel is made to forget the inode.
 *
 * So an O_PATH descriptor, a bind mount or an inotify watch does not keep a pin.
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
  /** How long the pin of a caller that cannot be seen stays after the kernel has forgotten the inode, ms. */
  readonly lingerMs: number
  /** How long that pin stays if the kernel does not forget the inode, s. */
  readonly holdSeconds: number
}

/**
 * Time from the last answer or close to the first look at the callers, ms. Long for a disk that is opened
 * again and again, so that the next open finds the pin; short for all others, as
 * the user may remove the device right after the close.
 */
const QUIET_MS = 2
const FIRST_LOOK_MS = 1
/** Answers in one open: the name, the name again if the kernel had another inode for it, and the attributes. */
const ANSWERS_OF_ONE = 3
/**
 * Looks and closes take time from callers of other inodes, so they are put off while such callers are answered:
 * by the first figure each time, and by the second in all, ms.
 */
const ELSEWHERE_MS = 0.5
const OVERDUE_MAX_MS = 5
/** They are not put off if no other inode was asked for during this time, ms: the user may want the device exclusively at once. */
const ALONE_MS = 2
/** Looks right after a close that follow each other without a pause, as a caller that still runs is usually about to end; and for how many callers at most. */
const LOOKS_IN_A_ROW = 5
const CALLERS_IN_A_ROW = 2
/** The time between two looks doubles, up to this, ms. */
const LOOK_DELAY_MAX_MS = 32
/** It does not double for this time, ms: a caller may end soon, and another process waits for that. */
const GOING_ON_LOOK_MS = 2
const SOON_MS = 1000
/** A caller takes some 10 us to look at: where there are many, looks take a tenth of a processor at most. */
const LOOK_DELAY_MS_PER_CALLER = 0.1
/** Inodes in one look. */
const LOOK_AT_ONCE = 64
/**
 * A look that has taken this long, ms, is stuck at a thread in the middle of an execve(2), or gets
 * no processor. The other inodes are then looked at one by one.
 */
const LOOK_STUCK_MS = 50
/**
 * Looks under way at a time, each on a thread of its own. One inode can make two of them stick: the look it
 * shares with others, and its own. So a user who may open fewer than half as many inodes
 * cannot delay the looks at other inodes.
 */
const LOOKS_MAX = 512
/** With this many callers an inode is looked at even while it is in use. */
const CALLERS_MAX = 256
/** Attempts to have the kernel forget an inode: the time between two doubles, up to this, ms. */
const PRUNE_DELAY_MAX_MS = 1000
/** `hold` is counted in ticks, so that a clock that jumps costs one tick, not the whole hold. */
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
  /** Records the callers of each pin, for a daemon that takes over. */
  readonly state: Pick<SharedState, 'pinnedFor' | 'notPinnedFor'>
  /** The kernel's. */
  readonly kernel: KernelCache
  readonly options: PinLifetimeOptions
  readonly log: Logger
}

/**
 * When pins end. All that it knows of a pin serves the one question in `judge`, whether somebody may
 * still need it; the answer has to be looked through as a whole, so it stands in one class.
 */
export class PinLifetime {
  /** Pinned inodes. */
  private readonly active = new Set<Inode>()
  private readonly looks = new Set<Look>()
  /** The inode that a thread was answered about last, in an open(2). */
  private readonly openers = new Map<number, Inode>()
  private answeredAt = -Infinity
  /** The inode of the last answer; and the time of the last answer for any other inode. */
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

  /** Calls back when every caller that was answered has left its call. For when the mount is gone, so that no more come. */
  whenDrained(done: () => void): void {
    this.drained.push(done)
    this.checkDrained()
  }

  private checkDrained(): void {
    if (this.active.size > 0 || this.drained.length === 0) return
    for (const done of this.drained.splice(0)) done()
  }

  /** Adds the pin of an earlier daemon. */
  takenOver(inode: Inode): void {
    if (inode.unseen) this.startHold(inode)
    this.watch(inode, 0)
  }

  /** Records an opener that is about to be answered, for a daemon that takes over. */
  answering(inode: Inode, caller: Caller, call: Call): void {
    if (inode.pin?.place === undefined) return
    const { intents } = this.parts
    this.parts.state.pinnedFor(
      inode.pin.place,
      { tid: caller.tid, call: call.number, outlasts: intents.outlastsInode(call) },
      !intents.isSeen(call),
    )
  }

  /** Drops that record: the caller was gone, or another daemon has answered it. */
  notAnswered(inode: Inode, caller: Caller): void {
    if (inode.pin?.place !== undefined) this.parts.state.notPinnedFor(inode.pin.place, caller.tid)
    if (inode.pin !== undefined && !this.active.has(inode)) this.watch(inode, QUIET_MS)
  }

  /** Notes that an opener was answered, or is about to be: from now on the pin must stay (or come). */
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
    // Callers that are done must not pile up while new ones come.
    if ((inode.callers?.size ?? 0) >= CALLERS_MAX) inode.lookAt = Math.min(due, inode.lookAt)
  }

  private used(inode: Inode, now: number): void {
    inode.closed = false
    inode.looksInARow = 0
    inode.streak = now - inode.usedAt < QUIET_MS ? inode.streak + 1 : 1
    inode.usedAt = now
  }

  /** Whether it is opened again and again. */
  private isBusy(inode: Inode): boolean {
    return inode.streak > ANSWERS_OF_ONE
  }

  /** Notes that a caller in an open(2) was given an inode that is not pinned yet: it will ask for the attributes. */
  told(inode: Inode, { tid }: Caller, call: Call): void {
    call.asks = true
    this.remember(inode, tid, call)
  }

  /** Ends the thread's claim on the device it opened before: one open(2) opens one device. */
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
   * The call of a caller that was {@link told}, so that it need not be read again when it asks for the attributes. The caller
   * may be in another open(2) by then (of a descriptor's path in /proc), so the result says only that it is in one.
   */
  expected(inode: Inode, { tid }: Caller): Call | undefined {
    const call = inode.callers?.get(tid)
    return call?.asks ? someCall('open', call.number) : undefined
  }

  /** Notes that an attempt to pin it has ended, and that all who waited were answered. */
  attempted(inode: Inode): void {
    if (inode.pin !== undefined) this.watch(inode, QUIET_MS)
    else this.unpin(inode)
  }

  /** Notes that a process has closed it. */
  closedByUser(inode: Inode): void {
    if (!this.active.has(inode)) return
    inode.closed = true
    const busy = this.isBusy(inode)
    this.watch(inode, busy ? QUIET_MS : 0)
    if (busy) return
    inode.looksInARow = LOOKS_IN_A_ROW - 1
    this.lookAtThoseDue(this.isAlone(inode))
  }

  /** Whether no other inode was asked for in the ms before this one: then looks delay nobody. */
  private isAlone(inode: Inode): boolean {
    return inode === this.lastAnswered && this.answeredAt - this.othersAnsweredAt >= ALONE_MS
  }

  /** Schedules the next look at its callers. */
  private watch(inode: Inode, delay: number): void {
    this.active.add(inode)
    inode.lookDelay = FIRST_LOOK_MS
    inode.lookAt = monotonicMs() + delay
    this.arm(inode.lookAt)
  }

  /** Sets the timer to `due`, unless it goes off earlier. */
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

  /** @param alone whether looks delay nobody */
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
    // One after another: each takes some microseconds.
    if (due.length > 0 && (going > 0 || this.looks.size >= LOOKS_MAX)) next = Math.min(next, now + 1)
    else if (due.length > 0) this.look(due)
    this.arm(next)
  }

  private look(inodes: readonly Inode[]): void {
    const asked: { inode: Inode; tid: number; call: Call }[] = []
    /** Each thread once, and whether its stack is needed. */
    const threads = new Map<number, boolean>()
    for (const inode of inodes) {
      // From now on, a caller that is seen elsewhere did not get in by attributes that were still valid.
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
        // Unless it was answered again in the meantime.
        if (inode.callers?.get(tid) !== call) continue
        const late = this.parts.intents.endsSoon(call) && monotonicMs() - inode.usedAt > this.parts.options.holdSeconds * 1000
        if (late || !this.parts.intents.mayStillBeIn(call, found.get(tid))) this.gone(inode, tid)
      }
      for (const inode of inodes) {
        // The inodes of a look that was given up have been looked at one by one since then.
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

  /** Gives up a look that is stuck: its inodes are looked at one by one. The look at a single inode is waited for. */
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

  /** Ends the pin if no caller needs it any more. */
  private judge(inode: Inode): void {
    const now = monotonicMs()
    if (inode.lookAt > now) return this.arm(inode.lookAt)
    const left = inode.callers?.size ?? 0
    if (left === 0 && !inode.unseen && inode.lingerUntil <= now) {
      if (!inode.trusted) return this.unpin(inode)
      this.distrust(inode)
    }
    if (left === 0 && inode.unseen && inode.known && !this.haveForgotten(inode)) return
    // A caller that never stops running is not seen to leave its call. If the kernel has forgotten the inode, it has.
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
   * Makes the kernel forget an inode, because of callers that cannot be seen.
   *
   * @returns false if it had forgotten it before (and told an earlier daemon so)
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

  /** Invalidates the kernel's copy of an inode's attributes. */
  distrust(inode: Inode): void {
    inode.trusted = false
    this.parts.kernel.invalidate(inode.id)
  }

  /** The kernel has forgotten `nlookup` lookups of an inode (FUSE_FORGET). */
  forget(inode: Inode, count: number): void {
    inode.nlookup = Math.max(0, inode.nlookup - count)
    if (inode.known) {
      // For an inode that was taken over this proves little: it may be the kernel's inode from an
      // earlier daemon, dropped before this daemon answered a lookup.
      if (inode.takenOver && inode.pin === undefined) this.parts.inodes.release(inode)
      else if (inode.takenOver) this.watch(inode, QUIET_MS)
      return
    }
    this.forgotten(inode)
  }

  private forgotten(inode: Inode): void {
    // The next caller gets another inode.
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

  /** Ends an inode's pin, and forgets its callers. */
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

  /** Makes the kernel drop all unused names, if it cannot be told to drop one. */
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
