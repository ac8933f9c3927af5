// SPDX-License-Identifier: MIT
/**
 * Finds out what the calling thread is doing: inspecting an inode, or opening it. The
 * kernel sends the same LOOKUP for both, but until it is answered the caller is
 * blocked in its system call, and /proc/TID/syscall shows which one.
 *
 * A program can forge what it shows: a 64-bit program may make 32-bit calls (int 0x80),
 * whose numbers mean something else (64-bit 5 is fstat, 32-bit 5 is open), and chooses
 * all registers. So:
 *
 * - a number is believed if the path's address is above 4 GiB, which no 32-bit call can
 *   use; else only if the kernel's own stack shows a 64-bit entry
 *   ({@link Intents.confirms}). This is correct for every honest program;
 * - for users other than root the stack is read wherever a forged call would get them
 *   a disk.
 */
import { constants, readdirSync } from 'node:fs'

import { CachedFiles } from '../devices/cached-files.js'
import type { Native, SeenThread } from '../native.js'
import { kernelPreempts } from './preemption.js'

/**
 * - `inspect`: cannot open the device, whatever we answer
 * - `open`: an open(2): asks for the attributes before it opens, unless it was just told
 *   them; holds the inode from our answer until it is done
 * - `unknown`: may open the device by number, even after it let go of the
 *   inode: mount(2), a device-mapper table, io_uring, a caller we cannot see
 */
export type Intent = 'inspect' | 'open' | 'unknown'

/** A system call under way; or one in which a thread was answered, until it is seen outside of it. */
export interface Call {
  readonly intent: Intent
  /** Its number; -1 if unknown. */
  readonly number: number
  /** Distinguishes this call from others of the thread; 0 if unknown. */
  readonly print: number
  /** The caller may keep the inode after it, and open the device through that without a LOOKUP. */
  readonly keeps: boolean
  /** It follows a symlink at the end of the path. */
  readonly follows: boolean
  /** It would change the shape of the tree, or fail with EEXIST: it cannot succeed. */
  readonly shape: boolean
  /** It holds the directory's lock exclusively during the LOOKUP, or may hold it. */
  readonly locks: boolean
  /** An open(2) whose flags are out of sight: it may be O_PATH. */
  readonly blind: boolean
  /**
   * The kernel may set the times of the inode that it finds, without asking: that inode must not be one of ours. btrfs does
   * so (update_dev_time()), and FUSE, writing the inode back, reads what only its regular files have: the kernel
   * crashes (fuse_write_inode(); seen with 6.12).
   */
  readonly setsTimes: boolean
  /** It was given an inode that is not pinned, and must ask for the attributes before it opens it. */
  asks: boolean
  /**
   * Processor time that the thread had spent in user space when it was first seen running, us, and
   * its page faults; -1 before that.
   */
  userUs: number
  faults: number
}

/** A call of which only the intent is known, and perhaps the number. */
export function someCall(intent: Intent, number = -1): Call {
  const unknown = intent === 'unknown'
  return {
    intent,
    number,
    print: 0,
    keeps: unknown,
    follows: true,
    shape: false,
    locks: unknown,
    blind: false,
    setsTimes: false,
    asks: false,
    userUs: -1,
    faults: -1,
  }
}

/** Stands for the number of a call that lasts until the process ends. */
const UNTIL_IT_ENDS = -3

/** The call of a program that goes on by another path, see {@link Intents.goesOn}. */
export const GOING_ON: Call = { ...someCall('unknown', UNTIL_IT_ENDS), print: 2, keeps: false, locks: false }

/**
 * Programs that look at a path which ends in the kernel's name, look up in sysfs what that
 * device is called, and go on by /dev/mapper/NAME: libmount's, systemd's helpers, and others that do the same. As in
 * /proc/TID/comm, which has 15 characters. None of them runs for ever.
 */
const GOES_ON_BY_NAME =
  /^(?:u?mount|mount\.[\w.-]+|swapo(?:n|ff)|fsck|systemd-(?:fsck|makefs|growfs|mount|cryptse)|(?:mkfs\.)?btrfs|btrfs-convert|(?:low)?ntfs-3g)\n$/

/** Of a caller that cannot be seen: it may do anything, and nobody sees when it is done. */
export const UNSEEN = someCall('unknown')

/**
 * Of a caller that was preempted after it sent its request and before it went to sleep. It sleeps
 * as soon as it gets the processor back.
 */
export const RUNNING = someCall('unknown')

/** How often the file is read again at once while the caller is not asleep yet. */
const RUNNING_RETRIES = 8

const { O_CREAT, O_DIRECTORY, O_EXCL, O_NOFOLLOW } = constants
/** uapi/linux/fcntl.h */
const AT_SYMLINK_NOFOLLOW = 0x100
const AT_SYMLINK_FOLLOW = 0x400
/** uapi/linux/inotify.h, fanotify.h, fs.h */
const IN_DONT_FOLLOW = 0x0200_0000
const FAN_MARK_DONT_FOLLOW = 0x4
const UMOUNT_NOFOLLOW = 0x8

/** A call that cannot open the device. */
interface Inspecting {
  /** The index of an argument that must be a pointer. */
  readonly pointer: number
  /** If these bits are set in the argument at the index, it follows no symlinks; or it never follows any. */
  readonly nofollow?: readonly [index: number, bits: number] | 'always'
  /** If these bits are not set in the argument at the index, it follows no symlinks. */
  readonly follow?: readonly [index: number, bits: number]
  readonly keeps?: true
  readonly shape?: true
}

/**
 * Calls that change owner, mode, times or xattrs are among them: the change itself
 * is a request of its own, for which the device is always pinned.
 */
const INSPECTING: Readonly<Record<string, Inspecting>> = {
  stat: { pointer: 0 },
  lstat: { pointer: 0, nofollow: 'always' },
  fstat: { pointer: 1 },
  newfstatat: { pointer: 1, nofollow: [3, AT_SYMLINK_NOFOLLOW] },
  statx: { pointer: 1, nofollow: [2, AT_SYMLINK_NOFOLLOW] },
  readlink: { pointer: 0, nofollow: 'always' },
  readlinkat: { pointer: 1, nofollow: 'always' },
  access: { pointer: 0 },
  faccessat: { pointer: 1 },
  faccessat2: { pointer: 1, nofollow: [3, AT_SYMLINK_NOFOLLOW] },
  getxattr: { pointer: 0 },
  lgetxattr: { pointer: 0, nofollow: 'always' },
  fgetxattr: { pointer: 1 },
  getxattrat: { pointer: 1, nofollow: [2, AT_SYMLINK_NOFOLLOW] },
  listxattr: { pointer: 0 },
  llistxattr: { pointer: 0, nofollow: 'always' },
  flistxattr: { pointer: 1 },
  listxattrat: { pointer: 1, nofollow: [2, AT_SYMLINK_NOFOLLOW] },
  statfs: { pointer: 0 },
  fstatfs: { pointer: 1 },
  inotify_add_watch: { pointer: 1, nofollow: [2, IN_DONT_FOLLOW] },
  fanotify_mark: { pointer: 4, nofollow: [1, FAN_MARK_DONT_FOLLOW] },
  name_to_handle_at: { pointer: 1, nofollow: 'always', follow: [4, AT_SYMLINK_FOLLOW], keeps: true },
  open_tree: { pointer: 1, nofollow: [2, AT_SYMLINK_NOFOLLOW], keeps: true },
  file_getattr: { pointer: 1, nofollow: [4, AT_SYMLINK_NOFOLLOW] },
  file_setattr: { pointer: 1, nofollow: [4, AT_SYMLINK_NOFOLLOW] },
  chdir: { pointer: 0 },
  chroot: { pointer: 0 },
  truncate: { pointer: 0 },
  umount2: { pointer: 0, nofollow: [1, UMOUNT_NOFOLLOW] },
  // A device is not executed (may_open()).
  execve: { pointer: 0 },
  execveat: { pointer: 1, nofollow: [4, AT_SYMLINK_NOFOLLOW] },
  chmod: { pointer: 0 },
  fchmodat: { pointer: 1 },
  fchmodat2: { pointer: 1, nofollow: [3, AT_SYMLINK_NOFOLLOW] },
  chown: { pointer: 0 },
  lchown: { pointer: 0, nofollow: 'always' },
  fchownat: { pointer: 1, nofollow: [4, AT_SYMLINK_NOFOLLOW] },
  utime: { pointer: 0 },
  utimes: { pointer: 0 },
  futimesat: { pointer: 1 },
  utimensat: { pointer: 1, nofollow: [3, AT_SYMLINK_NOFOLLOW] },
  setxattr: { pointer: 0 },
  lsetxattr: { pointer: 0, nofollow: 'always' },
  fsetxattr: { pointer: 1 },
  setxattrat: { pointer: 1, nofollow: [2, AT_SYMLINK_NOFOLLOW] },
  removexattr: { pointer: 0 },
  lremovexattr: { pointer: 0, nofollow: 'always' },
  fremovexattr: { pointer: 1 },
  removexattrat: { pointer: 1, nofollow: [2, AT_SYMLINK_NOFOLLOW] },
  mkdir: { pointer: 0, shape: true },
  mkdirat: { pointer: 1, shape: true },
  mknod: { pointer: 0, shape: true },
  mknodat: { pointer: 1, shape: true },
  symlink: { pointer: 1, shape: true },
  symlinkat: { pointer: 2, shape: true },
  link: { pointer: 0, shape: true },
  linkat: { pointer: 1, shape: true },
  rename: { pointer: 0, shape: true },
  renameat: { pointer: 1, shape: true },
  renameat2: { pointer: 1, shape: true },
  unlink: { pointer: 0, shape: true },
  unlinkat: { pointer: 1, shape: true },
  rmdir: { pointer: 0, shape: true },
}

/** open(2) and the like: the indexes of the pointer and of the flags (-1: not in a register). */
const OPENING: Readonly<Record<string, readonly [pointer: number, flags: number]>> = {
  open: [0, 1],
  openat: [1, 2],
  openat2: [1, -1],
  creat: [0, 0],
  open_by_handle_at: [1, 2],
}

/** An ioctl(2) for btrfs has this in its second argument (BTRFS_IOCTL_MAGIC, uapi/linux/btrfs.h). */
const COMMAND = 1
const BTRFS_MAGIC = 0x94
/** The number of a 32-bit ioctl(2); of a 64-bit call that looks up no path. */
const IOCTL_32 = 54
/** What the kernel goes on with after a mount, in a thread of its own (fs/btrfs/dev-replace.c). */
const BTRFS_REPLACES = /^btrfs-devrepl\n$/

/** The print of calls by io_uring's workers, which have no registers of their own. */
const WORKER_PRINT = 1

/** Registers shown of a call: six arguments, stack pointer, program counter. */
const REGISTERS = 8
/** Of a thread outside of system calls, only the last two are shown. */
const REGISTERS_OUTSIDE = 2

const DIGITS_MAX = 10
const HEX_MAX = 16

const NEWLINE = 0x0a
const SPACE = 0x20
const MINUS = 0x2d
const ZERO = 0x30
const ONE = 0x31
const NINE = 0x39
const LETTER_A = 0x61
const LETTER_F = 0x66
const LETTER_X = 0x78

/** What the file says while the thread is not asleep. */
const RUNNING_LINE = Buffer.from('running')

/**
 * "257 0xffffff9c 0x7ffd... 0x80000 0x0 0x0 0x0 SP PC\n", or "-1 SP PC\n" outside of
 * a call, as proc_pid_syscall writes it (fs/proc/base.c). Anything else is garbage.
 * Read byte by byte, as it is for every open: a regular expression costs six times
 * as much.
 */
class SyscallLine {
  /** Of the call, or -1 outside of one. */
  number = -1
  /** How many registers there are. */
  registers = 0
  private readonly low = new Uint32Array(REGISTERS)
  private readonly high = new Uint32Array(REGISTERS)

  /**
   * @param length of the line, bytes; what follows may be left from another line
   * @returns whether the line is well-formed
   */
  read(line: Uint8Array, length: number): boolean {
    let at = this.readNumber(line)
    let count = 0
    while (at > 0 && isPrefix(line, at) && count < REGISTERS) at = this.readRegister(line, at + 3, count++)
    this.registers = count
    return at > 0 && line[at] === NEWLINE && at === length - 1 && (count === REGISTERS || count === REGISTERS_OUTSIDE)
  }

  /** The lower half of a register. */
  word(register: number): number {
    return this.low[register] as number
  }

  /** Whether a register is less than 2^32. */
  fits(register: number): boolean {
    return this.high[register] === 0
  }

  isZero(register: number): boolean {
    return this.low[register] === 0 && this.fits(register)
  }

  /** A hash of the line, never 0. */
  print(): number {
    let hash = this.number
    for (let i = 0; i < REGISTERS; i++) {
      hash = mixed(hash ^ (this.low[i] as number))
      hash = mixed(hash ^ (this.high[i] as number))
    }
    return hash === 0 ? 1 : hash
  }

  private readNumber(line: Uint8Array): number {
    if (line[0] === MINUS && line[1] === ONE) {
      this.number = -1
      return 2
    }
    let at = 0
    let number = 0
    for (; at < DIGITS_MAX; at++) {
      const code = line[at] as number
      if (!(code >= ZERO && code <= NINE)) break
      number = number * 10 + code - ZERO
    }
    this.number = number
    return at > 1 && line[0] === ZERO ? -1 : at
  }

  private readRegister(line: Uint8Array, start: number, register: number): number {
    let low = 0
    let high = 0
    let at = start
    for (; at < start + HEX_MAX; at++) {
      const digit = hexDigit(line[at] as number)
      if (digit < 0) break
      high = (high << 4) | (low >>> 28)
      low = (low << 4) | digit
    }
    this.low[register] = low
    this.high[register] = high
    return at > start ? at : -1
  }
}

/** Mixes the bits of a hash. */
function mixed(value: number): number {
  const product = Math.imul(value ^ (value >>> 15), 0x2c1b3c6d)
  return product ^ (product >>> 13)
}

function isRunning(line: Uint8Array): boolean {
  return line[0] === RUNNING_LINE[0] && RUNNING_LINE.every((byte, i) => line[i] === byte)
}

/** Whether " 0x" is there. */
function isPrefix(line: Uint8Array, at: number): boolean {
  return line[at] === SPACE && line[at + 1] === ZERO && line[at + 2] === LETTER_X
}

/** -1 for any other character; the kernel writes lower case. */
function hexDigit(code: number): number {
  if (code >= ZERO && code <= NINE) return code - ZERO
  return code >= LETTER_A && code <= LETTER_F ? code - LETTER_A + 10 : -1
}

type Syscalls = Pick<Native, 'readFile' | 'openFile' | 'readAgain' | 'close' | 'syscalls' | 'O_PATH'>

/** How many threads' files in /proc stay open. */
const FILES_MAX = 64
/** The same for `wchan`, if the kernel preempts itself. */
const WCHANS_MAX = 16

/**
 * The kernel's entry for 64-bit calls (x86-64, arm64); with FRED, which has one entry for all calls,
 * the function that handles 64-bit ones.
 */
const ENTERED_BY_64_BITS = /\b(?:entry_SYSCALL_64|do_syscall_64|el0t_64_sync)/
/** fs/namei.c: up to the last component, whose directory is locked after this. */
const IN_PATH_WALK = /\blink_path_walk\b/
/** A request to a FUSE filesystem is under way. */
const IN_FUSE = /\bfuse_/
/** This thread works on an io_uring request. */
const IN_IO_URING = /\b_*io_(?:issue|submit|wq_submit)_/

export class Intents {
  private readonly buffer = Buffer.alloc(256)
  private readonly stack = Buffer.alloc(8192)
  private readonly line = new SyscallLine()
  private readonly files: CachedFiles<number>
  private readonly wchans: CachedFiles<number>
  private asksFirst: boolean | undefined
  private readonly inspecting = new Map<number, Inspecting>()
  private readonly opening = new Map<number, readonly [pointer: number, flags: number]>()
  private readonly creat: number
  private readonly openByHandle: number
  private readonly ioUringEnter: number
  private readonly ioctl: number

  constructor(
    private readonly native: Syscalls,
    private readonly proc = '/proc',
    private readonly preempts: () => boolean = kernelPreempts,
  ) {
    this.files = new CachedFiles(native, (tid) => `${proc}/${tid}/syscall`, FILES_MAX)
    this.wchans = new CachedFiles(native, (tid) => `${proc}/${tid}/wchan`, WCHANS_MAX)
    const numbers = native.syscalls
    for (const [name, rule] of Object.entries(INSPECTING)) {
      const number = numbers[name]
      if (number !== undefined) this.inspecting.set(number, rule)
    }
    for (const [name, rule] of Object.entries(OPENING)) {
      const number = numbers[name]
      if (number !== undefined) this.opening.set(number, rule)
    }
    this.creat = numbers['creat'] ?? -1
    this.openByHandle = numbers['open_by_handle_at'] ?? -1
    this.ioUringEnter = numbers['io_uring_enter'] ?? -1
    this.ioctl = numbers['ioctl'] ?? -1
  }

  /** Closes the files that stay open for speed; they are opened again when needed. */
  close(): void {
    this.files.close()
    this.wchans.close()
  }

  /**
   * @param tid the thread whose request waits for our answer, never another one: reading the
   *   file of a thread that is not blocked in a request of ours may block
   * @param wary the caller may have arranged that reading blocks, so check first that it sleeps
   */
  of(tid: number, wary = false): Call {
    if (tid === 0) return UNSEEN
    for (let i = 0; i <= RUNNING_RETRIES; i++) {
      if (wary && !this.isOffQueue(tid)) continue
      const length = this.files.read(tid)
      if (length <= 0) return UNSEEN
      if (!isRunning(this.files.buffer)) return this.parse(tid, this.files.buffer, length)
    }
    return RUNNING
  }

  /**
   * Whether the thread is off the run queue; true in doubt. On a kernel that preempts itself, reading
   * /proc/TID/syscall waits for a thread that was preempted on its way to sleep (wait_task_inactive()).
   * Reading `wchan` never waits, and gives 0 for a thread on the run queue (get_wchan(), since 5.16); since 6.12 also
   * for a sleeping thread that stays there for a while because it has used more than its share.
   */
  private isOffQueue(tid: number): boolean {
    if (!(this.asksFirst ??= this.preempts() && this.tellsByWchan())) return true
    const length = this.wchans.read(tid)
    return length <= 0 || length > 1 || this.wchans.buffer[0] !== ZERO
  }

  /** Whether `wchan` can be read here: this process's pool threads are asleep, so theirs must not be 0. */
  private tellsByWchan(): boolean {
    try {
      return readdirSync(`${this.proc}/self/task`).some((tid) => this.wchans.read(Number(tid)) > 1)
    } catch {
      return false
    }
  }

  private parse(tid: number, bytes: Uint8Array, length: number): Call {
    const line = this.line
    if (!line.read(bytes, length)) return UNSEEN
    // A kernel thread, or an io_uring worker, which shows its creator's old registers.
    if (line.isZero(line.registers - 1)) {
      if (BTRFS_REPLACES.test(this.commOf(tid))) return { ...UNSEEN, setsTimes: true }
      return { ...UNSEEN, number: this.ioUringEnter, print: WORKER_PRINT }
    }
    if (line.registers !== REGISTERS) return UNSEEN
    const { number } = line
    const print = line.print()
    const opening = this.opening.get(number)
    const rule = this.inspecting.get(number)
    const pointer = opening?.[0] ?? rule?.pointer
    if (pointer === undefined || (line.fits(pointer) && !this.confirms(tid))) {
      return { ...UNSEEN, number, print, setsTimes: this.isForBtrfs(line) }
    }
    if (opening !== undefined) return this.parseOpen(line, print, opening[1])
    if (rule === undefined) throw new Error(`no rule for system call ${number}`)
    const says = (where: Inspecting['follow']) => where !== undefined && (line.word(where[0]) & where[1]) !== 0
    const { nofollow } = rule
    return {
      intent: 'inspect',
      number,
      print,
      keeps: rule.keeps === true,
      follows: nofollow === 'always' ? says(rule.follow) : !says(nofollow),
      shape: rule.shape === true,
      locks: rule.shape === true,
      blind: false,
      setsTimes: false,
      asks: false,
      userUs: -1,
      faults: -1,
    }
  }

  private isForBtrfs(line: SyscallLine): boolean {
    return (line.number === this.ioctl || line.number === IOCTL_32) && ((line.word(COMMAND) >>> 8) & 0xff) === BTRFS_MAGIC
  }

  private parseOpen(line: SyscallLine, print: number, flagsAt: number): Call {
    const { number } = line
    if (flagsAt < 0) return { ...someCall('open', number), print, keeps: true, follows: false, locks: true, blind: true }
    const flags = number === this.creat ? O_CREAT : line.word(flagsAt)
    const path = (flags & this.native.O_PATH) !== 0
    const shape = !path && (flags & O_CREAT) !== 0 && (flags & O_EXCL) !== 0
    return {
      // O_DIRECTORY: a device is none, so the open fails with ENOTDIR before it asks for anything else.
      intent: path || shape || (flags & O_DIRECTORY) !== 0 ? 'inspect' : 'open',
      number,
      print,
      // It has the file handle already.
      keeps: path || number === this.openByHandle,
      follows: (flags & O_NOFOLLOW) === 0,
      shape,
      locks: !path && (flags & O_CREAT) !== 0,
      blind: false,
      setsTimes: false,
      asks: false,
      userUs: -1,
      faults: -1,
    }
  }

  /**
   * Whether an open(2) that asks for the attributes is about to open the device. Its flags do not
   * matter: one with O_PATH would not ask.
   */
  isOpening(call: Call): boolean {
    return call.intent === 'open' || (call.intent === 'inspect' && this.opening.has(call.number))
  }

  /**
   * Whether the kernel's stack shows that a thread made a 64-bit call; false if it
   * cannot be read. Reading it costs nearly as much as an open.
   */
  confirms(tid: number): boolean {
    return ENTERED_BY_64_BITS.test(this.stackOf(tid))
  }

  /**
   * Whether a thread that asks for the root's attributes is on its way to a name in it, and
   * does not hold the directory's lock yet; false if unknown.
   */
  arrives(tid: number): boolean {
    return IN_PATH_WALK.test(this.stackOf(tid))
  }

  private stackOf(tid: number): string {
    const n = this.native.readFile(`${this.proc}/${tid}/stack`, this.stack)
    return this.stack.toString('latin1', 0, Math.max(0, n))
  }

  /** Whether it is io_uring's: its credentials may differ from its thread's. */
  isIoUring(call: Call): boolean {
    return call.number === this.ioUringEnter
  }

  /** Whether a caller can be seen leave its call. */
  isSeen(call: Call): boolean {
    return call.intent !== 'unknown' || call.print !== 0
  }

  /**
   * Whether the call may open the device by number after the kernel has forgotten the
   * inode. Not io_uring_enter: what it opens holds the inode, as with open(2).
   */
  outlastsInode(call: Call): boolean {
    return call.intent === 'unknown' && !this.isIoUring(call)
  }

  /** Whether {@link mayStillBeIn} needs the thread's stack. */
  wantsStack(call: Call): boolean {
    return this.isIoUring(call) || (call.print === 0 && call.intent === 'open')
  }

  /**
   * Whether a thread may still be in the call in which it was answered; true in
   * doubt. To be called after the attributes were invalidated: then a thread that is
   * seen elsewhere cannot be in another open(2) that needed no request.
   *
   * @param seen undefined if the thread is gone; with its stack if {@link wantsStack}
   */
  mayStillBeIn(call: Call, seen: SeenThread | undefined): boolean {
    if (seen === undefined) return false
    const [syscall, stack, state, memory] = seen
    // Late in an execve(2), or in exit: all other threads of the process have ended.
    if (syscall === '') return memory !== 0
    if (call.number === UNTIL_IT_ENDS) return true
    const ring = this.isIoUring(call)
    const bytes = Buffer.from(syscall, 'latin1')
    if (isRunning(bytes)) return ring || !leftCall(call, seen)
    const { line } = this
    if (!line.read(bytes, bytes.length)) return true
    if (ring) return stack === '' || IN_IO_URING.test(stack)
    if (line.registers !== REGISTERS) return false
    const opening = call.intent === 'open' && this.opening.has(line.number)
    if (call.print === 0) {
      // In some open(2). Before it has the device, it sleeps only in a request to us.
      if (opening) return state !== 'S' || stack === '' || IN_FUSE.test(stack)
      return line.number === call.number
    }
    if (line.print() === call.print) return true
    // In another open(2), of a FIFO for example (S); or in that of this device, waiting for memory (D).
    return opening && state === 'D'
  }

  /** Whether a thread calls itself a worker of systemd-udevd. */
  isUdevWorker(tid: number): boolean {
    return /^(\(udev-worker\)|systemd-udevd)\n$/.test(this.commOf(tid))
  }

  /**
   * Whether a thread belongs to a program that looks at this path and then goes on by another one: the device
   * must stay until then.
   */
  goesOn(tid: number, call: Call): boolean {
    return call.intent === 'inspect' && !call.shape && GOES_ON_BY_NAME.test(this.commOf(tid))
  }

  private commOf(tid: number): string {
    const n = this.native.readFile(`${this.proc}/${tid}/comm`, this.buffer)
    return this.buffer.toString('latin1', 0, Math.max(0, n))
  }

  /** Whether the caller is waited for until its process ends: that is soon, so it is looked at often. */
  endsSoon(call: Call): boolean {
    return call.number === UNTIL_IT_ENDS
  }
}

/**
 * Whether a running thread has left its call since it was first seen running: it has spent
 * time in user space, or caused a page fault there, and no call does
 * either between our answer and the open of the device.
 */
function leftCall(call: Call, [, , , , userUs, faults]: SeenThread): boolean {
  const first = call.faults < 0
  if (first) call.faults = faults
  if (call.userUs < 0) call.userUs = userUs
  return !first && (faults > call.faults || (userUs >= 0 && userUs > call.userUs))
}
