// SPDX-License-Identifier: MIT
/**
 * Names of devices that are gone. The kernel keeps names cached for as long as it likes,
 * which is what is wanted of those that exist: who asks for one takes no lock. The others
 * it is told to forget, as each of them takes memory, there and here.
 */
import type { NodeId } from '../devices/names.js'

/** From one attempt to the next, ms: who uses a device lets go of its name a moment after it has gone. */
const RETRY_MS = 500
/** Attempts at a time. */
const AT_ONCE = 256
/** So many are worth having the kernel drop every name that nobody uses, where it cannot be told which. */
const MANY = 256

/** What the kernel may have an inode of. */
export interface DeadName {
  readonly id: NodeId
  readonly known: boolean
}

export class DeadNames {
  private readonly inodes = new Set<DeadName>()
  private timer: NodeJS.Timeout | undefined

  /**
   * @param prune has the kernel forget one inode; false where it cannot be told so
   * @param pruneAll the same of all names that nobody uses
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
    // To the end of the queue: they may be in use for long.
    for (const inode of some) this.inodes.delete(inode)
    for (const inode of some) this.inodes.add(inode)
    if (this.inodes.size === 0) this.close()
  }

  close(): void {
    clearInterval(this.timer)
    this.timer = undefined
  }
}
