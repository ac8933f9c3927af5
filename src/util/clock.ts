// SPDX-License-Identifier: MIT
/** The monotonic clock: no step of the wall clock moves it. */

// As a global it is looked up and asked for each time, which takes longer than the time of day.
const { performance } = globalThis

/** Ms since the process began, with fractions; for differences. */
export function monotonicMs(): number {
  return performance.now()
}
