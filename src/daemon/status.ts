// SPDX-License-Identifier: MIT
/** What the daemon has done and has to do: the parts of `Status` in the interface file that are the tree's. */
import type { UeventSocket } from '../devices/uevents.js'
import { type Metrics, quantile } from '../fuse/metrics.js'
import type { Gate } from '../gate/gate.js'
import type { Inode, InodeTable } from '../gate/inode.js'
import { monotonicMs } from '../util/clock.js'

/** Of the pins that are shown one by one. */
const PINS_MAX = 100

export interface StatusParts {
  readonly inodes: InodeTable
  readonly metrics: Metrics | undefined
  readonly gate: Gate | undefined
  readonly uevents: UeventSocket
}

export function statusOf({ inodes, metrics, gate, uevents }: StatusParts) {
  const times = metrics?.times ?? { count: 0, sumUSec: 0, buckets: [] }
  const [p50USec, p99USec] = [quantile(times, 0.5), quantile(times, 0.99)]
  return {
    requests: metrics?.requests ?? {},
    answers: metrics?.answers ?? {},
    refusals: Object.fromEntries(gate?.refused ?? []),
    times: { ...times, ...(p50USec !== undefined && { p50USec }), ...(p99USec !== undefined && { p99USec }) },
    uevents: { received: uevents.received, losses: uevents.losses },
    pins: pinsOf(inodes, PINS_MAX),
  }
}

export const pinsOf = (inodes: InodeTable, max = Infinity) => inodes.pinned(max).map(pinOf)

function pinOf(inode: Inode) {
  const now = monotonicMs()
  const idleUSec = Number.isFinite(inode.usedAt) ? Math.max(0, Math.round((now - inode.usedAt) * 1000)) : undefined
  return { name: inode.name, callers: inode.callers?.size ?? 0, ...(idleUSec !== undefined && { idleUSec }), why: whyPinned(inode, now) }
}

/** The first reason that applies. */
function whyPinned(inode: Inode, now: number): string {
  if (inode.attempts > 0) return 'request'
  if (inode.goesOn) return 'goes_on'
  if ((inode.callers?.size ?? 0) > 0) return 'caller'
  if (inode.unseen || inode.moreCallers) return 'unseen'
  return inode.lingerUntil > now ? 'linger' : 'ending'
}
