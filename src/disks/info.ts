// SPDX-License-Identifier: MIT
/** What programs are told of a disk or partition. */
import { join } from 'node:path'

import type { Device } from '../devices/sysfs.js'
import { DEFAULT_MOUNTPOINT } from '../util/mountpoint.js'

/** A disk or partition. `name`, `path` and `diskseq` are its own for ever; the others, only as long as the device is open. */
export interface DiskInfo {
  /** Its name in the tree, `13` or `13p1`. */
  readonly name: string
  /** Its path in the tree, which leads to this very disk, or nowhere. */
  readonly path: string
  /** The kernel's sequence number of the disk. */
  readonly diskseq: bigint
  /** The kernel's number of the partition; 0 for a whole disk. */
  readonly partition: number
  /** `MAJOR:MINOR` */
  readonly majmin: string
  /** The kernel's name, `sda1`. */
  readonly kname: string
}

/** @internal */
export function infoOf({ name, diskseq, partition, major, minor, kname }: Device): DiskInfo {
  return { name, path: join(DEFAULT_MOUNTPOINT, name), diskseq, partition, majmin: `${major}:${minor}`, kname: kname.replaceAll('!', '/') }
}
