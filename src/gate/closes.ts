// SPDX-License-Identifier: MIT
/**
 * Closes of nodes in the tree, told by inotify watches on its directories: the kernel
 * sends no FUSE request for them on a block node. Hints, since a full queue loses
 * some, and of two that are alike one may be left out.
 *
 * The root is watched as long as there is the tree; a directory `.dm/N` from before the first
 * device is answered for in it until its disk is gone. The kernel has these watches, and whoever
 * has the descriptor.
 */
import { readFileSync } from 'node:fs'

import { directoryId, type DiskSeq, parseId } from '../devices/names.js'
import { E, errnoName, errnoOf } from '../util/errno.js'
import { type Logger, LogLimit } from '../util/log.js'
import type { Native, Poll } from '../native.js'

/** uapi/linux/inotify.h */
const IN_CLOSE_WRITE = 0x8
const IN_CLOSE_NOWRITE = 0x10
const IN_Q_OVERFLOW = 0x4000
const IN_IGNORED = 0x8000
const IN_ONLYDIR = 0x0100_0000

/** struct inotify_event without its name */
const EVENT_SIZE = 16

/** From one look at the events to the next, ms: each close makes one, and none of them is urgent. */
const GATHER_MS = 1

export const WATCH_MASK = IN_CLOSE_WRITE | IN_CLOSE_NOWRITE | IN_ONLYDIR

export interface CloseListener {
  closed(name: string, wrote: boolean): void
  /** The same of what the kernel calls `kname`. */
  closedByKernelName(diskseq: DiskSeq, kname: string, wrote: boolean): void
  lost(): void
}

type Calls = Pick<Native, 'Poll' | 'read' | 'close' | 'inotifyAdd' | 'inotifyRemove'>

/** Watch descriptors of directories `.dm/N`, as an earlier daemon may have made them. */
export function watchesOf(fdinfo: string): Map<number, DiskSeq> {
  const found = new Map<number, DiskSeq>()
  for (const [, wd, inode] of fdinfo.matchAll(/^inotify wd:([\da-f]{1,8}) ino:([\da-f]{1,16}) /gm)) {
    const parsed = parseId(BigInt(`0x${inode}`))
    if (parsed?.kind === 'directory') found.set(Number.parseInt(wd as string, 16), parsed.diskseq)
  }
  return found
}

function infoOf(fd: number): string {
  try {
    return readFileSync(`/proc/self/fdinfo/${fd}`, 'latin1')
  } catch (error) {
    errnoOf(error)
    return ''
  }
}

export interface CloseWatchParts {
  readonly native: Calls
  /** From {@link Native.inotifyWatch}, or an earlier daemon's; owned from now on. */
  readonly fd: number
  /** From {@link Native.cloneMount}; or negative, and only the root is watched. */
  readonly root: number
  readonly listener: CloseListener
  /** What the kernel says of the watches of `fd`. */
  readonly fdinfo?: () => string
  readonly log: Logger
}

export class CloseWatch {
  private readonly buffer = Buffer.alloc(16384)
  private readonly poll: Poll
  private gathering: NodeJS.Timeout | undefined
  /** By watch descriptor: of which directory `.dm/N` it is. All others are of the root. */
  private readonly directories: Map<number, DiskSeq>
  /** Directories that are watched, or as good as that can be had; or those who wait for it. */
  private readonly watched = new Map<DiskSeq, number | (() => void)[]>()
  private readonly failures: LogLimit
  private readonly native: Calls
  private fd: number
  private root: number
  private readonly listener: CloseListener
  private readonly log: Logger

  constructor({ native, fd, root, listener, log, fdinfo = () => infoOf(fd) }: CloseWatchParts) {
    this.native = native
    this.fd = fd
    this.root = root
    this.listener = listener
    this.log = log
    this.failures = new LogLimit((suppressed) => log.warn({ suppressed }, 'more directories cannot be watched than are logged'))
    this.directories = watchesOf(fdinfo())
    for (const [wd, diskseq] of this.directories) this.watched.set(diskseq, wd)
    this.poll = new native.Poll(fd, () => this.readable())
  }

  /** Calls back when closes in `.dm/N` are seen. */
  watch(diskseq: DiskSeq, ready: () => void): void {
    const state = this.watched.get(diskseq)
    const id = directoryId(diskseq)
    if (typeof state === 'number' || id === undefined || this.fd < 0 || this.root < 0) return ready()
    if (state !== undefined) return void state.push(ready)
    const waiters = [ready]
    this.watched.set(diskseq, waiters)
    this.native.inotifyAdd(this.fd, this.root, id, WATCH_MASK, (error, wd) => {
      if (error === 0) this.directories.set(wd, diskseq)
      else if (this.fd >= 0 && this.failures.take()) {
        this.log.warn(
          { errno: errnoName(error), diskseq: String(diskseq) },
          'a directory cannot be watched; udev may not be told of a writer',
        )
      }
      if (this.watched.get(diskseq) === waiters) this.watched.set(diskseq, error === 0 ? wd : -1)
      else this.remove(error === 0 ? wd : -1)
      for (const waiter of waiters) waiter()
    })
  }

  /** The root could not be had before. */
  useRoot(root: number): void {
    this.root = root
  }

  /** Takes away the watches of disks that have gone while there was no daemon. */
  forgetOthers(isThere: (diskseq: DiskSeq) => boolean): void {
    for (const diskseq of [...this.watched.keys()]) if (!isThere(diskseq)) this.unwatch(diskseq)
  }

  /** The disk is gone. */
  unwatch(diskseq: DiskSeq): void {
    const state = this.watched.get(diskseq)
    this.watched.delete(diskseq)
    // If it is being added, it is removed as soon as it is there.
    if (typeof state === 'number') this.remove(state)
  }

  private remove(wd: number): void {
    if (this.fd >= 0 && wd >= 0) this.native.inotifyRemove(this.fd, wd)
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
    for (let at = 0; at + EVENT_SIZE <= n;) {
      const wd = this.buffer.readInt32LE(at)
      const mask = this.buffer.readUInt32LE(at + 4)
      const length = this.buffer.readUInt32LE(at + 12)
      const end = this.buffer.indexOf(0, at + EVENT_SIZE)
      const name = this.buffer.toString('latin1', at + EVENT_SIZE, Math.min(end, at + EVENT_SIZE + length))
      at += EVENT_SIZE + length
      if ((mask & IN_Q_OVERFLOW) !== 0) this.listener.lost()
      if ((mask & IN_IGNORED) !== 0) this.directories.delete(wd)
      if (length === 0) continue // the directory itself
      if ((mask & (IN_CLOSE_WRITE | IN_CLOSE_NOWRITE)) === 0) continue
      const wrote = (mask & IN_CLOSE_WRITE) !== 0
      const diskseq = this.directories.get(wd)
      if (diskseq === undefined) this.listener.closed(name, wrote)
      else this.listener.closedByKernelName(diskseq, name, wrote)
    }
  }
}
