// SPDX-License-Identifier: MIT
/**
 * Slows down users who take the directory's lock exclusively again and again (mkdir, rename, open with O_CREAT). The
 * kernel sends a LOOKUP before it checks their permission, and holds the lock meanwhile; every process
 * that asks for a name the kernel does not have waits behind them.
 *
 * A LOOKUP must be answered at once, so these users are held back earlier: every path walk needs the
 * directory's attributes, which are normally valid for long. In a crowded directory they are valid for
 * no time, and GETATTRs of users are answered in turns, a limited number per second. Root is answered at
 * once, and so is a caller that already has the lock (may_create() asks again).
 */
import { monotonicMs } from '../util/clock.js'
import type { NodeId } from '../devices/names.js'
import { FairQueue } from '../fuse/fair-queue.js'
import type { Intents } from './intent.js'
import type { Caller, KernelCache } from '../fuse/transport.js'

/** Up to this many such calls per second, and at once, are not a crowd; of all users together. */
const CALLS_PER_S = 200
const CALLS_AT_ONCE = 50
/** In a crowd, time between two walks that are let in, ms. */
const PACE_MS = 5
/** A crowd ends after this time without such a call, ms, if no walk waits. */
const OVER_MS = 2000

export class Crowd {
  private calls = CALLS_AT_ONCE
  private counted = 0
  private last = -Infinity
  private timer: NodeJS.Timeout | undefined
  /** Walks that wait; each returns whether its caller was still there. */
  private readonly waiting = new FairQueue<() => boolean>()
  /** Directories with a crowd. */
  private readonly gathered = new Set<NodeId>()

  constructor(
    private readonly kernel: Pick<KernelCache, 'invalidate'>,
    private readonly intents: Pick<Intents, 'arrives'>,
  ) {}

  /** Whether there is a crowd: then the directory's attributes are valid for no time. */
  isIn(directory: NodeId): boolean {
    return this.gathered.has(directory)
  }

  /** Counts a call that has the directory's lock exclusively. */
  locks({ uid }: Caller, directory: NodeId): void {
    if (uid === 0) return
    const now = monotonicMs()
    this.calls = Math.min(CALLS_AT_ONCE, this.calls + ((now - this.counted) * CALLS_PER_S) / 1000) - 1
    this.counted = this.last = now
    if (this.calls >= 0) return
    this.calls = 0
    if (this.gathered.has(directory)) return
    this.gathered.add(directory)
    this.kernel.invalidate(directory)
    this.timer ??= setInterval(() => this.tick(), PACE_MS)
  }

  /**
   * Lets a caller in that asks for a directory's attributes, at once or when it is its turn.
   *
   * @param enter returns false if the caller is gone
   */
  admit({ uid, tid }: Caller, directory: NodeId, enter: () => boolean): void {
    if (uid !== 0 && this.isIn(directory) && this.intents.arrives(tid)) this.waiting.add(uid, enter)
    else enter()
  }

  private tick(): void {
    while (this.waiting.take()?.() === false) continue
    if (this.waiting.size === 0 && monotonicMs() - this.last > OVER_MS) this.disperse()
  }

  private disperse(): void {
    this.gathered.clear()
    clearInterval(this.timer)
    this.timer = undefined
  }

  close(): void {
    clearInterval(this.timer)
    this.waiting.clear()
  }
}
