// SPDX-License-Identifier: MIT
/**
 * Opening a disk, by whatever names it, without a daemon: what was opened is verified on the
 * descriptor. While that is open, the kernel gives the device's number to no other disk.
 */
import { constants, fstat, open as openCallback, realpathSync } from 'node:fs'
import { stat as statPath } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { promisify } from 'node:util'

import { mangledDmName, type ParsedName, nodeName, parseName, sameDmName } from '../devices/names.js'
import { type Device, parseDevice, sameDevice, Sysfs } from '../devices/sysfs.js'
import { native } from '../native.js'
import { E, ENOMEDIUM, errnoName, errnoOf, UserError } from '../util/errno.js'
import { printable } from '../util/text.js'
import { type DiskInfo, infoOf } from './info.js'

/** How a disk is opened. */
export interface OpenOptions {
  /** For writing as well. */
  readonly write?: boolean
  /** Fails with EBUSY while somebody else has the device, or what is on it, for itself (O_EXCL): a mount, another exclusive opener. */
  readonly exclusive?: boolean
  /** Past the page cache (O_DIRECT). */
  readonly direct?: boolean
  /** Ends the wait for a disk that does not answer. The open itself goes on, and what it gives is closed. */
  readonly signal?: AbortSignal
}

/** Why a disk could not be opened. */
export class DiskError extends UserError {
  /** `DiskError` */
  override readonly name = 'DiskError'
  constructor(
    message: string,
    /** The errno's name; `ENOENT` where there is no such disk, `ESTALE` where it became another one meanwhile. */
    readonly code: string,
    /** The disk that was asked for, where it was asked for by number. */
    readonly diskseq?: bigint,
  ) {
    super(message)
  }
}

/** An open disk or partition. */
export class Disk implements DiskInfo, AsyncDisposable {
  readonly name: string
  readonly path: string
  readonly diskseq: bigint
  readonly partition: number
  readonly majmin: string
  readonly kname: string
  private closed = false

  /** @internal */
  constructor(
    /** Close-on-exec; closed by {@link close}. */
    readonly fd: number,
    /** What it was verified to be. */
    info: DiskInfo,
  ) {
    this.name = info.name
    this.path = info.path
    this.diskseq = info.diskseq
    this.partition = info.partition
    this.majmin = info.majmin
    this.kname = info.kname
  }

  /** Returns when the kernel has closed it, which for the last user of a device may take a while. */
  close(): Promise<void> {
    if (this.closed) return Promise.resolve()
    this.closed = true
    return new Promise((resolve) => native.closeDevice(this.fd, resolve))
  }

  /** Closes it at the end of a block (`await using`). */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }
}

/** How often a disk that turned out to be another one is looked for again. */
const TRIES_MAX = 4

const sysfs = new Sysfs(native)
const openFile = promisify(openCallback)
const stat = promisify(fstat)

/**
 * Opens a disk or partition.
 *
 * @param what its name in the tree (`13`, `13p1`, `13-part1`), a path, `MAJOR:MINOR`, a kernel name, or a device-mapper name
 * @throws DiskError
 */
export async function open(what: string, options: OpenOptions = {}): Promise<Disk> {
  options.signal?.throwIfAborted()
  const opening = openReadable(what).then((disk) => reopen(disk, options))
  const { signal } = options
  if (signal === undefined) return opening
  return new Promise((resolve, reject) => {
    const aborted = () => {
      opening.then((disk) => disk.close()).catch(() => {})
      reject(signal.reason as Error)
    }
    signal.addEventListener('abort', aborted, { once: true })
    opening.then(resolve, reject).finally(() => signal.removeEventListener('abort', aborted))
  })
}

/**
 * Which disk something leads to now: opens it, verifies it, and closes it again. From then on only `name`, `path`
 * and `diskseq` are certain.
 *
 * @param what as of {@link open}
 * @throws DiskError
 */
export async function resolve(what: string, options: Pick<OpenOptions, 'signal'> = {}): Promise<DiskInfo> {
  const disk = await open(what, options)
  const { name, path, diskseq, partition, majmin, kname } = disk
  await disk.close()
  return { name, path, diskseq, partition, majmin, kname }
}

async function openReadable(what: string): Promise<Disk> {
  const name = parseName(what)
  return name === undefined ? openBy(locate(what)) : openNamed(name)
}

// By diskseq

async function openNamed({ diskseq, partition }: ParsedName): Promise<Disk> {
  const name = nodeName(diskseq, partition)
  const fail = (message: string, code: string): never => {
    throw new DiskError(message, code, diskseq)
  }
  for (let tries = 0; tries < TRIES_MAX; tries++) {
    const device = (await devices()).find((device) => device.name === name)
    if (device === undefined) break
    const { error, disk } = await openDevice(device)
    if (disk !== undefined) return disk
    // Not bound any more, or gone, or another one by now.
    if (error === 0 || error === E.ENXIO || error === E.ENOENT || error === E.ENODEV) continue
    return fail(describe(error), errnoName(error))
  }
  return fail(partition === 0 ? 'no disk has this number now' : 'no partition has this name now', 'ENOENT')
}

/** @internal */
export function cannotRead(errno: number): DiskError {
  const hint = errno === E.ENOENT ? '; is sysfs mounted at /sys?' : ''
  return new DiskError(`cannot read ${sysfs.classDirectory}: ${errnoName(errno)}${hint}`, errnoName(errno))
}

/**
 * What sysfs shows now.
 *
 * @internal
 */
export function devices(): Promise<Device[]> {
  return new Promise((resolve, reject) => {
    sysfs.scan((error, found) => {
      if (error === 0) resolve(found)
      else reject(cannotRead(error))
    })
  })
}

/** @returns `error` 0 without a disk where the device's node led to another one */
async function openDevice(device: Device, nodes = -1): Promise<{ error: number; disk?: Disk }> {
  const directory = native.openDirectory('/dev')
  if (directory < 0) return { error: -directory }
  try {
    return await new Promise((resolve) => {
      native.openDevice(directory, device.devname, constants.O_RDONLY, device.loop, nodes, (error, fd, major, minor, diskseq, uevent) => {
        if (error !== 0) return resolve({ error })
        const found = parseDevice(device.kname, uevent)
        const same = found !== undefined && sameDevice(found, device) && diskseq === device.diskseq
        if (same && major === device.major && minor === device.minor) return resolve({ error: 0, disk: new Disk(fd, infoOf(device)) })
        native.closeDevice(fd, () => resolve({ error: 0 }))
      })
    })
  } finally {
    native.close(directory)
  }
}

// By any other name

/** What to open, and what the open device must then turn out to be. */
interface Target {
  readonly path: string
  readonly majmin?: string
  readonly kname?: string
  readonly dmName?: string
}

function locate(argument: string): Target {
  if (argument === '') throw new DiskError('an empty argument names no device', 'EINVAL')
  if (argument.includes('/')) {
    // A link below /dev/mapper promises a device-mapper name.
    return isInMapper(argument) ? { path: argument, dmName: basename(argument) } : { path: argument }
  }
  if (/^\d+:\d+$/.test(argument)) {
    const devname = devnameOf(`/sys/dev/block/${argument}`)
    if (devname === undefined) throw new DiskError('no block device has this number now', 'ENOENT')
    return { path: devname, majmin: argument }
  }
  const devname = argument === '.' || argument === '..' ? undefined : devnameOf(join(sysfs.classDirectory, argument))
  if (devname !== undefined) return { path: devname, kname: argument }
  const dmName = mangledDmName(argument) ?? argument
  return { path: `/dev/mapper/${dmName}`, dmName }
}

/** Whether the last component of a path is a name in /dev/mapper, however it is written. */
function isInMapper(path: string): boolean {
  if (path.endsWith('/') || basename(path) === 'control') return false
  try {
    return realpathSync(dirname(path)) === '/dev/mapper'
  } catch (error) {
    errnoOf(error)
    return false // what is wrong with it is said where it is opened
  }
}

function devnameOf(directory: string): string | undefined {
  const buffer = Buffer.alloc(4096)
  const n = native.readFile(`${directory}/uevent`, buffer)
  const device = n < 0 ? undefined : parseDevice(basename(directory), buffer.toString('latin1', 0, n))
  return device && `/dev/${device.devname}`
}

async function openBy(target: Target): Promise<Disk> {
  const fd = await openNode(target)
  try {
    const device = await identify(fd)
    if (target.majmin !== undefined && target.majmin !== `${device.major}:${device.minor}`) {
      throw new DiskError(`its node in /dev is ${device.major}:${device.minor}; the device changed, try again`, 'ESTALE')
    }
    if (target.kname !== undefined && target.kname !== device.kname) {
      throw new DiskError(`its node in /dev is ${device.kname}'s; the device changed, try again`, 'ESTALE')
    }
    if (target.dmName !== undefined) requireDmName(target, device.kname)
    return new Disk(fd, infoOf(device))
  } catch (error) {
    native.closeDevice(fd, () => {})
    throw error
  }
}

/** Looks at the node before it opens the device: to open what is none might do something, or wait. */
async function openNode(target: Target): Promise<number> {
  const node = await openPath(target, target.path, native.O_PATH)
  try {
    if (!(await stat(node)).isBlockDevice()) throw new DiskError('not a block device', 'ENOTBLK')
    return await openPath(target, `/proc/self/fd/${node}`, constants.O_RDONLY | constants.O_NONBLOCK)
  } finally {
    native.close(node)
  }
}

async function openPath(target: Target, path: string, flags: number): Promise<number> {
  try {
    return await openFile(path, flags)
  } catch (error) {
    const errno = errnoOf(error)
    if (errno === E.ENOENT && target.dmName !== undefined && target.path.endsWith(`/${target.dmName}`)) {
      throw new DiskError('no such path, kernel name or device-mapper name', 'ENOENT')
    }
    throw new DiskError(errno === E.ENOENT ? 'no such file' : describe(errno), errnoName(errno))
  }
}

function requireDmName({ dmName = '', path }: Target, kname: string): void {
  const name = sysfs.attribute(kname, 'dm/name')?.replace(/\n$/, '')
  if (name !== undefined && sameDmName(name, dmName)) return
  const found = name === undefined ? kname : `the device-mapper device ${printable(name)}`
  throw new DiskError(`${printable(path)} leads to ${found}, not to ${printable(dmName)}`, 'ESTALE')
}

/**
 * A descriptor of a disk that was opened and verified before, by another process perhaps.
 *
 * @param fd owned by the disk from then on; closed where there is none
 * @throws DiskError
 * @internal
 */
export async function adoptDescriptor(fd: number): Promise<Disk> {
  try {
    return new Disk(fd, infoOf(await identify(fd, false)))
  } catch (error) {
    native.closeDevice(fd, () => {})
    throw error
  }
}

/**
 * Opens the disk of a descriptor once more, for reading, without the path by which that was opened, which may be in a tree.
 *
 * @param fd open until this is done
 * @param nodes from {@link Native.makeNodes}: what is opened by a node there is not taken for a user of the one in /dev
 *   (fuser(1)); -1 where there are none
 * @throws DiskError
 * @internal
 */
export async function openBeside(fd: number, nodes = -1): Promise<Disk> {
  const { error, disk } = await openDevice(await identify(fd), nodes)
  if (disk !== undefined) return disk
  throw error === 0 ? new DiskError('its node in /dev is of another device', 'ESTALE') : new DiskError(describe(error), errnoName(error))
}

/**
 * {@link open} of a path, also where that looks like a name: `13`.
 *
 * @throws DiskError
 * @internal
 */
export const openAt = (path: string): Promise<Disk> => open(path.includes('/') ? path : `./${path}`)

/**
 * Whether a path leads to a block device.
 *
 * @internal
 */
export async function isDevice(what: string): Promise<boolean> {
  try {
    return (await statPath(what)).isBlockDevice()
  } catch {
    return false // what is wrong with it is said where it is opened
  }
}

// What they share

/** What an open descriptor is of. It keeps the device's number, so what sysfs says of that is said of this device. */
function identify(fd: number, check = true): Promise<Device> {
  return new Promise((resolve, reject) => {
    native.identify(fd, check, (errno, kname, major, minor, diskseq, uevent) => {
      const device = parseDevice(kname, uevent)
      const error =
        errno !== 0
          ? notIdentified(errno)
          : device === undefined
            ? new DiskError('the device is gone', 'ENOENT')
            : device.diskseq !== diskseq || device.major !== major || device.minor !== minor
              ? new DiskError('the device changed while it was being looked at; try again', 'ESTALE')
              : undefined
      if (error !== undefined) reject(error)
      else resolve(device as Device)
    })
  })
}

function notIdentified(errno: number): DiskError {
  if (errno === E.ENOTTY) {
    return new DiskError('this kernel gives disks no sequence numbers; Linux 5.15 or later is needed', 'ENOTTY')
  }
  if (errno === E.ENXIO) return new DiskError('not bound to any file; it has no identity to name', 'ENXIO')
  return new DiskError(`its sequence number cannot be read: ${errnoName(errno)}`, errnoName(errno))
}

/**
 * Opens a disk once more, as is wanted, and closes it; that it is open already keeps the number its own.
 *
 * @throws DiskError
 * @internal
 */
export async function reopen(disk: Disk, { write = false, exclusive = false, direct = false }: OpenOptions): Promise<Disk> {
  if (!write && !exclusive && !direct) return disk
  try {
    return new Disk(await openHeld(disk.fd, { write, exclusive, direct }), disk)
  } finally {
    await disk.close()
  }
}

/** Opens the device of a descriptor. */
async function openHeld(fd: number, { write = false, exclusive = false, direct = false }: OpenOptions): Promise<number> {
  const flags = (write ? constants.O_RDWR : constants.O_RDONLY) | (exclusive ? constants.O_EXCL : 0) | (direct ? constants.O_DIRECT : 0)
  try {
    return await openFile(`/proc/self/fd/${fd}`, flags)
  } catch (error) {
    throw new DiskError(describe(errnoOf(error)), errnoName(errnoOf(error)))
  }
}

function describe(errno: number): string {
  switch (errno) {
    case E.EACCES:
    case E.EPERM:
      return process.geteuid?.() === 0
        ? 'permission denied, to root: a device cgroup or a security module forbids it'
        : 'permission denied; run this as root'
    case E.EROFS:
      return 'it is read-only'
    case E.EBUSY:
      return 'it is in use: something has it exclusively (a mount, a device-mapper device on it, another program)'
    case ENOMEDIUM:
      return 'there is no medium in the drive'
    default:
      return `cannot be opened: ${errnoName(errno)}`
  }
}
