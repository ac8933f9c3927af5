// SPDX-License-Identifier: MIT
/** What a session has been asked and has answered since its start. Counters of fixed number: nothing grows, nothing is allocated per request. */
import { errnoName } from '../util/errno.js'
import { Opcode } from './wire.js'

const OPCODES = 64
/** linux/errno.h has fewer. */
const ERRNOS = 256
/** Up to 2^i us each; the last one all that takes longer than half an hour. */
const BUCKETS = 32

/** Of a name's way to an answer: a LOOKUP, the READLINK that waits for a slow disk, the GETATTR before an open. */
const TIMED: ReadonlySet<number> = new Set([Opcode.LOOKUP, Opcode.READLINK, Opcode.GETATTR])

/** How long answers took: `times[i]` of them at most 2^i us. */
export interface Times {
  readonly count: number
  readonly sumUSec: number
  readonly buckets: readonly number[]
}

export class Metrics {
  private readonly byOpcode = new Float64Array(OPCODES)
  private readonly byErrno = new Float64Array(ERRNOS)
  private readonly byTime = new Float64Array(BUCKETS)
  private sumMs = 0

  request(opcode: number): void {
    if (opcode < OPCODES) this.byOpcode[opcode]!++
  }

  /** @param ms since the request was read */
  answer(opcode: number, errno: number, ms: number): void {
    if (errno < ERRNOS) this.byErrno[errno]!++
    if (!TIMED.has(opcode)) return
    this.sumMs += ms
    // Math.clz32: of the 32-bit number below it, the number of leading zeros.
    this.byTime[Math.min(BUCKETS - 1, 32 - Math.clz32(Math.max(0, Math.ceil(ms * 1000) - 1)))]!++
  }

  /** By the names of requests, LOOKUP and so on; those that there were. */
  get requests(): Readonly<Record<string, number>> {
    const names = new Map<number, string>(Object.entries(Opcode).map(([name, opcode]) => [opcode, name]))
    return counted(this.byOpcode, (opcode) => names.get(opcode) ?? `opcode ${opcode}`)
  }

  /** By the errno's name; `ok` where there was none. */
  get answers(): Readonly<Record<string, number>> {
    return counted(this.byErrno, (errno) => (errno === 0 ? 'ok' : errnoName(errno)))
  }

  get times(): Times {
    const buckets = [...this.byTime]
    return { count: buckets.reduce((sum, n) => sum + n, 0), sumUSec: Math.round(this.sumMs * 1000), buckets }
  }
}

function counted(counts: Float64Array, nameOf: (index: number) => string): Record<string, number> {
  return Object.fromEntries([...counts].flatMap((count, i) => (count > 0 ? [[nameOf(i), count] as const] : [])))
}

/**
 * The time within which that part of the answers came, as far as the buckets tell: the upper end of one, us.
 *
 * @param part 0.5 for the median
 * @returns undefined without answers
 */
export function quantile({ count, buckets }: Times, part: number): number | undefined {
  let left = count * part
  for (const [i, n] of buckets.entries()) {
    left -= n
    if (left <= 0 && count > 0) return 2 ** i
  }
  return undefined
}
