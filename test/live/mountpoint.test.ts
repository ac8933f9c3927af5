// SPDX-License-Identifier: MIT
/** The mounts at a path are found, and the end of a mount is noticed. */
import { execFileSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { mountsAt, MountWatch } from '../../src/util/mountpoint.js'
import { native } from '../../src/native.js'
import { sleep, until } from '../helpers/tree.js'

/** A directory for mount points. */
function temporary(t: Test) {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-mountpoint-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  return directory
}

/** A tmpfs; unmounted when the test ends. */
function tmpfs(t: Test, directory: string, source: string) {
  mkdirSync(directory, { recursive: true })
  execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=4k', source, directory])
  let mounted = true
  const unmount = () => {
    if (mounted) execFileSync('umount', [directory])
    mounted = false
  }
  t.teardown(unmount)
  return unmount
}

t.test('the mount at a path is found, whatever characters the path has', async (t) => {
  const top = temporary(t)
  for (const name of ['plain', 'with a space', 'tab\tand\nline', 'back\\slash', '\\040', 'ümläut', '#hash']) {
    const directory = join(top, name)
    t.strictSame(mountsAt(directory), [], 'nothing yet')
    const unmount = tmpfs(t, directory, 'test source')
    t.match(mountsAt(directory), [{ target: directory, type: 'tmpfs', source: 'test source' }], JSON.stringify(name))
    t.strictSame(mountsAt(`${directory}x`), [])
    t.strictSame(mountsAt(join(directory, 'below')), [])
    unmount()
    t.strictSame(mountsAt(directory), [], 'nothing is mounted any more')
  }
})

t.test('of several mounts at one path, the topmost is last', async (t) => {
  const directory = join(temporary(t), 'stack')
  tmpfs(t, directory, 'first')
  const unmount = tmpfs(t, directory, 'second')
  const mounts = mountsAt(directory)
  t.match(mounts, [{ source: 'first' }, { source: 'second' }])
  t.not(mounts[0]?.id, mounts[1]?.id)
  unmount()
  t.match(mountsAt(directory), [{ source: 'first' }])
})

t.test('a watch reports when its mount is gone, and not before', async (t) => {
  const top = temporary(t)
  const directory = join(top, 'watched')
  const unmount = tmpfs(t, directory, 'watched')
  const [mount] = mountsAt(directory)
  let gone = 0
  const watch = new MountWatch(native, mount?.id as number, () => gone++)
  let others = 0
  const other = new MountWatch(native, 0, () => others++)
  t.teardown(() => {
    watch.close()
    other.close()
  })
  await sleep(20) // until both are watching
  tmpfs(t, join(top, 'another'), 'another')()
  await until(() => others > 0)
  t.equal(gone, 0, 'other mounts come and go')
  unmount()
  await until(() => gone > 0)
  t.pass('the watch reports that its mount is gone')
})

t.test('a mount that is gone before its watch has begun is reported, too', async (t) => {
  const directory = join(temporary(t), 'brief')
  const unmount = tmpfs(t, directory, 'brief')
  const [mount] = mountsAt(directory)
  let gone = 0
  const early = new MountWatch(native, mount?.id as number, () => gone++)
  unmount()
  let never = 0
  const late = new MountWatch(native, mount?.id as number, () => never++)
  t.teardown(() => {
    early.close()
    late.close()
  })
  await until(() => gone > 0 && never > 0)
  t.pass('both ways')
})
