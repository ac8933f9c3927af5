/**
 * Disk sequence numbers, and the names and inode numbers made of them.
 *
 * | name        | is                                             |
 * | ----------- | ---------------------------------------------- |
 * | `N`         | the disk with diskseq N                        |
 * | `NpM`       | its partition M                                |
 * | `N-partM`   | symlink to `NpM`, the name systemd's rules use |
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

export function nodeName(diskseq: DiskSeq, partition: number): string {
  return partition === 0 ? `${diskseq}` : `${diskseq}p${partition}`
}

export function linkName(diskseq: DiskSeq, partition: number): string {
  return `${diskseq}-part${partition}`
}

// diskseq: 52 bits, waiting: 1, partition: 10, symlink: 1
const SYMLINK_BIT = 1n
const PARTITION_SHIFT = 1n
const PARTITION_MAX = 0x3ff
const WAITING_BIT = 1n << 11n
const DISKSEQ_SHIFT = 12n

/**
 * The node id is a function of diskseq and partition alone: the kernel never
 * updates the device number of an inode it has (fuse_iget), so an id must
 * never come back meaning another device. It also needs no table that would
 * have to survive the daemon.
 *
 * Undefined where the numbers do not fit into 64 bits: 2^52 disks is one every
 * microsecond for 140 years.
 */
export function nodeId(diskseq: DiskSeq, partition: number, symlink: boolean): NodeId | undefined {
  if (partition > PARTITION_MAX || diskseq >> (64n - DISKSEQ_SHIFT) !== 0n) return undefined
  return (
    (diskseq << DISKSEQ_SHIFT) |
    (BigInt(partition) << PARTITION_SHIFT) |
    (symlink ? SYMLINK_BIT : 0n)
  )
}

/** What {@link nodeId} and {@link waitingId} made an id of; undefined for an id that neither makes. */
export function parseNodeId(id: NodeId): (ParsedName & { readonly waits: boolean }) | undefined {
  const diskseq = id >> DISKSEQ_SHIFT
  const waits = (id & WAITING_BIT) !== 0n
  const symlink = waits || (id & SYMLINK_BIT) !== 0n
  const partition = Number((id >> PARTITION_SHIFT) & BigInt(PARTITION_MAX))
  if (diskseq === 0n || (waits && (id & SYMLINK_BIT) !== 0n) || (symlink && !waits && partition === 0)) return undefined
  return { diskseq: diskseq as DiskSeq, partition, symlink, waits }
}

/** Of the symlink that stands for a node whose disk is slow to open; see {@link Tree.lookup}. */
export function waitingId(id: NodeId): NodeId {
  return id | WAITING_BIT
}
