/**
 * The tree: names and answers. Who may have a node, and what keeps it that
 * node, is decided by the gate.
 */
import {
  type Attr,
  type Dirent,
  encodeDev,
  encodeDirents,
  FUSE_ROOT_ID,
  type Validity,
} from './abi.js'
import type { DeviceNodes, NodeStat } from './devnode.js'
import { type DiskSeq, linkName, nodeId, nodeName, parseName, parseNodeId, waitingId } from './diskseq.js'
import { E, EOPNOTSUPP, Exhausted } from './errno.js'
import type { Attempt, Gate } from './gate.js'
import type { Intents } from './intent.js'
import type { Node, NodeTable } from './node.js'
import type { Reaper } from './reaper.js'
import type { Registry } from './registry.js'
import { type Device, type Sysfs } from './sysfs.js'
import type { AttrChange, Caller, Reply, TreeOperations } from './transport.js'

const S_IFDIR = 0o040000
const S_ISVTX = 0o001000
const S_IFLNK = 0o120000
const S_IFBLK = 0o060000
const PERMISSIONS = 0o7777

/** The kernel must ask again. */
const STALE: Validity = { seconds: 0, nanoseconds: 0 }
/**
 * Until the next jiffy at the latest: so the open(2) that a LOOKUP was part of
 * need not ask a second time. Only on answers that a pin stands behind.
 */
const ONE_JIFFY: Validity = { seconds: 0, nanoseconds: 1 }
/** Nothing about the root changes; without this each path walk would ask for it. */
const LONG: Validity = { seconds: 3600, nanoseconds: 0 }

/** NAME_MAX; longer names are never asked for. */
const STATFS_NAME_LENGTH = 255

const NOTHING = new Uint8Array(0)

/** An open directory: what it held when it was opened. */
type Listing = ReturnType<typeof encodeDirents>

/** Behind these two come the inode numbers of the nodes, in the order they are listed in. */
const DOT: Dirent = { ino: FUSE_ROOT_ID, cookie: 1n, mode: S_IFDIR, name: '.' }
const DOT_DOT: Dirent = { ...DOT, cookie: 2n, name: '..' }

interface Link {
  readonly target: string
  /**
   * It stands for a disk that is slow to open, under the disk's own name. The
   * kernel reads a link without the directory's lock, so the wait is there;
   * then it looks the name up again, and the disk is open.
   */
  readonly waits: boolean
  nlookup: number
}

export class Tree implements TreeOperations {
  private readonly listings = new Map<bigint, Listing>()
  /** Shared by all who open the directory until something changes: anybody may, as often as they like. */
  private listed: { readonly devices: readonly Device[]; readonly listing: Listing } | undefined
  /** Not those of the daemon before this one, whose directories may still be open. */
  private nextHandle = BigInt(1 + Math.floor(Math.random() * 2 ** 46)) << 16n
  private readonly links = new Map<bigint, Link>()
  private readonly started = Math.floor(Date.now() / 1000)

  constructor(
    private readonly registry: Registry,
    private readonly sysfs: Sysfs,
    private readonly nodes: NodeTable,
    private readonly devnodes: DeviceNodes,
    private readonly gate: Gate,
    private readonly reaper: Reaper,
    private readonly intents: Intents,
    /** The kernel may know nodes and links that another daemon gave it. */
    private readonly inherits = false,
  ) {}

  private node(id: bigint): Node | undefined {
    return this.nodes.get(id) ?? (this.inherits ? this.nodes.recall(id) : undefined)
  }

  private link(id: bigint): Link | undefined {
    const link = this.links.get(id)
    if (link !== undefined || !this.inherits) return link
    const parsed = parseNodeId(id)
    if (parsed === undefined || !parsed.symlink) return undefined
    return { target: nodeName(parsed.diskseq, parsed.partition), waits: parsed.waits, nlookup: 0 }
  }

  lookup(caller: Caller, parent: bigint, name: string, reply: Reply): void {
    if (parent !== FUSE_ROOT_ID) return reply.error(E.ENOENT)
    const known = this.nodes.named(name)
    if (known !== undefined) return this.lookupNode(caller, known, reply)
    const parsed = parseName(name)
    if (parsed === undefined) {
      this.reaper.inspected()
      return reply.error(E.ENOENT)
    }
    if (parsed.symlink) return this.lookupLink(parsed.diskseq, parsed.partition, reply)
    const node = this.nodes.create(parsed.diskseq, parsed.partition)
    if (node === undefined) return reply.error(E.ENOENT)
    this.lookupNode(caller, node, reply)
  }

  private lookupNode(caller: Caller, node: Node, reply: Reply): void {
    this.admit('lookup', caller, node, reply, (verdict) => {
      if ('errno' in verdict) {
        this.reaper.inspected()
        reply.error(verdict.errno)
        return true
      }
      if ('later' in verdict) {
        this.replyLink(waitingId(node.id), node.name, true, reply)
        return true
      }
      const { device } = verdict
      // Counted first: the answer may be forgotten as soon as it is given.
      node.nlookup++
      const taken = reply.entry({
        nodeid: node.id,
        generation: BigInt(encodeDev(device.major, device.minor)),
        attr: blockAttr(node, verdict),
        attrValid: verdict.pinned ? ONE_JIFFY : STALE,
      })
      if (!taken) this.forget(node.id, 1n)
      return taken
    })
  }

  private admit(
    kind: Attempt['kind'],
    caller: Caller,
    node: Node,
    reply: Reply,
    done: Attempt['done'],
  ): void {
    this.gate.admit({ kind, caller, node, done, onInterrupt: (listener) => reply.onInterrupt(listener) })
  }

  private lookupLink(diskseq: DiskSeq, partition: number, reply: Reply): void {
    const target = nodeName(diskseq, partition)
    const id = nodeId(diskseq, partition, true)
    if (id === undefined) return reply.error(E.ENOENT)
    const answer = (found: Device | number) => {
      this.reaper.inspected()
      if (typeof found === 'number') return reply.error(found === 0 ? E.ENOENT : E.EIO)
      this.replyLink(id, target, false, reply)
    }
    const device = this.registry.find(target)
    if (device !== undefined) return answer(device)
    this.registry.findSlowly(target, diskseq, answer)
  }

  private replyLink(id: bigint, target: string, waits: boolean, reply: Reply): void {
    let link = this.links.get(id)
    if (link === undefined) this.links.set(id, (link = { target, waits, nlookup: 0 }))
    link.nlookup++
    const taken = reply.entry({
      nodeid: id,
      generation: 0n,
      attr: this.linkAttr(id, target),
      attrValid: STALE,
    })
    if (!taken) this.forget(id, 1n)
  }

  forget(nodeid: bigint, count: bigint): void {
    const node = this.nodes.get(nodeid)
    if (node !== undefined) {
      this.reaper.forget(node, Number(count))
      return
    }
    const link = this.links.get(nodeid)
    if (link === undefined) return
    link.nlookup -= Number(count)
    if (link.nlookup <= 0) this.links.delete(nodeid)
  }

  getattr(caller: Caller, nodeid: bigint, reply: Reply): void {
    if (nodeid === FUSE_ROOT_ID) return void reply.attr(this.rootAttr(), LONG)
    const link = this.link(nodeid)
    if (link !== undefined) {
      // The guard's, while there was no daemon: whoever does not follow links looks again.
      if (link.waits && !this.links.has(nodeid)) return reply.error(E.ESTALE)
      return void reply.attr(this.linkAttr(nodeid, link.target), STALE)
    }
    const node = this.node(nodeid)
    if (node === undefined) return reply.error(E.ESTALE)
    this.admit('getattr', caller, node, reply, (verdict) => {
      if ('later' in verdict) throw new Error('only a lookup can be put off')
      if (!('errno' in verdict)) {
        return reply.attr(blockAttr(node, verdict), verdict.pinned ? ONE_JIFFY : STALE)
      }
      // Like a file that was unlinked while open: the name is gone, but
      // whoever has a descriptor may look at it. Nobody can open it.
      if (verdict.errno === E.ENOENT && node.last !== undefined) {
        return reply.attr({ ...blockAttr(node, node.last), nlink: 0 }, STALE)
      }
      reply.error(verdict.errno)
      return true
    })
  }

  setattr(caller: Caller, nodeid: bigint, change: AttrChange, reply: Reply): void {
    const node = this.node(nodeid)
    if (node === undefined) return reply.error(E.EPERM)
    this.pinned(caller, node, reply, (device, fd) => {
      const errno = this.devnodes.change(fd, change)
      if (errno !== 0) return reply.error(errno)
      const stat = this.devnodes.stat(fd)
      reply.attr(blockAttr(node, { device, stat }), STALE)
    })
  }

  /** Calls `use` with a descriptor that is this node's device for certain. */
  private pinned(
    caller: Caller,
    node: Node,
    reply: Reply,
    use: (device: Device, fd: number) => void,
  ): void {
    this.admit('change', caller, node, reply, (verdict) => {
      if ('errno' in verdict) {
        reply.error(verdict.errno)
        return true
      }
      const pin = node.pin
      if (pin === undefined || !('device' in verdict)) {
        throw new Error(`node ${node.name} was admitted without a pin`)
      }
      use(verdict.device, pin.fd)
      return true
    })
  }

  readlink(nodeid: bigint, reply: Reply): void {
    const link = this.link(nodeid)
    if (link === undefined) return reply.error(E.EINVAL)
    const answer = (errno: number) => {
      if (errno !== 0) reply.error(errno)
      else reply.data(Buffer.from(link.target))
    }
    if (!link.waits) return answer(0)
    this.gate.settle(link.target, (listener) => reply.onInterrupt(listener), answer)
  }

  opendir(nodeid: bigint, reply: Reply): void {
    if (nodeid !== FUSE_ROOT_ID) return reply.error(E.ENOTDIR)
    const handle = this.nextHandle++
    this.listings.set(handle, this.list())
    if (!reply.open(handle)) this.listings.delete(handle)
  }

  private list(): Listing {
    const devices = this.registry.devices()
    if (this.listed?.devices !== devices) this.listed = { devices, listing: encodeDevices(devices) }
    return this.listed.listing
  }

  /** @param cookie of the last entry that was read; 0 before the first */
  readdir(handle: bigint, cookie: bigint, size: number, reply: Reply): void {
    let listing = this.listings.get(handle)
    // Opened by the daemon before this one.
    if (listing === undefined) this.listings.set(handle, (listing = this.list()))
    const { bytes, offsets, cookies } = listing
    const last = cookies.length
    const first = firstAfter(cookies, cookie)
    const start = offsets[first] as number
    let end = first
    while (end < last && (offsets[end + 1] as number) - start <= size) end++
    reply.data(bytes.subarray(start, offsets[end]))
  }

  releasedir(handle: bigint): void {
    this.listings.delete(handle)
  }

  statfs(reply: Reply): void {
    reply.statfs(this.registry.size, STATFS_NAME_LENGTH)
  }

  getxattr(nodeid: bigint, name: string, size: number, reply: Reply): void {
    this.readXattr(nodeid, size, reply, (fd) => this.devnodes.xattr(fd, name))
  }

  listxattr(nodeid: bigint, size: number, reply: Reply): void {
    if (this.node(nodeid) === undefined) return this.sized(NOTHING, size, reply)
    this.readXattr(nodeid, size, reply, (fd) => this.devnodes.xattrs(fd))
  }

  /** @param size 0 asks how large the value is */
  private readXattr(
    nodeid: bigint,
    size: number,
    reply: Reply,
    read: (fd: number) => Uint8Array | number,
  ): void {
    const node = this.node(nodeid)
    // Only device nodes have any. (Not EOPNOTSUPP: to the kernel, asking for
    // the root's ACL, that would be a reason to deny access.)
    if (node === undefined) return reply.error(E.ENODATA)
    const value = this.readFrom(node, read)
    if (value === undefined) return reply.error(E.ENOENT)
    if (typeof value === 'number') return reply.error(value)
    this.sized(value, size, reply)
  }

  private readFrom(node: Node, read: (fd: number) => Uint8Array | number): Uint8Array | number | undefined {
    if (node.pin !== undefined) return read(node.pin.fd)
    try {
      const device = this.registry.find(node.name)
      return device !== undefined && this.sysfs.shows(device) ? this.devnodes.with(device, read) : undefined
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

  setxattr(
    caller: Caller,
    nodeid: bigint,
    name: string,
    value: Uint8Array,
    flags: number,
    reply: Reply,
  ): void {
    this.changeXattr(caller, nodeid, reply, (fd) => this.devnodes.setXattr(fd, name, value, flags))
  }

  removexattr(caller: Caller, nodeid: bigint, name: string, reply: Reply): void {
    this.changeXattr(caller, nodeid, reply, (fd) => this.devnodes.removeXattr(fd, name))
  }

  /**
   * Refused, whoever asks; but udev is told that the name is not there. It
   * removes links of its own, made before the tree was mounted over them, and
   * any other answer has it log a warning for each disk.
   */
  unlink(caller: Caller, reply: Reply): void {
    reply.error(this.intents.isUdevWorker(caller.tid) ? E.ENOENT : E.EPERM)
  }

  private changeXattr(
    caller: Caller,
    nodeid: bigint,
    reply: Reply,
    change: (fd: number) => number,
  ): void {
    const node = this.node(nodeid)
    if (node === undefined) return reply.error(EOPNOTSUPP)
    this.pinned(caller, node, reply, (_, fd) => {
      const errno = change(fd)
      if (errno !== 0) reply.error(errno)
      else reply.ok()
    })
  }

  /** The sticky bit is how udev's rules tell the tree from a plain directory. */
  private rootAttr(): Attr {
    return {
      ...this.ownAttr(FUSE_ROOT_ID),
      mode: S_IFDIR | S_ISVTX | 0o755,
      nlink: 2,
      size: 0,
    }
  }

  private linkAttr(ino: bigint, target: string): Attr {
    return { ...this.ownAttr(ino), mode: S_IFLNK | 0o777, nlink: 1, size: target.length }
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

function encodeDevices(devices: readonly Device[]): Listing {
  const entries: Dirent[] = [DOT, DOT_DOT]
  for (const { diskseq, partition, name } of devices) {
    const ino = nodeId(diskseq, partition, false)
    const linkIno = nodeId(diskseq, partition, true)
    if (ino === undefined || linkIno === undefined) continue
    entries.push({ ino, cookie: ino, mode: S_IFBLK, name })
    if (partition !== 0) {
      entries.push({ ino: linkIno, cookie: linkIno, mode: S_IFLNK, name: linkName(diskseq, partition) })
    }
  }
  return encodeDirents(entries)
}

/** Index of the first of these ascending numbers that is larger. */
function firstAfter(numbers: readonly bigint[], number: bigint): number {
  let low = 0
  for (let high = numbers.length; low < high; ) {
    const middle = (low + high) >> 1
    if ((numbers[middle] as bigint) > number) high = middle
    else low = middle + 1
  }
  return low
}

function blockAttr(node: Node, { device, stat }: { device: Device; stat: NodeStat }): Attr {
  // Field by field: this is on the path of every open, and a spread costs 2 us.
  return {
    ino: node.id,
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
