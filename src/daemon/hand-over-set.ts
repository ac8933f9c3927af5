// SPDX-License-Identifier: MIT
/**
 * All that another daemon needs to go on with the tree: descriptors, the memory that both share, and the stored pins. The
 * guard keeps them for the one that it starts next; without a guard, they are sent to the one that asks (`mount --replace`).
 */
import { type LeaseStore, STORED_LEASES } from '../broker/leases.js'
import type { Guard } from '../handover/guard-client.js'
import { PinStore } from '../handover/pin-store.js'
import { HandOver, type OutgoingDaemon, socketOf, type TreeOwner } from '../handover/replace.js'
import type { Descriptors } from '../handover/service-manager.js'
import { SharedState, STATE_SIZE } from '../handover/shared-state.js'
import { DESCRIPTOR } from '../handover/takeover.js'
import type { Native } from '../native.js'
import { errnoName } from '../util/errno.js'
import type { Logger } from '../util/log.js'

export interface HandOverSetParts {
  readonly native: Native
  /** The guard that has started this daemon, if one has: with it, the tree outlives the daemon. */
  readonly guard: Guard | undefined
  /** Told when it is another daemon's turn. */
  readonly owner: TreeOwner
  readonly log: Logger
}

export class HandOverSet implements LeaseStore {
  /** Whether another daemon can go on with the tree when this one just ends. */
  canBeTakenOver = false
  /** Of this process alone, until {@link share} or {@link use}. */
  state = new SharedState()
  pinStore: PinStore | undefined
  private stateFd = -1
  private readonly fds = new Map<string, readonly number[]>()
  /** Sockets of leases, by the leases' names. */
  private readonly leases = new Map<string, number>()
  private handOver: HandOver | undefined

  constructor(private readonly parts: HandOverSetParts) {}

  /** Puts the state where another daemon finds it. */
  share(): void {
    const { native } = this.parts
    const fd = native.sharedMemory(STATE_SIZE)
    const memory = fd < 0 ? fd : native.mapMemory(fd, STATE_SIZE)
    if (typeof memory === 'number') throw new Error(`no memory to share: ${errnoName(memory)}`)
    this.use(new SharedState(memory), fd)
  }

  /** @param fd of the state's memory; owned from now on */
  use(state: SharedState, fd: number): PinStore {
    const { native, log } = this.parts
    this.state = state
    this.stateFd = fd
    return (this.pinStore = new PinStore({ native, state, store: (sockets) => this.storePins(sockets), log }))
  }

  /**
   * It is this daemon's turn: the one before reads no more requests.
   *
   * @param outgoing the one that was asked for the tree; undefined for the guard's
   * @returns what it has had stored since it was asked what it has
   */
  async take(outgoing: OutgoingDaemon | undefined): Promise<Descriptors> {
    const { guard } = this.parts
    // What fails from here on is no reason to take the tree away: the one before goes on, or the next one.
    this.canBeTakenOver = outgoing !== undefined || guard !== undefined
    return (await (outgoing ?? guard)?.take()) ?? new Map<string, readonly number[]>()
  }

  /**
   * From now on another daemon can go on: one that asks, or one that the guard starts after this.
   *
   * @param device of the mount, as in mountinfo
   * @param own those that are not negative; the guard has them already where they are an earlier daemon's
   */
  allow(device: string, own: Readonly<Record<string, number>>, tookOver: boolean): void {
    const { native, guard, owner, log } = this.parts
    for (const [name, fd] of Object.entries({ ...own, state: this.stateFd })) if (fd >= 0) this.fds.set(name, [fd])
    this.canBeTakenOver = guard !== undefined
    if (guard !== undefined) {
      if (!tookOver) for (const [name, fds] of this.descriptors()) guard.put(name, fds)
      return
    }
    this.handOver = new HandOver({ native, path: socketOf(device), descriptors: () => this.descriptors(), owner, log })
    this.handOver.start()
  }

  /** One that an earlier daemon did not have. */
  add(name: string, fd: number): void {
    this.fds.set(name, [fd])
    this.parts.guard?.put(name, [fd])
    this.handOver?.send(name, [fd])
  }

  /** One that the guard has already. */
  keep(name: string, fd: number): void {
    this.fds.set(name, [fd])
  }

  /** See {@link LeaseStore}. */
  async putLease(name: string, socket: number): Promise<void> {
    this.leases.set(name, socket)
    this.handOver?.send(STORED_LEASES, [socket])
    this.parts.guard?.put(name, [socket])
    await this.parts.guard?.told()
  }

  /** See {@link LeaseStore}. */
  keepLease(name: string, socket: number): void {
    this.leases.set(name, socket)
  }

  /** See {@link LeaseStore}. */
  removeLease(name: string): void {
    this.leases.delete(name)
    this.parts.guard?.remove([name])
  }

  private descriptors(): Descriptors {
    return new Map([...this.fds, [DESCRIPTOR.pins, this.pinStore?.all ?? []], [STORED_LEASES, [...this.leases.values()]]])
  }

  private storePins(sockets: readonly number[]): void {
    if (this.canBeTakenOver) this.parts.guard?.put(DESCRIPTOR.pins, sockets)
    this.handOver?.send(DESCRIPTOR.pins, sockets)
  }

  close(): void {
    this.handOver?.close()
    this.pinStore?.close()
    if (this.stateFd >= 0) this.parts.native.close(this.stateFd)
    this.stateFd = -1
  }
}
