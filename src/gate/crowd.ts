// SPDX-License-Identifier: MIT
/**
 * Users who make calls that take the directory's lock for themselves (mkdir, rename,
 * open with O_CREAT), one after another. The kernel asks for the name before it finds out
 * that they may not, and holds the lock meanwhile; whoever asks for a name that the kernel
 * does not know stands behind all of them.
 *
 * What is answered cannot be held back, so the askers are, before they come to the lock:
 * every walk into a directory needs its attributes, which the kernel otherwise
 * has for long. While there is a crowd in it the kernel must ask for them each time, and users are
 * answered in turns, so many in a second. Root is answered at once; and so is who has the
 * lock already, and is asked once more whether it may (may_create()).
 */
import { monotonicMs } from '../util/clock.js'
import type { NodeId } from '../devices/names.js'
import { FairQueue } from '../fuse/fair-queue.js'
import type { Intents } from './intent.js'
import type { Caller, KernelCache } from '../fuse/transport.js'

/** So many such calls of all users in a second are no crowd, and so many at once. */
const CALLS_PER_S = 200
const CALLS_AT_ONCE = 50
/** In a crowd, one user's walk is let in so often, ms. */
const PACE_MS = 5
/** It is over when there was no such call for so long, ms, and nobody waits. */
const OVER_MS = 2000

export class Crowd {
  private calls = CALLS_AT_ONCE
  private counted = 0
  private last = -Infinity
  private timer: NodeJS.Timeout | undefined
  /** Each tells whether it was still there to be let in. */
  private readonly waiting = new FairQueue<() => boolean>()
  /** The directories that have had one, until it is over. */
  private readonly gathered = new Set<NodeId>()

  constructor(
    private readonly kernel: Pick<KernelCache, 'invalidate'>,
    private readonly intents: Pick<Intents, 'arrives'>,
  ) {}

  /** Whether there is one: then the attributes of that directory are valid for no time. */
  isIn(directory: NodeId): boolean {
    return this.gathered.has(directory)
  }

  /** Somebody's call has the directory's lock for itself. */
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
   * Lets somebody in who asks for the attributes of a directory.
   *
   * @param enter false where nobody is there any more
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
