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
  private readonly nodes = new Set<DeadName>()
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
    return this.nodes.size
  }

  add(node: DeadName): void {
    this.nodes.add(node)
    this.timer ??= setInterval(() => this.tick(), RETRY_MS)
  }

  private tick(): void {
    for (const node of this.nodes) if (!node.known) this.nodes.delete(node)
    const some = [...this.nodes].slice(0, AT_ONCE)
    const told = some.every(({ id }) => this.prune(id))
    if (!told && this.nodes.size >= MANY) this.pruneAll()
    // To the end of the queue: they may be in use for long.
    for (const node of some) this.nodes.delete(node)
    for (const node of some) this.nodes.add(node)
    if (this.nodes.size === 0) this.close()
  }

  close(): void {
    clearInterval(this.timer)
    this.timer = undefined
  }
}
