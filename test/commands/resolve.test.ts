// SPDX-License-Identifier: MIT
/** `diskseqfs resolve`: from anything that names a device to its path in the tree. */
import { execFileSync, spawn } from 'node:child_process'
import { closeSync, existsSync, fstatSync, openSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'

import t from 'tap'

import { cleanup, CLI, loopDisk, mapperLink, run, scratch, sleep, startTree, until, zramDisk } from '../helpers/tree.js'

const PREFIX = '/dev/disk/by-diskseq'
const NOBODY = 65534

/** Without NODE_OPTIONS, by which tap loads itself into each node. */
const PROGRAM = ['--unset=NODE_OPTIONS', process.execPath, CLI, 'resolve']
const resolve = (...args: string[]) => run('env', [...PROGRAM, ...args])
const resolveAsNobody = (...args: string[]) => run('env', [...PROGRAM, ...args], { uid: NOBODY, gid: NOBODY })

const majmin = (path: string) => {
  const { rdev } = statSync(path)
  return `${(rdev >> 8) & 0xfff}:${(rdev & 0xff) | ((rdev >> 12) & 0xfff00)}`
}

/** Control characters, without the newline that ends a line. */
const CONTROL = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/

t.test('a disk is found by path, link, number and kernel name', async (t) => {
  const disk = loopDisk(t)
  const dir = scratch(t)
  symlinkSync(disk.path, join(dir, 'link'))
  symlinkSync('link', join(dir, 'second'))
  const path = `${PREFIX}/${disk.diskseq()}`
  for (const argument of [disk.path, join(dir, 'link'), join(dir, 'second'), majmin(disk.path), disk.kname]) {
    t.strictSame(await resolve(argument), { code: 0, stdout: `${path}\n`, stderr: '' }, argument)
  }
})

t.test('a partition is found by path, number and kernel name', async (t) => {
  const disk = loopDisk(t)
  disk.addPartition(3, 64, 128)
  const partition = `${disk.path}p3`
  await until(() => existsSync(partition))
  for (const argument of [partition, majmin(partition), `${disk.kname}p3`]) {
    t.strictSame(await resolve(argument), { code: 0, stdout: `${PREFIX}/${disk.diskseq()}p3\n`, stderr: '' }, argument)
  }
  disk.deletePartition(3)
})

t.test('several are printed in order, even if one of them fails', async (t) => {
  const disk = loopDisk(t)
  const ram = zramDisk(t)
  const { code, stdout, stderr } = await resolve(ram.kname, '/nonexistent', disk.kname, ram.path)
  t.equal(code, 1)
  const [ramPath, diskPath] = [`${PREFIX}/${ram.diskseq()}`, `${PREFIX}/${disk.diskseq()}`]
  t.equal(stdout, `${ramPath}\n${diskPath}\n${ramPath}\n`)
  t.match(stderr, /^diskseqfs: \/nonexistent: [^\n]+\n$/)
})

t.test('--json has all devices that were found, and the errors', async (t) => {
  const disk = loopDisk(t)
  const { code, stdout, stderr } = await resolve('--json', disk.path, '/dev/null')
  t.strictSame({ code, stderr }, { code: 1, stderr: '' })
  t.strictSame(JSON.parse(stdout), {
    devices: [
      {
        argument: disk.path,
        path: `${PREFIX}/${disk.diskseq()}`,
        diskseq: disk.diskseq(),
        partition: 0,
        majmin: majmin(disk.path),
        kname: disk.kname,
      },
      { argument: '/dev/null', error: 'not a block device' },
    ],
  })
})

t.test('the printed path opens the same device', async (t) => {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 128)
  await until(() => existsSync(`${disk.path}p1`))
  const { mountpoint } = await startTree(t)
  for (const argument of [disk.path, `${disk.path}p1`]) {
    const { stdout } = await resolve(argument)
    const fd = openSync(join(mountpoint, basename(stdout.trimEnd())), 'r')
    t.equal(fstatSync(fd).rdev, statSync(argument).rdev, argument)
    closeSync(fd)
  }
  // The same if the argument is a path in the tree.
  const { code, stdout } = await resolve(join(mountpoint, disk.diskseq()), join(mountpoint, `${disk.diskseq()}-part1`))
  t.strictSame({ code, stdout }, { code: 0, stdout: `${PREFIX}/${disk.diskseq()}\n${PREFIX}/${disk.diskseq()}p1\n` })
  disk.deletePartition(1)
})

t.test('an argument that is no such device fails with one line', async (t) => {
  const dir = scratch(t)
  writeFileSync(join(dir, 'file'), '')
  symlinkSync('nowhere', join(dir, 'dangling'))
  symlinkSync('loop', join(dir, 'loop'))
  const unbound = loopDisk(t)
  unbound.detach()
  for (const [argument, says] of [
    ['/dev/null', /not a block device/],
    [join(dir, 'file'), /not a block device/],
    [dir, /not a block device/],
    [`${dir}/`, /not a block device/],
    ['/', /not a block device/],
    [join(dir, 'missing'), /no such (file|path|device)/],
    [join(dir, 'dangling'), /no such (file|path|device)/],
    [join(dir, 'file/below'), /not a directory|ENOTDIR/],
    [join(dir, 'loop'), /symlinks|ELOOP/],
    [unbound.path, /not bound/],
    [unbound.kname, /not bound/],
    [majmin(unbound.path), /not bound/],
    ['999:999', /no block device has this number/],
    ['99999999999:0', /no block device has this number/],
    ['nonsense', /no such path, kernel name or device-mapper name/],
    ['.', /no such|not a block device/],
    ['..', /no such|not a block device/],
    ['', /empty/],
    ['x'.repeat(5000), /too long|ENAMETOOLONG/],
    ['constructor', /no such path/],
    ['18446744073709551615', /no disk has this number now/],
    ['1p999', /no partition has this name now/],
    [':', /no such path/],
  ] as const) {
    const { code, stdout, stderr } = await resolve(argument)
    t.strictSame({ code, stdout }, { code: 1, stdout: '' }, argument.slice(0, 50))
    t.match(stderr, /^diskseqfs: [^\n]+\n$/, 'one line')
    t.match(stderr, says)
  }
})

t.test('control characters never reach the terminal raw', async (t) => {
  const disk = loopDisk(t)
  const name = `evil\u001b]0;x\u0007\n\u009b31m`
  const dir = scratch(t)
  const plain = join(dir, name)
  writeFileSync(plain, '')
  for (const argument of [name, plain, `/nonexistent/${name}`, mapperLink(t, name, disk.path)]) {
    const { code, stdout, stderr } = await resolve(argument)
    t.strictSame({ code, stdout }, { code: 1, stdout: '' })
    t.match(stderr, /^diskseqfs: [^\n]+\n$/, 'one line')
    t.notMatch(stderr, CONTROL)
    const json = await resolve('--json', argument)
    t.notMatch(json.stdout, CONTROL, 'nor in JSON')
    t.equal(
      (JSON.parse(json.stdout) as { devices: { argument: string }[] }).devices[0]?.argument,
      argument,
      'JSON has the argument as it is',
    )
  }
})

t.test('/dev/mapper/NAME that leads to another device is refused, with a reason', async (t) => {
  const disk = loopDisk(t)
  const path = mapperLink(t, 'diskseqfs-test', disk.path)
  for (const argument of [path, 'diskseqfs-test']) {
    const { code, stdout, stderr } = await resolve(argument)
    t.strictSame({ code, stdout }, { code: 1, stdout: '' }, argument)
    t.equal(stderr, `diskseqfs: ${argument}: ${path} leads to ${disk.kname}, not to diskseqfs-test\n`)
  }
  for (const other of ['/dev/mapper/../mapper/diskseqfs-test', '/dev//mapper/diskseqfs-test', '/dev/mapper/./diskseqfs-test']) {
    t.equal((await resolve(other)).code, 1, other)
  }
})

t.test('an unprivileged user is told to be root, if that is what is missing', async (t) => {
  const disk = loopDisk(t)
  for (const argument of [disk.path, disk.kname, majmin(disk.path)]) {
    const { code, stdout, stderr } = await resolveAsNobody(argument)
    t.strictSame({ code, stdout }, { code: 1, stdout: '' })
    t.match(stderr, /^diskseqfs: [^\n]+: permission denied; run this as root\n$/)
  }
  const { stderr } = await resolveAsNobody('nonsense', '/dev/null', '999:999')
  t.notMatch(stderr, /root/)
})

t.test('nothing but a block device is opened', async (t) => {
  // Opening has effects: it starts a watchdog, rewinds a tape, and lets a process that waits at a
  // FIFO go on.
  const fifo = join(scratch(t), 'fifo')
  execFileSync('mkfifo', [fifo])
  const writer = spawn('sh', ['-c', `echo waiting; exec >'${fifo}'; echo >&2 opened`], { stdio: ['ignore', 'pipe', 'pipe'] })
  cleanup(t, () => writer.kill('SIGKILL'))
  let stdout = ''
  let stderr = ''
  writer.stdout.on('data', (chunk: Buffer) => (stdout += chunk.toString()))
  writer.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  await until(() => stdout === 'waiting\n')
  const outcome = await resolve(fifo)
  await sleep(100)
  t.match(outcome, { code: 1, stderr: /not a block device/ })
  t.equal(stderr, '', 'the writer still waits for its reader')
})
