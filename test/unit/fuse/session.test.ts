// SPDX-License-Identifier: MIT
/** The FUSE session: what goes out for what comes in. Each request gets one answer, whatever it is. */
import { setTimeout as sleep } from 'node:timers/promises'

import t, { type Test } from 'tap'

import {
  type Attr,
  ATTR_OUT_SIZE,
  type Dirent,
  encodeDev,
  encodeDirents,
  type Entry,
  ENTRY_OUT_SIZE,
  Message,
  Opcode,
  OUT_HEADER_SIZE,
  UNANSWERED,
} from '../../../src/fuse/wire.js'
import type { Crowd } from '../../../src/gate/crowd.js'
import type { DeviceNodes } from '../../../src/devices/device-node.js'
import { entryCookie, inodeId, linkId } from '../../../src/devices/names.js'
import type { DiskSeq } from '../../../src/devices/names.js'
import { E } from '../../../src/util/errno.js'
import type { Gate } from '../../../src/gate/gate.js'
import type { Logger } from '../../../src/util/log.js'
import { InodeTable } from '../../../src/gate/inode.js'
import type { Intents } from '../../../src/gate/intent.js'
import type { PinLifetime } from '../../../src/gate/pin-lifetime.js'
import type { Registry } from '../../../src/devices/registry.js'
import { FuseSession, PAYLOAD_MAX } from '../../../src/fuse/session.js'
import { SharedState, STATE_SIZE } from '../../../src/handover/shared-state.js'
import type { Device, Sysfs } from '../../../src/devices/sysfs.js'
import type { Reply, TreeOperations } from '../../../src/fuse/transport.js'
import { Tree } from '../../../src/tree/tree.js'

const FD = 77
const HEADER_SIZE = 40
const ROOT = 1n
const CALLER = { tid: 4711, uid: 60001, gid: 61001 }

interface Answer {
  readonly length: number
  readonly error: number
  readonly unique: bigint
  readonly payload: Buffer
}

/** Answers EACCES, so that an unexpected operation shows. */
const refuseAll = new Proxy({} as TreeOperations, {
  get: (_, name) => (name === 'forget' || name === 'turnEnds' ? () => {} : (...args: unknown[]) => (args.at(-1) as Reply).error(E.EACCES)),
})

/** A session whose kernel is this test. With the memory of an earlier session it goes on where that one ended. */
function fixture(operations: Partial<TreeOperations> = {}, memory?: ArrayBuffer, traced?: object[]) {
  const answers: Answer[] = []
  const errors: string[] = []
  const reads: (Buffer | number)[] = []
  /** What comes a moment after there was nothing to read. */
  const soon: (Buffer | number)[] = []
  const take = (from: (Buffer | number)[], into: Uint8Array) => {
    const next = from.shift() ?? -E.EAGAIN
    if (typeof next === 'number') return next
    into.set(next)
    return next.length
  }
  const state = { writeResult: undefined as number | undefined, ready: () => {}, polls: 0, closed: [] as number[] }
  const session = new FuseSession({
    native: {
      Poll: class {
        constructor(_: number, ready: () => void) {
          state.polls++
          state.ready = ready
        }
        pause() {}
        resume() {}
        close() {
          state.polls--
        }
      },
      readSoon: (_, into) => take(soon, into),
      read: (_, into) => take(reads, into),
      write(_, bytes, length) {
        const answer = Buffer.from(bytes.slice(0, length))
        answers.push({
          length: answer.readUInt32LE(0),
          error: -answer.readInt32LE(4),
          unique: answer.readBigUInt64LE(8),
          payload: answer.subarray(OUT_HEADER_SIZE),
        })
        return state.writeResult ?? length
      },
      close: (fd) => (state.closed.push(fd), 0),
    },
    fd: FD,
    log: {
      error: (fields: unknown, text?: string) => void errors.push(text ?? String(fields)),
      ...(traced !== undefined && {
        isLevelEnabled: (level: string) => level === 'trace',
        trace: (fields: object, what: string) => void traced.push({ what, ...fields }),
      }),
    } as unknown as Logger,
    requests: new SharedState(memory),
  })
  const all = { ...bound(refuseAll), ...operations } as TreeOperations
  const started = memory === undefined ? session.start(all) : Promise.resolve(session.resume(all))
  started.catch(() => {})
  let unique = 1000n
  const send = (bytes: Buffer) => session.handle(new Message(new Uint8Array(bytes), bytes.length))
  return {
    session,
    started,
    answers,
    errors,
    reads,
    soon,
    state,
    send,
    /** The answers to one request. */
    ask(opcode: number, body: Buffer = Buffer.alloc(0), { nodeid = ROOT, length }: { nodeid?: bigint; length?: number } = {}) {
      unique += 2n
      const before = answers.length
      send(request(opcode, body, { unique, nodeid, ...(length !== undefined && { length }) }))
      return answers.slice(before).filter((answer) => answer.unique === unique)
    },
    last: () => unique,
  }
}

const OPERATIONS: (keyof TreeOperations)[] = [
  'turnEnds',
  'lookup',
  'forget',
  'getattr',
  'setattr',
  'readlink',
  'opendir',
  'readdir',
  'statfs',
  'getxattr',
  'listxattr',
  'setxattr',
  'removexattr',
  'unlink',
]

function bound(operations: TreeOperations): TreeOperations {
  return Object.fromEntries(
    OPERATIONS.map((name) => [name, (operations[name] as () => void).bind(operations)]),
  ) as unknown as TreeOperations
}

function request(
  opcode: number,
  body: Buffer,
  {
    unique,
    nodeid,
    length = HEADER_SIZE + body.length,
    tid = CALLER.tid,
    uid = CALLER.uid,
  }: { unique: bigint; nodeid: bigint; length?: number; tid?: number; uid?: number },
): Buffer {
  const header = Buffer.alloc(HEADER_SIZE)
  header.writeUInt32LE(length, 0)
  header.writeUInt32LE(opcode, 4)
  header.writeBigUInt64LE(unique, 8)
  header.writeBigUInt64LE(nodeid, 16)
  header.writeUInt32LE(uid, 24)
  header.writeUInt32LE(CALLER.gid, 28)
  header.writeUInt32LE(tid, 32)
  return Buffer.concat([header, body])
}

const u32 = (...values: number[]) => {
  const bytes = Buffer.alloc(4 * values.length)
  values.forEach((value, i) => bytes.writeUInt32LE(value >>> 0, 4 * i))
  return bytes
}
const u64 = (...values: bigint[]) => {
  const bytes = Buffer.alloc(8 * values.length)
  values.forEach((value, i) => bytes.writeBigUInt64LE(value, 8 * i))
  return bytes
}
const cstring = (text: string) => Buffer.from(`${text}\0`, 'latin1')
const cat = (...parts: Buffer[]) => Buffer.concat(parts)

/** fuse_init_in */
const init = (major: number, minor: number, flags = 0xffffffff) => u32(major, minor, 0, flags, ...Array(12).fill(0))
/** fuse_read_in */
const readIn = (handle: bigint, offset: bigint, size: number) => cat(u64(handle, offset), u32(size, 0), u64(0n), u32(0, 0))

const ATTR: Attr = {
  ino: 0x1122334455667788n,
  mode: 0o060640,
  nlink: 1,
  uid: 1001,
  gid: 1002,
  rdev: encodeDev(259, 0x12345),
  size: 0,
  atime: 1700000001,
  atimeNs: 11,
  mtime: 1700000002,
  mtimeNs: 22,
  ctime: -3,
  ctimeNs: 33,
}
const ENTRY: Entry = { nodeid: 0xd000n, generation: 0x700n, attr: ATTR, attrValid: { seconds: 0, nanoseconds: 1 } }

/** struct fuse_attr */
const attrBytes = (attr: Attr) => {
  const times = Buffer.alloc(24)
  times.writeBigInt64LE(BigInt(attr.atime), 0)
  times.writeBigInt64LE(BigInt(attr.mtime), 8)
  times.writeBigInt64LE(BigInt(attr.ctime), 16)
  return cat(
    u64(attr.ino, BigInt(attr.size), 0n),
    times,
    u32(attr.atimeNs, attr.mtimeNs, attr.ctimeNs),
    u32(attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, 4096, 0),
  )
}

const success = (payload: Buffer) => [{ length: OUT_HEADER_SIZE + payload.length, error: 0, payload }]
const failure = (error: number) => [{ length: OUT_HEADER_SIZE, error, payload: Buffer.alloc(0) }]
const shown = (answers: Answer[]) => answers.map(({ length, error, payload }) => ({ length, error, payload }))

/**
 * Requests that are read at once, each from a user and for a name; and the names in the order of their
 * LOOKUPs.
 *
 * @param busyMs how long a LOOKUP takes: with more than a little, few are answered in one go
 */
function crowd(busyMs = 0) {
  const order: string[] = []
  const held: Reply[] = []
  const made = fixture({
    lookup(_, __, name, reply) {
      for (const end = performance.now() + busyMs; performance.now() < end;);
      order.push(name)
      if (name.startsWith('held')) held.push(reply)
      else reply.error(E.ENOENT)
    },
  })
  let unique = 2n
  const wants = (uid: number, name: string) => {
    unique += 2n
    made.reads.push(request(Opcode.LOOKUP, cstring(name), { unique, nodeid: ROOT, uid }))
    return unique
  }
  const interrupts = (other: bigint) => made.reads.push(request(Opcode.INTERRUPT, u64(other), { unique: other + 1n, nodeid: 0n, uid: 0 }))
  return { ...made, order, held, wants, interrupts }
}

const turns = async (count: number) => {
  for (let i = 0; i < count; i++) await new Promise((resolve) => setImmediate(resolve))
}

t.test('root does not wait behind the requests of other users', async (t) => {
  const { wants, order, state } = crowd(0.4)
  for (let i = 0; i < 50; i++) wants(60001, `a${i}`)
  wants(0, 'root')
  state.ready()
  t.strictSame(order.slice(0, 3), ['a0', 'root', 'a1'], 'only behind the first, which was alone when it came')
  await turns(3)
  const before = order.length
  wants(0, 'root again')
  state.ready()
  t.ok(before > 3 && before < 45, `${before} had been answered`)
  t.equal(order[before], 'root again')
  await turns(100)
  t.equal(order.length, 52, 'all are answered')
})

t.test('users take turns', async (t) => {
  const { wants, order, state } = crowd()
  for (let i = 0; i < 20; i++) wants(60001, `a${i}`)
  for (let i = 0; i < 3; i++) wants(60002, `b${i}`)
  state.ready()
  await turns(50)
  t.strictSame(order.slice(0, 7), ['a0', 'a1', 'b0', 'a2', 'b1', 'a3', 'b2'])
  t.equal(order.length, 23)
})

t.test('every other waiting request that is answered is a LOOKUP, and those of root come before all', async (t) => {
  const order: string[] = []
  const { reads, state } = fixture({
    lookup(_, __, name, reply) {
      order.push(name)
      reply.error(E.ENOENT)
    },
    statfs(reply) {
      order.push('statfs')
      reply.error(E.EACCES)
    },
    getattr(_, nodeid, reply) {
      order.push(`getattr ${nodeid}`)
      reply.error(E.ESTALE)
    },
  })
  let unique = 2n
  const wants = (uid: number, opcode: number, body = Buffer.alloc(16), nodeid = ROOT) =>
    reads.push(request(opcode, body, { unique: (unique += 2n), nodeid, uid }))
  wants(60001, Opcode.STATFS) // alone when it comes
  for (let i = 0; i < 20; i++) wants(60001, Opcode.GETATTR, Buffer.alloc(16), 5n)
  wants(60002, Opcode.GETATTR, Buffer.alloc(16), 6n)
  for (let i = 0; i < 5; i++) wants(60001, Opcode.LOOKUP, cstring(`a${i}`))
  wants(60002, Opcode.LOOKUP, cstring('b0'))
  wants(0, Opcode.GETATTR, Buffer.alloc(16), 7n)
  wants(0, Opcode.LOOKUP, cstring('root'))
  state.ready()
  await turns(50)
  t.strictSame(order.slice(0, 3), ['statfs', 'getattr 7', 'root'])
  t.strictSame(
    order.slice(3, 12),
    ['a0', 'getattr 5', 'b0', 'getattr 6', 'a1', 'getattr 5', 'a2', 'getattr 5', 'a3'],
    'users take turns for each kind',
  )
  t.equal(order.length, 30)
})

t.test('waiting LOOKUPs are answered in one go, and requests of root are read before each', async (t) => {
  let most = 0
  // A go ends after a millisecond: on a busy machine that may be at the first look.
  for (let i = 0; i < 200 && most < 6; i++) {
    const { wants, order, state, reads } = crowd()
    for (let i = 0; i < 10; i++) wants(60001, `a${i}`)
    let answered = -1
    const shift = reads.shift.bind(reads)
    reads.shift = () => {
      const next = shift()
      if (next === undefined && order.length > 2 && answered < 0) {
        answered = order.length
        wants(0, 'root')
      }
      return next
    }
    state.ready()
    most = Math.max(most, order.length)
    await turns(20)
    if (order.length !== 11) t.fail(`${order.length} are answered`)
    if (order.indexOf('root') > answered + 1) t.fail(`root is number ${order.indexOf('root')}, and asked when ${answered} were answered`)
  }
  t.ok(most >= 6, `${most} in one go`)
})

t.test('a LOOKUP that waits for its turn can be interrupted, as other requests can', async (t) => {
  const held: Reply[] = []
  const keep = (...args: unknown[]) => void held.push(args.at(-1) as Reply)
  const { reads, state } = fixture({ getattr: keep, lookup: keep })
  const ask = (opcode: number, body: Buffer, unique: bigint) => reads.push(request(opcode, body, { unique, nodeid: 5n, uid: 60001 }))
  ask(Opcode.GETATTR, Buffer.alloc(16), 2n)
  ask(Opcode.GETATTR, Buffer.alloc(16), 4n)
  ask(Opcode.LOOKUP, cstring('1'), 6n)
  for (const unique of [4n, 6n]) reads.push(request(Opcode.INTERRUPT, u64(unique), { unique: unique + 1n, nodeid: 0n, uid: 0 }))
  state.ready()
  await turns(5)
  const interrupted = held.map((reply) => {
    let told = 0
    reply.onInterrupt(() => told++)
    return told
  })
  t.strictSame(interrupted, [0, 1, 1], 'all but the first')
})

t.test('many requests of root in a row keep no other user out', async (t) => {
  const { wants, order, state } = crowd()
  for (let i = 0; i < 3; i++) wants(60001, `a${i}`)
  for (let i = 0; i < 300; i++) wants(0, `root${i}`)
  state.ready()
  t.ok(order.includes('a1'), 'another user is answered after one round of them')
})

t.test('a request that waits for its turn can be interrupted', async (t) => {
  const { wants, interrupts, order, state, held } = crowd(0.4)
  for (let i = 0; i < 5; i++) wants(60001, `a${i}`)
  interrupts(wants(60001, 'held'))
  state.ready()
  t.notOk(order.includes('held'), 'it waits')
  await turns(20)
  let told = 0
  held[0]?.onInterrupt(() => told++)
  t.equal(told, 1, 'its handler is told of the interrupt')
})

t.test('more requests than may wait are still answered, once each', async (t) => {
  const { wants, answers, state, reads } = crowd()
  const asked = new Set(Array.from({ length: 5000 }, (_, i) => wants(60001, `a${i}`)))
  while (reads.length > 0) state.ready()
  for (let i = 0; answers.length < asked.size && i < 10_000; i++) await turns(1)
  t.equal(answers.length, asked.size)
  t.strictSame(new Set(answers.map((answer) => answer.unique)), asked)
})

t.test('no request waits for its turn once the connection has ended', async (t) => {
  const { wants, order, state, session, errors } = crowd()
  for (let i = 0; i < 50; i++) wants(60001, `a${i}`)
  state.ready()
  session.close()
  const before = order.length
  await turns(20)
  t.equal(order.length, before)
  t.strictSame(errors, [])
})

t.test('an incoming daemon finds the requests that waited for their turn', async (t) => {
  const { wants, state, session, order } = crowd()
  for (let i = 0; i < 10; i++) wants(60001, `a${i}`)
  state.ready()
  const left = session.requests
    .unanswered()
    .map(({ message }) => message.string(0))
    .sort()
  t.strictSame(
    left,
    Array.from({ length: 10 }, (_, i) => `a${i}`).filter((name) => !order.includes(name)),
  )
  session.close()
})

t.test('LOOKUP is answered with fuse_entry_out, whose name is never cached', async (t) => {
  let asked: unknown[] = []
  const { ask } = fixture({
    lookup(caller, parent, name, reply) {
      asked = [caller.tid, caller.uid, caller.gid, parent, name]
      t.equal(reply.entry(ENTRY), true)
    },
  })
  const payload = cat(u64(0xd000n, 0x700n), u64(0n, 0n), u32(0, 1), attrBytes(ATTR))
  t.equal(payload.length, 128)
  t.equal(ENTRY_OUT_SIZE, 128)
  t.strictSame(shown(ask(Opcode.LOOKUP, cstring('13p1'))), success(payload))
  t.strictSame(asked, [CALLER.tid, CALLER.uid, CALLER.gid, ROOT, '13p1'])
})

t.test('names are bytes', async (t) => {
  const names: string[] = []
  const { ask } = fixture({
    lookup(_, __, name, reply) {
      names.push(name)
      reply.error(E.ENOENT)
    },
  })
  const all = Buffer.from(Array.from({ length: 255 }, (_, i) => i + 1)).toString('latin1')
  for (const name of ['', '1', all, 'x'.repeat(1024)]) t.strictSame(shown(ask(Opcode.LOOKUP, cstring(name))), failure(E.ENOENT))
  t.strictSame(names, ['', '1', all, 'x'.repeat(1024)])
  ask(Opcode.LOOKUP, Buffer.from('13\0x1\0'))
  t.equal(names.at(-1), '13', 'they end at their NUL')
})

t.test('GETATTR is answered with fuse_attr_out', async (t) => {
  const { ask } = fixture({ getattr: (_, __, reply) => reply.attr(ATTR, { seconds: 3600, nanoseconds: 5 }) })
  const payload = cat(u64(3600n), u32(5, 0), attrBytes(ATTR))
  t.equal(payload.length, ATTR_OUT_SIZE)
  t.strictSame(shown(ask(Opcode.GETATTR, Buffer.alloc(16))), success(payload))
})

t.test('SETATTR passes on what is to be changed, and nothing else', async (t) => {
  let change: unknown
  const { ask } = fixture({
    setattr(_, __, wanted, reply) {
      change = wanted
      reply.attr(ATTR, { seconds: 0, nanoseconds: 0 })
    },
  })
  const body = (valid: number) => {
    const bytes = Buffer.alloc(88)
    bytes.writeUInt32LE(valid, 0)
    bytes.writeBigUInt64LE(99n, 16)
    bytes.writeBigInt64LE(-5n, 32)
    bytes.writeBigInt64LE(1700000002n, 40)
    bytes.writeUInt32LE(11, 56)
    bytes.writeUInt32LE(22, 60)
    bytes.writeUInt32LE(0o100640, 68)
    bytes.writeUInt32LE(1001, 76)
    bytes.writeUInt32LE(0xfffffffe, 80)
    return bytes
  }
  const cases: [number, unknown][] = [
    [0, {}],
    [1 << 0, { mode: 0o100640 }],
    [1 << 1, { uid: 1001 }],
    [1 << 2, { gid: 0xfffffffe }],
    [1 << 3, { size: true }],
    [1 << 4, { atime: [-5, 11] }],
    [1 << 5, { mtime: [1700000002, 22] }],
    [(1 << 4) | (1 << 7), { atime: 'now' }],
    [(1 << 5) | (1 << 8), { mtime: 'now' }],
    [(1 << 7) | (1 << 8), {}],
    [(1 << 0) | (1 << 4) | (1 << 5) | (1 << 8) | (1 << 6) | (1 << 10), { mode: 0o100640, atime: [-5, 11], mtime: 'now' }],
  ]
  for (const [valid, expected] of cases) {
    t.match(shown(ask(Opcode.SETATTR, body(valid))), [{ length: OUT_HEADER_SIZE + ATTR_OUT_SIZE, error: 0 }])
    t.strictSame(change, expected, `valid ${valid}`)
  }
})

t.test('OPENDIR, RELEASEDIR, FSYNCDIR, READLINK, DESTROY', async (t) => {
  const asked: unknown[] = []
  const { ask } = fixture({
    opendir: (_, reply) => void reply.open(0x123456789abn),
    readlink({ tid, uid, gid }, nodeid, reply) {
      asked.push([tid, uid, gid, nodeid])
      reply.data(Buffer.from('13p1'))
    },
  })
  t.strictSame(shown(ask(Opcode.OPENDIR, u32(0, 0))), success(cat(u64(0x123456789abn), u32(0, 0))))
  t.strictSame(shown(ask(Opcode.RELEASEDIR, cat(u64(0x123456789abn), u32(0, 0), u64(0n)))), success(Buffer.alloc(0)))
  t.strictSame(shown(ask(Opcode.FSYNCDIR, Buffer.alloc(16))), success(Buffer.alloc(0)))
  t.strictSame(shown(ask(Opcode.READLINK, Buffer.alloc(0), { nodeid: 0xd801n })), success(Buffer.from('13p1')))
  t.strictSame(asked, [[CALLER.tid, CALLER.uid, CALLER.gid, 0xd801n]], 'the caller of READLINK is known, as it may wait there')
  t.strictSame(shown(ask(Opcode.DESTROY)), success(Buffer.alloc(0)))
})

t.test('STATFS is answered with fuse_kstatfs, and has nothing of an earlier answer in it', async (t) => {
  const { ask } = fixture({
    statfs: (reply) => reply.statfs(255),
    readlink: (_, __, reply) => reply.data(Buffer.alloc(200, 0xff)),
  })
  ask(Opcode.READLINK)
  const payload = cat(u64(0n, 0n, 0n, 0n, 0n), u32(4096, 255, 4096, 0), u32(0, 0, 0, 0, 0, 0))
  t.equal(payload.length, 80)
  t.strictSame(shown(ask(Opcode.STATFS)), success(payload))
  ask(Opcode.READLINK)
  t.equal(
    shown(ask(Opcode.INIT, init(7, 38)))[0]
      ?.payload.subarray(28)
      .every((byte) => byte === 0),
    true,
    'nor has INIT',
  )
})

t.test('xattrs', async (t) => {
  const asked: unknown[] = []
  const { ask } = fixture({
    getxattr(caller, nodeid, name, size, reply) {
      asked.push([caller.tid, caller.uid, nodeid, name, size])
      if (size === 0) reply.xattrSize(300)
      else reply.data(Buffer.from('value'))
    },
    listxattr(caller, nodeid, size, reply) {
      asked.push([caller.tid, caller.uid, nodeid, size])
      reply.xattrSize(0)
    },
    setxattr(caller, nodeid, name, value, flags, reply) {
      asked.push([caller.uid, nodeid, name, Buffer.from(value).toString('latin1'), flags])
      reply.ok()
    },
    removexattr(caller, nodeid, name, reply) {
      asked.push([caller.uid, nodeid, name])
      reply.error(E.ENODATA)
    },
  })
  t.strictSame(shown(ask(Opcode.GETXATTR, cat(u32(0, 0), cstring('user.a')))), success(u32(300, 0)))
  t.strictSame(shown(ask(Opcode.GETXATTR, cat(u32(64, 0), cstring('user.a')))), success(Buffer.from('value')))
  t.strictSame(shown(ask(Opcode.LISTXATTR, u32(0, 0))), success(u32(0, 0)))
  t.strictSame(shown(ask(Opcode.SETXATTR, cat(u32(4, 2), cstring('user.b'), Buffer.from('a\0b\xff', 'latin1')))), success(Buffer.alloc(0)))
  t.strictSame(shown(ask(Opcode.SETXATTR, cat(u32(0, 0), cstring('user.b')))), success(Buffer.alloc(0)))
  t.strictSame(shown(ask(Opcode.REMOVEXATTR, cstring('user.b'))), failure(E.ENODATA))
  t.strictSame(asked, [
    [CALLER.tid, CALLER.uid, ROOT, 'user.a', 0],
    [CALLER.tid, CALLER.uid, ROOT, 'user.a', 64],
    [CALLER.tid, CALLER.uid, ROOT, 0],
    [CALLER.uid, ROOT, 'user.b', 'a\0b\xff', 2],
    [CALLER.uid, ROOT, 'user.b', '', 0],
    [CALLER.uid, ROOT, 'user.b'],
  ])
})

t.test('the largest xattr fits, both ways', async (t) => {
  let got = 0
  const { ask } = fixture({
    setxattr(_, __, ___, value, ____, reply) {
      got = value.length
      reply.ok()
    },
    getxattr: (_, __, ___, ____, reply) => reply.data(new Uint8Array(65536)),
  })
  t.match(ask(Opcode.SETXATTR, cat(u32(65536, 0), cstring('user.x'.padEnd(255, 'y')), Buffer.alloc(65536))), [{ error: 0 }])
  t.equal(got, 65536)
  t.match(ask(Opcode.GETXATTR, cat(u32(65536, 0), cstring('user.x'))), [{ error: 0, length: 65536 + OUT_HEADER_SIZE }])
})

t.test('INIT: a known protocol is agreed to', async (t) => {
  const { ask, started } = fixture()
  const [answer] = ask(Opcode.INIT, init(7, 38))
  t.equal(answer?.error, 0)
  const payload = answer?.payload as Buffer
  t.equal(payload.length, 64)
  t.strictSame([payload.readUInt32LE(0), payload.readUInt32LE(4)], [7, 38])
  t.equal(payload.readUInt32LE(12), (1 << 18) | (1 << 20), 'parallel lookups and ACLs, and nothing that was not offered')
  t.ok(payload.readUInt32LE(20) >= 4096, 'max_write')
  t.equal(payload.readUInt32LE(24), 1, 'times to the nanosecond')
  await started
  t.pass('the session has started')
})

t.test('INIT: a newer kernel with the same major protocol is agreed to, too', async (t) => {
  const { ask, started } = fixture()
  t.match(ask(Opcode.INIT, cat(init(7, 99), Buffer.alloc(256))), [{ error: 0 }])
  await started
  t.pass('started')
  const oldest = fixture()
  t.match(oldest.ask(Opcode.INIT, init(7, 23).subarray(0, 16)), [{ error: 0 }], 'so is the oldest supported one')
  await oldest.started
})

t.test('INIT: a protocol that is too old, or lacks what is needed, is refused', async (t) => {
  const needed = (1 << 18) | (1 << 20)
  for (const [major, minor, flags] of [
    [7, 22, needed],
    [6, 99, needed],
    [7, 38, 1 << 18],
    [7, 38, 1 << 20],
    [7, 38, 0],
  ] as const) {
    const { ask, started } = fixture()
    t.strictSame(shown(ask(Opcode.INIT, init(major, minor, flags))), failure(E.EPROTO), `${major}.${minor} ${flags}`)
    await t.rejects(started, { message: new RegExp(`protocol ${major}\\.${minor} is too old`) })
  }
})

t.test('INIT: a kernel with a newer major is told which one to use, and asks again', async (t) => {
  const { ask, started } = fixture()
  const [answer] = ask(Opcode.INIT, init(8, 1))
  t.equal(answer?.error, 0)
  t.equal(answer?.payload.readUInt32LE(0), 7)
  let ready = false
  void started.then(() => (ready = true))
  await new Promise(setImmediate)
  t.equal(ready, false, 'it has not started yet')
  t.match(ask(Opcode.INIT, init(7, 31)), [{ error: 0 }])
  await started
})

t.test('lookups that are forgotten are counted, and not answered', async (t) => {
  const forgotten: [bigint, bigint][] = []
  const { ask, answers } = fixture({ forget: (nodeid, count) => void forgotten.push([nodeid, count]) })
  ask(Opcode.FORGET, u64(3n), { nodeid: 0xd000n })
  ask(Opcode.BATCH_FORGET, cat(u32(2, 0), u64(0xe000n, 1n, 2n ** 63n, 2n ** 64n - 1n)))
  ask(Opcode.BATCH_FORGET, u32(0, 0))
  t.strictSame(forgotten, [
    [0xd000n, 3n],
    [0xe000n, 1n],
    [2n ** 63n, 2n ** 64n - 1n],
  ])
  t.strictSame(answers, [])
})

t.test('a request without a whole header is dropped', async (t) => {
  const { send, answers, errors } = fixture()
  const whole = request(Opcode.LOOKUP, cstring('1'), { unique: 5n, nodeid: ROOT })
  for (let length = 0; length < HEADER_SIZE; length++) send(whole.subarray(0, length))
  t.strictSame(answers, [])
  t.equal(errors.length, HEADER_SIZE)
})

const BODIES: Record<string, Buffer> = {
  LOOKUP: cstring('13'),
  SETATTR: Buffer.alloc(88),
  SETXATTR: cat(u32(1, 0), cstring('n'), Buffer.from('v')),
  GETXATTR: cat(u32(0, 0), cstring('n')),
  LISTXATTR: u32(0, 0),
  REMOVEXATTR: cstring('n'),
  INIT: init(7, 38).subarray(0, 16),
  READDIR: readIn(1n, 0n, 4096).subarray(0, 24),
  RELEASEDIR: u64(1n),
}

t.test('a body shorter than its request needs is EIO, and reaches no handler', async (t) => {
  let reached = 0
  const counting = new Proxy({} as TreeOperations, { get: () => () => void reached++ })
  const { ask, errors } = fixture(bound(counting))
  let asked = 0
  for (const [name, body] of Object.entries(BODIES)) {
    const opcode = Opcode[name as keyof typeof Opcode]
    for (let length = 0; length < body.length; length++) {
      asked++
      const answers = ask(opcode, body.subarray(0, length))
      if (answers.length !== 1 || answers[0]?.error !== E.EIO) t.fail(`${name} of ${length} bytes`)
    }
  }
  t.equal(reached, 0)
  t.equal(errors.length, asked, 'each is reported')
  t.ok(asked > 150)
})

t.test('so is a request whose header has another length, and a string without an end', async (t) => {
  let reached = 0
  const counting = new Proxy({} as TreeOperations, { get: () => () => void reached++ })
  const { ask } = fixture(bound(counting))
  for (const length of [0, 1, 40, 42, 44, 1000, 0xffffffff]) {
    t.strictSame(shown(ask(Opcode.LOOKUP, cstring('13'), { length })), failure(E.EIO), `header says ${length}`)
  }
  t.strictSame(shown(ask(Opcode.LOOKUP, Buffer.from('13'))), failure(E.EIO), 'LOOKUP')
  t.strictSame(shown(ask(Opcode.REMOVEXATTR, Buffer.from('user.a'))), failure(E.EIO), 'REMOVEXATTR')
  t.strictSame(shown(ask(Opcode.GETXATTR, cat(u32(0, 0), Buffer.from('user.a')))), failure(E.EIO), 'GETXATTR')
  t.strictSame(shown(ask(Opcode.GETXATTR, u32(0, 0))), failure(E.EIO), 'GETXATTR without a name')
  t.strictSame(shown(ask(Opcode.SETXATTR, cat(u32(0, 0), Buffer.from('user.a')))), failure(E.EIO), 'SETXATTR')
  t.equal(reached, 0)
})

t.test('a string does not continue into the rest of an earlier request', async (t) => {
  const { reads, state, answers } = fixture({ lookup: (_, __, ___, reply) => reply.error(E.ENOENT) })
  reads.push(
    request(Opcode.LOOKUP, cat(Buffer.alloc(100, 'x'), cstring('')), { unique: 2n, nodeid: ROOT }),
    request(Opcode.LOOKUP, Buffer.from('13'), { unique: 4n, nodeid: ROOT }),
  )
  state.ready()
  t.match(answers, [
    { unique: 2n, error: E.ENOENT },
    { unique: 4n, error: E.EIO },
  ])
})

t.test('a SETXATTR whose value goes beyond the request is EIO', async (t) => {
  const { ask } = fixture({ setxattr: (...args) => args[5].ok() })
  const body = (size: number) => cat(u32(size, 0), cstring('user.a'), Buffer.from('abcd'))
  t.match(ask(Opcode.SETXATTR, body(4)), [{ error: 0 }])
  for (const size of [5, 6, 65536, 0x7fffffff, 0x80000000, 0xffffffff]) {
    t.strictSame(shown(ask(Opcode.SETXATTR, body(size))), failure(E.EIO), `${size}`)
  }
})

t.test('a request that comes a moment later is answered before the event loop sleeps, but not for ever', async (t) => {
  // A clock of the test's own: on a busy machine any look at the real one may come late.
  const { now } = performance
  let ms = now.call(performance)
  performance.now = () => (ms += 0.005)
  t.teardown(() => (performance.now = now))
  const { state, reads, soon, answers } = fixture({ statfs: (reply) => reply.ok() })
  const ask = () => request(Opcode.STATFS, Buffer.alloc(0), { unique: BigInt(2 * ++count), nodeid: ROOT, uid: 60001 })
  let count = 0
  reads.push(ask())
  soon.push(ask(), -E.EINTR, ask(), -E.EAGAIN, ask())
  state.ready()
  t.strictSame(
    answers.map(({ unique }) => unique),
    [2n, 4n, 6n],
    'one after another, until nothing comes',
  )
  t.equal(soon.length, 1)
  soon.push(...Array.from({ length: 1000 }, ask))
  state.ready()
  t.ok(soon.length > 900, 'then other work gets its turn')
})

t.test('a BATCH_FORGET that counts more than it holds forgets nothing', async (t) => {
  let forgotten = 0
  const { ask, answers, errors } = fixture({ forget: () => void forgotten++ })
  for (const count of [3, 4, 1000, 0x10000000, 0x10000001, 0x7fffffff, 0xffffffff]) {
    ask(Opcode.BATCH_FORGET, cat(u32(count, 0), u64(1n, 1n, 2n, 1n)))
  }
  ask(Opcode.BATCH_FORGET, u32(1))
  ask(Opcode.FORGET, u32(1))
  ask(Opcode.FORGET, u64(1n), { length: 1000 })
  t.equal(forgotten, 0)
  t.strictSame(answers, [], 'it is not answered')
  t.equal(errors.length, 10)
})

t.test('a request that would change the shape of the tree is EPERM', async (t) => {
  const { ask, errors } = fixture()
  const { SYMLINK, MKNOD, MKDIR, RMDIR, RENAME, RENAME2, LINK, CREATE, TMPFILE } = Opcode
  for (const opcode of [SYMLINK, MKNOD, MKDIR, RMDIR, RENAME, RENAME2, LINK, CREATE, TMPFILE]) {
    t.strictSame(shown(ask(opcode, Buffer.alloc(200))), failure(E.EPERM), `${opcode}`)
    t.strictSame(shown(ask(opcode)), failure(E.EPERM), `${opcode} without a body`)
  }
  t.strictSame(errors, [])
})

t.test('an unknown request is ENOSYS', async (t) => {
  const { ask, errors } = fixture()
  const known: ReadonlySet<number> = new Set(Object.values(Opcode))
  for (let opcode = 0; opcode < 70; opcode++) {
    if (!known.has(opcode)) t.strictSame(shown(ask(opcode, Buffer.alloc(64))), failure(E.ENOSYS), `${opcode}`)
  }
  for (const opcode of [4096, 0x7fffffff, 0xffffffff, 1 << 20]) {
    t.strictSame(shown(ask(opcode, Buffer.alloc(64))), failure(E.ENOSYS), `${opcode}`)
  }
  t.strictSame(errors, [])
})

t.test('a handler that throws is EIO, and reported', async (t) => {
  const boom = () => {
    throw new Error('boom')
  }
  const { ask, errors, answers } = fixture({
    lookup: boom,
    forget: boom,
    getattr(_, __, reply) {
      reply.error(E.ENXIO)
      boom()
    },
    readlink: (_, __, reply) => reply.data(new Uint8Array(PAYLOAD_MAX + 1)),
    opendir(_, reply) {
      reply.open(1n)
      reply.open(2n)
    },
  })
  t.strictSame(shown(ask(Opcode.LOOKUP, cstring('1'))), failure(E.EIO))
  t.strictSame(shown(ask(Opcode.GETATTR, Buffer.alloc(16))), failure(E.ENXIO), 'not if it had answered')
  t.strictSame(shown(ask(Opcode.READLINK)), failure(E.EIO), 'an answer that is too large')
  t.strictSame(shown(ask(Opcode.OPENDIR, u32(0, 0))), success(cat(u64(1n), u32(0, 0))), 'answered twice')
  t.equal(errors.length, 4)
  const before = answers.length
  ask(Opcode.FORGET, u64(1n))
  t.equal(answers.length, before, 'a request that expects no answer gets none')
  t.equal(errors.length, 5)
})

t.test('an INTERRUPT reaches the request that it is for, once', async (t) => {
  const replies: Reply[] = []
  const interrupted: number[] = []
  const { ask, answers, errors, last } = fixture({
    lookup(_, __, ___, reply) {
      const index = replies.push(reply) - 1
      reply.onInterrupt(() => interrupted.push(index))
    },
  })
  ask(Opcode.LOOKUP, cstring('1'))
  const first = last()
  ask(Opcode.LOOKUP, cstring('2'))
  const second = last()
  ask(Opcode.INTERRUPT, u64(second))
  t.strictSame(interrupted, [1])
  ask(Opcode.INTERRUPT, u64(second))
  t.strictSame(interrupted, [1], 'not twice')
  ask(Opcode.INTERRUPT, u64(123456n))
  t.strictSame(interrupted, [1], 'not for a request that never came')
  replies[0]?.error(E.ENOENT)
  ask(Opcode.INTERRUPT, u64(first))
  t.strictSame(interrupted, [1], 'not for a request that is answered')
  replies[1]?.error(E.EINTR)
  t.match(answers, [
    { unique: first, error: E.ENOENT },
    { unique: second, error: E.EINTR },
  ])
  t.equal(answers.length, 2, 'the INTERRUPT itself is not answered')
  t.strictSame(errors, [])
})

t.test('an INTERRUPT that comes before its handler listens is not lost', async (t) => {
  let pending: Reply | undefined
  const { ask, last } = fixture({ lookup: (_, __, ___, reply) => void (pending = reply) })
  ask(Opcode.LOOKUP, cstring('1'))
  ask(Opcode.INTERRUPT, u64(last()))
  let interrupted = 0
  pending?.onInterrupt(() => interrupted++)
  t.equal(interrupted, 1)
})

t.test('the session knows which answers were not taken', async (t) => {
  const taken: boolean[] = []
  const { ask, state, errors } = fixture({ lookup: (_, __, ___, reply) => void taken.push(reply.entry(ENTRY)) })
  for (const result of [undefined, -E.ENOENT, -E.ENODEV, -E.EINVAL]) {
    state.writeResult = result
    ask(Opcode.LOOKUP, cstring('1'))
  }
  t.strictSame(taken, [true, false, false, false])
  t.equal(errors.length, 1, 'only an answer that the kernel refuses is reported')
})

t.test('an answer after the end is not taken', async (t) => {
  let pending: Reply | undefined
  const { ask, session, answers, state } = fixture({ lookup: (_, __, ___, reply) => void (pending = reply) })
  ask(Opcode.LOOKUP, cstring('1'))
  session.close()
  t.equal(pending?.entry(ENTRY), false)
  t.strictSame(answers, [])
  session.close()
  t.strictSame(state.closed, [FD], 'the descriptor is closed once')
  t.equal(state.polls, 0)
})

t.test('reading goes on after a signal and a request that was withdrawn, and stops when there is nothing', async (t) => {
  const { reads, state, answers } = fixture({ getattr: (_, __, reply) => reply.error(E.ESTALE) })
  const getattr = (unique: bigint) => request(Opcode.GETATTR, Buffer.alloc(16), { unique, nodeid: 5n, uid: 0 })
  reads.push(-E.EINTR, getattr(2n), -E.ENOENT, getattr(4n), -E.EAGAIN, getattr(6n))
  state.ready()
  t.match(
    answers.map(({ unique }) => unique),
    [2n, 4n],
  )
  state.ready()
  t.equal(answers.length, 3)
})

t.test('a flood of requests leaves turns to other work', async (t) => {
  const { reads, state, answers } = fixture({ getattr: (_, __, reply) => reply.error(E.ESTALE) })
  for (let i = 0; i < 1000; i++) reads.push(request(Opcode.GETATTR, Buffer.alloc(16), { unique: BigInt(2 * i), nodeid: 5n, uid: 0 }))
  state.ready()
  t.ok(answers.length > 0 && answers.length < 200, `${answers.length} in a turn`)
})

t.test('an unmount ends the session quietly; any other error ends it with a message', async (t) => {
  const quiet = fixture()
  quiet.reads.push(-E.ENODEV)
  quiet.state.ready()
  await quiet.session.ended
  await t.rejects(quiet.started, /closed before it was ready/)
  t.strictSame(quiet.errors, [])
  t.strictSame(quiet.state.closed, [FD])
  const loud = fixture()
  loud.reads.push(-E.EIO)
  loud.state.ready()
  await loud.session.ended
  t.equal(loud.errors.length, 1)
})

/** A tree behind a session, over a registry of the test's own. */
function treeFixture(devices: Device[]) {
  const registry = {
    devices: () => devices,
    find: () => undefined,
    lacks: () => true,
    findSlowly: (_: string, __: bigint, done: (found: number) => void) => done(0),
    size: devices.length,
  } as unknown as Registry
  const crowd = { there: false, waiting: [] as (() => void)[] }
  const tree = new Tree({
    registry,
    sysfs: {} as Sysfs,
    inodes: new InodeTable(),
    devnodes: {} as DeviceNodes,
    gate: { lookupOther() {} } as unknown as Gate,
    crowd: Object.assign(crowd, {
      isIn: () => crowd.there,
      admit: (_: unknown, __: bigint, enter: () => void) => (crowd.there ? crowd.waiting.push(enter) : enter()),
    }) as unknown as Crowd,
    lifetime: {} as PinLifetime,
    intents: {} as Intents,
    whenReady: (_, ready) => ready(),
    takesOver: false,
  })
  return { ...fixture(bound(tree)), crowd }
}

const seq = (value: number) => BigInt(value) as DiskSeq

const device = (diskseq: number, partition: number, minor = partition) =>
  ({ diskseq: seq(diskseq), partition, minor, name: partition === 0 ? `${diskseq}` : `${diskseq}p${partition}` }) as unknown as Device

/** The id of an entry that exists. */
const idOf = ({ diskseq, partition, minor }: Device) => inodeId(diskseq, partition, minor) as bigint

t.test('READDIR gives each entry once, in pages of whole entries', async (t) => {
  const devices = Array.from({ length: 300 }, (_, i) => device(1 + (i >> 1), i & 1))
  const expected: Dirent[] = [
    { ino: ROOT, cookie: 1n, mode: 0o040000, name: '.' },
    { ino: ROOT, cookie: 2n, mode: 0o040000, name: '..' },
  ]
  for (const each of devices) {
    const { diskseq, partition, name } = each
    const cookie = entryCookie(diskseq, partition)
    expected.push({ ino: idOf(each), cookie, mode: 0o060000, name })
    if (partition === 0) continue
    const ino = linkId(diskseq, partition, 'part') as bigint
    expected.push({ ino, cookie: cookie + 1n, mode: 0o120000, name: `${diskseq}-part${partition}` })
  }
  const { bytes } = encodeDirents(expected)
  for (const size of [48, 64, 100, 1000, 4096, 65536, PAYLOAD_MAX, 0xffffffff]) {
    const { ask } = treeFixture(devices)
    const handle = ask(Opcode.OPENDIR, u32(0, 0))[0]?.payload.readBigUInt64LE(0) as bigint
    const pages: Buffer[] = []
    let offset = 0n
    for (;;) {
      const [page] = ask(Opcode.READDIR, readIn(handle, offset, size))
      if (page === undefined || page.error !== 0 || page.payload.length > size) t.fail(`a page at ${offset}`)
      const payload = page?.payload ?? Buffer.alloc(0)
      if (payload.length === 0 || pages.length > expected.length) break
      pages.push(payload)
      // Goes on where the last entry of the page says, as getdents(2) does.
      for (let at = 0; at < payload.length; at += (24 + payload.readUInt32LE(at + 16) + 7) & ~7) {
        offset = payload.readBigUInt64LE(at + 8)
      }
    }
    t.ok(cat(...pages).equals(bytes), `pages of ${size}: ${pages.length}`)
  }
})

t.test('a directory that is open many times takes the memory of one', async (t) => {
  const { ask } = treeFixture(Array.from({ length: 2000 }, (_, i) => device(1 + i, 0)))
  const used = () => process.memoryUsage().heapUsed + process.memoryUsage().arrayBuffers
  const before = used()
  for (let i = 0; i < 1000; i++) ask(Opcode.OPENDIR, u32(0, 0))
  const mib = (used() - before) / 1048576
  t.ok(mib < 50, `${mib.toFixed(0)} MiB for a thousand times two thousand names`)
})

function direntNames(payload: Buffer): string[] {
  const found: string[] = []
  for (let at = 0; at < payload.length;) {
    const length = payload.readUInt32LE(at + 16)
    found.push(payload.toString('latin1', at + 24, at + 24 + length))
    at += (24 + length + 7) & ~7
  }
  return found
}

t.test('a directory that was opened with an earlier daemon can be read on with the next', async (t) => {
  const before = treeFixture([device(1, 0), device(3, 0), device(5, 0), device(7, 0)])
  const handle = before.ask(Opcode.OPENDIR, u32(0, 0))[0]?.payload.readBigUInt64LE(0) as bigint
  const page = before.ask(Opcode.READDIR, readIn(handle, 0n, 4 * 32))[0]?.payload as Buffer
  t.strictSame(direntNames(page), ['.', '..', '1', '3'])
  const cookie = page.readBigUInt64LE(3 * 32 + 8)
  // The last entry that was read has gone since; one before it and one behind it are new.
  const after = treeFixture([device(1, 0), device(2, 0), device(5, 0), device(6, 0), device(7, 0)])
  const rest = after.ask(Opcode.READDIR, readIn(handle, cookie, 4096))[0]?.payload as Buffer
  t.strictSame(direntNames(rest), ['5', '6', '7'])
})

t.test('nothing is remembered about open directories', async (t) => {
  const { ask } = treeFixture([device(1, 0), device(2, 0)])
  const opened = [1, 2, 3].map(() => ask(Opcode.OPENDIR, u32(0, 0))[0]?.payload.readBigUInt64LE(0))
  t.strictSame(opened, [0n, 0n, 0n], 'all have the same handle')
  const names = (handle: bigint, offset: bigint) => direntNames(ask(Opcode.READDIR, readIn(handle, offset, 4096))[0]?.payload as Buffer)
  for (const handle of [0n, 1n, 0x123456789abn, 2n ** 64n - 1n]) {
    t.strictSame(names(handle, 2n), ['1', '2'], `with ${handle}`)
    ask(Opcode.RELEASEDIR, cat(u64(handle), u64(0n, 0n)))
  }
  t.strictSame(names(0n, 0n), ['.', '..', '1', '2'], 'it does not matter which one was closed')
})

t.test('READDIR from anywhere goes on from there, and past the end there is nothing', async (t) => {
  const { ask } = treeFixture([device(1, 0), device(1, 1)])
  const handle = ask(Opcode.OPENDIR, u32(0, 0))[0]?.payload.readBigUInt64LE(0) as bigint
  const names = (offset: bigint) => {
    return direntNames(ask(Opcode.READDIR, readIn(handle, offset, 4096))[0]?.payload as Buffer)
  }
  t.strictSame(names(0n), ['.', '..', '1', '1p1', '1-part1'])
  t.strictSame(names(1n << 12n), ['1p1', '1-part1'])
  for (const offset of [(1n << 12n) | 3n, 2n << 12n, 2n ** 31n, 2n ** 63n, 2n ** 64n - 1n]) t.strictSame(names(offset), [], `${offset}`)
  t.match(ask(Opcode.READDIR, readIn(handle, 0n, 0)), [{ error: 0, length: OUT_HEADER_SIZE }], 'no room')
  ask(Opcode.RELEASEDIR, cat(u64(handle), u64(0n, 0n)))
})

t.test('a listing goes on behind its last entry, whichever disks have come and gone', async (t) => {
  const devices = [1, 3, 5, 7, 9].map((diskseq) => device(diskseq, 0))
  const { ask } = treeFixture(devices)
  const read = (offset: bigint, entries: number) => {
    const payload = ask(Opcode.READDIR, readIn(0n, offset, entries * 32))[0]?.payload as Buffer
    return { names: direntNames(payload), next: payload.readBigUInt64LE(payload.length - 32 + 8) }
  }
  const first = read(0n, 4)
  t.strictSame(first.names, ['.', '..', '1', '3'])
  devices.splice(1, 1) // the last one read
  devices.splice(1, 0, device(2, 0)) // and one before it
  const second = read(first.next, 2)
  t.strictSame(second.names, ['5', '7'])
  devices.push(device(11, 0))
  t.strictSame(read(second.next, 10).names, ['9', '11'], 'none comes twice, and none is left out that was there all along')
})

t.test('a node id that was never given out has an errno for everything', async (t) => {
  const { ask, errors } = treeFixture([device(1, 0)])
  const partition = inodeId(seq(13), 1, 5) as bigint
  for (const nodeid of [0n, 2n, 0xd000n, 0xd001n, 0xd002n, partition, 2n ** 63n, 2n ** 64n - 1n]) {
    const on = { nodeid }
    t.match(ask(Opcode.GETATTR, Buffer.alloc(16), on), [{ error: E.ESTALE }])
    t.match(ask(Opcode.SETATTR, Buffer.alloc(88), on), [{ error: E.EPERM }])
    t.match(ask(Opcode.LOOKUP, cstring('1'), on), [{ error: E.ENOENT }])
    t.match(ask(Opcode.READLINK, Buffer.alloc(0), on), [{ error: E.EINVAL }])
    t.match(ask(Opcode.OPENDIR, u32(0, 0), on), [{ error: E.ENOTDIR }])
    t.match(ask(Opcode.GETXATTR, cat(u32(0, 0), cstring('user.a')), on), [{ error: E.ENODATA }])
    t.match(ask(Opcode.SETXATTR, cat(u32(0, 0), cstring('user.a')), on), [{ error: E.EOPNOTSUPP }])
    t.match(ask(Opcode.REMOVEXATTR, cstring('user.a'), on), [{ error: E.EOPNOTSUPP }])
    t.strictSame(ask(Opcode.FORGET, u64(1n), on), [])
  }
  t.strictSame(errors, [])
})

t.test('the root is a directory that only root may read and any user may walk through; its attributes stay valid', async (t) => {
  const { ask } = treeFixture([])
  const [answer] = ask(Opcode.GETATTR, Buffer.alloc(16))
  t.equal(answer?.error, 0)
  t.ok((answer?.payload.readBigUInt64LE(0) as bigint) >= 60n, 'otherwise each path walk would ask')
  t.equal(answer?.payload.readBigUInt64LE(16), ROOT)
  // A reader holds the directory's lock for as long as it takes to write to the reader's memory.
  t.equal(answer?.payload.readUInt32LE(16 + 60), 0o041711)
})

t.test('in a crowd only callers that were let in get the attributes of the root', async (t) => {
  const { ask, crowd, answers } = treeFixture([])
  crowd.there = true
  t.strictSame(ask(Opcode.GETATTR, Buffer.alloc(16)), [], 'it waits')
  crowd.waiting.shift()?.()
  t.equal(answers.length, 1)
  const payload = answers[0]?.payload as Buffer
  t.strictSame([payload.readBigUInt64LE(0), payload.readUInt32LE(8)], [0n, 0], 'the next caller has to ask, too')
})

t.test('a symlink is known by its id, even if the id was never given out', async (t) => {
  const { ask } = treeFixture([])
  const nodeid = linkId(seq(13), 1, 'part') as bigint
  t.strictSame(shown(ask(Opcode.READLINK, Buffer.alloc(0), { nodeid })), success(Buffer.from('13p1')))
  const [answer] = ask(Opcode.GETATTR, Buffer.alloc(16), { nodeid })
  t.equal(answer?.payload.readBigUInt64LE(16), nodeid)
  t.equal(answer?.payload.readBigUInt64LE(24), 4n, 'as long as its target')
  t.equal(answer?.payload.readUInt32LE(16 + 60), 0o120777)
  t.match(
    ask(Opcode.READLINK, Buffer.alloc(0), { nodeid: linkId(seq(13), 1, 'unknown') as bigint }),
    [{ error: E.EINVAL }],
    'an id that looks like a device is no symlink',
  )
})

/** A notice with these bytes: a message that answers no request. */
const notice = (code: number, body: Buffer) => ({ length: OUT_HEADER_SIZE + body.length, error: -code, unique: 0n, payload: body })

t.test('attributes are invalidated by FUSE_NOTIFY_INVAL_INODE, which shows whether there is such an inode', async (t) => {
  const { session, answers, state } = fixture()
  t.equal(session.invalidate(0x1122334455667788n), true)
  // struct fuse_notify_inval_inode_out: ino, off, len; a negative off means the attributes only.
  const minusOne = 2n ** 64n - 1n
  t.strictSame(answers, [notice(2, u64(0x1122334455667788n, minusOne, 0n))])
  state.writeResult = -E.ENOENT
  t.equal(session.invalidate(5n), false, 'there is no such inode')
  state.writeResult = -E.EIO
  t.equal(session.invalidate(5n), true, 'in doubt there is one')
  session.close()
  t.equal(session.invalidate(5n), false, 'after the end there is nothing')
  t.equal(answers.length, 3)
})

t.test('the kernel is told to forget an inode by FUSE_NOTIFY_PRUNE', async (t) => {
  const { session, answers, state } = fixture()
  t.equal(session.prune(0x1122334455667788n), true)
  // struct fuse_notify_prune_out: count, padding, spare; then the ids.
  t.strictSame(answers, [notice(9, cat(u32(1, 0), u64(0n, 0x1122334455667788n)))])
  state.writeResult = -E.ENOENT
  t.equal(session.prune(5n), true, 'an inode that the kernel does not have')
  t.equal(session.prune(6n), true)
  t.equal(answers.length, 3, 'it is asked each time')
  session.close()
  t.equal(session.prune(7n), false)
  t.equal(answers.length, 3)
})

t.test('a kernel that does not know this notice gets it only once', async (t) => {
  const { session, answers, state } = fixture()
  state.writeResult = -E.EINVAL
  t.equal(session.prune(5n), false)
  state.writeResult = undefined
  for (let i = 0; i < 10; i++) t.equal(session.prune(5n), false)
  t.equal(answers.length, 1)
  t.equal(session.invalidate(5n), true, 'that says nothing about attributes')
  t.equal(answers.length, 2)
})

t.test('a notice has nothing of the answer before it', async (t) => {
  const { ask, session, answers } = fixture({ readlink: (_, __, reply) => reply.data(Buffer.alloc(200, 0xff)) })
  ask(Opcode.READLINK)
  session.prune(5n)
  ask(Opcode.READLINK)
  session.invalidate(5n)
  t.strictSame(
    answers.filter(({ unique }) => unique === 0n),
    [notice(9, cat(u32(1, 0), u64(0n, 5n))), notice(2, u64(5n, 2n ** 64n - 1n, 0n))],
  )
})

t.test('each of 20,000 requests gets one answer, or none if it expects none', async (t) => {
  // mulberry32
  let seed = 20260101
  const random = () => {
    seed = (seed + 0x6d2b79f5) | 0
    let value = Math.imul(seed ^ (seed >>> 15), 1 | seed)
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value
    return ((value ^ (value >>> 14)) >>> 0) / 4294967296
  }
  const below = (n: number) => Math.floor(random() * n)
  const later: (() => void)[] = []
  let thrown = 0
  const give = (reply: Reply, name: string) => {
    switch (below(10)) {
      case 0:
        return reply.error(1 + below(130))
      case 1:
        return reply.ok()
      case 2:
        return void reply.entry(ENTRY)
      case 3:
        return reply.attr(ATTR, { seconds: 0, nanoseconds: 0 })
      case 4:
        return reply.data(new Uint8Array(below(5000)))
      case 5:
        return reply.statfs(255)
      case 6:
        return reply.open(1n)
      default:
        return reply.error(name === 'lookup' ? E.ENOENT : E.EOPNOTSUPP)
    }
  }
  const anything = Object.fromEntries(
    OPERATIONS.map((name) => [
      name,
      (...args: unknown[]) => {
        const reply = args.at(-1) as Reply
        const dice = below(20)
        if (dice === 0) {
          thrown++
          throw new Error('handler')
        }
        if (name === 'forget') return
        if (dice < 8) {
          if (dice < 4) reply.onInterrupt(() => {})
          later.push(() => give(reply, name))
          return
        }
        give(reply, name)
        if (dice === 19) {
          thrown++
          throw new Error('after its answer')
        }
      },
    ]),
  ) as unknown as TreeOperations
  const { send, answers } = fixture(anything)
  const opcodes = Object.values(Opcode)
  const bodies = Object.values(BODIES)
  const expected = new Map<bigint, number>()
  for (let i = 0; i < 20_000; i++) {
    const unique = BigInt(i) * 2n + (below(50) === 0 ? 1n << 63n : 0n)
    const opcode = below(8) === 0 ? below(2 ** 32) : (opcodes[below(opcodes.length)] as number)
    let body: Buffer
    switch (below(4)) {
      case 0:
        body = Buffer.from(bodies[below(bodies.length)] as Buffer)
        break
      case 1:
        body = Buffer.from(Array.from({ length: below(120) }, () => below(256)))
        break
      case 2:
        body = cat(u32(below(6), below(6)), u64(BigInt(below(i + 1)) * 2n, 1n, 2n, 3n), cstring('user.name'))
        break
      default:
        body = Buffer.alloc(below(200))
    }
    const length = below(20) === 0 ? below(300) : HEADER_SIZE + body.length
    expected.set(unique, UNANSWERED.has(opcode) ? 0 : 1)
    try {
      send(request(opcode, body, { unique, nodeid: BigInt(below(5)), length, tid: below(2) }))
    } catch (error) {
      t.fail(`request ${i}, opcode ${opcode}: ${String(error)}`)
    }
    while (later.length > 100 || (later.length > 0 && below(3) === 0)) later.splice(below(later.length), 1)[0]?.()
  }
  for (const answer of later) answer()
  const got = new Map<bigint, number>()
  let misshapen = 0
  for (const { unique, length, payload, error } of answers) {
    got.set(unique, (got.get(unique) ?? 0) + 1)
    if (length !== OUT_HEADER_SIZE + payload.length || error < 0 || (error > 0 && payload.length > 0)) misshapen++
  }
  const wrong = [...expected].filter(([unique, count]) => (got.get(unique) ?? 0) !== count)
  t.strictSame(wrong, [])
  t.equal(misshapen, 0)
  t.strictSame(
    [...got.keys()].filter((unique) => !expected.has(unique)),
    [],
    'nothing else is answered',
  )
  t.ok(thrown > 500, `${thrown} handlers threw`)
})

/** Daemons die, each `afterMs` after it took over. -> what becomes of a request that none of them answers */
async function deaths(t: Test, count: number, afterMs: number) {
  const memory = new ArrayBuffer(STATE_SIZE)
  const never = { lookup() {} }
  const first = fixture(never, memory)
  first.ask(Opcode.LOOKUP, cstring('13'))
  first.session.pause()
  for (let i = 0; i < count; i++) {
    const { session, answers } = fixture(never, memory)
    if (answers.length > 0) return { daemons: i, error: answers[0]?.error }
    await sleep(afterMs)
    session.pause()
  }
  t.equal(new SharedState(memory).unanswered().length, 1, 'the request is still there')
  return undefined
}

t.test('a request is refused if daemons die right after they read it, and not if they die some time later', async (t) => {
  t.strictSame(await deaths(t, 20, 0), { daemons: 5, error: E.EIO })
  t.equal(await deaths(t, 10, 100), undefined)
})

t.test('the wire log has each request, its answer and what the kernel is told', async (t) => {
  const traced: object[] = []
  let later: Reply | undefined
  const { ask, session, last } = fixture(
    { lookup: (_, __, name, reply) => (name === 'later' ? (later = reply) : reply.error(E.ENOENT)) },
    undefined,
    traced,
  )
  ask(Opcode.LOOKUP, Buffer.from('13\0'))
  const lookup = { unique: String(last()), nodeid: '1' }
  t.match(traced.splice(0), [
    { what: 'LOOKUP', ...lookup, name: '13', uid: Number, tid: Number },
    { what: 'answer', unique: lookup.unique, verdict: 'ENOENT', us: Number },
  ])
  ask(Opcode.LOOKUP, Buffer.from('later\0'))
  t.match(traced.splice(0), [{ what: 'LOOKUP', name: 'later' }])
  later?.ok()
  t.match(traced.splice(0), [{ what: 'answer', unique: String(last()), verdict: 'ok', us: Number }])
  session.invalidate(13n)
  t.match(traced.splice(0), [{ what: 'INVAL_INODE', nodeid: '13' }])
  ask(Opcode.LOOKUP, Buffer.from('a\n<0>\x1b[2J\\\xe9\0', 'latin1'))
  t.match(traced.splice(0), [{ name: 'a\\x0a<0>\\x1b[2J\\x5c\\xe9' }, { what: 'answer' }], 'a name cannot write a line of its own')
  ask(Opcode.FORGET, Buffer.alloc(8))
  t.match(traced.splice(0), [{ what: 'FORGET' }])
  ask(Opcode.LOOKUP, Buffer.from('no end'))
  t.match(traced.splice(0), [{ what: 'LOOKUP' }, { what: 'answer', verdict: 'EIO' }], 'also a malformed request')
})
