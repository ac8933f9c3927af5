// SPDX-License-Identifier: MIT
/** Time limits that a process does not use up while it gets no processor. */
import t from 'tap'

import { afterTicks, monotonicMs } from '../../../src/util/clock.js'

/** Makes this process stand still, as if it got no processor. */
function stop(ms: number): void {
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms)
}

const turns = async () => {
  for (let i = 0; i < 3; i++) await new Promise(setImmediate)
}

/** Whether a limit of 300 ms is over right after a process was stopped for a second. */
async function isOverAfterAStop(limit: (ms: number, call: () => void) => () => void): Promise<boolean> {
  let over = false
  const cancel = limit(300, () => (over = true))
  stop(1000)
  await turns()
  cancel()
  return over
}

t.test('a limit is over after as many ticks as it has, and not before', async (t) => {
  const began = monotonicMs()
  await new Promise<void>((resolve) => afterTicks(250, resolve))
  t.ok(monotonicMs() - began >= 250, `${monotonicMs() - began} ms`)
})

t.test('a cancelled limit is never over', async (t) => {
  const cancel = afterTicks(100, () => t.fail('it is'))
  cancel()
  await new Promise((resolve) => setTimeout(resolve, 250))
  t.pass('it is not over')
})

t.test('a process that was stopped has used up one tick', async (t) => {
  t.equal(await isOverAfterAStop(afterTicks), false)
})

t.test('twin: by the clock it has used up all', async (t) => {
  const byClock = (ms: number, call: () => void) => {
    const timer = setTimeout(call, ms)
    return () => clearTimeout(timer)
  }
  t.equal(await isOverAfterAStop(byClock), true)
})
