// SPDX-License-Identifier: MIT
/**
 * Disk sequence numbers, and the names and inode numbers made of them.
 *
 * | name          | is                                                     |
 * | ------------- | ------------------------------------------------------ |
 * | `N`           | the disk with diskseq N                                |
 * | `NpM`         | its partition M                                        |
 * | `N-partM`     | symlink to `NpM`, the name systemd's rules use         |
 * | `.dm/N/dm-K`  | the disk N once more, where the kernel calls it `dm-K` |
 *
 * A path that ends in `dm-K` is what programs take for a device-mapper device's own
 * node: they look up what it is called, and show and remember that name
 * (libmount's canonicalize_path(), and others after it).
 *
 * Everything else is no name. Numbers are decimal, without sign or leading
 * zero, so that there is one name for one thing.
 */

/** A disk sequence number: 1 to 2^64-1, never used twice while the machine is up. */
export type DiskSeq = bigint & { readonly __diskseq: unique symbol }

/** What a name in the tree names. */
export interface ParsedName {
  readonly diskseq: DiskSeq
  /** The kernel's PARTN; 0 is the whole disk. */
  readonly partition: number
  /** `N-partM`. */
  readonly symlink: boolean
}

/** Inode number in the FUSE protocol. */
export type NodeId = bigint

const DISKSEQ_MAX = 0xffff_ffff_ffff_ffffn

/** The kernel numbers partitions 1 to 255 (DISK_MAX_PARTS, block/blk.h); more digits are no name. */
const PARTITION_DIGITS = 5

const NAME = new RegExp(`^([1-9][0-9]{0,19})(?:(p|-part)([1-9][0-9]{0,${PARTITION_DIGITS - 1}}))?$`)

/** Longest name there can be; anything longer is refused unread. */
export const NAME_LENGTH_MAX = 20 + '-part'.length + PARTITION_DIGITS

export function parseName(name: string): ParsedName | undefined {
  if (name.length > NAME_LENGTH_MAX) return undefined
  const match = NAME.exec(name)
  if (match === null) return undefined
  const diskseq = parseDiskSeq(match[1] as string)
  if (diskseq === undefined) return undefined
  return { diskseq, partition: Number(match[3] ?? 0), symlink: match[2] === '-part' }
}

/** A diskseq in decimal, as sysfs, uevents and names have it. */
export function parseDiskSeq(text: string): DiskSeq | undefined {
  if (!/^[1-9][0-9]{0,19}$/.test(text)) return undefined
  const value = BigInt(text)
  return value <= DISKSEQ_MAX ? (value as DiskSeq) : undefined
}

/**
 * A device-mapper name as /dev/mapper has it: libdevmapper writes as \xNN what a path should not hold, unless that has
 * been done before. The kernel has it so as well, or, if the maker of the device saw to that, as it was.
 * Undefined for what no device can be called.
 */
export function mangledDmName(name: string): string | undefined {
  if (name === '' || name === '.' || name === '..' || name === 'control' || /[/\0]/.test(name)) return undefined
  return name.replace(/\\x[0-9a-f]{2}|[^\w#+\-.:=@]/gu, (found) =>
    found.length === 4 ? found : [...Buffer.from(found)].map((byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join(''),
  )
}

export const sameDmName = (a: string, b: string): boolean => a === b || (mangledDmName(a) ?? a) === (mangledDmName(b) ?? b)

export function nodeName(diskseq: DiskSeq, partition: number): string {
  return partition === 0 ? `${diskseq}` : `${diskseq}p${partition}`
}

export function linkName(diskseq: DiskSeq, partition: number): string {
  return `${diskseq}-part${partition}`
}

// Ids of two forms, told apart by the highest bit.
// Of a disk's inode, of symlinks and directories: 0, diskseq: 51 bits, waiting: 1,
// directory: 1, by the kernel's name: 1, partition: 8, symlink: 1
const SYMLINK_BIT = 1n
const PARTITION_SHIFT = 1n
const KERNEL_BIT = 1n << 9n
const DIRECTORY_BIT = 1n << 10n
const WAITING_BIT = 1n << 11n
const DISKSEQ_SHIFT = 12n
const DISKSEQ_BITS = 51n
// Of a partition's inode: 1, diskseq: 35 bits, partition: 8, minor: 20
const PARTITION_INODE = 1n << 63n
const MINOR_BITS = 20n
const MINOR_MASK = (1n << MINOR_BITS) - 1n
const NUMBER_BITS = 8n
const PARTITION_DISKSEQ_BITS = 35n
/** DISK_MAX_PARTS, block/blk.h */
const PARTITION_MAX = 0xff

/**
 * Of the inode of a device: a function of what it is, device number included. The
 * kernel never updates the number of an inode that it has (fuse_iget), so an
 * id must never come back meaning another device; and who has an inode from
 * before must be told from who has that of the same name now. A disk has one
 * number for all its life; a partition that is removed and added again may get
 * another one. Its major number is the disk's, or BLOCK_EXT_MAJOR, and which of
 * them follows from its number (bdev_add_partition, 6.18). No table of ids would
 * have to survive the daemon.
 *
 * Undefined where the numbers do not fit: 2^51 disks, or 2^35 of which one has
 * partitions, which is a thousand disks a second for a year.
 */
export function inodeId(diskseq: DiskSeq, partition: number, minor: number): NodeId | undefined {
  if (partition === 0) return diskseq >> DISKSEQ_BITS === 0n ? diskseq << DISKSEQ_SHIFT : undefined
  if (partition > PARTITION_MAX || diskseq >> PARTITION_DISKSEQ_BITS !== 0n) return undefined
  return PARTITION_INODE | (((diskseq << NUMBER_BITS) | BigInt(partition)) << MINOR_BITS) | (BigInt(minor) & MINOR_MASK)
}

/** What a symlink in the tree is for; all of them but the last lead to the name of a device. */
export type LinkKind =
  /** `N-partM`, which is always there. */
  | 'part'
  /** Stands for a device until it is known, or open; callers that follow it wait there. */
  | 'waiting'
  /** The same by the kernel's name, in `.dm/N`. */
  | 'kernel'
  /** The same for callers that follow no symlinks: looks like a device, but nobody can open it. */
  | 'unknown'
  /** Leads to the device's own node in /dev, once it is open. */
  | 'own'

const LINK_BITS: Readonly<Record<LinkKind, bigint>> = {
  part: SYMLINK_BIT,
  waiting: WAITING_BIT,
  kernel: WAITING_BIT | KERNEL_BIT,
  unknown: WAITING_BIT | SYMLINK_BIT,
  own: KERNEL_BIT | SYMLINK_BIT,
}
const LINK_KINDS = new Map(Object.entries(LINK_BITS).map(([kind, bits]) => [bits, kind as LinkKind]))
const KIND_MASK = SYMLINK_BIT | KERNEL_BIT | DIRECTORY_BIT | WAITING_BIT

/** Of {@link linkId}'s answers no table is needed either: see {@link parseId}. */
export function linkId(diskseq: DiskSeq, partition: number, kind: LinkKind): NodeId | undefined {
  if (partition > PARTITION_MAX || diskseq >> DISKSEQ_BITS !== 0n) return undefined
  return entryCookie(diskseq, partition) | LINK_BITS[kind]
}

/** The directory `.dm`. */
export const DM_NAME = '.dm'
export const DM_ID: NodeId = DIRECTORY_BIT

/** Of the directory `.dm/N`; undefined where the number does not fit. */
export function directoryId(diskseq: DiskSeq): NodeId | undefined {
  return diskseq >> DISKSEQ_BITS === 0n ? (diskseq << DISKSEQ_SHIFT) | DIRECTORY_BIT : undefined
}

/** Where an entry stands in the directory: ascending by disk, then partition; a partition's symlink comes after it. */
export function entryCookie(diskseq: DiskSeq, partition: number): bigint {
  return (diskseq << DISKSEQ_SHIFT) | (BigInt(partition) << PARTITION_SHIFT)
}

/** What an id was made of. */
export type ParsedId =
  | { readonly diskseq: DiskSeq; readonly partition: number; readonly kind: 'inode'; readonly minor: number | undefined }
  | { readonly diskseq: DiskSeq; readonly partition: number; readonly kind: LinkKind | 'directory' }

/** Undefined for an id that nothing here makes. */
export function parseId(id: NodeId): ParsedId | undefined {
  if ((id & PARTITION_INODE) !== 0n) {
    const minor = Number(id & MINOR_MASK)
    const partition = Number((id >> MINOR_BITS) & BigInt(PARTITION_MAX))
    const diskseq = ((id ^ PARTITION_INODE) >> (MINOR_BITS + NUMBER_BITS)) as DiskSeq
    return diskseq === 0n || partition === 0 ? undefined : { diskseq, partition, kind: 'inode', minor }
  }
  const diskseq = (id >> DISKSEQ_SHIFT) as DiskSeq
  const partition = Number((id >> PARTITION_SHIFT) & BigInt(PARTITION_MAX))
  const bits = id & KIND_MASK
  if (diskseq === 0n) return undefined
  if (bits === 0n) return partition === 0 ? { diskseq, partition, kind: 'inode', minor: undefined } : undefined
  if (bits === DIRECTORY_BIT) return partition === 0 ? { diskseq, partition, kind: 'directory' } : undefined
  const kind = LINK_KINDS.get(bits)
  return kind === undefined || (kind === 'part' && partition === 0) ? undefined : { diskseq, partition, kind }
}
