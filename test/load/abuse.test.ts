// SPDX-License-Identifier: MIT
/**
 * An unprivileged user queries the tree with a hundred threads, for names that exist and names that
 * do not. No disk is opened for it, nothing about it is remembered, and root is served meanwhile.
 * For how quickly, see bench/faults.ts.
 */
import { chmodSync } from 'node:fs'
import { release } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { Intents } from '../../src/gate/intent.js'
import { native } from '../../src/native.js'
import { blk } from '../helpers/blk.js'
import {
  cleanup,
  descriptors,
  loopDisk,
  manyDisks,
  openDevices,
  report,
  resident,
  run,
  type RunningBlk,
  type RunningTree,
  sleep,
  startBlk,
  startTree,
  threads,
  type Twin,
  until,
  watchNode,
  zramDisk,
} from '../helpers/tree.js'

const NOBODY = '65534'
const THREADS = '100'
const SECONDS = 1
/** A busy machine may take long, but not as long as serving the requests of a hundred threads. */
const BOUND_MS = 500
/** How much a heap that has been at work may grow. Each thread has made some thousand requests. */
const MORE_MIB = 40

/** What was asked, how often, and with which errors. */
type Outcome = Record<'names' | 'numbers' | 'stat' | 'open' | 'list', { n: number; errors: Record<string, number> }>

function start(t: Test, tree: RunningTree, ...args: string[]): Promise<RunningBlk> {
  return startBlk(t, 'abuse', '--dir', tree.mountpoint, '--threads', THREADS, ...args)
}

async function setup(t: Test, twin: Twin) {
  const zram = zramDisk(t)
  const loop = loopDisk(t)
  loop.addPartition(1, 64, 64)
  for (const path of [zram.path, loop.path, `${loop.path}p1`]) chmodSync(path, 0o600)
  const tree = await startTree(t, { twin })
  const seen = [await watchNode(t, zram.path, tree), await watchNode(t, loop.path, tree), await watchNode(t, `${loop.path}p1`, tree)]
  const opens = async () => {
    let count = 0
    for (const since of seen) count += (await since()).open
    return count
  }
  await opens()
  return { tree, opens, loop, names: [zram.diskseq(), loop.diskseq(), `${loop.diskseq()}p1`], mine: zram.diskseq() }
}

t.test('no disk is opened for a hundred unprivileged threads', async (t) => {
  const { tree, opens, names } = await setup(t, 'none')
  const nobody = await start(t, tree, '--uid', NOBODY, '--names', names.join())
  await nobody.ask()
  for (let i = 0; i < SECONDS * 10; i++) {
    await sleep(100)
    const open = openDevices(tree.pid)
    if (open.length > 0) t.fail(`open: ${open}`)
  }
  const outcome = JSON.parse(await nobody.end()) as Outcome
  t.equal(await opens(), 0, 'none of them was opened')
  for (const [what, errno] of [
    ['names', 'ENOENT'],
    ['numbers', 'ENOENT'],
    ['open', 'EACCES'],
    // A reader of a directory can hold its lock for ever: see Tree.rootAttr().
    ['list', 'EACCES'],
  ] as const) {
    const { n, errors } = outcome[what]
    t.ok(n > 100, `${n} times ${what}`)
    t.strictSame(errors, { [errno]: n }, `each fails with ${errno}`)
  }
  const { n, errors } = outcome.stat
  t.ok(n > 100, `${n} times stat`)
  t.strictSame(errors, {}, 'which any user may do')
})

t.test('twin: without the access check, disks are opened for an unprivileged user', async (t) => {
  const { tree, opens, names } = await setup(t, 'no-access-rule')
  const nobody = await start(t, tree, '--uid', NOBODY, '--names', names.join())
  await nobody.ask()
  await sleep(500)
  await nobody.end()
  t.ok((await opens()) > 0, 'they were opened')
})

t.test('root is served meanwhile', async (t) => {
  const { tree, mine, names } = await setup(t, 'none')
  const nobody = await start(t, tree, '--uid', NOBODY, '--names', names.join())
  await nobody.ask()
  const path = join(tree.mountpoint, mine)
  const { n, max_ns, errors } = await blk('openlat', '--path', path, '--count', '2000', '--seconds', String(SECONDS))
  t.strictSame(errors, {}, `${n} opens`)
  t.ok(n >= 100, 'at least a hundred opens')
  t.ok(max_ns / 1e6 < BOUND_MS, `${(max_ns / 1e6).toFixed(1)} ms at most`)
  await nobody.end()
})

const SOMEBODY_ELSE = '65533'
/** Fewer requests than the daemon reads at once. */
const CROWD = 50

/**
 * Many threads of one user make requests while the daemon is stopped, then another user makes one,
 * and root last. Returns how many of the crowd are answered before each of those two once the
 * daemon continues.
 */
async function answeredBefore(t: Test, twin: Twin): Promise<{ somebodyElse: number; root: number }> {
  zramDisk(t)
  const tree = await startTree(t, { twin, args: ['--note-answers'] })
  const intents = new Intents(native)
  cleanup(t, () => intents.close())
  const start = (uid: string, count: number) =>
    startBlk(t, 'abuse', '--dir', tree.mountpoint, '--uid', uid, '--threads', String(count), '--kinds', 'names')
  const askers: [RunningBlk, number][] = [
    [await start(NOBODY, CROWD), CROWD],
    [await start(SOMEBODY_ELSE, 1), 1],
    [await start('0', 1), 1],
  ]
  await report(tree) // drops the answers noted so far
  process.kill(tree.pid, 'SIGSTOP')
  cleanup(t, () => process.kill(tree.pid, 'SIGCONT'))
  for (const [{ pid, ask }, count] of askers) {
    await ask()
    const waiting = () => threads(pid).filter((tid) => intents.of(Number(tid)).intent !== 'unknown')
    await until(() => waiting().length === count)
  }
  process.kill(tree.pid, 'SIGCONT')
  await Promise.all(askers.map(([asker]) => asker.end()))
  const answered = (await report(tree))['answered'] as number[]
  const crowdBefore = (uid: string) => answered.slice(0, answered.indexOf(Number(uid))).filter((other) => other === Number(NOBODY)).length
  return { somebodyElse: crowdBefore(SOMEBODY_ELSE), root: crowdBefore('0') }
}

t.test('a single request does not wait behind a crowd that came first', async (t) => {
  const { somebodyElse, root } = await answeredBefore(t, 'none')
  t.ok(root <= 1, `root is answered after ${root} of them`)
  // On the way to a name the kernel asks for the directory's ACL. Two of the crowd get that answer
  // and then ask for their names. A LOOKUP goes before a request for the ACL, whichever user waits
  // for that.
  t.ok(somebodyElse <= 4, `another user after ${somebodyElse}`)
})

t.test('twin: if requests are answered in order of arrival, both users wait behind the crowd', async (t) => {
  const { somebodyElse, root } = await answeredBefore(t, 'as-they-come')
  t.ok(root >= CROWD, `root is answered after ${root} of them`)
  t.ok(somebodyElse >= CROWD, `another user after ${somebodyElse}`)
})

async function remembered(tree: RunningTree): Promise<Record<string, number>> {
  const { inodes, dead, pending, waiting } = await report(tree)
  return { inodes, dead, pending, waiting }
}

const NOTHING = { inodes: 0, dead: 0, pending: 0, waiting: 0 }

/** Growth of memory in MiB from one run to the next, once it has reached its usual size. */
async function growth(t: Test, tree: RunningTree, ask: () => Promise<unknown>): Promise<number> {
  await ask()
  await ask()
  const before = resident(tree.pid)
  await ask()
  const more = resident(tree.pid) - before
  t.comment(`${before.toFixed(0)} MiB, then ${more.toFixed(0)} more`)
  return more
}

t.test('nothing is remembered but the disks that exist, for as long as they exist', async (t) => {
  const { tree, names, loop } = await setup(t, 'none')
  const before = descriptors(tree.pid).length
  const more = await growth(t, tree, async () => {
    const nobody = await start(t, tree, '--uid', NOBODY, '--names', names.join())
    await nobody.ask()
    await sleep(SECONDS * 1000)
    await nobody.end()
  })
  t.ok(more < MORE_MIB, 'memory does not grow')
  // The kernel keeps their names: an open of a name that it knows needs no lock.
  const { inodes = 0, ...rest } = await remembered(tree)
  t.ok(inodes <= names.length, `${inodes} inodes of ${names.length} disks`)
  t.strictSame({ inodes: 0, ...rest }, NOTHING, 'no request is remembered')
  loop.detach()
  const kept = 1 // the other disk
  await until(async () => JSON.stringify(await remembered(tree)) === JSON.stringify({ ...NOTHING, inodes: kept }), 10_000)
  t.pass('disks that are gone are not remembered')
  // Intents keeps one file in /proc open for each of the threads that asked last.
  t.ok(descriptors(tree.pid).length <= before + 64 + 8, `${descriptors(tree.pid).length - before} more descriptors`)
})

const CACHED = 100

/** How many of the names that the kernel knows it forgets when one of those disks goes. */
async function forgotten(t: Test, twin: Twin): Promise<number> {
  const loop = loopDisk(t)
  await manyDisks(t, CACHED, loop.file)
  const tree = await startTree(t, { twin })
  await run('ls', ['-lL', tree.mountpoint])
  const { inodes: before = 0 } = await remembered(tree)
  t.ok(before > CACHED, `${before} names`)
  loop.detach()
  const count = async () => before - ((await remembered(tree))['inodes'] ?? 0)
  await until(async () => (await count()) > 0, 3000).catch(() => {})
  await sleep(100)
  return count()
}

const [MAJOR = 0, MINOR = 0] = release().split('.').map(Number)
const PRUNES = MAJOR > 6 || (MAJOR === 6 && MINOR >= 18)

t.test('the name of a disk that is gone is forgotten, and no other', async (t) => {
  if (!PRUNES) return void t.comment('FUSE_NOTIFY_PRUNE came with Linux 6.18: here names are forgotten only when there are many')
  t.equal(await forgotten(t, 'none'), 1)
})

t.test('twin: where the kernel cannot be told which name, it is not forgotten', async (t) => {
  t.equal(await forgotten(t, 'no-prune'), 0)
})

t.test('twin: a daemon that remembers each request grows', async (t) => {
  const { tree, names } = await setup(t, 'hoards')
  const nobody = await start(t, tree, '--uid', NOBODY, '--names', names.join())
  await nobody.ask()
  await sleep(500)
  const before = resident(tree.pid)
  await until(() => resident(tree.pid) - before > MORE_MIB, 30_000)
  await nobody.end()
  t.pass('its memory grows')
})

t.test('directories that are never closed cost nothing', async (t) => {
  const { tree } = await setup(t, 'none')
  const before = resident(tree.pid)
  // Root, as no other user may open the directory.
  await startBlk(t, 'abuse-directories', '--dir', tree.mountpoint, '--uid', '0', '--count', '10000')
  t.strictSame(await remembered(tree), NOTHING)
  const more = resident(tree.pid) - before
  t.ok(more < MORE_MIB, `${more.toFixed(1)} MiB more`)
})
