// SPDX-License-Identifier: MIT
/**
 * `mount --replace`: a daemon takes the tree over from one that runs. The outgoing daemon
 * listens on a socket that only root can use, sends its descriptors to the incoming daemon, and goes on
 * serving. When the incoming daemon asks for its turn, the outgoing one stops, and ends only
 * when it hears that the other one serves. So callers wait for some
 * milliseconds; and if the incoming daemon fails at any time, the outgoing one goes on.
 *
 * Messages of the outgoing daemon: names with descriptors, then "end"; of the incoming one: "take"; then
 * perhaps more descriptors, and "taken" when no more requests are read; of the incoming one: "serves".
 */
import { mkdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'

import { afterTicks } from '../util/clock.js'
import { E, errnoName, errnoOf, UserError } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { FSTYPE, isDead, mountsAt, RUNTIME_DIRECTORY } from '../util/mountpoint.js'
import type { Native, Poll } from '../native.js'
import { batches, type Descriptors } from './service-manager.js'

/** How long to wait for the outgoing daemon's answer, ms. It answers at once, unless it is stopped. */
const TIME_LIMIT_MS = 5000

/** Room for all that an incoming daemon is sent at once: thousands of descriptors, and a message for each lease. */
const SEND_BYTES = 4 << 20

const TAKE = 'take'
const TAKEN = 'taken'
const SERVES = 'serves'
const END = 'end'

/** @param device of the mount, as in mountinfo */
export const socketOf = (device: string): string => join(RUNTIME_DIRECTORY, `${device}.replace`)

type Calls = Pick<
  Native,
  | 'Poll'
  | 'look'
  | 'packetListen'
  | 'acceptConnection'
  | 'sendBuffer'
  | 'packetConnect'
  | 'sendDescriptors'
  | 'receiveDescriptors'
  | 'awaitMessage'
  | 'close'
>

/** What a hand-over asks of the outgoing daemon. */
export interface TreeOwner {
  /** Stops reading requests. */
  pause(): void
  /** Goes on after {@link pause}: the incoming daemon has failed. */
  goOn(): void
  /** The incoming daemon serves: this process ends at once. */
  handedOver(): void
}

export interface HandOverParts {
  readonly native: Calls
  /** Of the socket, see {@link socketOf}. */
  readonly path: string
  /** What the incoming daemon needs. */
  readonly descriptors: () => Descriptors
  readonly owner: TreeOwner
  readonly log: Logger
}

/** The outgoing daemon's side. */
export class HandOver {
  private listener = -1
  private poll: Poll | undefined
  private incoming: { fd: number; poll: Poll } | undefined
  private readonly buffer = new Uint8Array(16)

  constructor(private readonly parts: HandOverParts) {}

  start(): void {
    try {
      mkdirSync(RUNTIME_DIRECTORY, { mode: 0o700, recursive: true })
      this.unlink() // of the daemon before this one, or of one that died
    } catch (error) {
      return this.parts.log.debug({ errno: errnoName(errnoOf(error)), directory: RUNTIME_DIRECTORY }, 'cannot be replaced while it runs')
    }
    this.listener = this.parts.native.packetListen(this.parts.path)
    if (this.listener < 0) {
      return this.parts.log.debug({ errno: errnoName(this.listener), socket: this.parts.path }, 'cannot be replaced while it runs')
    }
    this.poll = new this.parts.native.Poll(this.listener, () => this.accept())
  }

  /** Sends descriptors that are new to the incoming daemon, if there is one. */
  send(name: string, fds: readonly number[]): void {
    if (this.incoming !== undefined) sendAll(this.parts.native, this.incoming.fd, name, fds)
  }

  private accept(): void {
    const fd = this.parts.native.acceptConnection(this.listener)
    if (fd < 0) return
    this.parts.native.sendBuffer(fd, SEND_BYTES)
    // One at a time; the first one has waited for longer.
    if (this.incoming !== undefined) return void this.parts.native.close(fd)
    this.incoming = { fd, poll: new this.parts.native.Poll(fd, () => this.heard()) }
    this.parts.log.info('another daemon asks for the tree')
    for (const [name, fds] of this.parts.descriptors()) this.send(name, fds)
    this.parts.native.sendDescriptors(fd, END, [])
  }

  private heard(): void {
    const incoming = this.incoming
    if (incoming === undefined) return
    const found = this.parts.native.receiveDescriptors(incoming.fd, this.buffer, false)
    if (found === -E.EAGAIN) return
    if (typeof found === 'number' || found[0] === 0) return this.drop()
    this.parts.owner.pause()
    this.parts.native.sendDescriptors(incoming.fd, TAKEN, [])
    // Blocks: nothing may change while the other daemon reads the shared memory.
    this.parts.native.awaitMessage(incoming.fd)
    const last = this.parts.native.receiveDescriptors(incoming.fd, this.buffer, false)
    if (typeof last !== 'number' && last[0] !== 0) return this.parts.owner.handedOver()
    this.parts.log.warn('the daemon that was to take over has failed; this one goes on')
    this.drop()
    this.parts.owner.goOn()
  }

  private drop(): void {
    this.incoming?.poll.close()
    if (this.incoming !== undefined) this.parts.native.close(this.incoming.fd)
    this.incoming = undefined
  }

  close(): void {
    this.drop()
    this.poll?.close()
    if (this.listener < 0) return
    this.parts.native.close(this.listener)
    this.listener = -1
    this.unlink()
  }

  private unlink(): void {
    rmSync(this.parts.path, { force: true })
  }
}

function sendAll(native: Calls, fd: number, name: string, fds: readonly number[]): void {
  for (const batch of batches(fds)) native.sendDescriptors(fd, name, batch)
}

/** The incoming daemon's side. */
export class OutgoingDaemon {
  private readonly buffer = new Uint8Array(64)

  private constructor(
    private readonly native: Calls,
    private readonly fd: number,
    private readonly mountpoint: string,
  ) {}

  /**
   * @returns the outgoing daemon, which serves until {@link take}, and what it has; undefined if no tree is served there
   * @throws UserError if it does not answer
   */
  static async ask(native: Calls, mountpoint: string): Promise<{ daemon: OutgoingDaemon; stored: Descriptors } | undefined> {
    const top = mountsAt(mountpoint).at(-1)
    if (top?.type !== FSTYPE || (await isDead(native, mountpoint))) return undefined
    const { device } = top
    const fd = native.packetConnect(socketOf(device))
    if (fd < 0) {
      throw new UserError(
        `${mountpoint}: the daemon that serves it cannot be replaced: ${errnoName(fd)} from ${socketOf(device)}; ` +
          'if it is a systemd service, use systemctl restart',
      )
    }
    const daemon = new OutgoingDaemon(native, fd, mountpoint)
    return { daemon, stored: await daemon.receive(END) }
  }

  /**
   * Stops the outgoing daemon until {@link serves}, or until this process ends.
   *
   * @returns what it has stored since it was asked
   */
  take(): Promise<Descriptors> {
    this.native.sendDescriptors(this.fd, TAKE, [])
    return this.receive(TAKEN)
  }

  /** Ends the outgoing daemon. */
  serves(): void {
    this.native.sendDescriptors(this.fd, SERVES, [])
    this.native.close(this.fd)
  }

  private receive(last: string): Promise<Descriptors> {
    const stored = new Map<string, number[]>()
    return new Promise((resolve, reject) => {
      const end = (error?: string) => {
        poll.close()
        inTime()
        if (error === undefined) return resolve(stored)
        for (const fds of stored.values()) for (const fd of fds) this.native.close(fd)
        this.native.close(this.fd)
        reject(new UserError(`${this.mountpoint}: the daemon that serves it ${error}; it goes on`))
      }
      const inTime = afterTicks(TIME_LIMIT_MS, () => end('does not answer'))
      const heard = () => {
        for (;;) {
          const found = this.native.receiveDescriptors(this.fd, this.buffer, false)
          if (found === -E.EAGAIN) return
          if (typeof found === 'number' || found[0] === 0) return end('has hung up')
          const [length, ...fds] = found
          const name = Buffer.from(this.buffer.subarray(0, length)).toString()
          if (name === last) return end()
          stored.set(name, [...(stored.get(name) ?? []), ...fds])
        }
      }
      const poll = new this.native.Poll(this.fd, heard)
    })
  }
}
