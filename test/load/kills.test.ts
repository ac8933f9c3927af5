// SPDX-License-Identifier: MIT
/** Daemon and guard end again and again while disks are recycled. No open reaches another disk, and none fails. */
import t, { type Test } from 'tap'

import { addCounts, blk } from '../helpers/blk.js'
import { LONG, twoForms } from '../helpers/long.js'
import { killAtOnce, type ManagedTree, openDevices, sleep, startManaged, until } from '../helpers/tree.js'

/** KILLS=200 for the long form. */
const KILLS = Number(process.env['KILLS'] ?? (LONG ? 12 : 4))
const ROUND_SECONDS = LONG ? 10 : 3
/** How long a daemon serves before the next kill. */
const SERVES_MS = 250

interface Churned {
  right: number
  wrong: number
  longestMs: number
  readonly errors: Record<string, number>
}

/** Opens disks while they are recycled; each daemon ends a moment after it is ready. */
async function churn(t: Test, tree: ManagedTree, end: (tree: ManagedTree) => void): Promise<Churned> {
  const sum: Churned = { right: 0, wrong: 0, longestMs: 0, errors: {} }
  let times = 0
  // A machine that is busy with other things takes longer.
  while (times < KILLS || (sum.right <= KILLS && sum.wrong === 0 && times < 20 * KILLS)) {
    let going = true
    const run = blk('churn', '--mode', 'tree', '--dir', tree.mountpoint, '--seconds', String(ROUND_SECONDS)).finally(() => (going = false))
    while (going) {
      const ready = tree.ready()
      await sleep(SERVES_MS * (0.5 + Math.random()))
      if (!going) break
      end(tree)
      times++
      await until(() => tree.ready() > ready, 60_000)
    }
    const result = await run
    sum.right += result['opens_ok']
    sum.wrong += result['wrong_diskseq'] + result['wrong_data']
    sum.longestMs = Math.max(sum.longestMs, Math.round(result['max_open_us'] / 1000))
    addCounts(sum.errors, result['errors'])
  }
  t.comment(
    `${t.name}: ${times} times, ${sum.right} opens right, ${sum.wrong} wrong, ` +
      `longest wait ${sum.longestMs} ms, errors ${JSON.stringify(sum.errors)}`,
  )
  return sum
}

const ENDS: Readonly<Record<string, (tree: ManagedTree) => void>> = {
  'SIGKILL of the daemon': (tree) => tree.end('SIGKILL'),
  'SIGTERM of the daemon': (tree) => tree.end('SIGTERM'),
  'SIGKILL of the guard': (tree) => tree.endGuard('SIGKILL'),
  'SIGTERM of the guard': (tree) => tree.endGuard('SIGTERM'),
  'SIGKILL of both': (tree) => killAtOnce(tree.guard(), [tree.pid()]),
}

for (const [what, end] of Object.entries(ENDS)) {
  const timeout = 60_000 + KILLS * 10_000
  t.test(twoForms(`${what} again and again while disks are recycled: no wrong open, no failed one`), { timeout }, async (t) => {
    const tree = await startManaged(t)
    const { right, wrong, errors } = await churn(t, tree, end)
    t.equal(wrong, 0, 'no open reached another disk')
    t.strictSame(
      Object.keys(errors).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'),
      [],
      'no errno but those for a disk that is gone',
    )
    t.ok(right > KILLS, 'disks were opened all the time')
    await until(() => openDevices(tree.pid()).length === 0)
    t.pass('no pin is left')
  })
}
