// SPDX-License-Identifier: MIT
/** C programs with one safety mechanism switched off: built from their sources with changes in some places. */
import { execFileSync } from 'node:child_process'
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import type { Test } from 'tap'

import { ROOT, sourcesIn } from './root.js'
import { cleanup } from './tree.js'

/** Text that occurs exactly once in the sources, and its replacement. */
export type Change = readonly [mechanism: string, off: string]

function change(directory: string, [mechanism, off]: Change): void {
  const found = sourcesIn(directory).flatMap((path) => {
    const parts = readFileSync(path, 'utf8').split(mechanism)
    return parts.slice(1).map(() => ({ path, text: parts.join(off) }))
  })
  if (found.length !== 1) throw new Error(`${directory} has this ${found.length} times: ${mechanism}`)
  for (const { path, text } of found) writeFileSync(path, text)
}

/** Copies sources into a directory of the test's own, and changes them there. */
function changed(t: Test, from: string, changes: readonly Change[]): string {
  const parent = mkdtempSync(join(tmpdir(), 'diskseqfs-twin-'))
  cleanup(t, () => rmSync(parent, { recursive: true }))
  const directory = join(parent, 'sources')
  cpSync(from, directory, { recursive: true, filter: (path) => path === from || /\.[ch]$/.test(path) })
  cpSync(join(ROOT, 'native/shared'), join(parent, 'shared'), { recursive: true })
  for (const each of changes) change(directory, each)
  return directory
}

/** Builds one program of all sources: static, to run in any virtual machine; not optimized, as that takes most of the time. */
function built(directory: string, name: string): string {
  const program = join(directory, 'bin', name)
  mkdirSync(join(directory, 'bin'))
  execFileSync('cc', ['-O0', '-static', '-o', program, ...sourcesIn(directory)])
  return program
}

const GUARD = join(ROOT, 'native/guard')

/** The changed sources of the guard, in a directory. */
export const changedGuardSources = (t: Test, ...changes: Change[]) => changed(t, GUARD, changes)
/** A guard that differs in more than a mechanism, to bring about the situation of the test. */
export const changedGuard = (t: Test, ...changes: Change[]) => built(changedGuardSources(t, ...changes), 'diskseqfs-guard')
export const twinGuard = (t: Test, ...change: Change) => changedGuard(t, change)
/** The same for the program that udev runs. */
export const twinLink = (t: Test, ...changes: Change[]) => built(changed(t, join(ROOT, 'udev'), changes), 'diskseqfs-link')
