// SPDX-License-Identifier: MIT
/** Names of devices that are gone: the kernel is told to forget them, a few at a time, until it has. */
import t, { type Test } from 'tap'

import { DeadNames } from '../../../src/tree/dead-names.js'
import type { DiskSeq } from '../../../src/devices/names.js'
import { Inode } from '../../../src/gate/inode.js'
import { sleep, until } from '../../helpers/tree.js'

/** A kernel that is told to forget; `forgets` says for which ids it does. */
function fixture(t: Test, { prunes = true, forgets = (_: bigint) => true }: { prunes?: boolean; forgets?: (id: bigint) => boolean } = {}) {
  const inodes = new Map<bigint, Inode>()
  const told: bigint[] = []
  const state = { prunedAll: 0, prunes, forgets }
  const dead = new DeadNames(
    (id) => {
      if (!state.prunes) return false
      told.push(id)
      const inode = inodes.get(id)
      if (inode !== undefined && state.forgets(id)) {
        inode.nlookup = 0
        inode.takenOver = false
      }
      return true
    },
    () => void state.prunedAll++,
  )
  t.teardown(() => dead.close())
  return {
    dead,
    told,
    state,
    inodes,
    add(diskseq: number, nlookup = 1) {
      const inode = new Inode(BigInt(diskseq) << 12n, BigInt(diskseq) as DiskSeq, 0)
      inode.nlookup = nlookup
      inodes.set(inode.id, inode)
      dead.add(inode)
      return inode
    },
  }
}

t.test('the kernel is told to forget a name that is gone, and then the name is gone', async (t) => {
  const { dead, told, add } = fixture(t)
  add(13)
  add(14)
  t.equal(dead.size, 2)
  t.strictSame(told, [], 'not at once: a user of the device releases it a moment later')
  await until(() => dead.size === 0)
  t.strictSame(told, [13n << 12n, 14n << 12n], 'each once')
})

t.test('the kernel is not told of a name that it has forgotten by itself', async (t) => {
  const { dead, told, add } = fixture(t)
  add(13).nlookup = 0
  await until(() => dead.size === 0)
  t.strictSame(told, [])
})

t.test('a name in use is tried again and again', async (t) => {
  const { dead, told, state, add } = fixture(t, { forgets: () => false })
  add(13)
  await until(() => told.length >= 3)
  t.equal(dead.size, 1)
  state.forgets = () => true
  await until(() => dead.size === 0)
  const before = told.length
  await sleep(700)
  t.equal(told.length, before, 'and not any more after that')
})

t.test('the kernel is told of a name from an earlier daemon, too', async (t) => {
  const { dead, told, add } = fixture(t)
  add(13, 0).takenOver = true
  await until(() => told.length === 1)
  await until(() => dead.size === 0)
  t.pass('until it is forgotten')
})

t.test('the kernel is told few names at a time, and those in use keep none from their turn', async (t) => {
  // The first thousand are in use.
  const { dead, told, add } = fixture(t, { forgets: (id) => id > 1000n << 12n })
  for (let diskseq = 1; diskseq <= 1100; diskseq++) add(diskseq)
  await until(() => told.length > 0)
  t.ok(told.length <= 256, `${told.length} at a time`)
  await until(() => dead.size === 1000, 10_000)
  t.equal(new Set(told).size, 1100, 'each has had its turn')
})

t.test('a name that is added twice counts once', async (t) => {
  const { dead, told, add } = fixture(t)
  dead.add(add(13))
  t.equal(dead.size, 1)
  await until(() => dead.size === 0)
  t.equal(told.length, 1)
})

t.test('a kernel that cannot be told which name drops all names, if that is worth it', async (t) => {
  const { state, add } = fixture(t, { prunes: false })
  for (let diskseq = 1; diskseq <= 255; diskseq++) add(diskseq)
  await sleep(1200)
  t.equal(state.prunedAll, 0, 'not for a few')
  add(256)
  await until(() => state.prunedAll > 0)
  t.equal(state.prunedAll, 1, 'once for all of them')
})

t.test('it does not drop all again once they are forgotten', async (t) => {
  const { dead, state, inodes, add } = fixture(t, { prunes: false })
  for (let diskseq = 1; diskseq <= 300; diskseq++) add(diskseq)
  await until(() => state.prunedAll === 1)
  for (const inode of inodes.values()) inode.nlookup = 0
  await until(() => dead.size === 0)
  t.equal(state.prunedAll, 1)
})

t.test('a kernel that can be told which name never drops all', async (t) => {
  const { dead, state, add } = fixture(t)
  for (let diskseq = 1; diskseq <= 1000; diskseq++) add(diskseq)
  await until(() => dead.size === 0, 10_000)
  t.equal(state.prunedAll, 0)
})

t.test('no timer runs while there are no such names, nor after close()', async (t) => {
  const { dead, told, add } = fixture(t, { forgets: () => false })
  const timers = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length
  const before = timers()
  const inode = add(13)
  t.equal(timers(), before + 1)
  inode.nlookup = 0
  await until(() => dead.size === 0)
  t.equal(timers(), before, 'the last name ends it')
  add(14)
  t.equal(timers(), before + 1, 'the next name begins it anew')
  dead.close()
  t.equal(timers(), before)
  await sleep(700)
  t.strictSame(told, [])
})
