// SPDX-License-Identifier: MIT
/**
 * The kernel's FUSE protocol: numbers and structs of uapi/linux/fuse.h, and
 * nothing that decides. All integers are in the machine's byte order, which on
 * every architecture this builds for is little-endian (checked on load).
 */
import { endianness } from 'node:os'

if (endianness() !== 'LE') {
  throw new Error('diskseqfs speaks the FUSE protocol in little-endian byte order only')
}

/** FUSE_KERNEL_VERSION; the protocol has had no other since 2.6.14. */
export const FUSE_MAJOR = 7
/** The protocol revision whose structs are written out below (but for NOTIFY_PRUNE, which newer kernels have). */
export const FUSE_MINOR = 38
/** Oldest revision with all of them: 7.23 gave fuse_init_out its size. */
export const FUSE_MINOR_MIN = 23

export const FUSE_ROOT_ID = 1n

/** enum fuse_opcode */
export const Opcode = {
  LOOKUP: 1,
  FORGET: 2,
  GETATTR: 3,
  SETATTR: 4,
  READLINK: 5,
  SYMLINK: 6,
  MKNOD: 8,
  MKDIR: 9,
  UNLINK: 10,
  RMDIR: 11,
  RENAME: 12,
  LINK: 13,
  STATFS: 17,
  SETXATTR: 21,
  GETXATTR: 22,
  LISTXATTR: 23,
  REMOVEXATTR: 24,
  INIT: 26,
  OPENDIR: 27,
  READDIR: 28,
  RELEASEDIR: 29,
  FSYNCDIR: 30,
  CREATE: 35,
  INTERRUPT: 36,
  DESTROY: 38,
  BATCH_FORGET: 42,
  RENAME2: 45,
  TMPFILE: 51,
} as const

/** Requests the kernel expects no answer to. */
export const UNANSWERED: ReadonlySet<number> = new Set([Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT])

/** Flags of fuse_init_in and fuse_init_out. */
export const InitFlag = {
  /** Lookups in one directory may run side by side; without it one slow disk holds up all. */
  PARALLEL_DIROPS: 1 << 18,
  /** The kernel honours POSIX ACLs that it reads as xattrs. */
  POSIX_ACL: 1 << 20,
} as const

/** Of enum fuse_notify_code; stands where an answer has its errno. */
const NOTIFY_INVAL_INODE = 2
/** Since 7.45 (Linux 6.18). */
const NOTIFY_PRUNE = 9

/** fuse_setattr_in.valid */
export const SetattrValid = {
  MODE: 1 << 0,
  UID: 1 << 1,
  GID: 1 << 2,
  SIZE: 1 << 3,
  ATIME: 1 << 4,
  MTIME: 1 << 5,
  ATIME_NOW: 1 << 7,
  MTIME_NOW: 1 << 8,
} as const

/** Smallest buffer the kernel agrees to fill (FUSE_MIN_READ_BUFFER). */
export const MIN_READ_BUFFER = 8192

/** The xattr in which the kernel reads an ACL. */
export const ACL_ACCESS = 'system.posix_acl_access'

export const IN_HEADER_SIZE = 40
export const OUT_HEADER_SIZE = 16
export const ATTR_SIZE = 88
export const ENTRY_OUT_SIZE = 40 + ATTR_SIZE
export const ATTR_OUT_SIZE = 16 + ATTR_SIZE
export const OPEN_OUT_SIZE = 16
export const INIT_OUT_SIZE = 64
export const STATFS_OUT_SIZE = 80
export const XATTR_OUT_SIZE = 8
export const DIRENT_SIZE = 24

/** struct fuse_in_header */
export interface InHeader {
  readonly length: number
  readonly opcode: number
  readonly unique: bigint
  readonly nodeid: bigint
  readonly uid: number
  readonly gid: number
  /** The thread's id in the daemon's pid namespace; 0 where it has none there. */
  readonly tid: number
}

/** Where a request says whose it is. */
export const UID_AT = 24

/** A request as it was read. Methods that take a field check the bounds. */
export class Message {
  readonly view: DataView
  constructor(
    readonly bytes: Uint8Array,
    readonly length: number,
  ) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, length)
  }

  header(): InHeader {
    const view = this.view
    return {
      length: view.getUint32(0, true),
      opcode: view.getUint32(4, true),
      unique: view.getBigUint64(8, true),
      nodeid: view.getBigUint64(16, true),
      uid: this.uid,
      gid: view.getUint32(28, true),
      tid: view.getUint32(32, true),
    }
  }

  /** Of the header alone, as each request is asked for it. */
  get uid(): number {
    return this.view.getUint32(UID_AT, true)
  }

  /** Bytes behind the header. */
  get bodySize(): number {
    return this.length - IN_HEADER_SIZE
  }

  u32(offset: number): number {
    return this.view.getUint32(IN_HEADER_SIZE + offset, true)
  }

  u64(offset: number): bigint {
    return this.view.getBigUint64(IN_HEADER_SIZE + offset, true)
  }

  i64(offset: number): number {
    return Number(this.view.getBigInt64(IN_HEADER_SIZE + offset, true))
  }

  /**
   * The NUL-terminated string at `offset`, one character for each byte (so
   * that no two byte strings become one). Undefined where no NUL ends it.
   */
  string(offset: number): string | undefined {
    let text = ''
    for (let i = IN_HEADER_SIZE + offset; i < this.length; i++) {
      const byte = this.bytes[i] as number
      if (byte === 0) return text
      text += String.fromCharCode(byte)
    }
    return undefined
  }

  data(offset: number, size: number): Uint8Array {
    const start = IN_HEADER_SIZE + offset
    return this.bytes.slice(start, start + size)
  }
}

/** Times of an inode: seconds since the epoch, and nanoseconds. */
export interface Times {
  readonly atime: number
  readonly atimeNs: number
  readonly mtime: number
  readonly mtimeNs: number
  readonly ctime: number
  readonly ctimeNs: number
}

/** struct fuse_attr, as far as this tree has use for it. */
export interface Attr extends Times {
  readonly ino: bigint
  readonly mode: number
  readonly nlink: number
  readonly uid: number
  readonly gid: number
  readonly rdev: number
  readonly size: number
}

/** struct fuse_entry_out. */
export interface Entry {
  readonly nodeid: bigint
  readonly generation: bigint
  readonly attr: Attr
  readonly attrValid: Validity
  /** How long the name may be used without asking, s; of a device 0. */
  readonly nameValid?: number
}

/** How long the kernel may use attributes without asking, in seconds and nanoseconds. */
export interface Validity {
  readonly seconds: number
  readonly nanoseconds: number
}

/** new_encode_dev(), include/linux/kdev_t.h */
export function encodeDev(major: number, minor: number): number {
  return ((minor & 0xff) | (major << 8) | ((minor & ~0xff) << 12)) >>> 0
}

/** Room for one answer, filled from the front. */
export class ReplyBuffer {
  readonly bytes: Uint8Array
  private readonly view: DataView

  constructor(size: number) {
    this.bytes = new Uint8Array(size)
    this.view = new DataView(this.bytes.buffer)
  }

  /** struct fuse_out_header; the payload begins behind it. */
  header(unique: bigint, error: number, payload: number): number {
    const length = OUT_HEADER_SIZE + payload
    this.view.setUint32(0, length, true)
    this.view.setInt32(4, -error, true)
    this.view.setBigUint64(8, unique, true)
    return length
  }

  /** struct fuse_notify_inval_inode_out, whole: of the attributes only, none of the content. */
  invalidateInode(nodeid: bigint): number {
    const at = this.header(0n, -NOTIFY_INVAL_INODE, 24) - 24
    this.view.setBigUint64(at, nodeid, true)
    this.view.setBigInt64(at + 8, -1n, true)
    this.view.setBigInt64(at + 16, 0n, true)
    return at + 24
  }

  /** struct fuse_notify_prune_out with one nodeid: the inode is forgotten, unless it is in use. */
  pruneInode(nodeid: bigint): number {
    const at = this.header(0n, -NOTIFY_PRUNE, 24) - 24
    this.view.setUint32(at, 1, true)
    this.view.setUint32(at + 4, 0, true)
    this.view.setBigUint64(at + 8, 0n, true)
    this.view.setBigUint64(at + 16, nodeid, true)
    return at + 24
  }

  entry(entry: Entry): number {
    const view = this.view
    const at = OUT_HEADER_SIZE
    view.setBigUint64(at, entry.nodeid, true)
    view.setBigUint64(at + 8, entry.generation, true)
    this.i64(at + 16, entry.nameValid ?? 0)
    view.setUint32(at + 24, entry.attrValid.seconds, true)
    view.setUint32(at + 28, 0, true)
    view.setUint32(at + 32, 0, true)
    view.setUint32(at + 36, entry.attrValid.nanoseconds, true)
    this.attrAt(at + 40, entry.attr)
    return ENTRY_OUT_SIZE
  }

  attr(attr: Attr, valid: Validity): number {
    const view = this.view
    const at = OUT_HEADER_SIZE
    view.setUint32(at, valid.seconds, true)
    view.setUint32(at + 4, 0, true)
    view.setUint32(at + 8, valid.nanoseconds, true)
    view.setUint32(at + 12, 0, true)
    this.attrAt(at + 16, attr)
    return ATTR_OUT_SIZE
  }

  /** A whole number, without making a BigInt of it. */
  private i64(at: number, value: number): void {
    this.view.setUint32(at, value >>> 0, true)
    this.view.setInt32(at + 4, Math.floor(value / 2 ** 32), true)
  }

  private attrAt(at: number, attr: Attr): void {
    const view = this.view
    view.setBigUint64(at, attr.ino, true)
    this.i64(at + 8, attr.size)
    this.i64(at + 16, 0)
    this.i64(at + 24, attr.atime)
    this.i64(at + 32, attr.mtime)
    this.i64(at + 40, attr.ctime)
    view.setUint32(at + 48, attr.atimeNs, true)
    view.setUint32(at + 52, attr.mtimeNs, true)
    view.setUint32(at + 56, attr.ctimeNs, true)
    view.setUint32(at + 60, attr.mode, true)
    view.setUint32(at + 64, attr.nlink, true)
    view.setUint32(at + 68, attr.uid, true)
    view.setUint32(at + 72, attr.gid, true)
    view.setUint32(at + 76, attr.rdev, true)
    view.setUint32(at + 80, STAT_BLOCK_SIZE, true)
    view.setUint32(at + 84, 0, true)
  }

  init(flags: number, maxWrite: number): number {
    const view = this.view
    const at = OUT_HEADER_SIZE
    this.bytes.fill(0, at, at + INIT_OUT_SIZE)
    view.setUint32(at, FUSE_MAJOR, true)
    view.setUint32(at + 4, FUSE_MINOR, true)
    view.setUint32(at + 12, flags >>> 0, true)
    view.setUint32(at + 20, maxWrite, true)
    view.setUint32(at + 24, 1, true) // time_gran, ns
    return INIT_OUT_SIZE
  }

  open(handle: bigint): number {
    const at = OUT_HEADER_SIZE
    this.bytes.fill(0, at, at + OPEN_OUT_SIZE)
    this.view.setBigUint64(at, handle, true)
    return OPEN_OUT_SIZE
  }

  /** struct fuse_kstatfs: a filesystem of names, without blocks; nor inodes, of which none could be free. */
  statfs(nameLength: number): number {
    const view = this.view
    const at = OUT_HEADER_SIZE
    this.bytes.fill(0, at, at + STATFS_OUT_SIZE)
    view.setUint32(at + 40, STAT_BLOCK_SIZE, true)
    view.setUint32(at + 44, nameLength, true)
    view.setUint32(at + 48, STAT_BLOCK_SIZE, true)
    return STATFS_OUT_SIZE
  }

  xattrSize(size: number): number {
    const at = OUT_HEADER_SIZE
    this.view.setUint32(at, size, true)
    this.view.setUint32(at + 4, 0, true)
    return XATTR_OUT_SIZE
  }

  data(data: Uint8Array): number {
    this.bytes.set(data, OUT_HEADER_SIZE)
    return data.length
  }
}

/** What stat(2) reports as st_blksize; that of devtmpfs. */
const STAT_BLOCK_SIZE = 4096

/** Bits of st_mode that tell the type (S_IFMT), shifted to d_type. */
export function direntType(mode: number): number {
  return (mode & 0o170000) >> 12
}

export interface Dirent {
  readonly ino: bigint
  /** d_off: what the kernel names this entry by when it wants those behind it. Ascending. */
  readonly cookie: bigint
  /** S_IFMT bits. */
  readonly mode: number
  readonly name: string
}

/** Adds the names of encoded entries to `names`; the cookie of the last, undefined where there are none. */
export function decodeNames(bytes: Uint8Array, names: string[]): bigint | undefined {
  const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  let cookie: bigint | undefined
  for (let at = 0; at < buffer.length;) {
    const end = at + DIRENT_SIZE + buffer.readUInt32LE(at + 16)
    cookie = buffer.readBigUInt64LE(at + 8)
    names.push(buffer.toString('latin1', at + DIRENT_SIZE, end))
    at = (end + 7) & ~7
  }
  return cookie
}

/** Directory entries as FUSE_READDIR wants them; entry i begins at `offsets[i]`. */
export function encodeDirents(entries: readonly Dirent[]): {
  bytes: Buffer
  offsets: number[]
  cookies: bigint[]
} {
  let size = 0
  const offsets: number[] = []
  const cookies: bigint[] = []
  for (const entry of entries) {
    offsets.push(size)
    cookies.push(entry.cookie)
    size += (DIRENT_SIZE + entry.name.length + 7) & ~7
  }
  offsets.push(size)
  const bytes = Buffer.alloc(size)
  entries.forEach((entry, i) => {
    const at = offsets[i] as number
    bytes.writeBigUInt64LE(entry.ino, at)
    bytes.writeBigUInt64LE(entry.cookie, at + 8)
    bytes.writeUInt32LE(entry.name.length, at + 16)
    bytes.writeUInt32LE(direntType(entry.mode), at + 20)
    bytes.write(entry.name, at + DIRENT_SIZE, 'latin1')
  })
  return { bytes, offsets, cookies }
}
