// SPDX-License-Identifier: MIT
/** The monotonic clock: no step of the wall clock moves it. */

// As a global it is looked up and asked for each time, which takes longer than the time of day.
const { performance } = globalThis

/** Ms since the process began, with fractions; for differences. */
export function monotonicMs(): number {
  return performance.now()
}

const TICK_MS = 100

/**
 * A time limit, counted in ticks of 100 ms for each of which this process has to be woken. On a busy machine, where the
 * other side is late, ticks are late as well, and a process that was stopped has used up one of them.
 *
 * @param ms rounded up to whole ticks
 * @returns cancels it
 */
export function afterTicks(ms: number, call: () => void): () => void {
  let left = Math.ceil(ms / TICK_MS)
  const timer = setInterval(() => {
    if (--left > 0) return
    clearInterval(timer)
    call()
  }, TICK_MS)
  return () => clearInterval(timer)
}
