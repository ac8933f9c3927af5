/**
 * The daemon's side of the guard (native/guard.c), which stands in for it when it
 * has died. Without one, a daemon must not leave its tree to a successor: the
 * service manager would wait for an answer of the daemon that it has to start.
 *
 * It also asks for the figures of the file system (statfs), every few seconds, and
 * tells this daemon of each answer. A daemon that asked for itself could wait for an
 * answer of its own while it is being killed, and never end.
 */
import { E, errnoName } from './errno.js'
import type { Logger } from './log.js'
import type { Native, Poll } from './native.js'

const RETRY_MS = 1000
/** How long a guard is waited for, ms. It answers at once, unless it stands still. */
const PATIENCE_MS = 1000

export interface Guarded {
  readonly mountpoint: string
  /** Descriptors of the connection and of the memory. */
  readonly fuse: number
  readonly stateFd: number
}

export class Guard {
  private fd = -1
  private poll: Poll | undefined
  private retry: NodeJS.Timeout | undefined
  private proved = false
  private closed = false
  private agreed: ((agreed: boolean) => void) | undefined
  private readonly buffer = new Uint8Array(16)

  /** @param changed tells whether somebody stands in, should this daemon die now */
  constructor(
    private readonly native: Pick<Native, 'Poll' | 'packetConnect' | 'receiveDescriptors' | 'sendDescriptors' | 'close'>,
    private readonly socket: string,
    private readonly guarded: Guarded,
    private readonly changed: (present: boolean) => void,
    private readonly log: Logger,
  ) {}

  /** Resolves when a guard that stood in reads no more requests, or cannot be called. */
  start(): Promise<void> {
    return this.call(true)
  }

  /** Whether the tree has answered the guard since this was last asked; true where there is none to ask. */
  answers(): boolean {
    const answers = this.proved || this.fd < 0
    this.proved = false
    return answers
  }

  private async call(first: boolean): Promise<void> {
    const error = await this.introduce()
    if (this.closed) return
    this.proved = true
    if (error === undefined) return this.changed(true)
    this.hangUp()
    this.changed(false)
    if (first) this.log.warn({ reason: error, socket: this.socket }, 'no guard: if this daemon dies, its mount is dead')
    this.retry = setTimeout(() => void this.call(false), RETRY_MS)
  }

  /** @returns why there is no guard; undefined if there is one */
  private introduce(): Promise<string | undefined> {
    const { mountpoint, fuse, stateFd } = this.guarded
    const fd = this.native.packetConnect(this.socket)
    if (fd < 0) return Promise.resolve(errnoName(fd))
    this.fd = fd
    const sent = this.native.sendDescriptors(fd, mountpoint, [fuse, stateFd])
    if (sent < 0) return Promise.resolve(errnoName(sent))
    return new Promise((resolve) => {
      const late = setTimeout(resolve, PATIENCE_MS, 'it does not answer')
      this.agreed = (agreed) => {
        clearTimeout(late)
        resolve(agreed ? undefined : 'it has hung up')
      }
      this.poll = new this.native.Poll(fd, () => this.heard())
    })
  }

  private heard(): void {
    const found = this.native.receiveDescriptors(this.fd, this.buffer, false)
    if (found === -E.EAGAIN) return
    const said = typeof found !== 'number' && found[0] !== 0
    const { agreed } = this
    this.agreed = undefined
    if (said) this.proved = true
    if (agreed !== undefined) agreed(said)
    else if (!said) this.lost()
  }

  private lost(): void {
    this.hangUp()
    this.changed(false)
    this.log.warn({ socket: this.socket }, 'the guard has ended')
    void this.call(false)
  }

  private hangUp(): void {
    this.poll?.close()
    this.poll = undefined
    if (this.fd >= 0) this.native.close(this.fd)
    this.fd = -1
    this.agreed = undefined
  }

  /** There is to be no next daemon. */
  close(): void {
    this.closed = true
    clearTimeout(this.retry)
    if (this.fd >= 0) this.native.sendDescriptors(this.fd, 'bye', [])
    this.agreed?.(false)
    this.hangUp()
  }
}
