// SPDX-License-Identifier: MIT
/**
 * Whether it pays to wait a moment for the next request before the event loop
 * goes to sleep. A program that opens disks one after another sends the next request in some microseconds,
 * and then the daemon need not be woken, which is half of what an open takes. A program that
 * opens one now and then is not; and where other programs want the processor,
 * sleeping gets it back sooner than waiting.
 */

/** How long it waits at most, us. */
export const WAIT_US = 100
/** A wait that took this long, ms, was somebody else's time. */
const LATE_MS = 0.2
/** After n waits in vain the next 2^n - 1 chances are let pass, up to this n. */
const VAIN_MAX = 7

export class BusyPoll {
  private vain = 0
  private skip = 0

  /** Whether to wait now; asked once for each chance. */
  pays(): boolean {
    if (this.skip === 0) return true
    this.skip--
    return false
  }

  /** How a wait ended, and how long it took, ms. */
  waited(came: boolean, ms: number): void {
    if (came && ms < LATE_MS) {
      this.vain = 0
      return
    }
    this.vain = Math.min(this.vain + 1, VAIN_MAX)
    this.skip = 2 ** this.vain - 1
  }
}
