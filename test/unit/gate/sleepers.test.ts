// SPDX-License-Identifier: MIT
/**
 * Callers that do not sleep yet: each is looked at until it sleeps. Users take turns, and a few
 * callers are looked at at a time.
 */
import t from 'tap'

import { type Call, RUNNING, someCall } from '../../../src/gate/intent.js'
import { Sleepers } from '../../../src/gate/sleepers.js'
import { sleep, until } from '../../helpers/tree.js'

const ASLEEP = someCall('open', 257)

function fixture() {
  const asleep = new Set<number>()
  const looks: number[] = []
  const sleepers = new Sleepers(({ tid }) => (looks.push(tid), asleep.has(tid) ? ASLEEP : RUNNING))
  const ended = new Map<number, Call>()
  const add = (tid: number, uid = 0) => sleepers.add({ tid, uid, gid: uid }, (call) => ended.set(tid, call))
  return { asleep, looks, ended, add }
}

t.test('a caller is looked at until it sleeps', async (t) => {
  const { asleep, looks, ended, add } = fixture()
  add(1)
  await until(() => looks.length > 3)
  t.equal(ended.size, 0)
  asleep.add(1)
  await until(() => ended.get(1) === ASLEEP)
  const { length } = looks
  await sleep(20)
  t.equal(looks.length, length, 'and not after that')
})

for (const [who, uid] of [
  ['root', 0],
  ['another user', 60_002],
] as const) {
  t.test(`only the user that has many of them waits for them: ${who} does not`, async (t) => {
    const { asleep, looks, ended, add } = fixture()
    for (let tid = 1000; tid < 2000; tid++) add(tid, 60_001)
    await until(() => looks.length > 20)
    const before = looks.length
    add(1, uid)
    asleep.add(1)
    await until(() => ended.has(1))
    const others = looks.indexOf(1) - before
    t.ok(others <= 16, `after ${others} looks at others`)
    for (let tid = 1000; tid < 2000; tid++) asleep.add(tid)
    await until(() => ended.size === 1001)
  })
}
