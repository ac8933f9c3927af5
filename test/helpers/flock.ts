// SPDX-License-Identifier: MIT
/** A process that holds a lock. */
import { spawn } from 'node:child_process'

import type { Test } from 'tap'

import { cleanup, until } from './tree.js'

/** Has a process of that user hold flock(2) on a file or directory, until the test ends. */
export async function held(t: Test, path: string, uid: number): Promise<void> {
  const child = spawn('flock', ['--exclusive', '--nonblock', '--no-fork', path, 'sh', '-c', 'echo held; exec sleep 1000'], {
    uid,
    gid: uid,
    stdio: ['ignore', 'pipe', 'ignore'],
  })
  let said = ''
  child.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()))
  const ended = new Promise((resolve) => child.on('close', resolve))
  cleanup(t, async () => {
    child.kill('SIGKILL')
    await ended
  })
  await until(() => said === 'held\n')
}
