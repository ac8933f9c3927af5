// SPDX-License-Identifier: MIT
/**
 * Pins of an earlier daemon: callers that it has answered may still be about to open the
 * device. Each becomes a pin of this daemon; if its device is gone, it is
 * held until those callers have left their calls.
 */
import type { Registry } from '../devices/registry.js'
import type { PinStore, StoredPin } from '../handover/pin-store.js'
import type { PinnedCaller, PinRecord } from '../handover/shared-state.js'
import type { Native } from '../native.js'
import { monotonicMs } from '../util/clock.js'
import type { InodeTable } from './inode.js'
import { type Call, type Intents, someCall } from './intent.js'
import type { PinLifetime } from './pin-lifetime.js'
import type { PinOpener } from './pin.js'

/** Time between two looks at the callers, ms. */
const LOOK_MS = 10

export interface TakenOverPinsParts {
  readonly native: Pick<Native, 'lookAtThreads' | 'closeDevice'>
  readonly inodes: InodeTable
  readonly registry: Pick<Registry, 'find'>
  readonly opener: PinOpener
  readonly lifetime: PinLifetime
  readonly intents: Intents
  readonly pinStore: PinStore
  /** How long such a pin is held at most, s. */
  readonly holdSeconds: number
}

export class TakenOverPins {
  constructor(private readonly parts: TakenOverPinsParts) {}

  takeOver({ fd, place, record }: StoredPin): void {
    const { inodes, registry, opener, lifetime } = this.parts
    // Two may be of the same disk, if it was opened twice at once.
    const inode = inodes.get(record.id) === undefined ? inodes.recall(record.id) : undefined
    const device = inode === undefined ? undefined : registry.find(inode.name)
    const pin = device === undefined ? undefined : { fd, device, place }
    if (inode === undefined || pin === undefined || !opener.holds(pin)) {
      if (inode !== undefined) inodes.release(inode)
      return this.hold(fd, place, record, monotonicMs() + this.parts.holdSeconds * 1000)
    }
    inode.pin = pin
    inode.moreCallers = record.more
    inode.unseen = record.more || record.lingers
    inode.callers = new Map(record.callers.map((caller) => [caller.tid, callOf(caller)]))
    opener.tookOver()
    lifetime.takenOver(inode)
  }

  /** Holds the pin of a disk that is gone: its number must stay in use until the callers have left their calls. */
  private hold(fd: number, place: number, record: PinRecord, until: number): void {
    const { native, intents, pinStore } = this.parts
    const { callers, more } = record
    native.lookAtThreads(
      callers.flatMap((caller) => [caller.tid, intents.wantsStack(callOf(caller))]),
      (seen) => {
        const left = callers.filter((caller, i) => intents.mayStillBeIn(callOf(caller), seen[i]))
        if ((left.length > 0 || more) && monotonicMs() < until) {
          setTimeout(() => this.hold(fd, place, { ...record, callers: left }, until), LOOK_MS).unref()
          return
        }
        pinStore.drop(place)
        native.closeDevice(fd, () => {})
      },
    )
  }
}

/** A caller as an earlier daemon recorded it. */
function callOf({ call, outlasts }: PinnedCaller): Call {
  return someCall(outlasts ? 'unknown' : 'open', call)
}
