// SPDX-License-Identifier: MIT
/** Events for a consumer that is slow: bounded, and nothing is lost unsaid. */
import t from 'tap'

import { parseDevice } from '../../../src/devices/sysfs.js'
import type { Device } from '../../../src/devices/sysfs.js'
import { infoOf } from '../../../src/disks/info.js'
import { type DiskEvent, Events } from '../../../src/disks/watch.js'

const device = (n: number) => parseDevice(`sd${n}`, `MAJOR=8\nMINOR=${n}\nDEVNAME=sd${n}\nDEVTYPE=disk\nDISKSEQ=${n}\n`) as Device
const add = (n: number): DiskEvent => ({ event: 'add', disk: infoOf(device(n)) })
const remove = (n: number): DiskEvent => ({ event: 'remove', disk: infoOf(device(n)) })
const short = (event: DiskEvent) => ('disk' in event ? `${event.event} ${event.disk.name}` : event.event)

t.test('in order, as they come', async (t) => {
  const events = new Events({ devices: () => [] }, 10)
  const first = events.next(undefined)
  events.push(add(1))
  t.strictSame((await first).map(short), ['add 1'])
  events.push(remove(1))
  events.push(add(2))
  t.strictSame((await events.next(undefined)).map(short), ['remove 1', 'add 2'])
})

t.test('too many: resync, and the differences to what the consumer knows', async (t) => {
  let now = [1, 2, 3].map(device)
  const events = new Events({ devices: () => now }, 4)
  for (const there of now) events.begin({ event: 'add', disk: infoOf(there) }, false)
  for (const n of [4, 5, 6, 7]) events.push(add(n))
  events.push(remove(2))
  now = [1, 3, 4, 7].map(device)
  events.push(remove(5))
  t.strictSame((await events.next(undefined)).map(short), ['resync', 'remove 2', 'add 4', 'add 7'])
  events.push(remove(7))
  t.strictSame((await events.next(undefined)).map(short), ['remove 7'], 'and it goes on')
})

t.test('an end', async (t) => {
  const events = new Events({ devices: () => [] }, 4)
  const ending = new AbortController()
  const next = events.next(ending.signal)
  ending.abort()
  t.strictSame(await next, [])
})
