// SPDX-License-Identifier: MIT
/** `mount --replace`: one daemon takes the tree over from another, and no user of the tree notices. */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, existsSync, mkdtempSync, openSync, opendirSync, rmdirSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { mountsAt } from '../../src/util/mountpoint.js'
import { socketOf } from '../../src/handover/replace.js'
import { addCounts, blk } from '../helpers/blk.js'
import { LONG, twoForms } from '../helpers/long.js'
import {
  CLI,
  cleanup,
  cli,
  type LoopDisk,
  loopDisk,
  openDevices,
  run,
  type RunningTree,
  sleep,
  startManaged,
  startTree,
  type Twin,
  until,
} from '../helpers/tree.js'
import { ROOT } from '../helpers/root.js'

const SECONDS = LONG ? '10' : '5'
const TIMES = LONG ? 10 : 4
/** The least number of times on a machine that is busy with other things. */
const TIMES_MIN = 2
const SERVES_MS = 300

interface Daemon {
  readonly child: ChildProcess
  readonly pid: number
  log(): string
  readonly ended: Promise<number | null>
}

/** Starts a daemon in the foreground, at the mount point of a tree that the test has started. */
function start(t: Test, mountpoint: string, ...args: string[]): Daemon {
  return startWith(t, [], {}, mountpoint, ...args)
}

function startWith(t: Test, node: readonly string[], env: NodeJS.ProcessEnv, mountpoint: string, ...args: string[]): Daemon {
  const child = spawn(process.execPath, [...node, CLI, 'mount', '-f', '--log-format', 'json', ...args, mountpoint], {
    stdio: ['ignore', 'ignore', 'pipe'],
    env: { ...process.env, ...env },
  })
  let log = ''
  child.stderr?.on('data', (chunk: Buffer) => (log += chunk.toString()))
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  cleanup(t, async () => {
    child.kill('SIGTERM')
    await ended
  })
  return { child, pid: child.pid as number, log: () => log, ended }
}

const tookOver = (daemon: Daemon) => until(() => daemon.log().includes('took over the tree'), 10_000)

const idOf = (mountpoint: string) => mountsAt(mountpoint).map(({ id }) => id)

t.test('the incoming daemon serves the same mount, and the outgoing one ends', async (t) => {
  const loop = loopDisk(t)
  const tree = await startTree(t)
  const before = idOf(tree.mountpoint)
  const path = join(tree.mountpoint, loop.diskseq())
  const held = openSync(path, 'r')
  const directory = opendirSync(tree.mountpoint)
  const next = start(t, tree.mountpoint, '--replace')
  await tookOver(next)
  t.equal(await tree.ended, 0, 'the outgoing daemon has ended with code 0')
  t.strictSame(idOf(tree.mountpoint), before, 'nothing was mounted')
  t.match(directory.readSync()?.name, /^\d+$/, 'an open directory can be read on')
  directory.closeSync()
  closeSync(openSync(`/proc/self/fd/${held}`, 'r'))
  closeSync(openSync(path, 'r'))
  t.pass('disks can be opened, also through an open descriptor')
  closeSync(held)
  await until(() => openDevices(next.pid).length === 0)
  const last = start(t, tree.mountpoint, '--replace')
  await tookOver(last)
  t.equal(await next.ended, 0, 'the same works for the next one')
})

/** Opens disks that are recycled and one that stays, while `change` is done again and again. */
async function underLoad(t: Test, { mountpoint }: RunningTree, steady: LoopDisk, change: () => Promise<void>) {
  let going = true
  let times = 0
  const sum = { right: 0, wrong: 0, longestMs: 0, errors: {} as Record<string, number> }
  const load = async () => {
    // Longer where the machine is busy with other things.
    while (times < TIMES_MIN) {
      const found = await blk('churn', '--mode', 'tree', '--dir', mountpoint, '--seconds', SECONDS)
      sum.right += found['opens_ok']
      sum.wrong += found['wrong_diskseq'] + found['wrong_data']
      sum.longestMs = Math.max(sum.longestMs, Math.round(found['max_open_us'] / 1000))
      addCounts(sum.errors, found['errors'])
    }
    going = false
  }
  const stays: Record<string, number> = {}
  const opener = async () => {
    const path = join(mountpoint, steady.diskseq())
    const count = ['--count', '1000000', '--seconds', SECONDS]
    while (going) addCounts(stays, (await blk('openlat', '--path', path, ...count, '--close-immediately'))['errors'])
  }
  const changes = async () => {
    while (going && times < TIMES) {
      await sleep(SERVES_MS)
      await change()
      times++
    }
  }
  await Promise.all([load(), opener(), changes()])
  const { right, wrong, longestMs, errors } = sum
  t.comment(
    `${times} times, ${right} opens right, ${wrong} wrong, longest wait ${longestMs} ms, errors ${JSON.stringify(errors)}, and ${JSON.stringify(stays)}`,
  )
  t.equal(wrong, 0, 'no open reached another disk')
  return { unexpected: Object.keys(errors).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'), stays: Object.keys(stays) }
}

t.test(twoForms('replaced again and again while disks are recycled: no open fails'), async (t) => {
  const loop = loopDisk(t)
  const tree = await startTree(t)
  let daemon: Daemon | undefined
  const failed = await underLoad(t, tree, loop, async () => {
    const next = start(t, tree.mountpoint, '--replace')
    await tookOver(next)
    if (daemon !== undefined) t.equal(await daemon.ended, 0)
    daemon = next
  })
  t.strictSame(failed, { unexpected: [], stays: [] }, 'no errno but those for a disk that is gone, and none for one that stays')
  await until(() => openDevices(daemon?.pid as number).length === 0)
  t.pass('no pin is left')
})

t.test('twin: with unmount and mount instead, opens fail, but none reaches another disk', async (t) => {
  const loop = loopDisk(t)
  const tree = await startTree(t)
  const { stays } = await underLoad(t, tree, loop, async () => {
    await cli('unmount', tree.mountpoint)
    const next = start(t, tree.mountpoint)
    await until(() => next.log().includes('"mounted"'), 10_000)
  })
  t.not(stays.length, 0, stays.join(' '))
})

const socketIn = (mountpoint: string) => socketOf(mountsAt(mountpoint)[0]?.device as string)

t.test('an incoming daemon that dies before it is ready changes nothing', async (t) => {
  const loop = loopDisk(t)
  const tree = await startTree(t)
  const path = join(tree.mountpoint, loop.diskseq())
  const { stdout } = await run('python3', [
    '-c',
    `import socket
old = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
old.connect(${JSON.stringify(socketIn(tree.mountpoint))})
names = []
while names[-1:] != ['end']:
  data, fds, *_ = socket.recv_fds(old, 100, 253)
  names.append(data.decode())
print(*sorted(names))`,
  ])
  t.equal(stdout, 'closes control end fuse lock mount root state\n', 'it had received everything')
  closeSync(openSync(path, 'r'))
  t.pass('the outgoing daemon still serves')
  const next = start(t, tree.mountpoint, '--replace')
  await tookOver(next)
  t.equal(await tree.ended, 0, 'it hands the tree over to the next daemon that asks')
})

const FAILING = join(ROOT, 'test/helpers/fails-when-taken.cjs')

/** Incoming daemons fail again and again when they get their turn, while disks are recycled. */
async function failing(t: Test, twin: Twin, how: 'killed' | 'error') {
  const loop = loopDisk(t)
  const tree = await startTree(t, { twin, expectErrors: twin !== 'none' })
  let ended = false
  void tree.ended.then(() => (ended = true))
  const failed = await underLoad(t, tree, loop, async () => {
    if (ended) return
    const next = startWith(t, ['--require', FAILING], { FAILS: how }, tree.mountpoint, '--replace')
    t.equal(await next.ended, how === 'killed' ? null : 1)
    if (how === 'error') t.match(next.log(), /cannot open \/dev/)
  })
  return { ...failed, ended, tree }
}

for (const how of ['killed', 'error'] as const) {
  t.test(twoForms(`an incoming daemon that fails when it gets its turn changes nothing either (${how})`), async (t) => {
    const { unexpected, stays, ended, tree } = await failing(t, 'none', how)
    t.strictSame({ unexpected, stays, ended }, { unexpected: [], stays: [], ended: false })
    const next = start(t, tree.mountpoint, '--replace')
    await tookOver(next)
    t.equal(await tree.ended, 0, 'it hands the tree over to the next daemon that asks')
    await until(() => openDevices(next.pid).length === 0)
    t.pass('no pin is left')
  })
}

t.test('its turn, twin: if the outgoing daemon ends as soon as it has given the turn, the tree is dead', async (t) => {
  const { stays, ended, tree } = await failing(t, 'no-comeback', 'killed')
  t.equal(ended, true)
  t.strictSame(stays, ['ENOTCONN'])
  await cli('unmount', tree.mountpoint)
})

t.test('a daemon that stands still is not replaced; the error says why, and the daemon goes on', async (t) => {
  const tree = await startTree(t)
  process.kill(tree.pid, 'SIGSTOP')
  const { code, stderr } = await cli('mount', '-f', '--replace', tree.mountpoint).finally(() => process.kill(tree.pid, 'SIGCONT'))
  t.equal(code, 1)
  t.match(stderr, /the daemon that serves it does not answer/)
  t.equal(statSync(tree.mountpoint).isDirectory(), true)
})

t.test('if nothing is served, --replace mounts', async (t) => {
  const mountpoint = mkdtempSync(join(tmpdir(), 'diskseqfs-test-'))
  cleanup(t, () => rmdirSync(mountpoint))
  const daemon = start(t, mountpoint, '--replace')
  await until(() => daemon.log().includes('"mounted"'))
  t.equal(idOf(mountpoint).length, 1)
})

t.test('--replace works in the background, too', async (t) => {
  const tree = await startTree(t)
  cleanup(t, () => cli('unmount', tree.mountpoint))
  const { code, stderr } = await cli('mount', '--replace', tree.mountpoint)
  t.strictSame({ code, stderr }, { code: 0, stderr: '' })
  t.equal(await tree.ended, 0)
  t.equal(statSync(tree.mountpoint).isDirectory(), true)
})

t.test('a service is not replaced this way', async (t) => {
  const tree = await startManaged(t)
  const { code, stderr } = await cli('mount', '-f', '--replace', tree.mountpoint)
  t.equal(code, 1)
  t.match(stderr, /cannot be replaced: ENOENT.*if it is a systemd service, use systemctl restart/)
})

t.test('only root can connect to the socket, and the socket is removed', async (t) => {
  const tree = await startTree(t)
  const socket = socketIn(tree.mountpoint)
  t.equal(statSync(socket).mode & 0o777, 0o600)
  const { stdout } = await run('python3', [
    '-c',
    `import os, socket
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(${JSON.stringify(socket)})
except PermissionError: print('refused')`,
  ])
  t.equal(stdout, 'refused\n')
  await tree.stop()
  t.equal(existsSync(socket), false)
})
