// SPDX-License-Identifier: MIT
/**
 * The addon and the guard, built with AddressSanitizer, LeakSanitizer and
 * UndefinedBehaviorSanitizer. Compiled on first use, like blk.ts.
 *
 * Node itself is not built with them. Their libraries are preloaded, so that they make each
 * allocation. They do not see what V8 has in pages of its own, and report it as leaked. So only
 * leaks that the addon has a part in count.
 */
import { execFileSync, spawn } from 'node:child_process'
import { mkdirSync, readdirSync, realpathSync, renameSync, statSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join, resolve } from 'node:path'

import { ROOT, sourcesIn } from './root.js'

const BUILT = join(ROOT, 'build/asan')
const FLAGS = [
  '-g1',
  '-O1',
  '-fno-omit-frame-pointer',
  '-fsanitize=address,undefined',
  '-fno-sanitize-recover=all',
  '-Wall',
  '-Wextra',
  '-Werror',
]

/** All files below these paths. */
function files(paths: readonly string[]): string[] {
  return paths.flatMap((path) =>
    statSync(path).isDirectory()
      ? files(
          readdirSync(path)
            .filter((name) => name !== 'build')
            .map((name) => join(path, name)),
        )
      : [path],
  )
}

/** Calls `make` if the output is older than its sources. */
function built(name: string, sources: readonly string[], make: (output: string) => void): string {
  const output = join(BUILT, name)
  const newest = Math.max(...files(sources.map((path) => join(ROOT, path))).map((path) => statSync(path).mtimeMs))
  if ((statSync(output, { throwIfNoEntry: false })?.mtimeMs ?? 0) < newest) {
    mkdirSync(dirname(output), { recursive: true })
    const fresh = `${output}.${process.pid}`
    make(fresh)
    renameSync(fresh, output)
  }
  return output
}

const cc = (output: string, ...args: string[]) =>
  execFileSync('cc', ['-std=gnu17', ...FLAGS, '-o', output, ...args], { cwd: ROOT, stdio: 'inherit' })

/** The guard itself. */
export const guardPath = () => built('diskseqfs-guard', ['native'], (output) => cc(output, ...sourcesIn(join(ROOT, 'native/guard'))))

/** The program that feeds the guard with garbage; built from other sources if `directory` has them. */
export function guardFuzzPath(directory?: string): string {
  const compile = (output: string, from: string) => cc(output, `-I${from}`, 'test/fuzz/guard.c')
  if (directory === undefined) {
    return built('guard-fuzz', ['native', 'test/fuzz/guard.c'], (output) => compile(output, join(ROOT, 'native/guard')))
  }
  const output = join(directory, 'guard-fuzz')
  compile(output, directory)
  return output
}

/** The compiled fuzzer, with the sanitized addon beside it instead of the real one. */
function tree(): string {
  const require = createRequire(import.meta.url)
  const include = [resolve(process.execPath, '../../include/node'), (require('node-addon-api') as { include_dir: string }).include_dir]
  built('native/build/Release/diskseqfs_native.node', ['native', 'test/fuzz/addon.cc'], (output) =>
    execFileSync(
      process.env['CXX'] ?? 'g++',
      [
        '-shared',
        '-fPIC',
        '-std=c++17',
        ...FLAGS,
        '-Wno-unused-parameter',
        '-DNAPI_VERSION=8',
        '-DNAPI_DISABLE_CPP_EXCEPTIONS',
        '-DNODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS',
        '-D_FILE_OFFSET_BITS=64',
        ...include.map((path) => `-I${path}`),
        '-o',
        output,
        'test/fuzz/addon.cc',
      ],
      { cwd: ROOT, stdio: 'inherit' },
    ),
  )
  execFileSync(join(ROOT, 'node_modules/.bin/tsc'), ['-p', 'test/fuzz'], { cwd: ROOT, stdio: 'inherit' })
  return BUILT
}

let compiled: string | undefined

export interface Ended {
  readonly code: number | null
  readonly out: string
  readonly err: string
}

/** Runs a program to its end. */
export async function ended(command: string, args: readonly string[], env: NodeJS.ProcessEnv = process.env): Promise<Ended> {
  const child = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'], env })
  let out = ''
  let err = ''
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (err += chunk.toString()))
  const code = await new Promise<number | null>((done) => child.on('close', done))
  return { code, out, err }
}

/** Runs a script of test/fuzz/ in a Node whose addon has sanitizers. */
export async function node(script: string, ...args: string[]): Promise<Ended & { leaks: string[] }> {
  compiled ??= tree()
  const libraries = ['libasan.so', 'libubsan.so'].map((name) =>
    realpathSync(
      execFileSync(process.env['CXX'] ?? 'g++', [`-print-file-name=${name}`])
        .toString()
        .trim(),
    ),
  )
  const { NODE_OPTIONS: _, ...environment } = process.env
  const result = await ended(process.execPath, ['--expose-gc', join(compiled, 'test/fuzz', script), ...args], {
    ...environment,
    LD_PRELOAD: libraries.join(':'),
    // Freed memory is not reused for a while, but only so much of it that it does not look like a
    // leak. The exit code would be of leaks only, Node's among them; any other error is SIGABRT.
    ASAN_OPTIONS: 'detect_leaks=1:quarantine_size_mb=32:exitcode=0:abort_on_error=1',
    UBSAN_OPTIONS: 'print_stacktrace=1:abort_on_error=1',
  })
  const leaks = result.err
    .split('\n\n')
    .filter((part) => /^(Direct|Indirect) leak/.test(part) && / (native|test\/fuzz)\/\w+\.cc:/.test(part))
  return { ...result, leaks }
}
