// SPDX-License-Identifier: MIT
/**
 * The C helper: churn, latencies, exclusive operations. Compiled on first use; static, to run in any virtual machine.
 */
import { execFileSync, spawn } from 'node:child_process'
import { mkdirSync, readdirSync, readFileSync, renameSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { ROOT } from './root.js'

const SOURCES = join(ROOT, 'test/helpers/blk')

/** The same program built twice; blk-fixed has its code and data below 4 GiB, as 32-bit programs do. */
const KINDS = { blk: ['-static-pie', '-fPIE'], 'blk-fixed': ['-static', '-no-pie', '-fno-pie'] } as const
export type BlkKind = keyof typeof KINDS

export function blkPath(kind: BlkKind = 'blk'): string {
  const binary = join(ROOT, 'build', kind)
  const sources = readdirSync(SOURCES).map((file) => join(SOURCES, file))
  const newest = Math.max(...sources.map((file) => statSync(file).mtimeMs))
  if ((statSync(binary, { throwIfNoEntry: false })?.mtimeMs ?? 0) < newest) {
    mkdirSync(join(ROOT, 'build'), { recursive: true })
    const units = sources.filter((file) => file.endsWith('.c'))
    // Renamed into place, as the old one may be running.
    const fresh = `${binary}.${process.pid}`
    execFileSync('cc', ['-O2', ...KINDS[kind], '-Wall', '-Wextra', '-Werror', '-pthread', '-o', fresh, ...units])
    renameSync(fresh, binary)
  }
  return binary
}

/**
 * Offsets in an ELF file: the start, size and number of its program headers; in a header, its type, flags and
 * sizes.
 */
const ELF = { PHOFF: 32, PHENTSIZE: 54, PHNUM: 56, TYPE: 0, FLAGS: 4, REST: 8, ALIGN: 48, PT_LOAD: 1, PT_NOTE: 4, PF_X: 1 }

/**
 * Writes the static program with an extra code segment of length 0 at address 0. For the kernel, its code begins there.
 */
export function blkWithCodeAtZero(path: string): void {
  const file = readFileSync(blkPath('blk-fixed'))
  const size = file.readUInt16LE(ELF.PHENTSIZE)
  const headers = Array.from({ length: file.readUInt16LE(ELF.PHNUM) }, (_, i) => Number(file.readBigUInt64LE(ELF.PHOFF)) + i * size)
  const note = headers.find((at) => file.readUInt32LE(at + ELF.TYPE) === ELF.PT_NOTE)
  if (note === undefined) throw new Error('no header to spare')
  file.writeUInt32LE(ELF.PT_LOAD, note + ELF.TYPE)
  file.writeUInt32LE(ELF.PF_X, note + ELF.FLAGS)
  file.fill(0, note + ELF.REST, note + ELF.ALIGN)
  file.writeBigUInt64LE(4096n, note + ELF.ALIGN)
  writeFileSync(path, file, { mode: 0o755 })
}

/** Runs one subcommand to its end and returns the line of JSON it prints. */
export function blk(...args: string[]): Promise<Record<string, any>> {
  return blkOf('blk', ...args)
}

export async function blkOf(kind: BlkKind, ...args: string[]): Promise<Record<string, any>> {
  const child = spawn(blkPath(kind), args, { stdio: ['ignore', 'pipe', 'pipe'] })
  let out = ''
  let err = ''
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (err += chunk.toString()))
  const code = await new Promise((resolve) => child.on('close', resolve))
  if (code !== 0) throw new Error(`blk ${args.join(' ')} ended with ${code}: ${err}`)
  return JSON.parse(out.trim().split('\n').at(-1) ?? '')
}

/** Adds counts by name, such as those of errors. */
export function addCounts(to: Record<string, number>, counts: Readonly<Record<string, number>>): void {
  for (const [name, count] of Object.entries(counts)) to[name] = (to[name] ?? 0) + count
}
