// SPDX-License-Identifier: MIT
/** Opens of devices: one at a time for each inode, shared by all callers that wait for it. */
import type { Registry } from '../devices/registry.js'
import { type Device, sameDevice, type Sysfs } from '../devices/sysfs.js'
import { afterTicks, monotonicMs } from '../util/clock.js'
import type { Inode, Opening } from './inode.js'
import type { Pin, PinOpener, PinResult } from './pin.js'
import type { PinLifetime } from './pin-lifetime.js'

/** A signal interrupts a wait for a disk only after this time, ms: most signals (SIGCHLD) are not meant to. */
const INTERRUPT_AFTER_MS = 100

export interface OpeningsParts {
  readonly registry: Pick<Registry, 'refresh'>
  readonly sysfs: Pick<Sysfs, 'removable'>
  readonly opener: PinOpener
  readonly lifetime: Pick<PinLifetime, 'unpin' | 'attempted'>
  /** How long a caller waits for a disk that does not answer, ms. */
  readonly openTimeoutMs: number
}

export class Openings {
  /** LOOKUPs that are answered at the end of this turn, at the latest. */
  private readonly turn: (() => void)[] = []

  constructor(private readonly parts: OpeningsParts) {}

  /** The inode's pin, if it is still that device. */
  pinOf(inode: Inode): Pin | undefined {
    const { pin } = inode
    if (pin === undefined || this.parts.opener.current(pin)) return pin
    this.parts.lifetime.unpin(inode)
    this.parts.registry.refresh(pin.device.kname)
    return undefined
  }

  /** Whether the medium can be changed. Read when an open finds a pin: the first open of a disk need not wait for it. */
  removable(inode: Inode, device: Device): boolean {
    return (inode.removable ??= this.parts.sysfs.removable(device))
  }

  /** The open of this device that is under way; started if there is none. */
  of(inode: Inode, device: Device): Opening {
    if (inode.opening !== undefined && sameDevice(inode.opening.device, device)) return inode.opening
    const opening: Opening = { device, waiters: new Set(), begunFor: 0 }
    inode.opening = opening
    this.parts.opener.open(device, (result) => this.opened(inode, opening, result))
    return opening
  }

  private opened(inode: Inode, opening: Opening, result: PinResult): void {
    const { opener, registry, lifetime } = this.parts
    if (inode.opening === opening) inode.opening = undefined
    if ('pin' in result) {
      if (inode.pin === undefined) {
        inode.pin = result.pin
      } else {
        opener.close(result.pin)
        result = { pin: inode.pin }
      }
    } else {
      registry.refresh(opening.device.kname)
    }
    for (const waiter of [...opening.waiters]) waiter(result)
    lifetime.attempted(inode)
  }

  /** Waits for an open; calls back once, in one of three ways. */
  await(opening: Opening, onInterrupt: (listener: () => void) => void, done: (end: PinResult | 'late' | 'interrupted') => void): void {
    const began = monotonicMs()
    let interrupted: NodeJS.Timeout | undefined
    const end = (how: PinResult | 'late' | 'interrupted') => {
      if (!opening.waiters.delete(end)) return
      cancel()
      clearTimeout(interrupted)
      done(how)
    }
    opening.waiters.add(end)
    // In ticks: a daemon that was stopped has not waited for the disk.
    const cancel = afterTicks(this.parts.openTimeoutMs, () => end('late'))
    onInterrupt(() => {
      const rest = began + INTERRUPT_AFTER_MS - monotonicMs()
      interrupted = setTimeout(end, Math.max(0, rest), 'interrupted')
    })
  }

  /**
   * Lets root's LOOKUP wait for an open until this turn of the event loop ends, if it is the first to ask for
   * the disk: other requests are answered meanwhile, and most disks are open before the daemon
   * would sleep. That is no longer than it polls for the next request, and it saves the
   * caller a second request.
   *
   * @param done gets undefined when the turn is over
   */
  thisTurn(opening: Opening, done: (end: PinResult | undefined) => void): void {
    const end = (result?: PinResult) => {
      if (!opening.waiters.delete(end)) return
      done(result)
    }
    opening.waiters.add(end)
    this.turn.push(end)
  }

  /** Answers those LOOKUPs: the daemon is about to sleep. */
  turnEnds(): void {
    if (this.turn.length === 0) return
    for (const end of this.turn.splice(0)) end()
  }
}
