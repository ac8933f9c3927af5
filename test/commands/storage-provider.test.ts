// SPDX-License-Identifier: MIT
/**
 * Disks as storage volumes of systemd: what a client of io.systemd.StorageProvider gets. That systemd's own clients are content is seen
 * in a virtual machine.
 */
import { spawn } from 'node:child_process'
import { existsSync, symlinkSync, unlinkSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { cleanup, CLI, loopDisk, run, scratch, until } from '../helpers/tree.js'

/** Makes calls one after another; of a descriptor that comes, which disk it is, and whether it may be written to. */
const CLIENT = `import array, fcntl, json, os, socket, struct, sys
BLKGETDISKSEQ = 0x80081280
os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3]))
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
text, fds, results = b'', [], []
def message():
    global text
    while b'\\0' not in text:
        more, new, _, _ = socket.recv_fds(client, 1 << 16, 8)
        if not more: raise EOFError
        text += more; fds.extend(new)
    found, text = text.split(b'\\0', 1)
    return json.loads(found)
for call in json.loads(sys.argv[2]):
    client.sendall(json.dumps(call).encode() + b'\\0')
    replies = []
    while True:
        try: replies.append(message())
        except EOFError: replies.append('closed'); break
        if not replies[-1].pop('continues', False): break
    opened = []
    for fd in fds:
        number = bytearray(8)
        fcntl.ioctl(fd, BLKGETDISKSEQ, number)
        opened.append([str(struct.unpack('Q', number)[0]), fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE])
        os.close(fd)
    fds.clear()
    results.append({'replies': replies, 'opened': opened})
print(json.dumps(results))`

interface Answer {
  readonly replies: readonly { readonly error?: string; readonly parameters: Record<string, unknown> }[]
  /** diskseq, and the access mode of open(2) */
  readonly opened: readonly (readonly [string, number])[]
}

/** A socket that does what diskseqfs-storage.socket does. */
async function listen(t: Test, ended: (code: number | null) => void = () => {}): Promise<string> {
  const path = join(scratch(t), 'socket')
  const processes: Promise<void>[] = []
  const server = createServer({ pauseOnConnect: true }, (socket) => {
    const command = ['-c', 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"', 'sh', process.execPath, CLI, 'storage-provider']
    const child = spawn('sh', command, { stdio: ['ignore', 'ignore', 'inherit', socket] })
    processes.push(new Promise((resolve) => child.on('close', resolve)).then(ended as () => void))
    socket.destroy()
  })
  await new Promise<void>((resolve) => server.listen(path, resolve))
  cleanup(t, async () => {
    await Promise.all(processes)
    server.close()
  })
  return path
}

async function call(path: string, calls: readonly object[], uid = 0): Promise<Answer[]> {
  const { code, stdout, stderr } = await run('python3', ['-c', CLIENT, path, JSON.stringify(calls), String(uid)])
  if (code !== 0) throw new Error(stderr)
  return JSON.parse(stdout) as Answer[]
}

const INTERFACE = 'io.systemd.StorageProvider'
const acquire = (parameters: object) => ({ method: `${INTERFACE}.Acquire`, parameters })
const list = (parameters: object = {}) => ({ method: `${INTERFACE}.ListVolumes`, parameters, more: true })

t.test('a volume is the disk or partition of its name', async (t) => {
  const [disk, other] = [loopDisk(t), loopDisk(t)]
  disk.addPartition(1, 64, 64)
  const codes: unknown[] = []
  const path = await listen(t, (code) => codes.push(code))
  const [a, b, part, readOnly] = await call(path, [
    acquire({ name: disk.diskseq() }),
    acquire({ name: other.diskseq(), createMode: 'open', requestAs: 'blk', readOnly: false, template: '' }),
    acquire({ name: `${disk.diskseq()}p1`, createMode: 'any' }),
    acquire({ name: disk.diskseq(), readOnly: true }),
  ])
  t.match(a, { replies: [{ parameters: { fileDescriptorIndex: 0, type: 'blk', readOnly: false } }], opened: [[disk.diskseq(), 2]] })
  t.match(b, { opened: [[other.diskseq(), 2]] })
  t.match(part, { replies: [{ parameters: { readOnly: false } }], opened: [[disk.diskseq(), 2]] })
  t.match(readOnly, { replies: [{ parameters: { readOnly: true } }], opened: [[disk.diskseq(), 0]] })
  await until(() => codes.length === 1)
  t.strictSame(codes, [0], 'its process ends with the connection')
})

t.test('a disk that cannot be written to is had for reading, unless it was to be written to', async (t) => {
  const disk = loopDisk(t)
  t.equal((await run('blockdev', ['--setro', disk.path])).code, 0)
  const path = await listen(t)
  const [either, writable] = await call(path, [acquire({ name: disk.diskseq() }), acquire({ name: disk.diskseq(), readOnly: false })])
  t.match(either, { replies: [{ parameters: { readOnly: true } }], opened: [[disk.diskseq(), 0]] })
  t.match(writable, { replies: [{ error: `${INTERFACE}.ReadOnlyVolume` }], opened: [] })
})

t.test('what cannot be had is an error, and nothing is opened', async (t) => {
  const [disk, gone] = [loopDisk(t), loopDisk(t)]
  const name = disk.diskseq()
  const dead = gone.diskseq()
  gone.detach()
  const wrong: readonly (readonly [object, string])[] = [
    [acquire({ name: dead }), 'NoSuchVolume'],
    [acquire({ name: `${name}p7` }), 'NoSuchVolume'],
    ...['', '0', '-1', 'loop0', disk.path, '../loop0', 'dm:', 'dm:..', 'dm:a/b', 'dm:control', 'dm:no such', 'x\u0000y'].map(
      (name) => [acquire({ name }), 'NoSuchVolume'] as const,
    ),
    [acquire({ name, createMode: 'new' }), 'CreateNotSupported'],
    [acquire({ name, template: 'sparse-file' }), 'NoSuchTemplate'],
    [acquire({ name, requestAs: 'reg' }), 'TypeNotSupported'],
    [acquire({ name, requestAs: 'dir' }), 'TypeNotSupported'],
    [acquire({ name: dead, requestAs: 'reg' }), 'NoSuchVolume'],
    [list({ matchName: 'no such*' }), 'NoSuchVolume'],
    [list({ matchName: '[z-a]' }), 'NoSuchVolume'],
    [{ method: `${INTERFACE}.ListTemplates`, more: true }, 'NoSuchTemplate'],
  ]
  const answers = await call(
    await listen(t),
    wrong.map(([call]) => call),
  )
  for (const [i, [call, error]] of wrong.entries()) {
    t.match(answers[i], { replies: [{ error: `${INTERFACE}.${error}` }], opened: [] }, JSON.stringify(call))
  }
  const [few, bad, member] = await call(await listen(t), [
    { ...list(), more: false },
    acquire({ name: 13 }),
    { method: `${INTERFACE}.Destroy`, parameters: {} },
  ])
  t.match(few, { replies: [{ error: 'org.varlink.service.ExpectedMore' }] })
  t.match(bad, { replies: [{ error: 'org.varlink.service.InvalidParameter', parameters: { parameter: 'name' } }] })
  t.match(member, { replies: [{ error: 'org.varlink.service.MethodNotFound' }] })
})

t.test('disks and partitions that are not empty are listed, a reply each', async (t) => {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  const path = await listen(t)
  const [all, some] = await call(path, [list(), list({ matchName: `${disk.diskseq()}*` })])
  const names = all?.replies.map(({ parameters }) => parameters['name'])
  for (const name of [disk.diskseq(), `${disk.diskseq()}p1`]) t.ok(names?.includes(name), name)
  const part = some?.replies.find(({ parameters }) => parameters['name'] === `${disk.diskseq()}p1`)
  t.strictSame(part, { parameters: { name: `${disk.diskseq()}p1`, type: 'blk', readOnly: false, sizeBytes: 64 * 512 } })
  t.ok((some?.replies.length ?? 0) < (all?.replies.length ?? 0) || all?.replies.length === 2)
})

t.test('a name of device-mapper that leads to another device is refused', async (t) => {
  const disk = loopDisk(t)
  if (!existsSync('/dev/mapper')) return void t.comment('no /dev/mapper here: seen in a virtual machine')
  const link = `/dev/mapper/diskseqfs-test-${process.pid}`
  symlinkSync(disk.path, link)
  cleanup(t, () => unlinkSync(link))
  const [answer] = await call(await listen(t), [acquire({ name: `dm:diskseqfs-test-${process.pid}` })])
  t.match(answer, { replies: [{ error: `${INTERFACE}.NoSuchVolume` }], opened: [] })
})

t.test('it describes itself', async (t) => {
  const [info, description] = await call(await listen(t), [
    { method: 'org.varlink.service.GetInfo' },
    { method: 'org.varlink.service.GetInterfaceDescription', parameters: { interface: INTERFACE } },
  ])
  t.match(info, { replies: [{ parameters: { product: 'diskseqfs', interfaces: [INTERFACE, 'org.varlink.service'] } }] })
  t.match(description?.replies[0]?.parameters['description'], /^interface io\.systemd\.StorageProvider$/m)
})

t.test('only root is served', async (t) => {
  const path = await listen(t)
  await run('chmod', ['755', join(path, '..')])
  await run('chmod', ['666', path])
  const [answer] = await call(path, [list()], 65534)
  t.match(answer, { replies: [{ error: 'org.varlink.service.PermissionDenied' }], opened: [] })
})

t.test('it is for the service manager to start', async (t) => {
  for (const env of [[], ['LISTEN_FDS=1', 'LISTEN_PID=1']]) {
    const { code, stderr } = await run('env', [...env, process.execPath, CLI, 'storage-provider'])
    t.equal(code, 2)
    t.match(stderr, /^diskseqfs: systemd starts this for each connection, by diskseqfs-storage\.socket: see storagectl\(1\)\n$/)
  }
})
