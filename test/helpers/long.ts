// SPDX-License-Identifier: MIT
/**
 * The two forms of a test: the short one shows what a change breaks; the long one (LONG=1, `make check-long`) goes
 * on for as long as it takes to see what is rare.
 */
export const LONG = process.env['LONG'] === '1'

/** The name of a test that has both. `make check-long` finds the long ones by it (scripts/check). */
export const twoForms = (name: string): string => (LONG ? `${name}, at length` : name)
