// SPDX-License-Identifier: MIT
/** `diskseqfs unmount`: what it removes, what it leaves alone, and that the daemon ends with the tree. */
import { spawn } from 'node:child_process'
import { closeSync, existsSync, mkdirSync, mkdtempSync, openSync, readdirSync, readFileSync, readSync, rmSync, symlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { Intents } from '../../src/gate/intent.js'
import { native } from '../../src/native.js'
import { stoppedCaller } from '../helpers/stopped.js'
import { cleanup, CLI, loopDisk, run, type RunningTree, startTree, type Twin, until } from '../helpers/tree.js'

const NOBODY = 65534

/** Without NODE_OPTIONS, by which tap loads itself into each node. */
const PROGRAM = ['--unset=NODE_OPTIONS', process.execPath, CLI]
const unmount = (...args: string[]) => run('env', [...PROGRAM, 'unmount', ...args])

const DONE = { code: 0, stdout: '', stderr: '' }

function mounts(directory: string): number {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .filter((line) => line.split(' ')[4] === directory).length
}

/** A directory of the test's own; a mount at `tree` in it is removed with it. */
function place(t: Test): string {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-unmount-'))
  const tree = join(directory, 'tree')
  mkdirSync(tree)
  cleanup(t, async () => {
    while (mounts(tree) > 0) await run('umount', ['--lazy', tree])
    rmSync(directory, { recursive: true })
  })
  return tree
}

/** A daemon that serves `tree`. */
async function serve(t: Test, tree: string) {
  const child = spawn('env', [...PROGRAM, 'mount', '-f', tree], { stdio: ['ignore', 'ignore', 'pipe'] })
  let log = ''
  child.stderr.on('data', (chunk: Buffer) => (log += chunk.toString()))
  const ended = new Promise((resolve) => child.on('close', (code, signal) => resolve(signal ?? code)))
  cleanup(t, async () => {
    child.kill('SIGKILL')
    await ended
  })
  await until(() => child.exitCode !== null || log.includes('"msg":"mounted"'))
  return { child, ended, log: () => log }
}

t.test('it removes the tree and ends its daemon', async (t) => {
  const tree = place(t)
  const daemon = await serve(t, tree)
  t.strictSame(await unmount(tree), DONE)
  t.equal(mounts(tree), 0)
  t.equal(await daemon.ended, 0, 'the daemon ends well')
  t.match(daemon.log(), /the tree was unmounted/, 'and the log says why')
  t.notMatch(daemon.log(), /"level":"(warn|error|fatal)"/)
  t.strictSame(readdirSync(tree), [], 'the directory is empty and still there')
})

t.test('it ends a daemon in the background', async (t) => {
  const tree = place(t)
  t.strictSame(await run('env', [...PROGRAM, 'mount', tree]), DONE)
  const daemon = readdirSync('/proc').find((pid) => {
    try {
      return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0').includes(tree)
    } catch {
      return false // it has ended meanwhile
    }
  })
  t.strictSame(await unmount(tree), DONE)
  await until(() => !existsSync(`/proc/${daemon}`))
  t.equal(mounts(tree), 0)
})

t.test('a path may be written in any way', async (t) => {
  const tree = place(t)
  const parent = join(tree, '..')
  symlinkSync('.', join(parent, 'self'))
  symlinkSync('tree', join(parent, 'link'))
  for (const path of [`${tree}/`, `${parent}/./self/tree`, join(parent, 'link')]) {
    const daemon = await serve(t, tree)
    t.strictSame(await unmount(path), DONE, path)
    t.equal(mounts(tree), 0)
    if (mounts(tree) > 0) await run('umount', [tree])
    t.equal(await daemon.ended, 0)
  }
  const daemon = await serve(t, tree)
  t.strictSame(await run('sh', ['-c', `cd '${parent}'; exec env ${PROGRAM.join(' ')} unmount tree`]), DONE, 'relative')
  t.equal(await daemon.ended, 0)
})

t.test('an open file stays open, and is still the disk', async (t) => {
  const disk = loopDisk(t)
  const tree = place(t)
  const daemon = await serve(t, tree)
  const fd = openSync(join(tree, disk.diskseq()), 'r')
  cleanup(t, () => closeSync(fd))
  t.strictSame(await unmount(tree), DONE)
  t.equal(mounts(tree), 0)
  t.equal(await daemon.ended, 0, 'the daemon does not wait for it')
  t.equal(readSync(fd, Buffer.alloc(512), 0, 512, 0), 512)
})

/** Removes the tree in that way. */
const taken = (end: (tree: RunningTree) => unknown) => async (tree: RunningTree) => {
  await end(tree)
  await until(() => mounts(tree.mountpoint) === 0)
}

for (const [how, end] of [
  ['an unmount', ({ mountpoint }: RunningTree) => unmount(mountpoint)],
  ['SIGTERM', ({ pid }: RunningTree) => process.kill(pid, 'SIGTERM')],
  ['umount --force', ({ mountpoint }: RunningTree) => run('umount', ['--force', '--lazy', mountpoint])],
] as const) {
  t.test(`a caller that was answered before ${how} opens its disk`, async (t) => {
    t.strictSame(await stoppedCaller(t, 'none', { meanwhile: taken(end), wantedMs: 2300 }), { recycled: false, opened: 'its disk' })
  })

  t.test(`twin: if pins end with the mount, after ${how} it opens another disk`, async (t) => {
    t.strictSame(await stoppedCaller(t, 'no-draining', { meanwhile: taken(end) }), { recycled: true, opened: 'another disk' })
  })
}

t.test('another open(2) of a caller, however long it takes, does not keep the daemon from ending', async (t) => {
  const disk = loopDisk(t)
  const fifo = `${disk.file}.fifo`
  await run('mkfifo', [fifo])
  const tree = await startTree(t)
  const caller = spawn('sh', ['-c', 'exec 3<"$0" 4<"$1"', join(tree.mountpoint, disk.diskseq()), fifo])
  cleanup(t, () => caller.kill('SIGKILL'))
  await until(() => existsSync(`/proc/${caller.pid}/fd/3`) && new Intents(native).of(caller.pid as number).intent === 'open')
  const began = performance.now()
  t.strictSame(await unmount(tree.mountpoint), DONE)
  t.equal(await tree.ended, 0, 'it ends')
  t.ok(performance.now() - began < 10_000, 'the daemon has not waited for it')
  t.equal(caller.exitCode, null, 'the caller is still there')
})

t.test('the mount of a killed daemon is removed too', async (t) => {
  const tree = place(t)
  const { child, ended } = await serve(t, tree)
  child.kill('SIGKILL')
  await ended
  t.throws(() => readdirSync(tree), { code: 'ENOTCONN' })
  t.strictSame(await unmount(tree), DONE)
  t.equal(mounts(tree), 0)
})

t.test('the mount of a stopped daemon is removed too', async (t) => {
  const tree = place(t)
  const { child, ended } = await serve(t, tree)
  child.kill('SIGSTOP')
  t.strictSame(await unmount(tree), DONE)
  t.equal(mounts(tree), 0)
  child.kill('SIGCONT')
  t.equal(await ended, 0)
})

t.test('a path without a mount, with another mount, or that does not exist is left alone', async (t) => {
  const tree = place(t)
  for (const path of [tree, join(tree, 'missing/too')]) {
    t.strictSame(await unmount(path), { code: 1, stdout: '', stderr: `diskseqfs: ${path}: nothing is mounted there\n` })
  }
  await run('mount', ['-t', 'tmpfs', 'mine', tree])
  t.strictSame(await unmount(tree), {
    code: 1,
    stdout: '',
    stderr: `diskseqfs: ${tree}: tmpfs (mine) is mounted there, not diskseqfs\n`,
  })
  t.equal(mounts(tree), 1)
})

t.test('a tree that another mount covers is left alone', async (t) => {
  const tree = place(t)
  const { child } = await serve(t, tree)
  await run('mount', ['-t', 'tmpfs', 'mine', tree])
  t.match(await unmount(tree), { code: 1, stderr: /tmpfs \(mine\) is mounted there/ })
  t.equal(mounts(tree), 2)
  t.equal(child.exitCode, null)
})

t.test('only root can unmount', async (t) => {
  const tree = place(t)
  await run('chmod', ['755', join(tree, '..')])
  const { child } = await serve(t, tree)
  const outcome = await run('env', [...PROGRAM, 'unmount', tree], { uid: NOBODY, gid: NOBODY })
  t.strictSame(outcome, { code: 1, stdout: '', stderr: `diskseqfs: ${tree}: only root can unmount the tree\n` })
  t.equal(mounts(tree), 1)
  t.equal(child.exitCode, null)
})

t.test('the tree can be mounted again at once', async (t) => {
  const tree = place(t)
  for (let round = 0; round < 5; round++) {
    t.strictSame(await run('env', [...PROGRAM, 'mount', tree]), DONE)
    t.ok(readdirSync(tree).length >= 0)
    t.strictSame(await unmount(tree), DONE)
  }
  t.equal(mounts(tree), 0)
})

/** Looks at a name in a directory that it has open, until a little later than the mount has gone; prints the errors it got. */
const ON_ITS_WAY = `
import errno, os, sys, time
mountpoint, name = sys.argv[1:]
directory = os.open(mountpoint, os.O_PATH | os.O_DIRECTORY)
device = os.stat(mountpoint).st_dev
print('ready', flush=True)
errors, end = set(), None
while end is None or time.monotonic() < end:
    try:
        os.stat(name, dir_fd=directory)
    except OSError as error:
        errors.add(errno.errorcode[error.errno])
    if end is None and os.stat(mountpoint).st_dev != device:
        end = time.monotonic() + 0.2
print(*errors)
`

/** Errors of a caller that has walked into the mount before it is taken away. */
async function errorsOnTheWay(t: Test, twin?: Twin): Promise<string> {
  const disk = loopDisk(t)
  const tree = await startTree(t, twin ? { twin } : {})
  const caller = spawn('python3', ['-c', ON_ITS_WAY, tree.mountpoint, disk.diskseq()], { stdio: ['ignore', 'pipe', 'inherit'] })
  let out = ''
  caller.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  const ended = new Promise((resolve) => caller.on('close', resolve))
  await until(() => out.startsWith('ready'))
  await tree.stop()
  await ended
  return out.slice('ready\n'.length).trim()
}

t.test('a caller on its way in the tree is answered while it is taken away', async (t) => {
  t.equal(await errorsOnTheWay(t), '')
})

t.test('twin: a daemon that ends at once fails it', async (t) => {
  t.match(await errorsOnTheWay(t, 'ends-at-once'), /ENOTCONN|ECONNABORTED/)
})
