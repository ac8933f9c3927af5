// SPDX-License-Identifier: MIT
/** Disks and partitions as they come and go, as events. */
import { Registry } from '../devices/registry.js'
import { Sysfs } from '../devices/sysfs.js'
import { type UeventListener, UeventSocket } from '../devices/uevents.js'
import { native } from '../native.js'
import type { Logger } from '../util/log.js'
import { type DiskInfo, infoOf } from './info.js'
import { cannotRead } from './open.js'

/**
 * `add` and `remove`: a name of the tree came, or went for ever. Another medium, or another file behind a loop
 * device, is another disk: one `remove`, one `add`. `ready`: what was there at the beginning has been told.
 * `resync`: events were lost; the differences to what was told come next.
 */
export type DiskEvent =
  | {
      /** What happened to the disk. */
      readonly event: 'add' | 'remove'
      /** As it is, or was. */
      readonly disk: DiskInfo
    }
  | {
      /** What happened to the events themselves. */
      readonly event: 'ready' | 'resync'
    }

/** What is told, and until when. */
export interface WatchOptions {
  /** Tells first what is there, as `add`, and then `ready`. */
  readonly existing?: boolean
  /** Ends it. */
  readonly signal?: AbortSignal
}

/** Events that wait for a consumer; if there are more, they are dropped and `resync` takes their place. */
const WAITING_MAX = 65_536

/**
 * Collects events for one consumer.
 *
 * @internal
 */
export class Events {
  private readonly waiting: DiskEvent[] = []
  /** What the consumer knows. */
  private readonly told = new Map<string, DiskInfo>()
  private overflown = false
  private wake: () => void = () => {}

  constructor(
    private readonly registry: Pick<Registry, 'devices'>,
    private readonly waitingMax = WAITING_MAX,
  ) {}

  /** What was there at the beginning. */
  begin(event: DiskEvent, tell: boolean): void {
    if (tell) this.push(event)
    else this.note(event)
  }

  push(event: DiskEvent): void {
    if (this.overflown) return
    if (this.waiting.length === this.waitingMax) {
      this.overflown = true
      this.waiting.length = 0
    } else {
      this.waiting.push(event)
    }
    this.wake()
  }

  /** The next ones, once there are some. */
  async next(signal: AbortSignal | undefined): Promise<DiskEvent[]> {
    while (this.waiting.length === 0 && !this.overflown && signal?.aborted !== true) {
      const ending = new AbortController()
      await new Promise<void>((resolve) => {
        this.wake = resolve
        signal?.addEventListener('abort', () => resolve(), { signal: ending.signal })
      })
      ending.abort()
    }
    const events: DiskEvent[] = this.overflown ? [{ event: 'resync' }, ...this.differences()] : this.waiting.splice(0)
    this.overflown = false
    for (const event of events) this.note(event)
    return events
  }

  private note(event: DiskEvent): void {
    if (event.event === 'add') this.told.set(event.disk.name, event.disk)
    if (event.event === 'remove') this.told.delete(event.disk.name)
  }

  /** Between what the consumer was told and what is there. */
  private differences(): DiskEvent[] {
    const now = new Map(this.registry.devices().map((device) => [device.name, device]))
    const gone = [...this.told.values()].filter((disk) => !now.has(disk.name))
    const events: DiskEvent[] = gone.map((disk) => ({ event: 'remove', disk }))
    for (const device of now.values()) if (!this.told.has(device.name)) events.push({ event: 'add', disk: infoOf(device) })
    return events
  }
}

/** What goes wrong here is an event, `resync`, or an error for the consumer. */
const SILENT: Logger = { error() {}, warn() {}, info() {}, debug() {} }

/**
 * Tells of disks and partitions in the order in which they come and go, each once. A disk that is gone again before it
 * could be looked at, a matter of microseconds on a machine with processors to spare, is not told of.
 *
 * @throws UserError if the kernel's events cannot be heard, or sysfs cannot be read
 */
export async function* watch({ existing = false, signal }: WatchOptions = {}): AsyncGenerator<DiskEvent, void, undefined> {
  const registry = new Registry(new Sysfs(native), SILENT)
  const events = new Events(registry)
  const listener: UeventListener = {
    numbered: (kname, diskseq, gone) => registry.numbered(kname, diskseq, gone),
    changed: (knames) => registry.changed(knames),
    lost: () => {
      events.push({ event: 'resync' })
      registry.lost()
    },
  }
  const socket = new UeventSocket({ native, listener, log: SILENT })
  socket.open()
  try {
    registry.drain = () => socket.drain()
    await registry.start()
    if (registry.scanError !== 0) throw cannotRead(registry.scanError)
    // What is there is known from here on, and told only if it is asked for.
    for (const device of registry.devices()) events.begin({ event: 'add', disk: infoOf(device) }, existing)
    if (existing) events.push({ event: 'ready' })
    registry.listener = {
      appeared: (device) => events.push({ event: 'add', disk: infoOf(device) }),
      vanished: (device) => events.push({ event: 'remove', disk: infoOf(device) }),
    }
    while (signal?.aborted !== true) for (const event of await events.next(signal)) yield event
  } finally {
    socket.close()
    registry.close()
  }
}
