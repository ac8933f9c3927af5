// SPDX-License-Identifier: MIT
/**
 * What the calling thread is doing: inspecting an inode, or opening it. The
 * kernel sends the same LOOKUP for both, but while we hold it the caller is
 * blocked in its system call, and /proc/TID/syscall shows which one.
 *
 * What it shows can be made up. A 64-bit program may make 32-bit calls (int 0x80),
 * whose numbers mean something else (64-bit 5 is fstat, 32-bit 5 is open), and has all
 * registers to itself. So:
 *
 * - a number is believed beside a path that lies above 4 GiB, which no 32-bit call
 *   takes; beside any other only if the kernel's own stack shows how it was entered
 *   ({@link Intents.confirms}). That is right for every program that means no harm;
 * - of users who might mean harm the stack is looked at wherever a lie would get them
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

/** A system call under way; or one in which somebody was answered, until it is seen out of it. */
export interface Call {
  readonly intent: Intent
  /** Its number, or -1 where it is not known. */
  readonly number: number
  /** Tells this call from others of the thread; 0 where it is not known. */
  readonly print: number
  /** It may leave the caller with the inode, through which it opens the device later without asking for the name. */
  readonly keeps: boolean
  /** It follows a symlink at the end of the path. */
  readonly follows: boolean
  /** It would change the shape of the tree, or fail with EEXIST: it cannot succeed. */
  readonly shape: boolean
  /** It has the directory's lock for itself while the kernel asks for the name, or may have. */
  readonly locks: boolean
  /** An open(2) whose flags are out of sight: it may be O_PATH. */
  readonly blind: boolean
  /**
   * The kernel may set the times of the inode that it finds, without asking: that inode must not be one of ours. btrfs does
   * so (update_dev_time()), and FUSE, writing the inode back, reads what only its regular files have: the kernel
   * crashes (fuse_write_inode(); seen with 6.12).
   */
  readonly setsTimes: boolean
  /** It was told of an inode that is not pinned, and must ask for the attributes before it opens it. */
  asks: boolean
  /**
   * What the thread had spent outside of the kernel when it was first seen running, us, and
   * its page faults; -1 before that.
   */
  userUs: number
  faults: number
}

/** A call of which no more is known than what it is for, and its number if that. */
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

/** In place of the number of a call: until its process ends. */
const UNTIL_IT_ENDS = -3

/** Of a program that has looked at a path, and goes on by another: see {@link Intents.goesOn}. */
export const GOING_ON: Call = { ...someCall('unknown', UNTIL_IT_ENDS), print: 2, keeps: false, locks: false }

/**
 * Programs that look at a path which ends in the kernel's name, look up in sysfs what that
 * device is called, and go on by /dev/mapper/NAME: libmount's, systemd's helpers, and others that do the same. As in
 * /proc/TID/comm, which has 15 characters. None of them runs for ever.
 */
const GOES_ON_BY_NAME =
  /^(?:u?mount|mount\.[\w.-]+|swapo(?:n|ff)|fsck|systemd-(?:fsck|makefs|growfs|mount|cryptse)|(?:mkfs\.)?btrfs|btrfs-convert|(?:low)?ntfs-3g)\n$/

/** Nothing is known of the caller: it may do anything, and when it is done is not seen. */
export const UNSEEN = someCall('unknown')

/**
 * The caller has sent its request and has not gone to sleep yet: somebody else
 * got the processor in between. It goes to sleep as soon as it has it back.
 */
export const RUNNING = someCall('unknown')

/** Times to read again at once while the caller has not gone to sleep yet. */
const RUNNING_RETRIES = 8

const { O_CREAT, O_DIRECTORY, O_EXCL, O_NOFOLLOW } = constants
/** uapi/linux/fcntl.h */
const AT_SYMLINK_NOFOLLOW = 0x100
const AT_SYMLINK_FOLLOW = 0x400
/** uapi/linux/inotify.h, fanotify.h, fs.h */
const IN_DONT_FOLLOW = 0x0200_0000
const FAN_MARK_DONT_FOLLOW = 0x4
const UMOUNT_NOFOLLOW = 0x8

/** A call that cannot open what an inode stands for. */
interface Inspecting {
  /** Which argument is a pointer that it cannot do without. */
  readonly pointer: number
  /** Where it stands whether it follows symlinks: at an index, these bits say no; or never. */
  readonly nofollow?: readonly [index: number, bits: number] | 'always'
  /** Bits that say it does, where it does not otherwise. */
  readonly follow?: readonly [index: number, bits: number]
  readonly keeps?: true
  readonly shape?: true
}

/**
 * Those that change owner, mode, times or xattrs are among them: the change itself
 * is a request of its own, which is pinned whoever makes it.
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

/** open(2) and its kind: where the pointer is, and the flags (-1: out of sight). */
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

/** In place of what tells the call of a worker of io_uring from others: it has none. */
const WORKER_PRINT = 1

/** Registers shown of a call: six arguments, stack pointer, program counter. */
const REGISTERS = 8
/** Of a thread that is in no call: the last two. */
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

/** What the file says of a thread that does not sleep. */
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
  /** How many there were. */
  registers = 0
  private readonly low = new Uint32Array(REGISTERS)
  private readonly high = new Uint32Array(REGISTERS)

  /**
   * @param length of the line, bytes; what is behind it may be of another
   * @returns whether it is no garbage
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

  /** One number of all that is in the line: the same call, and nothing else, has the same. Never 0. */
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

/** Another number for each number; what differs in its high bits only differs in all. */
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

/** -1 where that character is none; the kernel writes lower case. */
function hexDigit(code: number): number {
  if (code >= ZERO && code <= NINE) return code - ZERO
  return code >= LETTER_A && code <= LETTER_F ? code - LETTER_A + 10 : -1
}

type Syscalls = Pick<Native, 'readFile' | 'openFile' | 'readAgain' | 'close' | 'syscalls' | 'O_PATH'>

/** Threads whose file in /proc is kept open. */
const FILES_MAX = 64
/** The same of the file that tells whether it sleeps; where the kernel preempts itself. */
const WCHANS_MAX = 16

/**
 * How the kernel was entered: by an instruction that makes 64-bit calls only (x86-64,
 * arm64), or what handles no others (x86-64 with FRED, which has one entry for all).
 */
const ENTERED_BY_64_BITS = /\b(?:entry_SYSCALL_64|do_syscall_64|el0t_64_sync)/
/** fs/namei.c: up to the last component, whose directory is locked after this. */
const IN_PATH_WALK = /\blink_path_walk\b/
/** A request of a FUSE filesystem is. */
const IN_FUSE = /\bfuse_/
/** A request of io_uring is under way in this thread. */
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

  /** Lets go of the files that are kept open; whoever asks again has them opened again. */
  close(): void {
    this.files.close()
    this.wchans.close()
  }

  /**
   * @param tid the thread of the request being held. Of no other: the file of a thread
   *   that is not blocked in a request of ours may block whoever reads it
   * @param wary it may have been arranged that this one's does, so that it is looked first whether it sleeps
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
   * In doubt it is. A kernel that preempts itself has whoever reads what a thread is doing wait
   * for one that is on its way to sleep and has been preempted there (wait_task_inactive()).
   * For `wchan` it never waits, and says 0 of a thread on the run queue (get_wchan(), since 5.16). It also
   * says so of one that sleeps and is left there for a while, as it has had more than its share (since 6.12).
   */
  private isOffQueue(tid: number): boolean {
    if (!(this.asksFirst ??= this.preempts() && this.tellsByWchan())) return true
    const length = this.wchans.read(tid)
    return length <= 0 || length > 1 || this.wchans.buffer[0] !== ZERO
  }

  /** Whether that can be read here: of the threads of this process, those of the pool are asleep. */
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
    // No program's thread: the kernel's, or a worker of io_uring, with what else its maker had in its registers.
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
      // It has the handle already.
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
   * Whether an open(2) that asks for the attributes is about to open: whatever its flags
   * say, as one with O_PATH would not ask.
   */
  isOpening(call: Call): boolean {
    return call.intent === 'open' || (call.intent === 'inspect' && this.opening.has(call.number))
  }

  /**
   * Whether the kernel's stack shows that a thread made a 64-bit call; false where it
   * cannot be read. It costs as much as an open does, nearly.
   */
  confirms(tid: number): boolean {
    return ENTERED_BY_64_BITS.test(this.stackOf(tid))
  }

  /**
   * Whether a thread that asks for the attributes of the root is on its way to a name in it, and
   * holds no lock of the directory yet; false where that is not known.
   */
  arrives(tid: number): boolean {
    return IN_PATH_WALK.test(this.stackOf(tid))
  }

  private stackOf(tid: number): string {
    const n = this.native.readFile(`${this.proc}/${tid}/stack`, this.stack)
    return this.stack.toString('latin1', 0, Math.max(0, n))
  }

  /** Its credentials may be others than those of its thread. */
  isIoUring(call: Call): boolean {
    return call.number === this.ioUringEnter
  }

  /** Whether a caller can be seen leave its call. */
  isSeen(call: Call): boolean {
    return call.intent !== 'unknown' || call.print !== 0
  }

  /**
   * Whether the device may still be opened by number while the caller stays in
   * this call, though the inode is gone already. Not so for io_uring_enter:
   * what it opens holds the inode, as open(2) does.
   */
  outlastsInode(call: Call): boolean {
    return call.intent === 'unknown' && !this.isIoUring(call)
  }

  /** Whether {@link mayStillBeIn} needs the thread's stack. */
  wantsStack(call: Call): boolean {
    return this.isIoUring(call) || (call.print === 0 && call.intent === 'open')
  }

  /**
   * Whether a thread may still be inside the call in which it was answered; true in
   * doubt. To be asked when no attributes are valid any more: then a thread that
   * is seen elsewhere cannot be in another open(2) that did not ask.
   *
   * @param seen undefined if it is gone; with its stack if {@link wantsStack}
   */
  mayStillBeIn(call: Call, seen: SeenThread | undefined): boolean {
    if (seen === undefined) return false
    const [syscall, stack, state, memory] = seen
    // An execve(2) that has got so far, or an exit: all other threads of the process have ended.
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
      // In an open(2), whichever. Before it has the device it sleeps like this in a request of ours only.
      if (opening) return state !== 'S' || stack === '' || IN_FUSE.test(stack)
      return line.number === call.number
    }
    if (line.print() === call.print) return true
    // In another open(2): of a FIFO, say (S); or of this device, out of memory.
    return opening && state === 'D'
  }

  /** Whether a thread calls itself a worker of systemd-udevd. */
  isUdevWorker(tid: number): boolean {
    return /^(\(udev-worker\)|systemd-udevd)\n$/.test(this.commOf(tid))
  }

  /**
   * Whether a thread that looks at a path is of a program that then goes on by another one: what it has seen
   * must stay what it is until then.
   */
  goesOn(tid: number, call: Call): boolean {
    return call.intent === 'inspect' && !call.shape && GOES_ON_BY_NAME.test(this.commOf(tid))
  }

  private commOf(tid: number): string {
    const n = this.native.readFile(`${this.proc}/${tid}/comm`, this.buffer)
    return this.buffer.toString('latin1', 0, Math.max(0, n))
  }

  /** Whether a caller is waited for until its process ends, which is soon: to be looked at often. */
  endsSoon(call: Call): boolean {
    return call.number === UNTIL_IT_ENDS
  }
}

/**
 * Whether a thread that runs has been out of its call since it was first seen running: it
 * has spent time outside of the kernel, or touched memory of its own, which no call
 * does between our answer and the open of the device.
 */
function leftCall(call: Call, [, , , , userUs, faults]: SeenThread): boolean {
  const first = call.faults < 0
  if (first) call.faults = faults
  if (call.userUs < 0) call.userUs = userUs
  return !first && (faults > call.faults || (userUs >= 0 && userUs > call.userUs))
}
