// SPDX-License-Identifier: MIT
/**
 * The addon in `native/`, typed. Each function is one kernel interface and
 * answers with a non-negative result or a negated errno; none of them throws
 * and none of them decides anything.
 *
 * Functions that take a callback run on a thread of the addon's own pool,
 * because what they call may block for as long as a disk likes. All others
 * cannot block on a disk and run at once.
 */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'

/** Kernel's answer to {@link Native.openDevice}. */
export type OpenDeviceCallback = (error: number, fd: number, major: number, minor: number, diskseq: bigint, uevent: string) => void

export type IdentifyCallback = (error: number, kname: string, major: number, minor: number, diskseq: bigint, uevent: string) => void

/**
 * Of a thread: its `syscall` and `stack` files in /proc/TID; of its own `stat` file
 * (/proc/TID/task/TID; /proc/TID/stat has the page faults of the whole process) the state,
 * and where its code or stack begins (0 in the middle of an execve, and at its end); the time
 * it has spent outside of the kernel, us, if it runs (-1: not known); its page faults.
 */
export type SeenThread = readonly [syscall: string, stack: string, state: string, memory: number, userUs: number, faults: number]

/** The ids that files are opened with, the effective capabilities, and how many groups there are. */
export type ThreadCredentials = readonly [fsuid: number, fsgid: number, capabilities: bigint, groups: number, ...member: boolean[]]

type LayoutField =
  | 'STATE_VERSION'
  | 'STATE_REQUEST_MAX'
  | 'STATE_HEADER_SIZE'
  | 'STATE_VERSION_AT'
  | 'STATE_DEVICE_AT'
  | 'STATE_PATH_LENGTH_AT'
  | 'STATE_SMALL_USED_AT'
  | 'STATE_BIG_USED_AT'
  | 'STATE_PINS_USED_AT'
  | 'STATE_PATH_AT'
  | 'STATE_HIGHEST_AT'
  | 'STATE_PID_NAMESPACE_AT'
  | 'SLOT_TRIES_AT'
  | 'SLOT_INTERRUPTED_AT'
  | 'SLOT_HEADER_SIZE'
  | 'STATE_LANDING_AT'
  | 'STATE_SMALL_AT'
  | 'STATE_SMALL_SIZE'
  | 'STATE_SMALL_COUNT'
  | 'STATE_BIG_AT'
  | 'STATE_BIG_SIZE'
  | 'STATE_BIG_COUNT'
  | 'STATE_PINS_AT'
  | 'STATE_PIN_SIZE'
  | 'STATE_PINS_COUNT'
  | 'STATE_SIZE'

/** A row of a device-mapper device's table: see dmsetup(8). */
export interface DmTarget {
  /** Sectors of 512 bytes. */
  readonly start: bigint
  /** Sectors of 512 bytes. */
  readonly length: bigint
  readonly type: string
  readonly params: string
}

/** What libdevmapper says of a device. */
export interface DmFound {
  /** As libdevmapper writes it: with `\xNN` for what names of files should not have. */
  readonly name: string
  readonly major: number
  readonly minor: number
  readonly exists: boolean
  readonly openCount: number
  readonly targets: readonly DmTarget[]
  /** Of a list: the names of all devices. */
  readonly names: readonly string[]
}

export interface Poll {
  /** Until {@link resume}. */
  pause(): void
  resume(): void
  close(): void
}

export interface Native {
  /** Calls back while `fd` is readable, or at its exceptional conditions (POLLPRI), until `close()`. */
  readonly Poll: new (fd: number, ready: () => void, priority?: boolean) => Poll

  read(fd: number, into: Uint8Array): number
  /**
   * read(fd, into) of what has nothing to read yet, tried for so many microseconds: if
   * `wanted`, or where other threads were given something to do since the last time.
   * -EAGAIN if nothing came, -EINTR if callbacks of those did.
   */
  readSoon(fd: number, into: Uint8Array, us: number, wanted: boolean): number
  write(fd: number, from: Uint8Array, length: number): number
  close(fd: number): number
  /** Another descriptor of the same open file; close-on-exec. */
  duplicate(fd: number): number
  /** One read(2) of a procfs or sysfs file. */
  readFile(path: string, into: Uint8Array): number
  openFile(path: string): number
  /** Reads a file from its beginning, through a descriptor that stays open. */
  readAgain(fd: number, into: Uint8Array): number
  /** An O_PATH descriptor of a directory. */
  openDirectory(path: string): number
  /**
   * A descriptor that holds an exclusive flock(2) on a file, which is made if it is missing.
   * -EAGAIN if another process has it, or has just removed the file; -EPERM if other users could open it.
   */
  lockFile(path: string): number
  /** Gives that up for all processes that have the descriptor. */
  unlock(fd: number): number
  /** An O_PATH descriptor of a node below `dir`; follows no symlink, leaves no filesystem. */
  openNode(dir: number, name: string): number
  /** Fields of struct stat, in the order of {@link STAT}. */
  fstat(fd: number, into: Float64Array): number
  /** The same of a node below `dir`; follows no symlink in the last component of its name. */
  statNode(dir: number, name: string, into: Float64Array): number
  fchmod(fd: number, mode: number): number
  fchown(fd: number, uid: number, gid: number): number
  futimens(fd: number, atime: number, atimeNs: number, mtime: number, mtimeNs: number): number
  getxattr(fd: number, name: string, into: Uint8Array): number
  listxattr(fd: number, into: Uint8Array): number
  setxattr(fd: number, name: string, value: Uint8Array, flags: number): number
  removexattr(fd: number, name: string): number

  /**
   * Opens `name` below `dir` (with O_NONBLOCK and O_CLOEXEC), for a loop
   * device checks that it is bound, and reads what identifies it. The order of
   * these steps is part of the guarantee: see `native/addon/blockdev.cc`.
   *
   * @param nodes where to make a node to open it by, see {@link makeNodes}; -1: `name` itself is opened
   */
  openDevice(dir: number, name: string, flags: number, loop: boolean, nodes: number, done: OpenDeviceCallback): void
  /** A descriptor of an empty directory on a tmpfs of its own, which no other process sees. */
  makeNodes(): number
  /**
   * The same of a descriptor that is open; -ENXIO of a loop device without a file.
   *
   * @param check false for a loop device that has been seen to have one since the descriptor was opened: to ask
   *   it again might wait for that file
   */
  identify(fd: number, check: boolean, done: IdentifyCallback): void
  /** fstat(2) of a file that somebody else may have opened, and whose filesystem may not answer. */
  statFile(fd: number, done: (error: number, mode: number, size: bigint, device: bigint, inode: bigint) => void): void
  closeDevice(fd: number, done: () => void): void
  /** Of anything that somebody else has opened; not on the threads on which disks are opened. */
  closeFile(fd: number, done: () => void): void
  /**
   * Binds a free loop device to a file; offset, limit (0: none) and sector size (0: 512) in bytes. With
   * LO_FLAGS_AUTOCLEAR the kernel detaches it when its last user has closed it, the first of whom has `fd`.
   */
  attachLoop(
    file: number,
    flags: number,
    offset: bigint,
    sizeLimit: bigint,
    sectorSize: number,
    done: (error: number, step: 'control' | 'open' | 'configure', fd: number) => void,
  ): void
  /**
   * One call of libdevmapper.
   *
   * @param type of the call, as libdevmapper.h numbers them
   * @param flags see src/disks/dm.ts
   * @param major of the device; -1 where it is by its name
   * @param text a new name, or a message
   * @param sector that a message is for
   */
  deviceMapper(
    type: number,
    flags: number,
    major: number,
    minor: number,
    name: string,
    text: string,
    uuid: string,
    sector: bigint,
    targets: readonly DmTarget[],
    done: (error: number, said: string, found: DmFound) => void,
  ): void
  /** BLKGETDISKSEQ. */
  diskseq(fd: number): bigint | number
  /**
   * Of a /sys/class/block; `next` has some more each time, [name, uevent text, bound, name, ...],
   * until there are none left. And the processor time it took, ms.
   */
  scanBlock(directory: string, done: (error: number, next: () => (string | boolean)[], cpuMs: number) => void): void

  inotifyWatch(path: string, mask: number, done: (error: number, fd: number) => void): void
  /** Watches a directory of the FUSE filesystem that `root` is a descriptor of, as well. */
  inotifyAdd(fd: number, root: number, id: bigint, mask: number, done: (error: number, wd: number) => void): void
  inotifyRemove(fd: number, wd: number): number

  /**
   * The mode of a directory, and symlinks in it: path, target, path, target, and so on, "" for one that is to be removed.
   * Directories on the way to a link are made, and removed when they are empty.
   */
  changeLinks(directory: number, mode: number, changes: readonly string[], done: (error: number) => void): void
  /** Paths of the symlinks in a directory, and in those so many levels below it. */
  listLinks(directory: number, depth: number, done: (paths: string[]) => void): void

  mount(source: string, target: string, type: string, flags: number, data: string): number
  unmount(target: string, flags: number, done: (error: number) => void): void
  /** stat(2), of which only the error is told. */
  look(path: string, done: (error: number) => void): void
  /** fspick(2): a descriptor for {@link Native.prune}. */
  pickMount(target: string, done: (error: number, fd: number) => void): void
  /** A descriptor of a directory in what is mounted there, beneath any other mount; it keeps none of them busy. */
  cloneMount(target: string, directory: string, done: (error: number, fd: number) => void): void
  /** FSCONFIG_CMD_RECONFIGURE: the kernel forgets all unused dentries. */
  prune(fd: number, done: (error: number) => void): void

  /**
   * What threads are doing: undefined for one that is gone. Each second argument tells
   * whether its kernel stack is wanted; see `native/addon/threads.cc`.
   */
  lookAtThreads(threads: readonly (number | boolean)[], done: (seen: (SeenThread | undefined)[]) => void): void
  /** Of a thread, and of which of some groups it is a member; undefined where that cannot be read. */
  credentials(tid: number, groups: readonly number[], done: (found: ThreadCredentials | undefined) => void): void

  /**
   * Who is behind a thread's user namespace: the uid of who made the outermost one, or minus its inode
   * where that was root. Undefined where the namespace is our own, or cannot be found out.
   */
  userNamespace(tid: number): number | undefined

  /** How long this thread, and those that it starts from now on, are to have a processor at a time, ns. */
  setSlice(ns: number): number

  ueventOpen(receiveBytes: number): number
  /** Size of the message; `from` gets sender's port, groups, and whether it was truncated. */
  ueventReceive(fd: number, into: Uint8Array, from: Uint32Array): number

  /** A descriptor connected to a datagram socket in the filesystem, or with "@" the abstract namespace. */
  datagramOpen(path: string): number
  /** Does not wait: -EAGAIN if the other end does not read. */
  datagramSend(fd: number, text: string): number
  /** A connection that keeps messages apart (SOCK_SEQPACKET). */
  packetConnect(path: string): number
  /** For this user only. */
  packetListen(path: string): number
  /** A connection that does not (SOCK_STREAM). -EAGAIN while too many others wait for it. */
  streamConnect(path: string): number
  /** For this user only. */
  streamListen(path: string): number
  acceptConnection(fd: number): number
  /** How much is kept until the other end reads it, bytes; also more than users may have kept. */
  sendBuffer(fd: number, bytes: number): number
  /** The uid of who has connected, as of then. */
  peerUser(fd: number): number

  /** Offsets and sizes of `native/shared/state.h`, bytes. */
  readonly layout: Readonly<Record<LayoutField, number>>
  /** A descriptor of memory, all zeros. */
  sharedMemory(bytes: number): number
  mapMemory(fd: number, bytes: number): ArrayBuffer | number
  /** A datagram socket that receives what it sends: descriptors sent through it stay open while they wait there. */
  selfSocket(): number
  /** Does not wait. -> bytes sent, of a stream perhaps fewer than there are */
  sendDescriptors(socket: number, text: string, fds: readonly number[]): number
  /** [bytes, descriptor, ...]; with `peek` the message stays, and the descriptors are copies. */
  receiveDescriptors(socket: number, into: Uint8Array, peek: boolean): number[] | number
  /** Waits until there is one, or the other end is closed; nothing else is done meanwhile. */
  awaitMessage(socket: number): number

  readonly syscalls: Readonly<Record<string, number>>
  readonly O_PATH: number
  readonly LO_FLAGS_AUTOCLEAR: number
  readonly LO_FLAGS_READ_ONLY: number
  readonly LO_FLAGS_PARTSCAN: number
  readonly LO_FLAGS_DIRECT_IO: number
  readonly UTIME_NOW: number
  readonly UTIME_OMIT: number
}

/** Indexes of {@link Native.fstat}'s result. */
export const STAT = {
  MODE: 0,
  UID: 1,
  GID: 2,
  NLINK: 3,
  RDEV_MAJOR: 4,
  RDEV_MINOR: 5,
  ATIME: 6,
  ATIME_NS: 7,
  MTIME: 8,
  MTIME_NS: 9,
  CTIME: 10,
  CTIME_NS: 11,
  FIELDS: 12,
} as const

/** Where it was built; and where the npm package has it, in node-gyp-build's layout. */
const PLACES = ['../native/build/Release/diskseqfs_native.node', `../prebuilds/${process.platform}-${process.arch}/diskseqfs_native.node`]

function load(): Native {
  const there = PLACES.find((place) => existsSync(new URL(place, import.meta.url)))
  if (there === undefined) throw new Error(`diskseqfs has no addon for ${process.platform} on ${process.arch}`)
  return createRequire(import.meta.url)(there) as Native
}

export const native = load()
