// SPDX-License-Identifier: MIT
/**
 * Keeps pins open when the daemon dies. A pin that closed with the daemon would free
 * its device's number while a caller that was answered is about to open it.
 * So each pin is also in a message that waits in a socket, which another process (the
 * guard, the service manager) has open too. Its callers are recorded in the shared memory.
 *
 * Each pin has a socket of its own, used again and again, as a message in the middle of a
 * queue cannot be taken out.
 */
import { errnoName } from '../util/errno.js'
import { type Logger, LogLimit } from '../util/log.js'
import type { Native } from '../native.js'
import type { PinRecord, SharedState } from './shared-state.js'

/** Sockets made at a time, as the service manager is woken each time. */
const BATCH = 32

/** A pin of an earlier daemon. */
export interface StoredPin {
  /** From {@link PinStore.put}. */
  readonly place: number
  readonly fd: number
  readonly record: PinRecord
}

type Calls = Pick<Native, 'selfSocket' | 'sendDescriptors' | 'receiveDescriptors' | 'close'>

export interface PinStoreParts {
  readonly native: Calls
  readonly state: SharedState
  /** Gives copies of new sockets to the process that stores them. */
  readonly store: (sockets: readonly number[]) => void
  readonly log: Logger
}

export class PinStore {
  private readonly sockets: number[] = []
  private readonly buffer = new Uint8Array(16)
  private readonly complaints = new LogLimit(() => {})

  constructor(private readonly parts: PinStoreParts) {}

  /**
   * @param fd an open device, verified
   * @returns a place for {@link drop}; -1 if it cannot be stored
   */
  put(id: bigint, fd: number): number {
    const place = this.parts.state.takePin(id)
    const socket = place < 0 ? -1 : this.socket(place)
    const sent = socket < 0 ? socket : this.parts.native.sendDescriptors(socket, String(place), [fd])
    if (sent >= 0) return place
    this.parts.state.dropPin(place)
    if (this.complaints.take()) {
      this.parts.log.warn({ ...(place >= 0 && { errno: errnoName(sent) }) }, 'a pin is not kept: it ends if the daemon dies')
    }
    return -1
  }

  /** Removes a pin; fast, as closing the pin itself may not be. */
  drop(place: number): void {
    if (place < 0) return
    const socket = this.sockets[place]
    if (socket !== undefined) this.take(socket)
    this.parts.state.dropPin(place)
  }

  /** All of them. */
  get all(): readonly number[] {
    return this.sockets.filter((socket) => socket !== undefined)
  }

  /** Closes the sockets. What is in them stays, in the other process's copies. */
  close(): void {
    // forEach() skips places without a socket.
    this.sockets.forEach((socket) => this.parts.native.close(socket))
    this.sockets.length = 0
  }

  /** Takes the pins out of an earlier daemon's sockets, and uses these from now on. */
  takeOver(sockets: readonly number[]): StoredPin[] {
    const empty: number[] = []
    const records = new Map(this.parts.state.pinRecords().map((record) => [record.index, record]))
    const stored: StoredPin[] = []
    for (const socket of sockets) {
      const [text, fds] = this.look(socket)
      const place = Number(text)
      const record = text === String(place) ? records.get(place) : undefined
      const [fd] = fds
      if (fd === undefined || fds.length > 1 || record === undefined || this.sockets[place] !== undefined) {
        for (const each of fds) this.parts.native.close(each)
        while (this.take(socket)) continue
        empty.push(socket)
        continue
      }
      this.sockets[place] = socket
      records.delete(place)
      stored.push({ place, fd, record })
    }
    // Recorded, but the daemon ended before the pin was in its socket.
    for (const place of records.keys()) this.parts.state.dropPin(place)
    for (let place = 0; empty.length > 0; place++) this.sockets[place] ??= empty.pop() as number
    return stored
  }

  private socket(place: number): number {
    const known = this.sockets[place]
    if (known !== undefined) return known
    const made: number[] = []
    for (let i = 0; i < BATCH; i++) {
      const socket = this.parts.native.selfSocket()
      if (socket < 0) {
        // When descriptors run out, half of the last ones are left for the pins themselves.
        for (const spare of made.splice(Math.ceil(made.length / 2))) this.parts.native.close(spare)
        break
      }
      made.push(socket)
    }
    if (made.length > 0) this.parts.store(made)
    for (let free = place; made.length > 0; free++) this.sockets[free] ??= made.shift() as number
    return this.sockets[place] ?? -1
  }

  private look(socket: number): [text: string, fds: number[]] {
    const found = this.parts.native.receiveDescriptors(socket, this.buffer, true)
    if (typeof found === 'number') return ['', []]
    const [length, ...fds] = found
    return [Buffer.from(this.buffer.subarray(0, length)).toString(), fds]
  }

  /** @returns false if the socket was empty */
  private take(socket: number): boolean {
    const found = this.parts.native.receiveDescriptors(socket, this.buffer, false)
    if (typeof found === 'number') return false
    for (const fd of found.slice(1)) this.parts.native.close(fd)
    return true
  }
}
