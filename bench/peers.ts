// SPDX-License-Identifier: MIT
/** What diskseqfs is compared with: the same tree, served by other programs. See peers/. */
import { type ChildProcess, spawn } from 'node:child_process'
import { join } from 'node:path'

import { ROOT } from '../test/helpers/root.js'
import { cleanup, daemon, end } from './common.js'

/**
 * - `diskseqfs`: the daemon itself
 * - `c`: peers/server.c, on libfuse 3
 * - `fuse-native`: peers/fuse-native.mjs, on the npm package (libfuse 2)
 */
export const KINDS = ['diskseqfs', 'c', 'fuse-native'] as const
export type Kind = (typeof KINDS)[number]

/** The program of `c`. */
export const PEER = join(ROOT, 'build/peers/server')

const COMMANDS: Readonly<Record<Exclude<Kind, 'diskseqfs'>, readonly string[]>> = {
  c: [PEER],
  'fuse-native': [process.execPath, join(ROOT, 'bench/peers/fuse-native.mjs')],
}

/** Starts one; resolves when it serves, with the ms that took. It ends with the benchmark. */
export async function startPeer(kind: Kind, mountpoint: string): Promise<{ child: ChildProcess; ms: number }> {
  const started = kind === 'diskseqfs' ? await daemon(mountpoint) : await serve(COMMANDS[kind], mountpoint)
  cleanup(() => end(started.child))
  return started
}

function serve([command, ...args]: readonly string[], mountpoint: string): Promise<{ child: ChildProcess; ms: number }> {
  const began = performance.now()
  const child = spawn(command as string, [...args, mountpoint], { stdio: ['ignore', 'ignore', 'pipe'] })
  return new Promise((resolve, reject) => {
    let text = ''
    child.on('error', reject)
    child.on('exit', () => reject(new Error(`${command} ended:\n${text}`)))
    child.stderr.on('data', (chunk: Buffer) => {
      text += chunk.toString()
      if (text.includes('"msg":"mounted"')) resolve({ child, ms: performance.now() - began })
    })
  })
}
