/**
 * When pins end. A pin lasts until the kernel has forgotten the inode; since
 * the kernel keeps unused names cached for as long as it likes, it is made to
 * drop them soon after use. Then:
 *
 * - a node whose callers were all in open(2) loses its pin at once: an open
 *   file holds the inode, so nobody needs the pin any more;
 * - one that was looked up by a call which opens by number after letting go of
 *   the path (mount(2), a device-mapper table) lingers: some ms, and for as
 *   long as the caller is still in that call;
 * - one that stays in use needs no pin of ours after `hold`: whoever uses it
 *   has the device open. Not before every caller is out of its system call.
 */
import { LRUCache } from 'lru-cache'

import { monotonicMs } from './clock.js'
import { errnoName } from './errno.js'
import type { Call, Intents } from './intent.js'
import type { Logger } from './log.js'
import type { Native } from './native.js'
import type { Node, NodeTable } from './node.js'
import type { PinOpener } from './pin.js'
import type { SharedState } from './state.js'
import type { Caller } from './transport.js'

export interface ReaperOptions {
  /** How long a pin outlives the inode where it may still be needed, ms. */
  readonly lingerMs: number
  /** After how many seconds without a request a node in use loses its pin. */
  readonly holdSeconds: number
}

/** From the last answer, or close, to the first attempt to have it forgotten, ms. */
const PRUNE_DELAY_MS = 3
/**
 * Attempts come twice as late each time, up to this. They go on for as long as the
 * pin lasts: whether somebody still uses the node is not known. inotify tells of a
 * close before the kernel has let go of the name, which a program that is not given
 * the processor may be long about; and of two waiting events that are alike it keeps
 * one (inotify_merge, 6.18), so that opens and closes cannot be counted.
 */
const PRUNE_DELAY_MAX_MS = 1000
/** Names nobody opened are dropped from the kernel's cache this late, ms. */
const LAZY_PRUNE_MS = 1000
/** A hold is counted in ticks, so that a clock that jumps costs one tick, not the hold. */
const TICK_MS = 1000
/** Pins that may linger at once. */
const LINGERING_MAX = 4096
/** Callers remembered before those are looked for that are done. */
const CALLERS_SWEEP = 256

export class Reaper {
  /** Pinned nodes that the kernel knows. */
  private readonly active = new Set<Node>()
  /** Pinned nodes that it has forgotten. */
  private readonly lingering = new LRUCache<bigint, Node>({
    max: LINGERING_MAX,
    dispose: (node) => {
      if (node.nlookup === 0) this.unpin(node)
    },
  })

  private pruneTimer: NodeJS.Timeout | undefined
  private pruneAt = Infinity
  private lazyTimer: NodeJS.Timeout | undefined
  private lingerTimer: NodeJS.Timeout | undefined
  private tick: NodeJS.Timeout | undefined
  private pruning = false
  private pruneAgain = false
  private mountFd = -1
  private hasInode: (id: bigint) => boolean = () => true

  constructor(
    private readonly native: Pick<Native, 'prune' | 'close'>,
    private readonly nodes: NodeTable,
    private readonly opener: PinOpener,
    private readonly intents: Intents,
    private readonly options: ReaperOptions,
    private readonly log: Logger,
    private readonly state: Pick<SharedState, 'pinnedFor' | 'notPinnedFor'>,
  ) {}

  /**
   * @param mountFd from {@link Native.pickMount}; owned from now on
   * @param hasInode whether the kernel has an inode of that id
   */
  start(mountFd: number, hasInode: (id: bigint) => boolean): void {
    this.mountFd = mountFd
    this.hasInode = hasInode
    if (this.active.size > 0) this.armPrune(monotonicMs())
  }

  /** Drops every pin: no FORGET comes from a filesystem that is gone. */
  close(): void {
    for (const timer of [this.pruneTimer, this.lazyTimer, this.lingerTimer]) clearTimeout(timer)
    clearInterval(this.tick)
    for (const node of this.nodes) {
      node.nlookup = 0
      if (node.pin !== undefined) this.opener.close(node.pin)
      node.pin = undefined
    }
    this.active.clear()
    this.lingering.clear()
    if (this.mountFd >= 0 && !this.pruning) this.native.close(this.mountFd)
    this.mountFd = -1
  }

  /** Whether somebody was answered who may not have opened yet what he is to open. */
  awaited(): boolean {
    for (const node of this.nodes) {
      if (node.pin === undefined) continue
      this.sweep(node.callers)
      if (node.callers.size > 0) return true
    }
    return false
  }

  /** A pin that an earlier daemon had: the kernel may know its inode. */
  adopted(node: Node): void {
    this.watch(node)
  }

  /** An opener is about to be answered: whoever takes over must know of it. */
  answering(node: Node, caller: Caller, call: Call): void {
    if (node.pin?.place === undefined) return
    const unknown = call.intent === 'unknown'
    const outlasts = unknown && this.intents.outlastsInode(call)
    this.state.pinnedFor(node.pin.place, { tid: caller.tid, call: call.number, outlasts }, unknown)
  }

  /** It had gone, or another daemon had answered it. */
  notAnswered(node: Node, caller: Caller): void {
    if (node.pin?.place !== undefined) this.state.notPinnedFor(node.pin.place, caller.tid)
    if (node.pin !== undefined && node.known && !this.active.has(node)) this.watch(node)
  }

  /** An opener was answered, or is about to be: from here the pin must stay. */
  answered(node: Node, caller: Caller, call: Call): void {
    if (caller.tid !== 0) {
      if (node.callers.size >= CALLERS_SWEEP) this.sweep(node.callers)
      node.callers.set(caller.tid, call.number)
    }
    if (call.intent === 'unknown') {
      node.lingers = true
      if (this.intents.outlastsInode(call)) node.lingerers.set(caller.tid, call.number)
    }
    if (node.pin !== undefined) this.watch(node)
  }

  /** A pinned node whose lookups the kernel may now be made to forget. */
  private watch(node: Node): void {
    this.active.add(node)
    if (this.lingering.size > 0) this.lingering.delete(node.id)
    node.heldTicks = 0
    this.pruneSoon(node)
    this.tick ??= setInterval(() => this.hold(), TICK_MS)
  }

  /** An attempt to pin it has ended; those who asked for it are answered, or have given up. */
  settled(node: Node): void {
    if (!node.known) this.forgotten(node)
    else if (node.pin !== undefined) this.watch(node)
  }

  /** A name was looked at. The kernel caches it, and what it does not know. */
  inspected(): void {
    this.lazyTimer ??= setTimeout(() => {
      this.lazyTimer = undefined
      this.prune()
    }, LAZY_PRUNE_MS)
  }

  /** Somebody closed it; the kernel lets go of its name a moment later. */
  closed(node: Node): void {
    if (this.active.has(node)) this.pruneSoon(node)
  }

  /** Events of closes were lost: it may have been anybody's. */
  lostTrack(): void {
    for (const node of this.active) this.pruneSoon(node)
  }

  /**
   * The kernel has dropped an inode, and says how many lookups were answered with it.
   *
   * Of an inherited node this says less than it seems to: it may be the inode that
   * an earlier daemon gave out, dropped before this one answered a lookup, as the
   * kernel hands out FORGETs later than lookups that came after them. So the kernel
   * is asked.
   */
  forget(node: Node, count: number): void {
    node.nlookup = Math.max(0, node.nlookup - count)
    if (!node.known) this.forgotten(node)
    else if (node.inherited && node.pin !== undefined) this.watch(node)
    else if (node.inherited) this.nodes.release(node)
  }

  /** The kernel has no inode of it any more. */
  forgotten(node: Node): void {
    this.deactivate(node)
    if (node.pin === undefined || !node.lingers) return this.unpin(node)
    node.forgottenAt = monotonicMs()
    node.lingerUntil =
      node.forgottenAt + (node.moreCallers ? this.options.holdSeconds * TICK_MS : this.options.lingerMs)
    this.lingering.set(node.id, node)
    this.armLinger()
  }

  private deactivate(node: Node): void {
    this.active.delete(node)
    if (this.active.size > 0) return
    clearInterval(this.tick)
    this.tick = undefined
    clearTimeout(this.pruneTimer)
    this.pruneAt = Infinity
  }

  /** Ends a node's pin and what was remembered for its sake. */
  unpin(node: Node): void {
    const pin = node.pin
    node.pin = undefined
    node.callers.clear()
    node.lingerers.clear()
    node.lingers = node.moreCallers = false
    this.deactivate(node)
    if (pin !== undefined) this.opener.close(pin)
    this.nodes.release(node)
  }

  private pruneSoon(node: Node): void {
    node.pruneDelay = PRUNE_DELAY_MS
    node.pruneDue = monotonicMs() + PRUNE_DELAY_MS
    this.armPrune(node.pruneDue)
  }

  /** Has the timer go off at `due`, or before. */
  private armPrune(due: number): void {
    if (due >= this.pruneAt) return
    clearTimeout(this.pruneTimer)
    this.pruneAt = due
    this.pruneTimer = setTimeout(() => {
      this.pruneAt = Infinity
      this.pruneDueNodes()
    }, Math.max(0, Math.ceil(due - monotonicMs())))
  }

  private pruneDueNodes(): void {
    const now = monotonicMs()
    let due = false
    let next = Infinity
    for (const node of this.active) {
      // One prune is an attempt for all: those that are nearly due join in.
      if (node.pruneDue <= now + node.pruneDelay / 4) {
        if (node.inherited && this.forgottenBefore(node)) continue
        due = true
        node.pruneDue = now + node.pruneDelay
        node.pruneDelay = Math.min(node.pruneDelay * 2, PRUNE_DELAY_MAX_MS)
      }
      next = Math.min(next, node.pruneDue)
    }
    if (due) this.prune()
    this.armPrune(next)
  }

  /**
   * An earlier daemon may have heard that the kernel has forgotten a node, and
   * died before it let go of the pin. That there is no inode says nothing of a
   * caller that was answered and has not come to make one.
   */
  private forgottenBefore(node: Node): boolean {
    if (node.nlookup > 0 || node.moreCallers || this.hasInode(node.id)) return false
    this.sweep(node.callers)
    if (node.callers.size > 0) return false
    node.inherited = false
    this.forgotten(node)
    return true
  }

  private prune(): void {
    if (this.mountFd < 0) return
    if (this.pruning) {
      this.pruneAgain = true
      return
    }
    this.pruning = true
    const fd = this.mountFd
    this.native.prune(fd, (error) => {
      this.pruning = false
      if (this.mountFd < 0) {
        this.native.close(fd)
        return
      }
      if (error !== 0) {
        this.log.error({ errno: errnoName(error) }, 'the kernel did not drop its unused names')
      }
      if (this.pruneAgain) {
        this.pruneAgain = false
        this.prune()
      }
    })
  }

  private hold(): void {
    for (const node of this.active) {
      if (++node.heldTicks < this.options.holdSeconds) continue
      this.sweep(node.callers)
      // Somebody was answered and has not been given the processor since.
      if (node.callers.size > 0) continue
      this.log.debug({ diskseq: node.name }, 'still in use after the hold; its user holds the device')
      this.unpin(node)
    }
  }

  private sweep(callers: Map<number, number>): void {
    for (const [tid, call] of callers) {
      if (!this.intents.mayStillBeIn(tid, call)) callers.delete(tid)
    }
  }

  private armLinger(): void {
    this.lingerTimer ??= setTimeout(() => {
      this.lingerTimer = undefined
      this.endLingering()
      if (this.lingering.size > 0) this.armLinger()
    }, Math.max(1, this.options.lingerMs))
  }

  private endLingering(): void {
    const now = monotonicMs()
    for (const node of [...this.lingering.values()]) {
      if (node.lingerUntil > now) continue
      this.sweep(node.lingerers)
      const starved = now - node.forgottenAt < this.options.holdSeconds * TICK_MS
      if (node.lingerers.size > 0 && starved) {
        node.lingerUntil = now + this.options.lingerMs
      } else {
        this.lingering.delete(node.id)
      }
    }
  }
}
