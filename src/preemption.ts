/** Whether the kernel takes the processor away from a thread that is in the middle of a call. */
import { readFileSync } from 'node:fs'
import { version } from 'node:os'

import { errnoOf } from './errno.js'

/** "none (voluntary) full", of a kernel that can be told (CONFIG_PREEMPT_DYNAMIC; kernel/sched/debug.c). */
const MODES = '/sys/kernel/debug/sched/preempt'

/**
 * True in doubt.
 *
 * @param kernel as `uname -v` tells it
 */
export function kernelPreempts(modes = MODES, kernel = version()): boolean {
  let now: string | undefined
  try {
    now = /\((\w+)\)/.exec(readFileSync(modes, 'latin1'))?.[1]
  } catch (error) {
    errnoOf(error)
  }
  if (now === undefined) return /\bPREEMPT/.test(kernel)
  return now !== 'none' && now !== 'voluntary'
}
