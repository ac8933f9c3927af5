// SPDX-License-Identifier: MIT
/**
 * Pins: open descriptors of exactly the device that a name stands for. While a pin is
 * open, the kernel cannot give the device's number to another disk. That
 * makes an open through the tree exact; everything else is bookkeeping.
 */
import { constants } from 'node:fs'

import { inodeId } from '../devices/names.js'
import { E } from '../util/errno.js'
import { type Native, STAT } from '../native.js'
import { type Device, parseDevice, sameDevice } from '../devices/sysfs.js'
import type { PinStore } from '../handover/pin-store.js'

export interface Pin {
  /** Opened with O_RDONLY, so that it conflicts with no O_EXCL, mount or mkfs. */
  readonly fd: number
  /** What it was verified to be. */
  readonly device: Device
  /** Its place in the {@link PinStore}. */
  readonly place?: number
}

export type PinResult =
  | { readonly pin: Pin }
  /** The device's own errno: it could not be opened. */
  | { readonly errno: number }
  /** What was opened is another device, or a loop device without a backing file. */
  | { readonly mismatch: string }

/** For {@link Native.openDevice}. */
const NODE_IN_DEV = -1

type Calls = Pick<Native, 'openDevice' | 'makeNodes' | 'closeDevice' | 'diskseq' | 'fstat'>

export class PinOpener {
  /** Descriptors of devices that this daemon has open now. */
  count = 0
  /** Pins are opened by nodes of our own, so that `fuser /dev/sdb` does not list them; where that is impossible (in a container), by those in /dev. */
  readonly nodes: number

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
   * Opens the device's node in /dev for writing and closes it. udev watches for that, and
   * looks at the disk again.
   */
  touch(device: Device, done: () => void): void {
    this.openVerified(device, constants.O_WRONLY, NODE_IN_DEV, (result) => {
      // On a read-only disk, or one that is gone, nobody wrote anything.
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

  /** Whether a descriptor from an earlier daemon is open on that device. */
  holds(pin: Pin): boolean {
    const fields = new Float64Array(STAT.FIELDS)
    return (
      this.native.fstat(pin.fd, fields) === 0 &&
      fields[STAT.RDEV_MAJOR] === pin.device.major &&
      fields[STAT.RDEV_MINOR] === pin.device.minor &&
      this.current(pin)
    )
  }

  /** Counts a pin that came from an earlier daemon. */
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
