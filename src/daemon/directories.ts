// SPDX-License-Identifier: MIT
/**
 * The directories of the tree, and the one beneath its mount: the former are watched for closes, the latter
 * has links. A disk is answered for by the kernel's name when both are ready for it, or after a moment.
 */
import type { DiskSeq } from '../devices/names.js'
import type { Device } from '../devices/sysfs.js'
import { CloseWatch, type CloseListener } from '../gate/closes.js'
import type { Native } from '../native.js'
import type { Logger } from '../util/log.js'
import { afterTicks } from '../util/clock.js'
import { Beneath } from './beneath.js'

/**
 * So long, ms, a LOOKUP waits for its directory to be watched and for links beneath, which are there in a fraction of a
 * millisecond; then the disk is answered for without. Only root can have that directory locked for longer.
 */
const READY_MS = 200

export class Directories {
  private closes: CloseWatch | undefined
  private beneath: Beneath | undefined
  /** The root, by a mount of its own; -1 while there is none. */
  private root = -1

  constructor(
    private readonly native: Native,
    private readonly log: Logger,
  ) {}

  /**
   * @param fd of inotify, the root is watched already; owned from now on
   * @param root see {@link useRoot}
   */
  watch(fd: number, root: number, listener: CloseListener): void {
    this.root = root
    this.closes = new CloseWatch({ native: this.native, fd, root, listener, log: this.log })
  }

  /** @param fd of the root, see {@link Native.cloneMount}; owned from now on */
  useRoot(fd: number): void {
    this.root = fd
    this.closes?.useRoot(fd)
  }

  /** Watches of an earlier daemon, on directories of disks that are gone, end. */
  forgetOthers(isThere: (diskseq: DiskSeq) => boolean): void {
    this.closes?.forgetOthers(isThere)
  }

  /**
   * @param fd from openBeneath(), owned from now on; -1 for no links
   * @param devices those that are there now
   */
  keepLinks(fd: number, mountpoint: string, devices: readonly Device[]): void {
    if (fd < 0) return
    this.beneath = new Beneath({ native: this.native, fd, mountpoint, log: this.log })
    this.beneath.start(devices)
  }

  appeared(device: Device): void {
    this.beneath?.add(device)
  }

  vanished(device: Device): void {
    this.beneath?.remove(device)
    if (device.partition === 0) this.closes?.unwatch(device.diskseq)
  }

  /** Calls back when a disk may be answered for in `.dm/N`: at once, but for the first time. */
  whenReady(diskseq: DiskSeq, ready: () => void): void {
    let cancel = () => {}
    let waits = true
    const go = () => {
      if (!waits) return
      waits = false
      cancel()
      ready()
    }
    this.whenPrepared(diskseq, go)
    if (waits) cancel = afterTicks(READY_MS, go)
  }

  /** The same, however long it takes. */
  private whenPrepared(diskseq: DiskSeq, ready: () => void): void {
    const made = () => (this.beneath === undefined ? ready() : this.beneath.whenMade(diskseq, ready))
    if (this.closes === undefined) made()
    else this.closes.watch(diskseq, made)
  }

  /** See {@link Beneath.leave}. */
  async leaveLinks(isHanded: boolean): Promise<void> {
    await this.beneath?.leave(isHanded)
  }

  close(): void {
    this.closes?.close()
    this.beneath?.close()
    if (this.root >= 0) this.native.close(this.root)
    this.root = -1
  }
}
