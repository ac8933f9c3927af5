/** What the guard finds out of a mount; here somebody serves it who never answers. */
import { spawn, spawnSync } from 'node:child_process'
import { closeSync, constants, existsSync, mkdtempSync, openSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { E } from '../src/errno.js'
import { mountData, mountsAt, parseMountOptions } from '../src/mountpoint.js'
import { native } from '../src/native.js'
import { SharedState, STATE_SIZE } from '../src/state.js'
import { twinGuard } from './helpers/guard.js'
import { ROOT } from './helpers/root.js'
import { cleanup, sleep, until } from './helpers/tree.js'

/** PROBE_TICKS of the guard, and some more, ms. */
const PROBED_MS = 7500
const MNT_FORCE = 1

/** A mount, and a guard of it. */
async function guarded(t: Test, program = join(ROOT, 'native/diskseqfs-guard')) {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-probe-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const mountpoint = mkdtempSync(join(tmpdir(), 'diskseqfs-test-'))
  cleanup(t, () => rmSync(mountpoint, { recursive: true }))
  const guard = spawn(program, [join(directory, 'guard')], { stdio: 'ignore' })
  cleanup(t, () => guard.kill('SIGKILL'))
  await until(() => existsSync(join(directory, 'guard')))

  const fuse = openSync('/dev/fuse', constants.O_RDWR | constants.O_NONBLOCK)
  cleanup(t, () => closeSync(fuse))
  const options = parseMountOptions('', [])
  if (native.mount('test', mountpoint, 'fuse.test', options.flags, mountData(fuse, options)) < 0) throw new Error('cannot mount')
  cleanup(t, () => {
    for (const _ of mountsAt(mountpoint)) spawnSync('umount', ['--lazy', mountpoint])
  })
  const stateFd = native.sharedMemory(STATE_SIZE)
  cleanup(t, () => native.close(stateFd))
  const state = new SharedState(native.mapMemory(stateFd, STATE_SIZE) as ArrayBuffer)
  state.mount = { mountpoint, device: mountsAt(mountpoint)[0]?.device as string, pidNamespace: 0 }

  const connection = native.packetConnect(join(directory, 'guard'))
  cleanup(t, () => native.close(connection))
  native.sendDescriptors(connection, mountpoint, [fuse, stateFd])
  const buffer = new Uint8Array(16)
  /** How often the guard has said that the tree answers. */
  const heard = () => {
    let count = 0
    for (;;) {
      const found = native.receiveDescriptors(connection, buffer, false)
      if (found === -E.EAGAIN) return count
      if (typeof found === 'number' || found[0] === 0) throw new Error('the guard has hung up')
      count++
    }
  }
  await until(() => heard() === 1) // it agrees
  return { mountpoint, heard }
}

/** The connection ends, and the mount stays. */
async function aborted(t: Test, program?: string) {
  const { mountpoint, heard } = await guarded(t, program)
  const busy = openSync(mountpoint, native.O_PATH)
  cleanup(t, () => closeSync(busy))
  await new Promise((resolve) => native.unmount(mountpoint, MNT_FORCE, resolve))
  t.equal(mountsAt(mountpoint).length, 1, 'it is mounted')
  await sleep(PROBED_MS)
  return heard()
}

t.test('a mount whose connection has ended does not answer', async (t) => {
  t.equal(await aborted(t), 0)
})

t.test('twin: if any answer will do, it does', async (t) => {
  t.equal(await aborted(t, twinGuard(t, 'fstatfs(fd, &figures) == 0', '(fstatfs(fd, &figures), true)')), 1)
})

t.test('one that somebody serves who says nothing does not answer', async (t) => {
  const { heard } = await guarded(t)
  await sleep(PROBED_MS)
  t.equal(heard(), 0)
})

t.test('one that is hidden by another is not to blame', async (t) => {
  const { mountpoint, heard } = await guarded(t)
  t.equal(native.mount('over', mountpoint, 'tmpfs', 0, 'size=4k'), 0)
  await sleep(PROBED_MS)
  t.equal(heard(), 1)
})
