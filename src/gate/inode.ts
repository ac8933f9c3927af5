// SPDX-License-Identifier: MIT
/** What the kernel knows of the tree: the inodes that it may have. */
import type { NodeStat } from '../devices/device-node.js'
import { type DiskSeq, inodeId, type NodeId, nodeName, parseId } from '../devices/names.js'
import type { Call } from './intent.js'
import type { Pin, PinResult } from './pin.js'
import type { Device } from '../devices/sysfs.js'

/**
 * A device that somebody asked for: a disk or partition with the device number that its
 * inode has. One that gets another number, or a partition that is made anew and gets
 * one, is another inode of the same name.
 */
export class Inode {
  readonly name: string
  /** Lookups answered and not yet forgotten by the kernel. */
  nlookup = 0
  /** An earlier daemon answered some, too: how many is not known. */
  takenOver = false
  /** Requests at the gate. */
  attempts = 0
  pin: Pin | undefined
  /** Its medium may be changed while it is pinned; undefined until somebody has looked. */
  removable: boolean | undefined
  /** It may become another disk while it is open; undefined until somebody has looked. */
  changes: boolean | undefined
  /** Its attributes when last seen. */
  last: { readonly device: Device; readonly stat: NodeStat } | undefined
  /** Opens under way for this inode; each entry waits for the same one. */
  opening: Opening | undefined

  /** Somebody may have the inode, and open it without asking for the name. */
  reopenable = false
  /** Since attributes that the kernel may use unasked were last taken back, it was given some. */
  trusted = false

  /** Who was answered since it was pinned and may be in its call still, by thread. */
  callers: Map<number, Call> | undefined
  /** One of them goes on by another name, until its process ends. */
  goesOn = false
  /** So was somebody who cannot be seen. */
  unseen = false
  /** An earlier daemon answered others, of whom nothing is known. */
  moreCallers = false
  /** Ticks of hold since that. */
  unseenTicks = 0

  /** When somebody was answered last (monotonic ms), and how often so soon after the time before. */
  usedAt = -Infinity
  streak = 0

  /** For the pin's end: when to look at the callers next (monotonic ms), and how long to wait after that. */
  lookAt = Infinity
  lookDelay = 0
  /** How many more looks follow without a pause. */
  looksInARow = 0
  /** Somebody has closed it since they were. */
  closed = false
  /** They are being looked at. */
  looking = false
  /** Before this (monotonic ms) the pin stays. */
  lingerUntil = 0

  constructor(
    readonly id: NodeId,
    readonly diskseq: DiskSeq,
    readonly partition: number,
  ) {
    this.name = nodeName(diskseq, partition)
  }

  /** The kernel may have its inode. */
  get known(): boolean {
    return this.nlookup > 0 || this.takenOver
  }

  get unused(): boolean {
    return this.nlookup === 0 && this.attempts === 0 && this.pin === undefined && this.opening === undefined
  }
}

/** One open(2) of a device, shared by all who wait for it. */
export interface Opening {
  readonly device: Device
  readonly waiters: Set<(outcome: PinResult) => void>
  /** The thread whose LOOKUP began it, until that asks for the attributes; or 0. */
  begunFor: number
}

const idOf = ({ diskseq, partition, minor }: Device) => inodeId(diskseq, partition, minor)

export class InodeTable {
  private readonly byId = new Map<NodeId, Inode>()
  /** The one of each name that was asked for last. */
  private readonly byName = new Map<string, Inode>()

  get size(): number {
    return this.byId.size
  }

  get(id: NodeId): Inode | undefined {
    return this.byId.get(id)
  }

  named(name: string): Inode | undefined {
    return this.byName.get(name)
  }

  /** The inode of a device, new if need be; undefined where its numbers are larger than nodeids can be. */
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

  /** Whether an inode has the number that this device has. */
  static is(inode: Inode, device: Device): boolean {
    return inode.last?.device === device || inode.id === idOf(device)
  }

  /** The inode of a device, if it has one. */
  known(device: Device): Inode | undefined {
    const id = idOf(device)
    return id === undefined ? undefined : this.byId.get(id)
  }

  /** An inode that the kernel knows from an earlier daemon; undefined for the id of anything else. */
  recall(id: NodeId): Inode | undefined {
    const parsed = parseId(id)
    if (parsed?.kind !== 'inode') return undefined
    const inode = this.create(id, parsed.diskseq, parsed.partition)
    // Who has the inode is not known either, and what was said of its attributes.
    inode.takenOver = inode.reopenable = inode.trusted = true
    return inode
  }

  private create(id: NodeId, diskseq: DiskSeq, partition: number): Inode {
    const inode = new Inode(id, diskseq, partition)
    this.byId.set(id, inode)
    this.byName.set(inode.name, inode)
    return inode
  }

  /** Drops an inode that nothing refers to any more. */
  release(inode: Inode): void {
    if (!inode.unused) return
    this.byId.delete(inode.id)
    if (this.byName.get(inode.name) === inode) this.byName.delete(inode.name)
  }

  [Symbol.iterator](): IterableIterator<Inode> {
    return this.byId.values()
  }
}
