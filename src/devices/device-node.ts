// SPDX-License-Identifier: MIT
/**
 * A device's own node in /dev: where owner, mode, times, ACL and xattrs of its
 * name in the tree come from, and where changes of them go.
 */
import { ACL_ACCESS, type Times } from '../fuse/wire.js'
import { E, EOPNOTSUPP, Exhausted } from '../util/errno.js'
import { type Native, STAT } from '../native.js'
import type { Device } from './sysfs.js'
import type { AttrChange } from '../fuse/transport.js'

export interface NodeStat extends Times {
  /** st_mode with the type bits. */
  readonly mode: number
  readonly uid: number
  readonly gid: number
}

const S_IFMT = 0o170000
const S_IFBLK = 0o060000

/** "Leave it alone" for chown(2). */
const KEEP_ID = 0xffffffff

const EMPTY = new Uint8Array(0)

type Calls = Pick<
  Native,
  | 'openDirectory'
  | 'openNode'
  | 'close'
  | 'fstat'
  | 'statNode'
  | 'fchmod'
  | 'fchown'
  | 'futimens'
  | 'getxattr'
  | 'listxattr'
  | 'setxattr'
  | 'removexattr'
  | 'UTIME_NOW'
  | 'UTIME_OMIT'
>

export class DeviceNodes {
  private readonly fields = new Float64Array(STAT.FIELDS)

  /** @param directory a descriptor of /dev; see {@link Native.openDirectory} */
  constructor(
    private readonly native: Calls,
    readonly directory: number,
  ) {}

  /**
   * Calls `use` with a descriptor of the device's node, without opening the
   * device. Undefined where there is no such node, or it is another device's.
   *
   * @throws Exhausted
   */
  with<T>(device: Device, use: (fd: number, stat: NodeStat) => T): T | undefined {
    const fd = this.native.openNode(this.directory, device.devname)
    Exhausted.check(fd)
    if (fd < 0) return undefined
    try {
      const stat = this.stat(fd)
      return this.isOf(device) ? use(fd, stat) : undefined
    } finally {
      this.native.close(fd)
    }
  }

  /** The attributes alone, as {@link with} would find them. */
  statOf(device: Device): NodeStat | undefined {
    const rc = this.native.statNode(this.directory, device.devname, this.fields)
    return rc === 0 && this.isOf(device) ? this.read() : undefined
  }

  /** Whether what was last looked at is that device's node. */
  private isOf({ major, minor }: Device): boolean {
    const fields = this.fields
    return ((fields[STAT.MODE] as number) & S_IFMT) === S_IFBLK && fields[STAT.RDEV_MAJOR] === major && fields[STAT.RDEV_MINOR] === minor
  }

  stat(fd: number): NodeStat {
    const rc = this.native.fstat(fd, this.fields)
    if (rc < 0) throw new Error(`fstat of an open descriptor failed with errno ${-rc}`)
    return this.read()
  }

  /** What has 32 bits is marked as such: any other number is an object of its own. */
  private read(): NodeStat {
    const fields = this.fields
    return {
      mode: (fields[STAT.MODE] as number) >>> 0,
      uid: (fields[STAT.UID] as number) >>> 0,
      gid: (fields[STAT.GID] as number) >>> 0,
      atime: fields[STAT.ATIME] as number,
      atimeNs: (fields[STAT.ATIME_NS] as number) | 0,
      mtime: fields[STAT.MTIME] as number,
      mtimeNs: (fields[STAT.MTIME_NS] as number) | 0,
      ctime: fields[STAT.CTIME] as number,
      ctimeNs: (fields[STAT.CTIME_NS] as number) | 0,
    }
  }

  /** Changes the node under an open descriptor of it; an errno, or 0. */
  change(fd: number, change: AttrChange): number {
    const native = this.native
    if (change.size) return E.EINVAL
    let rc = 0
    if (change.uid !== undefined || change.gid !== undefined) {
      rc = native.fchown(fd, change.uid ?? KEEP_ID, change.gid ?? KEEP_ID)
    }
    if (rc === 0 && change.mode !== undefined) rc = native.fchmod(fd, change.mode & 0o7777)
    if (rc === 0 && (change.atime !== undefined || change.mtime !== undefined)) {
      const [atime, atimeNs] = this.timespec(change.atime)
      const [mtime, mtimeNs] = this.timespec(change.mtime)
      rc = native.futimens(fd, atime, atimeNs, mtime, mtimeNs)
    }
    return -rc
  }

  private timespec(time: AttrChange['atime']): readonly [number, number] {
    if (time === undefined) return [0, this.native.UTIME_OMIT]
    return time === 'now' ? [0, this.native.UTIME_NOW] : time
  }

  /** system.posix_acl_access, undefined where the node has none. */
  acl(fd: number): Uint8Array | undefined {
    const value = this.xattr(fd, ACL_ACCESS)
    return typeof value === 'number' ? undefined : value
  }

  /** The value, or an errno. */
  xattr(fd: number, name: string): Uint8Array | number {
    return this.sized(
      (into) => this.native.getxattr(fd, name, into),
      // A devtmpfs without ACLs: the node has none. To the kernel any other
      // error would mean that nobody but the owner may have the node.
      (errno) => (name === ACL_ACCESS && errno === EOPNOTSUPP ? E.ENODATA : errno),
    )
  }

  xattrs(fd: number): Uint8Array | number {
    return this.sized((into) => this.native.listxattr(fd, into))
  }

  setXattr(fd: number, name: string, value: Uint8Array, flags: number): number {
    return -this.native.setxattr(fd, name, value, flags)
  }

  removeXattr(fd: number, name: string): number {
    return -this.native.removexattr(fd, name)
  }

  private sized(call: (into: Uint8Array) => number, translate = (errno: number) => errno): Uint8Array | number {
    for (;;) {
      const size = call(EMPTY)
      if (size <= 0) return size < 0 ? translate(-size) : EMPTY
      const value = new Uint8Array(size)
      const n = call(value)
      if (n === -E.ERANGE) continue // it grew meanwhile
      return n < 0 ? translate(-n) : value.subarray(0, n)
    }
  }
}
