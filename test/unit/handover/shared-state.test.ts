// SPDX-License-Identifier: MIT
/** The memory that a daemon leaves to the next one: what is in it, whenever the daemon dies. */
import t from 'tap'

import { IN_HEADER_SIZE } from '../../../src/fuse/wire.js'
import { native } from '../../../src/native.js'
import type { Unanswered } from '../../../src/fuse/request-store.js'
import { CALLERS_MAX, SharedState, STATE_SIZE } from '../../../src/handover/shared-state.js'

const { STATE_SMALL_COUNT, STATE_BIG_COUNT, STATE_PINS_COUNT, STATE_SMALL_SIZE, SLOT_HEADER_SIZE, STATE_REQUEST_MAX } = native.layout

/** A request of that many bytes, from root by default. */
function request(unique: bigint, length = IN_HEADER_SIZE + 8, uid = 0): Uint8Array {
  const bytes = Buffer.alloc(length, Number(unique & 0xffn))
  bytes.writeUInt32LE(length, 0)
  bytes.writeBigUInt64LE(unique, 8)
  bytes.writeUInt32LE(uid, 24)
  return bytes
}

const uniques = (found: readonly Unanswered[]) => found.map(({ message }) => message.header().unique).sort()
/** The memory as the next daemon sees it. */
const next = (memory: ArrayBuffer) => new SharedState(memory)

t.test('a request in hand is found by the next daemon, until it is done', async (t) => {
  const memory = new ArrayBuffer(STATE_SIZE)
  const state = next(memory)
  t.strictSame(next(memory).unanswered(), [], 'none yet')
  state.landing.set(request(7n))
  const [found] = next(memory).unanswered()
  t.match(found, { tries: 1, interrupted: false })
  t.equal(found?.message.header().unique, 7n)
  const again = next(memory).unanswered()
  t.match(again, [{ tries: 2 }], 'it stays, and is counted, until a daemon answers')
  state.landing.set(request(8n))
  state.clear()
  t.strictSame(uniques(next(memory).unanswered()), [7n])
})

t.test('what another process stores after the next daemon has opened the memory is not lost', async (t) => {
  const memory = new ArrayBuffer(STATE_SIZE)
  const before = next(memory)
  before.drop(before.store(request(1n)))
  const opened = next(memory)
  // The guard, or the outgoing daemon, goes on: it uses the free slot, and a new one.
  before.store(request(2n))
  before.store(request(3n))
  before.takePin(7n)
  t.strictSame(uniques(opened.unanswered()), [2n, 3n])
  t.strictSame(
    opened.pinRecords().map(({ id }) => id),
    [7n],
  )
  opened.store(request(4n))
  opened.takePin(8n)
  t.strictSame(uniques(next(memory).unanswered()), [2n, 3n, 4n], 'it is not overwritten')
  t.strictSame(
    next(memory)
      .pinRecords()
      .map(({ id }) => id),
    [7n, 8n],
  )
})

t.test('requests of any size are stored whole, until they are dropped', async (t) => {
  const memory = new ArrayBuffer(STATE_SIZE)
  const state = next(memory)
  const sizes = [IN_HEADER_SIZE, STATE_SMALL_SIZE - SLOT_HEADER_SIZE, STATE_SMALL_SIZE - SLOT_HEADER_SIZE + 1, STATE_REQUEST_MAX]
  const slots = sizes.map((size, i) => state.store(request(BigInt(i + 1), size)))
  for (const { message } of next(memory).unanswered()) {
    const unique = message.header().unique
    t.ok(Buffer.from(message.bytes).equals(request(unique, sizes[Number(unique) - 1])), `request ${unique}`)
  }
  state.drop(slots[1] as number)
  state.interrupt(slots[2] as number)
  const rest = next(memory).unanswered()
  t.strictSame(uniques(rest), [1n, 3n, 4n])
  t.strictSame(
    rest.filter(({ interrupted }) => interrupted).map(({ message }) => message.header().unique),
    [3n],
  )
})

t.test('a request that is stored and still in hand is found once', async (t) => {
  const memory = new ArrayBuffer(STATE_SIZE)
  const state = next(memory)
  state.landing.set(request(5n))
  state.store(request(5n))
  t.strictSame(uniques(next(memory).unanswered()), [5n])
})

t.test('when there is no room, everything else goes on', async (t) => {
  const state = new SharedState()
  for (let i = 0; i < STATE_SMALL_COUNT; i++) t.ok(state.store(request(1n)) >= 0 || undefined)
  t.equal(state.store(request(1n)), -1, 'there is no room for more')
  state.drop(-1)
  state.interrupt(-1)
  for (let i = 0; i < STATE_BIG_COUNT; i++) state.store(request(1n, 5000))
  t.equal(state.store(request(1n, 5000)), -1)
  const places = Array.from({ length: STATE_PINS_COUNT }, () => state.takePin(9n))
  t.equal(state.takePin(9n), -1)
  state.dropPin(places[17] as number)
  t.equal(state.takePin(9n), places[17], 'a free place is used again')
})

t.test('a quarter of the room is reserved for root', async (t) => {
  const memory = new ArrayBuffer(STATE_SIZE)
  const state = next(memory)
  const stored = (count: number, length: number, uid: number) =>
    Array.from({ length: count }, () => state.store(request(1n, length, uid))).filter((slot) => slot >= 0)
  for (const [count, length] of [
    [STATE_SMALL_COUNT, 48],
    [STATE_BIG_COUNT, 5000],
  ] as const) {
    const users = stored(count, length, 1000)
    t.equal(users.length, count * 0.75)
    t.equal(stored(count, length, 0).length, count * 0.25, 'root gets the rest')
    t.equal(state.store(request(1n, length, 1000)), -1)
    state.drop(users[5] as number)
    t.equal(state.store(request(1n, length, 1000)), -1, 'the room that gets free is')
    t.equal(state.store(request(1n, length, 0)), users[5], 'reserved for root as well')
  }
  t.equal(next(memory).unanswered().length, STATE_SMALL_COUNT + STATE_BIG_COUNT)
})

t.test('a pin has the callers that it was taken for', async (t) => {
  const memory = new ArrayBuffer(STATE_SIZE)
  const state = next(memory)
  const place = state.takePin(0xfff_0000_0000_0000n)
  state.pinnedFor(place, { tid: 11, call: 257, outlasts: false }, false)
  state.pinnedFor(place, { tid: 12, call: 165, outlasts: true }, true)
  state.pinnedFor(place, { tid: 11, call: 2, outlasts: false }, false)
  t.strictSame(next(memory).pinRecords(), [
    {
      index: place,
      id: 0xfff_0000_0000_0000n,
      lingers: true,
      callers: [
        { tid: 11, call: 2, outlasts: false },
        { tid: 12, call: 165, outlasts: true },
      ],
      more: false,
    },
  ])
  for (let i = 0; i < CALLERS_MAX; i++) state.pinnedFor(place, { tid: 100 + i, call: 257, outlasts: false }, false)
  const [record] = next(memory).pinRecords()
  t.equal(record?.callers.length, CALLERS_MAX)
  t.equal(record?.more, true, 'it is known that there were more')
  state.dropPin(place)
  t.strictSame(next(memory).pinRecords(), [])
  state.pinnedFor(state.takePin(4096n), { tid: 0, call: -1, outlasts: false }, true)
  t.match(next(memory).pinRecords(), [{ id: 4096n, callers: [], more: true, lingers: true }], 'a caller that cannot be seen')
})

t.test('the memory says which mount it belongs to', async (t) => {
  const memory = new ArrayBuffer(STATE_SIZE)
  t.equal(next(memory).mount, undefined)
  next(memory).mount = { mountpoint: '/dev/disk/by-diskseq', device: '0:1048575', pidNamespace: 0xf0000001 }
  t.strictSame(next(memory).mount, { mountpoint: '/dev/disk/by-diskseq', device: '0:1048575', pidNamespace: 0xf0000001 })
  t.equal(next(memory).compatible, true)
  new DataView(memory).setUint32(native.layout.STATE_VERSION_AT, 99, true)
  t.equal(next(memory).compatible, false, 'of another revision')
  t.match(next(memory).mount, { mountpoint: '/dev/disk/by-diskseq' }, 'the mount is known all the same')
})

t.test('garbage is no request, and does no harm', async (t) => {
  for (let seed = 1; seed <= 200; seed++) {
    const memory = new ArrayBuffer(STATE_SIZE)
    const bytes = new Uint8Array(memory)
    let x = seed
    for (let i = 0; i < 200_000; i += 1 + (seed % 7)) bytes[i] = (x = (x * 1103515245 + 12345) & 0x7fffffff) >> 16
    const state = next(memory)
    for (const { message } of state.unanswered()) {
      if (message.length > STATE_REQUEST_MAX || message.length < IN_HEADER_SIZE) t.fail(`seed ${seed}: ${message.length}`)
    }
    state.pinRecords()
    t.ok(state.mount?.mountpoint !== '')
  }
})
