// SPDX-License-Identifier: MIT
/** What a case has found, in a few words: printed, and put into the table of all cases. */
import type { Test } from 'tap'

let found: string[] = []

export function note(t: Test, text: string): void {
  t.comment(text)
  found.push(text)
}

/** All since the last time. */
export function taken(): readonly string[] {
  const notes = found
  found = []
  return notes
}
