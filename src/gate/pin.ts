// SPDX-License-Identifier: MIT
/**
 * Pins: open descriptors of exactly the device a name stands for. While one is
 * open, the kernel cannot give that device's number to another disk; this is
 * what makes an open through the tree exact, and all else is bookkeeping.
 */
import { constants } from 'node:fs'

import { inodeId } from '../devices/names.js'
import { E } from '../util/errno.js'
import { type Native, STAT } from '../native.js'
import { type Device, parseDevice, sameDevice } from '../devices/sysfs.js'
import type { PinStore } from '../handover/pin-store.js'

export interface Pin {
  /** O_RDONLY: conflicts with nobody's O_EXCL, mount or mkfs. */
  readonly fd: number
  /** What it was verified to be. */
  readonly device: Device
  /** Where it is kept for a daemon that takes over, see {@link PinStore}. */
  readonly place?: number
}

export type PinResult =
  | { readonly pin: Pin }
  /** The device could not be opened: its own errno. */
  | { readonly errno: number }
  /** What was opened is another device, or a loop device without a backing file. */
  | { readonly mismatch: string }

/** For {@link Native.openDevice}. */
const NODE_IN_DEV = -1

type Calls = Pick<Native, 'openDevice' | 'makeNodes' | 'closeDevice' | 'diskseq' | 'fstat'>

export class PinOpener {
  /** Descriptors of devices that this daemon has open now. */
  count = 0
  /** Nobody who asks who uses a device's own node is to be told of pins; where that cannot be had (a container), he is. */
  private readonly nodes: number

  /** @param directory a descriptor of /dev */
  constructor(
    private readonly native: Calls,
    protected readonly directory: number,
    private readonly pinStore?: PinStore,
  ) {
    this.nodes = native.makeNodes()
  }

  /** Opens and verifies, on another thread; `done` may come very late. */
  open(device: Device, done: (result: PinResult) => void): void {
    this.openVerified(device, constants.O_RDONLY, this.nodes, (result) => {
      if (!('pin' in result) || this.pinStore === undefined) return done(result)
      const { fd } = result.pin
      const id = inodeId(device.diskseq, device.partition, device.minor)
      done({ pin: { fd, device, place: id === undefined ? -1 : this.pinStore.put(id, fd) } })
    })
  }

  /**
   * Opens the device's own node for writing and closes it again: which is what
   * udev watches for, to look at a disk anew when a writer is done with it.
   */
  touch(device: Device, done: () => void): void {
    this.openVerified(device, constants.O_WRONLY, NODE_IN_DEV, (result) => {
      // A read-only disk, or one that is gone: nobody wrote to it.
      if ('pin' in result) this.close(result.pin)
      done()
    })
  }

  protected openVerified(device: Device, flags: number, nodes: number, done: (result: PinResult) => void): void {
    this.native.openDevice(this.directory, device.devname, flags, device.loop, nodes, (error, fd, major, minor, diskseq, uevent) => {
      if (error !== 0) {
        return done(device.loop && error === E.ENXIO ? { mismatch: 'not bound' } : { errno: error })
      }
      this.count++
      const pin = { fd, device }
      const found = parseDevice(device.kname, uevent)
      const matches =
        found !== undefined && sameDevice(found, device) && diskseq === device.diskseq && major === device.major && minor === device.minor
      if (matches) return done({ pin })
      this.close(pin)
      done({ mismatch: `found ${found === undefined ? 'no device' : found.name} (diskseq ${diskseq})` })
    })
  }

  /** Whether a descriptor that an earlier daemon opened is that very device. */
  holds(pin: Pin): boolean {
    const fields = new Float64Array(STAT.FIELDS)
    return (
      this.native.fstat(pin.fd, fields) === 0 &&
      fields[STAT.RDEV_MAJOR] === pin.device.major &&
      fields[STAT.RDEV_MINOR] === pin.device.minor &&
      this.current(pin)
    )
  }

  /** A pin came from an earlier daemon. */
  tookOver(): void {
    this.count++
  }

  /** Whether the pinned device still has the diskseq it was verified with. */
  current(pin: Pin): boolean {
    return this.native.diskseq(pin.fd) === pin.device.diskseq
  }

  close(pin: Pin): void {
    if (pin.place !== undefined) this.pinStore?.drop(pin.place)
    this.native.closeDevice(pin.fd, () => {
      this.count--
    })
  }
}
