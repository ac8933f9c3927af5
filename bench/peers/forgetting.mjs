// SPDX-License-Identifier: MIT
/**
 * The daemon, with a way to have the kernel forget names and to see what that takes.
 *
 *   node forgetting.mjs MOUNTPOINT
 *
 * Answers each line on stdin with a line of JSON: "one" has the kernel forget one name that nobody
 * uses (FUSE_NOTIFY_PRUNE), "all" all of them at once, as on kernels that cannot be told which.
 */
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'

import { Daemon } from '../../build/src/daemon/daemon.js'
import { createLogger } from '../../build/src/util/log.js'
import { parseMountOptions } from '../../build/src/util/mountpoint.js'
import { PinLifetime } from '../../build/src/gate/pin-lifetime.js'

const LATE_MS = 60_000

/** FORGETs, and nodes that one is waited for. */
let forgets = 0
const waiting = new Set()
let over = () => {}
const { forget } = PinLifetime.prototype
PinLifetime.prototype.forget = function (inode, ...given) {
  forgets++
  forget.call(this, inode, ...given)
  if (waiting.delete(inode) && waiting.size === 0) over()
}

const { logger: log } = await createLogger('warn', { kind: 'stderr', format: 'json' })
const daemon = new Daemon({
  options: {
    mountpoint: process.argv[2],
    mount: parseMountOptions('', []),
    lingerMs: 5,
    holdSeconds: 30,
    transport: 'session',
    openTimeoutMs: 10_000,
  },
  log,
})
await daemon.start()

/** Nodes that the kernel has, and nobody holds. */
const cached = () => [...daemon.inodes.byId.values()].filter(({ known, pin }) => known && pin === undefined)

/** Begins it, and returns the nodes that the kernel is to forget. */
const kinds = {
  one: ([inode]) => {
    if (!daemon.transport.prune(inode.id)) throw new Error('this kernel cannot be told to forget one name')
    return [inode]
  },
  all: (inodes) => {
    daemon.answers.lifetime.pruneAll()
    return inodes
  },
}

async function measure(kind) {
  const inodes = cached()
  const forgotten = new Promise((resolve, reject) => {
    over = resolve
    setTimeout(reject, LATE_MS, new Error('the kernel does not forget')).unref()
  })
  const before = process.cpuUsage()
  const began = performance.now()
  forgets = 0
  for (const inode of kinds[kind](inodes)) waiting.add(inode)
  await forgotten
  const ms = performance.now() - began
  const { user, system } = process.cpuUsage(before)
  while (daemon.answers.lifetime.pruning) await sleep(1)
  return { names: inodes.length, forgets, ms, cpuMs: (user + system) / 1000 }
}

console.log('ready')
for await (const line of createInterface(process.stdin)) console.log(JSON.stringify(await measure(line)))
daemon.stop()
await daemon.ended
process.exit(0)
