// SPDX-License-Identifier: MIT
/**
 * Which device has which name now: a hint, updated by uevents and corrected when it
 * turns out to be wrong. Nothing is opened on its word alone.
 */
import { LRUCache } from 'lru-cache'

import { monotonicMs } from '../util/clock.js'
import { type DiskSeq, nodeName } from './names.js'
import { errnoName, Exhausted } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { type Device, sameDevice, type Sysfs } from './sysfs.js'
import type { UeventListener } from './uevents.js'

/** Names remembered as proven absent, and for how long at most (ms): md takes a new diskseq without a uevent. */
const ABSENT_MAX = 4096
const ABSENT_TTL_MS = 1000

/** Numbers remembered as used up: no disk will ever have them again. And devices of whose numbers that was learned. */
const GONE_MAX = 4096

/**
 * Between two scans lie at least this many ms, and at least this many times
 * the processor time of the last one: so names nobody has cannot cost more
 * than a tenth of a processor, however many disks there are.
 */
const SCAN_INTERVAL_MS = 2
const SCAN_SHARE = 10
/** Waits for names that are answered in one turn of the event loop. */
const ANSWERS_AT_ONCE = 4
/** After a scan that failed, the next one comes this late, ms. */
const SCAN_RETRY_MS = 1000

export interface RegistryListener {
  appeared(device: Device): void
  /** No device has its name now, or another one has it. */
  vanished(device: Device): void
}

/** Where a device stands in a list in the order of {@link Registry.devices}, or would. */
function firstFrom(devices: readonly Device[], { diskseq, partition }: Pick<Device, 'diskseq' | 'partition'>): number {
  let low = 0
  for (let high = devices.length; low < high;) {
    const middle = (low + high) >> 1
    const device = devices[middle] as Device
    if (device.diskseq < diskseq || (device.diskseq === diskseq && device.partition < partition)) low = middle + 1
    else high = middle
  }
  return low
}

/** All disks and partitions by their names, and what is known of names that no disk has. */
export class Registry implements UeventListener {
  private readonly byName = new Map<string, Device>()
  private readonly byKname = new Map<string, Device>()
  /** All of them in order. */
  private readonly sorted: Device[] = []
  /** Kernel names of a disk's partitions, by diskseq; nothing for one that has none. */
  private readonly partitions = new Map<bigint, readonly string[]>()

  /** Names proven absent; any uevent clears it. */
  private readonly absent = new LRUCache<string, true>({ max: ABSENT_MAX, ttl: ABSENT_TTL_MS })
  /** Numbers whose disk was seen to lose them, which is for ever. */
  private readonly gone = new LRUCache<bigint, true>({ max: GONE_MAX })
  /** The highest number a device had in an event. */
  private readonly latest = new LRUCache<string, bigint>({ max: GONE_MAX })

  /**
   * Up to this number, a disk that is not known here is none: two whole scans
   * began after the number had been given out, and since then each new disk has
   * had its uevent.  (Two, as a disk gets its number a moment after it is counted.)
   */
  private searched = 0n
  /** The same, of one scan. */
  private seen = 0n
  private highestSeen = 0n
  /** How often uevents were lost, or what they were about; and how often before the last scan began. */
  private losses = 0
  private madeUpFor = -1

  private scanning = false
  /** What changed while a scan was under way: newer than what the scan saw. */
  private readonly touched = new Set<string>()
  private waiting: (() => void)[] = []
  /** Answers to waits for names, after a scan. */
  private readonly answers: (() => void)[] = []
  private scanTimer: NodeJS.Timeout | undefined
  private nextScan = -Infinity
  private retryTimer: NodeJS.Timeout | undefined
  /** Errno of the last scan, or 0. */
  scanError = 0
  private closed = false

  /** Reads the uevents that are waiting; set by the owner of the socket. */
  drain: () => void = () => {}
  /** Told of each device that comes and goes. */
  listener: RegistryListener = { appeared() {}, vanished() {} }

  constructor(
    private readonly sysfs: Sysfs,
    private readonly log: Logger,
  ) {}

  /**
   * @param highest a number that had been given out when an earlier daemon was at work: for which the first scan
   *   counts as the second
   * @returns once the first scan is in
   */
  start(highest = 0n): Promise<void> {
    this.seen = this.highestSeen = highest
    return new Promise((resolve) => this.rescan(resolve))
  }

  close(): void {
    this.closed = true
    clearTimeout(this.scanTimer)
    clearTimeout(this.retryTimer)
    this.waiting = []
  }

  get size(): number {
    return this.byName.size
  }

  /** No device that was seen had a higher number. */
  get highest(): bigint {
    return this.highestSeen
  }

  /** In order of diskseq, then partition. */
  devices(): readonly Device[] {
    this.drain()
    return this.sorted
  }

  /**
   * The device of that name, as far as the uevents tell that came before this
   * call: the kernel queues a device's event before the call that caused it
   * returns.
   */
  find(name: string): Device | undefined {
    this.drain()
    return this.byName.get(name)
  }

  /**
   * The device of that disk that the kernel calls so. Where no event has told of it, sysfs is asked,
   * which is one file: who has both names needs no search.
   * @throws Exhausted
   */
  called(kname: string, diskseq: DiskSeq): Device | undefined {
    this.drain()
    const known = this.byKname.get(kname)
    if (known?.diskseq === diskseq) return known
    this.look(kname)
    const device = this.byKname.get(kname)
    return device?.diskseq === diskseq ? device : undefined
  }

  /**
   * For a name that {@link find} does not know: looks through sysfs, since a
   * disk may get a new diskseq without an event. Callers share one scan.
   *
   * @param done gets the device, or 0 if there is none, or an errno: it could not be looked for
   */
  findSlowly(name: string, diskseq: DiskSeq, done: (found: Device | number) => void): void {
    if (this.lacks(name, diskseq)) return done(0)
    this.rescan(() => {
      const found = this.byName.get(name) ?? this.scanError
      if (found === 0) this.absent.set(name, true)
      this.answers.push(() => done(found))
    })
  }

  /** Whether a name that {@link find} does not know certainly does not exist; without a search. */
  lacks(name: string, diskseq: DiskSeq): boolean {
    if (this.gone.has(diskseq) || this.absent.has(name)) return true
    // Of a disk that is there each partition had its event, unless that was lost.
    if (this.byName.has(nodeName(diskseq, 0)) && this.madeUpFor === this.losses) return true
    return diskseq <= this.searched && !this.partitions.has(diskseq)
  }

  /** Reads one device again, and what belongs to its disk. */
  refresh(kname: string): void {
    this.changed(new Set([kname]))
  }

  /**
   * What lived so shortly that it was never seen in sysfs has gone as well. A
   * device's numbers only grow.
   */
  numbered(kname: string, diskseq: DiskSeq, gone: boolean): void {
    if (gone) this.gone.set(diskseq, true)
    const before = this.latest.get(kname) ?? diskseq
    if (before !== diskseq) this.gone.set(before < diskseq ? before : diskseq, true)
    if (before <= diskseq) this.latest.set(kname, diskseq)
  }

  changed(knames: ReadonlySet<string>): void {
    this.absent.clear()
    try {
      for (const kname of knames) this.look(kname)
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      this.log.error({ errno: errnoName(error.errno) }, 'cannot look at changed devices; trying again')
      this.lost()
    }
  }

  private look(kname: string): void {
    const before = this.byKname.get(kname)
    this.set(kname, this.sysfs.read(kname))
    if (before === undefined || before.partition !== 0) return
    if (this.byKname.get(kname)?.diskseq === before.diskseq) return
    for (const sibling of this.partitions.get(before.diskseq) ?? []) {
      this.set(sibling, this.sysfs.read(sibling))
    }
  }

  lost(): void {
    this.absent.clear()
    this.losses++
    this.searched = this.seen = 0n
    this.rescan(() => {})
  }

  private set(kname: string, device: Device | undefined): void {
    if (this.scanning) this.touched.add(kname)
    const before = this.byKname.get(kname)
    if (before !== undefined) {
      if (device !== undefined && sameDevice(before, device)) return
      this.byKname.delete(kname)
      if (this.byName.get(before.name) === before) this.unlist(before)
      const others = this.partitions.get(before.diskseq)?.filter((name) => name !== kname) ?? []
      if (others.length > 0) this.partitions.set(before.diskseq, others)
      else this.partitions.delete(before.diskseq)
      // The disk went away, or got another number, or a loop device its file
      // taken: none of them takes the old number back.
      if (before.partition === 0 && before.diskseq !== device?.diskseq) this.gone.set(before.diskseq, true)
    }
    if (device === undefined) return
    if (device.diskseq > this.highestSeen) this.highestSeen = device.diskseq
    this.byKname.set(kname, device)
    const other = this.byName.get(device.name)
    if (other !== undefined) this.unlist(other)
    this.byName.set(device.name, device)
    this.sorted.splice(firstFrom(this.sorted, device), 0, device)
    this.listener.appeared(device)
    if (device.partition === 0) return
    this.partitions.set(device.diskseq, [...(this.partitions.get(device.diskseq) ?? []), kname])
  }

  private unlist(device: Device): void {
    this.byName.delete(device.name)
    this.sorted.splice(firstFrom(this.sorted, device), 1)
    this.listener.vanished(device)
  }

  /** Calls back after a scan that began after this call. */
  private rescan(done: () => void): void {
    this.waiting.push(done)
    if (this.scanning || this.scanTimer !== undefined || this.closed) return
    const wait = this.nextScan - monotonicMs()
    if (wait <= 0) return this.scan()
    this.scanTimer = setTimeout(() => this.scan(), wait)
  }

  private scan(): void {
    this.scanTimer = undefined
    this.scanning = true
    this.touched.clear()
    const served = this.waiting
    this.waiting = []
    const { losses, highestSeen } = this
    this.sysfs.scan((error, devices, cpuMs) => {
      if (this.closed) return
      this.scanError = error
      if (error !== 0) {
        this.log.error({ errno: errnoName(error), path: this.sysfs.classDirectory }, 'cannot read sysfs')
      } else {
        this.merge(devices)
        this.madeUpFor = losses
        if (this.losses === losses) [this.searched, this.seen] = [this.seen, highestSeen]
      }
      this.scanning = false
      this.nextScan = monotonicMs() + Math.max(SCAN_INTERVAL_MS, cpuMs * SCAN_SHARE)
      for (const done of served) done()
      this.answer()
      if (error !== 0) this.retryTimer ??= setTimeout(() => this.retry(), SCAN_RETRY_MS)
      // Callers that asked meanwhile get a scan of their own.
      if (this.waiting.length > 0 && this.scanTimer === undefined) this.rescan(this.waiting.pop()!)
    })
  }

  private answer(): void {
    if (this.closed) return
    for (const give of this.answers.splice(0, ANSWERS_AT_ONCE)) give()
    if (this.answers.length > 0) setImmediate(() => this.answer())
  }

  /** After lost events sysfs must be read some time, even without a request. */
  private retry(): void {
    this.retryTimer = undefined
    this.lost()
  }

  private merge(devices: Device[]): void {
    this.drain()
    const missing = new Set(this.byKname.keys())
    const touched = new Set(this.touched)
    for (const device of devices) {
      missing.delete(device.kname)
      if (!touched.has(device.kname)) this.set(device.kname, device)
    }
    for (const kname of missing) if (!touched.has(kname)) this.set(kname, undefined)
  }
}
