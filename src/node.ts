/** What the kernel knows of the tree: one node for each inode it may have. */
import type { NodeStat } from './devnode.js'
import { type DiskSeq, type NodeId, nodeId, nodeName, parseNodeId } from './diskseq.js'
import type { Pin, PinResult } from './pin.js'
import type { Device } from './sysfs.js'

/** A disk or partition that somebody asked for. */
export class Node {
  readonly name: string
  /** Lookups answered and not yet forgotten by the kernel. */
  nlookup = 0
  /** An earlier daemon answered some, too: how many is not known. */
  inherited = false
  /** Requests at the gate. */
  attempts = 0
  pin: Pin | undefined
  /** Its medium may be changed while it is pinned; undefined until somebody has looked. */
  removable: boolean | undefined
  /** What it was when last seen: which device number its inode has, and its attributes. */
  last: { readonly device: Device; readonly stat: NodeStat } | undefined
  /** Opens under way for this node; each entry waits for the same one. */
  opening: Opening | undefined

  /** Threads answered since it was pinned, and the number of the call they were in. */
  readonly callers = new Map<number, number>()
  /** Of those, the ones that may open it by number after letting go of the inode. */
  readonly lingerers = new Map<number, number>()
  /** Somebody was answered who may need the pin after the inode is gone. */
  lingers = false

  /** For the reaper: when to prune next (ms, monotonic) and how long to wait after that. */
  pruneDue = Infinity
  pruneDelay = 0
  /** An earlier daemon answered others, of whom nothing is known. */
  moreCallers = false
  /** Ticks of hold since the last answer. */
  heldTicks = 0
  /** Monotonic ms: when the kernel forgot it, and until when its pin stays. */
  forgottenAt = 0
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
    return this.nlookup > 0 || this.inherited
  }

  get unused(): boolean {
    return (
      this.nlookup === 0 &&
      this.attempts === 0 &&
      this.pin === undefined &&
      this.opening === undefined
    )
  }
}

/** One open(2) of a device, shared by all who wait for it. */
export interface Opening {
  readonly device: Device
  readonly waiters: Set<(outcome: PinResult) => void>
}

export class NodeTable {
  private readonly byId = new Map<NodeId, Node>()
  private readonly byName = new Map<string, Node>()

  get size(): number {
    return this.byId.size
  }

  get(id: NodeId): Node | undefined {
    return this.byId.get(id)
  }

  named(name: string): Node | undefined {
    return this.byName.get(name)
  }

  /** A new node; undefined where its numbers are larger than node ids can be. */
  create(diskseq: DiskSeq, partition: number): Node | undefined {
    const id = nodeId(diskseq, partition, false)
    if (id === undefined) return undefined
    const node = new Node(id, diskseq, partition)
    this.byId.set(id, node)
    this.byName.set(node.name, node)
    return node
  }

  /** A node that the kernel knows from an earlier daemon; undefined for the id of anything else. */
  recall(id: NodeId): Node | undefined {
    const parsed = parseNodeId(id)
    if (parsed === undefined || parsed.symlink) return undefined
    const node = this.create(parsed.diskseq, parsed.partition)
    if (node !== undefined) node.inherited = true
    return node
  }

  /** Drops a node that nothing refers to any more. */
  release(node: Node): void {
    if (!node.unused) return
    this.byId.delete(node.id)
    this.byName.delete(node.name)
  }

  [Symbol.iterator](): IterableIterator<Node> {
    return this.byId.values()
  }
}
