/**
 * Closes of nodes in the tree, told by an inotify watch on its root: the kernel
 * sends no FUSE request for them on a block node. Hints, since a full queue loses
 * some, and of two that are alike one may be left out.
 */
import { E, errnoName } from './errno.js'
import type { Logger } from './log.js'
import type { Native, Poll } from './native.js'

/** uapi/linux/inotify.h */
const IN_CLOSE_WRITE = 0x8
const IN_CLOSE_NOWRITE = 0x10
const IN_Q_OVERFLOW = 0x4000
const IN_ONLYDIR = 0x0100_0000

/** struct inotify_event without its name */
const EVENT_SIZE = 16

/** From one look at the events to the next, ms: each close makes one, and none of them is urgent. */
const GATHER_MS = 1

export const WATCH_MASK = IN_CLOSE_WRITE | IN_CLOSE_NOWRITE | IN_ONLYDIR

export interface CloseListener {
  closed(name: string, wrote: boolean): void
  lost(): void
}

export class CloseWatch {
  private readonly buffer = Buffer.alloc(16384)
  private readonly poll: Poll
  private gathering: NodeJS.Timeout | undefined

  /** @param fd from {@link Native.inotifyWatch}; owned from now on */
  constructor(
    private readonly native: Pick<Native, 'Poll' | 'read' | 'close'>,
    private fd: number,
    private readonly listener: CloseListener,
    private readonly log: Logger,
  ) {
    this.poll = new native.Poll(fd, () => this.readable())
  }

  close(): void {
    if (this.fd < 0) return
    clearTimeout(this.gathering)
    this.poll.close()
    this.native.close(this.fd)
    this.fd = -1
  }

  private readable(): void {
    this.poll.pause()
    this.gathering = setTimeout(() => this.poll.resume(), GATHER_MS)
    this.take()
  }

  private take(): void {
    const n = this.native.read(this.fd, this.buffer)
    if (n < 0) {
      if (n === -E.EAGAIN || n === -E.EINTR) return
      this.log.error({ errno: errnoName(n) }, 'reading inotify failed; closes are noticed late from now on')
      return this.close()
    }
    for (let at = 0; at + EVENT_SIZE <= n; ) {
      const mask = this.buffer.readUInt32LE(at + 4)
      const length = this.buffer.readUInt32LE(at + 12)
      const end = this.buffer.indexOf(0, at + EVENT_SIZE)
      const name = this.buffer.toString('latin1', at + EVENT_SIZE, Math.min(end, at + EVENT_SIZE + length))
      at += EVENT_SIZE + length
      if ((mask & IN_Q_OVERFLOW) !== 0) this.listener.lost()
      if (length === 0) continue // the directory itself
      if ((mask & (IN_CLOSE_WRITE | IN_CLOSE_NOWRITE)) !== 0) {
        this.listener.closed(name, (mask & IN_CLOSE_WRITE) !== 0)
      }
    }
  }
}
