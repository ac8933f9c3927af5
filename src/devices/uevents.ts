// SPDX-License-Identifier: MIT
/**
 * The kernel's uevents: which block device was added, changed or removed.
 * They are hints. A privileged process can send any, they may arrive out of
 * order, twice, or not at all; so what is taken from one is the name of a
 * device to look at in sysfs, and the number its disk had then: of two numbers of
 * one device the lower is history.
 */
import { type DiskSeq, parseDiskSeq } from './names.js'
import { E, errnoName, UserError } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import type { Native, Poll } from '../native.js'

/**
 * Receive buffer of the socket, bytes: about 25,000 waiting events. The kernel
 * takes memory only for what is waiting.
 */
const RECEIVE_BYTES = 32 * 1024 * 1024

/** UEVENT_BUFFER_SIZE (2048, include/linux/kobject.h) and the header line; twice that to spare. */
const MESSAGE_MAX = 8192

/** Multicast group the kernel itself sends to; udev uses another. */
const KERNEL_GROUP = 1

/** What an event is about. */
export interface BlockEvent {
  /** The device's name in sysfs. */
  readonly kname: string
  /** Of its disk, when the event was made. */
  readonly diskseq: DiskSeq | undefined
  /** The disk is no more; not just a partition of it. */
  readonly gone: boolean
}

/** @returns undefined for an event about anything but a block device, and for anything malformed */
export function blockEventOf(message: Uint8Array, length: number): BlockEvent | undefined {
  const text = Buffer.from(message.buffer, message.byteOffset, length).toString('latin1')
  // "add@/devices/virtual/block/loop0\0ACTION=add\0...\0", each part NUL-terminated
  if (!text.endsWith('\0') || !/^[a-z]+@\//.test(text) || !text.includes('\0SUBSYSTEM=block\0')) {
    return undefined
  }
  const path = /\0DEVPATH=([^\0]+)\0/.exec(text)?.[1]
  const kname = path?.slice(path.lastIndexOf('/') + 1)
  if (kname === undefined || kname === '' || kname === '.' || kname === '..') return undefined
  return {
    kname,
    diskseq: parseDiskSeq(/\0DISKSEQ=([^\0]+)\0/.exec(text)?.[1] ?? ''),
    gone: text.startsWith('remove@') && text.includes('\0DEVTYPE=disk\0'),
  }
}

export interface UeventListener {
  /** A device's disk had this number at the time of an event, the last one if it is `gone`. */
  numbered(kname: string, diskseq: DiskSeq, gone: boolean): void
  /** Block devices that changed somehow; each once, however many events there were. */
  changed(knames: ReadonlySet<string>): void
  /** Events were lost: anything may have changed. */
  lost(): void
}

export interface UeventSocketParts {
  readonly native: Pick<Native, 'Poll' | 'ueventOpen' | 'ueventReceive' | 'close'>
  readonly listener: UeventListener
  /** Of the socket's buffer. */
  readonly receiveBytes?: number
  readonly log: Logger
}

export class UeventSocket {
  private readonly buffer = new Uint8Array(MESSAGE_MAX)
  private readonly from = new Uint32Array(3)
  private fd = -1
  private poll: Poll | undefined
  /** Of block devices. */
  received = 0
  /** How often some were lost. */
  losses = 0

  constructor(private readonly parts: UeventSocketParts) {}

  open(): void {
    const fd = this.parts.native.ueventOpen(this.parts.receiveBytes ?? RECEIVE_BYTES)
    if (fd < 0) throw new UserError(`cannot listen to the kernel's uevents: ${errnoName(fd)}`)
    this.fd = fd
    this.poll = new this.parts.native.Poll(fd, () => this.drain())
  }

  /**
   * Takes all that is waiting. Whatever happened before this call is seen by
   * it. Devices are looked at afterwards, and each once: looking costs more
   * than reading an event, so that a storm of them could otherwise keep this
   * loop from ever ending.
   */
  drain(): void {
    const changed = this.take()
    if (changed !== undefined) this.parts.listener.changed(changed)
  }

  /** @returns undefined where there is nothing, as there mostly is when an open asks */
  private take(): ReadonlySet<string> | undefined {
    let changed: Set<string> | undefined
    while (this.fd >= 0) {
      const n = this.parts.native.ueventReceive(this.fd, this.buffer, this.from)
      if (n === -E.EAGAIN) return changed
      if (n === -E.EINTR) continue
      if (n === -E.ENOBUFS) {
        this.parts.log.warn('the kernel dropped uevents (socket buffer full); reading all devices again')
        this.lost()
        continue
      }
      if (n < 0) {
        this.parts.log.error({ errno: errnoName(n) }, 'reading uevents failed; reading all devices again')
        this.lost()
        return changed
      }
      const [port, groups, truncated] = this.from
      if (port !== 0 || groups !== KERNEL_GROUP) continue
      if (truncated !== 0) {
        this.parts.log.warn('a truncated uevent was dropped; reading all devices again')
        this.lost()
        continue
      }
      const event = blockEventOf(this.buffer, n)
      if (event === undefined) continue
      this.received++
      changed = (changed ?? new Set()).add(event.kname)
      if (event.diskseq !== undefined) this.parts.listener.numbered(event.kname, event.diskseq, event.gone)
    }
    return changed
  }

  private lost(): void {
    this.losses++
    this.parts.listener.lost()
  }

  close(): void {
    this.poll?.close()
    if (this.fd >= 0) this.parts.native.close(this.fd)
    this.fd = -1
  }
}
