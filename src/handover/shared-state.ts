// SPDX-License-Identifier: MIT
/**
 * What a daemon that takes over must know of the one before it, in memory that
 * outlives a crash: which requests were read and not yet answered, and whom the
 * pins were taken for. Everything else can be found out again.
 *
 * The memory is written so that it is right at every instant: a process may be
 * killed between any two stores. What is in doubt is written down twice rather
 * than not at all.
 */
import type { RequestStore, Unanswered } from '../fuse/request-store.js'
import { IN_HEADER_SIZE, Message, UID_AT } from '../fuse/wire.js'
import { native } from '../native.js'

const layout = native.layout

/** "diskseqfs". */
const MAGIC = 0x7165736b_73696401n
const SLOT_HEADER = layout.SLOT_HEADER_SIZE
/** Of a slot's landing place, which has the same header. */
const LANDING = layout.STATE_LANDING_AT + SLOT_HEADER

// Of a pin.
const LINGERS_AT = 4
const COUNT_AT = 8
const MORE_AT = 12
const ID_AT = 16
const CALLERS_AT = 24
const CALLER_SIZE = 12
const NO_CALL = -2
export const CALLERS_MAX = Math.floor((layout.STATE_PIN_SIZE - CALLERS_AT) / CALLER_SIZE)

/** Bytes; nearly all of them are never touched, and so take no memory. */
export const STATE_SIZE = layout.STATE_SIZE

/** Of the slots for requests, so many parts, of which one is root's; as the guard has it. */
const ROOT_PARTS = 4

const isRoots = (request: Uint8Array): boolean => new DataView(request.buffer, request.byteOffset).getUint32(UID_AT, true) === 0

/** Which mount the state belongs to. */
export interface MountIdentity {
  readonly mountpoint: string
  /** As in mountinfo, "0:53". */
  readonly device: string
  /** Its inode; 0 where that was not written down. */
  readonly pidNamespace: number
}

/** Somebody a pin was taken for. */
export interface PinnedCaller {
  readonly tid: number
  readonly call: number
  readonly outlasts: boolean
}

export interface PinRecord {
  readonly index: number
  readonly id: bigint
  readonly lingers: boolean
  readonly callers: readonly PinnedCaller[]
  /** There were others, of which nothing is known. */
  readonly more: boolean
}

/** Pieces of one size; those in use say so themselves, by a number that is not 0 at their beginning. */
class Slots {
  private readonly free: number[] = []
  private used = 0

  constructor(
    private readonly view: DataView,
    private readonly usedAt: number,
    readonly start: number,
    readonly size: number,
    readonly count: number,
  ) {
    this.look()
  }

  /** Finds out which are in use, as somebody else may have changed that. */
  look(): void {
    this.free.length = 0
    this.used = Math.min(this.count, this.view.getUint32(this.usedAt, true))
    for (let i = this.used - 1; i >= 0; i--) {
      if (this.view.getUint32(this.at(i), true) === 0) this.free.push(i)
    }
  }

  at(index: number): number {
    return this.start + index * this.size
  }

  /** -1 where all are in use, or all but some. */
  take(spare = 0): number {
    if (this.free.length + this.count - this.used <= spare) return -1
    const free = this.free.pop()
    if (free !== undefined) return free
    this.view.setUint32(this.usedAt, this.used + 1, true)
    return this.used++
  }

  /** The slot's first number must be 0 by now. */
  give(index: number): void {
    this.free.push(index)
  }

  inUse(): number[] {
    const found: number[] = []
    for (let i = 0; i < this.used; i++) if (this.view.getUint32(this.at(i), true) !== 0) found.push(i)
    return found
  }
}

export class SharedState implements RequestStore {
  readonly landing: Uint8Array
  private readonly view: DataView
  private readonly bytes: Uint8Array
  private readonly small: Slots
  private readonly big: Slots
  private readonly pins: Slots
  private readonly numbers: BigUint64Array

  /** @param memory {@link STATE_SIZE} bytes; zeros, or what an earlier daemon left */
  constructor(memory: ArrayBuffer = new ArrayBuffer(STATE_SIZE)) {
    const view = new DataView(memory)
    this.view = view
    this.bytes = new Uint8Array(memory)
    this.numbers = new BigUint64Array(memory, layout.STATE_HIGHEST_AT, 1)
    this.landing = new Uint8Array(memory, LANDING, layout.STATE_REQUEST_MAX)
    this.small = new Slots(view, layout.STATE_SMALL_USED_AT, layout.STATE_SMALL_AT, layout.STATE_SMALL_SIZE, layout.STATE_SMALL_COUNT)
    this.big = new Slots(view, layout.STATE_BIG_USED_AT, layout.STATE_BIG_AT, layout.STATE_BIG_SIZE, layout.STATE_BIG_COUNT)
    this.pins = new Slots(view, layout.STATE_PINS_USED_AT, layout.STATE_PINS_AT, layout.STATE_PIN_SIZE, layout.STATE_PINS_COUNT)
  }

  /** Whether it has this revision's layout. The header is the same in all of them. */
  get compatible(): boolean {
    return this.view.getUint32(layout.STATE_VERSION_AT, true) === layout.STATE_VERSION
  }

  /** The mount it is of; undefined where this is no state, or not of a mount yet. */
  get mount(): MountIdentity | undefined {
    const { view } = this
    if (view.getBigUint64(0, true) !== MAGIC) return undefined
    const length = view.getUint32(layout.STATE_PATH_LENGTH_AT, true)
    if (length === 0 || layout.STATE_PATH_AT + length > layout.STATE_HIGHEST_AT) return undefined
    const device = view.getUint32(layout.STATE_DEVICE_AT, true)
    return {
      mountpoint: Buffer.from(this.bytes.subarray(layout.STATE_PATH_AT, layout.STATE_PATH_AT + length)).toString(),
      device: `${device >>> 20}:${device & 0xfffff}`,
      pidNamespace: view.getUint32(layout.STATE_PID_NAMESPACE_AT, true),
    }
  }

  /** From here on somebody else may go on with it. */
  set mount({ mountpoint, device, pidNamespace }: MountIdentity) {
    const path = Buffer.from(mountpoint)
    if (layout.STATE_PATH_AT + path.length > layout.STATE_HIGHEST_AT) throw new Error(`path too long: ${mountpoint}`)
    const [major = 0, minor = 0] = device.split(':').map(Number)
    this.bytes.set(path, layout.STATE_PATH_AT)
    this.view.setUint32(layout.STATE_PATH_LENGTH_AT, path.length, true)
    this.view.setUint32(layout.STATE_DEVICE_AT, ((major << 20) | minor) >>> 0, true)
    this.view.setUint32(layout.STATE_PID_NAMESPACE_AT, pidNamespace, true)
    this.view.setUint32(layout.STATE_VERSION_AT, layout.STATE_VERSION, true)
    this.view.setBigUint64(0, MAGIC, true)
  }

  /** A number that a disk has had; none that any daemon of this mount has seen was higher. */
  get highest(): bigint {
    return Atomics.load(this.numbers, 0)
  }

  set highest(diskseq: bigint) {
    Atomics.store(this.numbers, 0, diskseq)
  }

  clear(): void {
    this.view.setUint32(LANDING, 0, true)
  }

  /** Some room is root's alone: whoever else has many requests wait, root's are not lost with this daemon. */
  store(request: Uint8Array, tries = 0): number {
    const small = SLOT_HEADER + request.length <= layout.STATE_SMALL_SIZE
    const slots = small ? this.small : this.big
    const index = slots.take(isRoots(request) ? 0 : slots.count / ROOT_PARTS)
    if (index < 0) return -1
    const at = slots.at(index)
    this.view.setUint32(at + layout.SLOT_TRIES_AT, tries, true)
    this.view.setUint32(at + layout.SLOT_INTERRUPTED_AT, 0, true)
    this.bytes.set(request, at + SLOT_HEADER)
    this.view.setUint32(at, request.length, true)
    return at
  }

  stored(slot: number, length: number): Uint8Array {
    return this.bytes.subarray(slot + SLOT_HEADER, slot + SLOT_HEADER + length)
  }

  interrupt(slot: number): void {
    if (slot >= 0) this.view.setUint32(slot + layout.SLOT_INTERRUPTED_AT, 1, true)
  }

  drop(slot: number): void {
    if (slot < 0) return
    this.view.setUint32(slot, 0, true)
    const slots = slot < layout.STATE_BIG_AT ? this.small : this.big
    slots.give((slot - slots.start) / slots.size)
  }

  resetTries(): void {
    for (const slots of [this.small, this.big]) {
      for (const index of slots.inUse()) this.view.setUint32(slots.at(index) + layout.SLOT_TRIES_AT, 0, true)
    }
  }

  unanswered(): Unanswered[] {
    const found: Unanswered[] = []
    const known = new Set<bigint>()
    for (const slots of [this.small, this.big]) {
      // The guard has kept some since this daemon opened the memory.
      slots.look()
      for (const index of slots.inUse()) {
        const slot = slots.at(index)
        const length = this.view.getUint32(slot, true)
        if (length < IN_HEADER_SIZE || length > slots.size - SLOT_HEADER) {
          this.drop(slot)
          continue
        }
        const message = this.copy(slot + SLOT_HEADER, length)
        const tries = this.view.getUint32(slot + layout.SLOT_TRIES_AT, true) + 1
        this.view.setUint32(slot + layout.SLOT_TRIES_AT, tries, true)
        const interrupted = this.view.getUint32(slot + layout.SLOT_INTERRUPTED_AT, true) !== 0
        found.push({ message, slot, tries, interrupted })
        known.add(message.header().unique)
      }
    }
    const length = this.view.getUint32(LANDING, true)
    if (length >= IN_HEADER_SIZE && length <= layout.STATE_REQUEST_MAX) {
      const message = this.copy(LANDING, length)
      // It was being kept at that very moment.
      if (!known.has(message.header().unique)) {
        found.push({ message, slot: this.store(message.bytes, 1), tries: 1, interrupted: false })
      }
    }
    this.clear()
    return found
  }

  private copy(at: number, length: number): Message {
    return new Message(this.bytes.slice(at, at + length), length)
  }

  /**
   * A place to write down whom a pin is taken for.
   *
   * @returns its number, for the other calls; -1 where there is no room
   */
  takePin(id: bigint): number {
    const index = this.pins.take()
    if (index < 0) return -1
    const at = this.pins.at(index)
    this.view.setUint32(at + LINGERS_AT, 0, true)
    this.view.setUint32(at + COUNT_AT, 0, true)
    this.view.setUint32(at + MORE_AT, 0, true)
    this.view.setBigUint64(at + ID_AT, id, true)
    this.view.setUint32(at, 1, true)
    return index
  }

  dropPin(index: number): void {
    if (index < 0) return
    this.view.setUint32(this.pins.at(index), 0, true)
    this.pins.give(index)
  }

  /** How many callers are written down; an earlier daemon's word for it may be anything. */
  private callers(at: number): number {
    return Math.min(this.view.getUint32(at + COUNT_AT, true), CALLERS_MAX)
  }

  /** Before the caller is answered. A thread is in one call at a time: the last one counts. */
  pinnedFor(index: number, caller: PinnedCaller, lingers: boolean): void {
    if (index < 0) return
    const { view } = this
    const at = this.pins.at(index)
    if (lingers) view.setUint32(at + LINGERS_AT, 1, true)
    const count = this.callers(at)
    let i = 0
    while (i < count && view.getUint32(at + CALLERS_AT + i * CALLER_SIZE, true) !== caller.tid) i++
    if (i === CALLERS_MAX || caller.tid === 0) return view.setUint32(at + MORE_AT, 1, true)
    const entry = at + CALLERS_AT + i * CALLER_SIZE
    view.setUint32(entry, caller.tid, true)
    view.setInt32(entry + 4, caller.call, true)
    view.setUint32(entry + 8, caller.outlasts ? 1 : 0, true)
    if (i === count) view.setUint32(at + COUNT_AT, count + 1, true)
  }

  /** The caller that was written down last was not answered after all. */
  notPinnedFor(index: number, tid: number): void {
    if (index < 0) return
    const { view } = this
    const at = this.pins.at(index)
    for (let i = this.callers(at) - 1; i >= 0; i--) {
      const entry = at + CALLERS_AT + i * CALLER_SIZE
      // A call that no thread is in.
      if (view.getUint32(entry, true) === tid) view.setInt32(entry + 4, NO_CALL, true)
    }
  }

  /** What an earlier daemon had, until this one opened the memory and since. */
  pinRecords(): PinRecord[] {
    const { view } = this
    this.pins.look()
    return this.pins.inUse().map((index) => {
      const at = this.pins.at(index)
      const callers: PinnedCaller[] = []
      for (let i = 0; i < this.callers(at); i++) {
        const entry = at + CALLERS_AT + i * CALLER_SIZE
        callers.push({
          tid: view.getUint32(entry, true),
          call: view.getInt32(entry + 4, true),
          outlasts: view.getUint32(entry + 8, true) !== 0,
        })
      }
      return {
        index,
        id: view.getBigUint64(at + ID_AT, true),
        lingers: view.getUint32(at + LINGERS_AT, true) !== 0,
        callers,
        more: view.getUint32(at + MORE_AT, true) !== 0,
      }
    })
  }
}
