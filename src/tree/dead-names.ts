// SPDX-License-Identifier: MIT
/**
 * Names of devices that are gone. The kernel caches names without limit. That is good for names
 * that exist, as looking up a cached name takes no lock; the others it is told to
 * forget, as each takes memory in the kernel and here.
 */
import type { NodeId } from '../devices/names.js'

/** Time between two attempts, ms: users of a device drop its name a moment after the device has gone. */
const RETRY_MS = 500
/** Names per attempt. */
const AT_ONCE = 256
/** From this number on the kernel is made to drop all unused names, if it cannot be told to drop one. */
const MANY = 256

/** A name that the kernel may still have. */
export interface DeadName {
  readonly id: NodeId
  readonly known: boolean
}

export class DeadNames {
  private readonly inodes = new Set<DeadName>()
  private timer: NodeJS.Timeout | undefined

  /**
   * @param prune makes the kernel forget one inode; returns false if it cannot be told that
   * @param pruneAll makes it forget all unused names
   */
  constructor(
    private readonly prune: (id: bigint) => boolean,
    private readonly pruneAll: () => void,
  ) {}

  get size(): number {
    return this.inodes.size
  }

  add(inode: DeadName): void {
    this.inodes.add(inode)
    this.timer ??= setInterval(() => this.tick(), RETRY_MS)
  }

  private tick(): void {
    for (const inode of this.inodes) if (!inode.known) this.inodes.delete(inode)
    const some = [...this.inodes].slice(0, AT_ONCE)
    const told = some.every(({ id }) => this.prune(id))
    if (!told && this.inodes.size >= MANY) this.pruneAll()
    // Back to the end of the queue, as they may be in use for long.
    for (const inode of some) this.inodes.delete(inode)
    for (const inode of some) this.inodes.add(inode)
    if (this.inodes.size === 0) this.close()
  }

  close(): void {
    clearInterval(this.timer)
    this.timer = undefined
  }
}
