// SPDX-License-Identifier: MIT
/**
 * An environment that ends while the addon works for it: threads in system calls, answers on their
 * way, descriptors being polled. Run with sanitizers.
 *
 *   node ends.js TIMES SEED
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { isMainThread, parentPort, Worker } from 'node:worker_threads'

import { native } from '../../src/native.js'
import { Random } from './choices.js'

const [times = '20', seed = '1'] = process.argv.slice(2)

/** Begun, and not done: root may have 128 of them, and other tests have some. */
let watches = 0
const WATCHES_MAX = 5

function watch(): void {
  watches++
  native.inotifyWatch('/', 0x20, (_, fd) => {
    watches--
    native.close(fd)
  })
}

/** Begins work without waiting for it. */
function begin(): void {
  const dev = native.openDirectory('/dev')
  const poll = new native.Poll(native.ueventOpen(4096), () => {})
  for (let i = 0; i < 20; i++) {
    native.scanBlock('/sys/class/block', () => void begin())
    native.openDevice(dev, 'null', 0, false, -1, () => {})
    if (watches < WATCHES_MAX) watch()
    native.closeDevice(-1, () => {})
    native.lookAtThreads([process.pid, true, 1, true], () => {})
    native.credentials(process.pid, [0, 6], () => {})
  }
  if (Math.random() < 0.5) poll.close()
}

if (isMainThread) {
  const c = new Random(Number(seed))
  for (let i = 0; i < Number(times); i++) {
    const worker = new Worker(new URL(import.meta.url))
    const ended = new Promise((resolve) => worker.once('exit', resolve))
    await new Promise((resolve) => worker.once('online', resolve))
    await sleep(c.below(60))
    worker.postMessage('end')
    await ended
  }
  begin()
  await sleep(c.below(20))
  console.log(JSON.stringify({ inputs: Number(times) + 1 }))
  process.exit(0)
} else {
  // Not by terminate(), which may come in the middle of a call: then no library for Node-API does better than to end the process.
  parentPort?.once('message', () => process.exit(0))
  begin()
}
