// SPDX-License-Identifier: MIT
/** The queue of waiting requests: many requests of one user do not delay the few of another. */
import t from 'tap'

import { FairQueue } from '../../../src/fuse/fair-queue.js'

/** Adds the requests in this order, takes all, and returns the order. */
function order(asked: readonly (readonly [uid: number, item: string])[]): string {
  const queue = new FairQueue<string>()
  for (const [uid, item] of asked) queue.add(uid, item)
  const taken: string[] = []
  for (let item = queue.take(); item !== undefined; item = queue.take()) taken.push(item)
  return taken.join(' ')
}

t.test('one user: first come, first served', async (t) => {
  t.equal(
    order([
      [1, 'a'],
      [1, 'b'],
      [1, 'c'],
    ]),
    'a b c',
  )
})

t.test('several users take turns, whichever has more requests', async (t) => {
  t.equal(
    order([
      [1, 'a1'],
      [1, 'a2'],
      [1, 'a3'],
      [1, 'a4'],
      [2, 'b1'],
      [2, 'b2'],
      [3, 'c1'],
    ]),
    'a1 b1 c1 a2 b2 a3 a4',
  )
})

t.test('a user that asks again comes last', async (t) => {
  const queue = new FairQueue<string>()
  for (let i = 0; i < 100; i++) queue.add(1, `a${i}`)
  t.equal(queue.take(), 'a0')
  queue.add(2, 'b0')
  t.equal(queue.take(), 'a1')
  t.equal(queue.take(), 'b0')
  queue.add(2, 'b1')
  t.equal(queue.take(), 'a2')
  t.equal(queue.take(), 'b1')
  t.equal(queue.size, 97)
})

t.test('it can be searched, and emptied', async (t) => {
  const queue = new FairQueue<string>()
  t.equal(queue.take(), undefined)
  queue.add(1, 'a')
  queue.add(2, 'b')
  t.equal(
    queue.find((item) => item === 'b'),
    'b',
  )
  t.equal(
    queue.find((item) => item === 'c'),
    undefined,
  )
  t.equal(queue.size, 2, 'a request that was found is still there')
  queue.clear()
  t.equal(queue.size, 0)
  t.equal(queue.take(), undefined)
})

t.test('users that have been answered are forgotten', async (t) => {
  const queue = new FairQueue<string>()
  for (let uid = 0; uid < 10_000; uid++) {
    queue.add(uid, 'x')
    queue.take()
  }
  t.equal((queue as unknown as { byUser: Map<number, string[]> }).byUser.size, 0)
})
