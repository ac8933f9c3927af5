// SPDX-License-Identifier: MIT
/** What the guard finds out about a mount. Here a daemon serves it that never answers. */
import { spawn, spawnSync } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { mountsAt } from '../../src/util/mountpoint.js'
import { native } from '../../src/native.js'
import { twinGuard } from '../helpers/guard.js'
import { ROOT } from '../helpers/root.js'
import { cleanup, sleep, until } from '../helpers/tree.js'

/** PROBE_TICKS of the guard, plus a margin, in ms. */
const PROBED_MS = 7500
const MNT_FORCE = 1

/** A mount, and a guard of it. */
async function guarded(t: Test, program = join(ROOT, 'native/diskseqfs-guard')) {
  const mountpoint = mkdtempSync(join(tmpdir(), 'diskseqfs-test-'))
  cleanup(t, () => rmSync(mountpoint, { recursive: true }))
  const { NODE_OPTIONS: _, ...env } = process.env
  const guard = spawn(program, [process.execPath, join(ROOT, 'test/helpers/silent-daemon.mjs'), mountpoint], {
    stdio: ['ignore', 'pipe', 'inherit'],
    env,
  })
  let said = ''
  guard.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()))
  const ended = new Promise((resolve) => guard.on('close', resolve))
  cleanup(t, async () => {
    const daemon = childOf(guard.pid as number)
    guard.kill('SIGKILL')
    process.kill(daemon, 'SIGKILL')
    await ended
    for (const _ of mountsAt(mountpoint)) spawnSync('umount', ['--lazy', mountpoint])
  })
  await until(() => mountsAt(mountpoint).length > 0 && said.includes('end'))
  /** How often the guard has said that the tree answers. */
  return { mountpoint, heard: () => said.split('\n').filter((line) => line === 'ok').length }
}

/** The daemon that a guard has started. The guard's other child is the one that probes. */
const childOf = (guard: number) =>
  readFileSync(`/proc/${guard}/task/${guard}/children`, 'latin1')
    .trim()
    .split(' ')
    .map(Number)
    .find((pid) => readFileSync(`/proc/${pid}/cmdline`, 'latin1').includes('silent-daemon')) as number

/** Ends the connection; the mount stays. */
async function aborted(t: Test, program?: string) {
  const { mountpoint, heard } = await guarded(t, program)
  const busy = openSync(mountpoint, native.O_PATH)
  cleanup(t, () => closeSync(busy))
  await new Promise((resolve) => native.unmount(mountpoint, MNT_FORCE, resolve))
  t.equal(mountsAt(mountpoint).length, 1, 'it is still mounted')
  await sleep(PROBED_MS)
  return heard()
}

t.test('a mount whose connection has ended does not answer', async (t) => {
  t.equal(await aborted(t), 0)
})

t.test('twin: if any answer counts, it does', async (t) => {
  t.equal(await aborted(t, twinGuard(t, 'fstatfs(fd, &figures) == 0', '(fstatfs(fd, &figures), true)')), 1)
})

t.test('a mount whose daemon says nothing does not answer', async (t) => {
  const { heard } = await guarded(t)
  await sleep(PROBED_MS)
  t.equal(heard(), 0)
})

t.test('a mount that is hidden by another one is not taken for hung', async (t) => {
  const { mountpoint, heard } = await guarded(t)
  t.equal(native.mount('over', mountpoint, 'tmpfs', 0, 'size=4k'), 0)
  await sleep(PROBED_MS)
  t.equal(heard(), 1)
})
