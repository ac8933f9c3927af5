// SPDX-License-Identifier: MIT
/**
 * What an incoming daemon must know of the outgoing one, in memory that survives a
 * crash: requests that were read and not yet answered, and the callers of
 * each pin. Everything else can be found out again.
 *
 * The memory is consistent at every instant, as a process may be killed between any two
 * writes. In doubt, something is recorded twice rather than not at all.
 */
import type { RequestStore, Unanswered } from '../fuse/request-store.js'
import { IN_HEADER_SIZE, Message, UID_AT } from '../fuse/wire.js'
import { native } from '../native.js'

const layout = native.layout

/** "diskseqfs". */
const MAGIC = 0x7165736b_73696401n
const SLOT_HEADER = layout.SLOT_HEADER_SIZE
/** The slot that requests are read into; it has a slot's header. */
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

/** Bytes; nearly all of them are never touched, and take no memory. */
export const STATE_SIZE = layout.STATE_SIZE

/** One in this many slots for requests is reserved for root; the guard has the same figure. */
const ROOT_PARTS = 4

const isRoots = (request: Uint8Array): boolean => new DataView(request.buffer, request.byteOffset).getUint32(UID_AT, true) === 0

/** Which mount the state belongs to. */
export interface MountIdentity {
  readonly mountpoint: string
  /** As in mountinfo, "0:53". */
  readonly device: string
  /** Inode of the pid namespace; 0 if it was not recorded. */
  readonly pidNamespace: number
}

/** A caller of a pin. */
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
  /** There were more callers than could be recorded. */
  readonly more: boolean
}

/** Offsets in the memory, bytes. */
interface SlotLayout {
  /** Of the number of slots that have been in use. */
  readonly usedAt: number
  readonly start: number
  readonly size: number
  readonly count: number
}

/** Slots of one size; a slot is in use if it begins with a number other than 0. */
class Slots {
  private readonly free: number[] = []
  private used = 0
  private readonly usedAt: number
  readonly start: number
  readonly size: number
  readonly count: number

  constructor(
    private readonly view: DataView,
    { usedAt, start, size, count }: SlotLayout,
  ) {
    this.usedAt = usedAt
    this.start = start
    this.size = size
    this.count = count
    this.look()
  }

  /** Reads which slots are in use, as another process may have changed that. */
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

  /** @returns -1 if no more than `spare` slots are free */
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

  /** @param memory {@link STATE_SIZE} bytes; zeros, or an earlier daemon's */
  constructor(memory: ArrayBuffer = new ArrayBuffer(STATE_SIZE)) {
    const view = new DataView(memory)
    this.view = view
    this.bytes = new Uint8Array(memory)
    this.numbers = new BigUint64Array(memory, layout.STATE_HIGHEST_AT, 1)
    this.landing = new Uint8Array(memory, LANDING, layout.STATE_REQUEST_MAX)
    this.small = new Slots(view, {
      usedAt: layout.STATE_SMALL_USED_AT,
      start: layout.STATE_SMALL_AT,
      size: layout.STATE_SMALL_SIZE,
      count: layout.STATE_SMALL_COUNT,
    })
    this.big = new Slots(view, {
      usedAt: layout.STATE_BIG_USED_AT,
      start: layout.STATE_BIG_AT,
      size: layout.STATE_BIG_SIZE,
      count: layout.STATE_BIG_COUNT,
    })
    this.pins = new Slots(view, {
      usedAt: layout.STATE_PINS_USED_AT,
      start: layout.STATE_PINS_AT,
      size: layout.STATE_PIN_SIZE,
      count: layout.STATE_PINS_COUNT,
    })
  }

  /** Whether it has this version's layout. The header is the same in all versions. */
  get compatible(): boolean {
    return this.view.getUint32(layout.STATE_VERSION_AT, true) === layout.STATE_VERSION
  }

  /** Its mount; undefined if this is no state, or not of a mount yet. */
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

  /** From now on another daemon may go on with it. */
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

  /** The highest diskseq that a daemon of this mount has seen. */
  get highest(): bigint {
    return Atomics.load(this.numbers, 0)
  }

  set highest(diskseq: bigint) {
    Atomics.store(this.numbers, 0, diskseq)
  }

  clear(): void {
    this.view.setUint32(LANDING, 0, true)
  }

  /** See {@link RequestStore.store}. Some slots are reserved for root, whose requests survive this daemon however many users wait. */
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
      // The guard may have stored some since this daemon opened the memory.
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
      // The daemon ended while it stored this one.
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
   * Reserves a record for a pin.
   *
   * @returns its index, for the other calls; -1 if there is no room
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

  /** The number of recorded callers; not trusted, as an earlier daemon wrote it. */
  private callers(at: number): number {
    return Math.min(this.view.getUint32(at + COUNT_AT, true), CALLERS_MAX)
  }

  /** Records a caller, before it is answered. A thread is in one call at a time, so the last one counts. */
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

  /** Undoes {@link pinnedFor}: the caller was not answered after all. */
  notPinnedFor(index: number, tid: number): void {
    if (index < 0) return
    const { view } = this
    const at = this.pins.at(index)
    for (let i = this.callers(at) - 1; i >= 0; i--) {
      const entry = at + CALLERS_AT + i * CALLER_SIZE
      // No thread is ever in this call.
      if (view.getUint32(entry, true) === tid) view.setInt32(entry + 4, NO_CALL, true)
    }
  }

  /** The records of an earlier daemon, also those it made since this one opened the memory. */
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
