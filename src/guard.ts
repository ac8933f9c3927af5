/**
 * The daemon's side of the guard (native/guard.c), which stands in for it when it
 * has died. Without one, a daemon must not leave its tree to a successor: the
 * service manager would wait for an answer of the daemon that it has to start.
 */
import { errnoName } from './errno.js'
import type { Logger } from './log.js'
import type { Native, Poll } from './native.js'
import type { SharedState } from './state.js'

/** A fraction of what the guard waits before it takes a daemon for hung. */
const HEARTBEAT_MS = 1000
const RETRY_MS = 1000

export interface Guarded {
  readonly mountpoint: string
  /** Descriptors of the connection and of the memory. */
  readonly fuse: number
  readonly stateFd: number
  readonly state: SharedState
}

export class Guard {
  private fd = -1
  private poll: Poll | undefined
  private heart: NodeJS.Timeout | undefined
  private retry: NodeJS.Timeout | undefined

  /** @param changed tells whether somebody stands in, should this daemon die now */
  constructor(
    private readonly native: Pick<Native, 'Poll' | 'callGuard' | 'close'>,
    private readonly socket: string,
    private readonly guarded: Guarded,
    private readonly changed: (present: boolean) => void,
    private readonly log: Logger,
  ) {}

  /** From here on a guard that stood in reads no more requests. */
  start(): void {
    this.heart = setInterval(() => this.guarded.state.beat(), HEARTBEAT_MS)
    this.call(true)
  }

  private call(first: boolean): void {
    const { mountpoint, fuse, stateFd } = this.guarded
    const fd = this.native.callGuard(this.socket, mountpoint, fuse, stateFd)
    if (fd < 0) {
      this.changed(false)
      if (first) this.log.warn({ errno: errnoName(fd), socket: this.socket }, 'no guard: if this daemon dies, its mount is dead')
      this.retry = setTimeout(() => this.call(false), RETRY_MS)
      return
    }
    this.fd = fd
    // It never says anything more.
    this.poll = new this.native.Poll(fd, () => this.lost())
    this.changed(true)
  }

  private lost(): void {
    this.hangUp()
    this.log.warn({ socket: this.socket }, 'the guard has ended')
    this.call(false)
  }

  private hangUp(): void {
    this.poll?.close()
    this.poll = undefined
    if (this.fd >= 0) this.native.close(this.fd)
    this.fd = -1
  }

  close(): void {
    clearInterval(this.heart)
    clearTimeout(this.retry)
    this.hangUp()
  }
}
