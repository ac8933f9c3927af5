// SPDX-License-Identifier: MIT
/** uevents: which ones are believed, what is read from them, and that no flood of them stops anything. */

import t from 'tap'

import { E } from '../../../src/util/errno.js'
import type { Logger } from '../../../src/util/log.js'
import { type Native } from '../../../src/native.js'
import { blockEventOf, UeventSocket } from '../../../src/devices/uevents.js'
import { uevent } from '../../helpers/uevent.js'

const KERNEL_GROUP = 1
const UDEV_GROUP = 2

const named = (message: Buffer) => blockEventOf(message, message.length)?.kname

t.test('an event names its device', async (t) => {
  t.equal(named(uevent('loop0')), 'loop0')
  t.equal(named(uevent('loop0', {}, 'add')), 'loop0')
  t.equal(named(uevent('loop0', {}, 'remove')), 'loop0')
  t.equal(named(uevent('cciss!c0d0', { DEVNAME: 'cciss/c0d0' })), 'cciss!c0d0')
  t.equal(named(uevent('sda/sda1', { DEVTYPE: 'partition', PARTN: '1' })), 'sda1')
  t.equal(named(uevent('loop0', { DISK_MEDIA_CHANGE: '1' })), 'loop0')
})

t.test('an event without a diskseq still names its device', async (t) => {
  t.equal(named(uevent('loop0', { DISKSEQ: undefined, MAJOR: undefined, MINOR: undefined, DEVNAME: undefined })), 'loop0')
})

t.test('an event has the number that its disk had then', async (t) => {
  const about = (message: Buffer) => blockEventOf(message, message.length)
  t.match(about(uevent('loop0')), { diskseq: 13n, gone: false })
  t.match(about(uevent('loop0', {}, 'remove')), { diskseq: 13n, gone: true })
  t.match(about(uevent('sda/sda1', { DEVTYPE: 'partition', PARTN: '1' }, 'remove')), { diskseq: 13n, gone: false }, 'of a partition')
  for (const nonsense of [undefined, '', '0', '-1', '013', '1e3', '18446744073709551616']) {
    t.equal(about(uevent('loop0', { DISKSEQ: nonsense }))?.diskseq, undefined, String(nonsense))
  }
  const { socket, answers, numbers } = fakeSocket()
  answers.push(
    { message: uevent('sda') },
    { message: uevent('sdb', { DISKSEQ: undefined }) },
    { message: uevent('sdc', { DISKSEQ: '15' }, 'remove') },
  )
  answers.push({ message: uevent('sdd'), port: 4321 })
  socket.drain()
  t.strictSame(numbers, ['sda 13', 'sdc 15 gone'], "but not a forger's")
})

t.test('other events name no device', async (t) => {
  t.equal(named(uevent('eth0', { SUBSYSTEM: 'net' })), undefined)
  t.equal(named(uevent('x', { SUBSYSTEM: 'blocks' })), undefined)
  t.equal(named(uevent('x', { SUBSYSTEM: 'xblock' })), undefined)
  t.equal(named(uevent('x', { SUBSYSTEM: undefined })), undefined)
  t.equal(named(uevent('x', { SUBSYSTEM: undefined, DM_SUBSYSTEM: 'block' })), undefined)
})

t.test('malformed events name no device', async (t) => {
  const whole = uevent('loop0')
  t.equal(blockEventOf(whole, whole.length - 1), undefined, 'no final NUL')
  t.equal(blockEventOf(whole, 0), undefined, 'nothing')
  const libudev = Buffer.concat([Buffer.from('libudev\0\xfe\xed\xca\xfe', 'latin1'), Buffer.alloc(28), whole])
  t.equal(named(libudev), undefined, "udev's own")
  t.equal(named(Buffer.from('change\0SUBSYSTEM=block\0DEVPATH=/devices/x/loop0\0')), undefined, 'no path in its header')
  t.equal(named(Buffer.from('@/x\0SUBSYSTEM=block\0DEVPATH=/devices/x/loop0\0')), undefined, 'no action')
  t.equal(named(Buffer.from('add@x\0SUBSYSTEM=block\0DEVPATH=/devices/x/loop0\0')), undefined, 'no absolute path')
  t.equal(named(uevent('loop0', { DEVPATH: undefined })), undefined, 'no DEVPATH')
  for (const path of ['', '/', '.', '..', '/devices/..', '/devices/.', '/devices/virtual/block/']) {
    t.equal(named(uevent('loop0', { DEVPATH: path })), undefined, `DEVPATH=${path}`)
  }
})

t.test('a name never leads out of its directory', async (t) => {
  for (const path of ['/../../etc/passwd', '/devices/../..', 'a/b/../c', '../loop0', '/devices/..//x']) {
    const name = named(uevent('loop0', { DEVPATH: path }))
    t.ok(name === undefined || (!name.includes('/') && name !== '..' && name !== '.'), `DEVPATH=${path}`)
  }
})

t.test('an event cut off anywhere never names another device', async (t) => {
  const whole = uevent('loop12')
  const names = new Set<string | undefined>()
  for (let length = 0; length <= whole.length; length++) names.add(blockEventOf(whole, length)?.kname)
  t.strictSame([...names], [undefined, 'loop12'])
})

t.test('noise names nothing, and throws nothing', async (t) => {
  let state = 1
  const random = () => (state = (Math.imul(state, 1103515245) + 12345) >>> 0) >>> 16
  const noise = Buffer.alloc(8192)
  let bad = 0
  for (let round = 0; round < 200; round++) {
    for (let i = 0; i < noise.length; i++) noise[i] = random()
    noise[noise.length - 1] = 0
    if (named(noise) !== undefined) bad++
  }
  const whole = uevent('loop0')
  for (let round = 0; round < 20_000; round++) {
    const bent = Buffer.from(whole)
    bent[random() % bent.length] = random()
    const name = named(bent)
    if (name !== undefined && (name === '' || name === '.' || name === '..' || /[/\0]/.test(name))) bad++
  }
  t.equal(bad, 0)
  t.equal(named(Buffer.alloc(8192, 'add@/')), undefined)
  t.equal(named(Buffer.alloc(8192)), undefined)
})

/** The next answers of the socket: a message, or a negated errno. */
type Answer = number | { message: Buffer; port?: number; group?: number; truncated?: boolean }

function fakeSocket(onChanged: (answers: Answer[]) => void = () => {}) {
  const answers: Answer[] = []
  const changes: string[][] = []
  const numbers: string[] = []
  const logged: string[] = []
  let lost = 0
  let received = 0
  let ready = () => {}
  const closed: number[] = []
  let polls = 0
  const fake: Pick<Native, 'Poll' | 'ueventOpen' | 'ueventReceive' | 'close'> = {
    Poll: class {
      constructor(_: number, callback: () => void) {
        polls++
        ready = callback
      }
      pause() {}
      resume() {}
      close() {
        polls--
      }
    },
    ueventOpen: () => 77,
    ueventReceive(_, into, from) {
      received++
      const answer = answers.shift() ?? -E.EAGAIN
      if (typeof answer === 'number') return answer
      into.set(answer.message.subarray(0, into.length))
      from.set([answer.port ?? 0, answer.group ?? KERNEL_GROUP, answer.truncated ? 1 : 0])
      return Math.min(answer.message.length, into.length)
    },
    close: (fd) => (closed.push(fd), 0),
  }
  const note = (_: unknown, text?: string) => void logged.push(text ?? String(_))
  const log = { error: note, warn: note, info: note, debug: note } as unknown as Logger
  const socket = new UeventSocket({
    native: fake,
    listener: {
      changed(knames) {
        changes.push([...knames])
        onChanged(answers)
      },
      numbered: (kname, diskseq, gone) => void numbers.push(`${kname} ${diskseq}${gone ? ' gone' : ''}`),
      lost: () => void lost++,
    },
    log,
  })
  socket.open()
  return {
    socket,
    answers,
    changes,
    numbers,
    logged,
    fake,
    ready: () => ready(),
    lost: () => lost,
    received: () => received,
    closed: () => closed,
    polls: () => polls,
  }
}

t.test('only what the kernel itself sent to its own group is believed', async (t) => {
  const { socket, answers, changes, lost } = fakeSocket()
  answers.push(
    { message: uevent('forged0'), port: 4321 },
    { message: uevent('forged1'), group: UDEV_GROUP },
    { message: uevent('forged2'), group: 0 },
    { message: uevent('forged3'), group: KERNEL_GROUP | UDEV_GROUP },
    { message: uevent('forged4'), port: 4321, truncated: true },
    { message: uevent('real0') },
  )
  socket.drain()
  t.strictSame(changes, [['real0']])
  t.equal(lost(), 0, 'no other sender can have all devices read again')
})

t.test('a truncated event counts as a lost event', async (t) => {
  const { socket, answers, changes, lost, logged } = fakeSocket()
  answers.push({ message: uevent('cut0'), truncated: true }, { message: uevent('loop1') })
  socket.drain()
  t.equal(lost(), 1)
  t.equal(logged.length, 1)
  t.strictSame(changes, [['loop1']])
})

t.test('an overflow is reported, and the events left in the socket are still read', async (t) => {
  const { socket, answers, changes, lost, logged } = fakeSocket()
  answers.push({ message: uevent('loop0') }, -E.ENOBUFS, { message: uevent('loop1') }, -E.EINTR, { message: uevent('loop2') })
  socket.drain()
  t.equal(lost(), 1)
  t.equal(logged.length, 1)
  t.strictSame(changes, [['loop0', 'loop1', 'loop2']])
  t.equal(answers.length, 0)
})

t.test('an empty socket is no change', async (t) => {
  const { socket, answers, changes, lost, received, logged } = fakeSocket()
  answers.push(-E.EAGAIN, { message: uevent('later0') })
  socket.drain()
  t.strictSame(changes, [])
  t.equal(received(), 1, 'the socket is asked once')
  t.equal(lost(), 0)
  t.strictSame(logged, [])
  socket.drain()
  t.strictSame(changes, [['later0']])
})

t.test('any other error is reported, and ends the round', async (t) => {
  const { socket, answers, changes, lost, logged } = fakeSocket()
  answers.push({ message: uevent('loop0') }, -E.EIO, { message: uevent('loop1') })
  socket.drain()
  t.equal(lost(), 1)
  t.equal(logged.length, 1)
  t.strictSame(changes, [['loop0']], 'events read before the error count')
})

t.test('a device is reported once, however many events it had', async (t) => {
  const { ready, answers, changes } = fakeSocket()
  for (let i = 0; i < 10; i++) answers.push({ message: uevent('loop0') })
  ready()
  t.strictSame(changes, [['loop0']])
})

t.test('ten thousand events of three devices are one report', async (t) => {
  const { socket, answers, changes } = fakeSocket()
  for (let i = 0; i < 10_000; i++) answers.push({ message: uevent(`loop${i % 3}`) })
  socket.drain()
  t.strictSame(changes, [['loop0', 'loop1', 'loop2']])
})

t.test('events caused by looking at devices cannot keep the loop from ending', async (t) => {
  const storm = fakeSocket((answers) => {
    if (storm.changes.length > 50) throw new Error('it does not end')
    for (let i = 0; i < 100; i++) answers.push({ message: uevent(`loop${i % 3}`) })
  })
  storm.answers.push({ message: uevent('loop7') })
  storm.ready()
  t.strictSame(storm.changes, [['loop7']], 'the events that they cause wait for the next turn')
  storm.ready()
  t.strictSame(storm.changes, [['loop7'], ['loop0', 'loop1', 'loop2']])
})

t.test('a socket that is closed reads no more', async (t) => {
  const { socket, answers, changes, closed, polls, received } = fakeSocket()
  answers.push({ message: uevent('loop0') })
  socket.close()
  socket.drain()
  t.strictSame(changes, [])
  t.equal(received(), 0)
  t.equal(polls(), 0)
  socket.close()
  t.strictSame(closed(), [77], 'the socket is closed once')
})

t.test('without a socket it does not start', async (t) => {
  const { fake } = fakeSocket()
  const socket = new UeventSocket({
    native: { ...fake, ueventOpen: () => -E.EPERM },
    listener: { changed() {}, numbered() {}, lost() {} },
    log: {} as Logger,
  })
  t.throws(() => socket.open(), /uevents: EPERM/)
})
