// SPDX-License-Identifier: MIT
/** `diskseqfs exec` and `diskseqfs attach`: a program runs with disks that stay what they are until it ends. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { closeSync, copyFileSync, existsSync, mkdirSync, openSync, readFileSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { LONG, twoForms } from '../helpers/long.js'
import { ROOT } from '../helpers/root.js'
import { boundTo, cleanup, CLI, image, loopDisk, run, scratch, sleep, startTree, until } from '../helpers/tree.js'

const NOBODY = 65534
/** Its bit in /proc/PID/status. */
const SIGUSR1 = 1n << 9n
/** Without the NODE_OPTIONS by which tap loads itself into each node. */
const PROGRAM = ['--unset=NODE_OPTIONS', process.execPath, CLI]
const cli = (...args: string[]) => run('env', [...PROGRAM, ...args])

const head = (path: string, bytes: number) => ['head', `--bytes=${bytes}`, path]

/** A program with a part that says "ready" and waits for a line. */
async function startWaiting(t: Test, command: readonly string[]): Promise<{ child: ChildProcess; goOn: () => Promise<string> }> {
  const [file, ...args] = command as [string, ...string[]]
  // In a process group of its own, which can be ended as a whole.
  const child = spawn(file, args, { stdio: 'pipe', detached: true })
  let out = ''
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (out += chunk.toString()))
  const ended = new Promise((resolve) => child.on('close', resolve))
  cleanup(t, async () => {
    if (child.exitCode === null && child.signalCode === null) process.kill(-(child.pid as number), 'SIGKILL')
    await ended
  })
  await until(() => out.startsWith('ready\n') || child.exitCode !== null, 30_000)
  const goOn = async () => {
    child.stdin.end('\n')
    await ended
    return out
  }
  return { child, goOn }
}

t.test('a program gets the disk by its path in the tree, or as an open descriptor', async (t) => {
  const disk = loopDisk(t, { file: image(scratch(t), 'one') })
  const { mountpoint } = await startTree(t)
  const name = disk.diskseq()
  for (const what of [name, disk.path, disk.kname]) {
    const out = await cli('exec', '--tree', mountpoint, what, '--', ...head('{}', 3))
    t.strictSame(out, { code: 0, stdout: 'one', stderr: '' }, what)
  }
  t.equal(
    (await cli('exec', '--tree', mountpoint, name, '--', 'echo', '{}', 'x{}y{1}', '{ }')).stdout,
    `${mountpoint}/${name} x${mountpoint}/${name}y${mountpoint}/${name} { }\n`,
  )
  t.strictSame(await cli('exec', '--fd', name, '--', ...head('{}', 3)), { code: 0, stdout: 'one', stderr: '' }, '--fd')
  t.strictSame(await cli('exec', '--fd', name, '--', 'echo', '{}'), { code: 0, stdout: '/proc/self/fd/10\n', stderr: '' })
})

t.test('partitions, and several disks', async (t) => {
  const dir = scratch(t)
  const [one, two] = ['one', 'two'].map((text) => loopDisk(t, { file: image(dir, text) })) as [
    ReturnType<typeof loopDisk>,
    ReturnType<typeof loopDisk>,
  ]
  one.addPartition(3, 64, 64)
  const { mountpoint } = await startTree(t)
  const names = [`${one.diskseq()}p3`, `${one.diskseq()}-part3`, two.diskseq()]
  const { stdout, stderr } = await cli('exec', '--tree', mountpoint, ...names, '--', 'echo', '{1}', '{2}', '{3}')
  t.strictSame(
    { stdout, stderr },
    { stdout: `${mountpoint}/${names[0]} ${mountpoint}/${names[0]} ${mountpoint}/${names[2]}\n`, stderr: '' },
  )
  const read = await cli('exec', '--fd', one.path, two.path, '--', 'sh', '-c', 'head -c3 "$1"; head -c3 "$0"', '{1}', '{2}')
  t.equal(read.stdout, 'twoone')
  one.deletePartition(3)
})

/** Mounts a disk, held or not, after it was detached, and another one was given its number if that was possible. */
async function mountLate(t: Test, held: boolean): Promise<{ recycled: boolean; mounted: string }> {
  const dir = scratch(t)
  const [mine, other] = ['mine', 'other'].map((label) => {
    const file = image(dir, label)
    execFileSync('mkfs.ext4', ['-q', '-F', '-O', '^has_journal', '-L', label, file])
    return file
  }) as [string, string]
  const disk = loopDisk(t, { file: mine })
  const { mountpoint } = await startTree(t)
  const where = join(dir, 'mnt')
  mkdirSync(where)
  cleanup(t, () => run('umount', ['--quiet', where]))
  const late = ['sh', '-c', 'echo ready; read line; exec mount -o ro "$1" "$2"', 'sh']
  const waiting = await startWaiting(
    t,
    held ? ['env', ...PROGRAM, 'exec', '--tree', mountpoint, disk.diskseq(), '--', ...late, '{}', where] : [...late, disk.path, where],
  )
  disk.detach()
  const recycle = async () => (await run('losetup', [disk.path, other])).code === 0
  const recycled = await until(recycle, held ? 500 : 5000).then(
    () => true,
    () => false,
  )
  if (recycled) cleanup(t, () => run('losetup', ['--detach', disk.path]))
  t.equal(await waiting.goOn(), 'ready\n')
  const { stdout: source } = await run('findmnt', ['--noheadings', '--output', 'SOURCE', where])
  const { stdout } = await run('blkid', ['--probe', '--output', 'value', '--match-tag', 'LABEL', source.trim()])
  return { recycled, mounted: stdout.trim() }
}

t.test('mount(8) mounts the disk in the name, however late it looks up the number', async (t) => {
  t.strictSame(await mountLate(t, true), { recycled: false, mounted: 'mine' })
})

t.test('twin: by its path in /dev it mounts another one', async (t) => {
  t.strictSame(await mountLate(t, false), { recycled: true, mounted: 'other' })
})

t.test('what a caller passes by a number is not taken for a disk', async (t) => {
  const file = image(scratch(t), 'untouched')
  const script = `env ${PROGRAM.join(' ')} attach --fd ${file} -- sh -c 'echo text >&3' 3>/dev/null`
  t.not((await run('bash', ['-c', script])).code, 0, 'it is closed')
  t.match(readFileSync(file, 'latin1'), /^untouched/)
})

t.test('a signal that opens a debugger in Node does not', async (t) => {
  const child = spawn('env', [...PROGRAM, 'watch'], { stdio: ['ignore', 'ignore', 'pipe'] })
  cleanup(t, () => child.kill('SIGKILL'))
  let said = ''
  child.stderr.on('data', (chunk: Buffer) => (said += chunk.toString()))
  // It handles signals from its first lines on.
  await until(
    () => (BigInt(`0x${/^SigCgt:\t(\w+)$/m.exec(readFileSync(`/proc/${child.pid}/status`, 'latin1'))?.[1] ?? 0}`) & SIGUSR1) !== 0n,
  )
  await sleep(1000)
  child.kill('SIGUSR1')
  await sleep(500)
  t.equal(said, '')
})

t.test('exit codes are those of env(1)', async (t) => {
  const name = loopDisk(t).diskseq()
  const dir = scratch(t)
  const exec = (...command: string[]) => cli('exec', '--fd', name, '--', ...command)
  t.equal((await exec('sh', '-c', 'exit 7')).code, 7)
  t.equal((await exec('sh', '-c', 'kill -KILL $$')).code, 128 + 9)
  for (const [command, code, says] of [
    [['/nonexistent/program'], 127, /^diskseqfs: \/nonexistent\/program: no such program\n$/],
    [[dir], 126, /^diskseqfs: .*: it may not be executed\n$/],
    [[join(ROOT, 'package.json', 'x')], 126, /ENOTDIR\n$/],
    [[''], 127, /^diskseqfs: : no such program\n$/],
    [['x'.repeat(300)], 126, /ENAMETOOLONG\n$/],
  ] as const) {
    const result = await exec(...command)
    t.equal(result.code, code)
    t.match(result.stderr, says)
  }
})

t.test('what cannot be done is said in one line, and nothing is run', async (t) => {
  const disk = loopDisk(t)
  const gone = loopDisk(t)
  const goneName = gone.diskseq()
  gone.detach()
  const dir = scratch(t)
  const name = disk.diskseq()
  for (const [args, says] of [
    [['exec', '--fd', name], /say what to run/],
    [['exec', '--fd', name, '--'], /say what to run/],
    [['exec', '--fd', '--', 'touch', 'RAN'], /missing required argument/],
    [['exec', '--nonsense', name, '--', 'touch', 'RAN'], /unknown option/],
    [['exec', '--tree', dir, name, '--', 'touch', 'RAN', '{}'], /ENOENT; is the tree mounted .* --fd/],
    [['exec', '--fd', goneName, '--', 'touch', 'RAN'], /no disk has this number now/],
    [['exec', '--fd', `${name}p7`, '--', 'touch', 'RAN'], /no partition has this name now/],
    [['exec', '--fd', '18446744073709551616', '--', 'touch', 'RAN'], /no such/],
    [['exec', '--fd', '', '--', 'touch', 'RAN'], /an empty argument names no device/],
    [['exec', '--fd', '/dev/null', '--', 'touch', 'RAN'], /\/dev\/null: not a block device/],
    [['exec', '--fd', name, '--', 'touch', 'RAN', '{2}'], /there is no device for \{2\}: 1 given/],
    [['exec', '--fd', name, '--', 'touch', 'RAN', '{0}'], /there is no device for \{0\}/],
    [['exec', '--fd', name, name, '--', 'touch', 'RAN', '{}'], /write \{1\} for the first/],
    [['exec', '--fd', name, '--', 'touch', 'RAN', '\ufffd'], /not UTF-8.*diskseq --open can/],
    [['exec', '--tree', '/x\ny\u001b[31m', name, '--', 'touch', 'RAN', '{}'], /\/x\?y\?\[31m\//],
  ] as const) {
    const ran = join(dir, 'ran')
    const { code, stdout, stderr } = await cli(...args.map((argument) => (argument === 'RAN' ? ran : argument)))
    t.strictSame({ code, stdout }, { code: 125, stdout: '' }, args.join(' '))
    t.match(stderr, says)
    t.equal(stderr.split('\n').length, 2, stderr)
    t.notOk(existsSync(ran), 'nothing was run')
  }
  symlinkSync('/dev/null', join(dir, name))
  t.match(await cli('exec', '--tree', dir, name, '--', 'echo', '{}'), { code: 125, stderr: /is another device/ })
})

t.test('--write and --exclusive', async (t) => {
  const dir = scratch(t)
  const disk = loopDisk(t, { file: image(dir, 'rw') })
  const modes = ['sh', '-c', 'grep ^flags: /proc/self/fdinfo/10', 'sh', '{}']
  t.match((await cli('exec', '--fd', disk.path, '--', ...modes)).stdout, /0\n$/)
  t.match((await cli('exec', '--fd', '--write', disk.path, '--', ...modes)).stdout, /2\n$/)
  const holder = openSync(disk.path, 0o200) // O_EXCL
  try {
    t.match(await cli('exec', '--fd', '--exclusive', disk.path, '--', 'true'), { code: 125, stderr: /it is in use/ })
    t.equal((await cli('exec', '--fd', disk.path, '--', 'true')).code, 0)
  } finally {
    closeSync(holder)
  }
  t.equal((await cli('exec', '--fd', '--exclusive', disk.path, '--', 'true')).code, 0)
})

t.test('signals reach the program', async (t) => {
  const name = loopDisk(t).diskseq()
  // Not SIGINT: where that is ignored, as in the background of a shell, no program below can catch it.
  for (const signal of ['SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'] as const) {
    const { child } = await startWaiting(t, [
      'env',
      ...PROGRAM,
      'exec',
      '--fd',
      name,
      '--',
      'sh',
      '-c',
      `trap 'exit 9' ${signal.slice(3)}; echo ready; while :; do sleep 0.05; done`,
    ])
    const ended = new Promise((resolve) => child.on('close', resolve))
    child.kill(signal)
    t.equal(await Promise.race([ended, sleep(10_000, 'still running', { ref: false })]), 9, signal)
  }
})

t.test('a file is a disk for as long as a program runs', async (t) => {
  const dir = scratch(t)
  const file = image(dir, 'hello')
  t.strictSame(await cli('attach', '--fd', file, '--', ...head('{}', 5)), { code: 0, stdout: 'hello', stderr: '' })
  await until(() => boundTo(file).length === 0)
  const { mountpoint } = await startTree(t)
  const waiting = await startWaiting(t, [
    'env',
    ...PROGRAM,
    'attach',
    '--tree',
    mountpoint,
    file,
    '--',
    'sh',
    '-c',
    'echo ready; read line; head -c5 "$1"',
    'sh',
    '{}',
  ])
  t.equal(boundTo(file).length, 1, 'it is there')
  t.equal(await waiting.goOn(), 'ready\nhello')
  await until(() => boundTo(file).length === 0)
  t.pass('and goes with it')
})

t.test('how the disk is made can be told', async (t) => {
  const file = image(scratch(t), 'abcdefgh', 1 << 20)
  writeFileSync(file, Buffer.concat([Buffer.alloc(4096, 'a'), Buffer.alloc(8192, 'b'), Buffer.alloc(4096, 'c')]))
  const attach = (...args: string[]) =>
    cli('attach', '--fd', ...args.slice(0, -1), file, '--', 'sh', '-c', args.at(-1) as string, 'sh', '{}')
  t.equal((await attach('--offset', '4K', '--size', '8K', 'wc -c <"$1"; head -c1 "$1"')).stdout, '8192\nb')
  t.equal((await attach('--sector-size', '4096', 'blockdev --getss "$1"')).stdout, '4096\n')
  t.equal(
    (await attach('--read-only', 'blockdev --getro "$1"; cat /sys/dev/block/$(stat -Lc %Hr:%Lr "$1")/loop/autoclear')).stdout,
    '1\n1\n',
  )
  t.equal((await attach('echo x >/proc/self/fd/10; head -c1 "$1"')).code, 0)
  t.equal(readFileSync(file, 'latin1')[0], 'x', 'what is written is in the file')
  await until(() => boundTo(file).length === 0)
})

t.test('direct I/O is done, or refused', async (t) => {
  const dir = scratch(t)
  const where = join(dir, 'ramfs')
  mkdirSync(where)
  execFileSync('mount', ['-t', 'ramfs', 'none', where])
  cleanup(t, () => run('umount', [where]))
  const file = image(where, 'file')
  writeFileSync(file, Buffer.alloc(1 << 16))
  t.match(await cli('attach', '--fd', '--direct-io', file, '--', 'true'), {
    code: 125,
    stderr: /cannot do direct I\/O.*leave out --direct-io\n$/,
  })
  await until(() => boundTo(file).length === 0)
  t.equal((await cli('attach', '--fd', file, '--', 'true')).code, 0)
})

t.test('a block device is held as it is', async (t) => {
  const disk = loopDisk(t, { file: image(scratch(t), 'dev') })
  t.equal((await cli('attach', '--fd', disk.path, '--', ...head('{}', 3))).stdout, 'dev')
  // A node that is called like another device.
  const dir = scratch(t)
  const other = loopDisk(t)
  execFileSync('cp', ['-a', disk.path, join(dir, other.kname)])
  const here = await run('env', ['--chdir', dir, ...PROGRAM, 'attach', '--fd', other.kname, '--', ...head('{}', 3)])
  t.equal(here.stdout, 'dev')
  t.match(await cli('attach', '--fd', '--offset', '512', disk.path, '--', 'true'), { code: 125, stderr: /are for files/ })
})

t.test('what cannot be a disk says why, and leaves nothing', async (t) => {
  const dir = scratch(t)
  const file = image(dir, 'file')
  const fifo = join(dir, 'fifo')
  execFileSync('mkfifo', [fifo])
  writeFileSync(join(dir, 'empty'), '')
  writeFileSync(join(dir, 'odd'), Buffer.alloc(1000))
  const running = join(dir, 'running')
  copyFileSync('/bin/sleep', running)
  truncateSync(running, 1 << 18)
  const sleeper = spawn(running, ['60'], { stdio: 'ignore' })
  cleanup(t, () => sleeper.kill('SIGKILL'))
  await until(() => sleeper.pid !== undefined)
  await sleep(50)
  for (const [args, says] of [
    [[dir], /a directory cannot be a disk/],
    [[fifo], /neither a regular file nor a block device/],
    [['/dev/null'], /neither a regular file nor a block device/],
    [[join(dir, 'empty')], /the file is empty/],
    [[join(dir, 'odd')], /1000 bytes are no whole number of sectors of 512 bytes/],
    [['--size', '1000', file], /no whole number of sectors/],
    [['--sector-size', '4096', '--size', '512', file], /no whole number of sectors of 4096/],
    [['--offset', '2M', file], /the offset is not within the file/],
    [['--size', '2M', file], /beyond the end of the file/],
    [['--size', '1.5K', file], /It must be a number of bytes/],
    [['--offset', '-1', file], /It must be a number of bytes|unknown option/],
    [['--offset', '9999999999999999999', file], /It must be a number of bytes/],
    [['--sector-size', '1000', file], /a power of two from 512/],
    [[join(dir, 'missing')], /no such file/],
    [[''], /an empty argument names no file/],
    [[running], /a program that runs/],
  ] as const) {
    const { code, stdout, stderr } = await cli('attach', '--fd', ...args, '--', 'echo', 'ran')
    t.strictSame({ code, stdout }, { code: 125, stdout: '' }, args.join(' '))
    t.match(stderr, says)
    t.equal(stderr.split('\n').length, 2, stderr)
  }
  t.strictSame(boundTo(file), [])
  t.equal((await cli('attach', '--fd', '--read-only', running, '--', 'true')).code, 0, 'a program that runs may be read')
})

t.test('an unprivileged user is told what is missing', async (t) => {
  const disk = loopDisk(t)
  const nobody = (...args: string[]) => run('env', [...PROGRAM, ...args], { uid: NOBODY, gid: NOBODY })
  t.match(await nobody('exec', '--fd', disk.path, '--', 'true'), { code: 125, stderr: /permission denied; run this as root\n$/ })
  t.match(await nobody('attach', '--fd', join(ROOT, 'package.json'), '--', 'true'), {
    code: 125,
    stderr: /no whole number|permission denied/,
  })
})

const CYCLES = LONG ? 200 : 3
const TWIN_CYCLES = 20

/** Kills the command at some moment, again and again; the loop devices that are left two seconds later. */
async function kill(t: Test, cycles: number, ...node: string[]): Promise<number> {
  const dir = scratch(t)
  const files = Array.from({ length: 4 }, (_, i) => image(dir, `file${i}`))
  cleanup(t, async () => {
    for (const file of files) for (const kname of boundTo(file)) await run('losetup', ['--detach', `/dev/${kname}`])
  })
  const attach = (file: string, ...command: string[]) => {
    const child = spawn('env', ['--unset=NODE_OPTIONS', process.execPath, ...node, CLI, 'attach', '--fd', file, '--', ...command])
    return { child, ended: new Promise((resolve) => child.on('close', resolve)) }
  }
  const inTurn = async (file: string) => {
    // How long a command takes depends on what else the machine does.
    const began = performance.now()
    await attach(file, 'true').ended
    const took = performance.now() - began
    for (let i = 0; i < cycles; i++) {
      const { child, ended } = attach(file, 'dd', 'if={}', 'of=/dev/null', 'status=none')
      await sleep(i === cycles - 1 ? 3 * took + 500 : (0.3 + Math.random()) * took)
      child.kill('SIGKILL')
      await ended
    }
  }
  await Promise.all(files.map(inTurn))
  await sleep(2000)
  return files.flatMap(boundTo).length
}

t.test(twoForms('SIGKILL at any moment leaves no loop device'), async (t) => {
  t.equal(await kill(t, CYCLES), 0)
})

t.test('twin: bound without autoclear, they are left', async (t) => {
  t.ok((await kill(t, TWIN_CYCLES, '--require', join(ROOT, 'test/helpers/no-autoclear.cjs'))) > 0)
})

t.test('many at once', async (t) => {
  const dir = scratch(t)
  const files = Array.from({ length: 16 }, (_, i) => image(dir, `many${i}`))
  const seen = await Promise.all(files.map((file, i) => cli('attach', '--fd', file, '--', ...head('{}', `many${i}`.length))))
  t.strictSame(
    seen.map(({ stdout }) => stdout),
    files.map((_, i) => `many${i}`),
  )
  await until(() => files.flatMap(boundTo).length === 0)
})
