// SPDX-License-Identifier: MIT
/**
 * The daemon's side of the guard (native/guard/guard.c), which has started it, keeps what
 * the next daemon needs, and starts that one when this one ends.
 *
 * A daemon that goes on with the mount of another one is told all that is kept,
 * and asks for its turn when it is ready for requests: the one before
 * serves until then, or the guard stands in.
 */
import { E, errnoName, UserError } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import type { Native, Poll } from '../native.js'
import { batches, type Descriptors } from './service-manager.js'

/** Where the guard says which descriptor is the socket. */
const VARIABLE = 'DISKSEQFS_GUARD'

/** The connection, and a directory behind it, as the guard knows them; nobody else keeps these. */
const GIVEN: readonly string[] = ['fuse', 'root']

/** How long to wait before a message is tried again that the guard had no room for, ms. */
const RETRY_MS = 10
const GONE = new UserError('the guard that has started this daemon is gone')

type Calls = Pick<Native, 'Poll' | 'sendDescriptors' | 'receiveDescriptors' | 'close'>

export class Guard {
  private readonly buffer = new Uint8Array(64)
  private readonly poll: Poll
  private received = new Map<string, number[]>()
  /** What is complete: it came with this message, behind the descriptors. */
  private complete: { readonly last: string; readonly stored: Descriptors } | undefined
  private waiting:
    { readonly last: string; readonly done: (stored: Descriptors) => void; readonly failed: (error: Error) => void } | undefined
  private ends: (() => void) | undefined
  private gone = false
  /** What is {@link GIVEN} should the guard ask for it. */
  private readonly given = new Map<string, readonly number[]>()
  /** What the guard had no room for, in the order in which it is to be heard. */
  private readonly unsent: { readonly text: string; readonly fds: readonly number[] }[] = []

  /** @param fd of the socket; owned from now on */
  constructor(
    private readonly native: Calls,
    private readonly fd: number,
    private readonly log: Logger,
  ) {
    this.poll = new native.Poll(fd, () => this.heard())
  }

  /** The one that has started this process; undefined where none has. */
  static ofThisProcess(native: Native, log: Logger): Guard | undefined {
    const fd = process.env[VARIABLE]
    delete process.env[VARIABLE]
    if (fd === undefined || !/^\d{1,9}$/.test(fd)) return undefined
    return new Guard(native, Number(fd), log)
  }

  /**
   * What it has kept for this daemon.
   * @throws UserError if the guard is gone before it has said all
   */
  async stored(): Promise<Descriptors> {
    const stored = await this.until('end')
    for (const name of GIVEN) this.given.set(name, stored.get(name)?.slice(-1) ?? [])
    return stored
  }

  /**
   * From here on it is this daemon's turn to read requests.
   *
   * @returns what the one before has put there since {@link stored}
   * @throws UserError if the guard is gone before it is
   */
  take(): Promise<Descriptors> {
    const taken = this.until('taken')
    this.send('take')
    return taken
  }

  /** @param handedOver called when another daemon is to go on: this one reads no more requests, and ends */
  serves(status: string, handedOver: () => void): void {
    this.ends = handedOver
    if (this.gone) return handedOver()
    this.send(`ready ${status}`)
  }

  /** There is to be no next daemon: this one ends when it is done, whatever becomes of the guard. */
  over(): void {
    this.ends = undefined
    this.send('over')
  }

  /** Keeps descriptors open for the daemon that comes next. */
  put(name: string, fds: readonly number[]): void {
    if (GIVEN.includes(name)) this.given.set(name, fds)
    for (const batch of batches(fds)) this.send(`put ${name}`, batch)
  }

  /** Everything that was put there under these names. */
  remove(names: readonly string[]): void {
    for (const name of names) this.send(`remove ${name}`)
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
   * The guard has ended, and the next one does not know of this daemon, or it would have this
   * socket's other end. It stands in as if there were none.
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
  }
}
