// SPDX-License-Identifier: MIT
/**
 * The library: disks by what they are, for programs. What is opened is verified on the open descriptor: it is the disk
 * that was asked for, and the kernel gives its number to no other one while it is open. Only leases need a daemon.
 *
 * ```ts
 * import { open } from 'diskseqfs'
 *
 * await using disk = await open('/dev/mapper/vm-root', { write: true })
 * console.log(disk.path) // /dev/disk/by-diskseq/13: this very disk for ever, or nothing
 * ```
 */
import { devices } from './disks/open.js'
import { type DiskInfo, infoOf } from './disks/info.js'

export { Lease, lease, type LeaseOptions } from './broker/lease.js'
export type { Rule as LeaseRule } from './broker/lease-reply.js'
export { attachFile as attach, type AttachOptions } from './disks/attach.js'
export type { DiskInfo } from './disks/info.js'
export { Disk, DiskError, open, type OpenOptions, resolve } from './disks/open.js'
export { type DiskEvent, watch, type WatchOptions } from './disks/watch.js'

/**
 * All disks and partitions that the kernel has now, in order of their numbers. Nothing is opened.
 *
 * @throws DiskError if sysfs cannot be read
 */
export async function list(): Promise<DiskInfo[]> {
  const found = (await devices()).map(infoOf)
  return found.toSorted((a, b) => (a.diskseq === b.diskseq ? a.partition - b.partition : a.diskseq < b.diskseq ? -1 : 1))
}
