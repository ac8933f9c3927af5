// SPDX-License-Identifier: MIT
/** What comes of closes in the tree: a pin may end, and udev is told of a writer. */
import type { DiskSeq } from '../devices/names.js'
import type { Registry } from '../devices/registry.js'
import type { CloseListener } from '../gate/closes.js'
import type { InodeTable } from '../gate/inode.js'
import type { PinLifetime } from '../gate/pin-lifetime.js'
import type { PinOpener } from '../gate/pin.js'
import { Exhausted } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { UdevWatch } from './udev-watch.js'

export interface UserClosesParts {
  readonly registry: Pick<Registry, 'find' | 'called'>
  readonly inodes: Pick<InodeTable, 'named'>
  readonly lifetime: Pick<PinLifetime, 'closedByUser'>
  readonly opener: Pick<PinOpener, 'touch'>
  readonly log: Logger
}

export class UserCloses implements CloseListener {
  private readonly udevWatch: UdevWatch

  constructor(private readonly parts: UserClosesParts) {
    const { registry, opener } = parts
    this.udevWatch = new UdevWatch(
      (name) => registry.find(name),
      (device, done) => opener.touch(device, done),
    )
  }

  closed(name: string, wrote: boolean): void {
    const { inodes, lifetime } = this.parts
    if (wrote) this.udevWatch.tell(name)
    const inode = inodes.named(name)
    if (inode !== undefined) lifetime.closedByUser(inode)
  }

  closedByKernelName(diskseq: DiskSeq, kname: string, wrote: boolean): void {
    try {
      const device = this.parts.registry.called(kname, diskseq)
      if (device !== undefined) this.closed(device.name, wrote)
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      this.lost()
    }
  }

  lost(): void {
    this.parts.log.warn('the kernel dropped events of closes; udev may not be told of a writer')
  }
}
