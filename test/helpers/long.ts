// SPDX-License-Identifier: MIT
import tap, { type Test } from 'tap'

/**
 * The two forms of a test: the short one shows what a change breaks; the long one (LONG=1, `make check-long`) goes
 * on for as long as it takes to see what is rare.
 */
export const LONG = process.env['LONG'] === '1'

/** The name of a test that has both. `make check-long` finds the long ones by it (scripts/check). */
export const twoForms = (name: string): string => (LONG ? `${name}, at length` : name)

/** A test that has the long form only: what it is about is rare, or is seen by others sooner. */
export function onlyAtLength(name: string, options: { timeout?: number }, test: (t: Test) => Promise<unknown>): void {
  if (LONG) tap.test(`${name}, at length`, options, test)
}
