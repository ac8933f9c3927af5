// SPDX-License-Identifier: MIT
/**
 * The daemon's side of the guard (native/guard/guard.c), which has started this daemon, stores what
 * the next daemon needs, and starts that one when this one ends.
 *
 * An incoming daemon receives all that is stored, and asks for its turn when it is ready for requests. Until
 * then the outgoing daemon serves, or the guard stands in.
 */
import { E, errnoName, UserError } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import type { Native, Poll } from '../native.js'
import { batches, type Descriptors } from './service-manager.js'

/** The environment variable with the socket's descriptor. */
const VARIABLE = 'DISKSEQFS_GUARD'

/** The connection and the root directory, by the guard's names. The guard does not store these; daemons give them to it on request. */
const GIVEN: readonly string[] = ['fuse', 'root']

/** Time before a message that the guard had no room for is sent again, ms. */
const RETRY_MS = 10
const GONE = new UserError('the guard that has started this daemon is gone')

type Calls = Pick<Native, 'Poll' | 'sendDescriptors' | 'receiveDescriptors' | 'close'>

export class Guard {
  private readonly buffer = new Uint8Array(64)
  private readonly poll: Poll
  private received = new Map<string, number[]>()
  /** The descriptors that came before `last`, the message that ends them. */
  private complete: { readonly last: string; readonly stored: Descriptors } | undefined
  private waiting:
    { readonly last: string; readonly done: (stored: Descriptors) => void; readonly failed: (error: Error) => void } | undefined
  private ends: (() => void) | undefined
  private gone = false
  /** Descriptors to be {@link GIVEN} on request. */
  private readonly given = new Map<string, readonly number[]>()
  /** Who waits until the guard has them all. */
  private readonly toldNext: (() => void)[] = []
  /** Messages that the guard had no room for, in order. */
  private readonly unsent: { readonly text: string; readonly fds: readonly number[] }[] = []

  /** @param fd of the socket; owned from now on */
  constructor(
    private readonly native: Calls,
    private readonly fd: number,
    private readonly log: Logger,
  ) {
    this.poll = new native.Poll(fd, () => this.heard())
  }

  /** The guard that has started this process, if one has. */
  static ofThisProcess(native: Native, log: Logger): Guard | undefined {
    const fd = process.env[VARIABLE]
    delete process.env[VARIABLE]
    if (fd === undefined || !/^\d{1,9}$/.test(fd)) return undefined
    return new Guard(native, Number(fd), log)
  }

  /**
   * Receives what the guard has stored.
   * @throws UserError if the guard ends before it has sent everything
   */
  async stored(): Promise<Descriptors> {
    const stored = await this.until('end')
    for (const name of GIVEN) this.given.set(name, stored.get(name)?.slice(-1) ?? [])
    return stored
  }

  /**
   * Waits for this daemon's turn to read requests.
   *
   * @returns what the outgoing daemon has stored since {@link stored}
   * @throws UserError if the guard ends before
   */
  take(): Promise<Descriptors> {
    const taken = this.until('taken')
    this.send('take')
    return taken
  }

  /** @param handedOver called when it is another daemon's turn: this one reads no more requests, and ends */
  serves(status: string, handedOver: () => void): void {
    this.ends = handedOver
    if (this.gone) return handedOver()
    this.send(`ready ${status}`)
  }

  /** Tells the guard that no daemon is to follow. This one ends when it is done, with or without the guard. */
  over(): void {
    this.ends = undefined
    this.send('over')
  }

  /** Stores descriptors for the next daemon. */
  put(name: string, fds: readonly number[]): void {
    if (GIVEN.includes(name)) this.given.set(name, fds)
    for (const batch of batches(fds)) this.send(`put ${name}`, batch)
  }

  /** Removes everything stored under these names. */
  remove(names: readonly string[]): void {
    for (const name of names) this.send(`remove ${name}`)
  }

  /** Resolves when the guard has all that it was sent so far, or is gone; it reads that also when this process has ended. */
  told(): Promise<void> {
    return new Promise((resolve) => {
      if (this.unsent.length === 0) resolve()
      else this.toldNext.push(resolve)
    })
  }

  close(): void {
    this.poll.close()
    this.native.close(this.fd)
  }

  private until(last: string): Promise<Descriptors> {
    return new Promise((done, failed) => {
      this.waiting = { last, done, failed }
      if (this.gone) failed(GONE)
      else this.deliver()
    })
  }

  private heard(): void {
    for (;;) {
      const found = this.native.receiveDescriptors(this.fd, this.buffer, false)
      if (found === -E.EAGAIN) return
      if (typeof found === 'number' || found[0] === 0) return this.lost()
      const [length, ...fds] = found
      const text = Buffer.from(this.buffer.subarray(0, length)).toString()
      if (text === 'leave') this.ends?.()
      else if (text === 'give') for (const [name, fds] of this.given) this.put(name, fds)
      else if (text === 'end' || text === 'taken') this.finish(text)
      else if (fds.length > 0) this.received.set(text, [...(this.received.get(text) ?? []), ...fds])
    }
  }

  /**
   * The guard has ended, and the next guard does not know of this daemon (else it would hold the other end
   * of this socket): it stands in as if there were no daemon.
   */
  private lost(): void {
    this.poll.close()
    this.gone = true
    this.log.warn('the guard has ended')
    this.waiting?.failed(GONE)
    this.ends?.()
  }

  private finish(last: string): void {
    this.complete = { last, stored: this.received }
    this.received = new Map()
    this.deliver()
  }

  private deliver(): void {
    const { complete, waiting } = this
    if (complete === undefined || complete.last !== waiting?.last) return
    this.complete = this.waiting = undefined
    waiting.done(complete.stored)
  }

  private send(text: string, fds: readonly number[] = []): void {
    this.unsent.push({ text, fds })
    if (this.unsent.length === 1) this.flush()
  }

  private flush(): void {
    for (let next; (next = this.unsent[0]) !== undefined; this.unsent.shift()) {
      const rc = this.gone ? -E.EPIPE : this.native.sendDescriptors(this.fd, next.text, next.fds)
      if (rc === -E.EAGAIN) return void setTimeout(() => this.flush(), RETRY_MS)
      if (rc < 0 && rc !== -E.EPIPE) this.log.warn({ errno: errnoName(rc) }, 'cannot tell the guard')
    }
    for (const resolve of this.toldNext.splice(0)) resolve()
  }
}
