// SPDX-License-Identifier: MIT
/**
 * The daemon with one safety mechanism switched off. The tests that prove the mechanism must fail
 * against it. Never shipped.
 *
 *   node twin-daemon.mjs TWIN[+slow|+unseen] MOUNTPOINT [--open-timeout SECONDS] [--hold SECONDS] [--transport NAME] [--note-answers]
 *
 * On SIGUSR2 it logs how much it remembers, how often it has busy-polled for the next request, and,
 * with --note-answers, which users it has answered since the last time.
 *
 * With +slow each answer comes 30 ms after the disk was verified, as it may on a busy machine:
 * enough time for anything to happen in between. With +unseen it cannot see what its callers are
 * doing, as if they were in another pid namespace.
 */
import { spawnSync } from 'node:child_process'
import { existsSync, readFileSync, write } from 'node:fs'
import { parseArgs, promisify } from 'node:util'

import { Access } from '../../build/src/gate/access.js'
import { VarlinkServer } from '../../build/src/broker/varlink.js'
import { Beneath } from '../../build/src/daemon/beneath.js'
import { CloseWatch } from '../../build/src/gate/closes.js'
import { Crowd } from '../../build/src/gate/crowd.js'
import { Daemon } from '../../build/src/daemon/daemon.js'
import { Directories } from '../../build/src/daemon/directories.js'
import { HandOverSet } from '../../build/src/daemon/hand-over-set.js'
import { Preflight } from '../../build/src/daemon/preflight.js'
import { DeviceNodes } from '../../build/src/devices/device-node.js'
import { nodeName, parseId } from '../../build/src/devices/names.js'
import { FuseNativeTransport } from '../../build/src/fuse/libfuse.js'
import { Gate } from '../../build/src/gate/gate.js'
import { Guard } from '../../build/src/handover/guard-client.js'
import { Openings } from '../../build/src/gate/openings.js'
import { Intents, RUNNING, someCall, UNSEEN } from '../../build/src/gate/intent.js'
import { createLogger } from '../../build/src/util/log.js'
import { parseMountOptions } from '../../build/src/util/mountpoint.js'
import { native } from '../../build/src/native.js'
import { InodeTable } from '../../build/src/gate/inode.js'
import { BusyPoll } from '../../build/src/fuse/busy-poll.js'
import { PinOpener } from '../../build/src/gate/pin.js'
import { PinLifetime } from '../../build/src/gate/pin-lifetime.js'
import { Registry } from '../../build/src/devices/registry.js'
import { FuseSession } from '../../build/src/fuse/session.js'
import { Sysfs } from '../../build/src/devices/sysfs.js'
import { Tree } from '../../build/src/tree/tree.js'

/** Verifies as the real one does, and then holds something other than the device. */
class OtherPins extends PinOpener {
  constructor(calls, directory, hold) {
    super(calls, directory)
    this.hold = hold
  }
  openVerified(device, flags, nodes, done) {
    super.openVerified(device, flags, nodes, (result) => {
      if (!('pin' in result)) return done(result)
      this.hold(device, (fd) => {
        this.close(result.pin)
        this.count++
        done(fd < 0 ? { errno: -fd } : { pin: { fd, device } })
      })
    })
  }
  // Always taken to be current, held or not.
  current() {
    return true
  }
}

const inspectsEverything = { of: () => someCall('inspect') }
const opensEverything = { of: () => someCall('open') }
const withIntents = (answers) => (calls) => Object.assign(new Intents(calls), answers)

/** Each caller is seen running for some ms before it sleeps, as may happen on a busy machine. */
const sleepsLate = (call) => (calls) => {
  const intents = new Intents(calls)
  const since = new Map()
  return Object.assign(intents, {
    of(tid) {
      const now = performance.now()
      if (!since.has(tid)) since.set(tid, now)
      if (now - since.get(tid) < 5) return call
      since.delete(tid)
      return Intents.prototype.of.call(intents, tid)
    },
  })
}

const SLOW_MS = 30

/** Real pins, late answers. */
const slow = (opener) => {
  const open = opener.open.bind(opener)
  return Object.assign(opener, {
    open: (device, done) => open(device, (result) => setTimeout(done, SLOW_MS, result)),
  })
}

/**
 * When a pin ends, tells the kernel that the name is no longer valid. The kernel then drops the
 * name, in use or not. On another thread, as the kernel waits for the directory's lock, and the
 * holder of that may wait for an answer.
 */
function invalidating() {
  const FUSE_NOTIFY_INVAL_ENTRY = 3
  const { unpin } = PinLifetime.prototype
  FuseSession.prototype.prune = function (id) {
    const parsed = parseId(id)
    const name = nodeName(parsed.diskseq, parsed.partition)
    const message = Buffer.alloc(16 + 16 + name.length + 1)
    message.writeUInt32LE(message.length, 0)
    message.writeInt32LE(FUSE_NOTIFY_INVAL_ENTRY, 4)
    message.writeBigUInt64LE(1n, 16) // in the root
    message.writeUInt32LE(name.length, 24)
    message.write(name, 32, 'latin1')
    promisify(write)(this.fd, message).catch(() => {}) // ENOENT: it does not know the name
    return true
  }
  PinLifetime.prototype.unpin = function (inode) {
    this.parts.kernel.prune(inode.id)
    return unpin.call(this, inode)
  }
}

/** Does at once what native/addon/threads.cc does on another thread, however long that takes. */
function lookAtOnce(threads, done) {
  const read = (tid, file) => {
    try {
      return readFileSync(`/proc/${tid}/${file}`, 'latin1')
    } catch {
      return ''
    }
  }
  const seen = []
  for (let i = 0; i < threads.length; i += 2) {
    const stat = read(threads[i], 'stat')
    const [state, ...fields] = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    const startCode = Number(fields[22])
    const look = () => [read(threads[i], 'syscall'), threads[i + 1] ? read(threads[i], 'stack') : '', state, startCode, -1]
    seen.push(stat === '' ? undefined : look())
  }
  setImmediate(done, seen)
}

/** Puts opens and closes of devices into one queue, as with a pool that is full. */
function queued() {
  const waiting = []
  let busy = false
  const next = () => {
    busy = waiting.length > 0
    waiting.shift()?.()
  }
  const add = (start) => {
    waiting.push(start)
    if (!busy) next()
  }
  const inTurn =
    (call) =>
    (...given) => {
      const done = given.pop()
      add(() =>
        call(...given, (...results) => {
          next()
          done(...results)
        }),
      )
    }
  return { ...native, openDevice: inTurn(native.openDevice), closeDevice: inTurn(native.closeDevice) }
}

const FUSE_INTERRUPT = 36
let mute = false
const EAGAIN = -11
const EINTR = -4
const ENOBUFS = -105
const EPERM = 1
const EMFILE = 24
const ENXIO = 6

/** In bytes: room for a few events. */
const SMALL_BUFFER = 4096

const hoard = []

/** Requests come in by either call. `take` gets what a read returned and may return something else. */
const reading = (calls, take) => ({
  ...calls,
  read: (fd, into) => take(calls.read(fd, into), into),
  readSoon: (fd, into, ...how) => take(calls.readSoon(fd, into, ...how), into),
})

const NOTED_MAX = 1000
/** The users that got answers, in this order. */
const answered = []

/** Notes which users' requests come in, and the order in which they are answered. */
function noting(calls) {
  const users = new Map()
  const header = (bytes) => Buffer.from(bytes.buffer, bytes.byteOffset, 40)
  return {
    ...reading(calls, (n, into) => {
      if (n >= 40) users.set(header(into).readBigUInt64LE(8), header(into).readUInt32LE(24))
      return n
    }),
    write: (fd, bytes, length) => {
      const unique = header(bytes).readBigUInt64LE(8)
      if (users.has(unique) && answered.length < NOTED_MAX) answered.push(users.get(unique))
      users.delete(unique)
      return calls.write(fd, bytes, length)
    },
  }
}

/** A clock that goes back by a second each time it is read. */
function backwards() {
  const began = Date.now()
  let looks = 0
  return () => began - 1000 * looks++
}

/** Indices in a {@link SeenThread}. */
const MEMORY = 3
const FAULTS = 5

/** The fields of a whole process, from the third on. */
function statOf(tid) {
  const stat = readFileSync(`/proc/${tid}/stat`, 'latin1')
  return stat
    .slice(stat.lastIndexOf(')') + 2)
    .split(' ')
    .map(Number)
}

/** Minor and major page faults of all threads of the process. */
const faultsOf = (tid) => statOf(tid)[7] + statOf(tid)[9]
const codeOf = (tid) => statOf(tid)[23]

/** The daemon sees each drive as one with a removable medium. */
const removable = {
  ...native,
  readFile: (path, into) =>
    path.endsWith('/removable') ? Buffer.from(into.buffer, into.byteOffset).write('1\n') : native.readFile(path, into),
}

const die = () => process.kill(process.pid, 'SIGKILL')

const twins = {
  /** Nothing is switched off. */
  none: {},
  /** The same, and each disk takes a second to open. */
  'opens-late': {
    opener: (...given) => {
      const opener = new PinOpener(...given)
      const open = opener.open.bind(opener)
      return Object.assign(opener, { open: (device, done) => setTimeout(open, 1000, device, done) })
    },
  },
  /** Nothing is held: an O_PATH descriptor of the node does not keep a number from being reused. */
  'no-pins': {
    opener: (calls, directory) => new OtherPins(calls, directory, (device, done) => done(calls.openNode(directory, device.devname))),
  },
  /** A caller that may set the times of an inode in the kernel gets one of ours. */
  'own-inodes': {
    patch() {
      const { of } = Intents.prototype
      Intents.prototype.of = function (...given) {
        const call = of.apply(this, given)
        return call.setsTimes ? { ...call, setsTimes: false } : call
      }
    },
  },
  /** Disks are opened by their device nodes in /dev. */
  'nodes-in-dev': { native: { ...native, makeNodes: () => -EPERM } },
  /** For a partition, its disk is held instead. (And the state of its device node does not matter.) */
  'whole-disk-pins': {
    patch() {
      const { statOf } = DeviceNodes.prototype
      let last
      DeviceNodes.prototype.statOf = function (device) {
        return (last = statOf.call(this, device) ?? last)
      }
    },
    opener: (calls, directory) =>
      new OtherPins(calls, directory, (device, done) => {
        const disk = device.devname.replace(/p\d+$/, '')
        calls.openDevice(directory, disk, 0, false, -1, (error, fd) => done(error === 0 ? fd : -error))
      }),
  },
  /** A loop device is believed to be bound, without a check. */
  'no-loop-check': {
    native: {
      ...native,
      openDevice: (directory, name, flags, _, nodes, done) => native.openDevice(directory, name, flags, false, nodes, done),
    },
  },
  /** A drive is not asked whether its medium has changed. (And pins last, so that one is found.) */
  'no-media-check': {
    patch: () => void (PinLifetime.prototype.judge = () => {}),
    native: {
      ...native,
      readFile: (path, into) => (path.endsWith('/removable') ? -2 : native.readFile(path, into)),
    },
  },
  /** No other process stores leases. */
  'leases-forgotten': { patch: () => void (HandOverSet.prototype.putLease = async () => {}) },
  /** The next daemon asks the files of leases whether these are still bound. */
  'leases-ask-files': {
    patch() {
      const { identify } = native
      native.identify = (fd, _, done) => identify(fd, true, done)
    },
  },
  /** Whoever can connect to the control socket is taken for root. */
  'peers-believed': { native: { ...native, peerUser: () => 0 } },
  /** All calls that there are are answered one after another. */
  'calls-at-once': { patch: () => void (VarlinkServer.prototype.enqueue = (connection) => queueMicrotask(() => connection.takeCall())) },
  /** The daemon dies when it has bound a loop device; when it holds that; when it is stored. */
  'dies-bound': {
    patch() {
      const { attachLoop } = native
      native.attachLoop = (...given) => attachLoop(...given.slice(0, -1), die)
    },
  },
  'dies-held': { patch: () => void (HandOverSet.prototype.putLease = die) },
  'dies-stored': {
    patch() {
      const { putLease } = HandOverSet.prototype
      HandOverSet.prototype.putLease = function (...given) {
        return putLease.apply(this, given).then(die)
      }
    },
  },
  /** Each caller is taken to open. */
  'no-inspect': { intents: withIntents(opensEverything) },
  /** Nothing is switched off, but callers are slow to go to sleep. */
  'callers-run': { intents: sleepsLate(RUNNING) },
  /** The same, and the daemon does not wait for them. */
  'callers-run-unknown': { intents: sleepsLate(UNSEEN) },
  /** Each caller is taken to only look. */
  'always-inspect': { intents: withIntents(inspectsEverything) },
  /** There is no access check. */
  'no-access-rule': {
    access: () => Object.assign(new Access(native), { mayOpen: (_, __, ___, done) => done(true), certain: () => true }),
  },
  /** The kernel cannot be told to forget one name (before Linux 6.18). */
  /** A daemon whose mount is gone ends without looking whether callers are on their way. */
  'ends-at-once': { patch: () => void (FuseSession.prototype.whenQuiet = async () => {}) },
  'no-prune': { patch: () => void (FuseSession.prototype.prune = () => false) },
  /** udev is not told of writers. */
  'no-touch': {
    opener: (calls, directory) => Object.assign(new PinOpener(calls, directory), { touch: (_, done) => done() }),
  },
  /** Unused names are dropped in a way that also drops those in use. */
  'inval-entry': { patch: invalidating },
  /**
   * A LOOKUP waits for a slow disk, whichever caller it is from: no caller is taken to ask for the attributes later.
   */
  'lookups-wait': {
    lookupsWait: true,
    intents: (calls) => {
      const intents = new Intents(calls)
      return Object.assign(intents, {
        of(tid) {
          const call = Intents.prototype.of.call(intents, tid)
          return call.intent === 'open' ? { ...call, intent: 'unknown' } : call
        },
      })
    },
  },
  /** One disk at a time. */
  'one-thread': { native: queued() },
  /** Callers that want to give up are not heard. */
  'no-interrupts': {
    native: reading(native, (n, into) =>
      n >= 8 && Buffer.from(into.buffer, into.byteOffset, 8).readUInt32LE(4) === FUSE_INTERRUPT ? EINTR : n,
    ),
  },
  /** Pins end with the daemon. */
  'no-pin-store': {
    native: {
      ...native,
      sendDescriptors: (socket, text, fds) => (/^\d+$/.test(text) ? text.length : native.sendDescriptors(socket, text, fds)),
    },
  },
  /** Nothing is known about the inodes that an earlier daemon gave the kernel. */
  'no-recall': { patch: () => void (InodeTable.prototype.recall = () => undefined) },
  /** Requests that an earlier daemon has read and not answered are lost. */
  'no-journal': {
    native: {
      ...native,
      mapMemory: (fd, bytes) => {
        const { STATE_LANDING_AT, STATE_PINS_AT } = native.layout
        const memory = native.mapMemory(fd, bytes)
        new Uint8Array(memory).fill(0, STATE_LANDING_AT, STATE_PINS_AT)
        return memory
      },
    },
  },
  /** Each caller has the disk opened anew. */
  'opens-alone': {
    patch() {
      const { of } = Openings.prototype
      Openings.prototype.of = function (inode, device) {
        inode.opening = undefined
        return of.call(this, inode, device)
      }
    },
  },
  /** A hold ends by the clock, whether or not the daemon had the processor meanwhile. */
  'hold-by-clock': {
    patch() {
      const { answered, hold } = PinLifetime.prototype
      const since = new WeakMap()
      PinLifetime.prototype.answered = function (inode, ...given) {
        since.set(inode, performance.now())
        return answered.call(this, inode, ...given)
      }
      PinLifetime.prototype.hold = function () {
        for (const inode of this.active) {
          if (performance.now() - since.get(inode) >= this.parts.options.holdSeconds * 1000) inode.unseenTicks = Infinity
        }
        return hold.call(this)
      }
    },
  },
  /** Pins end with the mount, even if a caller was answered and has not opened yet. */
  'no-draining': { patch: () => void (PinLifetime.prototype.whenDrained = (done) => done()) },
  /** Each pinned answer may be trusted for a jiffy, even if the inode is already in use. */
  'valid-attributes': {
    patch() {
      Gate.prototype.makeReopenable = () => {}
      Sysfs.prototype.changes = () => false
    },
  },
  /** The number of a call is believed, whatever its pointer argument is. */
  'numbers-believed': {
    patch() {
      const { parse } = Intents.prototype
      Intents.prototype.parse = function (...given) {
        return parse.apply(Object.assign(Object.create(this), { confirms: () => true }), given)
      }
    },
  },
  /** A thread whose code begins at 0 is taken to be in the middle of an execve(2), whatever else it has. */
  'code-alone': {
    native: {
      ...native,
      lookAtThreads: (threads, done) =>
        native.lookAtThreads(threads, (seen) =>
          done(seen.map((one, i) => (one && codeOf(threads[2 * i]) === 0 ? one.with(0, '').with(MEMORY, 0) : one))),
        ),
    },
  },
  /** An io_uring worker is taken for a program's thread, in the call that it shows. */
  'workers-believed': {
    patch() {
      const { parse } = Intents.prototype
      Intents.prototype.parse = function (tid, bytes, length) {
        const text = Buffer.from(bytes.buffer, bytes.byteOffset, length)
          .toString('latin1')
          .replace(/ 0x0\n$/, ' 0x7f0000000001\n')
        return parse.call(this, tid, Buffer.from(text, 'latin1'), text.length)
      }
    },
  },
  /** The stack is not checked. */
  'no-confirm': { patch: () => void (Intents.prototype.confirms = () => true) },
  /** A caller in an unknown call is not followed: its pin ends some ms after the kernel forgot the inode. */
  'linger-only': { patch: () => void (Intents.prototype.isSeen = (call) => call.intent !== 'unknown') },
  /**
   * One inode for each name, whatever number the device has. A request for the old inode is answered for the new
   * one.
   */
  'one-inode-per-name': {
    patch() {
      const { of } = InodeTable.prototype
      InodeTable.prototype.of = function (device) {
        return this.byName.get(device.name) ?? of.call(this, device)
      }
      InodeTable.prototype.known = function (device) {
        return this.byName.get(device.name)
      }
      InodeTable.is = (inode, device) => inode.name === device.name
    },
  },
  /** Threads are looked at by the thread that answers. */
  'on-loop-looks': { native: { ...native, lookAtThreads: lookAtOnce } },
  /** The same, and from hundreds of callers on, each is looked at for as long as it exists. */
  'always-looked-at': {
    patch() {
      const { gone, judge } = PinLifetime.prototype
      PinLifetime.prototype.gone = function (inode, tid) {
        if (inode.callers?.size < 500 || !existsSync(`/proc/${tid}`)) gone.call(this, inode, tid)
      }
      PinLifetime.prototype.judge = function (inode) {
        judge.call(this, inode)
        if (!(inode.callers?.size >= 500)) return
        inode.lookAt = performance.now() + 5
        this.arm(inode.lookAt)
      }
      PinLifetime.prototype.whenDrained = (done) => done()
    },
    native: { ...native, lookAtThreads: lookAtOnce },
  },
  /** Users that lock the directory again and again are not held back. */
  'no-crowd': { patch: () => void (Crowd.prototype.locks = () => {}) },
  /** Any user may list the tree. */
  'readable-root': {
    patch() {
      const { directoryAttr } = Tree.prototype
      Tree.prototype.directoryAttr = function (id) {
        const attr = directoryAttr.call(this, id)
        return { ...attr, mode: attr.mode | 0o755 }
      }
    },
  },
  /** An unknown name is searched for while the kernel asks for it; and users are not let in one by one. */
  'scan-in-lookup': {
    patch() {
      Registry.prototype.lacks = () => false
      const { decideLookup } = Gate.prototype
      Gate.prototype.decideLookup = function (request, call, tries) {
        const { registry } = this.parts
        const { name, diskseq } = request
        this.locks = () => false
        if (tries > 1 || registry.find(name) !== undefined) return decideLookup.call(this, request, call, tries)
        registry.findSlowly(name, diskseq, (device) => {
          if (typeof device === 'object') decideLookup.call(this, request, call, 2)
          else this.noSuchName(request, call, 'no such disk')
        })
      }
    },
  },
  /** Pins end when the kernel forgets the inode, which the daemon has it do, and not before. */
  'callers-by-forget': {
    patch() {
      PinLifetime.prototype.look = function (inodes) {
        for (const inode of inodes) this.judge(inode)
      }
      PinLifetime.prototype.judge = function (inode) {
        const now = performance.now()
        if (inode.lookAt > now) return this.arm(inode.lookAt)
        if (inode.known && !this.haveForgotten(inode)) return
        if (!inode.known && inode.lingerUntil <= now) return this.unpin(inode)
        inode.lookAt = Math.max(now + inode.lookDelay, inode.lingerUntil)
        inode.lookDelay = Math.min(inode.lookDelay * 2, 1000)
        this.arm(inode.lookAt)
      }
    },
  },
  /** Requests are answered in order of arrival, however many a user makes. */
  'as-they-come': { patch: () => void (FuseSession.prototype.mayWait = () => false) },
  /** Nothing is switched off, but the wall clock runs backwards. */
  'clock-jumps': { patch: () => void (Date.now = backwards()) },
  /** The same for the clock by which the daemon measures time. */
  'wall-clock': { patch: () => void (performance.now = backwards()) },
  /** A lack of descriptors is taken as not having found the disk. */
  'exhaustion-unnoticed': {
    native: {
      ...native,
      openDevice: (directory, name, flags, loop, nodes, done) =>
        native.openDevice(directory, name, flags, loop, nodes, (error, ...found) => done(error === EMFILE ? ENXIO : error, ...found)),
    },
  },
  /** `--hold` limits the wait for all callers, not only for those that cannot be seen. */
  'hold-for-all': {
    patch() {
      const { answered } = PinLifetime.prototype
      PinLifetime.prototype.answered = function (inode, ...given) {
        answered.call(this, inode, ...given)
        setTimeout(() => this.unpin(inode), this.parts.options.holdSeconds * 1000)
      }
    },
  },
  /** The daemon may not open any disk (because of a device cgroup, say). */
  'may-not-open': {
    opener: (calls, directory) =>
      Object.assign(new PinOpener(calls, directory), { open: (_, done) => setImmediate(done, { errno: EPERM }) }),
  },
  /** All users count as one: they wait for each other. */
  'one-user': { native: { ...native, userNamespace: () => 1 } },
  /** Callers are read without first checking that they are off the run queue. */
  unwary: {
    patch() {
      Intents.prototype.isOffQueue = () => true
    },
  },
  /** A caller is not taken to keep an inode by way of what it opened. */
  'openers-keep-nothing': {
    patch() {
      Gate.prototype.mayKeep = (_, { keeps }) => keeps
    },
  },
  /** An attempt that finds no descriptor left is not repeated. */
  'tries-once': {
    patch() {
      const { step } = Gate.prototype
      Gate.prototype.step = function (attempt, ...given) {
        attempt.exhausted = Infinity
        return step.call(this, attempt, ...given)
      }
    },
  },
  /** An attempt that finds no descriptor left is repeated for 20 ms. */
  'tries-by-clock': {
    patch() {
      const { step } = Gate.prototype
      Gate.prototype.step = function (attempt, ...given) {
        attempt.since ??= performance.now()
        if (performance.now() > attempt.since + 20) attempt.exhausted = Infinity
        return step.call(this, attempt, ...given)
      }
    },
  },
  /** The daemon busy-polls for the next request each time, however seldom one comes. */
  'waits-always': { patch: () => void (BusyPoll.prototype.pays = () => true) },
  /** Nothing is switched off, but few uevents fit into the socket. */
  'small-buffer': { native: { ...native, ueventOpen: () => native.ueventOpen(SMALL_BUFFER) } },
  /** The same, and the daemon does not notice that some were lost. */
  'small-buffer-unnoticed': {
    native: {
      ...native,
      ueventOpen: () => native.ueventOpen(SMALL_BUFFER),
      ueventReceive: (...given) => {
        const n = native.ueventReceive(...given)
        return n === ENOBUFS ? EINTR : n
      },
    },
  },
  /** Each request costs memory for ever. */
  hoards: {
    native: reading(native, (n) => {
      if (n > 0) hoard.push(Buffer.alloc(16384, 1))
      return n
    }),
  },
  /** The outgoing daemon ends once it has given the turn, whatever becomes of the incoming one. */
  'no-comeback': { patch: () => void (Daemon.prototype.goOn = () => process.exit(0)) },
  /** Requests are not read; everything else goes on. */
  mute: {
    native: {
      ...native,
      read: (...given) => (mute ? EAGAIN : native.read(...given)),
      readSoon: (...given) => (mute ? EAGAIN : native.readSoon(...given)),
    },
  },
  /** With the library: a pin ends when its caller has been answered. */
  'no-hold': {
    patch() {
      FuseNativeTransport.prototype.hold = function (id) {
        setImmediate(() => this.operations.forget(id, 1n))
      }
    },
  },
  /** Nothing is switched off, but all drives have removable media. */
  'removable-drives': { native: removable },
  /** The same, and the daemon does not remember for which caller it began to open a disk. */
  'removable-drives-anew': { native: removable, patch: () => void (Gate.prototype.began = () => false) },
  /** Callers are looked up in /proc, whichever pid namespace that is of. */
  'any-proc': { patch: () => void (Preflight.prototype.requireOwnProc = () => {}) },
  /** The lock of a mount point has the same name in all mount namespaces. */
  'one-lock-for-all': {
    native: { ...native, lockFile: (file) => native.lockFile(file.replace(/@\d+/, '')) },
  },
  /**
   * A lock on the mount point itself decides which daemon comes first. (It is taken and released at once, which is the same for a daemon
   * that cannot get it.)
   */
  'lock-on-mountpoint': {
    native: {
      ...native,
      lockFile: (file) => (spawnSync('flock', ['--nonblock', mountpoint, 'true']).status === 0 ? native.lockFile(file) : EAGAIN),
    },
  },
  /**
   * A caller is judged by the node's mode, as for an open(2), with the groups of its thread. (And
   * users are not let in one by one, as too few would be seen.)
   */
  'purpose-open': {
    patch() {
      Gate.prototype.purpose = () => 'open'
      Crowd.prototype.locks = () => {}
    },
  },
  /** A thread that is seen running may still be in the call. */
  'running-is-in': {
    patch() {
      const { mayStillBeIn } = Intents.prototype
      Intents.prototype.mayStillBeIn = function (call, seen) {
        return seen?.[0].startsWith('running') || mayStillBeIn.call(this, call, seen)
      }
    },
  },
  /** For a thread that is seen running, the page faults of its whole process are counted. */
  'faults-of-all': {
    native: {
      ...native,
      lookAtThreads: (threads, done) =>
        native.lookAtThreads(threads, (seen) => done(seen.map((one, i) => one?.with(FAULTS, faultsOf(threads[2 * i]))))),
    },
  },
  /** What was found out while a caller waited does not count when that caller asks again. */
  'no-walk-memory': { patch: () => void (Gate.prototype.walkedBy = () => undefined) },
  /** Directories other than the root are not watched for closes. */
  unwatched: { patch: () => void (CloseWatch.prototype.watch = (_, ready) => ready()) },
  /** A caller that has looked at a device by the kernel's name is done with it. */
  'done-when-seen': { patch: () => void (Intents.prototype.goesOn = () => false) },
  /** The links beneath the tree do not follow devices that come and go. */
  'no-links-beneath': { patch: () => void (Beneath.prototype.add = Beneath.prototype.remove = () => {}) },
  /** A LOOKUP waits for links beneath the tree for as long as it takes. */
  'waits-for-links': {
    patch() {
      Directories.prototype.whenReady = Directories.prototype.whenPrepared
    },
  },
  /** No uevent ever arrives. */
  deaf: { native: { ...native, ueventReceive: () => EAGAIN } },
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    'open-timeout': { type: 'string', default: '10' },
    hold: { type: 'string', default: '30' },
    transport: { type: 'string', default: 'session' },
    'note-answers': { type: 'boolean', default: false },
  },
})
const [twin, mountpoint] = positionals
const [name, pace] = twin.split('+')
const parts = twins[name]
if (parts === undefined) throw new Error(`no such twin: ${name}`)
parts.patch?.()
let waits = 0
const { pays } = BusyPoll.prototype
BusyPoll.prototype.pays = function () {
  const wait = pays.call(this)
  if (wait) waits++
  return wait
}
const makeOpener = parts.opener ?? ((...given) => new PinOpener(...given))
const intents = pace === 'unseen' ? withIntents({ of: () => UNSEEN }) : parts.intents
const opener = pace === 'slow' ? (...given) => slow(makeOpener(...given)) : makeOpener
const { logger: log } = await createLogger('info', { kind: 'stderr', format: 'json' })
const guard = Guard.ofThisProcess(native, log)
const daemon = new Daemon({
  options: {
    mountpoint,
    mount: parseMountOptions('', []),
    lingerMs: 5,
    holdSeconds: Number(values['hold']),
    transport: values['transport'],
    openTimeoutMs: Number(values['open-timeout']) * 1000,
  },
  replaced: { ...parts, opener, ...(intents && { intents }), ...(values['note-answers'] && { native: noting(parts.native ?? native) }) },
  guard,
  handedOver: () => process.exit(0),
  log,
})
process.once('SIGTERM', () => (daemon.canBeTakenOver ? process.exit(0) : daemon.stop()))
process.on('SIGHUP', () => {
  mute = true
})
process.on('SIGUSR2', () => {
  const { inodes, dead, transport } = daemon
  log.info(
    {
      inodes: inodes.size,
      dead: dead.size,
      pending: transport.pending.size,
      waiting: transport.waiting.size + transport.lookups.size,
      waits,
      answered: answered.splice(0),
    },
    'remembered',
  )
})
await daemon.start(await guard?.stored())
guard?.serves(`serving ${mountpoint}${daemon.tookOver ? ', taken over' : ''}`, () => process.exit(0))
await daemon.ended
process.exit(0)
