/** What the service manager is told. That systemd understands it is shown in the virtual machines. */
import t, { type Test } from 'tap'

import { E } from '../src/errno.js'
import type { Logger } from '../src/log.js'
import type { Native } from '../src/native.js'
import { ServiceManager } from '../src/service.js'
import { sleep, until } from './helpers/tree.js'

/** A socket that answers with `results`, then takes everything. */
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
    sendDescriptors: (_, text, fds) => {
      const result = results.shift() ?? text.length
      if (result >= 0) sent.push(fds.length === 0 ? text : `${text} ${fds}`)
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

/** `ServiceManager.ofThisProcess` with these variables only. */
function ofThisProcess(t: Test, { native, log }: ReturnType<typeof socket>, variables: Record<string, string>) {
  t.teardown(() => ['NOTIFY_SOCKET', 'WATCHDOG_PID', 'WATCHDOG_USEC', 'LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES'].forEach((name) => delete process.env[name]))
  Object.assign(process.env, variables)
  return ServiceManager.ofThisProcess(native as Native, log)
}

t.test('outside of a service nobody is told anything', async (t) => {
  t.equal(ofThisProcess(t, socket(), { WATCHDOG_USEC: '1000' }), undefined)
  t.equal(process.env['WATCHDOG_USEC'], undefined)
})

t.test('ready and stopping, each with a status', async (t) => {
  const fake = socket()
  const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '/run/systemd/notify' })
  t.equal(process.env['NOTIFY_SOCKET'], undefined, 'programs that are started are not told of the socket')
  manager?.ready('serving /x', () => true)
  manager?.stopping('unmounting')
  t.strictSame(fake.sent, ['READY=1\nSTATUS=serving /x', 'STOPPING=1\nSTATUS=unmounting'])
  t.equal(fake.open.size, 0, 'no descriptor is left open')
})

t.test('the watchdog hears of us twice as often as it must, and no more once we stop', async (t) => {
  const fake = socket()
  const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x', WATCHDOG_PID: String(process.pid), WATCHDOG_USEC: '40000' })
  manager?.ready('x', () => true)
  await until(() => fake.sent.filter((text) => text === 'WATCHDOG=1').length >= 3)
  manager?.stopping('unmounting')
  const count = fake.sent.length
  await sleep(100)
  t.equal(fake.sent.length, count)
})

t.test('a watchdog that waits for months does not hear of us all the time', async (t) => {
  for (const WATCHDOG_USEC of ['5000000000000', 'Infinity']) {
    const fake = socket()
    const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x', WATCHDOG_PID: String(process.pid), WATCHDOG_USEC })
    manager?.ready('x', () => true)
    await sleep(30)
    manager?.stopping('x')
    t.notOk(fake.sent.includes('WATCHDOG=1'), WATCHDOG_USEC)
  }
})

t.test('it hears nothing while the tree does not answer', async (t) => {
  const fake = socket()
  const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x', WATCHDOG_PID: String(process.pid), WATCHDOG_USEC: '20000' })
  let answers = false
  manager?.ready('x', () => answers)
  await until(() => fake.errors.length > 2)
  t.strictSame(fake.sent.filter((text) => text === 'WATCHDOG=1'), [])
  t.match(fake.errors[0], /has not answered/)
  answers = true
  await until(() => fake.sent.includes('WATCHDOG=1'))
  manager?.stopping('x')
})

t.test("another process's watchdog is none of ours", async (t) => {
  const fake = socket()
  ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x', WATCHDOG_PID: '1', WATCHDOG_USEC: '2000' })?.ready('x', () => true)
  await sleep(50)
  t.strictSame(fake.sent, ['READY=1\nSTATUS=x'])
})

t.test('a manager that has no room for a message gets it later', async (t) => {
  const fake = socket([-E.EAGAIN, -E.EAGAIN])
  ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x' })?.ready('x', () => true)
  t.strictSame(fake.sent, [])
  await until(() => fake.sent.length === 1)
  t.strictSame(fake.warnings, [])
})

t.test('a manager that is not there costs a line in the log', async (t) => {
  const fake = socket()
  ofThisProcess(t, fake, { NOTIFY_SOCKET: '/missing' })?.ready('x', () => true)
  t.strictSame(fake.warnings, [{ errno: 'ENOENT', socket: '/missing' }])
})

t.test('descriptors are put into its store by name, and taken out', async (t) => {
  const fake = socket()
  const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x' })
  manager?.put('pins', [7, 8])
  manager?.remove(['fuse', 'pins'])
  t.strictSame(fake.sent, [
    'FDSTORE=1\nFDNAME=pins\nFDPOLL=0 7,8',
    'FDSTOREREMOVE=1\nFDNAME=fuse',
    'FDSTOREREMOVE=1\nFDNAME=pins',
  ])
})

t.test('more descriptors than one message has room for', async (t) => {
  const fake = socket()
  const fds = Array.from({ length: 1000 }, (_, i) => i + 10)
  ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x' })?.put('pins', fds)
  const sent = fake.sent.map((text) => text.replace('FDSTORE=1\nFDNAME=pins\nFDPOLL=0 ', '').split(',').map(Number))
  t.strictSame(sent.flat(), fds, 'each once, in order')
  t.ok(sent.every((batch) => batch.length <= 253), 'SCM_MAX_FD')
})

t.test('a manager that has no room hears in the order in which it was told', async (t) => {
  const fake = socket([-E.EAGAIN])
  const manager = ofThisProcess(t, fake, { NOTIFY_SOCKET: '@x' })
  manager?.put('pins', [7])
  manager?.remove(['pins'])
  t.strictSame(fake.sent, [])
  await until(() => fake.sent.length === 2)
  t.strictSame(fake.sent, ['FDSTORE=1\nFDNAME=pins\nFDPOLL=0 7', 'FDSTOREREMOVE=1\nFDNAME=pins'])
})

t.test('what it has kept for us comes with its name', async (t) => {
  const listen = { NOTIFY_SOCKET: '@x', LISTEN_PID: String(process.pid), LISTEN_FDS: '3', LISTEN_FDNAMES: 'pins:fuse:pins' }
  const manager = ofThisProcess(t, socket(), listen)
  t.strictSame([...(manager?.kept ?? [])], [['pins', [3, 5]], ['fuse', [4]]])
  t.equal(process.env['LISTEN_FDS'], undefined, 'programs that are started are not told of it')
  const others = ofThisProcess(t, socket(), { ...listen, LISTEN_PID: '1' })
  t.equal(others?.kept.size, 0, "another process's are none of ours")
  const fewer = ofThisProcess(t, socket(), { ...listen, LISTEN_FDS: '1' })
  t.strictSame([...(fewer?.kept ?? [])], [['pins', [3]]], 'more names than descriptors')
  for (const LISTEN_FDS of ['', 'x', '-1', '0x2', '1e1', 'Infinity']) {
    t.equal(ofThisProcess(t, socket(), { ...listen, LISTEN_FDS })?.kept.size, 0, `"${LISTEN_FDS}" is no number of descriptors`)
  }
})
