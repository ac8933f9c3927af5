/** Waiting for the next request: while that pays, and hardly ever where it does not. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { Patience, WAIT_US } from '../src/patience.js'
import { blk } from './helpers/blk.js'
import { loopDisk, sleep, startTree, threads, type Twin } from './helpers/tree.js'

/** How often it waits, of so many chances that all end alike. */
function waits(patience: Patience, chances: number, came: boolean, ms = 0.01): number {
  let count = 0
  for (let i = 0; i < chances; i++) {
    if (!patience.pays()) continue
    count++
    patience.waited(came, ms)
  }
  return count
}

t.test('it waits each time while the next request comes at once', async (t) => {
  t.equal(waits(new Patience(), 1000, true), 1000)
})

t.test('in vain it waits ever more rarely', async (t) => {
  const patience = new Patience()
  t.equal(waits(patience, 1, false), 1, 'at first')
  t.ok(waits(patience, 1000, false) <= 15, 'and then seldom')
  t.ok(waits(patience, 10_000, false) >= 10, 'but now and then')
})

t.test('once it was worth it, it waits each time again', async (t) => {
  const patience = new Patience()
  waits(patience, 1000, false)
  t.equal(waits(patience, 1200, true) > 1000, true)
})

t.test('a wait in which others had the processor was in vain', async (t) => {
  t.ok(waits(new Patience(), 1000, true, 3) <= 15)
})

/** Processor time of all its threads so far, us: the first field of proc(5), schedstat, in ns. */
const cpuUs = (pid: number) =>
  threads(pid).reduce((us, tid) => us + Number.parseInt(readFileSync(`/proc/${pid}/task/${tid}/schedstat`, 'utf8')) / 1000, 0)

const OPENS = 300

/** What an open every few ms costs the daemon, us of processor time. */
async function rare(t: Test, twin: Twin): Promise<number> {
  const disk = loopDisk(t)
  const tree = await startTree(t, { twin })
  const path = join(tree.mountpoint, disk.diskseq())
  await blk('openlat', '--path', path, '--count', '50', '--pause-ms', '2')
  await sleep(50)
  const before = cpuUs(tree.pid)
  await blk('openlat', '--path', path, '--count', String(OPENS), '--pause-ms', '2')
  return (cpuUs(tree.pid) - before) / OPENS
}

/** In turns, and of each the least: other work on the machine only ever adds to it. */
const ROUNDS = 5

t.test('who opens a disk now and then costs no wait each time', async (t) => {
  let [patient, asleep] = [Infinity, Infinity]
  for (let i = 0; i < ROUNDS; i++) {
    patient = Math.min(patient, await rare(t, 'waits-always'))
    asleep = Math.min(asleep, await rare(t, 'none'))
  }
  t.comment(`${asleep.toFixed(0)} us of processor time for an open, ${patient.toFixed(0)} if it waits each time`)
  t.ok(patient - asleep > WAIT_US / 4, 'twin: a wait each time is seen')
})
