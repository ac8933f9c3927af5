// SPDX-License-Identifier: MIT
/**
 * Closes of block nodes in the tree, from inotify watches on its directories: the kernel
 * sends no FUSE request when a block node is closed. They are hints: a full queue loses
 * events, and inotify merges equal ones.
 *
 * The root is watched for as long as the tree is there; a directory `.dm/N` from before its first
 * device is looked up until the disk is gone. Watches stay for as long as any process has
 * the descriptor.
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

/** Events are gathered for this long, ms: each close makes one, and none is urgent. */
const GATHER_MS = 1

export const WATCH_MASK = IN_CLOSE_WRITE | IN_CLOSE_NOWRITE | IN_ONLYDIR

export interface CloseListener {
  closed(name: string, wrote: boolean): void
  /** The same, in `.dm/N`, of the device that the kernel calls `kname`. */
  closedByKernelName(diskseq: DiskSeq, kname: string, wrote: boolean): void
  lost(): void
}

type Calls = Pick<Native, 'Poll' | 'read' | 'close' | 'inotifyAdd' | 'inotifyRemove'>

/** Watch descriptors of directories `.dm/N` that an earlier daemon has added. */
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
  /** Reads /proc/self/fdinfo of `fd`. */
  readonly fdinfo?: () => string
  readonly log: Logger
}

export class CloseWatch {
  private readonly buffer = Buffer.alloc(16384)
  private readonly poll: Poll
  private gathering: NodeJS.Timeout | undefined
  /** The directory `.dm/N` of each watch descriptor; any other descriptor is the root's. */
  private readonly directories: Map<number, DiskSeq>
  /** Watch descriptors of directories (negative if a watch cannot be had); or who waits for one. */
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

  /** Calls back when `.dm/N` is watched. */
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

  /** Sets the root's descriptor, if there was none before. */
  useRoot(root: number): void {
    this.root = root
  }

  /** Removes watches of disks that went away while there was no daemon. */
  forgetOthers(isThere: (diskseq: DiskSeq) => boolean): void {
    for (const diskseq of [...this.watched.keys()]) if (!isThere(diskseq)) this.unwatch(diskseq)
  }

  /** Removes the watch of a disk that is gone. */
  unwatch(diskseq: DiskSeq): void {
    const state = this.watched.get(diskseq)
    this.watched.delete(diskseq)
    // A watch that is being added is removed as soon as it is there.
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
