// SPDX-License-Identifier: MIT
/** What the kernel knows of the tree: the inodes that it may have. */
import type { NodeStat } from '../devices/device-node.js'
import { type DiskSeq, inodeId, type NodeId, nodeName, parseId } from '../devices/names.js'
import type { Call } from './intent.js'
import type { Pin, PinResult } from './pin.js'
import type { Device } from '../devices/sysfs.js'

/**
 * An inode of the tree: a disk or partition with its device number, which never changes. If the
 * device gets another number (a partition that is made again, for example), that is another
 * inode with the same name.
 */
export class Inode {
  readonly name: string
  /** FUSE's count: lookups answered and not yet forgotten by the kernel. */
  nlookup = 0
  /** An earlier daemon has answered lookups too, nobody knows how many. */
  takenOver = false
  /** Requests at the gate. */
  attempts = 0
  pin: Pin | undefined
  /** Whether its medium can be changed while it is pinned; undefined until that was looked up. */
  removable: boolean | undefined
  /** Whether it can become another disk while it is open; undefined until that was looked up. */
  changes: boolean | undefined
  /** Its attributes when last seen. */
  last: { readonly device: Device; readonly stat: NodeStat } | undefined
  /** The open of the device that is under way. */
  opening: Opening | undefined

  /** A process may hold the inode (by an O_PATH descriptor, for example) and open it without a LOOKUP. */
  reopenable = false
  /** The kernel has attributes of it that are valid, or were; not since they were last invalidated. */
  trusted = false

  /** Callers that were answered since it was pinned, and may still be in their calls; by thread. */
  callers: Map<number, Call> | undefined
  /** One of them goes on by another name of the device, until its process ends. */
  goesOn = false
  /** A caller that cannot be seen was answered, too. */
  unseen = false
  /** An earlier daemon answered more callers than it could record. */
  moreCallers = false
  /** Ticks of `hold` since then. */
  unseenTicks = 0

  /** Time of the last answer (monotonic ms), and how many answers in a row came shortly after the one before. */
  usedAt = -Infinity
  streak = 0

  /** When to look at the callers next (monotonic ms), and how long to wait after that. */
  lookAt = Infinity
  lookDelay = 0
  /** How many more looks follow without a pause. */
  looksInARow = 0
  /** A process has closed it since the last look. */
  closed = false
  /** They are being looked at. */
  looking = false
  /** The pin stays at least until then (monotonic ms). */
  lingerUntil = 0

  constructor(
    readonly id: NodeId,
    readonly diskseq: DiskSeq,
    readonly partition: number,
  ) {
    this.name = nodeName(diskseq, partition)
  }

  /** Whether the kernel may have it. */
  get known(): boolean {
    return this.nlookup > 0 || this.takenOver
  }

  get unused(): boolean {
    return this.nlookup === 0 && this.attempts === 0 && this.pin === undefined && this.opening === undefined
  }
}

/** One open(2) of a device, shared by all requests that wait for it. */
export interface Opening {
  readonly device: Device
  readonly waiters: Set<(outcome: PinResult) => void>
  /** The thread whose LOOKUP began it, until that thread asks for the attributes; else 0. */
  begunFor: number
}

const idOf = ({ diskseq, partition, minor }: Device) => inodeId(diskseq, partition, minor)

export class InodeTable {
  private readonly byId = new Map<NodeId, Inode>()
  /** The latest inode of each name. */
  private readonly byName = new Map<string, Inode>()

  get size(): number {
    return this.byId.size
  }

  /** Those that are pinned, so many of them at most. */
  pinned(max: number): Inode[] {
    const found: Inode[] = []
    for (const inode of this.byId.values()) {
      if (found.length === max) break
      if (inode.pin !== undefined) found.push(inode)
    }
    return found
  }

  get(id: NodeId): Inode | undefined {
    return this.byId.get(id)
  }

  named(name: string): Inode | undefined {
    return this.byName.get(name)
  }

  /** The inode of a device, created if necessary; undefined if its numbers do not fit into a nodeid. */
  of(device: Device): Inode | undefined {
    const latest = this.byName.get(device.name)
    if (latest?.last?.device === device) return latest
    const id = idOf(device)
    if (id === undefined) return undefined
    const known = this.byId.get(id)
    if (known === undefined) return this.create(id, device.diskseq, device.partition)
    this.byName.set(known.name, known)
    return known
  }

  /** Whether an inode has this device's number. */
  static is(inode: Inode, device: Device): boolean {
    return inode.last?.device === device || inode.id === idOf(device)
  }

  /** The inode of a device, if it has one. */
  known(device: Device): Inode | undefined {
    const id = idOf(device)
    return id === undefined ? undefined : this.byId.get(id)
  }

  /** Recreates an inode that the kernel has from an earlier daemon; undefined for ids of anything else. */
  recall(id: NodeId): Inode | undefined {
    const parsed = parseId(id)
    if (parsed?.kind !== 'inode') return undefined
    const inode = this.create(id, parsed.diskseq, parsed.partition)
    // Nobody knows who holds it, or what the earlier daemon said of its attributes.
    inode.takenOver = inode.reopenable = inode.trusted = true
    return inode
  }

  private create(id: NodeId, diskseq: DiskSeq, partition: number): Inode {
    const inode = new Inode(id, diskseq, partition)
    this.byId.set(id, inode)
    this.byName.set(inode.name, inode)
    return inode
  }

  /** Drops an inode if nothing refers to it any more. */
  release(inode: Inode): void {
    if (!inode.unused) return
    this.byId.delete(inode.id)
    if (this.byName.get(inode.name) === inode) this.byName.delete(inode.name)
  }

  [Symbol.iterator](): IterableIterator<Inode> {
    return this.byId.values()
  }
}
