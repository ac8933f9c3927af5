/** The C helper: churn, latencies, exclusive operations. Compiled on first use; static, to run in any virtual machine (PIE, as code below 4 GiB is taken for 32-bit: src/intent.ts). */
import { execFileSync, spawn } from 'node:child_process'
import { mkdirSync, readdirSync, renameSync, statSync } from 'node:fs'
import { join } from 'node:path'

import { ROOT } from './root.js'

const SOURCES = join(ROOT, 'test/helpers/blk')
const BINARY = join(ROOT, 'build/blk')

function binary(): string {
  const sources = readdirSync(SOURCES).map((file) => join(SOURCES, file))
  const newest = Math.max(...sources.map((file) => statSync(file).mtimeMs))
  if ((statSync(BINARY, { throwIfNoEntry: false })?.mtimeMs ?? 0) < newest) {
    mkdirSync(join(ROOT, 'build'), { recursive: true })
    const units = sources.filter((file) => file.endsWith('.c'))
    // Renamed into place: somebody may be running the old one.
    const fresh = `${BINARY}.${process.pid}`
    execFileSync('cc', ['-O2', '-static-pie', '-fPIE', '-Wall', '-Wextra', '-Werror', '-pthread', '-o', fresh, ...units])
    renameSync(fresh, BINARY)
  }
  return BINARY
}

export const blkPath = binary

/** Runs one subcommand to its end and returns the line of JSON it prints. */
export async function blk(...args: string[]): Promise<Record<string, any>> {
  const child = spawn(binary(), args, { stdio: ['ignore', 'pipe', 'pipe'] })
  let out = ''
  let err = ''
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (err += chunk.toString()))
  const code = await new Promise((resolve) => child.on('close', resolve))
  if (code !== 0) throw new Error(`blk ${args.join(' ')} ended with ${code}: ${err}`)
  return JSON.parse(out.trim().split('\n').at(-1) ?? '')
}

/** Adds counts by name, of errors say. */
export function addCounts(to: Record<string, number>, counts: Readonly<Record<string, number>>): void {
  for (const [name, count] of Object.entries(counts)) to[name] = (to[name] ?? 0) + count
}
