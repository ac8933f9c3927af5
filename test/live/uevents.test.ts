// SPDX-License-Identifier: MIT
/** uevents: those of real devices arrive, and messages from a process are not believed. */
import { execFileSync } from 'node:child_process'

import t, { type Test } from 'tap'

import type { Logger } from '../../src/util/log.js'
import { native } from '../../src/native.js'
import { blockEventOf, UeventSocket } from '../../src/devices/uevents.js'
import { loopDisk, until } from '../helpers/tree.js'
import { uevent } from '../helpers/uevent.js'

const KERNEL_GROUP = 1

/** A socket on the kernel's group, and all messages that arrive on it, believed or not. */
function realSocket(t: Test) {
  const arrived: { text: string; port: number; group: number }[] = []
  const believed = new Set<string>()
  const socket = new UeventSocket({
    native: {
      ...native,
      ueventReceive(fd, into, from) {
        const n = native.ueventReceive(fd, into, from)
        if (n >= 0) {
          const text = Buffer.from(into.buffer, 0, n).toString('latin1')
          arrived.push({ text, port: from[0] as number, group: from[1] as number })
        }
        return n
      },
    },
    listener: { changed: (knames) => knames.forEach((kname) => believed.add(kname)), numbered() {}, lost() {} },
    log: { warn() {}, error() {} } as unknown as Logger,
  })
  socket.open()
  t.teardown(() => socket.close())
  return { socket, arrived, believed }
}

t.test("what a process sends to the kernel's group arrives, and is not believed", async (t) => {
  const { arrived, believed } = realSocket(t)
  const send = `
import socket, sys
s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15)
s.bind((0, 0))
s.sendto(bytes.fromhex(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3])))
`
  const forge = (kname: string, port: number, group: number) =>
    execFileSync('python3', ['-c', send, uevent(kname).toString('hex'), String(port), String(group)])
  forge('forged0', 0, KERNEL_GROUP)
  await until(() => arrived.some(({ text }) => text.includes('forged0')))
  const forged = arrived.filter(({ text }) => text.includes('forged0'))
  t.ok(
    forged.every(({ port }) => port !== 0),
    'the message has the port of its sender',
  )
  t.ok(
    forged.some(({ group }) => group === KERNEL_GROUP),
    'it is in the group of the kernel',
  )
  t.ok(
    forged.every(({ text }) => blockEventOf(Buffer.from(text, 'latin1'), text.length)?.kname === 'forged0'),
    'well-formed',
  )

  // The first netlink socket of a process has the process id as its port.
  forge('forged1', process.pid, 0)
  await until(() => arrived.some(({ text }) => text.includes('forged1')))
  t.notOk(believed.has('forged0') || believed.has('forged1'))
})

t.test('the event of a real device arrives before the call that caused it returns', async (t) => {
  const { socket, believed } = realSocket(t)
  const disk = loopDisk(t)
  socket.drain()
  t.ok(believed.has(disk.kname), 'attached')
  believed.clear()
  disk.addPartition(1, 8, 64)
  socket.drain()
  t.ok(believed.has(`${disk.kname}p1`), 'the partition is added')
  believed.clear()
  disk.deletePartition(1)
  socket.drain()
  t.ok(believed.has(`${disk.kname}p1`), 'and deleted')
})

t.test('the event of a real device wakes the daemon', async (t) => {
  const { believed } = realSocket(t)
  const disk = loopDisk(t)
  await until(() => believed.has(disk.kname))
  t.pass('the daemon reads it without being asked')
})
