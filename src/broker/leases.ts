// SPDX-License-Identifier: MIT
/**
 * Leases: disks that the daemon holds open for somebody, until a time is over, a connection is closed, or it is told to let
 * go. They survive the daemon: each is a message in a socket that another process stores (see PinStore, which does so with pins),
 * and the message has the record and the descriptor. It is there before the client is answered.
 */
import { randomBytes } from 'node:crypto'
import { join } from 'node:path'

import { adoptDescriptor, type Disk, DiskError, open, openBeside } from '../disks/open.js'
import { errnoName } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import type { Native } from '../native.js'
import type { LeaseReply, Rule } from './lease-reply.js'

/** How many there may be: each is a descriptor, and a stored one. */
export const LEASES_MAX = 1024
/** How many may be in the making: each may hang, and with it a thread. */
export const PENDING_MAX = 128
export const GRACE_SECONDS = 30

/** What is stored of a lease, beside the disk's descriptor. */
interface Record {
  /** `lease-1f09a3c2`: also what its socket is stored as. */
  readonly lease: string
  readonly name: string
  readonly diskseq: string
  readonly rule: Rule
  readonly graceSeconds: number
  readonly createdUSec: number
  readonly file?: string
  readonly reason?: string
  /** Of a disk that is shared: equal for those who get the same one. */
  readonly share?: string
}

/** Of a lease that is asked for. */
export type Terms = Pick<Record, 'rule' | 'graceSeconds'> & { readonly [K in 'file' | 'reason' | 'share']: string | undefined }

interface Lease {
  readonly record: Record
  readonly disk: Disk
  /** Holds the message. */
  readonly socket: number
  /** s, until it ends; undefined for one that does not by itself. */
  left: number | undefined
}

/** Opens or makes a disk; it is to be opened by a node in the directory `nodes`. */
export type TakeDisk = (nodes: number) => Promise<Disk>

/** Errors of a disk whose last user has closed it meanwhile. */
const GONE: readonly string[] = ['ENOENT', 'ENXIO', 'ENODEV', 'ESTALE']

/** Another process that stores descriptors. */
export interface LeaseStore {
  /** Resolves when they are out of this process. */
  putLease(name: string, socket: number): Promise<void>
  /** One that it stores already. */
  keepLease(name: string, socket: number): void
  removeLease(name: string): void
}

type Calls = Pick<Native, 'selfSocket' | 'sendDescriptors' | 'receiveDescriptors' | 'duplicate' | 'close' | 'closeDevice'>

export interface LeasesParts {
  readonly native: Calls
  readonly store: LeaseStore
  /** From {@link Native.makeNodes}: disks are opened by nodes there, as pins are. */
  readonly nodes: number
  /** Of the tree. */
  readonly mountpoint: string
  readonly log: Logger
}

/** As what the sockets of all leases come from the process that stores them. */
export const STORED_LEASES = 'leases'

/** Of a stored message, bytes: the names in it are bounded by what a call may have. */
const RECORD_MAX = 131_072

export class Leases {
  private readonly leases = new Map<string, Lease>()
  /** Being made. */
  private pending = 0
  /** By {@link Record.share}: the disk that was made last, and who waits for one. */
  private readonly shared = new Map<string, string>()
  private readonly turns = new Map<string, Promise<unknown>>()
  private ticker: NodeJS.Timeout | undefined
  /** Another daemon goes on with them. */
  private paused = false
  /** There are to be no more. */
  private closed = false

  constructor(private readonly parts: LeasesParts) {}

  get count(): number {
    return this.leases.size
  }

  /** Whether there is room for another one. */
  get full(): boolean {
    return this.leases.size + this.pending >= LEASES_MAX
  }

  /** Whether so many are being made that something must hang. */
  get stuck(): boolean {
    return this.pending >= PENDING_MAX
  }

  /**
   * Holds a disk.
   *
   * @param take gives the disk, which is owned from then on
   * @returns the lease, by its name; it may have been ended when that is known
   * @throws DiskError
   */
  async add(take: TakeDisk, terms: Terms): Promise<string> {
    this.pending++
    try {
      const { share } = terms
      return await this.hold(await (share === undefined ? take(this.parts.nodes) : this.share(share, take)), terms)
    } finally {
      this.pending--
    }
  }

  /** @param what a lease, or the name of a disk in the tree, with all its leases */
  async release(what: string): Promise<LeaseReply[]> {
    const found = [...this.leases.values()].filter(({ record }) => record.lease === what || record.name === what)
    const infos = found.map((lease) => this.info(lease))
    await Promise.all(found.map((lease) => this.end(lease, 'released')))
    return infos
  }

  /** Ends one whose client has gone. */
  leave(id: string): void {
    const lease = this.leases.get(id)
    if (lease !== undefined) void this.end(lease, 'its client is gone')
  }

  list(): LeaseReply[] {
    return [...this.leases.values()].map((lease) => this.info(lease))
  }

  /** @returns with another descriptor of the disk, the caller's, if `descriptor` */
  find(id: string, descriptor: boolean): { info: LeaseReply; fd: number } | undefined {
    const lease = this.leases.get(id)
    return lease && { info: this.info(lease), fd: descriptor ? this.parts.native.duplicate(lease.disk.fd) : -1 }
  }

  /** The disk or partition is gone: nobody can get it by its name any more. */
  vanished(name: string): void {
    for (const [share, shared] of this.shared) if (shared === name) this.shared.delete(share)
    for (const lease of this.leases.values()) {
      if (lease.record.name !== name) continue
      this.parts.log.warn({ lease: lease.record.lease, name }, 'the disk of a lease is gone')
      void this.end(lease, 'its disk is gone')
    }
  }

  /**
   * Goes on with those that an earlier daemon has had stored.
   *
   * @param sockets owned from now on
   */
  async takeOver(sockets: readonly number[]): Promise<void> {
    await Promise.all(sockets.map((socket) => this.takeOne(socket)))
    this.tick()
  }

  /** Keeps them as they are: another daemon goes on. */
  pause(): void {
    this.paused = true
    this.stopTicking()
  }

  /** After {@link pause}: it does not. */
  goOn(): void {
    this.paused = false
    this.tick()
  }

  /** Ends them all. */
  close(): void {
    this.closed = true
    this.stopTicking()
    for (const lease of this.leases.values()) void this.end(lease, 'the tree is taken away')
  }

  private async hold(disk: Disk, { rule, graceSeconds, file, reason, share }: Terms): Promise<string> {
    const { native, store, log } = this.parts
    if (this.paused) {
      await disk.close()
      throw new DiskError('the daemon is being replaced; try again', 'EAGAIN')
    }
    const lease = this.freeName()
    const record: Record = {
      ...{ lease, name: disk.name, diskseq: String(disk.diskseq), rule, graceSeconds, createdUSec: Date.now() * 1000 },
      ...(file !== undefined && { file }),
      ...(reason !== undefined && { reason }),
      ...(share !== undefined && { share }),
    }
    const socket = native.selfSocket()
    const sent = socket < 0 ? socket : native.sendDescriptors(socket, JSON.stringify(record), [disk.fd])
    if (sent < 0) {
      if (socket >= 0) native.close(socket)
      await disk.close()
      throw new DiskError(`the lease cannot be stored: ${errnoName(sent)}`, errnoName(sent))
    }
    // The next daemon may go on with it before this one answers.
    await store.putLease(lease, socket)
    const held = { record, disk, socket, left: rule === 'grace' ? graceSeconds : undefined }
    this.leases.set(lease, held)
    if (this.closed) {
      await this.end(held, 'the tree is taken away')
      throw new DiskError('the tree is being taken away', 'ENODEV')
    }
    this.tick()
    log.info({ lease, name: disk.name, rule, ...(rule !== 'keep' && { graceSeconds }), file, reason }, 'a disk is held')
    return lease
  }

  private freeName(): string {
    let name
    do name = `lease-${randomBytes(4).toString('hex')}`
    while (this.leases.has(name))
    return name
  }

  /** One after another, for those who ask for the same: the second one finds what the first one has made. */
  private share(share: string, make: TakeDisk): Promise<Disk> {
    const before = this.turns.get(share) ?? Promise.resolve()
    const turn = before.then(async () => (await this.openShared(share)) ?? this.made(share, await make(this.parts.nodes)))
    const done = turn.catch(() => {})
    this.turns.set(share, done)
    void done.then(() => {
      if (this.turns.get(share) === done) this.turns.delete(share)
    })
    return turn
  }

  private made(share: string, disk: Disk): Disk {
    this.shared.set(share, disk.name)
    return disk
  }

  /** The disk that somebody else who asked for the same has got, if it is still there. */
  private async openShared(share: string): Promise<Disk | undefined> {
    const name = this.shared.get(share)
    if (name === undefined) return undefined
    const held = [...this.leases.values()].find(({ record }) => record.name === name)
    // Its own descriptor may be closed, and the number used anew, before another thread comes to it.
    const fd = held === undefined ? -1 : this.parts.native.duplicate(held.disk.fd)
    try {
      const disk = await (fd < 0 ? this.openUnheld(name) : openBeside(fd, this.parts.nodes))
      if (disk.name === name) return disk
      await disk.close()
    } catch (error) {
      if (!(error instanceof DiskError) || !GONE.includes(error.code)) throw error
    } finally {
      if (fd >= 0) this.parts.native.closeDevice(fd, () => {})
    }
    if (this.shared.get(share) === name) this.shared.delete(share)
    return undefined
  }

  /** One that somebody has open, if it is there. */
  private async openUnheld(name: string): Promise<Disk> {
    const disk = await open(name)
    try {
      return await openBeside(disk.fd, this.parts.nodes)
    } finally {
      void disk.close()
    }
  }

  private async takeOne(socket: number): Promise<void> {
    const { native, store, log } = this.parts
    const buffer = new Uint8Array(RECORD_MAX)
    const found = native.receiveDescriptors(socket, buffer, true)
    const [length, fd = -1, ...others] = typeof found === 'number' ? [0] : found
    for (const each of others) native.close(each)
    const record = parseRecord(Buffer.from(buffer.subarray(0, length)).toString())
    const disk = fd < 0 ? undefined : await adoptDescriptor(fd).catch(() => undefined)
    if (record !== undefined && disk !== undefined && disk.name === record.name && !this.closed) {
      // A client that waits for its answer, or whose connection was the lease's, comes again.
      const left = record.rule === 'keep' ? undefined : record.graceSeconds
      this.leases.set(record.lease, { record, disk, socket, left })
      store.keepLease(record.lease, socket)
      if (record.share !== undefined) this.shared.set(record.share, record.name)
      return
    }
    // An empty socket: it was being released.
    if (record !== undefined) log.warn({ lease: record.lease, name: record.name }, 'a lease is not gone on with: its disk is gone')
    void disk?.close()
    this.empty(socket)
    if (record !== undefined) store.removeLease(record.lease)
    native.close(socket)
  }

  private async end(lease: Lease, why: string): Promise<void> {
    const { native, store, log } = this.parts
    const { record, disk, socket } = lease
    if (this.paused) {
      lease.left ??= record.graceSeconds
      return
    }
    if (!this.leases.delete(record.lease)) return
    log.info({ lease: record.lease, name: record.name, why }, 'a disk is no longer held')
    // Whoever has the socket as well closes it without closing a device, which may take as long as that likes.
    this.empty(socket)
    store.removeLease(record.lease)
    native.close(socket)
    await disk.close()
  }

  private empty(socket: number): void {
    const { native } = this.parts
    const found = native.receiveDescriptors(socket, new Uint8Array(1), false)
    if (typeof found !== 'number') for (const fd of found.slice(1)) native.closeDevice(fd, () => {})
  }

  /**
   * Seconds for each of which this process has to be woken, as in {@link afterTicks}: where everybody else is late, because the
   * machine is busy or was asleep, leases are late as well.
   */
  private tick(): void {
    const some = [...this.leases.values()].some(({ left }) => left !== undefined)
    if (!some || this.paused) return this.stopTicking()
    this.ticker ??= setInterval(() => {
      for (const lease of this.leases.values()) {
        if (lease.left !== undefined && lease.left-- <= 0) void this.end(lease, 'its time is over')
      }
      this.tick()
    }, 1000)
  }

  private stopTicking(): void {
    clearInterval(this.ticker)
    this.ticker = undefined
  }

  private info({ record, disk }: Lease): LeaseReply {
    const { lease, name, diskseq, rule, graceSeconds, createdUSec, file, reason } = record
    return {
      ...{ lease, name, path: join(this.parts.mountpoint, name), diskseq, partition: disk.partition },
      ...{ kernelName: disk.kname, deviceNumber: disk.majmin, rule, createdUSec },
      ...(rule !== 'keep' && { graceSeconds }),
      ...(file !== undefined && { file }),
      ...(reason !== undefined && { reason }),
    }
  }
}

function parseRecord(text: string): Record | undefined {
  try {
    return JSON.parse(text) as Record
  } catch {
    return undefined
  }
}
