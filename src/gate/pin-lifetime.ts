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
import type { Node, NodeTable } from './inode.js'
import type { PinOpener } from './pin.js'
import type { SharedState } from '../handover/shared-state.js'
import type { Caller, Inodes } from '../fuse/transport.js'

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
/** Of nodes that are looked at at a time. */
const LOOK_AT_ONCE = 64
/**
 * A look that has taken this long, ms, stands at a thread that began an execve(2) at that
 * very moment, or has no processor: the others are looked at without it.
 */
const LOOK_STUCK_MS = 50
/**
 * Looks under way at a time, each on a thread of its own. Where the callers of a node hold
 * them up, two are stuck for that node: with others, and alone. So whoever may open fewer
 * than half as many nodes holds up nobody else's.
 */
const LOOKS_MAX = 512
/** Callers that are remembered of a node before it is looked at though it is not quiet. */
const CALLERS_MAX = 256
/** Of a node that waits to be forgotten: attempts come twice as late each time, up to this, ms. */
const PRUNE_DELAY_MAX_MS = 1000
/** A hold is counted in ticks, so that a clock that jumps costs one tick, not the hold. */
const TICK_MS = 1000

/** One look, at the callers of some nodes. */
interface Look {
  readonly nodes: readonly Node[]
  readonly began: number
  stuck: boolean
}

export interface PinLifetimeParts {
  readonly native: Pick<Native, 'prune' | 'close' | 'lookAtThreads'>
  readonly nodes: NodeTable
  /** Closes the pins. */
  readonly opener: PinOpener
  /** What callers are doing. */
  readonly intents: Intents
  /** Where it is written down whom a pin was taken for. */
  readonly state: Pick<SharedState, 'pinnedFor' | 'notPinnedFor'>
  /** The kernel's. */
  readonly inodes: Inodes
  readonly options: PinLifetimeOptions
  readonly log: Logger
}

export class PinLifetime {
  /** Pinned nodes. */
  private readonly active = new Set<Node>()
  private readonly looks = new Set<Look>()
  /** The node that a thread was answered about last, in an open(2). */
  private readonly openers = new Map<number, Node>()
  private answeredAt = -Infinity
  /** Of which node; and when another one was, before that. */
  private lastAnswered: Node | undefined
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
    for (const node of this.parts.nodes) {
      node.nlookup = 0
      if (node.pin !== undefined) this.parts.opener.close(node.pin)
      node.pin = undefined
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
  takenOver(node: Node): void {
    if (node.unseen) this.startHold(node)
    this.watch(node, 0)
  }

  /** An opener is about to be answered: whoever takes over must know of it. */
  answering(node: Node, caller: Caller, call: Call): void {
    if (node.pin?.place === undefined) return
    const { intents } = this.parts
    this.parts.state.pinnedFor(
      node.pin.place,
      { tid: caller.tid, call: call.number, outlasts: intents.outlastsInode(call) },
      !intents.isSeen(call),
    )
  }

  /** It had gone, or another daemon had answered it. */
  notAnswered(node: Node, caller: Caller): void {
    if (node.pin?.place !== undefined) this.parts.state.notPinnedFor(node.pin.place, caller.tid)
    if (node.pin !== undefined && !this.active.has(node)) this.watch(node, QUIET_MS)
  }

  /** An opener was answered, or is about to be: from here the pin must stay, or come. */
  answered(node: Node, caller: Caller, call: Call): void {
    if (this.parts.intents.isSeen(call)) {
      this.remember(node, caller.tid, call)
    } else {
      node.unseen = true
      this.startHold(node)
    }
    if (node !== this.lastAnswered) this.othersAnsweredAt = this.answeredAt
    this.lastAnswered = node
    this.answeredAt = monotonicMs()
    if (node.pin === undefined) {
      node.usedAt = this.answeredAt
      return
    }
    this.used(node, this.answeredAt)
    const due = node.lookAt
    this.watch(node, this.isBusy(node) ? QUIET_MS : FIRST_LOOK_MS)
    // Those that are done must not pile up while others come.
    if ((node.callers?.size ?? 0) >= CALLERS_MAX) node.lookAt = Math.min(due, node.lookAt)
  }

  private used(node: Node, now: number): void {
    node.closed = false
    node.looksInARow = 0
    node.streak = now - node.usedAt < QUIET_MS ? node.streak + 1 : 1
    node.usedAt = now
  }

  /** It is opened again and again. */
  private isBusy(node: Node): boolean {
    return node.streak > ANSWERS_OF_ONE
  }

  /** A caller in an open(2) is told of a node that is not pinned yet. It is to ask for the attributes. */
  told(node: Node, { tid }: Caller, call: Call): void {
    call.asks = true
    this.remember(node, tid, call)
  }

  /** A thread that opens one device is done with the one before: one open(2) opens one. */
  private remember(node: Node, tid: number, call: Call): void {
    const before = this.openers.get(tid)
    if (before !== undefined && before !== node && before.callers?.get(tid)?.intent === 'open') {
      before.callers.delete(tid)
      if (before.callers.size === 0 && before.pin !== undefined) this.watch(before, 0)
    }
    if (call.intent === 'open') this.openers.set(tid, node)
    else this.openers.delete(tid)
    node.callers ??= new Map()
    node.callers.set(tid, call)
    if (this.parts.intents.endsSoon(call)) node.goesOn = true
  }

  /**
   * The call of a caller that was {@link told}: when it comes to ask, it need not be looked
   * at once more. It may have gone on to another open(2) meanwhile, through a
   * descriptor, so that it is in one is all that is said of it.
   */
  expected(node: Node, { tid }: Caller): Call | undefined {
    const call = node.callers?.get(tid)
    return call?.asks ? someCall('open', call.number) : undefined
  }

  /** An attempt to pin it has ended, and those who waited for it have been answered. */
  attempted(node: Node): void {
    if (node.pin !== undefined) this.watch(node, QUIET_MS)
    else this.unpin(node)
  }

  /** Somebody closed it. */
  closedByUser(node: Node): void {
    if (!this.active.has(node)) return
    node.closed = true
    const busy = this.isBusy(node)
    this.watch(node, busy ? QUIET_MS : 0)
    if (busy) return
    node.looksInARow = LOOKS_IN_A_ROW - 1
    this.lookAtThoseDue(this.isAlone(node))
  }

  /** Nobody was answered about another node in the ms before it was answered about this one: looks take nobody's time. */
  private isAlone(node: Node): boolean {
    return node === this.lastAnswered && this.answeredAt - this.othersAnsweredAt >= ALONE_MS
  }

  /** Has its callers looked at some ms from now. */
  private watch(node: Node, delay: number): void {
    this.active.add(node)
    node.lookDelay = FIRST_LOOK_MS
    node.lookAt = monotonicMs() + delay
    this.arm(node.lookAt)
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
    const due: Node[] = []
    let overdue = 0
    for (const node of this.active) {
      if (node.looking) continue
      if (node.lookAt > now || due.length === LOOK_AT_ONCE) {
        next = Math.min(next, Math.max(node.lookAt, now + 1))
        continue
      }
      due.push(node)
      overdue = Math.max(overdue, now - node.lookAt)
    }
    if (due.length > 0 && !alone && now - this.answeredAt < ELSEWHERE_MS && overdue < OVERDUE_MAX_MS) return this.arm(now + 1)
    // One after another: all of them are over in some microseconds.
    if (due.length > 0 && (going > 0 || this.looks.size >= LOOKS_MAX)) next = Math.min(next, now + 1)
    else if (due.length > 0) this.look(due)
    this.arm(next)
  }

  private look(nodes: readonly Node[]): void {
    const asked: { node: Node; tid: number; call: Call }[] = []
    /** Each thread once, and whether its stack is needed. */
    const threads = new Map<number, boolean>()
    for (const node of nodes) {
      // Now, whoever is seen elsewhere has not got in by attributes that were valid.
      if (node.trusted) this.distrust(node)
      for (const [tid, call] of node.callers ?? []) {
        asked.push({ node, tid, call })
        threads.set(tid, threads.get(tid) === true || this.parts.intents.wantsStack(call))
      }
    }
    if (asked.length === 0) {
      for (const node of nodes) this.judge(node)
      return
    }
    const look: Look = { nodes, began: monotonicMs(), stuck: false }
    this.looks.add(look)
    for (const node of nodes) node.looking = true
    this.parts.native.lookAtThreads([...threads].flat(), (seen) => {
      this.looks.delete(look)
      if (this.closed) return
      const found = new Map([...threads.keys()].map((tid, i) => [tid, seen[i]]))
      for (const { node, tid, call } of asked) {
        // Not if it has been answered again since.
        if (node.callers?.get(tid) !== call) continue
        const late = this.parts.intents.endsSoon(call) && monotonicMs() - node.usedAt > this.parts.options.holdSeconds * 1000
        if (late || !this.parts.intents.mayStillBeIn(call, found.get(tid))) this.gone(node, tid)
      }
      for (const node of nodes) {
        // Those of a look that was given up have been looked at since, one by one.
        if (!look.stuck || nodes.length === 1) node.looking = false
        if (node.pin !== undefined && !node.looking) this.judge(node)
      }
      this.arm(monotonicMs())
    })
    this.arm(look.began + LOOK_STUCK_MS)
  }

  private gone(node: Node, tid: number): void {
    node.callers?.delete(tid)
    if (this.openers.get(tid) === node) this.openers.delete(tid)
  }

  /** The nodes that it was for are looked at one by one; one by itself waits for the look to end. */
  private giveUp(look: Look): void {
    look.stuck = true
    if (look.nodes.length === 1) return
    for (const node of look.nodes) {
      node.looking = false
      if (!this.active.has(node)) continue
      if (this.looks.size < LOOKS_MAX) this.look([node])
      else node.lookAt = monotonicMs() + LOOK_DELAY_MAX_MS
    }
  }

  /** Ends a pin that nobody needs any more. */
  private judge(node: Node): void {
    const now = monotonicMs()
    if (node.lookAt > now) return this.arm(node.lookAt)
    const left = node.callers?.size ?? 0
    if (left === 0 && !node.unseen && node.lingerUntil <= now) {
      if (!node.trusted) return this.unpin(node)
      this.distrust(node)
    }
    if (left === 0 && node.unseen && node.known && !this.haveForgotten(node)) return
    // Who runs on and on is not seen to leave its call: if nobody has the inode any more, it has.
    if (left > 0 && node.closed && node.known && node.lookDelay > FIRST_LOOK_MS) {
      this.parts.inodes.prune(node.id)
      node.closed = false
    }
    if (left > 0 && left <= CALLERS_IN_A_ROW && node.looksInARow > 0 && this.isAlone(node)) {
      node.looksInARow--
      return this.look([node])
    }
    const limit =
      left === 0 && node.unseen ? PRUNE_DELAY_MAX_MS : node.goesOn && now - node.usedAt < SOON_MS ? GOING_ON_LOOK_MS : LOOK_DELAY_MAX_MS
    node.lookAt = Math.max(now + node.lookDelay, now + left * LOOK_DELAY_MS_PER_CALLER)
    if (left === 0 && !node.unseen) node.lookAt = Math.max(now + 1, node.lingerUntil)
    node.lookDelay = Math.min(node.lookDelay * 2, limit)
    this.arm(node.lookAt)
  }

  /**
   * Has the kernel forget a node, for the sake of callers that cannot be seen.
   *
   * @returns false where it had forgotten it before, which an earlier daemon may have been told
   */
  private haveForgotten(node: Node): boolean {
    if (node.takenOver && node.nlookup === 0 && !this.parts.inodes.invalidate(node.id)) {
      node.takenOver = false
      this.forgotten(node)
      return false
    }
    if (!this.parts.inodes.prune(node.id)) this.pruneAll()
    return true
  }

  /** The kernel has to ask again for the attributes of a node. */
  distrust(node: Node): void {
    node.trusted = false
    this.parts.inodes.invalidate(node.id)
  }

  /** The kernel has dropped an inode, and says how many lookups were answered with it. */
  forget(node: Node, count: number): void {
    node.nlookup = Math.max(0, node.nlookup - count)
    if (node.known) {
      // Of one that was taken over this says less than it seems to: it may be the inode that
      // an earlier daemon gave out, dropped before this one answered a lookup.
      if (node.takenOver && node.pin === undefined) this.parts.nodes.release(node)
      else if (node.takenOver) this.watch(node, QUIET_MS)
      return
    }
    this.forgotten(node)
  }

  private forgotten(node: Node): void {
    // Whoever comes now gets another inode.
    node.kept = node.trusted = false
    for (const [tid, call] of node.callers ?? []) {
      if (!this.parts.intents.outlastsInode(call)) this.gone(node, tid)
    }
    if (node.unseen && !node.moreCallers) {
      node.unseen = false
      node.lingerUntil = monotonicMs() + this.parts.options.lingerMs
    }
    if (node.pin === undefined) this.parts.nodes.release(node)
    else this.watch(node, 0)
  }

  /** Ends a node's pin and what was remembered for its sake. */
  unpin(node: Node): void {
    const pin = node.pin
    node.pin = undefined
    for (const tid of node.callers?.keys() ?? []) this.gone(node, tid)
    node.callers = undefined
    node.unseen = node.moreCallers = node.goesOn = false
    this.active.delete(node)
    if (this.active.size === 0) {
      clearInterval(this.tick)
      this.tick = undefined
      this.openers.clear()
    }
    if (pin !== undefined) this.parts.opener.close(pin)
    this.parts.nodes.release(node)
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

  private startHold(node: Node): void {
    node.unseenTicks = 0
    if (this.closed) return // an open that came to its end after that
    this.tick ??= setInterval(() => this.hold(), TICK_MS)
  }

  private hold(): void {
    for (const node of this.active) {
      if (!node.unseen || ++node.unseenTicks < this.parts.options.holdSeconds) continue
      this.parts.log.debug({ diskseq: node.name }, 'still in use after the hold; its user holds the device')
      node.unseen = node.moreCallers = false
      this.watch(node, 0)
    }
  }
}
