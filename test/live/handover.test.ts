// SPDX-License-Identifier: MIT
/**
 * The daemon dies, or is told to end, or the guard is, and another one takes over. Callers that
 * wait are answered, and none gets an error or another disk. Here a small manager keeps the guard's
 * descriptors; the virtual machines show that systemd does the same.
 */
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import {
  closeSync,
  existsSync,
  fstatSync,
  openSync,
  opendirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { basename, join } from 'node:path'

import t, { type Test } from 'tap'

import { native } from '../../src/native.js'
import { type Change, changedGuard, twinGuard } from '../helpers/guard.js'
import { onlyAtLength } from '../helpers/long.js'
import {
  cleanup,
  descriptors,
  diskseqOf,
  killAtOnce,
  loopDisk,
  manyDisks,
  type ManagedTree,
  openDevices,
  sleep,
  startBlk,
  startManaged,
  type Twin,
  until,
} from '../helpers/tree.js'

/** Negative, as Node.js reports errnos that it has no name for. */
const ESTALE = -116

/** Reads from a path in the background. */
function reader(path: string) {
  const child = spawn('dd', [`if=${path}`, 'of=/dev/null', 'count=1', 'status=none'], { stdio: ['ignore', 'ignore', 'pipe'] })
  let stderr = ''
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  const outcome = new Promise<string>((resolve) => child.on('close', (code) => resolve(code === 0 ? 'opened' : stderr)))
  return { outcome, over: () => child.exitCode !== null }
}

/** Opens a disk whose answers are late, and kills the daemon meanwhile. */
async function openedWhileKilled(t: Test, twin: Twin): Promise<'opened' | 'still waiting' | string> {
  const loop = loopDisk(t)
  const tree = await startManaged(t, { twin })
  const { outcome, over } = reader(join(tree.mountpoint, loop.diskseq()))
  // The request has been read, and is answered 30 ms later.
  await until(() => openDevices(tree.pid()).length > 0 || over())
  tree.end('SIGKILL')
  await until(() => tree.ready() === 2)
  return Promise.race([outcome, sleep(2000, 'still waiting')])
}

t.test('a request that the dead daemon had read is answered by the next one', async (t) => {
  for (let i = 0; i < 5; i++) t.equal(await openedWhileKilled(t, 'none+slow'), 'opened')
})

t.test('twin: if requests are not stored, their callers wait for ever', async (t) => {
  // The daemon may have answered before it was killed.
  let end = ''
  for (let i = 0; i < 5 && end !== 'still waiting'; i++) end = await openedWhileKilled(t, 'no-journal+slow')
  t.equal(end, 'still waiting')
})

/**
 * How many pins there are after each of two crashes in a row, for an open of which the daemon
 * cannot see whether it is done.
 */
async function pinsAfterCrashes(t: Test, twin: Twin): Promise<number[]> {
  const loop = loopDisk(t)
  const tree = await startManaged(t, { twin })
  const path = join(tree.mountpoint, loop.diskseq())
  const fd = openSync(path, 'r')
  const counts: number[] = []
  for (let i = 1; i <= 2; i++) {
    await until(() => openDevices(tree.pid()).length > 0)
    await sleep(50) // until no request is under way
    tree.end('SIGKILL')
    await until(() => tree.ready() === i + 1)
    counts.push(openDevices(tree.pid()).length)
    // Renews the pin, so that the next crash finds one in any case.
    closeSync(openSync(path, 'r'))
  }
  closeSync(fd)
  await until(() => openDevices(tree.pid()).length === 0)
  return counts
}

/**
 * A caller waits for a disk that takes a second to open, and each daemon is killed as soon as it is ready, `kills` times. -> what the
 * caller gets
 */
async function waitsThrough(t: Test, kills: number, program?: string): Promise<string> {
  const loop = loopDisk(t)
  const tree = await startManaged(t, { twin: 'opens-late', ...(program !== undefined && { program }), expectErrors: true })
  tree.end('SIGKILL')
  const { outcome } = reader(join(tree.mountpoint, loop.diskseq()))
  for (let ready = 1; ready <= kills; ready++) {
    for (const late = performance.now() + 20_000; tree.ready() <= ready && performance.now() < late;) await sleep(1)
    tree.end('SIGKILL')
  }
  return outcome
}

/** More than a request is tried (TRIES_MAX in session.ts), as the first daemons may end before the caller has asked. */
const KILLS = 14

onlyAtLength('a caller is not blamed for the end of daemons that are killed', {}, async (t) => {
  t.equal(await waitsThrough(t, KILLS), 'opened')
})

t.test('twin: if it does not matter how they end, the caller gets an error', async (t) => {
  t.match(await waitsThrough(t, KILLS, twinGuard(t, 'if (wanted && served.fuse >= 0) {', 'if (false) {')), /Input\/output error/)
})

t.test('pins are handed over when the daemon dies', async (t) => {
  t.strictSame(await pinsAfterCrashes(t, 'none+unseen'), [1, 1], 'the next daemon has them open')
})

t.test('twin: if pins are not stored, they end with the daemon', async (t) => {
  t.strictSame(await pinsAfterCrashes(t, 'no-pin-store+unseen'), [0, 0])
})

/** More than the descriptors that fit into one message (SCM_MAX_FD, 253). */
const PINS = 300

/** How many pins the next daemon has, after the guard was started anew while there were many. */
async function pinsAfterNewGuard(t: Test, twin: Twin, program?: string, end = endGuard): Promise<'all' | number> {
  const { file } = loopDisk(t)
  const disks = await manyDisks(t, PINS, file)
  const tree = await startManaged(t, { twin, ...(program && { program }) })
  const open = disks.map((disk) => openSync(join(tree.mountpoint, diskseqOf(disk)), 'r'))
  cleanup(t, () => open.forEach((fd) => closeSync(fd)))
  const before = tree.guard()
  await end(tree)
  await until(() => tree.guard() !== before && tree.ready() === 2, 20_000)
  tree.end('SIGKILL')
  await until(() => tree.ready() === 3)
  const pins = openDevices(tree.pid()).length
  return pins === disks.length ? 'all' : pins
}

const endGuard = async (tree: ManagedTree) => tree.endGuard('SIGKILL')

/** Ends both, and for a while the manager does not start the next guard. */
async function endBoth(tree: ManagedTree): Promise<void> {
  process.kill(tree.manager, 'SIGSTOP')
  killAtOnce(tree.guard(), [tree.pid()])
  await sleep(3000)
  process.kill(tree.manager, 'SIGCONT')
}

t.test('many pins survive the end of the guard, and then of the daemon', async (t) => {
  t.equal(await pinsAfterNewGuard(t, 'none+unseen'), 'all')
})

t.test('twin: if all go into one message, they do not fit and are lost', async (t) => {
  const program = twinGuard(t, '#define BATCH 250', '#define BATCH 4096')
  t.not(await pinsAfterNewGuard(t, 'none+unseen', program).catch(() => 'nobody has them'), 'all')
})

t.test('many pins survive the end of both at once', async (t) => {
  t.equal(await pinsAfterNewGuard(t, 'none+unseen', undefined, endBoth), 'all')
})

t.test('twin: if the understudy does not get the pins, they are lost', async (t) => {
  const program = twinGuard(t, 'if (follows) follows = send_fds(', 'if (false) follows = send_fds(')
  t.equal(await pinsAfterNewGuard(t, 'none+unseen', program, endBoth), 0)
})

t.test('a disk that goes while there is no daemon is released by the next one', async (t) => {
  const loop = loopDisk(t)
  const tree = await startManaged(t, { twin: 'none+slow' })
  const child = spawn('dd', [`if=${join(tree.mountpoint, loop.diskseq())}`, 'of=/dev/null', 'count=1'], { stdio: 'ignore' })
  const ended = new Promise((resolve) => child.on('close', resolve))
  await until(() => openDevices(tree.pid()).length > 0)
  await withoutDaemon(tree, async () => loop.detach())
  await ended // with an error, or with the disk, which stays until it is closed
  await until(() => !existsSync(`/sys/block/${loop.kname}/loop/backing_file`), 2000)
  t.pass('its number is free')
})

t.test('what is open keeps working', async (t) => {
  const loop = loopDisk(t)
  const tree = await startManaged(t)
  const path = join(tree.mountpoint, loop.diskseq())
  const fd = openSync(path, 'r')
  const opath = openSync(path, native.O_PATH)
  const directory = opendirSync(tree.mountpoint)
  const before = fstatSync(fd)
  tree.end('SIGKILL')
  t.equal(fstatSync(fd).rdev, before.rdev, 'fstat')
  closeSync(openSync(`/proc/self/fd/${fd}`, 'r'))
  t.pass('a descriptor can be opened again')
  closeSync(openSync(`/proc/self/fd/${opath}`, 'r'))
  t.pass('an O_PATH descriptor can be opened')
  const names: string[] = []
  for (let entry = directory.readSync(); entry !== null; entry = directory.readSync()) names.push(entry.name)
  t.ok(names.includes(loop.diskseq()), 'an open directory can be read on')
  directory.closeSync()
  for (const each of [fd, opath]) closeSync(each)
  t.equal(statSync(path).isBlockDevice(), true)
  await until(() => tree.ready() === 2 && openDevices(tree.pid()).length === 0)
})

/**
 * After a restart, opens a disk and a partition without their names, by a bind mount and by an O_PATH descriptor. ->
 * the results
 */
async function reachedAfter(t: Test, twin: Twin): Promise<(string | number)[]> {
  const loop = loopDisk(t)
  loop.addPartition(1, 64, 64)
  const tree = await startManaged(t, { twin })
  const ways: string[] = []
  for (const name of [loop.diskseq(), `${loop.diskseq()}p1`]) {
    const path = join(tree.mountpoint, name)
    const opath = openSync(path, native.O_PATH)
    cleanup(t, () => closeSync(opath))
    const bind = `${loop.file}.${name}`
    writeFileSync(bind, '')
    execFileSync('mount', ['--bind', path, bind])
    cleanup(t, () => execFileSync('umount', ['--lazy', bind]))
    ways.push(`/proc/self/fd/${opath}`, bind)
  }
  tree.end('SIGKILL')
  await until(() => tree.ready() === 2)
  return ways.map((way) => {
    try {
      closeSync(openSync(way, 'r'))
      return 'opened'
    } catch (error) {
      return (error as NodeJS.ErrnoException).errno ?? 0
    }
  })
}

t.test('a disk and a partition are reached without their names, before any new lookup of these', async (t) => {
  t.strictSame(await reachedAfter(t, 'none'), ['opened', 'opened', 'opened', 'opened'])
})

t.test("twin: if an earlier daemon's inodes are not recognized, they are not", async (t) => {
  t.strictSame(await reachedAfter(t, 'no-recall'), [ESTALE, ESTALE, ESTALE, ESTALE])
})

t.test('if the mount is gone, or another one is wanted, the next daemon mounts anew', async (t) => {
  const loop = loopDisk(t)
  const tree = await startManaged(t)
  await withoutDaemon(tree, async () => spawnSync('umount', ['--lazy', tree.mountpoint]))
  t.equal(statSync(join(tree.mountpoint, loop.diskseq())).isBlockDevice(), true)
  // The daemon is ready a moment before its log has been read.
  await until(() => tree.log().length >= 3)
  t.match(
    tree.log().map(({ msg }) => msg),
    ['mounted', /does not fit/, 'mounted'],
  )
})

const LOOKER = `
import os, stat, sys
opened = []
calls = {
  'stat': lambda path: 'found' if stat.S_ISBLK(os.stat(path).st_mode) or path == '/' else 'no disk',
  'lstat': lambda path: 'found' if stat.S_ISBLK(os.lstat(path).st_mode) else 'no disk',
  'create': lambda path: os.close(os.open(path, os.O_WRONLY | os.O_CREAT)) or 'opened',
  'mkdir': lambda path: os.mkdir(path) or 'made',
  'opendir': lambda path: opened.append(os.open(path, os.O_RDONLY)) or 'opened',
  'list': lambda path: 'found' if os.listdir(opened[-1]) else 'empty',
}
for line in sys.stdin:
  call, path = line.split()
  try: print(calls[call](path))
  except OSError as error: print(error.strerror)
`

/** ENOENT; or ENOMEM, if the name is in use and must not be forgotten. */
const REFUSED = /No such file or directory|Cannot allocate memory/

type Call = 'stat' | 'lstat' | 'create' | 'mkdir' | 'opendir' | 'list'

/** A process that looks at a path when asked. For the guard it is the service manager. */
function looker(t: Test) {
  const child = spawn('python3', ['-uc', LOOKER])
  cleanup(t, () => child.kill('SIGKILL'))
  let said = ''
  child.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()))
  return {
    pid: child.pid as number,
    look(path: string, withinMs: number, call: Call = 'stat'): Promise<string> {
      said = ''
      child.stdin.write(`${call} ${path}\n`)
      return this.answer(withinMs)
    },
    async answer(withinMs: number): Promise<string> {
      for (let i = 0; i < withinMs / 10 && !said.endsWith('\n'); i++) await sleep(10)
      return said.trim() || 'waits'
    },
  }
}

/** Kills the daemon; the next one does not start before `during` is over. */
async function withoutDaemon<T>(tree: ManagedTree, during: () => Promise<T>): Promise<T> {
  const ready = tree.ready()
  const pid = tree.pid()
  tree.hold(true)
  process.kill(pid, 'SIGKILL')
  await until(() => !existsSync(`/proc/${pid}`))
  try {
    return await during()
  } finally {
    tree.hold(false)
    await until(() => tree.ready() > ready, 30_000)
  }
}

/** @param manager the process that must not wait, see guard.c */
async function startGuarded(
  t: Test,
  manager: number,
  { args = [], twin, program }: { args?: string[]; twin?: Twin; program?: string } = {},
): Promise<{ tree: ManagedTree; log: () => string }> {
  const guardArgs = ['-m', String(manager), ...args]
  const tree = await startManaged(t, { guardArgs, ...(twin && { twin }), ...(program && { program }) })
  return { tree, log: tree.said }
}

t.test('the service manager never waits for a daemon that it has to start; other processes do', async (t) => {
  const loop = loopDisk(t)
  const manager = looker(t)
  const other = looker(t)
  const { tree } = await startGuarded(t, manager.pid)
  const path = join(tree.mountpoint, loop.diskseq())
  t.equal(await manager.look(path, 2000), 'found')
  await withoutDaemon(tree, async () => {
    t.equal(await other.look(path, 500), 'waits', 'others wait')
    t.match(await manager.look(path, 2000), REFUSED, 'the manager is answered')
  })
  t.equal(await other.answer(2000), 'found', 'the other process was answered')
  t.equal(await manager.look(path, 2000), 'found')
})

t.test('twin: if the guard does not stand in, the manager waits', async (t) => {
  const loop = loopDisk(t)
  const manager = looker(t)
  const idle = twinGuard(t, 'if (served.fuse >= 0) stand_in();\n  } else {', '} else {')
  const { tree } = await startGuarded(t, manager.pid, { program: idle })
  const path = join(tree.mountpoint, loop.diskseq())
  await withoutDaemon(tree, async () => t.equal(await manager.look(path, 1000), 'waits'))
})

/**
 * One process waits for a name. Another one makes a directory, and waits for the lock that the
 * kernel holds for the first. Then the manager looks.
 */
async function behindALock(t: Test, args: string[]) {
  const loop = loopDisk(t)
  const manager = looker(t)
  const others = Array.from({ length: 4 }, () => looker(t))
  const calls = ['stat', 'lstat', 'create', 'mkdir'] as const
  const { tree } = await startGuarded(t, manager.pid, { args })
  const path = join(tree.mountpoint, loop.diskseq())
  const answer = await withoutDaemon(tree, async () => {
    await Promise.all(calls.map((call, i) => others[i]?.look(call === 'mkdir' ? `${tree.mountpoint}/x` : path, 100, call)))
    return manager.look(path, 2000)
  })
  return { answer, others: await Promise.all(others.map((other) => other.answer(2000))) }
}

/** Processes that the guard has started. */
const childrenOf = (pid: number) => readFileSync(`/proc/${pid}/task/${pid}/children`, 'latin1').trim().split(' ').map(Number)

/** How often the tree was mounted. */
const mounts = (tree: ManagedTree) => tree.log().filter(({ msg }) => msg === 'mounted').length

/**
 * The guard and others end while the service manager does nothing, as it looks at the tree. What the manager and another process
 * get, then and later.
 */
async function allGone(t: Test, which: (tree: ManagedTree) => number[], program?: string) {
  const loop = loopDisk(t)
  const manager = looker(t)
  const other = looker(t)
  const { tree } = await startGuarded(t, manager.pid, program ? { program } : {})
  const path = join(tree.mountpoint, loop.diskseq())
  t.equal(await manager.look(path, 2000), 'found')
  const ready = tree.ready()
  process.kill(tree.manager, 'SIGSTOP')
  cleanup(t, () => process.kill(tree.manager, 'SIGCONT'))
  killAtOnce(tree.guard(), which(tree))
  const answers = [await manager.look(path, 2000), await other.look(path, 500)]
  process.kill(tree.manager, 'SIGCONT')
  await until(() => tree.ready() > ready, 30_000)
  const later = answers[1] === 'waits' ? await other.answer(5000) : await other.look(path, 5000)
  return { manager: answers[0] as string, other: answers[1], later, mounts: mounts(tree) }
}

const both = (tree: ManagedTree) => [tree.pid()]
const whole = (tree: ManagedTree) => childrenOf(tree.guard())

t.test('the service manager does not wait when the guard has ended with the daemon', async (t) => {
  const { manager, ...rest } = await allGone(t, both)
  t.match(manager, REFUSED)
  t.strictSame(rest, { other: 'waits', later: 'found', mounts: 1 })
})

t.test('twin: if the understudy does not stand in, the manager waits', async (t) => {
  const idle = changedGuard(t, ['if (alone && (reader < 0 || fds[2].revents)) return;', 'if (fds[2].revents) reader = -1;'])
  t.equal((await allGone(t, both, idle)).manager, 'waits')
})

/**
 * The guard and the daemon end, and the service manager starts nothing. What a process gets that looks then, and how often the tree was
 * mounted in the end.
 */
async function noManager(t: Test, seconds: number, program?: string) {
  const loop = loopDisk(t)
  const other = looker(t)
  const { tree } = await startGuarded(t, 1, program ? { program } : {})
  const path = join(tree.mountpoint, loop.diskseq())
  const ready = tree.ready()
  process.kill(tree.manager, 'SIGSTOP')
  cleanup(t, () => process.kill(tree.manager, 'SIGCONT'))
  killAtOnce(tree.guard(), both(tree))
  const answer = await other.look(path, seconds * 1000)
  process.kill(tree.manager, 'SIGCONT')
  await until(() => tree.ready() > ready, 30_000)
  t.equal(answer === 'waits' ? await other.answer(5000) : await other.look(path, 5000), 'found')
  tree.end('SIGKILL')
  await until(() => tree.ready() > ready + 1, 30_000)
  t.equal(await other.look(path, 5000), 'found')
  return { answer, mounts: mounts(tree) }
}

/**
 * The guard and the daemon end, and then the service manager with its descriptors. -> whether the mount is gone, and
 * whether the command for that has run
 */
async function noService(t: Test, program?: string): Promise<boolean[]> {
  const { file } = loopDisk(t)
  const mark = `${file}.mark`
  cleanup(t, () => rmSync(mark, { force: true }))
  const { tree } = await startGuarded(t, 1, { args: ['-x', `: >'${mark}'`], ...(program && { program }) })
  process.kill(tree.manager, 'SIGSTOP')
  killAtOnce(tree.guard(), both(tree))
  await sleep(300)
  process.kill(tree.manager, 'SIGKILL')
  const gone = () => !readFileSync('/proc/self/mounts', 'utf8').includes(` ${tree.mountpoint} `)
  await until(() => gone() && existsSync(mark)).catch(() => {})
  return [gone(), existsSync(mark)]
}

t.test('if the service is stopped meanwhile, the mount is removed', async (t) => {
  t.strictSame(await noService(t), [true, true])
})

t.test('twin: if the understudy only ends, the mount is dead, and names lead to it', async (t) => {
  t.strictSame(await noService(t, twinGuard(t, '} else if (is_the_guard && served.fuse >= 0) {', '} else if (false) {')), [false, false])
})

t.test('no process waits for a service manager that starts nothing', { timeout: 90_000 }, async (t) => {
  t.strictSame(await noManager(t, 30), { answer: 'found', mounts: 1 })
})

t.test('twin: if the understudy starts no daemon, it does', { timeout: 90_000 }, async (t) => {
  const idle = twinGuard(t, '#define UNDERSTUDY_MS 1000', '#define UNDERSTUDY_MS 60000')
  t.strictSame(await noManager(t, 5, idle), { answer: 'waits', mounts: 1 })
})

t.test('if all that could answer have ended, nothing waits: the mount is gone with them, and there is a new one', async (t) => {
  const { manager, other, later, mounts } = await allGone(t, whole)
  for (const answer of [manager, other]) t.match(answer, /Transport endpoint is not connected|Software caused connection abort/)
  t.strictSame({ later, mounts }, { later: 'found', mounts: 2 })
})

t.test('twin: if the service manager stores the connection itself, it waits', async (t) => {
  const kept = twinGuard(t, 'strcmp(name, "fuse") != 0', 'name[0] != 0')
  t.equal((await allGone(t, whole, kept)).manager, 'waits')
})

/** Only the daemon is left. How often the tree was mounted once the next one serves, and after that one has ended. */
async function daemonLeft(t: Test, program?: string): Promise<number[]> {
  const { tree } = await startGuarded(t, 1, { args: ['-h', '3'], ...(program && { program }) })
  const ready = tree.ready()
  killAtOnce(
    tree.guard(),
    childrenOf(tree.guard()).filter((pid) => pid !== tree.pid()),
  )
  await until(() => tree.ready() === ready + 1, 30_000)
  const after = mounts(tree)
  tree.end('SIGKILL')
  await until(() => tree.ready() === ready + 2, 30_000)
  return [after, mounts(tree)]
}

t.test('the next guard gets the connection from the daemon, if nothing else has it', async (t) => {
  t.strictSame(await daemonLeft(t), [1, 1])
})

t.test('twin: if it does not ask, the tree is mounted anew', async (t) => {
  t.strictSame(await daemonLeft(t, twinGuard(t, 'if (served.fuse < 0) say_to(&serving, "give");', '')), [2, 2])
})

t.test('the service manager does not wait for a lock held by a process that waits for the next daemon', async (t) => {
  const { answer, others } = await behindALock(t, [])
  t.match(answer, REFUSED, 'the manager is answered')
  t.strictSame(others, ['found', 'found', 'opened', 'Operation not permitted'], 'the others are answered by the next daemon')
})

t.test('twin: if the guard only stores requests, it does', async (t) => {
  const { answer } = await behindALock(t, ['-p', '100000'])
  t.equal(answer, 'waits')
})

t.test('the same by the second path, whether it was looked up before or not', async (t) => {
  for (const known of [true, false]) {
    const [loop, another] = [loopDisk(t), loopDisk(t)]
    const manager = looker(t)
    const [patient, late, wrong] = [looker(t), looker(t), looker(t)]
    const { tree } = await startGuarded(t, manager.pid)
    const directory = join(tree.mountpoint, '.dm', loop.diskseq())
    const path = join(directory, basename(loop.path))
    if (known) t.equal(await late.look(path, 2000), 'found')
    await withoutDaemon(tree, async () => {
      t.equal(await patient.look(path, 500), 'waits')
      t.match(await manager.look(path, 2000), REFUSED, 'the manager is answered')
      // Once no request has come for a moment, callers wait where they hold no lock.
      t.equal(await late.look(path, 500), 'waits')
      t.match(await wrong.look(join(directory, basename(another.path)), 500), /^waits$|^No such file/, "another disk's name is not there")
    })
    for (const one of [patient, late]) t.equal(await one.answer(5000), 'found', 'and found by the next daemon')
  }
})

/**
 * The kernel has the inode by the first path. Without a daemon, a process makes a directory at the second path, and so has that
 * directory locked. Then the manager looks there.
 */
async function behindASecondPath(t: Test, program?: string) {
  const loop = loopDisk(t)
  const manager = looker(t)
  const [one, other] = [looker(t), looker(t)]
  const { tree } = await startGuarded(t, manager.pid, program ? { program } : {})
  const fd = openSync(join(tree.mountpoint, loop.diskseq()), 'r')
  const path = join(tree.mountpoint, '.dm', loop.diskseq(), basename(loop.path))
  // At the first look the daemon begins to watch the directory. For that the kernel asks for it once more
  // (fuse_get_dentry).
  const none = join(tree.mountpoint, '.dm', loop.diskseq(), 'none')
  for (let i = 0; i < 2; i++) t.equal(await one.look(none, 2000), 'No such file or directory')
  const answer = await withoutDaemon(tree, async () => {
    await other.look(path, 300, 'mkdir')
    return manager.look(path, 2000)
  })
  closeSync(fd)
  return answer
}

t.test('the service manager does not wait if another process has the directory of a second path locked', async (t) => {
  t.match(await behindASecondPath(t), REFUSED)
})

t.test('twin: if a device in use is left to the next daemon there, it waits', async (t) => {
  const leaves = twinGuard(t, 'if (in_use && name.by_kernel_name) return give_inode(&header, text, id);', '')
  t.equal(await behindASecondPath(t, leaves), 'waits')
})

/** A path that is open, and the name that /proc shows for it. */
async function inUse(t: Test, manager: number, program?: string) {
  const loop = loopDisk(t)
  const { tree } = await startGuarded(t, manager, { ...(program && { program }) })
  const path = join(tree.mountpoint, loop.diskseq())
  const fd = openSync(path, 'r')
  cleanup(t, () => closeSync(fd))
  return { tree, path, called: () => readlinkSync(`/proc/self/fd/${fd}`) }
}

t.test('what is in use keeps its name, whichever process looks at it meanwhile', async (t) => {
  const manager = looker(t)
  const other = looker(t)
  const { tree, path, called } = await inUse(t, manager.pid)
  await withoutDaemon(tree, async () => {
    t.equal(await manager.look(path, 2000), 'Cannot allocate memory')
    t.equal(await other.look(path, 1000), 'waits')
    t.equal(called(), path, 'it is not shown as deleted')
  })
  t.equal(await other.answer(2000), 'found')
  t.equal(called(), path)
})

for (const who of ['the manager', 'another process']) {
  t.test(`twin: if the guard does not ask what is in use, it is shown as deleted when ${who} has looked`, async (t) => {
    const one = looker(t)
    const heedless = twinGuard(t, 'bool in_use = id != 0 && has_inode(id);', 'bool in_use = false;')
    const { tree, path, called } = await inUse(t, who === 'the manager' ? one.pid : 1, heedless)
    await withoutDaemon(tree, async () => {
      const answer = one.look(path, 1000)
      await until(() => called() === `${path} (deleted)`)
      t.equal(await answer, who === 'the manager' ? 'No such file or directory' : 'waits')
    })
    t.equal(called(), `${path} (deleted)`, 'and stays so')
  })
}

t.test('a caller does not wait long for a list of names, as the kernel holds the lock', async (t) => {
  const other = looker(t)
  loopDisk(t)
  const { tree } = await startGuarded(t, 1)
  t.equal(await other.look(tree.mountpoint, 2000, 'opendir'), 'opened')
  await withoutDaemon(tree, async () => t.equal(await other.look('/', 3000, 'list'), 'Connection timed out'))
  t.equal(await other.look('/', 2000, 'list'), 'found')
})

t.test('a request of the manager that the dead daemon had read is answered as well', async (t) => {
  const loop = loopDisk(t)
  const manager = looker(t)
  const { tree } = await startGuarded(t, manager.pid)
  process.kill(tree.pid(), 'SIGSTOP') // a request made now stays unread, or was just read
  const answer = manager.look(join(tree.mountpoint, loop.diskseq()), 3000)
  await sleep(100)
  await withoutDaemon(tree, async () => t.match(await answer, REFUSED))
})

t.test('if no daemon comes, waiting has an end', async (t) => {
  const loop = loopDisk(t)
  const other = looker(t)
  const { tree, log } = await startGuarded(t, 1, { args: ['-a', '2'] })
  await withoutDaemon(tree, async () => {
    t.match(await other.look(join(tree.mountpoint, loop.diskseq()), 10_000), /connection abort|not connected/)
  })
  t.match(log(), /no daemon has come; the mount is taken away/)
  t.equal(await other.look(join(tree.mountpoint, loop.diskseq()), 2000), 'found', 'the next one mounts anew')
})

/** Keeps each pause between two starts short. */
const QUICK: Change = ['#define RETRY_READY_MAX_MS 300000', '#define RETRY_READY_MAX_MS 1000']

/** Ends each daemon as soon as it serves, as if it had a fault. -> whether the mount was removed */
async function breaking(t: Test, seconds: number, ...changes: Change[]): Promise<boolean> {
  const { tree, log } = await startGuarded(t, 1, { args: ['-a', '4'], program: changedGuard(t, QUICK, ...changes) })
  const end = performance.now() + seconds * 1000
  for (let broken = 0; performance.now() < end; await sleep(20)) {
    if (log().includes('the mount is taken away')) return true
    if (tree.ready() === broken) continue
    broken = tree.ready()
    process.kill(tree.pid(), 'SIGALRM')
  }
  return false
}

onlyAtLength('nor do callers wait for ever if each daemon ends as soon as it serves', { timeout: 60_000 }, async (t) => {
  t.ok(await breaking(t, 40))
})

t.test('twin: if each of these counts as one that serves, they do', { timeout: 60_000 }, async (t) => {
  t.notOk(await breaking(t, 12, ['if (failures == 0) served.unready = 0;', 'served.unready = 0;']))
})

/** Nice values of all threads of a process, without those that have ended meanwhile. */
const niceOf = (pid: number) =>
  spawnSync('sh', ['-c', `cat /proc/${pid}/task/*/stat`], { encoding: 'utf8' })
    .stdout.split('\n')
    .filter((line) => line !== '')
    .map((stat) => Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[16]))

/**
 * Whether a daemon that starts has priority over others; and whether a daemon that is ready does not, with any of its
 * threads.
 */
async function hurries(t: Test, program?: string): Promise<boolean[]> {
  const { tree } = await startGuarded(t, 1, program ? { program } : {})
  const usual = niceOf(process.pid)[0] as number
  const seen = (condition: () => boolean) =>
    until(condition, 3000).then(
      () => true,
      () => false,
    )
  const before = () => childrenOf(tree.guard()).some((pid) => niceOf(pid)[0] === usual - 10)
  const starting = await withoutDaemon(tree, () => seen(before))
  t.ok(niceOf(tree.pid()).length > 4)
  return [starting, await seen(() => niceOf(tree.pid()).every((nice) => nice === usual))]
}

t.test('a daemon that starts has priority over others, until it is ready', async (t) => {
  t.strictSame(await hurries(t), [true, true])
})

t.test('twin: without that it has none', async (t) => {
  t.strictSame(await hurries(t, twinGuard(t, 'setpriority(PRIO_PROCESS, 0, nice_value() - HURRY);', '')), [false, true])
})

t.test('twin: if that is not taken back, it always has', async (t) => {
  t.strictSame(await hurries(t, twinGuard(t, 'take_time(&serving);', '')), [true, false])
})

t.test('a daemon that stands still is killed, and the next one takes over', async (t) => {
  const loop = loopDisk(t)
  const other = looker(t)
  const { tree, log } = await startGuarded(t, 1, { args: ['-h', '3'] })
  process.kill(tree.pid(), 'SIGSTOP')
  t.equal(await other.look(join(tree.mountpoint, loop.diskseq()), 15_000), 'found')
  t.match(log(), /does not answer any more; it is killed/)
  await until(() => tree.ready() === 2)
})

t.test('so is a daemon whose event loop runs but that does not answer', async (t) => {
  const loop = loopDisk(t)
  const other = looker(t)
  const { tree, log } = await startGuarded(t, 1, { args: ['-h', '3'], twin: 'mute' })
  process.kill(tree.pid(), 'SIGHUP')
  await sleep(200)
  t.equal(await other.look(join(tree.mountpoint, loop.diskseq()), 15_000), 'found')
  t.match(log(), /does not answer any more; it is killed/)
})

const NOBODY = '65534'

/** A hostile process: see directory.c. */
const abuser = (t: Test, tree: ManagedTree, mode: 'lock' | 'list' | 'wait', threads = 1) =>
  startBlk(t, 'directory', '--dir', tree.mountpoint, '--mode', mode, '--uid', NOBODY, '--threads', String(threads))

/**
 * A user has the kernel hold the directory's lock; then the guard asks whether the tree answers. -> what the guard says
 */
async function whileLocked(t: Test, program?: string) {
  // In this twin any user may read the directory; in the real daemon only root can do this.
  const { tree, log } = await startGuarded(t, 1, { args: ['-h', '3'], twin: 'readable-root', ...(program && { program }) })
  await abuser(t, tree, 'lock')
  await until(() => /killed/.test(log()), 12_000).catch(() => {})
  return { ready: tree.ready(), said: log() }
}

onlyAtLength('a daemon is not taken for hung because a user holds the lock of the directory', { timeout: 60_000 }, async (t) => {
  t.strictSame(await whileLocked(t), { ready: 1, said: '' })
})

t.test('twin: if the guard asks for a name, it is', { timeout: 60_000 }, async (t) => {
  const name = twinGuard(t, 'fstatfs(fd, &figures) == 0', 'faccessat(fd, ".probe", F_OK, 0) < 0 && errno == ENOENT')
  t.match((await whileLocked(t, name)).said, /does not answer any more; it is killed/)
})

/** A daemon dies after it was asked whether it answers, and the next one comes late. -> what the guard says */
async function askedBefore(t: Test, twin: Twin) {
  const { tree, log } = await startGuarded(t, 1, { args: ['-h', '3'], twin })
  process.kill(tree.pid(), 'SIGSTOP')
  // Later than PROBE_TICKS, and not yet too late for an answer.
  await sleep(6500)
  await withoutDaemon(tree, () => sleep(4000))
  await until(() => /killed/.test(log()), 8000).catch(() => {})
  return log()
}

t.test('the next daemon answers what the one before was asked, also by the guard', { timeout: 60_000 }, async (t) => {
  t.equal(await askedBefore(t, 'none'), '')
})

t.test('twin: if requests are not stored, it is taken for hung', { timeout: 60_000 }, async (t) => {
  t.match(await askedBefore(t, 'no-journal'), /does not answer any more; it is killed/)
})

/** Slows the guard's reads, so that it always has something to read: a caller that is answered asks again meanwhile. */
const SLOW_READER: Change = [
  '    ssize_t n = read(served.fuse, buffer, sizeof buffer);',
  '    usleep(2000); ssize_t n = read(served.fuse, buffer, sizeof buffer);',
]

/**
 * Many threads read the directory all the time; a daemon dies, and the next one comes. -> whether that one gets to
 * serve
 */
async function whileListed(t: Test, ...changes: Change[]) {
  const program = changedGuard(t, SLOW_READER, ...changes)
  const { tree } = await startGuarded(t, 1, { twin: 'readable-root', program })
  const user = await abuser(t, tree, 'list', 32)
  await user.ask()
  await sleep(200)
  // Waits until callers are answered at once.
  const ready = tree.ready()
  tree.hold(true)
  tree.end('SIGKILL')
  await sleep(1500)
  tree.hold(false)
  return until(() => tree.ready() > ready, 15_000).then(
    () => true,
    () => false,
  )
}

t.test('the guard hears the next daemon, however many requests come meanwhile', { timeout: 60_000 }, async (t) => {
  t.equal(await whileListed(t), true)
})

t.test('twin: if the guard reads for as long as there is something to read, it does not', { timeout: 60_000 }, async (t) => {
  t.equal(await whileListed(t, ['for (int i = 0; i < READS_MAX; i++) {', 'for (;;) {']), false)
})

/** How many of the requests that are stored for the next daemon are marked as interrupted. */
function interruptedOf(tree: ManagedTree): number {
  const { STATE_SMALL_AT, STATE_SMALL_SIZE, STATE_SMALL_COUNT, SLOT_INTERRUPTED_AT } = native.layout
  const memory = descriptors(tree.guard())
    .map((fd) => `/proc/${tree.guard()}/fd/${fd}`)
    .find((path) => readlinkSync(path).startsWith('/memfd:'))
  const state = readFileSync(memory as string)
  return Array.from({ length: STATE_SMALL_COUNT }, (_, i) => STATE_SMALL_AT + i * STATE_SMALL_SIZE).filter(
    (at) => state.readUInt32LE(at) !== 0 && state.readUInt32LE(at + SLOT_INTERRUPTED_AT) !== 0,
  ).length
}

/** What root gets while there is no daemon, and many threads of another user wait or are interrupted. */
async function whileFilled(t: Test, threads: number, { interrupted = false, program }: { interrupted?: boolean; program?: string }) {
  const loop = loopDisk(t)
  const root = looker(t)
  const { tree } = await startGuarded(t, 1, program ? { program } : {})
  const path = join(tree.mountpoint, loop.diskseq())
  const user = await abuser(t, tree, 'wait', threads)
  let marked = 0
  const meanwhile = await withoutDaemon(tree, async () => {
    await sleep(700) // from here on names are answered at once
    await user.ask()
    await sleep(1500)
    if (interrupted) await user.ask()
    await sleep(500)
    marked = interruptedOf(tree)
    return root.look(path, 500)
  })
  return { meanwhile, later: await root.answer(10_000), marked }
}

const { STATE_SMALL_COUNT } = native.layout

onlyAtLength('requests of root are stored, however many threads of another user wait', { timeout: 60_000 }, async (t) => {
  t.match(await whileFilled(t, STATE_SMALL_COUNT + 100, {}), { meanwhile: 'waits', later: 'found', marked: 0 })
})

t.test('twin: if no room is reserved for root, they are not', { timeout: 60_000 }, async (t) => {
  const program = twinGuard(t, '(header.uid == 0 ? 0 : slots->count / ROOT_PARTS)', '0')
  t.equal((await whileFilled(t, STATE_SMALL_COUNT + 100, { program })).meanwhile, 'Connection timed out')
})

onlyAtLength('requests of root do not lose their room to messages that need no answer', { timeout: 60_000 }, async (t) => {
  const threads = STATE_SMALL_COUNT / 2 + 100
  const { meanwhile, later, marked } = await whileFilled(t, threads, { interrupted: true })
  t.strictSame([meanwhile, later], ['waits', 'found'])
  t.equal(marked, threads, 'the next daemon hears which callers want to give up')
})

t.test('twin: if such messages are stored, they do', { timeout: 60_000 }, async (t) => {
  const program = twinGuard(
    t,
    'if (!expects_answer(header.opcode)) hear(buffer, (size_t)n);',
    'if (!expects_answer(header.opcode)) store_request(buffer, (size_t)n);',
  )
  const { meanwhile, marked } = await whileFilled(t, STATE_SMALL_COUNT / 2 + 100, { interrupted: true, program })
  t.equal(meanwhile, 'Connection timed out')
  t.equal(marked, 0)
})
