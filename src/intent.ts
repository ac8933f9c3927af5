/**
 * What the calling thread is doing: inspecting a node, or opening it. The
 * kernel sends the same LOOKUP for both, but while we hold it the caller is
 * blocked in its system call, and /proc/TID/syscall shows which one.
 */
import { constants } from 'node:fs'

import { E } from './errno.js'
import { KeptFiles } from './kept.js'
import type { Native } from './native.js'

/**
 * - `inspect`: cannot open the device, whatever we answer
 * - `open`: an open(2); it holds the inode from our answer until it is done
 * - `unknown`: may open the device by number, even after it let go of the
 *   inode: mount(2), a device-mapper table, io_uring, a caller we cannot see
 */
export type Intent = 'inspect' | 'open' | 'unknown'

/** A system call under way. */
export interface Call {
  readonly intent: Intent
  /** Its number, or -1 where it is not known. */
  readonly number: number
}

const UNKNOWN: Call = { intent: 'unknown', number: -1 }

/**
 * The caller has sent its request and has not gone to sleep yet: somebody else
 * got the processor in between. It goes to sleep as soon as it has it back.
 */
export const RUNNING: Call = { intent: 'unknown', number: -1 }

/** Times to read again at once while the caller has not gone to sleep yet. */
const RUNNING_RETRIES = 8

/**
 * Calls that cannot open what a node stands for. Those that change its owner,
 * mode, times or xattrs are among them: the change itself is a request of its
 * own, which is pinned whoever makes it.
 */
const INSPECTING = [
  'stat',
  'lstat',
  'fstat',
  'newfstatat',
  'statx',
  'readlink',
  'readlinkat',
  'access',
  'faccessat',
  'faccessat2',
  'getxattr',
  'lgetxattr',
  'fgetxattr',
  'getxattrat',
  'listxattr',
  'llistxattr',
  'flistxattr',
  'listxattrat',
  'statfs',
  'fstatfs',
  'inotify_add_watch',
  'name_to_handle_at',
  'chmod',
  'fchmod',
  'fchmodat',
  'fchmodat2',
  'chown',
  'lchown',
  'fchown',
  'fchownat',
  'utime',
  'utimes',
  'futimesat',
  'utimensat',
  'setxattr',
  'lsetxattr',
  'fsetxattr',
  'setxattrat',
  'removexattr',
  'lremovexattr',
  'fremovexattr',
  'removexattrat',
  'mkdir',
  'mkdirat',
  'mknod',
  'mknodat',
  'symlink',
  'symlinkat',
  'link',
  'linkat',
  'rename',
  'renameat',
  'renameat2',
  'unlink',
  'unlinkat',
  'rmdir',
]

/** Registers shown of a call: six arguments, stack pointer, program counter. */
const REGISTERS = 8
const PC = REGISTERS - 1
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

type Syscalls = Pick<
  Native,
  'readFile' | 'openFile' | 'readAgain' | 'close' | 'syscalls' | 'O_PATH'
>

/** Threads whose file in /proc is kept open. */
const FILES_MAX = 64

export class Intents {
  private readonly buffer = Buffer.alloc(256)
  private readonly line = new SyscallLine()
  private readonly files: KeptFiles<number>
  private readonly inspecting: ReadonlySet<number>
  /** Number of an opening call -> index of its flags; -1 where they are out of sight. */
  private readonly opening: ReadonlyMap<number, number>
  /** open(2) flags with which no device is ever opened. */
  private readonly harmless: number
  private readonly ioUringEnter: number

  constructor(
    private readonly native: Syscalls,
    private readonly proc = '/proc',
  ) {
    this.files = new KeptFiles(native, (tid) => `${proc}/${tid}/syscall`, FILES_MAX)
    const numbers = native.syscalls
    this.inspecting = new Set(
      INSPECTING.map((name) => numbers[name]).filter((number) => number !== undefined),
    )
    const opening = new Map<number, number>()
    for (const [name, flags] of [
      ['open', 1],
      ['openat', 2],
      ['openat2', -1],
      ['creat', -1],
    ] as const) {
      const number = numbers[name]
      if (number !== undefined) opening.set(number, flags)
    }
    this.opening = opening
    // O_DIRECTORY: a block node is no directory, so the open fails with ENOTDIR.
    this.harmless = native.O_PATH | constants.O_DIRECTORY
    this.ioUringEnter = numbers['io_uring_enter'] ?? -1
  }

  /** Lets go of the files that are kept open; whoever asks again has them opened again. */
  close(): void {
    this.files.close()
  }

  /** @param tid the thread of the request being held */
  of(tid: number): Call {
    if (tid === 0) return UNKNOWN
    for (let i = 0; i <= RUNNING_RETRIES; i++) {
      const length = this.files.read(tid)
      if (length <= 0) return UNKNOWN
      if (!isRunning(this.files.buffer)) return this.parse(this.files.buffer, length)
    }
    return RUNNING
  }

  /**
   * Whether a thread may still be inside the call it was seen in. True in
   * doubt, except that a thread which is gone, or in another call, is out of
   * it for sure.
   */
  mayStillBeIn(tid: number, number: number): boolean {
    const n = this.native.readFile(`${this.proc}/${tid}/syscall`, this.buffer)
    if (n === -E.ENOENT || n === -E.ESRCH) return false
    const { line } = this
    return !line.read(this.buffer, n) || number === -1 || line.number === number
  }

  /**
   * Whether the device may still be opened by number while the caller stays in
   * this call, though the inode is gone already. Not so for io_uring_enter,
   * which may last for ever: what it opens holds the inode, as open(2) does.
   */
  outlastsInode(call: Call): boolean {
    return call.intent === 'unknown' && call.number !== -1 && call.number !== this.ioUringEnter
  }

  /** Whether a thread calls itself a worker of systemd-udevd. */
  isUdevWorker(tid: number): boolean {
    const n = this.native.readFile(`${this.proc}/${tid}/comm`, this.buffer)
    return /^(\(udev-worker\)|systemd-udevd)\n$/.test(this.buffer.toString('latin1', 0, Math.max(0, n)))
  }

  private parse(line: Uint8Array, length: number): Call {
    const found = this.line
    // Code of a 32-bit task lies below 4 GiB, and there the same number means another
    // call (i386 21 is mount, x86-64 21 is access). Code of 64-bit tasks that lies
    // there, too, is taken for unknown.
    if (!found.read(line, length) || found.registers !== REGISTERS || found.fits(PC)) return UNKNOWN
    const { number } = found
    if (this.inspecting.has(number)) return { intent: 'inspect', number }
    const flagsAt = this.opening.get(number)
    if (flagsAt === undefined) return { intent: 'unknown', number }
    const flags = flagsAt < 0 ? 0 : found.word(flagsAt)
    return { intent: (flags & this.harmless) !== 0 ? 'inspect' : 'open', number }
  }
}
