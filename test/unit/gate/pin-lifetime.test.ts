// SPDX-License-Identifier: MIT
/**
 * When pins end: not while a caller that was answered may be in its call, and soon after. Without pins there is no work.
 */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'

import t, { type Test } from 'tap'

import type { DiskSeq } from '../../../src/devices/names.js'
import { type Call, Intents, UNSEEN } from '../../../src/gate/intent.js'
import type { Logger } from '../../../src/util/log.js'
import { native as real, type Native, type SeenThread } from '../../../src/native.js'
import { type Inode, InodeTable } from '../../../src/gate/inode.js'
import type { Pin, PinOpener } from '../../../src/gate/pin.js'
import { PinLifetime } from '../../../src/gate/pin-lifetime.js'
import type { Device } from '../../../src/devices/sysfs.js'
import { ROOT } from '../../helpers/root.js'
import { sleep, sleepInRounds, until } from '../../helpers/tree.js'

const MOUNT_FD = 55

const line = (number: number, first = '0x7f0000000000') =>
  `${number} ${first} 0x7f0000000000 0x80000 0x0 0x0 0x0 0x7ffd1a2b3c48 0x7f12d4e5a6b7\n`
const { openat, newfstatat, io_uring_enter } = real.syscalls as Record<string, number>
const IN_OPENAT = line(openat as number, '0xffffff9c')
const IN_MOUNT = line(165)
const IN_RING = line(io_uring_enter as number, '0x3')
const ELSEWHERE = line(newfstatat as number)
const OUTSIDE = '-1 0x7ffd1a2b3c48 0x7f12d4e5a6b7\n'
const RUNNING = 'running\n'

/** The call of a caller that is in the call which that line shows. */
function callOf(text: string): Call {
  const calls = { ...real, openFile: () => 5, readAgain: (_: number, into: Uint8Array) => Buffer.from(text).copy(into), close: () => 0 }
  return new Intents(calls as Native).of(1)
}

const intents = new Intents(real)

/** A thread that is seen there. */
const seen = (syscall: string, { stack = '', state = 'S', memory = 0x1000, userUs = -1, faults = 0 } = {}): SeenThread => [
  syscall,
  stack,
  state,
  memory,
  userUs,
  faults,
]

/** How much any wait here may be cut short or prolonged on a busy machine. */
const SLACK_MS = 40
/** From the end of the last call to the end of the pin, in ms: the longest time between two looks. */
const SOON_MS = 32 + SLACK_MS

interface Options {
  lingerMs?: number
  holdSeconds?: number
}

function fixture(t: Test, { lingerMs = 5, holdSeconds = 30 }: Options = {}) {
  const state = {
    /** What threads do. Threads that are not here are gone. */
    threads: new Map<number, SeenThread>(),
    /** Threads at which a look gets stuck. */
    stuck: new Set<number>(),
    /** Looks that are stuck. */
    held: [] as (() => void)[],
    /** Looks: when, and at which threads. */
    looks: [] as { at: number; threads: number[] }[],
    unpinned: [] as string[],
    /** Notices to the kernel, and looks, in this order. */
    told: [] as string[],
    /** Whether the kernel can be told to forget an inode. */
    prunes: true,
    onPrune: (_: bigint) => {},
    /** Whether the kernel has an inode of the node. */
    hasInode: true,
    pruneError: 0,
    pruneAlls: 0,
    pruningAll: 0,
    pruningAllAtOnce: 0,
    /** How long that takes; if undefined, it ends when the test says so. */
    pruneAllMs: 0 as number | undefined,
    pending: [] as (() => void)[],
    closedFds: [] as number[],
    errors: 0,
    written: [] as unknown[],
  }
  const inodes = new InodeTable()
  const opener = { close: (pin: Pin) => void state.unpinned.push(pin.device.name) } as unknown as PinOpener
  const lifetime = new PinLifetime({
    native: {
      prune(fd, done) {
        if (fd !== MOUNT_FD) throw new Error(`pruned descriptor ${fd}`)
        state.pruneAlls++
        state.pruningAllAtOnce = Math.max(state.pruningAllAtOnce, ++state.pruningAll)
        const finish = () => {
          state.pruningAll--
          done(state.pruneError)
        }
        if (state.pruneAllMs === undefined) state.pending.push(finish)
        else setTimeout(finish, state.pruneAllMs)
      },
      close: (fd) => (state.closedFds.push(fd), 0),
      lookAtThreads(asked, done) {
        const threads = asked.filter((_, i) => i % 2 === 0) as number[]
        state.looks.push({ at: performance.now(), threads })
        state.told.push('look')
        const finish = () => done(threads.map((tid) => state.threads.get(tid)))
        if (threads.some((tid) => state.stuck.has(tid))) state.held.push(finish)
        else setImmediate(finish)
      },
    },
    inodes,
    opener,
    intents,
    options: { lingerMs, holdSeconds },
    log: { error: () => void state.errors++, debug() {} } as unknown as Logger,
    state: {
      pinnedFor: (index, caller, lingers) => void state.written.push([index, caller, lingers]),
      notPinnedFor: (index, tid) => void state.written.push([index, tid]),
    },
    kernel: {
      invalidate: (id) => (state.told.push(`invalidate ${id >> 12n}`), state.hasInode),
      prune: (id) => {
        if (!state.prunes) return false
        state.told.push(`prune ${id >> 12n}`)
        state.onPrune(id)
        return true
      },
    },
  })
  lifetime.start(MOUNT_FD)
  t.teardown(() => lifetime.close())
  let next = 1
  const pinned = (): Inode => {
    const name = String(next++)
    const device = { name, diskseq: BigInt(name) as DiskSeq, partition: 0, minor: 0 } as Device
    const inode = inodes.of(device) as Inode
    inode.pin = { fd: 100 + next, device, place: next }
    return inode
  }
  const again = (inode: Inode, call: Call, tid = 4711) => {
    inode.nlookup++
    lifetime.answered(inode, { tid, uid: 0, gid: 0 }, call)
  }
  return {
    state,
    inodes,
    lifetime,
    pinned,
    /** A node after a lookup that was answered with a pin. */
    answered(call: Call, tid = 4711): Inode {
      const inode = pinned()
      again(inode, call, tid)
      return inode
    },
    again,
    forget: (inode: Inode) => lifetime.forget(inode, inode.nlookup),
    /** A node whose pin was taken over from an earlier daemon. */
    takenOver({ tid, call, more = false }: { tid?: number; call?: Call; more?: boolean }): Inode {
      const inode = pinned()
      inode.takenOver = inode.reopenable = inode.trusted = true
      inode.moreCallers = more
      inode.unseen = more || tid === undefined
      inode.callers = new Map(tid === undefined ? [] : [[tid, call as Call]])
      lifetime.takenOver(inode)
      return inode
    },
  }
}

const OPENAT = callOf(IN_OPENAT)
const MOUNT = callOf(IN_MOUNT)
const RING = callOf(IN_RING)

for (const [what, call, text] of [
  ['open(2)', OPENAT, IN_OPENAT],
  ['mount(2)', MOUNT, IN_MOUNT],
] as const) {
  t.test(`a pin stays for as long as its caller is in its ${what}, and ends soon after`, async (t) => {
    const { state, inodes, answered } = fixture(t)
    state.threads.set(4711, seen(text, { state: 'D' }))
    const inode = answered(call)
    await sleep(400)
    t.strictSame(state.unpinned, [], 'however long that takes')
    state.threads.set(4711, seen(ELSEWHERE))
    const start = performance.now()
    await until(() => state.unpinned.length > 0)
    t.ok(performance.now() - start < SOON_MS, `${Math.round(performance.now() - start)} ms`)
    t.equal(inode.pin, undefined)
    t.equal(inode.nlookup, 1, 'the kernel still has its inode')
    t.notOk(
      state.told.some((what) => what.startsWith('prune')),
      'it was not made to forget the inode',
    )
    t.equal(inodes.size, 1)
  })
}

for (const [what, thread, ends] of [
  ['is gone', undefined, true],
  ['is outside of any call', seen(OUTSIDE), true],
  ['is in another call', seen(ELSEWHERE), true],
  ['is in the same call with other arguments, asleep', seen(IN_OPENAT.replace('0x80000', '0x80002')), true],
  ['is in the same call with other arguments, and may be opening', seen(IN_OPENAT.replace('0x80000', '0x80002'), { state: 'D' }), false],
  ['cannot be read', seen(''), false],
  ['cannot be read, in an execve', seen('', { memory: 0 }), true],
  ['shows garbage', seen('garbage'), false],
  ['runs, and the time is not known', seen(RUNNING), false],
] as const) {
  t.test(`a pin ${ends ? 'ends' : 'stays'} if its caller ${what}`, async (t) => {
    const { state, answered } = fixture(t)
    if (thread !== undefined) state.threads.set(4711, thread)
    answered(OPENAT)
    await sleepInRounds(60)
    t.strictSame(state.unpinned, ends ? ['1'] : [])
  })
}

t.test('a caller that gets no processor may be in its call, until it has spent time outside the kernel', async (t) => {
  const { state, answered } = fixture(t)
  state.threads.set(4711, seen(RUNNING, { state: 'R', userUs: 7000 }))
  answered(OPENAT)
  await sleep(300)
  t.strictSame(state.unpinned, [], 'it was seen running, and has made no progress since')
  state.threads.set(4711, seen(RUNNING, { state: 'R', userUs: 8000 }))
  await until(() => state.unpinned.length > 0)
})

t.test('a pin stays while any of its callers may be in its call', async (t) => {
  const { state, answered, again } = fixture(t)
  for (const tid of [1, 2, 3]) state.threads.set(tid, seen(IN_OPENAT))
  const inode = answered(OPENAT, 1)
  again(inode, OPENAT, 2)
  again(inode, MOUNT, 3)
  for (const tid of [1, 3]) {
    state.threads.delete(tid)
    await sleep(60)
    t.strictSame(state.unpinned, [])
  }
  t.strictSame([...(inode.callers?.keys() ?? [])], [2], 'the others are not remembered')
  state.threads.delete(2)
  await until(() => state.unpinned.length > 0)
})

t.test('callers are looked at a few ms after the last answer, then ever more rarely', async (t) => {
  const { state, answered, again } = fixture(t)
  state.threads.set(4711, seen(IN_OPENAT))
  const start = performance.now()
  const inode = answered(OPENAT)
  t.equal(state.looks.length, 0)
  await sleep(800)
  const [first = 0] = state.looks.map(({ at }) => at - start)
  t.ok(first >= 1 && first < 10 + SLACK_MS, `${first.toFixed(1)} ms until the first`)
  const { length } = state.looks
  t.ok(length >= 10 && length <= 32, `${(800 / length).toFixed(1)} ms between two looks`)
  again(inode, OPENAT)
  const answer = performance.now()
  await until(() => state.looks.length > length)
  const next = (state.looks[length]?.at ?? 0) - answer
  t.ok(next < 10 + SLACK_MS, `${next.toFixed(1)} ms from another answer to the next`)
})

/**
 * A caller opens a disk again and again. -> how often its pin ended meanwhile, and the longest time between two opens, in
 * ms
 */
async function againAndAgain(t: Test): Promise<{ ended: number; longest: number }> {
  const { state, answered, again } = fixture(t)
  const inode = answered(OPENAT)
  let longest = 0
  for (let i = 0, last = performance.now(); i < 100; i++) {
    const until = performance.now() + 0.5
    while (performance.now() < until);
    await new Promise(setImmediate)
    again(inode, OPENAT)
    longest = Math.max(longest, performance.now() - last)
    last = performance.now()
  }
  const ended = state.unpinned.length
  await until(() => state.unpinned.length > 0)
  return { ended, longest }
}

t.test('a caller that opens one disk again and again finds it open', async (t) => {
  // Tried again if the processor was busy for so long that there was no open.
  let found = await againAndAgain(t)
  for (let i = 0; i < 50 && found.longest > 1.5; i++) found = await againAndAgain(t)
  if (found.longest > 1.5) t.comment(`never in less than ${found.longest.toFixed(1)} ms: the machine is busy`)
  else t.equal(found.ended, 0)
})

t.test('attributes are invalidated before any caller is looked at', async (t) => {
  const { state, answered } = fixture(t)
  const inode = answered(OPENAT)
  inode.trusted = true
  await until(() => state.unpinned.length > 0)
  t.strictSame(state.told, ['invalidate 1', 'look'])
  t.equal(inode.trusted, false)
})

t.test('attributes that were given during a look are invalidated, and callers are looked at once more', async (t) => {
  const { state, answered } = fixture(t)
  state.stuck.add(4711)
  const inode = answered(OPENAT)
  await until(() => state.looks.length > 0)
  inode.trusted = true
  state.stuck.clear()
  state.held.pop()?.()
  t.strictSame(state.unpinned, [], 'a caller that has the inode may have opened it without asking')
  await until(() => state.unpinned.length > 0)
  t.strictSame(state.told, ['look', 'invalidate 1'])
})

t.test('a caller that is answered again during a look is not taken for one that has left', async (t) => {
  const { state, answered, again } = fixture(t)
  state.stuck.add(4711)
  const inode = answered(OPENAT)
  await until(() => state.looks.length > 0)
  again(inode, callOf(IN_OPENAT), 4711)
  state.stuck.clear()
  state.held.pop()?.()
  t.strictSame(state.unpinned, [])
  t.equal(inode.callers?.size, 1)
  await until(() => state.unpinned.length > 0)
})

t.test('a caller that has the inode does not keep a pin by that', async (t) => {
  const { state, answered, again } = fixture(t)
  const inode = answered(OPENAT)
  inode.reopenable = inode.trusted = true
  again(inode, OPENAT, 4712)
  await until(() => state.unpinned.length > 0, 500)
  t.equal(inode.nlookup, 2)
})

t.test('a close brings a look, however long the node has been in use', async (t) => {
  const { state, lifetime, answered } = fixture(t)
  state.threads.set(4711, seen(IN_OPENAT))
  const inode = answered(OPENAT)
  await sleep(400)
  const before = state.looks.length
  state.threads.clear()
  lifetime.closedByUser(inode)
  await until(() => state.unpinned.length > 0)
  t.ok(state.looks.length <= before + 2)
  lifetime.closedByUser(inode)
  await sleep(30)
  t.ok(state.looks.length <= before + 2, 'there is no look when it is not pinned')
})

/** How many looks there are from here on, without those that a timer causes. */
async function looksWithoutTimers(t: Test, state: { looks: unknown[] }, begin: () => void): Promise<number> {
  const { setTimeout } = globalThis
  globalThis.setTimeout = (() => undefined) as unknown as typeof setTimeout
  const back = () => (globalThis.setTimeout = setTimeout)
  t.teardown(back)
  const before = state.looks.length
  begin()
  for (let turn = 0; turn < 50; turn++) await new Promise((resolve) => setImmediate(resolve))
  back()
  return state.looks.length - before
}

t.test('after a close a running caller is looked at some times without a pause', async (t) => {
  const { state, lifetime, answered } = fixture(t)
  state.threads.set(4711, seen(RUNNING, { state: 'R' }))
  const inode = answered(OPENAT)
  await sleep(50)
  t.equal(await looksWithoutTimers(t, state, () => lifetime.closedByUser(inode)), 5)
  t.equal(await looksWithoutTimers(t, state, () => {}), 0, 'then it is looked at like others')
  t.strictSame(state.unpinned, [])
  state.threads.set(4711, seen(ELSEWHERE))
  t.equal(await looksWithoutTimers(t, state, () => lifetime.closedByUser(inode)), 1, 'until it is seen elsewhere')
  t.strictSame(state.unpinned, ['1'])
})

/**
 * How many looks a close brings at once, where the node was answered for so many times within a moment. The fewest of
 * some tries, as the answers are apart where the processor is busy with something else.
 */
function looksAtOnce(t: Test, answers: number): number {
  const looks = Array.from({ length: 20 }, () => {
    const { state, lifetime, answered, again } = fixture(t)
    const inode = answered(OPENAT)
    for (let i = 1; i < answers; i++) again(inode, OPENAT)
    lifetime.closedByUser(inode)
    return state.looks.length
  })
  return Math.min(...looks)
}

t.test('a close brings a look at once, unless the node is opened again and again', async (t) => {
  t.equal(looksAtOnce(t, 3), 1, 'all answers of one open')
  t.equal(looksAtOnce(t, 4), 0, 'those of two')
})

t.test('twin: if a second answer counts as another open, a program that has read a disk keeps it', async (t) => {
  const lifetime = PinLifetime.prototype as unknown as { isBusy(inode: Inode): boolean }
  const { isBusy } = lifetime
  t.teardown(() => (lifetime.isBusy = isBusy))
  lifetime.isBusy = ({ streak }) => streak > 1
  t.equal(looksAtOnce(t, 3), 0)
})

t.test('that does not happen for many callers, nor while others are answered', async (t) => {
  const { state, lifetime, answered, again } = fixture(t)
  for (const tid of [1, 2, 3]) state.threads.set(tid, seen(RUNNING, { state: 'R' }))
  const inode = answered(OPENAT, 1)
  again(inode, OPENAT, 2)
  again(inode, OPENAT, 3)
  await sleep(50)
  t.equal(await looksWithoutTimers(t, state, () => lifetime.closedByUser(inode)), 1, 'three callers')
  const other = answered(OPENAT, 1)
  await sleep(50)
  lifetime.closedByUser(other)
  t.ok((await looksWithoutTimers(t, state, () => answered(OPENAT, 2))) <= 1, 'another node')
})

t.test('after a close the kernel is told to forget the inode if a caller may still be in its call', async (t) => {
  const { state, lifetime, answered, forget } = fixture(t)
  state.threads.set(4711, seen(RUNNING, { state: 'R' }))
  const inode = answered(OPENAT)
  await sleep(100)
  t.notOk(
    state.told.some((what) => what.startsWith('prune')),
    'not before',
  )
  state.onPrune = () => forget(inode)
  lifetime.closedByUser(inode)
  await until(() => state.unpinned.length > 0, 20 + SLACK_MS)
  t.equal(state.told.filter((what) => what.startsWith('prune')).length, 1)
})

t.test('if it does not forget, the inode is in use: then it is told once for each close', async (t) => {
  const { state, lifetime, answered } = fixture(t)
  state.threads.set(4711, seen(RUNNING, { state: 'R' }))
  lifetime.closedByUser(answered(OPENAT))
  await sleep(200)
  t.equal(state.told.filter((what) => what.startsWith('prune')).length, 1)
  t.strictSame(state.unpinned, [])
})

t.test('a thread that opens another device is done with the one before', async (t) => {
  const { state, lifetime, pinned, answered, again } = fixture(t)
  state.threads.set(4711, seen(RUNNING, { state: 'R' }))
  for (let i = 0; i < 100; i++) answered(OPENAT)
  await until(() => state.unpinned.length === 99, 20 + SLACK_MS)
  const told = pinned()
  lifetime.told(told, { tid: 4711, uid: 0, gid: 0 }, callOf(IN_OPENAT))
  lifetime.attempted(told)
  await until(() => state.unpinned.length === 100, 20 + SLACK_MS)
  again(told, OPENAT)
  await sleep(60)
  t.equal(told.callers?.size, 1, 'not with the same one')
})

t.test('it is not done if it opens by number: one mount(2) may take several devices', async (t) => {
  const { state, answered } = fixture(t)
  state.threads.set(4711, seen(IN_MOUNT))
  answered(MOUNT)
  answered(MOUNT)
  await sleep(60)
  t.strictSame(state.unpinned, [])
})

t.test('FORGET', async (t) => {
  t.test('ends the pins of callers in open(2) at once, as what they open has the inode', async (t) => {
    const { state, inodes, answered, forget } = fixture(t)
    state.threads.set(4711, seen(IN_OPENAT))
    const inode = answered(OPENAT)
    await sleep(100)
    forget(inode)
    await until(() => state.unpinned.length > 0, 20 + SLACK_MS)
    t.equal(inodes.size, 0, 'nothing is left of the inode')
  })

  t.test('ends those of io_uring', async (t) => {
    const { state, answered, forget } = fixture(t)
    state.threads.set(4711, seen(IN_RING, { stack: '[<0>] io_issue_sqe+0x1/0x2\n' }))
    const inode = answered(RING)
    await sleep(100)
    t.strictSame(state.unpinned, [])
    forget(inode)
    await until(() => state.unpinned.length > 0, 20 + SLACK_MS)
  })

  t.test('does not end those of callers that open by number', async (t) => {
    const { state, answered, again, forget } = fixture(t)
    state.threads.set(4711, seen(IN_MOUNT))
    state.threads.set(4712, seen(IN_OPENAT))
    const inode = answered(MOUNT)
    again(inode, OPENAT, 4712)
    forget(inode)
    await sleep(200)
    t.strictSame(state.unpinned, [])
    t.strictSame([...(inode.callers?.keys() ?? [])], [4711])
    state.threads.delete(4711)
    await until(() => state.unpinned.length > 0, SOON_MS)
  })

  t.test('of some of its lookups means nothing', async (t) => {
    const { state, lifetime, answered, again } = fixture(t)
    state.threads.set(4711, seen(IN_OPENAT))
    const inode = answered(OPENAT)
    again(inode, OPENAT)
    lifetime.forget(inode, 1)
    await sleep(60)
    t.strictSame(state.unpinned, [])
  })

  t.test('of a node without a pin removes the node', async (t) => {
    const { state, inodes, answered, forget } = fixture(t)
    const inode = answered(OPENAT)
    await until(() => state.unpinned.length > 0)
    forget(inode)
    t.equal(inodes.size, 0)
    t.equal(state.unpinned.length, 1)
  })
})

t.test('callers that cannot be seen', async (t) => {
  t.test('are done some ms after the kernel, when told so, has forgotten the inode', async (t) => {
    const { state, inodes, answered, forget } = fixture(t, { lingerMs: 60 })
    const inode = answered(UNSEEN)
    await until(() => state.told.includes('prune 1'))
    t.strictSame(state.unpinned, [])
    const start = performance.now()
    forget(inode)
    await sleep(40)
    t.strictSame(state.unpinned, [])
    await until(() => state.unpinned.length > 0)
    const took = performance.now() - start
    t.ok(took >= 55 && took < 60 + SOON_MS, `${Math.round(took)} ms`)
    t.equal(inodes.size, 0)
    t.equal(state.pruneAlls, 0, 'other names stay')
  })

  t.test('the kernel is asked ever more rarely', async (t) => {
    const { state, answered } = fixture(t)
    answered(UNSEEN)
    await sleep(800)
    const prunes = state.told.filter((what) => what === 'prune 1').length
    t.ok(prunes >= 5 && prunes <= 10, `${prunes} times in 0.8 s`)
  })

  t.test('a pin that lingers is kept for the next caller', async (t) => {
    const { state, answered, again, forget } = fixture(t, { lingerMs: 500 })
    const inode = answered(UNSEEN)
    const { pin } = inode
    forget(inode)
    await sleep(10)
    state.threads.set(4712, seen(IN_OPENAT))
    again(inode, OPENAT, 4712)
    await sleep(700)
    t.strictSame(state.unpinned, [])
    t.equal(inode.pin, pin)
    state.threads.clear()
    await until(() => state.unpinned.length > 0)
    t.strictSame(state.unpinned, ['1'], 'it is closed once')
  })

  t.test('are not taken for done because others are', async (t) => {
    const { state, answered, again } = fixture(t)
    const inode = answered(UNSEEN)
    again(inode, OPENAT, 4712)
    await sleep(100)
    t.strictSame(state.unpinned, [])
  })

  t.test('nor are others taken for done because they are', async (t) => {
    const { state, answered, again, forget } = fixture(t)
    state.threads.set(4712, seen(IN_MOUNT))
    const inode = answered(UNSEEN)
    again(inode, MOUNT, 4712)
    forget(inode)
    await sleep(100)
    t.strictSame(state.unpinned, [])
  })

  t.test('do not count for the next pin', async (t) => {
    const { state, lifetime, answered, again } = fixture(t)
    const inode = answered(UNSEEN)
    const pin = inode.pin as Pin
    lifetime.unpin(inode) // as it has turned out to be another device
    inode.pin = pin
    again(inode, OPENAT, 4712)
    await until(() => state.unpinned.length === 2)
  })
})

t.test('kernels that cannot be told which name to forget are told to forget all', async (t) => {
  t.test('never twice at once', async (t) => {
    const { state, answered, again, forget } = fixture(t)
    Object.assign(state, { prunes: false, pruneAllMs: 50 })
    const inode = answered(UNSEEN)
    for (let i = 0; i < 20; i++) {
      again(inode, UNSEEN)
      await sleep(8)
    }
    t.equal(state.pruningAllAtOnce, 1)
    t.ok(state.pruneAlls >= 3)
    forget(inode)
    await until(() => state.unpinned.length > 0)
  })

  t.test('not because of callers that can be seen', async (t) => {
    const { state, answered } = fixture(t)
    state.prunes = false
    state.threads.set(4711, seen(IN_OPENAT))
    answered(OPENAT)
    await sleep(100)
    t.equal(state.pruneAlls, 0)
  })

  t.test('if that fails, it is logged and tried again', async (t) => {
    const { state, answered } = fixture(t)
    Object.assign(state, { prunes: false, pruneError: 12 })
    answered(UNSEEN)
    await until(() => state.errors > 0)
    const before = state.pruneAlls
    await until(() => state.pruneAlls > before)
  })

  t.test('close() meanwhile leaves the descriptor to the prune', async (t) => {
    const { state, lifetime, answered } = fixture(t)
    Object.assign(state, { prunes: false, pruneAllMs: undefined })
    answered(UNSEEN)
    await until(() => state.pending.length > 0)
    lifetime.close()
    t.strictSame(state.closedFds, [], 'a prune still uses it')
    state.pending.shift()?.()
    t.strictSame(state.closedFds, [MOUNT_FD])
    await sleep(30)
    t.equal(state.pruneAlls, 1)
  })
})

t.test('many callers', async (t) => {
  t.test('those that are done are not remembered for ever', async (t) => {
    const { state, answered, again } = fixture(t)
    state.threads.set(4711, seen(IN_OPENAT))
    const inode = answered(OPENAT)
    for (let tid = 10_000; tid < 20_000; tid++) {
      again(inode, OPENAT, tid)
      if (tid % 100 === 0) await sleep(1)
    }
    t.ok((inode.callers?.size ?? 0) < 2000, `${inode.callers?.size} of 10,001, while they come`)
    await sleep(SOON_MS)
    t.strictSame([...(inode.callers?.keys() ?? [])], [4711], 'one that is not done is remembered')
  })

  t.test('that stay in their calls are looked at more rarely', async (t) => {
    const { state, answered, again } = fixture(t)
    const inode = answered(OPENAT)
    for (let tid = 10_000; tid < 13_000; tid++) {
      state.threads.set(tid, seen(IN_OPENAT))
      again(inode, OPENAT, tid)
    }
    await sleep(200)
    const before = state.looks.length
    await sleep(900)
    t.ok(state.looks.length - before <= 4, `${state.looks.length - before} looks at 3,000 callers in 0.9 s`)
  })
})

t.test('many nodes', async (t) => {
  const { state, inodes, answered, forget } = fixture(t, { lingerMs: 20 })
  for (let i = 0; i < 1000; i++) answered(OPENAT, 5000 + i)
  for (let i = 0; i < 1000; i++) forget(answered(UNSEEN, 5000 + i))
  await until(() => state.unpinned.length === 2000, 1000)
  t.equal(new Set(state.unpinned).size, 2000)
  t.equal(inodes.size, 1000)
  t.ok(state.looks.length < 200, `${state.looks.length} looks: many inodes at a time`)
})

t.test('a look that gets stuck', async (t) => {
  t.test('delays no other node', async (t) => {
    const { state, answered } = fixture(t)
    state.stuck.add(4711)
    const stuck = answered(OPENAT)
    for (let i = 0; i < 20; i++) answered(OPENAT, 5000 + i)
    await until(() => state.unpinned.length >= 20, 200)
    t.ok(state.unpinned.length === 20 && stuck.pin !== undefined, 'its own pin stays')
    await sleep(100)
    for (let i = 0; i < 20; i++) {
      const start = performance.now()
      const before = state.unpinned.length
      answered(OPENAT, 6000 + i)
      await until(() => state.unpinned.length > before)
      const took = performance.now() - start
      t.ok(took < SOON_MS, `${took.toFixed(1)} ms: nor does it delay later ones`)
    }
    // With others, if they were due by then, and alone.
    t.ok(state.held.length <= 2, 'it is not made again and again')
    state.stuck.clear()
    for (const finish of state.held.splice(0)) finish()
    await until(() => stuck.pin === undefined)
  })

  t.test('at hundreds of callers takes two threads for each at most, and delays no other node', async (t) => {
    const { state, answered } = fixture(t)
    for (let tid = 1; tid <= 200; tid++) {
      state.stuck.add(tid)
      answered(OPENAT, tid)
    }
    await until(() => state.held.length >= 200)
    await sleep(400)
    t.ok(state.held.length <= 400, `${state.held.length} threads are taken`)
    const inode = answered(OPENAT, 6000)
    await until(() => inode.pin === undefined)
    t.strictSame(state.unpinned, [inode.name], 'the pin of another node ends')
    state.stuck.clear()
    for (const finish of state.held.splice(0)) finish()
    await until(() => state.unpinned.length === 201)
  })

  t.test('at thousands of callers is made for some of them at a time', async (t) => {
    const { state, answered } = fixture(t)
    for (let tid = 1; tid <= 2000; tid++) {
      state.stuck.add(tid)
      answered(OPENAT, tid)
    }
    await sleep(1500)
    t.ok(state.held.length <= 512, `${state.held.length} threads are taken`)
    state.stuck.clear()
    for (const finish of state.held.splice(0)) finish()
    await until(() => state.unpinned.length === 2000)
  })

  t.test('may end after close()', async (t) => {
    const { state, lifetime, answered } = fixture(t)
    state.stuck.add(4711)
    answered(OPENAT)
    await until(() => state.held.length > 0)
    lifetime.close()
    const before = timers()
    for (const finish of state.held.splice(0)) finish()
    t.strictSame(state.unpinned, ['1'])
    t.equal(timers(), before)
  })
})

t.test('a caller that is told of a node before it is pinned', async (t) => {
  const { state, lifetime, pinned } = fixture(t)
  const inode = pinned()
  const caller = { tid: 4711, uid: 0, gid: 0 }
  t.equal(lifetime.expected(inode, caller), undefined)
  lifetime.told(inode, caller, callOf(IN_OPENAT))
  t.match(lifetime.expected(inode, caller), { intent: 'open' }, 'is not looked at again when it asks')
  t.equal(lifetime.expected(inode, { ...caller, tid: 4712 }), undefined)
  state.threads.set(4711, seen(IN_OPENAT))
  lifetime.attempted(inode)
  await sleep(60)
  t.strictSame(state.unpinned, [], 'finds it pinned')
  state.threads.clear()
  await until(() => state.unpinned.length > 0)
  t.equal(lifetime.expected(inode, caller), undefined)
})

t.test('an attempt to pin that served nobody leaves no pin', async (t) => {
  const { state, lifetime, inodes, pinned } = fixture(t)
  const inode = pinned()
  lifetime.attempted(inode)
  await until(() => state.unpinned.length > 0)
  t.equal(inodes.size, 0)
  const failed = pinned()
  failed.pin = undefined
  lifetime.attempted(failed)
  t.equal(inodes.size, 0, 'an attempt that failed leaves nothing either')
})

t.test('a caller is written down for the next daemon before it is answered', async (t) => {
  const { state, lifetime, pinned } = fixture(t)
  const inode = pinned()
  const place = inode.pin?.place
  const caller = { tid: 4711, uid: 0, gid: 0 }
  lifetime.answering(inode, caller, OPENAT)
  lifetime.answering(inode, caller, MOUNT)
  lifetime.answering(inode, caller, UNSEEN)
  t.strictSame(state.written.splice(0), [
    [place, { tid: 4711, call: openat, outlasts: false }, false],
    [place, { tid: 4711, call: 165, outlasts: true }, false],
    [place, { tid: 4711, call: -1, outlasts: true }, true],
  ])
  lifetime.notAnswered(inode, caller)
  t.strictSame(state.written, [[place, 4711]])
  await until(() => state.unpinned.length > 0)
  t.pass('a pin that was for no caller after all ends')
})

t.test('pins that were taken over', async (t) => {
  t.test('stay while a caller is in its call', async (t) => {
    const { state, takenOver } = fixture(t)
    state.threads.set(4711, seen(IN_OPENAT))
    const inode = takenOver({ tid: 4711, call: OPENAT })
    await sleep(60)
    t.strictSame(state.unpinned, [])
    t.equal(state.told[0], 'invalidate 1', 'attributes that the other daemon gave are invalidated first')
    state.threads.clear()
    await until(() => state.unpinned.length > 0)
    t.equal(inode.pin, undefined)
  })

  t.test('for callers that cannot be seen end when the kernel has no inode', async (t) => {
    const { state, inodes, takenOver } = fixture(t)
    takenOver({})
    await sleep(60)
    t.strictSame(state.unpinned, [], 'not while the kernel has one')
    state.hasInode = false
    await until(() => state.unpinned.length > 0)
    t.equal(inodes.size, 0)
  })

  t.test('for further callers that are not known end by the hold', { buffered: true }, async (t) => {
    const { state, takenOver } = fixture(t, { holdSeconds: 1 })
    state.hasInode = false
    const inode = takenOver({ more: true })
    // The timer of the hold begins with the first answer.
    await sleep(100)
    t.strictSame(state.unpinned, [])
    t.ok(inode.unseen)
    await until(() => state.unpinned.length > 0, 3000)
  })

  t.test("a late FORGET of an earlier daemon's inode does not end the pins of the next one", async (t) => {
    const { state, inodes, lifetime, takenOver, again } = fixture(t)
    const inode = takenOver({})
    // The kernel dropped the inode of the first five lookups. Then another lookup came, and was read
    // first.
    again(inode, UNSEEN, 4712)
    lifetime.forget(inode, 5)
    await sleep(50)
    t.strictSame(state.unpinned, [], 'the kernel has the inode of that lookup')
    lifetime.forget(inode, 1)
    state.hasInode = false
    await until(() => state.unpinned.length === 1)
    t.equal(inodes.size, 0, 'nothing is left of it')
  })

  t.test('twin: if its count is believed, it does', async (t) => {
    const { state, lifetime, takenOver, again } = fixture(t)
    const inode = takenOver({})
    again(inode, UNSEEN, 4712)
    inode.takenOver = false
    lifetime.forget(inode, 5)
    await sleep(50)
    t.strictSame(state.unpinned, ['1'])
  })
})

t.test('close() drops every pin, once', async (t) => {
  const { state, inodes, lifetime, answered, forget } = fixture(t, { lingerMs: 1000 })
  state.threads.set(4711, seen(IN_OPENAT))
  answered(OPENAT)
  answered(MOUNT)
  forget(answered(UNSEEN))
  lifetime.close()
  t.strictSame([...state.unpinned].sort(), ['1', '2', '3'])
  t.strictSame(state.closedFds, [MOUNT_FD])
  t.ok([...inodes].every((inode) => inode.pin === undefined))
  const before = state.told.length
  await sleep(60)
  t.equal(state.unpinned.length, 3)
  t.equal(state.told.length, before)
  lifetime.close()
  t.equal(state.unpinned.length, 3)
  t.strictSame(state.closedFds, [MOUNT_FD])
})

t.test('whenDrained() waits until callers that were answered are out of their calls', async (t) => {
  const { state, lifetime, answered } = fixture(t)
  let drained = 0
  lifetime.whenDrained(() => drained++)
  t.equal(drained, 1, 'nobody was')
  state.threads.set(4711, seen(IN_OPENAT))
  answered(OPENAT)
  answered(OPENAT, 4712)
  lifetime.whenDrained(() => drained++)
  await sleep(100)
  t.equal(drained, 1)
  state.threads.clear()
  await until(() => drained === 2)
  t.equal(state.unpinned.length, 2)
})

/** Timers that keep this process alive. */
const timers = () => process.getActiveResourcesInfo().filter((kind) => kind === 'Timeout').length

t.test('no timer runs while nothing is pinned, nor after close()', async (t) => {
  const { state, lifetime, answered, forget } = fixture(t, { lingerMs: 10 })
  const before = timers()
  const settled = () => state.unpinned.length
  answered(OPENAT)
  t.ok(timers() > before, 'a pin has a timer')
  await until(() => settled() === 1)
  await sleep(60)
  t.equal(timers(), before, 'after an open')
  forget(answered(UNSEEN))
  await until(() => settled() === 2)
  await sleep(60)
  t.equal(timers(), before, 'after a caller that could not be seen')
  answered(OPENAT)
  forget(answered(UNSEEN))
  lifetime.close()
  t.equal(timers(), before, 'after close()')
})

t.test('a clock that jumps costs one tick of the hold', async (t) => {
  const { state, answered } = fixture(t, { holdSeconds: 2 })
  answered(UNSEEN)
  await sleep(100)
  const end = performance.now() + 2500
  while (performance.now() < end);
  await sleep(100)
  t.strictSame(state.unpinned, [])
  await until(() => state.unpinned.length > 0)
})

/** These tests take seconds, so they run side by side. */
const SLOW = { buffered: true }
t.jobs = 5

t.test('if the kernel does not forget, a caller that cannot be seen is done after the hold', SLOW, async (t) => {
  const { state, answered, again } = fixture(t, { holdSeconds: 2 })
  const start = performance.now()
  const inode = answered(UNSEEN)
  state.threads.set(4712, seen(IN_OPENAT))
  again(answered(UNSEEN), OPENAT, 4712)
  await sleep(1500)
  again(inode, UNSEEN)
  await until(() => !inode.unseen)
  const took = performance.now() - start
  t.ok(took >= 2900 && took < 4000 + SLACK_MS, `${Math.round(took)} ms: an answer begins it anew`)
  await until(() => state.unpinned.length > 0)
  await sleep(100)
  t.strictSame(state.unpinned, ['1'], 'another caller is still in its call')
})

t.test('a process that has called close() can exit', SLOW, async (t) => {
  const url = (name: string) => JSON.stringify(join(ROOT, 'build/src', name))
  const script = `
    const { PinLifetime } = await import(${url('gate/pin-lifetime.js')})
    const { InodeTable } = await import(${url('gate/inode.js')})
    const { Intents, someCall, UNSEEN } = await import(${url('gate/intent.js')})
    const { native } = await import(${url('native.js')})
    const inodes = new InodeTable()
    const log = { error() {}, debug() {} }
    const kernel = { invalidate: () => true, prune: () => true }
    const state = { pinnedFor() {}, notPinnedFor() {} }
    const lifetime = new PinLifetime({ native: { ...native, close: () => 0 }, inodes, opener: { close() {} }, intents: new Intents(native), options: { lingerMs: 60000, holdSeconds: 60 }, log, state, kernel })
    lifetime.start(5)
    for (const [diskseq, call] of [[1n, someCall('open')], [2n, UNSEEN]]) {
      const inode = inodes.of({ name: String(diskseq), diskseq, partition: 0, minor: 0 })
      inode.pin = { fd: 6, device: { name: 'x' } }
      inode.nlookup = 1
      lifetime.answered(inode, { tid: 1, uid: 0, gid: 0 }, call)
    }
    lifetime.close()`
  const start = performance.now()
  await promisify(execFile)(process.execPath, ['--input-type=module', '-e', script], { timeout: 20_000 })
  t.ok(performance.now() - start < 10_000)
})

t.test('an open that ends after close() begins nothing', async (t) => {
  const timers = () => process.getActiveResourcesInfo().filter((name) => name === 'Timeout').length
  const { lifetime, answered } = fixture(t)
  const before = timers()
  lifetime.close()
  for (const call of [OPENAT, MOUNT, UNSEEN]) answered(call)
  t.equal(timers(), before, 'no timer that would keep the process alive')
})
