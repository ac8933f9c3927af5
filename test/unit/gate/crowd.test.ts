// SPDX-License-Identifier: MIT
/** A crowd of users at the directory's lock: callers are held back before it, and let in one by one. */
import t, { type Test } from 'tap'

import { FUSE_ROOT_ID } from '../../../src/fuse/wire.js'
import { Crowd } from '../../../src/gate/crowd.js'
import { sleep, until } from '../../helpers/tree.js'

const user = (uid: number, tid = uid) => ({ tid, uid, gid: uid })

function fixture(t: Test) {
  /** Ids of inodes whose attributes were invalidated. */
  const invalidated: bigint[] = []
  /** Threads that hold the lock already. */
  const inside = new Set<number>()
  const crowd = new Crowd(
    {
      invalidate(id) {
        invalidated.push(id)
        return true
      },
    },
    { arrives: (tid) => !inside.has(tid) },
  )
  t.teardown(() => crowd.close())
  const entered: string[] = []
  return {
    crowd,
    invalidated,
    inside,
    entered,
    locks(count: number, uid = 60001) {
      for (let i = 0; i < count; i++) crowd.locks(user(uid), FUSE_ROOT_ID)
    },
    admit: (uid: number, name: string, tid?: number) => crowd.admit(user(uid, tid), FUSE_ROOT_ID, () => entered.push(name) > 0),
  }
}

t.test('some calls at once are no crowd, and all callers are let in', async (t) => {
  const { crowd, invalidated, entered, locks, admit } = fixture(t)
  t.equal(crowd.isIn(FUSE_ROOT_ID), false)
  locks(50)
  t.equal(crowd.isIn(FUSE_ROOT_ID), false, 'fifty at once')
  admit(60001, 'a')
  admit(60002, 'b')
  admit(0, 'root')
  t.strictSame(entered, ['a', 'b', 'root'])
  t.strictSame(invalidated, [])
})

t.test('more of them are a crowd, and the kernel is made to ask for the root from then on', async (t) => {
  const { crowd, invalidated, locks } = fixture(t)
  locks(60)
  t.equal(crowd.isIn(FUSE_ROOT_ID), true)
  t.strictSame(invalidated, [FUSE_ROOT_ID])
  locks(1000)
  t.strictSame(invalidated, [FUSE_ROOT_ID], 'the kernel is told once')
})

t.test('the calls of all users count together', async (t) => {
  const { crowd, locks } = fixture(t)
  for (let uid = 60001; uid < 60061; uid++) locks(1, uid)
  t.equal(crowd.isIn(FUSE_ROOT_ID), true)
})

t.test('calls of root make no crowd', async (t) => {
  const { crowd, locks } = fixture(t)
  locks(10_000, 0)
  t.equal(crowd.isIn(FUSE_ROOT_ID), false)
})

t.test('calls that are far between make no crowd', async (t) => {
  const { crowd, locks } = fixture(t)
  locks(40)
  // Two hundred calls a second are no crowd; this is half of that.
  for (let i = 0; i < 20; i++) {
    await sleep(50)
    locks(5)
  }
  t.equal(crowd.isIn(FUSE_ROOT_ID), false)
})

t.test('in a crowd users are let in one by one, in turns', async (t) => {
  const { crowd, entered, locks, admit } = fixture(t)
  locks(60)
  for (let i = 0; i < 6; i++) admit(60001, `a${i}`)
  for (let i = 0; i < 2; i++) admit(60002, `b${i}`)
  t.strictSame(entered, [], 'none is let in at once')
  const began = performance.now()
  await until(() => entered.length >= 4)
  // Timers may come late, and never come early.
  t.ok(performance.now() - began >= 12, `four of them in ${(performance.now() - began).toFixed(1)} ms`)
  await until(() => entered.length === 8)
  t.strictSame(entered, ['a0', 'b0', 'a1', 'b1', 'a2', 'a3', 'a4', 'a5'])
  t.equal(crowd.isIn(FUSE_ROOT_ID), true)
})

t.test('root is let in at once, and so is a caller that has the lock already', async (t) => {
  const { entered, inside, locks, admit } = fixture(t)
  locks(60)
  for (let i = 0; i < 20; i++) admit(60001, `a${i}`)
  admit(0, 'root')
  t.strictSame(entered, ['root'])
  inside.add(4711)
  admit(60001, 'inside', 4711)
  t.strictSame(entered, ['root', 'inside'], 'all others wait behind the lock')
})

t.test('a crowd that goes on stays one; with its end the kernel may cache the attributes again', async (t) => {
  const { crowd, entered, invalidated, locks, admit } = fixture(t)
  locks(60)
  await sleep(1000)
  locks(1)
  await sleep(1500)
  t.equal(crowd.isIn(FUSE_ROOT_ID), true, 'a user has called since')
  await until(() => !crowd.isIn(FUSE_ROOT_ID), 5000)
  admit(60001, 'a')
  t.strictSame(entered, ['a'])
  locks(60)
  t.equal(crowd.isIn(FUSE_ROOT_ID), true, 'a crowd may come again')
  t.strictSame(invalidated, [FUSE_ROOT_ID, FUSE_ROOT_ID])
})

t.test('a crowd in one directory is no crowd in another', async (t) => {
  const { crowd, invalidated, entered, locks, admit } = fixture(t)
  for (let i = 0; i < 60; i++) crowd.locks(user(60001), 13n)
  t.strictSame([crowd.isIn(13n), crowd.isIn(FUSE_ROOT_ID)], [true, false])
  t.strictSame(invalidated, [13n])
  admit(60001, 'root')
  t.strictSame(entered, ['root'])
  crowd.admit(user(60002), 13n, () => entered.push('there') > 0)
  t.strictSame(entered, ['root'], 'a caller that comes to that directory is let in later')
  await until(() => entered.length === 2)
  locks(60)
  t.strictSame(invalidated, [13n, FUSE_ROOT_ID])
})

t.test('no caller is left behind when the crowd is over', async (t) => {
  const { crowd, entered, locks, admit } = fixture(t)
  locks(60)
  await sleep(1990)
  for (let i = 0; i < 40; i++) admit(60001, `a${i}`)
  await until(() => entered.length === 40)
  await until(() => !crowd.isIn(FUSE_ROOT_ID))
  t.strictSame(
    entered,
    Array.from({ length: 40 }, (_, i) => `a${i}`),
  )
})

t.test('close() ends the crowd, and lets no more callers in', async (t) => {
  const { crowd, entered, locks, admit } = fixture(t)
  locks(60)
  for (let i = 0; i < 20; i++) admit(60001, `a${i}`)
  crowd.close()
  const before = entered.length
  await sleep(50)
  t.equal(entered.length, before)
})
