/** The guard with one safety mechanism switched off: its source with another text in one place. */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import type { Test } from 'tap'

import { ROOT } from './root.js'
import { cleanup } from './tree.js'

const NATIVE = join(ROOT, 'native')

/** Writes it to a file of the test's own. */
export function twinGuardSource(t: Test, mechanism: string, off: string): string {
  const parts = readFileSync(join(NATIVE, 'guard.c'), 'utf8').split(mechanism)
  if (parts.length !== 2) throw new Error(`the guard has this ${parts.length - 1} times: ${mechanism}`)
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-guard-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const path = join(directory, 'guard.c')
  writeFileSync(path, parts.join(off))
  return path
}

/** Builds it, as the Makefile does. */
export function twinGuard(t: Test, mechanism: string, off: string): string {
  const source = twinGuardSource(t, mechanism, off)
  const program = source.slice(0, -'.c'.length)
  execFileSync('cc', ['-O2', `-I${NATIVE}`, '-o', program, source])
  return program
}
