// SPDX-License-Identifier: MIT
/** Programs in C with one safety mechanism switched off: their source with other text in some places. */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'

import type { Test } from 'tap'

import { ROOT } from './root.js'
import { cleanup } from './tree.js'

const NATIVE = join(ROOT, 'native/guard')
const GUARD = join(NATIVE, 'guard.c')
const STORE = join(NATIVE, 'store.c')

/** What stands there, exactly once, and what is to stand there. */
export type Change = readonly [mechanism: string, off: string]

/** Writes the source to a file of the test's own. */
function twinSource(t: Test, path: string, changes: readonly Change[]): string {
  let source = readFileSync(path, 'utf8')
  for (const [mechanism, off] of changes) {
    const parts = source.split(mechanism)
    if (parts.length !== 2) throw new Error(`${path} has this ${parts.length - 1} times: ${mechanism}`)
    source = parts.join(off)
  }
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-twin-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const twin = join(directory, basename(path))
  writeFileSync(twin, source)
  return twin
}

/** Builds it, as the Makefile does; static, to run in any virtual machine. */
function built(source: string, ...others: readonly string[]): string {
  const program = source.slice(0, -'.c'.length)
  execFileSync('cc', ['-O2', '-static', `-I${NATIVE}`, '-o', program, source, ...others])
  return program
}

export const twinGuardSource = (t: Test, ...change: Change) => twinSource(t, GUARD, [change])
export const twinGuard = (t: Test, ...change: Change) => built(twinGuardSource(t, ...change), STORE)
/** One that differs in more than a mechanism: where what it is to stand is brought about. */
export const changedGuard = (t: Test, ...changes: Change[]) => built(twinSource(t, GUARD, changes), STORE)
/** Of what it keeps. */
export const twinGuardStore = (t: Test, ...change: Change) => built(twinSource(t, STORE, [change]), GUARD)
/** Of what udev runs. */
export const twinLink = (t: Test, ...changes: Change[]) => built(twinSource(t, join(ROOT, 'udev/diskseqfs-link.c'), changes))
