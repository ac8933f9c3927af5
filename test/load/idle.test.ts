// SPDX-License-Identifier: MIT
/**
 * The daemon releases what is not in use: soon enough for a program that needs the disk alone.
 * After that it has nothing to do and does nothing.
 */
import { execFileSync } from 'node:child_process'
import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { blk } from '../helpers/blk.js'
import { LONG, twoForms } from '../helpers/long.js'
import {
  cleanup,
  loopDisk,
  openDevices,
  type RunningTree,
  run,
  sleep,
  startTree,
  threads,
  until,
  type ZramDisk,
  zramDisk,
} from '../helpers/tree.js'

const ROUNDS = LONG ? 1000 : 200
const FEW_ROUNDS = 20
const FREE_MS = 20
/** Share of the rounds that may take longer: on a machine that does other work, nothing is prompt all the time. */
const LATE = 0.1

function report(t: Test, result: Record<string, any>): void {
  const { n, within_20ms, first_try, failed, disturbed, max_us, p50_us, p99_us, errors } = result
  t.comment(
    `${t.name}: ${within_20ms} of ${n} within 20 ms, ${first_try} at the first try, ${failed} failed, ${disturbed} run again (the machine stood still); ` +
      `free after ${p50_us} us (median), ${p99_us} us (99 %), ${max_us} us at most; errors ${JSON.stringify(errors)}`,
  )
}

async function exclusiveZram(t: Test, tree: RunningTree, zram: ZramDisk, rounds: number) {
  const result = await blk('exclusive-zram', '--nr', String(zram.number), '--count', String(rounds), '--dir', tree.mountpoint)
  report(t, result)
  return result
}

t.test(twoForms('a disk is free 20 ms after its last close'), async (t) => {
  const tree = await startTree(t)
  const result = await exclusiveZram(t, tree, zramDisk(t), ROUNDS)
  t.ok(result['within_20ms'] >= (1 - LATE) * ROUNDS, 'could be reset within 20 ms')
  t.equal(result['failed'], 0, 'and within a second each time')
  t.strictSame(result['errors'], {}, 'no errors')
})

t.test(twoForms('a partition is free 20 ms after its last close'), async (t) => {
  const tree = await startTree(t)
  const loop = loopDisk(t)
  const result = await blk('exclusive-part', '--loop', loop.kname.slice('loop'.length), '--count', String(ROUNDS), '--dir', tree.mountpoint)
  report(t, result)
  t.ok(result['within_20ms'] >= (1 - LATE) * ROUNDS, 'could be deleted within 20 ms')
  t.equal(result['failed'], 0, 'and within a second each time')
  t.strictSame(result['errors'], {}, 'no errors')
})

/** asm-generic/fcntl.h */
const O_PATH = 0o10000000

/** Measures a disk that another program had open, while its inode is in use. */
function timesUntilFree(tree: RunningTree, zram: ZramDisk, rounds: number): number[] {
  return Array.from({ length: rounds }, () => {
    const path = join(tree.mountpoint, zram.diskseq())
    const node = openSync(path, O_PATH)
    try {
      execFileSync('sh', ['-c', ': <"$0"', path])
      return timeUntilFree(zram)
    } finally {
      closeSync(node)
    }
  })
}

t.test('a disk is free though a process has its inode', async (t) => {
  const tree = await startTree(t)
  const times = timesUntilFree(tree, zramDisk(t), FEW_ROUNDS)
  t.comment(`free after ${Math.max(...times).toFixed(1)} ms at most`)
  t.ok(times.filter((ms) => ms <= FREE_MS).length >= (1 - LATE) * times.length, `within ${FREE_MS} ms`)
})

t.test('twin: if pins last until the kernel forgets the inode, it is not', async (t) => {
  const zram = zramDisk(t)
  const tree = await startTree(t, { twin: 'callers-by-forget' })
  t.throws(() => timesUntilFree(tree, zram, 1), { code: 'EBUSY' }, 'not even within two seconds')
})

/** Resets the disk as soon as that is possible; how long that took, in ms. */
function timeUntilFree(zram: ZramDisk): number {
  const began = performance.now()
  for (;;) {
    const asked = performance.now()
    try {
      zram.reset()
      writeFileSync(`/sys/block/${zram.kname}/disksize`, String(1 << 20))
      return asked - began
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EBUSY' || asked - began > 2000) throw error
    }
  }
}

t.test('a disk that was written to is free, though udev is told of it first', async (t) => {
  const tree = await startTree(t)
  const zram = zramDisk(t)
  const times: number[] = []
  for (let i = 0; i < 5 * FEW_ROUNDS; i++) {
    closeSync(openSync(join(tree.mountpoint, zram.diskseq()), 'r+'))
    times.push(timeUntilFree(zram))
  }
  const inTime = times.filter((ms) => ms <= FREE_MS).length
  t.ok(
    inTime >= (1 - LATE) * times.length,
    `${Math.max(...times).toFixed(1)} ms at most; ${inTime} of ${times.length} within ${FREE_MS} ms`,
  )
})

t.test('a disk is free while another one stays in use in a way that the daemon cannot see', async (t) => {
  const tree = await startTree(t)
  const zram = zramDisk(t)
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-bind-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const target = join(directory, 'node')
  writeFileSync(target, '')
  // A mount of its own keeps the name in use, without a file that is open.
  const { code } = await run('mount', ['--bind', join(tree.mountpoint, loopDisk(t).diskseq()), target])
  t.equal(code, 0, 'bind mount of a node')
  cleanup(t, () => run('umount', ['-l', target]))
  await sleep(2000)
  const result = await exclusiveZram(t, tree, zram, FEW_ROUNDS)
  t.ok(result['within_20ms'] >= (1 - LATE) * FEW_ROUNDS, 'could be reset within 20 ms')
  t.equal(result['failed'], 0, 'and within a second each time')
})

/** How often the process went to sleep of its own accord, all threads together. */
function sleeps(pid: number): number {
  let sum = 0
  for (const tid of threads(pid)) {
    const status = statSync(`/proc/${pid}/task/${tid}`, { throwIfNoEntry: false })
      ? readFileSync(`/proc/${pid}/task/${tid}/status`, 'utf8')
      : ''
    sum += Number(/^voluntary_ctxt_switches:\s*(\d+)$/m.exec(status)?.[1] ?? 0)
  }
  return sum
}

t.test('a daemon without requests has no device open and sleeps', async (t) => {
  const tree = await startTree(t)
  const zram = zramDisk(t)
  const loop = loopDisk(t)
  loop.addPartition(1, 64, 128)
  const names = [zram.diskseq(), loop.diskseq(), `${loop.diskseq()}p1`, `${loop.diskseq()}-part1`]
  const paths = names.map((name) => join(tree.mountpoint, name))
  for (let round = 0; round < 20; round++) {
    const fds = paths.map((path, i) => openSync(path, (i + round) % 3 === 0 ? 'r+' : 'r'))
    for (const path of paths) statSync(path)
    fds.forEach((fd) => closeSync(fd))
  }
  await until(() => openDevices(tree.pid).length === 0, 1000)
  t.pass('no device is open any more')
  // It may busy-poll for the next request before it sleeps again.
  const before = sleeps(tree.pid)
  for (const path of paths) statSync(path)
  await until(() => sleeps(tree.pid) > before, 1000)
  t.pass('its work can be seen in its count of sleeps')
  // Threads that have had nothing to do for five seconds end.
  await sleep(7000)
  // Devices of other programs come and go, and the daemon hears of each. So the quietest of some
  // spans counts. A timer of its own would show in all of them.
  let fewest = Infinity
  for (let i = 0; i < 10 && fewest > 3; i++) {
    const from = sleeps(tree.pid)
    await sleep(2000)
    fewest = Math.min(fewest, sleeps(tree.pid) - from)
  }
  t.comment(`${fewest} sleeps in 2 s, ${threads(tree.pid).length} threads`)
  t.ok(fewest <= 3, 'asleep for two seconds')
})
