// SPDX-License-Identifier: MIT
/**
 * Leases: disks that the daemon holds until a time is over, a connection is closed, or it is told to let go; whatever dies meanwhile,
 * nothing is left over, and nothing that was promised is lost.
 */
import { execFileSync, spawn } from 'node:child_process'
import { closeSync, openSync, readFileSync, readSync, statSync, truncateSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { Client, findControlSocket } from '../../src/broker/client.js'
import type { VarlinkError } from '../../src/broker/varlink.js'
import { type Change, changedGuard } from '../helpers/guard.js'
import { LONG, onlyAtLength, twoForms } from '../helpers/long.js'
import { ROOT } from '../helpers/root.js'
import {
  boundTo,
  cleanup,
  CLI,
  cli,
  hangingFile,
  image,
  killAtOnce,
  loopDisk,
  type ManagedTree,
  run,
  scratch,
  sleep,
  startManaged,
  startTree,
  type Twin,
  until,
  uses,
} from '../helpers/tree.js'

interface Lease {
  readonly lease: string
  readonly name: string
  readonly path: string
  readonly kernelName: string
  readonly rule: string
  readonly graceSeconds?: number
}

const SECONDS = 1000

function head(path: string, bytes: number): string {
  const fd = openSync(path, 'r')
  const buffer = Buffer.alloc(bytes)
  readSync(fd, buffer)
  closeSync(fd)
  return buffer.toString()
}

async function connect(t: Test, mountpoint: string): Promise<Client> {
  const client = await Client.connect(findControlSocket(mountpoint))
  cleanup(t, () => client.close())
  return client
}

async function attach(client: Client, file: string, parameters: object = {}, flags = 'r+'): Promise<Lease> {
  const fd = openSync(file, flags)
  try {
    const reply = await client.call('io.diskseqfs.Attach', { fileDescriptor: 0, ...parameters }, [fd])
    return reply['lease'] as Lease
  } finally {
    closeSync(fd)
  }
}

const all = async (client: Client) => (await client.call('io.diskseqfs.ListLeases'))['leases'] as Lease[]

async function leasesOf(mountpoint: string): Promise<Lease[]> {
  const { code, stdout, stderr } = await cli('leases', '--tree', mountpoint, '--json')
  if (code !== 0) throw new Error(stderr)
  return (JSON.parse(stdout) as { leases: Lease[] }).leases
}

t.test('a file is a disk for a time; who has opened it by then holds it himself', async (t) => {
  const { mountpoint } = await startTree(t)
  const file = image(scratch(t), 'hello')
  const { code, stdout, stderr } = await cli('attach', '--tree', mountpoint, '--grace', '2', file)
  t.match({ code, stderr }, { code: 0, stderr: '' })
  const path = stdout.trimEnd()
  t.match(path, new RegExp(`^${mountpoint}/\\d+$`))
  t.equal(head(path, 5), 'hello')
  const fd = openSync(path, 'r')
  await until(async () => (await leasesOf(mountpoint)).length === 0, 10 * SECONDS)
  await sleep(500)
  t.equal(boundTo(file).length, 1, 'it is there for who has it open')
  closeSync(fd)
  await until(() => boundTo(file).length === 0)
  t.throws(() => statSync(path), { code: 'ENOENT' })
})

t.test('a lease that nobody is told of ends', async (t) => {
  const { mountpoint } = await startTree(t)
  const file = image(scratch(t), 'unheard')
  const attach = `exec "$0" '${CLI}' attach --tree '${mountpoint}' --keep '${file}'`
  for (const [redirect, errno] of [
    ['>/dev/full', 'ENOSPC'],
    ['| true', 'EPIPE'],
  ] as const) {
    const { code, stderr } = await run('bash', ['-c', `set -o pipefail; (sleep 0.1; ${attach}) ${redirect}`, process.execPath])
    t.equal(code, 1, redirect)
    t.match(stderr, new RegExp(`^diskseqfs: standard output: ${errno}; the lease was ended\n$`))
    t.strictSame(await leasesOf(mountpoint), [])
    await until(() => boundTo(file).length === 0)
  }
})

t.test('or until it is detached, by the lease or by the name of the disk', async (t) => {
  const { mountpoint } = await startTree(t)
  const file = image(scratch(t), 'kept')
  const lend = async (...args: string[]) => JSON.parse((await cli('attach', '--tree', mountpoint, '--json', ...args)).stdout) as Lease
  const kept = await lend('--keep', '--reason', 'a \u001b[1mguest', file)
  t.match(kept, { rule: 'keep', file, reason: 'a \u001b[1mguest', partition: 0, deviceNumber: /^7:\d+$/ })
  t.match(
    (await cli('leases', '--tree', mountpoint)).stdout,
    new RegExp(`^LEASE .*\\n${kept.lease} +${kept.name} .* keep .*${file} a \\?\\[1mguest\\n$`),
  )
  const again = await lend(kept.path)
  t.match(again, { name: kept.name, rule: 'grace', graceSeconds: 30, kernelName: kept.kernelName })
  t.equal((await cli('detach', '--tree', mountpoint, kept.lease)).code, 0)
  await sleep(200)
  t.equal(boundTo(file).length, 1, 'there is another lease')
  t.strictSame(
    (await leasesOf(mountpoint)).map(({ lease }) => lease),
    [again.lease],
  )
  t.equal((await cli('detach', '--tree', mountpoint, kept.name)).code, 0)
  await until(() => boundTo(file).length === 0)
  t.match(await cli('detach', '--tree', mountpoint, kept.name), { code: 1, stderr: /there is no such lease/ })
  t.match((await cli('status', '--tree', mountpoint)).stdout, /^now: .*leases 0,/m)
})

t.test('or until the connection is closed', async (t) => {
  const { mountpoint } = await startTree(t)
  const file = image(scratch(t), 'mine')
  const client = await connect(t, mountpoint)
  const lease = await attach(client, file, { rule: 'connection' })
  t.equal(head(lease.path, 4), 'mine')
  client.close()
  await until(() => boundTo(file).length === 0)
  t.strictSame(await leasesOf(mountpoint), [])
})

t.test('a disk that is there is held as it is', async (t) => {
  const { mountpoint, pid } = await startTree(t)
  const disk = loopDisk(t)
  const client = await connect(t, mountpoint)
  for (const path of [disk.path, join(mountpoint, disk.diskseq())]) {
    const lease = await attach(client, path)
    t.match(lease, { name: disk.diskseq(), kernelName: disk.kname })
    // But for a look at its owner and mode.
    await until(() => !uses(pid, disk.path))
    t.pass('the daemon is not among the users of its node')
    const { lease: id } = lease
    // It is detached when nobody has it any more.
    if (path !== disk.path) {
      disk.detach()
      await sleep(200)
      t.equal(head(lease.path, 1), '\0', 'and stays what it is')
    }
    await client.call('io.diskseqfs.Release', { what: id })
  }
  await until(() => boundTo(disk.file).length === 0)
})

t.test('a file that is not open for writing makes a disk that is read-only', async (t) => {
  const { mountpoint } = await startTree(t)
  const file = image(scratch(t), 'ro')
  const client = await connect(t, mountpoint)
  const { kernelName } = await attach(client, file, {}, 'r')
  t.equal(readFileSync(`/sys/block/${kernelName}/ro`, 'utf8'), '1\n')
})

t.test('those who share the same part of a file in the same way get one disk', async (t) => {
  const { mountpoint } = await startTree(t)
  const file = image(scratch(t), 'shared')
  const all = await Promise.all(
    Array.from({ length: 60 }, async () => {
      const client = await connect(t, mountpoint)
      return attach(client, file, { share: true, rule: 'connection' }, 'r')
    }),
  )
  t.equal(new Set(all.map(({ name }) => name)).size, 1, 'sixty at once')
  t.equal(boundTo(file).length, 1)
  const client = await connect(t, mountpoint)
  const [name] = all.map((lease) => lease.name)
  t.not((await attach(client, file, { share: true })).name, name, 'not if it is for writing')
  t.not((await attach(client, file, { share: true, size: 8192 }, 'r')).name, name, 'or of another size')
  t.not((await attach(client, file, {}, 'r')).name, name, 'or not to be shared')
  t.equal(boundTo(file).length, 4)
})

t.test('one that is shared goes on while anybody has it open, without any lease', async (t) => {
  const { mountpoint } = await startTree(t)
  const file = image(scratch(t), 'used')
  const client = await connect(t, mountpoint)
  const first = await attach(client, file, { share: true })
  const fd = openSync(first.path, 'r')
  await client.call('io.diskseqfs.Release', { what: first.name })
  const second = await attach(client, file, { share: true })
  t.equal(second.name, first.name)
  closeSync(fd)
  await client.call('io.diskseqfs.Release', { what: first.name })
  await until(() => boundTo(file).length === 0)
  t.not((await attach(client, file, { share: true })).name, first.name, 'and no longer')
})

t.test('of a loop device that gets another file, which is another disk, no lease is left', async (t) => {
  const { mountpoint } = await startTree(t)
  const disk = loopDisk(t, { args: ['--read-only'] })
  const client = await connect(t, mountpoint)
  const { lease } = await attach(client, disk.path, { rule: 'keep' }, 'r')
  const other = image(scratch(t), 'other')
  execFileSync('python3', [
    '-c',
    'import fcntl,os,sys; fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x4C06, os.open(sys.argv[2], os.O_RDONLY))',
    disk.path,
    other,
  ])
  await until(async () => !(await leasesOf(mountpoint)).some((each) => each.lease === lease))
})

// What survives

/** One lease of each rule, and who asked for them. */
async function threeLeases(t: Test, tree: ManagedTree) {
  const dir = scratch(t)
  const client = await connect(t, tree.mountpoint)
  const files = ['keep', 'grace', 'connection'].map((rule) => image(dir, rule))
  const leases: Lease[] = []
  for (const file of files) {
    leases.push(await attach(client, file, { rule: file.slice(file.lastIndexOf('/') + 1), graceSeconds: LONG ? 600 : 60 }))
  }
  return { files, leases, client }
}

const DEATHS = LONG ? 50 : 4

async function survives(t: Test, twin?: Twin): Promise<boolean> {
  const tree = await startManaged(t, { ...(twin && { twin }), expectErrors: true })
  const { files, leases } = await threeLeases(t, tree)
  const byName = (found: readonly Lease[]) => found.map(({ lease, name }) => `${lease} ${name}`).sort()
  for (let i = 0; i < DEATHS; i++) {
    const ready = tree.ready()
    if (i % 4 === 3) tree.endGuard('SIGKILL')
    tree.end('SIGKILL')
    await until(() => tree.ready() > ready, 30 * SECONDS)
  }
  const found = await leasesOf(tree.mountpoint)
  if (byName(found).join() !== byName(leases).join()) return false
  for (const [i, { path }] of leases.entries()) {
    const name = (files[i] as string).split('/').at(-1) as string
    t.equal(head(path, name.length), name)
  }
  for (const { lease } of leases) t.equal((await cli('detach', '--tree', tree.mountpoint, lease)).code, 0)
  await until(() => files.flatMap(boundTo).length === 0)
  t.pass('no copy is left anywhere')
  return true
}

t.test(twoForms('leases survive the daemon, and its guard'), async (t) => {
  t.ok(await survives(t))
})

t.test('twin: where no other process stores them, they do not', async (t) => {
  t.notOk(await survives(t, 'leases-forgotten'))
})

t.test('leases survive mount --replace; who asks meanwhile is answered by one of the two', async (t) => {
  const dir = scratch(t)
  const tree = await startTree(t)
  const { mountpoint } = tree
  const client = await connect(t, mountpoint)
  const file = image(dir, 'replaced')
  const { lease, path } = await attach(client, file, { rule: 'keep' })
  for (let i = 0; i < 3; i++) {
    const errors: string[] = []
    let asked = 0
    let stop = false
    const asking = (async () => {
      while (!stop) {
        const { code, stderr } = await cli('attach', '--tree', mountpoint, '--grace', '0', file)
        if (code !== 0) errors.push(stderr)
        asked++
      }
    })()
    const next = spawn('env', ['--unset=NODE_OPTIONS', process.execPath, CLI, 'mount', '-f', '--replace', mountpoint], { stdio: 'ignore' })
    const ended = new Promise((resolve) => next.on('close', resolve))
    cleanup(t, async () => {
      next.kill('SIGTERM')
      await ended
    })
    await until(async () => (await statusOf(mountpoint))?.pid === next.pid, 30 * SECONDS)
    stop = true
    await asking
    t.ok(asked > 0)
    // One whose daemon ended under it is told so, and asks again.
    t.strictSame(
      errors.filter((error) => !/closed the connection before it answered; try again/.test(error)),
      [],
    )
    t.ok((await leasesOf(mountpoint)).some((each) => each.lease === lease))
    t.equal(head(path, 8), 'replaced')
  }
  t.equal((await cli('detach', '--tree', mountpoint, lease)).code, 0)
  await until(() => boundTo(file).length === 0, 20 * SECONDS)
})

async function statusOf(mountpoint: string): Promise<{ pid: number } | undefined> {
  const { code, stdout } = await cli('status', '--tree', mountpoint, '--json')
  return code === 0 ? (JSON.parse(stdout) as { pid: number }) : undefined
}

for (const [twin, stays] of [
  ['dies-bound', false],
  ['dies-held', false],
  ['dies-stored', true],
] as const) {
  t.test(`a daemon that dies at that step of attach (${twin}) leaves ${stays ? 'a lease, which ends' : 'nothing'}`, async (t) => {
    const tree = await startManaged(t, { twin, expectErrors: true })
    const file = image(scratch(t), 'file')
    const ready = tree.ready()
    const { code, stderr } = await cli('attach', '--tree', tree.mountpoint, '--grace', '3', file)
    t.equal(code, 1)
    t.match(stderr, /closed the connection before it answered; try again\n$/)
    await until(() => tree.ready() > ready, 30 * SECONDS)
    t.equal((await leasesOf(tree.mountpoint)).length, stays ? 1 : 0)
    await until(() => boundTo(file).length === 0, 15 * SECONDS)
    t.strictSame(await leasesOf(tree.mountpoint), [])
  })
}

/** As many as would not fit into a socket, a message each. */
const MANY = 400

/** Whether the service manager hears of a daemon in time, with all leases, after the end of the one before, and of both. */
async function manySurvive(t: Test, program?: string): Promise<boolean> {
  const tree = await startManaged(t, { expectErrors: true, messageMs: 20, ...(program !== undefined && { program }) })
  const client = await connect(t, tree.mountpoint)
  const file = image(scratch(t), 'many')
  for (let i = 0; i < MANY; i++) await attach(client, file, { rule: 'keep', share: true, reason: '\u0001'.repeat(4096) })
  for (const end of [() => tree.end('SIGKILL'), () => killAtOnce(tree.guard(), [tree.pid()])]) {
    const before = tree.ready()
    end()
    const began = Date.now()
    await until(() => tree.ready() > before, 60 * SECONDS)
    const took = Date.now() - began
    t.comment(`${took} ms until the service manager heard of the next daemon`)
    if (took >= 10 * SECONDS) return false
    t.equal((await all(await connect(t, tree.mountpoint))).length, MANY)
  }
  const again = await connect(t, tree.mountpoint)
  const [{ name }] = (await all(again)) as [Lease]
  await again.call('io.diskseqfs.Release', { what: name })
  await until(() => boundTo(file).length === 0)
  return true
}

onlyAtLength('hundreds of leases survive, however long what is said of them', {}, async (t) => {
  t.ok(await manySurvive(t), 'ready before all leases are stored')
})

/** The service manager is told of leases before all else. */
const LEASES_FIRST: Change = [
  'tell_removed(socket, false) && tell_stored(socket, untold) && tell_waiting(socket) && tell_removed(socket, true) &&\n         tell_stored(socket, untold_lease)',
  'tell_removed(socket, false) && tell_removed(socket, true) && tell_stored(socket, untold_lease) && tell_stored(socket, untold) && tell_waiting(socket)',
]

t.test('hundreds of leases, twin: if the service manager is given all of them first, it hears of the daemon late', async (t) => {
  t.notOk(await manySurvive(t, changedGuard(t, LEASES_FIRST)))
})

/** Fewer descriptors than that many leases have. */
const STORE_MAX = 48
const MORE_THAN_STORED = 60

/** How many leases of too many for the service manager are left after the end of the daemon, of its guard, of both, and of all. */
async function leftOfTooMany(t: Test, program: string): Promise<number[]> {
  const tree = await startManaged(t, { storeMax: STORE_MAX, expectErrors: true, program })
  const file = image(scratch(t), 'stored')
  const client = await connect(t, tree.mountpoint)
  for (let i = 0; i < MORE_THAN_STORED; i++) await attach(client, file, { rule: 'keep' })
  const left: number[] = []
  for (const end of [
    () => tree.end('SIGKILL'),
    () => tree.endGuard('SIGKILL'),
    () => killAtOnce(tree.guard(), [tree.pid()]),
    async () => killAtOnce(tree.guard(), [tree.pid(), ...(await understudies(tree))]),
  ]) {
    const before = tree.ready()
    await end()
    // Also the next guard starts a daemon, and has an understudy by then.
    await until(() => tree.ready() > before, 60 * SECONDS)
    left.push((await leasesOf(tree.mountpoint)).length)
  }
  await until(() => boundTo(file).length === left.at(-1), 15 * SECONDS)
  t.pass('the devices of the others are free')
  return left
}

// As where the service manager happens to read them first.
t.test('a service manager that stores no more costs no lease, while guard or understudy live', async (t) => {
  const [, ...left] = await leftOfTooMany(t, changedGuard(t, LEASES_FIRST))
  const last = left.pop() as number
  t.strictSame(left, [MORE_THAN_STORED, MORE_THAN_STORED])
  t.ok(last > 0 && last < STORE_MAX, `after the end of all, ${last} that the service manager has`)
})

t.test('twin: if leases take all of its room, the next guard does not find the understudy', async (t) => {
  const everywhere: Change = ['return told < most ? most - told : 0;', 'return SIZE_MAX;']
  t.not((await leftOfTooMany(t, changedGuard(t, LEASES_FIRST, everywhere)))[2], MORE_THAN_STORED)
})

/** Processes of the guard's program beside it: one of them would go on as the guard. */
async function understudies(tree: ManagedTree): Promise<number[]> {
  const { stdout } = await run('pgrep', ['--full', `^[^ ]*/diskseqfs-guard .*${tree.mountpoint}`])
  return stdout
    .split('\n')
    .map(Number)
    .filter((pid) => pid > 0 && pid !== tree.guard())
}

t.test('a file that is shared may get longer, or too short', async (t) => {
  const { mountpoint } = await startTree(t)
  const file = image(scratch(t), 'grows')
  const client = await connect(t, mountpoint)
  const first = await attach(client, file, { share: true })
  truncateSync(file, 4 << 20)
  t.not((await attach(client, file, { share: true })).name, first.name, 'all of it is another disk now')
  t.equal((await attach(client, file, { share: true, size: 1 << 20 })).name, first.name)
  truncateSync(file, 0)
  const refused = await attach(client, file, { share: true }).catch((error: VarlinkError) => error.parameters)
  t.match(refused, { code: 'EINVAL', message: /the file is empty/ })
})

t.test('who shares a file gets that file, while others come and go', async (t) => {
  const { mountpoint } = await startTree(t)
  const dir = scratch(t)
  const [shared, other] = [image(dir, 'A'), image(dir, 'B')]
  const end = Date.now() + 4 * SECONDS
  let wrong = 0
  let count = 0
  const one = async (file: string, parameters: object) => {
    const client = await connect(t, mountpoint)
    while (Date.now() < end) {
      const { lease, kernelName } = await attach(client, file, { rule: 'keep', ...parameters })
      const backing = readFileSync(`/sys/block/${kernelName}/loop/backing_file`, 'utf8').trim()
      if (backing !== file) wrong++
      count++
      await client.call('io.diskseqfs.Release', { what: lease })
    }
  }
  await Promise.all(Array.from({ length: 24 }, (_, i) => (i % 2 === 0 ? one(shared, { share: true }) : one(other, {}))))
  t.equal(wrong, 0, `of ${count}`)
  await until(() => boundTo(shared).length + boundTo(other).length === 0)
})

// A file whose filesystem does not answer

/** Whether the next daemon tells of all leases within some seconds, when the file of one hangs. */
async function afterHang(t: Test, twin?: Twin): Promise<boolean> {
  const { file, hang, recover } = await hangingFile(t)
  const tree = await startManaged(t, { ...(twin && { twin }), expectErrors: true })
  const whole = image(scratch(t), 'whole')
  const client = await connect(t, tree.mountpoint)
  const hung = await attach(client, file, { rule: 'keep' })
  const lease = await attach(client, whole, { rule: 'keep' })
  cleanup(t, recover)
  await hang()
  const ready = tree.ready()
  tree.end('SIGKILL')
  await until(() => tree.ready() > ready, 30 * SECONDS)
  t.equal(head(lease.path, 5), 'whole', 'nobody has to wait for the tree')
  const { stdout } = await run('timeout', ['5', process.execPath, CLI, 'leases', '--tree', tree.mountpoint])
  const both = [hung, lease].every((each) => stdout.includes(each.lease))
  recover()
  for (const each of [hung, lease]) t.equal((await cli('detach', '--tree', tree.mountpoint, each.lease)).code, 0)
  await until(() => boundTo(file).length + boundTo(whole).length === 0)
  return both
}

t.test('a lease whose file hangs keeps nobody from the tree, nor another lease from going on', async (t) => {
  t.ok(await afterHang(t))
})

t.test('twin: if the next daemon asks the files, no lease goes on until that answers', async (t) => {
  t.notOk(await afterHang(t, 'leases-ask-files'))
})

t.test('many that attach one and give up leave nothing, and keep nobody else from it', async (t) => {
  const { file, hang, recover } = await hangingFile(t)
  const tree = await startTree(t)
  const whole = image(scratch(t), 'whole')
  const fd = openSync(file, 'r+')
  cleanup(t, () => closeSync(fd))
  cleanup(t, recover)
  await hang()
  for (let i = 0; i < 100; i++) {
    const client = await connect(t, tree.mountpoint)
    client.call('io.diskseqfs.Attach', { fileDescriptor: 0 }, [fd]).catch(() => {})
    client.close()
  }
  const client = await connect(t, tree.mountpoint)
  const { path, lease } = await attach(client, whole)
  t.equal(head(path, 5), 'whole')
  await client.call('io.diskseqfs.Release', { what: lease })
  recover()
  await until(async () => boundTo(file).length === 0 && (await leasesOf(tree.mountpoint)).length === 0, 20 * SECONDS)
})

t.test('when the tree is taken away, so are its leases, and its socket', async (t) => {
  const file = image(scratch(t), 'gone')
  const tree = await startTree(t)
  const socket = findControlSocket(tree.mountpoint)
  t.equal(statSync(socket).mode & 0o777, 0o600)
  t.equal((await cli('attach', '--tree', tree.mountpoint, '--keep', file)).code, 0)
  await tree.stop()
  await until(() => boundTo(file).length === 0)
  t.throws(() => statSync(socket), { code: 'ENOENT' })
  t.match(await cli('leases', '--tree', tree.mountpoint), { code: 1, stderr: /no tree is mounted there\n$/ })
})

// Cycles

const CYCLES = Number(process.env['CYCLES'] ?? (LONG ? 60 : 3))
const TWIN_CYCLES = 6

/** Attaches, uses and kills, client and daemon, at random moments, eight at a time; the devices that are left two seconds after the last lease ended. */
async function cycles(t: Test, count: number, ...node: string[]): Promise<{ left: number; wrong: number; read: number }> {
  const tree = await startManaged(t, { expectErrors: true, node })
  const dir = scratch(t)
  const files = Array.from({ length: 8 }, (_, i) => image(dir, `file${i}`))
  cleanup(t, async () => {
    for (const file of files) for (const kname of boundTo(file)) await run('losetup', ['--detach', `/dev/${kname}`])
  })
  let wrong = 0
  let read = 0
  const one = async (file: string) => {
    const child = spawn('env', ['--unset=NODE_OPTIONS', process.execPath, CLI, 'attach', '--tree', tree.mountpoint, '--grace', '1', file])
    let path = ''
    child.stdout.on('data', (chunk: Buffer) => (path += chunk.toString()))
    child.stderr.resume()
    const ended = new Promise((resolve) => child.on('close', resolve))
    if (Math.random() < 0.5) setTimeout(() => child.kill('SIGKILL'), 50 + Math.random() * 150)
    await ended
    if (!path.endsWith('\n')) return
    const found = await run('head', ['-c5', path.trimEnd()])
    if (found.code !== 0) return
    read++
    if (found.stdout !== file.slice(-5)) wrong++
  }
  let stop = false
  const killing = (async () => {
    while (!stop) {
      await sleep(500 + Math.random() * 1500)
      const ready = tree.ready()
      tree.end('SIGKILL')
      await until(() => tree.ready() > ready, 30 * SECONDS)
    }
  })()
  await Promise.all(
    files.map(async (file) => {
      for (let i = 0; i < count; i++) await one(file)
    }),
  )
  stop = true
  await killing
  await until(async () => (await leasesOf(tree.mountpoint)).length === 0, 30 * SECONDS)
  await sleep(2 * SECONDS)
  return { left: files.flatMap(boundTo).length, wrong, read }
}

t.test(twoForms('clients and daemons killed at any moment leave no loop device'), async (t) => {
  const { left, wrong, read } = await cycles(t, CYCLES)
  t.comment(`${CYCLES * 8} cycles, ${read} read`)
  t.strictSame({ left, wrong }, { left: 0, wrong: 0 })
  t.ok(read > 0)
})

t.test('twin: with loop devices that are bound without autoclear, some are left', async (t) => {
  const { left } = await cycles(t, TWIN_CYCLES, '--require', join(ROOT, 'test/helpers/no-autoclear.cjs'))
  t.ok(left > 0, `${left} left`)
})
