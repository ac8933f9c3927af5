// SPDX-License-Identifier: MIT
/** Busy-polling for the next request: it happens while it pays, and hardly ever otherwise. */
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { BusyPoll } from '../../src/fuse/busy-poll.js'
import { blk } from '../helpers/blk.js'
import { loopDisk, report, startTree, type Twin } from '../helpers/tree.js'

/** How often it waits, given so many chances that all end alike. */
function waits(busyPoll: BusyPoll, chances: number, came: boolean, ms = 0.01): number {
  let count = 0
  for (let i = 0; i < chances; i++) {
    if (!busyPoll.pays()) continue
    count++
    busyPoll.waited(came, ms)
  }
  return count
}

t.test('it waits each time while the next request comes at once', async (t) => {
  t.equal(waits(new BusyPoll(), 1000, true), 1000)
})

t.test('if waiting is in vain, it waits ever more rarely', async (t) => {
  const busyPoll = new BusyPoll()
  t.equal(waits(busyPoll, 1, false), 1, 'at first')
  t.ok(waits(busyPoll, 1000, false) <= 15, 'and then seldom')
  t.ok(waits(busyPoll, 10_000, false) >= 10, 'but now and then')
})

t.test('once it was worth it, it waits each time again', async (t) => {
  const busyPoll = new BusyPoll()
  waits(busyPoll, 1000, false)
  t.equal(waits(busyPoll, 1200, true) > 1000, true)
})

t.test('a wait in which others had the processor was in vain', async (t) => {
  t.ok(waits(new BusyPoll(), 1000, true, 3) <= 15)
})

const OPENS = 300

/** How often the daemon has waited while so many opens came one by one, some ms apart. */
async function rare(t: Test, twin: Twin): Promise<number> {
  const disk = loopDisk(t)
  const tree = await startTree(t, { twin })
  const path = join(tree.mountpoint, disk.diskseq())
  const before = await report(tree)
  await blk('openlat', '--path', path, '--count', String(OPENS), '--pause-ms', '2')
  return (await report(tree))['waits'] - before['waits']
}

t.test('an open now and then does not cost a wait each time', async (t) => {
  const waits = await rare(t, 'none')
  t.ok(waits < OPENS / 2, `${waits} waits for ${OPENS} opens`)
})

t.test('now and then, twin: a wait each time is seen', async (t) => {
  const waits = await rare(t, 'waits-always')
  t.ok(waits >= OPENS, `${waits} waits for ${OPENS} opens`)
})
