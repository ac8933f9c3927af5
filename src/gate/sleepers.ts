// SPDX-License-Identifier: MIT
/**
 * Callers that have sent a request and were preempted before they went to sleep. Their system call can
 * only be read when they sleep, so each is looked at until then: a few in each millisecond, root's
 * apart, and users in turns, however many threads one of them has.
 */
import { monotonicMs } from '../util/clock.js'
import { FairQueue } from '../fuse/fair-queue.js'
import { type Call, RUNNING } from './intent.js'
import type { Caller } from '../fuse/transport.js'

/** Time between two rounds, ms, and callers looked at in each, of root and of all users: some 50 us in all. */
const ROUND_MS = 1
const LOOKS_A_ROUND = 8
/** A caller that runs for this long, ms, does not wait for this answer (an earlier daemon has given it). */
const RUNNING_MAX_MS = 10_000

interface Waiting {
  readonly caller: Caller
  readonly since: number
  readonly then: (call: Call) => void
}

export class Sleepers {
  private readonly root = new FairQueue<Waiting>()
  private readonly others = new FairQueue<Waiting>()
  private timer: NodeJS.Timeout | undefined

  /** @param look returns {@link RUNNING} while the caller does not sleep */
  constructor(private readonly look: (caller: Caller) => Call) {}

  /** Calls `then` when the caller sleeps. */
  add(caller: Caller, then: (call: Call) => void): void {
    this.put({ caller, since: monotonicMs(), then })
    this.timer ??= setTimeout(() => this.round(), ROUND_MS)
  }

  private put(one: Waiting): void {
    const { uid, tid } = one.caller
    if (uid === 0) this.root.add(tid, one)
    else this.others.add(uid, one)
  }

  private round(): void {
    this.timer = undefined
    const asleep: [Waiting, Call][] = []
    for (const queue of [this.root, this.others]) {
      for (let left = Math.min(LOOKS_A_ROUND, queue.size); left > 0; left--) {
        const one = queue.take() as Waiting
        const call = this.look(one.caller)
        if (call === RUNNING && monotonicMs() - one.since < RUNNING_MAX_MS) this.put(one)
        else asleep.push([one, call])
      }
    }
    if (this.root.size + this.others.size > 0) this.timer = setTimeout(() => this.round(), ROUND_MS)
    for (const [{ then }, call] of asleep) then(call)
  }
}
