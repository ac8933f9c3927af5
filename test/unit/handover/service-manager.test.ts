// SPDX-License-Identifier: MIT
/** What the service manager is told. The virtual machines show that systemd understands it. */
import { spawn } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { E } from '../../../src/util/errno.js'
import type { Logger } from '../../../src/util/log.js'
import type { Native } from '../../../src/native.js'
import { ServiceManager } from '../../../src/handover/service-manager.js'
import { ROOT } from '../../helpers/root.js'
import { cleanup, sleep, until } from '../../helpers/tree.js'

/** A socket that gives these results, then accepts everything. */
function socket(results: number[] = []) {
  const sent: string[] = []
  const open = new Set<number>()
  const warnings: unknown[] = []
  const errors: unknown[] = []
  const native: Pick<Native, 'datagramOpen' | 'sendDescriptors' | 'close'> = {
    datagramOpen: (path) => {
      if (path === '/missing') return -E.ENOENT
      open.add(3)
      return 3
    },
    sendDescriptors: (_, text) => {
      const result = results.shift() ?? text.length
      if (result >= 0) sent.push(text)
      return result
    },
    close: (fd) => (open.delete(fd), 0),
  }
  const log = {
    warn: (fields: unknown) => warnings.push(fields),
    error: (message: unknown) => errors.push(message),
  } as unknown as Logger
  return { native, log, sent, open, warnings, errors }
}

/** `ServiceManager.ofThisProcess` with only these variables set. */
function ofThisProcess(t: Test, { native, log }: ReturnType<typeof socket>, variables: Record<string, string>) {
  t.teardown(() => ['NOTIFY_SOCKET', 'WATCHDOG_PID', 'WATCHDOG_USEC'].forEach((name) => delete process.env[name]))
  Object.assign(process.env, variables)
  return ServiceManager.ofThisProcess(native as Native, log)
}

t.test('outside of a service no message is sent', async (t) => {
  t.equal(ofThisProcess(t, socket(), { WATCHDOG_USEC: '1000' }), undefined)
  t.equal(process.env['WATCHDOG_USEC'], undefined)
})

t.test('ready and stopping, each with a status', async (t) => {
  const fake = socket()
  const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '/run/systemd/notify' })
  t.equal(process.env['NOTIFY_SOCKET'], undefined, 'programs that are started are not told of the socket')
  manager?.ready('serving /x')
  manager?.stopping('unmounting')
  t.strictSame(fake.sent, ['READY=1\nSTATUS=serving /x', 'STOPPING=1\nSTATUS=unmounting'])
  t.equal(fake.open.size, 0, 'no descriptor is left open')
})

t.test('the watchdog is told twice as often as it must be, and no more once the daemon stops', async (t) => {
  const fake = socket()
  const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x', WATCHDOG_PID: String(process.pid), WATCHDOG_USEC: '40000' })
  manager?.ready('x')
  await until(() => fake.sent.filter((text) => text === 'WATCHDOG=1').length >= 3)
  manager?.stopping('unmounting')
  const count = fake.sent.length
  await sleep(100)
  t.equal(fake.sent.length, count)
})

t.test('a watchdog that waits for months is not told all the time', async (t) => {
  for (const WATCHDOG_USEC of ['5000000000000', 'Infinity']) {
    const fake = socket()
    const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x', WATCHDOG_PID: String(process.pid), WATCHDOG_USEC })
    manager?.ready('x')
    await sleep(30)
    manager?.stopping('x')
    t.notOk(fake.sent.includes('WATCHDOG=1'), WATCHDOG_USEC)
  }
})

t.test('a watchdog of another process is ignored', async (t) => {
  const fake = socket()
  ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x', WATCHDOG_PID: '1', WATCHDOG_USEC: '2000' })?.ready('x')
  await sleep(50)
  t.strictSame(fake.sent, ['READY=1\nSTATUS=x'])
})

t.test('a manager that has no room for a message gets it later', async (t) => {
  const fake = socket([-E.EAGAIN, -E.EAGAIN])
  ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x' })?.ready('x')
  t.strictSame(fake.sent, [])
  await until(() => fake.sent.length === 1)
  t.strictSame(fake.warnings, [])
})

t.test('a manager that is not there causes one line in the log', async (t) => {
  const fake = socket()
  ofThisProcess(t, fake, { NOTIFY_SOCKET: '/missing' })?.ready('x')
  t.strictSame(fake.warnings, [{ errno: 'ENOENT', socket: '/missing' }])
})

t.test('a manager that had no room gets the messages in order', async (t) => {
  const fake = socket([-E.EAGAIN])
  const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x' })
  manager?.ready('x')
  manager?.stopping('unmounting')
  t.strictSame(fake.sent, [])
  await until(() => fake.sent.length === 2)
  t.strictSame(fake.sent, ['READY=1\nSTATUS=x', 'STOPPING=1\nSTATUS=unmounting'])
})

/** A daemon that prints what its guard has stored. */
const TELLS = `
import os, socket, time
guard = socket.socket(fileno=int(os.environ['DISKSEQFS_GUARD']))
said = []
while said[-1:] != ['end']:
  data, fds, *_ = socket.recv_fds(guard, 100, 253)
  said.append(data.decode() + (' %d' % len(fds) if fds else ''))
print(', '.join(said), flush=True)
time.sleep(60)
`

/** What a guard takes as stored descriptors that was started with one descriptor and these variables. */
async function taken(t: Test, fds: string, names: string, pid = '$$'): Promise<string> {
  const start = `exec env LISTEN_PID=${pid} LISTEN_FDS="$1" LISTEN_FDNAMES="$2" "$0" python3 -c "$3" 3</dev/null`
  const guard = spawn('sh', ['-c', start, join(ROOT, 'native/diskseqfs-guard'), fds, names, TELLS], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  let said = ''
  guard.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()))
  cleanup(t, () => {
    const children = readFileSync(`/proc/${guard.pid}/task/${guard.pid}/children`, 'latin1').trim().split(' ').map(Number)
    for (const child of [guard.pid as number, ...children]) process.kill(child, 'SIGKILL')
  })
  await until(() => said.includes('end'))
  return said.trim()
}

t.test('the guard takes the descriptors that it was given, and none of its own', async (t) => {
  t.equal(await taken(t, '1', 'pins'), 'pins 1, end')
  t.equal(await taken(t, '4', 'pins:pins:pins:pins'), 'pins 1, end', 'more than there are')
  t.equal(await taken(t, '1', 'pins', '1'), 'end', 'for another process')
  for (const number of ['', 'x', '1x', '-1', ' 1', '99999999999999999999'])
    t.equal(await taken(t, number, 'pins'), number.startsWith('9') ? 'pins 1, end' : 'end', number)
})
