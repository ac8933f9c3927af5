/** The reaper: pins that last as long as they must, and not longer; and no work while there are none. */
import { execFile } from 'node:child_process'
import { join } from 'node:path'
import { promisify } from 'node:util'

import t, { type Test } from 'tap'

import type { DiskSeq } from '../src/diskseq.js'
import type { Call, Intents } from '../src/intent.js'
import type { Logger } from '../src/log.js'
import { type Node, NodeTable } from '../src/node.js'
import type { Pin, PinOpener } from '../src/pin.js'
import { Reaper } from '../src/reaper.js'
import type { Device } from '../src/sysfs.js'
import { sleep, until } from './helpers/tree.js'

const MOUNT_FD = 55
const OPENAT: Call = { intent: 'open', number: 257 }
const MOUNT: Call = { intent: 'unknown', number: 165 }
/** io_uring and whoever cannot be seen: not known to open by number. */
const UNSEEN: Call = { intent: 'unknown', number: -1 }

/** Any wait here is cut short or prolonged by as much on a busy machine. */
const SLACK_MS = 40

interface Options {
  lingerMs?: number
  holdSeconds?: number
  /** How long the kernel takes to prune; never, if undefined. */
  pruneMs?: number | undefined
}

function fixture(t: Test, { lingerMs = 5, holdSeconds = 30, ...rest }: Options = {}) {
  const state = {
    pruneMs: 'pruneMs' in rest ? rest.pruneMs : 0,
    /** Errno of the next prune. */
    pruneError: 0,
    prunes: [] as number[],
    pruning: 0,
    prunesAtOnce: 0,
    unpinned: [] as string[],
    closedFds: [] as number[],
    errors: 0,
    /** Threads that are still in the call they were seen in. */
    inCall: new Set<number>(),
    /** Whether the kernel has an inode of the node. */
    hasInode: true,
    onPrune: () => {},
    pending: [] as (() => void)[],
  }
  const nodes = new NodeTable()
  const intents = {
    mayStillBeIn: (tid: number) => state.inCall.has(tid),
    outlastsInode: (call: Call) => call.intent === 'unknown' && call.number !== -1,
  } as unknown as Intents
  const opener = { close: (pin: Pin) => void state.unpinned.push(pin.device.name) } as unknown as PinOpener
  const reaper = new Reaper(
    {
      prune(fd, done) {
        if (fd !== MOUNT_FD) throw new Error(`pruned descriptor ${fd}`)
        state.prunes.push(performance.now())
        state.prunesAtOnce = Math.max(state.prunesAtOnce, ++state.pruning)
        const finish = () => {
          state.pruning--
          if (state.pruneError === 0) state.onPrune()
          done(state.pruneError)
        }
        if (state.pruneMs === undefined) state.pending.push(finish)
        else if (state.pruneMs === 0) setImmediate(finish)
        else setTimeout(finish, state.pruneMs)
      },
      close: (fd) => state.closedFds.push(fd) * 0,
    },
    nodes,
    opener,
    intents,
    { lingerMs, holdSeconds },
    { error: () => void state.errors++, debug() {} } as unknown as Logger,
    { pinnedFor() {}, notPinnedFor() {} },
  )
  reaper.start(MOUNT_FD, () => state.hasInode)
  t.teardown(() => reaper.close())
  let next = 1
  return {
    state,
    nodes,
    reaper,
    /** A node as it is after a lookup that was answered with a pin. */
    answered(call: Call, tid = 4711): Node {
      const node = nodes.create(BigInt(next++) as DiskSeq, 0) as Node
      node.pin = { fd: 100 + next, device: { name: node.name } as Device }
      this.again(node, call, tid)
      return node
    },
    again(node: Node, call: Call, tid = 4711) {
      node.nlookup++
      reaper.answered(node, { tid, uid: 0, gid: 0 }, call)
    },
    forget(node: Node) {
      reaper.forget(node, node.nlookup)
    },
    /** A node as it is when an earlier daemon's pin has been taken over. */
    inherited(call: Call, tid = 4711): Node {
      const node = nodes.create(BigInt(next++) as DiskSeq, 0) as Node
      node.pin = { fd: 100 + next, device: { name: node.name } as Device }
      node.inherited = true
      node.callers.set(tid, call.number)
      reaper.adopted(node)
      return node
    },
  }
}

t.test('the pin of an open(2) ends when the kernel forgets the node', async (t) => {
  const { state, nodes, answered, again, forget } = bound(fixture(t))
  const node = answered(OPENAT)
  again(node, OPENAT, 4712)
  state.inCall.add(4711)
  await sleep(50)
  t.strictSame(state.unpinned, [], 'not before')
  forget(node)
  t.strictSame(state.unpinned, ['1'], 'and then at once')
  t.equal(node.pin, undefined)
  t.equal(nodes.size, 0, 'nothing is left of it')
})

function bound<F extends ReturnType<typeof fixture>>(made: F): F {
  return { ...made, answered: made.answered.bind(made), again: made.again.bind(made) }
}

for (const [what, call] of [['opens by number', MOUNT], ['cannot be seen', UNSEEN]] as const) {
  t.test(`the pin of a caller that ${what} lingers`, async (t) => {
    const { state, nodes, answered, forget } = bound(fixture(t, { lingerMs: 60 }))
    const node = answered(call)
    const start = performance.now()
    forget(node)
    t.strictSame(state.unpinned, [])
    await sleep(40)
    t.strictSame(state.unpinned, [])
    await until(() => state.unpinned.length > 0)
    const took = performance.now() - start
    t.ok(took >= 55 && took < 2 * 60 + SLACK_MS, `${Math.round(took)} ms`)
    t.equal(nodes.size, 0)
  })
}

t.test('it lingers for as long as the caller is in its call', async (t) => {
  const { state, answered, forget } = bound(fixture(t, { lingerMs: 10 }))
  const node = answered(MOUNT, 4711)
  state.inCall.add(4711)
  forget(node)
  await sleep(200)
  t.strictSame(state.unpinned, [])
  state.inCall.delete(4711)
  const start = performance.now()
  await until(() => state.unpinned.length > 0)
  t.ok(performance.now() - start < 30 + SLACK_MS, 'and ends when it is out')
})

t.test('a caller that cannot be seen is not waited for', async (t) => {
  const { state, answered, forget } = bound(fixture(t, { lingerMs: 10 }))
  state.inCall.add(4711)
  forget(answered(UNSEEN, 4711))
  await sleep(30 + SLACK_MS)
  t.strictSame(state.unpinned, ['1'])
})

t.test('a pin that lingers is kept for the next caller', async (t) => {
  const { state, answered, again, forget } = bound(fixture(t, { lingerMs: 20 }))
  const node = answered(MOUNT)
  const { pin } = node
  forget(node)
  await sleep(10)
  again(node, OPENAT)
  await sleep(80)
  t.strictSame(state.unpinned, [])
  t.equal(node.pin, pin)
  forget(node)
  await until(() => state.unpinned.length > 0)
  t.strictSame(state.unpinned, ['1'], 'and closed once')
})

t.test('an open(2) does not shorten what an earlier caller needs', async (t) => {
  const { state, answered, again, forget } = bound(fixture(t, { lingerMs: 50 }))
  const node = answered(MOUNT)
  again(node, OPENAT, 4712)
  forget(node)
  t.strictSame(state.unpinned, [])
  await until(() => state.unpinned.length > 0)
})

t.test('after a pin ended, nothing of its callers counts for the next', async (t) => {
  const { state, answered, again, forget } = bound(fixture(t, { lingerMs: 10 }))
  const node = answered(MOUNT)
  forget(node)
  await until(() => state.unpinned.length > 0)
  node.pin = { fd: 5, device: { name: 'next' } as Device }
  again(node, OPENAT)
  forget(node)
  t.strictSame(state.unpinned, ['1', 'next'], 'at once')
})

t.test('a thousand pins linger no longer than one', async (t) => {
  const { state, nodes, answered, forget } = bound(fixture(t, { lingerMs: 20 }))
  for (let i = 0; i < 1000; i++) forget(answered(MOUNT, 5000 + i))
  await sleep(40 + SLACK_MS * 2)
  t.equal(state.unpinned.length, 1000)
  t.equal(new Set(state.unpinned).size, 1000)
  t.equal(nodes.size, 0)
})

t.test('the pins that linger at once are bounded', async (t) => {
  const { state, answered, forget } = bound(fixture(t, { lingerMs: 500 }))
  for (let i = 0; i < 6000; i++) forget(answered(MOUNT, 5000 + i))
  t.ok(state.unpinned.length >= 1000 && state.unpinned.length < 5999, `${6000 - state.unpinned.length}`)
  t.equal(state.unpinned[0], '1', 'the oldest went first')
})

t.test('the kernel is made to forget a few ms after the last answer', async (t) => {
  const { state, answered, again, forget } = bound(fixture(t))
  state.onPrune = () => forget(node)
  const start = performance.now()
  const node = answered(OPENAT)
  t.equal(state.prunes.length, 0, 'not before the caller has opened it')
  again(node, OPENAT)
  await until(() => state.unpinned.length > 0)
  const took = (state.prunes[0] as number) - start
  t.ok(took >= 2 && took < 10 + SLACK_MS, `${took.toFixed(1)} ms`)
  const { length } = state.prunes
  await sleep(60)
  t.equal(state.prunes.length, length, 'and not once it has')
})

t.test('a new answer makes attempts frequent again', async (t) => {
  const { state, answered, again } = bound(fixture(t))
  const node = answered(OPENAT)
  await sleep(300)
  const before = state.prunes.length
  again(node, OPENAT)
  await sleep(30)
  t.ok(state.prunes.length > before)
})

t.test('a node that is not forgotten yet makes no other wait', async (t) => {
  const { state, answered, forget } = bound(fixture(t))
  answered(OPENAT)
  await sleep(400) // its attempts are far apart by now
  const start = performance.now()
  const node = answered(OPENAT, 4712)
  const before = state.prunes.length
  await until(() => state.prunes.length > before)
  const took = performance.now() - start
  t.ok(took < 10 + SLACK_MS, `${Math.round(took)} ms`)
  forget(node)
})

t.test('a close brings an attempt, however long the node has been in use', async (t) => {
  const { state, reaper, answered, forget } = bound(fixture(t))
  const node = answered(OPENAT)
  await sleep(400) // its attempts are far apart by now
  const before = state.prunes.length
  state.onPrune = () => forget(node)
  const start = performance.now()
  reaper.closed(node)
  await until(() => state.unpinned.length > 0)
  t.ok(performance.now() - start < 10 + SLACK_MS, 'a few ms later')
  t.equal(state.prunes.length, before + 1)
})

t.test('one close of several that were alike is enough, and one that came too early', async (t) => {
  const { state, reaper, answered, again, forget } = bound(fixture(t))
  const node = answered(OPENAT)
  again(node, OPENAT, 4712)
  reaper.closed(node)
  await sleep(50)
  t.strictSame(state.unpinned, [], 'the kernel has not let go of the name')
  state.onPrune = () => forget(node)
  await until(() => state.unpinned.length > 0, 500)
  t.pass('it is tried again without another event')
})

t.test('attempts for many that are in use are made together', async (t) => {
  const { state, answered } = bound(fixture(t))
  for (let i = 0; i < 200; i++) {
    answered(OPENAT, 5000 + i)
    await sleep(1)
  }
  await sleep(2500)
  const before = state.prunes.length
  await sleep(2000)
  const { length } = state.prunes
  t.ok(length > before && length - before <= 12, `${length - before} attempts for 200 in two seconds`)
})

t.test('when events were lost, attempts are made at once', async (t) => {
  const { state, reaper, answered } = bound(fixture(t))
  answered(OPENAT)
  await sleep(400)
  const before = state.prunes.length
  reaper.lostTrack()
  await sleep(20 + SLACK_MS)
  t.ok(state.prunes.length >= before + 2)
})

t.test('never two prunes at once, and none is left out', async (t) => {
  const { state, answered, again } = bound(fixture(t, { pruneMs: 50 }))
  const node = answered(OPENAT)
  for (let i = 0; i < 20; i++) {
    again(node, OPENAT, 5000 + i)
    await sleep(8)
  }
  const last = performance.now()
  await sleep(120)
  t.equal(state.prunesAtOnce, 1)
  t.ok(state.prunes.length >= 3)
  t.ok((state.prunes.at(-1) as number) > last, 'one began after the last answer')
})

t.test('a prune that fails is told, and tried again', async (t) => {
  const { state, answered, forget } = bound(fixture(t))
  state.pruneError = 12
  const node = answered(OPENAT)
  await until(() => state.errors > 0)
  state.pruneError = 0
  state.onPrune = () => forget(node)
  await until(() => state.unpinned.length > 0)
  t.pass('until it works')
})

t.test('without a mount there is nothing to prune, until there is one', async (t) => {
  const { state, reaper, answered } = bound(fixture(t))
  reaper.start(-1, () => true)
  answered(OPENAT)
  await sleep(50)
  t.equal(state.prunes.length, 0)
  reaper.start(MOUNT_FD, () => state.hasInode)
  await sleep(200)
  t.ok(state.prunes.length > 0)
})

t.test('callers that are done are not remembered for ever', async (t) => {
  const { state, answered, again } = bound(fixture(t))
  const node = answered(OPENAT)
  state.inCall.add(4711)
  for (let tid = 10_000; tid < 12_000; tid++) again(node, OPENAT, tid)
  t.ok(node.callers.size <= 300, `${node.callers.size} of 2001`)
  t.ok(node.callers.has(4711), 'and one that is not done is')
})

t.test('an attempt to pin that served nobody leaves no pin', async (t) => {
  const { state, reaper, nodes } = bound(fixture(t))
  const node = nodes.create(9n as DiskSeq, 0) as Node
  node.pin = { fd: 5, device: { name: '9' } as Device }
  reaper.settled(node)
  t.strictSame(state.unpinned, ['9'])
  t.equal(nodes.size, 0)
})

t.test('close() drops every pin, once', async (t) => {
  const { state, nodes, reaper, answered, forget } = bound(fixture(t, { lingerMs: 1000 }))
  answered(OPENAT)
  answered(OPENAT)
  forget(answered(MOUNT))
  reaper.close()
  t.strictSame([...state.unpinned].sort(), ['1', '2', '3'])
  t.strictSame(state.closedFds, [MOUNT_FD])
  t.ok([...nodes].every((node) => node.pin === undefined))
  const before = state.prunes.length
  await sleep(60)
  t.equal(state.unpinned.length, 3)
  t.equal(state.prunes.length, before)
  reaper.close()
  t.equal(state.unpinned.length, 3)
  t.strictSame(state.closedFds, [MOUNT_FD])
})

t.test('close() during a prune leaves the descriptor to it', async (t) => {
  const { state, reaper, answered } = bound(fixture(t, { pruneMs: undefined }))
  answered(OPENAT)
  await until(() => state.pending.length > 0)
  reaper.close()
  t.strictSame(state.closedFds, [], 'a prune still uses it')
  state.pending.shift()?.()
  t.strictSame(state.closedFds, [MOUNT_FD])
  await sleep(30)
  t.equal(state.prunes.length, 1)
})

/** Timers that keep this process alive. */
const timers = () => process.getActiveResourcesInfo().filter((kind) => kind === 'Timeout').length

t.test('no timer runs while nothing is pinned, nor after close()', async (t) => {
  const { reaper, answered, forget } = bound(fixture(t, { lingerMs: 10 }))
  const before = timers()
  t.equal(timers(), before, 'at first')
  const node = answered(OPENAT)
  t.ok(timers() > before, 'one that is pinned is looked after')
  forget(node)
  await sleep(30)
  t.equal(timers(), before, 'after an open')
  forget(answered(MOUNT))
  await sleep(60)
  t.equal(timers(), before, 'after a mount')
  answered(OPENAT)
  forget(answered(MOUNT))
  reaper.inspected()
  reaper.close()
  t.equal(timers(), before, 'after close()')
})

/** These take seconds, so they run side by side. */
const SLOW = { buffered: true }
t.jobs = 5

t.test('a pin does not linger for ever for a caller that stays in its call', SLOW, async (t) => {
  const { state, answered, forget } = bound(fixture(t, { lingerMs: 10, holdSeconds: 1 }))
  state.inCall.add(4711)
  const node = answered(MOUNT, 4711)
  const start = performance.now()
  forget(node)
  await until(() => state.unpinned.length > 0)
  const took = performance.now() - start
  t.ok(took >= 990 && took < 1020 + SLACK_MS * 2, `${Math.round(took)} ms with a hold of 1 s`)
})

t.test('attempts come ever more rarely while it is not forgotten', SLOW, async (t) => {
  const { state, answered, forget } = bound(fixture(t))
  const node = answered(OPENAT)
  await sleep(800)
  const gaps = state.prunes.slice(1).map((at, i) => at - (state.prunes[i] as number))
  t.ok(state.prunes.length >= 5 && state.prunes.length <= 9, `${state.prunes.length} attempts in 0.8 s`)
  t.ok((gaps.at(-1) as number) > 100, `the last after ${Math.round(gaps.at(-1) as number)} ms`)
  forget(node)
  const before = state.prunes.length
  await sleep(600)
  t.equal(state.prunes.length, before, 'and end when it is')
})

t.test('names that were only looked at are dropped once a second at most', SLOW, async (t) => {
  const { state, reaper } = bound(fixture(t))
  const end = performance.now() + 1300
  while (performance.now() < end) {
    reaper.inspected()
    await sleep(10)
  }
  t.equal(state.prunes.length, 1)
})

t.test('a node in use loses its pin after the hold, if nobody is still on the way to it', SLOW, async (t) => {
  const { state, answered } = bound(fixture(t, { holdSeconds: 1 }))
  const start = performance.now()
  answered(OPENAT, 1)
  answered(OPENAT, 2)
  state.inCall.add(2)
  await until(() => state.unpinned.length > 0)
  const took = performance.now() - start
  t.ok(took >= 950 && took < 1000 + SLACK_MS * 2, `${Math.round(took)} ms`)
  t.strictSame(state.unpinned, ['1'], 'the other one was answered and has not run since')
  await sleep(1100)
  t.strictSame(state.unpinned, ['1'])
  state.inCall.delete(2)
  await until(() => state.unpinned.length > 1)
  t.strictSame(state.unpinned, ['1', '2'])
})

t.test('an answer begins the hold anew', SLOW, async (t) => {
  const { state, answered, again } = bound(fixture(t, { holdSeconds: 2 }))
  const node = answered(OPENAT)
  await sleep(1500)
  again(node, OPENAT)
  await sleep(900)
  t.strictSame(state.unpinned, [])
})

t.test('a process that has closed it can exit', async (t) => {
  const url = (name: string) => JSON.stringify(join(import.meta.dirname, '../build/js', name))
  const script = `
    const { Reaper } = await import(${url('reaper.js')})
    const { NodeTable } = await import(${url('node.js')})
    const nodes = new NodeTable()
    const calls = { prune: (_, done) => setImmediate(done, 0), close: () => 0 }
    const intents = { mayStillBeIn: () => true, outlastsInode: () => true }
    const log = { error() {}, debug() {} }
    const reaper = new Reaper(calls, nodes, { close() {} }, intents, { lingerMs: 60000, holdSeconds: 60 }, log)
    reaper.start(5)
    for (const [diskseq, call] of [[1n, 'open'], [2n, 'unknown']]) {
      const node = nodes.create(diskseq, 0)
      node.pin = { fd: 6, device: { name: 'x' } }
      node.nlookup = 1
      reaper.answered(node, { tid: 1, uid: 0, gid: 0 }, { intent: call, number: 165 })
      if (call === 'unknown') {
        node.nlookup = 0
        reaper.forgotten(node)
      }
    }
    reaper.inspected()
    reaper.close()`
  const start = performance.now()
  await promisify(execFile)(process.execPath, ['--input-type=module', '-e', script], { timeout: 20_000 })
  t.ok(performance.now() - start < 10_000)
})

t.test('a pin that was taken over ends when the kernel has no inode and the callers are gone', async (t) => {
  const made = fixture(t)
  const { state } = made
  state.hasInode = false
  state.inCall.add(4711)
  const node = made.inherited(OPENAT)
  await sleep(50)
  t.strictSame(state.unpinned, [], 'not while a caller may be about to make one')
  state.inCall.clear()
  await until(() => state.unpinned.length === 1)
  t.equal(node.pin, undefined)
})

t.test('a pin that was taken over stays while the kernel has its inode', async (t) => {
  const made = fixture(t)
  made.inherited(OPENAT)
  await sleep(50)
  t.strictSame(made.state.unpinned, [])
  made.state.hasInode = false
  await until(() => made.state.unpinned.length === 1)
})

t.test("a late FORGET of an earlier daemon's inode does not end the pin of the next one", async (t) => {
  const made = fixture(t)
  const { state, reaper } = made
  const node = made.inherited(OPENAT)
  // The inode of the first five lookups was dropped; then came another lookup, and was read first.
  made.again(node, OPENAT, 4712)
  reaper.forget(node, 5)
  await sleep(50)
  t.strictSame(state.unpinned, [], 'the kernel has the inode of that one')
  reaper.forget(node, 1)
  state.hasInode = false
  await until(() => state.unpinned.length === 1)
  t.equal(made.nodes.size, 0, 'nothing is left of it')
})

t.test('twin: if its count is believed, it does', async (t) => {
  const made = fixture(t)
  const node = made.inherited(OPENAT)
  made.again(node, OPENAT, 4712)
  node.inherited = false
  made.reaper.forget(node, 5)
  t.strictSame(made.state.unpinned, ['1'])
})

t.test('whoever was answered is awaited until he is out of his call', async (t) => {
  const made = fixture(t)
  t.equal(made.reaper.awaited(), false)
  made.state.inCall.add(4711)
  made.answered(OPENAT)
  t.equal(made.reaper.awaited(), true)
  made.state.inCall.clear()
  t.equal(made.reaper.awaited(), false)
})
