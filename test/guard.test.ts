/** The daemon's side of the guard; what the guard itself does is in handover.test.ts. */
import t, { type Test } from 'tap'

import { E } from '../src/errno.js'
import { Guard } from '../src/guard.js'
import type { Logger } from '../src/log.js'
import type { Native } from '../src/native.js'
import { sleep, until } from './helpers/tree.js'

/** A guard that says what it is told to. */
function fixture(t: Test, { missing = false } = {}) {
  const said: string[] = []
  const state = {
    missing,
    sent: [] as string[],
    open: new Set<number>(),
    present: [] as boolean[],
    warnings: 0,
    ready: () => {},
  }
  class Poll {
    constructor(_: number, ready: () => void) {
      state.ready = ready
    }
    pause() {}
    resume() {}
    close() {}
  }
  const native = {
    Poll,
    packetConnect: () => (state.missing ? -E.ECONNREFUSED : (state.open.add(9), 9)),
    sendDescriptors: (_: number, text: string, fds: readonly number[]) => state.sent.push([text, ...fds].join(' ')),
    receiveDescriptors: () => {
      const next = said.shift()
      return next === undefined ? -E.EAGAIN : [next.length]
    },
    close: (fd: number) => (state.open.delete(fd), 0),
  } as unknown as Native
  const guard = new Guard(
    native,
    '/run/guard',
    { mountpoint: '/mnt', fuse: 4, stateFd: 5 },
    (present) => void state.present.push(present),
    { warn: () => void state.warnings++ } as unknown as Logger,
  )
  t.teardown(() => guard.close())
  const say = (text: string) => {
    said.push(text)
    state.ready()
  }
  return { state, guard, say }
}

t.test('it is introduced to the mount, and answers only while the tree does', async (t) => {
  const { state, guard, say } = fixture(t)
  const started = guard.start()
  t.strictSame(state.sent, ['/mnt 4 5'])
  say('ok')
  await started
  t.strictSame(state.present, [true])
  t.equal(guard.answers(), true, 'it has agreed just now')
  t.equal(guard.answers(), false, 'and has said nothing since')
  say('ok')
  t.equal(guard.answers(), true)
  t.equal(guard.answers(), false)
})

t.test('without one nothing is known, and nobody stands in', async (t) => {
  const { state, guard } = fixture(t, { missing: true })
  await guard.start()
  t.strictSame([guard.answers(), guard.answers()], [true, true])
  t.strictSame(state.present, [false])
  t.equal(state.warnings, 1)
})

t.test('it is called again when it has hung up', async (t) => {
  const { state, guard, say } = fixture(t)
  const started = guard.start()
  say('ok')
  await started
  state.missing = true
  say('')
  t.strictSame(state.present, [true, false], 'nobody stands in')
  state.missing = false
  await until(() => state.open.size === 1, 3000)
  say('ok')
  await until(() => state.present.at(-1) === true)
  t.equal(guard.answers(), true)
})

t.test('one that does not answer is none', async (t) => {
  const { state, guard } = fixture(t)
  await guard.start()
  t.strictSame(state.present, [false])
  t.equal(state.open.size, 0, 'no descriptor is left')
})

t.test('it hears a farewell, and is not called again', async (t) => {
  const { state, guard, say } = fixture(t)
  const started = guard.start()
  say('ok')
  await started
  guard.close()
  t.strictSame(state.sent, ['/mnt 4 5', 'bye'])
  await sleep(50)
  t.equal(state.open.size, 0)
})
