// SPDX-License-Identifier: MIT
/**
 * Where requests are kept from the moment they are read until they are answered, so
 * that another process can go on with them.
 */
import type { Message } from './wire.js'

/** A request that was read and not answered. */
export interface Unanswered {
  readonly message: Message
  readonly slot: number
  /** How often a daemon has ended with this one unanswered. */
  readonly tries: number
  readonly interrupted: boolean
}

export interface RequestStore {
  /** Where requests are read to. */
  readonly landing: Uint8Array
  /** Nothing is in {@link landing}: before a request is read (the kernel writes its length), and when it is done with. */
  clear(): void
  /**
   * Stores a request that cannot be answered at once.
   *
   * @returns what {@link drop} wants; -1 where there is no room
   */
  store(request: Uint8Array): number
  /** A stored request; gone with {@link drop}. */
  stored(slot: number, length: number): Uint8Array
  /** The caller of a stored request wants to give up. */
  interrupt(slot: number): void
  /** A stored request was answered. */
  drop(slot: number): void
  /** Resets the retry counters: a later crash is not blamed on these requests. */
  resetTries(): void
  /** The requests an earlier daemon has not answered; each counts as tried once more from here on. */
  unanswered(): Unanswered[]
}
