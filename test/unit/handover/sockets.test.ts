// SPDX-License-Identifier: MIT
/** Sockets that pins wait in: no other process's messages get into them. */
import { execFileSync, spawn } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { E } from '../../../src/util/errno.js'
import { native } from '../../../src/native.js'
import { ROOT } from '../../helpers/root.js'
import { cleanup, run, until } from '../../helpers/tree.js'

const NOBODY = 65534
const SOCKETS = 1000

t.test('a descriptor that is sent waits until it is taken', async (t) => {
  const socket = native.selfSocket()
  cleanup(t, () => native.close(socket))
  const buffer = new Uint8Array(16)
  t.equal(native.receiveDescriptors(socket, buffer, false), -E.EAGAIN, 'the socket is empty at first')
  const file = openSync('/dev/null', 'r')
  t.equal(native.sendDescriptors(socket, 'pin', [file]), 3)
  closeSync(file)
  const peeked = native.receiveDescriptors(socket, buffer, true) as number[]
  const taken = native.receiveDescriptors(socket, buffer, false) as number[]
  for (const [length, fd = -1] of [peeked, taken]) {
    t.equal(length, 3)
    t.equal(native.close(fd), 0, 'it was open')
  }
  t.equal(native.receiveDescriptors(socket, buffer, false), -E.EAGAIN)
})

/** Sends to each socket with a name that the kernel has chosen, as soon as it sees one. */
const SENDER = `
import array, re, socket
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
null = array.array('i', [open('/dev/null').fileno()])
print('ready', flush=True)
sent = 0
while True:
  with open('/proc/net/unix') as sockets:
    for name in re.findall(r'@([0-9a-f]{5})$', sockets.read(), re.MULTILINE):
      try: sender.sendmsg([b'mine'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, null)], 0, '\\0' + name)
      except OSError: pass
`

/** Makes sockets, each with a message of its own, and counts those that had another. */
const MAKER = `
const native = require('${ROOT}/native/build/Release/diskseqfs_native.node')
const buffer = new Uint8Array(16)
let foreign = 0
for (let i = 0; i < ${SOCKETS}; i++) {
  const socket = native.selfSocket()
  if (socket < 0) throw new Error('no socket: ' + socket)
  native.sendDescriptors(socket, 'pin', [0])
  const [length, fd] = native.receiveDescriptors(socket, buffer, false)
  const mine = Buffer.from(buffer.subarray(0, length)).toString() === 'pin'
  native.close(fd)
  const alone = native.receiveDescriptors(socket, buffer, false) === -${E.EAGAIN}
  if (!mine || !alone) foreign++
  native.close(socket)
}
console.log(foreign)
`

/** How many sockets had a message of another process. Each takes a while between its name and its connection. */
async function foreign(t: Test, env: NodeJS.ProcessEnv): Promise<number> {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-sockets-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const slow = join(directory, 'slow.so')
  execFileSync('cc', ['-O2', '-shared', '-fPIC', '-o', slow, join(ROOT, 'test/helpers/preload/slowconnect.c')])
  const sender = spawn('python3', ['-c', SENDER], { uid: NOBODY, gid: NOBODY, stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = new Promise((resolve) => sender.on('close', resolve))
  cleanup(t, async () => {
    sender.kill('SIGKILL')
    await ended
  })
  let ready = false
  sender.stdout.once('data', () => (ready = true))
  await until(() => ready)
  const { code, stdout, stderr } = await run(process.execPath, ['-e', MAKER], { env: { ...env, LD_PRELOAD: slow } })
  t.equal(code, 0, stderr)
  return Number(stdout)
}

t.test('no other process can send into them', async (t) => {
  t.equal(await foreign(t, {}), 0)
})

t.test('twin: if messages from before the connection are not dropped, any process can', async (t) => {
  const count = await foreign(t, { NO_FILTER: '1' })
  t.ok(count > 0, `into ${count} of ${SOCKETS}`)
})
