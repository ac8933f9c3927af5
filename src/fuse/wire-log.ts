// SPDX-License-Identifier: MIT
/**
 * The wire log (`--log-level trace`): one line for each request of the kernel, one for each answer, and one for
 * each notification, to debug programs that use the tree.
 */
import { monotonicMs } from '../util/clock.js'
import { errnoName } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { type InHeader, type Message, Opcode } from './wire.js'

const NAMES: ReadonlyMap<number, string> = new Map(Object.entries(Opcode).map(([name, number]) => [number, name]))
/** Requests that begin with a name. */
const NAMED: ReadonlySet<number> = new Set([Opcode.LOOKUP, Opcode.UNLINK, Opcode.REMOVEXATTR])

/** A name is any user's words, byte by byte: it must not write lines of its own, nor to a terminal. */
const shown = (name: string) => name.replace(/[^ -~]|\\/g, (byte) => `\\x${byte.charCodeAt(0).toString(16).padStart(2, '0')}`)

export class WireLog {
  /** When each request was read, ms, by its number. */
  private readonly began = new Map<bigint, number>()

  private constructor(private readonly trace: (fields: object, message: string) => void) {}

  /** Undefined where such lines are not wanted: then they cost nothing. */
  static of(log: Logger): WireLog | undefined {
    return log.isLevelEnabled?.('trace') === true ? new WireLog((fields, message) => log.trace?.(fields, message)) : undefined
  }

  request({ opcode, unique, nodeid, uid, tid }: InHeader, message: Message, isAnswered: boolean): void {
    if (isAnswered) this.began.set(unique, monotonicMs())
    const name = NAMED.has(opcode) ? message.string(0) : undefined
    this.trace(
      { unique: String(unique), nodeid: String(nodeid), ...(name !== undefined && { name: shown(name) }), tid, uid },
      NAMES.get(opcode) ?? `opcode ${opcode}`,
    )
  }

  /** @param result of write(2): negative if the caller was gone */
  answer(unique: bigint, error: number, result: number): void {
    const began = this.began.get(unique)
    this.began.delete(unique)
    this.trace(
      {
        unique: String(unique),
        verdict: error === 0 ? 'ok' : errnoName(error),
        ...(began !== undefined && { us: Math.round((monotonicMs() - began) * 1000) }),
        ...(result < 0 && { taken: errnoName(result) }),
      },
      'answer',
    )
  }

  notify(what: 'INVAL_INODE' | 'PRUNE', nodeid: bigint, result: number): void {
    this.trace({ nodeid: String(nodeid), verdict: result < 0 ? errnoName(result) : 'ok' }, what)
  }
}
