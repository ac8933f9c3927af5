// SPDX-License-Identifier: MIT
/**
 * The tree: names, and answers about them. The gate decides which caller may have which
 * inode.
 */
import { type Attr, type Dirent, encodeDev, encodeDirents, FUSE_ROOT_ID, type Validity } from '../fuse/wire.js'
import type { Crowd } from '../gate/crowd.js'
import type { DeviceNodes } from '../devices/device-node.js'
import {
  directoryId,
  type DiskSeq,
  DM_ID,
  DM_NAME,
  entryCookie,
  inodeId,
  linkId,
  type LinkKind,
  linkName,
  type NodeId,
  nodeName,
  parseDiskSeq,
  parseId,
  parseName,
} from '../devices/names.js'
import { E, EOPNOTSUPP, Exhausted } from '../util/errno.js'
import type { Gate } from '../gate/gate.js'
import type { Name, Shown } from '../gate/requests.js'
import type { Intents } from '../gate/intent.js'
import { type Inode, InodeTable } from '../gate/inode.js'
import type { PinLifetime } from '../gate/pin-lifetime.js'
import type { Registry } from '../devices/registry.js'
import { type Device, type Sysfs } from '../devices/sysfs.js'
import type { AttrChange, Caller, Reply, TreeOperations } from '../fuse/transport.js'

const S_IFDIR = 0o040000
const S_ISVTX = 0o001000
const S_IFLNK = 0o120000
const S_IFBLK = 0o060000
const PERMISSIONS = 0o7777

/** The kernel must ask again. */
const STALE: Validity = { seconds: 0, nanoseconds: 0 }
/**
 * For two jiffies at the most: so the open(2) that a LOOKUP was part of
 * need not ask a second time. Only on answers that a pin stands behind.
 */
const ONE_JIFFY: Validity = { seconds: 0, nanoseconds: 1 }
/** Nothing about directories changes; without this each path walk would ask for them. */
const LONG: Validity = { seconds: 3600, nanoseconds: 0 }

/** NAME_MAX; longer names are never asked for. */
const STATFS_NAME_LENGTH = 255

const NOTHING = new Uint8Array(0)

/** Behind these two come the devices, by {@link entryCookie}. */
const dots = (ino: NodeId): Dirent[] => ['.', '..'].map((name, i) => ({ ino, cookie: BigInt(i + 1), mode: S_IFDIR, name }))

/** Bytes of the shortest entry, which bounds how many fit into an answer. */
const DIRENT_MIN = 32

/** A symlink; what it is can be told from its id, so that nothing has to be remembered of it. */
interface Link extends Name {
  readonly kind: LinkKind
}

/** A name that is asked for: by diskseq in the root, or by the kernel's name in `.dm/N`. */
interface Asked extends Name {
  readonly directory: NodeId
  readonly kname?: string
}

export interface TreeParts {
  readonly registry: Registry
  readonly sysfs: Sysfs
  readonly inodes: InodeTable
  readonly devnodes: DeviceNodes
  readonly gate: Gate
  readonly crowd: Crowd
  readonly lifetime: PinLifetime
  readonly intents: Intents
  /** Calls back when a device may be answered for in `.dm/N`: at once, but for the first time. */
  readonly whenReady: (diskseq: DiskSeq, ready: () => void) => void
  /** The kernel may know inodes that another daemon gave it. */
  readonly takesOver: boolean
}

/** One method for each operation, most of a few lines; long because FUSE has many, not because they do much. */
export class Tree implements TreeOperations {
  private readonly started = Math.floor(Date.now() / 1000)

  constructor(private readonly parts: TreeParts) {}

  private inode(id: bigint): Inode | undefined {
    const { inodes, takesOver } = this.parts
    return inodes.get(id) ?? (takesOver ? inodes.recall(id) : undefined)
  }

  private link(id: bigint): Link | undefined {
    const parsed = parseId(id)
    if (parsed === undefined || parsed.kind === 'inode' || parsed.kind === 'directory') return undefined
    const { diskseq, partition, kind } = parsed
    return { name: nodeName(diskseq, partition), diskseq, partition, kind }
  }

  private isDirectory(id: bigint): boolean {
    return id === FUSE_ROOT_ID || id === DM_ID || parseId(id)?.kind === 'directory'
  }

  lookup(caller: Caller, parent: bigint, name: string, reply: Reply): void {
    if (parent === FUSE_ROOT_ID) return this.lookupInRoot(caller, name, reply)
    if (parent === DM_ID) return this.lookupDirectory(caller, name, reply)
    const parsed = parseId(parent)
    if (parsed?.kind !== 'directory') return reply.error(E.ENOENT)
    this.lookupByKernelName(caller, parent, parsed.diskseq, name, reply)
  }

  private lookupInRoot(caller: Caller, name: string, reply: Reply): void {
    const directory = FUSE_ROOT_ID
    const known = this.parts.inodes.named(name)
    if (known !== undefined) return this.lookupDevice(caller, asked(known, directory), reply)
    if (name === DM_NAME) {
      this.parts.gate.lookupOther(caller, directory)
      return this.replyDirectory(DM_ID, reply)
    }
    const parsed = parseName(name)
    if (parsed === undefined) return this.lookupNothing(caller, directory, reply)
    const { diskseq, partition, symlink } = parsed
    const named = { name: nodeName(diskseq, partition), diskseq, partition }
    if (symlink) this.lookupLink(caller, named, reply)
    else this.lookupDevice(caller, asked(named, directory), reply)
  }

  private lookupNothing(caller: Caller, directory: NodeId, reply: Reply): void {
    this.parts.gate.lookupOther(caller, directory)
    reply.error(E.ENOENT)
  }

  /** `.dm/N` exists if the disk does. If that is unknown, the answer is a link to the same name, where callers wait. */
  private lookupDirectory(caller: Caller, name: string, reply: Reply): void {
    const { registry, gate } = this.parts
    const diskseq = parseDiskSeq(name)
    const id = diskseq === undefined ? undefined : directoryId(diskseq)
    gate.lookupOther(caller, DM_ID)
    if (diskseq === undefined || id === undefined) return reply.error(E.ENOENT)
    if (registry.find(name) !== undefined) return this.replyDirectory(id, reply)
    if (registry.lacks(name, diskseq)) return reply.error(E.ENOENT)
    this.replyLink({ name, diskseq, partition: 0, kind: 'waiting' }, reply)
  }

  private replyDirectory(nodeid: NodeId, reply: Reply): void {
    const attrValid = this.parts.crowd.isIn(nodeid) ? STALE : LONG
    reply.entry({ nodeid, generation: 0n, attr: this.directoryAttr(nodeid), attrValid, nameValid: LONG.seconds })
  }

  private lookupByKernelName(caller: Caller, directory: NodeId, diskseq: DiskSeq, kname: string, reply: Reply): void {
    try {
      const { registry, whenReady } = this.parts
      const device = registry.called(kname, diskseq)
      // The caller needs nothing in it.
      if (device === undefined && registry.find(nodeName(diskseq, 0)) === undefined) return reply.error(E.ENOENT)
      whenReady(diskseq, () => {
        if (device === undefined) return this.lookupNothing(caller, directory, reply)
        const { name, partition } = device
        this.lookupDevice(caller, { name, diskseq, partition, directory, kname }, reply)
      })
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      reply.error(E.EIO)
    }
  }

  private lookupDevice(caller: Caller, { name, diskseq, partition, directory, kname }: Asked, reply: Reply): void {
    const waiting: LinkKind = kname === undefined ? 'waiting' : 'kernel'
    this.parts.gate.lookup({
      caller,
      name,
      diskseq,
      partition,
      directory,
      byKernelName: kname !== undefined,
      onInterrupt: (listener) => reply.onInterrupt(listener),
      done: (verdict) => {
        if ('errno' in verdict) reply.error(verdict.errno)
        else if ('own' in verdict) this.replyLink({ name, diskseq, partition, kind: 'own' }, reply)
        else if ('later' in verdict) this.replyLink({ name, diskseq, partition, kind: verdict.follows ? waiting : 'unknown' }, reply)
        else return this.replyNode(verdict, reply)
        return true
      },
    })
  }

  private replyNode(shown: Shown, reply: Reply): boolean {
    const { inode, device, trusted } = shown
    // Counted first: the answer may be forgotten as soon as it is given.
    inode.nlookup++
    const taken = reply.entry({
      nodeid: inode.id,
      generation: BigInt(encodeDev(device.major, device.minor)),
      attr: blockAttr(shown),
      attrValid: trusted ? ONE_JIFFY : STALE,
    })
    if (!taken) this.forget(inode.id, 1n)
    return taken
  }

  /** `N-partM` exists if the partition does, as far as is known: callers that follow it wait for the rest. */
  private lookupLink(caller: Caller, name: Name, reply: Reply): void {
    const { registry, gate } = this.parts
    gate.lookupOther(caller, FUSE_ROOT_ID)
    if (registry.find(name.name) === undefined && registry.lacks(name.name, name.diskseq)) return reply.error(E.ENOENT)
    this.replyLink({ ...name, kind: 'part' }, reply)
  }

  private replyLink(link: Link, reply: Reply): void {
    const nodeid = linkId(link.diskseq, link.partition, link.kind)
    if (nodeid === undefined) return reply.error(E.ENOENT)
    reply.entry({ nodeid, generation: 0n, attr: this.linkAttr(nodeid, link), attrValid: STALE })
  }

  turnEnds(): void {
    this.parts.gate.turnEnds()
  }

  forget(nodeid: bigint, count: bigint): void {
    const inode = this.parts.inodes.get(nodeid)
    if (inode !== undefined) this.parts.lifetime.forget(inode, Number(count))
  }

  getattr(caller: Caller, nodeid: bigint, reply: Reply): void {
    if (this.isDirectory(nodeid)) {
      const { crowd } = this.parts
      let waits = true
      const leaves = () => waits && !(waits = false)
      reply.onInterrupt(() => leaves() && reply.error(E.EINTR))
      return crowd.admit(caller, nodeid, () => leaves() && reply.attr(this.directoryAttr(nodeid), crowd.isIn(nodeid) ? STALE : LONG))
    }
    const link = this.link(nodeid)
    if (link?.kind === 'part') return void reply.attr(this.linkAttr(nodeid, link), STALE)
    // A caller that does not follow it looks again when more is known.
    if (link !== undefined) return this.wait(caller, link, reply, () => reply.error(E.ESTALE))
    const inode = this.inode(nodeid)
    if (inode === undefined) return reply.error(E.ESTALE)
    this.parts.gate.getattr({
      caller,
      inode,
      onInterrupt: (listener) => reply.onInterrupt(listener),
      done: (verdict) => {
        if (!('errno' in verdict)) return reply.attr(blockAttr(verdict), STALE)
        // Like a file that was unlinked while open: the name is gone, but
        // whoever has a descriptor may look at it. Nobody can open it.
        if (verdict.errno === E.ENOENT && inode.last !== undefined) {
          return reply.attr({ ...blockAttr({ inode, ...inode.last }), nlink: 0 }, STALE)
        }
        reply.error(verdict.errno)
        return true
      },
    })
  }

  private wait(caller: Caller, link: Link, reply: Reply, over: () => void): void {
    this.parts.gate.wait({
      caller,
      ...link,
      byKernelName: link.kind === 'kernel',
      onInterrupt: (listener) => reply.onInterrupt(listener),
      done: (errno) => (errno === 0 ? over() : reply.error(errno)),
    })
  }

  setattr(caller: Caller, nodeid: bigint, change: AttrChange, reply: Reply): void {
    const inode = this.inode(nodeid)
    if (inode === undefined) return reply.error(E.EPERM)
    const { devnodes } = this.parts
    this.pinned(caller, inode, reply, (device, fd) => {
      const errno = devnodes.change(fd, change)
      if (errno !== 0) return reply.error(errno)
      reply.attr(blockAttr({ inode, device, stat: devnodes.stat(fd) }), STALE)
    })
  }

  /** Calls `use` with a descriptor that is this inode's device for certain. */
  private pinned(caller: Caller, inode: Inode, reply: Reply, use: (device: Device, fd: number) => void): void {
    this.parts.gate.change({
      caller,
      inode,
      onInterrupt: (listener) => reply.onInterrupt(listener),
      done: (verdict) => {
        if ('errno' in verdict) {
          reply.error(verdict.errno)
          return true
        }
        if (inode.pin === undefined) throw new Error(`inode ${inode.name} was admitted without a pin`)
        const used = this.whole(() => this.parts.devnodes.with(verdict.device, (fd) => (use(verdict.device, fd), 0)))
        if (used !== 0) reply.error(used ?? E.ENOENT)
        return true
      },
    })
  }

  readlink(caller: Caller, nodeid: bigint, reply: Reply): void {
    const link = this.link(nodeid)
    if (link === undefined || link.kind === 'unknown') return reply.error(E.EINVAL)
    const answer = () => {
      const target = this.target(link)
      if (target === undefined) reply.error(E.ENOENT)
      else reply.data(Buffer.from(target))
    }
    if (link.kind === 'part') answer()
    else this.wait(caller, link, reply, answer)
  }

  /** Where a link leads: to a name beside it, or to the device's own node. */
  private target({ kind, name }: Link): string | undefined {
    if (kind === 'part' || kind === 'waiting' || kind === 'unknown') return name
    const device = this.parts.registry.find(name)
    return kind === 'own' && device !== undefined ? `/dev/${device.devname}` : device?.kname
  }

  opendir(nodeid: bigint, reply: Reply): void {
    if (!this.isDirectory(nodeid)) return reply.error(E.ENOTDIR)
    // Nothing is kept for a directory that is open: anybody may have any number of them.
    reply.open(0n)
  }

  /** @param cookie of the last entry that was read; 0 before the first */
  readdir(nodeid: bigint, cookie: bigint, size: number, reply: Reply): void {
    if (!this.isDirectory(nodeid)) return reply.error(E.ENOTDIR)
    const devices = this.parts.registry.devices()
    const entries: Dirent[] = dots(nodeid).filter((dot) => dot.cookie > cookie)
    const most = Math.ceil(size / DIRENT_MIN)
    const disk = parseId(nodeid)?.diskseq
    const from = disk === undefined || cookie > 2n ? cookie : entryCookie(disk, 0) - 1n
    for (let i = firstAfter(devices, from); i < devices.length && entries.length < most; i++) {
      const device = devices[i] as Device
      if (nodeid === FUSE_ROOT_ID) addEntries(entries, device, cookie)
      else if (nodeid === DM_ID) addDirectory(entries, device, cookie)
      else if (device.diskseq === disk) addByKernelName(entries, device, cookie)
      else break
    }
    const { bytes, offsets } = encodeDirents(entries)
    let end = entries.length
    while ((offsets[end] as number) > size) end--
    reply.data(bytes.subarray(0, offsets[end]))
  }

  statfs(reply: Reply): void {
    reply.statfs(STATFS_NAME_LENGTH)
  }

  getxattr(caller: Caller, nodeid: bigint, name: string, size: number, reply: Reply): void {
    this.readXattr(caller, nodeid, size, reply, (fd) => this.parts.devnodes.xattr(fd, name))
  }

  listxattr(caller: Caller, nodeid: bigint, size: number, reply: Reply): void {
    if (this.inode(nodeid) === undefined) return this.sized(NOTHING, size, reply)
    this.readXattr(caller, nodeid, size, reply, (fd) => this.parts.devnodes.xattrs(fd))
  }

  /** @param size 0 asks how large the value is */
  private readXattr(caller: Caller, nodeid: bigint, size: number, reply: Reply, read: (fd: number) => Uint8Array | number): void {
    const link = this.link(nodeid)
    if (link?.kind === 'unknown') return this.wait(caller, link, reply, () => reply.error(E.ESTALE))
    const inode = this.inode(nodeid)
    // Only device nodes have any. (Not EOPNOTSUPP: to the kernel, asking for
    // the root's ACL, that would be a reason to deny access.)
    if (inode === undefined) return reply.error(E.ENODATA)
    const value = this.readFrom(inode, read)
    if (value === undefined) return reply.error(E.ENOENT)
    if (typeof value === 'number') return reply.error(value)
    this.sized(value, size, reply)
  }

  private readFrom(inode: Inode, read: (fd: number) => Uint8Array | number): Uint8Array | number | undefined {
    const { registry, sysfs, devnodes } = this.parts
    const { pin } = inode
    return this.whole(() => {
      if (pin !== undefined) return devnodes.with(pin.device, read)
      const device = registry.find(inode.name)
      if (device === undefined || !InodeTable.is(inode, device) || !sysfs.shows(device)) return undefined
      return devnodes.with(device, read)
    })
  }

  /** What is found out; EIO where there are no descriptors or memory left to find it out. */
  private whole<T>(find: () => T): T | number {
    try {
      return find()
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      return E.EIO
    }
  }

  private sized(value: Uint8Array, size: number, reply: Reply): void {
    if (size === 0) return reply.xattrSize(value.length)
    if (value.length > size) return reply.error(E.ERANGE)
    reply.data(value)
  }

  setxattr(caller: Caller, nodeid: bigint, name: string, value: Uint8Array, flags: number, reply: Reply): void {
    this.changeXattr(caller, nodeid, reply, (fd) => this.parts.devnodes.setXattr(fd, name, value, flags))
  }

  removexattr(caller: Caller, nodeid: bigint, name: string, reply: Reply): void {
    this.changeXattr(caller, nodeid, reply, (fd) => this.parts.devnodes.removeXattr(fd, name))
  }

  /**
   * Refused, whoever asks; but udev is told that the name is not there. It
   * removes links of its own, made before the tree was mounted over them, and
   * any other answer has it log a warning for each disk.
   */
  unlink(caller: Caller, reply: Reply): void {
    reply.error(this.parts.intents.isUdevWorker(caller.tid) ? E.ENOENT : E.EPERM)
  }

  private changeXattr(caller: Caller, nodeid: bigint, reply: Reply, change: (fd: number) => number): void {
    const inode = this.inode(nodeid)
    if (inode === undefined) return reply.error(EOPNOTSUPP)
    this.pinned(caller, inode, reply, (_, fd) => {
      const errno = change(fd)
      if (errno !== 0) reply.error(errno)
      else reply.ok()
    })
  }

  /**
   * The sticky bit is how udev's rules tell the tree from a plain directory. Nobody but
   * root reads it: who reads a directory holds its lock for as long as his own memory takes
   * to be written to, which may be for ever (getdents(2) into a file of a filesystem
   * of his own), and one mkdir behind him has everybody wait whose name is not cached.
   */
  private directoryAttr(id: NodeId): Attr {
    return {
      ...this.ownAttr(id),
      mode: S_IFDIR | S_ISVTX | 0o711,
      nlink: 2,
      size: 0,
    }
  }

  private linkAttr(ino: bigint, link: Link): Attr {
    if (link.kind === 'unknown') return { ...this.ownAttr(ino), mode: S_IFBLK, nlink: 1, size: 0 }
    return { ...this.ownAttr(ino), mode: S_IFLNK | 0o777, nlink: 1, size: this.target(link)?.length ?? 0 }
  }

  /** What is no device belongs to root, and is as old as the mount. */
  private ownAttr(ino: bigint): Omit<Attr, 'mode' | 'nlink' | 'size'> {
    const time = this.started
    return {
      ino,
      uid: 0,
      gid: 0,
      rdev: 0,
      atime: time,
      atimeNs: 0,
      mtime: time,
      mtimeNs: 0,
      ctime: time,
      ctimeNs: 0,
    }
  }
}

function addEntries(entries: Dirent[], { diskseq, partition, minor, name }: Device, after: bigint): void {
  const ino = inodeId(diskseq, partition, minor)
  const linkIno = linkId(diskseq, partition, 'part')
  if (ino === undefined || linkIno === undefined) return
  const cookie = entryCookie(diskseq, partition)
  if (cookie > after) entries.push({ ino, cookie, mode: S_IFBLK, name })
  if (partition !== 0) entries.push({ ino: linkIno, cookie: cookie + 1n, mode: S_IFLNK, name: linkName(diskseq, partition) })
}

function addDirectory(entries: Dirent[], { diskseq, partition, name }: Device, after: bigint): void {
  const ino = directoryId(diskseq)
  const cookie = entryCookie(diskseq, 0)
  if (partition === 0 && ino !== undefined && cookie > after) entries.push({ ino, cookie, mode: S_IFDIR, name })
}

function addByKernelName(entries: Dirent[], { diskseq, partition, minor, kname }: Device, after: bigint): void {
  const ino = inodeId(diskseq, partition, minor)
  const cookie = entryCookie(diskseq, partition)
  if (ino !== undefined && cookie > after) entries.push({ ino, cookie, mode: S_IFBLK, name: kname })
}

const asked = ({ name, diskseq, partition }: Name, directory: NodeId): Asked => ({ name, diskseq, partition, directory })

/** Index of the first device of which an entry may come after that cookie. */
function firstAfter(devices: readonly Device[], cookie: bigint): number {
  let low = 0
  for (let high = devices.length; low < high;) {
    const middle = (low + high) >> 1
    const { diskseq, partition } = devices[middle] as Device
    if (entryCookie(diskseq, partition) + 1n > cookie) high = middle
    else low = middle + 1
  }
  return low
}

function blockAttr({ inode, device, stat }: Omit<Shown, 'trusted'>): Attr {
  // Field by field: this is on the path of every open, and a spread costs 2 us.
  return {
    ino: inode.id,
    mode: S_IFBLK | (stat.mode & PERMISSIONS),
    nlink: 1,
    uid: stat.uid,
    gid: stat.gid,
    rdev: encodeDev(device.major, device.minor),
    size: 0,
    atime: stat.atime,
    atimeNs: stat.atimeNs,
    mtime: stat.mtime,
    mtimeNs: stat.mtimeNs,
    ctime: stat.ctime,
    ctimeNs: stat.ctimeNs,
  }
}
