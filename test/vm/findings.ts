// SPDX-License-Identifier: MIT
/** The findings of a case, in a few words: they are printed, and put into the table of all cases. */
import type { Test } from 'tap'

let found: string[] = []

export function note(t: Test, text: string): void {
  t.comment(text)
  found.push(text)
}

/** All findings since the last call. */
export function taken(): readonly string[] {
  const notes = found
  found = []
  return notes
}
