// SPDX-License-Identifier: MIT
/**
 * Uevents by the thousand, more than the socket holds. The loss of some must have no effect: soon
 * after the last one the tree has what sysfs has.
 *
 * STORM=10000 for the long form.
 */
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import {
  cleanup,
  diskseqOf,
  loopDisk,
  manyDisks,
  resident,
  type RunningTree,
  run,
  sleep,
  startTree,
  type Twin,
  until,
} from '../helpers/tree.js'

const DISKS = Number(process.env['STORM'] ?? 500)
const ZRAMS = DISKS / 5
/** How long after the last change the tree must show it. */
const SOON_MS = 1000
/** How much longer a busy machine may take. */
const SLACK_MS = 2000
const MORE_MIB = 100

function file(t: Test): string {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-storm-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const path = join(directory, 'disk.img')
  writeFileSync(path, '')
  truncateSync(path, 1 << 20)
  return path
}

/** Makes and removes zram devices, one after another. */
function zrams(count: number): void {
  for (let i = 0; i < count; i++) {
    const number = readFileSync('/sys/class/zram-control/hot_add', 'utf8').trim()
    writeFileSync('/sys/class/zram-control/hot_remove', number)
  }
}

const listed = async (tree: RunningTree) => new Set((await run('ls', [tree.mountpoint])).stdout.trim().split('\n'))

/** Names that are missing, or present without a disk. Disks of other programs are not checked. */
async function wrong(tree: RunningTree, there: readonly string[], gone: readonly string[]): Promise<string[]> {
  const names = await listed(tree)
  return [...there.filter((name) => !names.has(name)), ...gone.filter((name) => names.has(name))]
}

const drops = (tree: RunningTree) => tree.log().filter((line) => /dropped uevents/.test(line['msg'])).length

interface Storm {
  readonly tree: RunningTree
  /** Diskseqs of the disks made during the storm, and of the disks removed. */
  readonly there: string[]
  readonly gone: string[]
}

/**
 * Makes a storm. A daemon with a small socket buffer hears only the beginning of it, as it is
 * stopped meanwhile.
 */
async function storm(t: Test, twin: Twin): Promise<Storm> {
  const old = Array.from({ length: 8 }, () => loopDisk(t))
  const gone = old.map((disk) => disk.diskseq())
  const tree = await startTree(t, { twin })
  t.strictSame(await wrong(tree, gone, []), [], 'all is listed before')
  process.kill(tree.pid, 'SIGSTOP')
  cleanup(t, () => process.kill(tree.pid, 'SIGCONT'))
  const there = (await manyDisks(t, DISKS, file(t))).map(diskseqOf)
  zrams(ZRAMS)
  for (const disk of old) disk.detach()
  process.kill(tree.pid, 'SIGCONT')
  return { tree, there, gone }
}

t.test('a storm that the socket does not hold: the tree is what sysfs has', async (t) => {
  const { tree, there, gone } = await storm(t, 'small-buffer')
  t.equal(there.length, DISKS, `${DISKS} disks were added`)
  const end = performance.now()
  let left: string[] = []
  do left = await wrong(tree, there, gone)
  while (left.length > 0 && performance.now() - end < SOON_MS + SLACK_MS)
  t.strictSame(left, [], 'nothing is missing, and nothing left over')
  t.comment(`${(performance.now() - end).toFixed(0)} ms after the end`)
  t.ok(drops(tree) > 0, 'events were lost')
  t.ok(drops(tree) < 20, `the log says so in ${drops(tree)} lines`)
})

t.test('twin: if the daemon does not notice that events were lost, the tree is wrong', async (t) => {
  const { tree, there, gone } = await storm(t, 'small-buffer-unnoticed')
  await sleep(SOON_MS)
  const left = await wrong(tree, there, gone)
  t.ok(left.length > 0, `${left.length} names are wrong`)
})

t.test('a storm that the daemon listens to: the tree is what sysfs has, and memory is bounded', async (t) => {
  const tree = await startTree(t)
  const before = resident(tree.pid)
  let there: string[] = []
  await t.test('disks are added, and listed', async (t) => {
    there = (await manyDisks(t, DISKS, file(t))).map(diskseqOf)
    await until(async () => (await wrong(tree, there, [])).length === 0, SOON_MS + SLACK_MS)
    zrams(ZRAMS)
  })
  // The end of that subtest has removed the disks.
  await until(async () => (await wrong(tree, [], there)).length === 0, SOON_MS + SLACK_MS)
  const more = resident(tree.pid) - before
  t.ok(more < MORE_MIB, `${more.toFixed(0)} MiB more`)
  t.equal(drops(tree), 0, 'none of its events was lost')
})
