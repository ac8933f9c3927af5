// SPDX-License-Identifier: MIT
/** Mount points, mount options, and what is mounted where. */
import {
  chmodSync,
  closeSync,
  existsSync,
  lstatSync,
  mkdirSync,
  readlinkSync,
  openSync,
  readFileSync,
  readSync,
  realpathSync,
  statSync,
  unlinkSync,
} from 'node:fs'
import { basename, dirname, join, resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

import { afterTicks } from './clock.js'
import { errnoName, errnoOf, E, UserError } from './errno.js'
import type { Native, Poll } from '../native.js'

export const DEFAULT_MOUNTPOINT = '/dev/disk/by-diskseq'
/** Of sockets that only root can use. */
export const RUNTIME_DIRECTORY = '/run/diskseqfs'
export const SOURCE = 'diskseqfs'
export const FSTYPE = 'fuse.diskseqfs'

/** sys/mount.h */
const MS = {
  RDONLY: 1,
  NOSUID: 2,
  NOEXEC: 8,
  NOATIME: 1024,
  NODIRATIME: 2048,
  RELATIME: 1 << 21,
  STRICTATIME: 1 << 24,
} as const

/** Flags of every mount. */
export const ALWAYS = MS.NOSUID | MS.NOEXEC

/** Those a user may set. */
const FLAGS: Readonly<Record<string, number>> = {
  ro: MS.RDONLY,
  noatime: MS.NOATIME,
  nodiratime: MS.NODIRATIME,
  relatime: MS.RELATIME,
  strictatime: MS.STRICTATIME,
}

/** Options that say what is the case anyway, or are for mount(8) and systemd. */
const IGNORED = new Set(
  'rw,defaults,nosuid,noexec,dev,auto,noauto,nofail,_netdev,user,nouser,users,owner,group,silent,allow_other,default_permissions'.split(
    ',',
  ),
)

/** Labels for security modules: a FUSE mount has one for all its nodes. */
const LABELS = ['context', 'fscontext', 'defcontext', 'rootcontext']

export interface MountOptions {
  /** For mount(2). */
  readonly flags: number
  readonly labels: readonly string[]
  /** `key=value` that are options of this program, as its command line spells them. */
  readonly own: ReadonlyMap<string, string>
}

/**
 * @param text what follows `-o`, comma-separated; a quoted value may hold commas
 * @param own names of options that belong to this program
 * @throws UserError for an option that is unknown or would make the tree unusable
 */
export function parseMountOptions(text: string, own: readonly string[]): MountOptions {
  let flags: number = ALWAYS
  const labels: string[] = []
  const found = new Map<string, string>()
  for (const option of text.match(/(?:[^,"]|"[^"]*")+/g) ?? []) {
    const at = option.indexOf('=')
    const key = at < 0 ? option : option.slice(0, at)
    const value = at < 0 ? undefined : option.slice(at + 1)
    if (key === 'nodev') {
      throw new UserError('mount option nodev: no device could be opened through such a mount; remove it', 2)
    }
    if (key === 'suid' || key === 'exec') {
      throw new UserError(`mount option ${key}: the tree is always mounted no${key}; remove it`, 2)
    }
    if (LABELS.includes(key) && value !== undefined) labels.push(option)
    else if (own.includes(key) && value !== undefined) found.set(key, value)
    else if (value === undefined && Object.hasOwn(FLAGS, key)) flags |= FLAGS[key] as number
    else if (!IGNORED.has(key) && !key.startsWith('x-') && key !== 'comment') {
      throw new UserError(`mount option ${option}: not known; see diskseqfs mount --help`, 2)
    }
  }
  return { flags, labels, own: found }
}

/** The data string for mount(2) of a FUSE filesystem on an open /dev/fuse. */
export function mountData(fuseFd: number, options: MountOptions): string {
  return [
    `fd=${fuseFd}`,
    'rootmode=40000',
    'user_id=0',
    'group_id=0',
    // Without it the kernel checks no permission at all when a block node is opened.
    'default_permissions',
    'allow_other',
    ...options.labels,
  ].join(',')
}

export interface MountEntry {
  readonly id: number
  /** Of the filesystem, "0:53". */
  readonly device: string
  readonly target: string
  readonly type: string
  readonly source: string
  /** Of the mount and of the filesystem, separated by commas. */
  readonly options: string
}

const MOUNTINFO = '/proc/self/mountinfo'

/**
 * Calls back once a mount is gone from this mount namespace. A filesystem that
 * is held otherwise (as this daemon's is, by the descriptor it prunes with)
 * does not end with its mount, so FUSE would not tell.
 */
export class MountWatch {
  private readonly fd = openSync(MOUNTINFO, 'r')
  private readonly poll: Poll
  private readonly first: NodeJS.Immediate

  constructor(native: Pick<Native, 'Poll'>, id: number, gone: () => void) {
    const line = new RegExp(`^${id} `, 'm')
    const look = () => {
      if (!line.test(this.read())) gone()
    }
    // proc(5): a change of the mount table marks the file with POLLERR and POLLPRI.
    this.poll = new native.Poll(this.fd, look, true)
    // What changed before the event loop came to wait for it was not reported.
    this.first = setImmediate(look)
  }

  /** Through the descriptor that is open: there may be no other left. */
  private read(): string {
    const piece = Buffer.alloc(65536)
    let text = ''
    for (let at = 0, n = 0; (n = readSync(this.fd, piece, 0, piece.length, at)) > 0; at += n) text += piece.toString('latin1', 0, n)
    return text
  }

  close(): void {
    clearImmediate(this.first)
    this.poll.close()
    closeSync(this.fd)
  }
}

/** What is mounted at a path, topmost last. */
export function mountsAt(path: string): MountEntry[] {
  const entries: MountEntry[] = []
  for (const line of readFileSync(MOUNTINFO, 'utf8').split('\n')) {
    const fields = line.split(' ')
    const separator = fields.indexOf('-')
    if (separator < 0) continue
    const target = unescapeOctal(fields[4] ?? '')
    if (target !== path) continue
    entries.push({
      id: Number(fields[0]),
      device: fields[2] ?? '',
      target,
      type: fields[separator + 1] ?? '',
      source: unescapeOctal(fields[separator + 2] ?? ''),
      options: `${fields[5]},${fields[separator + 3]}`,
    })
  }
  return entries
}

/** The kernel's lists of mounts and swap write blanks and the like as \040. */
export function unescapeOctal(text: string): string {
  return text.replace(/\\([0-7]{3})/g, (_, digits: string) => String.fromCharCode(Number.parseInt(digits, 8)))
}

/** sys/mount.h */
const MNT_FORCE = 1
const MNT_DETACH = 2

/**
 * Takes a mount away, busy or not; 0, or an errno.
 *
 * @param abort ends the FUSE connection, too: requests that wait fail
 */
export function detach(native: Pick<Native, 'unmount'>, path: string, abort = false): Promise<number> {
  return new Promise((resolve) => native.unmount(path, abort ? MNT_DETACH | MNT_FORCE : MNT_DETACH, resolve))
}

/** How long to wait for the daemon of a mount, ms. */
const TIME_LIMIT_MS = 5000

/**
 * Whether the daemon behind the mount of a tree is gone: each call fails with ENOTCONN.
 *
 * @throws UserError if it is there and does not answer
 */
export function isDead(native: Pick<Native, 'look'>, path: string): Promise<boolean> {
  return new Promise((resolve, reject) => {
    const late = () => reject(new UserError(`${path}: the daemon that serves it does not answer`))
    const inTime = afterTicks(TIME_LIMIT_MS, late)
    // A name that no disk has: the kernel asks for it each time, and remembers the directory's attributes for an hour.
    native.look(join(path, '0'), (error) => {
      inTime()
      resolve(error === E.ENOTCONN)
    })
  })
}

/**
 * The mount point's path without symlinks, made if it is missing.
 * Never touches what is mounted there already: that may be a dead mount.
 *
 * @throws UserError where it cannot be one
 */
export function prepareMountpoint(path: string): string {
  const absolute = withoutSymlinks(path)
  if (mountsAt(absolute).length > 0) return absolute
  try {
    makeDirectory(absolute)
    const real = realpathSync(absolute)
    if (!statSync(real).isDirectory()) {
      throw new UserError(`${path}: not a directory; choose a directory to mount at`)
    }
    return real
  } catch (error) {
    if (error instanceof UserError) throw error
    const errno = errnoOf(error)
    if (errno === E.EEXIST || errno === E.ENOTDIR) {
      throw new UserError(`${path}: not a directory; choose a directory to mount at`)
    }
    throw new UserError(`${path}: cannot be made a mount point: ${errnoName(errno)}; choose another directory`)
  }
}

/**
 * Where locks of mount points are. It is root's alone, as the locks are: whoever can
 * open something, such as a mount point that nothing is mounted at, can hold a lock on it.
 */
const LOCKS = '/run/diskseqfs'
/**
 * A daemon that is about to end may still have the lock. Attempts, and the time between two, ms: a second or more, as
 * attempts take longer on a busy machine, where that daemon takes longer, too.
 */
const LOCK_TRIES = 100
const LOCK_RETRY_MS = 10

/**
 * Of the directory beneath the mount, not of its path, which may be another one in
 * another mount namespace; and of this namespace, as in another one that directory may
 * have a daemon of its own, whose mount is not to be seen here.
 */
function lockFile(path: string): string {
  const { dev, ino } = statSync(path, { bigint: true })
  return join(LOCKS, `${dev}:${ino}@${statSync('/proc/self/ns/mnt').ino}.lock`)
}

/**
 * Keeps other daemons from a mount point where nothing is mounted, from before there
 * is a mount until there is none any more.
 *
 * @returns a descriptor, for {@link unlockMountpoint}
 * @throws UserError where another daemon has it
 */
export async function lockMountpoint(native: Pick<Native, 'lockFile'>, path: string): Promise<number> {
  const file = lockFile(path)
  try {
    mkdirSync(LOCKS, { mode: 0o700, recursive: true })
  } catch (error) {
    throw new UserError(`cannot make ${LOCKS}, where mount points are locked: ${errnoName(errnoOf(error))}`)
  }
  for (let tries = 1; ; tries++, await sleep(LOCK_RETRY_MS)) {
    const fd = native.lockFile(file)
    if (fd >= 0) return fd
    if (fd === -E.EPERM) throw new UserError(`${file}: others than root can open it, so it is no lock; remove it`)
    if (fd !== -E.EAGAIN) throw new UserError(`${path}: cannot be locked: ${errnoName(fd)} from ${file}`)
    if (mountsAt(path).length > 0) throw new UserError(`${path}: already served by another diskseqfs`)
    if (tries === LOCK_TRIES) throw new UserError(`${path}: another diskseqfs is starting there; it has locked ${file}`)
  }
}

/** Also for other processes that have the descriptor. */
export function unlockMountpoint(native: Pick<Native, 'unlock'>, fd: number): void {
  try {
    // No process can get the lock meanwhile, and one that gets it afterwards sees that the file is gone.
    const file = readlinkSync(`/proc/self/fd/${fd}`)
    if (dirname(file) === LOCKS && file.endsWith('.lock')) unlinkSync(file)
  } catch (error) {
    errnoOf(error) // a file that is left does no harm
  }
  native.unlock(fd)
}

/** With all above it. (Node's recursive mkdir says ENOENT where a filesystem is read-only.) */
function makeDirectory(path: string): void {
  if (existsSync(path)) return
  if (dirname(path) !== path) makeDirectory(dirname(path))
  mkdirSync(path)
  // Others are to get in, whatever the umask of a service is.
  chmodSync(path, 0o755)
}

/** Links in the kernel's own lookup, fs/namei.c: MAXSYMLINKS. */
const SYMLINKS_MAX = 40

/** Resolves symlinks without a look at what is mounted there: it may be dead, and any look fails. */
export function withoutSymlinks(path: string): string {
  let absolute = resolve(path)
  try {
    for (let i = 0; i < SYMLINKS_MAX; i++) {
      absolute = join(realpathSync(dirname(absolute)), basename(absolute))
      if (mountsAt(absolute).length > 0 || !lstatSync(absolute).isSymbolicLink()) break
      absolute = resolve(dirname(absolute), readlinkSync(absolute))
    }
  } catch (error) {
    errnoOf(error)
  }
  return absolute
}
