// SPDX-License-Identifier: MIT
/**
 * The control socket: it answers what its interface file says, and whatever a client sends, or does not read, the daemon goes on, and
 * nothing of it is left.
 */
import { execFileSync } from 'node:child_process'
import { chmodSync, closeSync, constants, mkdirSync, openSync, truncateSync, writeFileSync } from 'node:fs'
import { connect as connectSocket, type Socket } from 'node:net'
import { dirname, join } from 'node:path'

import t, { type Test } from 'tap'

import { readInterface } from '../../src/broker/broker.js'
import { Client, findControlSocket } from '../../src/broker/client.js'
import type { Type } from '../../src/broker/idl.js'
import { CONNECTIONS_MAX, MESSAGE_MAX, VarlinkError } from '../../src/broker/varlink.js'
import { native } from '../../src/native.js'
import { onlyAtLength } from '../helpers/long.js'
import {
  cleanup,
  cli,
  descriptors,
  loopDisk,
  openDevices,
  resident,
  run,
  type RunningTree,
  scratch,
  sleep,
  startTree,
  type Twin,
  until,
} from '../helpers/tree.js'

const INTERFACE = readInterface()
const SERVICE = 'org.varlink.service'

/** What a client can send without descriptors. */
async function raw(t: Test, path: string): Promise<Socket> {
  for (;;) {
    const socket = connectSocket(path)
    const error = await new Promise<NodeJS.ErrnoException | undefined>((resolve) => socket.on('error', resolve).on('connect', resolve))
    if (error === undefined) {
      socket.on('error', () => {}) // it is closed while something is sent
      cleanup(t, () => socket.destroy())
      return socket
    }
    // Many others wait to be accepted.
    if (error.code !== 'EAGAIN') throw error
    await sleep(5)
  }
}

/** All that comes until the other end closes. */
async function untilClosed(socket: Socket): Promise<string> {
  let text = ''
  socket.on('data', (chunk: Buffer) => (text += chunk.toString()))
  await new Promise((resolve) => socket.on('close', resolve))
  return text
}

async function replies(socket: Socket, count: number): Promise<Record<string, unknown>[]> {
  let text = ''
  socket.on('data', (chunk: Buffer) => (text += chunk.toString()))
  await until(() => text.split('\0').length > count)
  return text
    .split('\0')
    .slice(0, -1)
    .map((each) => JSON.parse(each) as Record<string, unknown>)
}

const call = (method: string, parameters: object = {}) => `${JSON.stringify({ method: `${INTERFACE.name}.${method}`, parameters })}\0`

/** The error of a call, without its interface, and its parameters; undefined if there is none. */
async function refusal(work: Promise<unknown>): Promise<string | undefined> {
  try {
    await work
    return undefined
  } catch (error) {
    if (!(error instanceof VarlinkError)) throw error
    const { parameters } = error
    t.equal(checkError(error), undefined, 'as the interface has it')
    return [error.error.split('.').at(-1), ...Object.values(parameters)].join(' ')
  }
}

function checkError({ error, parameters }: VarlinkError): string | undefined {
  if (error.startsWith(`${SERVICE}.`)) return undefined
  const type = INTERFACE.errors.get(error.slice(INTERFACE.name.length + 1))
  return type === undefined ? error : INTERFACE.mismatch(parameters, type)
}

/** Is as it was, and has nothing that it had not. */
async function unharmed(t: Test, tree: RunningTree, before: number): Promise<void> {
  const disk = loopDisk(t)
  const fd = openSync(join(tree.mountpoint, disk.diskseq()), 'r')
  closeSync(fd)
  await until(() => descriptors(tree.pid).length <= before, 10_000)
  t.match(JSON.parse((await cli('status', '--tree', tree.mountpoint, '--json')).stdout), { pid: tree.pid, now: { leases: 0 } })
}

async function start(t: Test, twin?: Twin) {
  const tree = await startTree(t, { ...(twin && { twin }) })
  const path = findControlSocket(tree.mountpoint)
  const connect = async () => {
    const client = await Client.connect(path)
    cleanup(t, () => client.close())
    return client
  }
  // The first disk that is opened takes more than itself.
  closeSync(openSync(join(tree.mountpoint, loopDisk(t).diskseq()), 'r'))
  await until(() => openDevices(tree.pid).length === 0)
  return { tree, path, connect, before: descriptors(tree.pid).length }
}

t.test('it describes itself, and replies as the interface says', async (t) => {
  const { tree, connect } = await start(t)
  const client = await connect()
  t.match(await client.call(`${SERVICE}.GetInfo`), { vendor: 'diskseqfs', interfaces: [INTERFACE.name, SERVICE] })
  t.equal((await client.call(`${SERVICE}.GetInterfaceDescription`, { interface: INTERFACE.name }))['description'], INTERFACE.text)
  t.match((await client.call(`${SERVICE}.GetInterfaceDescription`, { interface: SERVICE }))['description'], /^interface org\.varlink/)
  const file = join(scratch(t), 'file')
  writeFileSync(file, '')
  truncateSync(file, 1 << 20)
  const fd = openSync(file, 'r+')
  cleanup(t, () => closeSync(fd))
  const given = { fileDescriptor: 0, rule: 'connection', graceSeconds: 5, file: 'a', reason: 'b', share: true, partscan: true, offset: 512 }
  for (const [method, parameters, fds] of [
    ['Attach', given, [fd]],
    ['Attach', { ...given, reason: null, offset: null }, [fd]],
    ['ListLeases', {}, []],
    ['Status', {}, []],
  ] as const) {
    const reply = await client.call(`${INTERFACE.name}.${method}`, parameters, fds)
    t.equal(INTERFACE.mismatch(reply, INTERFACE.methods.get(method)?.gives as Type), undefined, JSON.stringify(reply))
  }
  const { leases } = (await client.call(`${INTERFACE.name}.ListLeases`)) as { leases: { name: string }[] }
  const released = await client.call(`${INTERFACE.name}.Release`, { what: leases[0]?.name })
  t.strictSame(released['leases'], leases.slice(0, 1))
  t.equal(tree.log().filter(({ level }) => level === 'warn').length, 0)
})

t.test('what it does not know, or not so, is refused', async (t) => {
  const { tree, connect, before } = await start(t)
  const client = await connect()
  const refused = (method: string, parameters: object = {}, fds: readonly number[] = []) =>
    refusal(client.call(method, parameters as Record<string, unknown>, fds))
  t.equal(await refused('io.diskseqfs.Nothing'), 'MethodNotFound io.diskseqfs.Nothing')
  t.equal(await refused('io.diskseqfs.toString'), 'MethodNotFound io.diskseqfs.toString')
  t.equal(await refused('io.diskseqfsAttach'), 'InterfaceNotFound io')
  t.equal(await refused('Attach'), 'InterfaceNotFound ')
  t.equal(await refused(`${SERVICE}.GetInterfaceDescription`, { interface: 'x' }), 'InterfaceNotFound x')
  t.equal(await refused(`${SERVICE}.GetInterfaceDescription`), 'InvalidParameter interface')
  const file = openSync(join(scratch(t), 'file'), 'w+')
  cleanup(t, () => closeSync(file))
  for (const [parameters, wrong] of [
    [{}, 'fileDescriptor'],
    [{ fileDescriptor: 1 }, 'fileDescriptor'],
    [{ fileDescriptor: -1 }, 'fileDescriptor'],
    [{ fileDescriptor: 0.5 }, 'fileDescriptor'],
    [{ fileDescriptor: '0' }, 'fileDescriptor'],
    [{ fileDescriptor: 0, other: 1 }, 'other'],
    [{ fileDescriptor: 0, rule: 'for ever' }, 'rule'],
    [{ fileDescriptor: 0, graceSeconds: -1 }, 'graceSeconds'],
    [{ fileDescriptor: 0, graceSeconds: 2 ** 40 }, 'graceSeconds'],
    [{ fileDescriptor: 0, offset: -1 }, 'offset'],
    [{ fileDescriptor: 0, offset: 2 ** 60 }, 'offset'],
    [{ fileDescriptor: 0, sectorSize: 511 }, 'sectorSize'],
    [{ fileDescriptor: 0, readOnly: 1 }, 'readOnly'],
    [{ fileDescriptor: 0, reason: 'x'.repeat(5000) }, 'reason'],
  ] as const) {
    t.equal(await refused('io.diskseqfs.Attach', parameters, [file]), `InvalidParameter ${wrong}`, JSON.stringify(parameters).slice(0, 100))
  }
  t.equal(await refused('io.diskseqfs.Release', { what: 'lease-00000000' }), 'NoSuchLease lease-00000000')
  t.equal(await refused('io.diskseqfs.Release', { what: '' }), 'NoSuchLease ')
  client.close()
  await unharmed(t, tree, before)
})

t.test('descriptors of what cannot be a disk', async (t) => {
  const { tree, connect, before } = await start(t)
  const client = await connect()
  const dir = scratch(t)
  const file = (name: string, size: number) => {
    writeFileSync(join(dir, name), '')
    truncateSync(join(dir, name), size)
    return join(dir, name)
  }
  const fifo = join(dir, 'fifo')
  execFileSync('mkfifo', [fifo])
  const whole = file('whole', 1 << 20)
  const disk = loopDisk(t)
  for (const [path, flags, says, parameters] of [
    [dir, constants.O_RDONLY, /EINVAL neither a regular file nor a block device/],
    ['/dev/null', constants.O_RDWR, /EINVAL neither/],
    [fifo, constants.O_RDWR, /EINVAL neither/],
    [file('empty', 0), constants.O_RDWR, /EINVAL the file is empty/],
    [file('odd', 1000), constants.O_RDWR, /EINVAL 1000 bytes are no whole number/],
    [whole, constants.O_WRONLY, /EBADF the descriptor is not open for reading/],
    [whole, native.O_PATH, /EBADF the descriptor is not open for reading/],
    [whole, constants.O_RDWR, /EINVAL the offset is not within the file/, { offset: 1 << 20 }],
    [whole, constants.O_RDWR, /EINVAL offset and size reach beyond/, { offset: 512, size: 1 << 20 }],
    [disk.path, native.O_PATH, /EBADF/],
    [disk.path, constants.O_RDONLY, /InvalidParameter partscan/, { partscan: true }],
    [disk.path, constants.O_RDONLY, /InvalidParameter share/, { share: true }],
  ] as const) {
    const fd = openSync(path, flags)
    const error = await refusal(client.call('io.diskseqfs.Attach', { fileDescriptor: 0, ...parameters }, [fd]))
    closeSync(fd)
    t.match(error, says, path)
  }
  client.close()
  await unharmed(t, tree, before)
})

t.test('more descriptors than any call needs', async (t) => {
  const { tree, connect, path, before } = await start(t)
  const fd = openSync('/dev/null', 'r')
  cleanup(t, () => closeSync(fd))
  const last = await connect()
  t.match(await last.call('io.diskseqfs.Status', {}, Array<number>(16).fill(fd)), { pid: tree.pid })
  last.close()
  for (const count of [17, 253]) {
    const client = await connect()
    await t.rejects(client.call('io.diskseqfs.Status', {}, Array<number>(count).fill(fd)), /closed the connection/, `${count}`)
    client.close()
  }
  // Sixteen at a time, and never a call.
  const socket = native.streamConnect(path)
  for (let i = 0; i < 8; i++) native.sendDescriptors(socket, ' ', Array<number>(16).fill(fd))
  await until(() => native.sendDescriptors(socket, ' ', []) < 0)
  native.close(socket)
  await unharmed(t, tree, before)
})

t.test('what is no call', async (t) => {
  const { tree, path, before } = await start(t)
  for (const [what, bytes] of [
    ['garbage', Buffer.from('\xff\xfe garbage \0', 'latin1')],
    ['nothing', '\0'],
    ['no object', '[]\0'],
    ['null', 'null\0'],
    ['no method', '{}\0'],
    ['a method that is none', '{"method": 1}\0'],
    ['parameters that are none', '{"method": "io.diskseqfs.Status", "parameters": [1]}\0'],
    ['deep JSON', `${'['.repeat(MESSAGE_MAX - 10)}\0`],
    ['deep parameters', `{"method":"x","parameters":${'{"a":'.repeat(10_000)}1${'}'.repeat(10_000)}}\0`],
    ['HTTP', 'GET / HTTP/1.1\r\n\r\n\0'],
    ['64 KiB without an end', 'x'.repeat(MESSAGE_MAX)],
    ['10 MB', Buffer.alloc(10 << 20, 'x')],
  ] as const) {
    const socket = await raw(t, path)
    const closed = untilClosed(socket)
    socket.write(bytes)
    if (what === 'deep parameters') socket.end()
    t.match(await closed, what === 'deep parameters' ? /InterfaceNotFound/ : /^$/, what)
  }
  const half = await raw(t, path)
  half.end('{"method": "io.disk')
  t.equal(await untilClosed(half), '', 'half a call')
  await unharmed(t, tree, before)
})

t.test('calls behind each other are answered in order, those that want no answer are not', async (t) => {
  const { path } = await start(t)
  const socket = await raw(t, path)
  const oneway = call('Status').replace('{', '{"oneway":true,')
  socket.write(Array.from({ length: 50 }, (_, i) => oneway + call('Release', { what: `${i}` })).join(''))
  const found = await replies(socket, 50)
  t.strictSame(
    found.map(({ parameters }) => (parameters as { what: string }).what),
    found.map((_, i) => `${i}`),
  )
})

t.test('a call that comes byte by byte', async (t) => {
  const { path, tree } = await start(t)
  const socket = await raw(t, path)
  socket.setNoDelay(true)
  for (const byte of call('Status')) {
    socket.write(byte)
    await new Promise((resolve) => setImmediate(resolve))
  }
  t.match(await replies(socket, 1), [{ parameters: { pid: tree.pid } }])
})

t.test('a thousand connections', async (t) => {
  const { tree, path, connect, before } = await start(t)
  const sockets = await Promise.all(Array.from({ length: 1000 }, () => raw(t, path)))
  const refused = sockets.slice(CONNECTIONS_MAX + 100).map(untilClosed)
  t.match(await refused[0], /TooManyConnections.*64/)
  t.match(await cli('leases', '--tree', tree.mountpoint), { code: 1, stderr: /64 clients are connected already/ })
  await Promise.all(refused)
  for (const socket of sockets) socket.destroy()
  await until(async () => {
    const client = await connect()
    const refused = await refusal(client.call('io.diskseqfs.Status'))
    client.close()
    return refused === undefined
  })
  await unharmed(t, tree, before)
})

onlyAtLength('a client that never reads', {}, async (t) => {
  const { tree, path, before } = await start(t)
  const socket = await raw(t, path)
  socket.pause()
  const memory = resident(tree.pid)
  const calls = call('Status').repeat(1000)
  const closed = new Promise((resolve) => socket.on('close', resolve))
  let open = true
  void closed.then(() => (open = false))
  for (let i = 0; i < 200 && open; i++) {
    if (!socket.write(calls)) await Promise.race([new Promise((resolve) => socket.once('drain', resolve)), closed])
  }
  await closed
  t.ok(resident(tree.pid) - memory < 40, `${(resident(tree.pid) - memory).toFixed(1)} MiB more`)
  const cutOff = () => tree.log().find(({ why }) => why !== undefined)
  // It comes by another pipe.
  await until(() => cutOff() !== undefined)
  t.match(cutOff(), { level: 'warn', why: 'a client that does not read its reply' })
  await unharmed(t, tree, before)
})

/** How many of a thousand calls are answered before the one of another client. */
async function answeredBefore(t: Test, twin?: Twin): Promise<number> {
  const { path, connect } = await start(t, twin)
  const socket = await raw(t, path)
  let answered = 0
  socket.on('data', (chunk: Buffer) => (answered += chunk.filter((byte) => byte === 0).length))
  const client = await connect()
  socket.write(call('Status').repeat(1000))
  await until(() => answered > 0)
  await client.call('io.diskseqfs.Status')
  const before = answered
  await until(() => answered === 1000)
  return before
}

t.test('nobody waits for one who has many calls', async (t) => {
  const before = await answeredBefore(t)
  t.ok(before < 1000, `${before} of 1000 answered before the other one`)
})

t.test('twin: if all calls that there are are answered at once, everybody does', async (t) => {
  t.equal(await answeredBefore(t, 'calls-at-once'), 1000)
})

t.test('descriptors are of the call that they came with', async (t) => {
  const { tree, path } = await start(t)
  const file = join(scratch(t), 'file')
  writeFileSync(file, Buffer.alloc(1 << 20))
  const fd = openSync(file, 'r+')
  cleanup(t, () => closeSync(fd))
  const attach = (reason: string) => call('Attach', { fileDescriptor: 0, rule: 'connection', reason })
  for (const [first, expected] of [
    [call('Status'), { pid: tree.pid }],
    [attach('without'), { parameter: 'fileDescriptor' }],
  ] as const) {
    const socket = native.streamConnect(path)
    cleanup(t, () => native.close(socket))
    // It finds both at once.
    process.kill(tree.pid, 'SIGSTOP')
    native.sendDescriptors(socket, first, [])
    native.sendDescriptors(socket, attach('with'), [fd])
    process.kill(tree.pid, 'SIGCONT')
    const buffer = Buffer.alloc(65_536)
    let text = ''
    await until(() => {
      const found = native.receiveDescriptors(socket, buffer, false)
      if (typeof found !== 'number') text += buffer.toString('utf8', 0, found[0])
      return text.split('\0').length > 2
    })
    const [one, two] = text.split('\0').map((each) => (each === '' ? undefined : (JSON.parse(each) as { parameters: object }).parameters))
    t.match(one, expected)
    t.match(two, { lease: { reason: 'with' } })
  }
})

t.test('a connection does not hold its own other end', async (t) => {
  const { tree, path, before } = await start(t)
  for (let i = 0; i < CONNECTIONS_MAX + 5; i++) {
    const socket = native.streamConnect(path)
    if (socket < 0) throw new Error(`connection ${i}`)
    native.sendDescriptors(socket, '{', [socket])
    native.close(socket)
  }
  await unharmed(t, tree, before)
})

/** What a user gets who could connect, and whether he can: first as it is, then with a socket that is open to him. */
async function nobody(t: Test, twin?: Twin) {
  const { tree, path } = await start(t, twin)
  const ask = () =>
    run('setpriv', [
      ...['--reuid=65534', '--regid=65534', '--clear-groups', '/usr/bin/python3', '-c'],
      `import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
try: s.send(b'{"method":"io.diskseqfs.Status"}\\0')
except BrokenPipeError: pass # the answer does not wait for a call
print(s.recv(1000))`,
      path,
    ])
  const closed = await ask()
  const directory = dirname(path)
  chmodSync(directory, 0o755)
  cleanup(t, () => chmodSync(directory, 0o700))
  chmodSync(path, 0o666)
  return { tree, closed, open: await ask() }
}

t.test('other users get nothing, also where the socket is open to them', async (t) => {
  const { tree, closed, open } = await nobody(t)
  t.match(closed, { code: 1, stderr: /PermissionError/ })
  t.match(open, { code: 0, stdout: /PermissionDenied/ })
  t.strictSame(
    tree.log().filter(({ level }) => level !== 'info'),
    [],
  )
})

t.test('twin: if whoever can connect is taken for root, they are answered', async (t) => {
  t.match((await nobody(t, 'peers-believed')).open, { code: 0, stdout: /"pid":/ })
})

t.test('what the command line refuses', async (t) => {
  const { tree } = await start(t)
  const dir = scratch(t)
  mkdirSync(join(dir, 'directory'))
  writeFileSync(join(dir, 'file'), Buffer.alloc(4096))
  const attach = (...args: string[]) => cli('attach', '--tree', tree.mountpoint, ...args)
  for (const [args, code, says] of [
    [[join(dir, 'directory')], 1, /directory: a directory cannot be a disk/],
    [[join(dir, 'none')], 1, /none: no such file/],
    [[''], 1, /an empty argument/],
    [['--keep', '--grace', '3', join(dir, 'file')], 2, /exclude each other/],
    [['--fd', join(dir, 'file')], 2, /--fd is for attach with a command/],
    [['--grace', 'x', join(dir, 'file')], 2, /number of seconds/],
    [['--share', join(dir, 'file'), '--', 'true'], 125, /--share is for attach without a command/],
    [['--size', '8K', join(dir, 'file')], 1, /file: offset and size reach beyond the end of the file/],
  ] as const) {
    t.match(await attach(...args), { code, stdout: '', stderr: says }, args.join(' '))
  }
  t.match(await cli('leases', '--tree', dir), { code: 1, stderr: /no tree is mounted there/ })
})
