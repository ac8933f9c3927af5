// SPDX-License-Identifier: MIT
/** A regular file as a disk: a loop device that the kernel detaches when its last user has closed it. */
import { constants, fstat, open as openCallback, readFileSync } from 'node:fs'
import { promisify } from 'node:util'

import { native } from '../native.js'
import { E, errnoName, errnoOf } from '../util/errno.js'
import { type Disk, DiskError, openBeside } from './open.js'

/** How a file becomes a disk. */
export interface AttachOptions {
  /** Nobody can write to it. */
  readonly readOnly?: boolean
  /** Past the page cache of the filesystem that the file is on. */
  readonly directIo?: boolean
  /** Has the kernel look for a partition table. */
  readonly partscan?: boolean
  /** Where the disk begins in the file, bytes. */
  readonly offset?: bigint
  /** Of the disk, bytes; by default all of the file from the offset on. */
  readonly size?: bigint
  /** Ends the work before it is begun. */
  readonly signal?: AbortSignal
  /** Of the disk's sectors, bytes: a power of two from 512 to what the kernel takes; 512 by default. */
  readonly sectorSize?: number
}

/** Of a loop device's sectors, bytes, unless another size is asked for. */
const SECTOR = 512

const openFile = promisify(openCallback)
const stat = promisify(fstat)

/**
 * @returns the disk, open for reading; it is there until it and all other descriptors of it are closed
 * @throws DiskError
 */
export async function attachFile(file: string, options: AttachOptions = {}): Promise<Disk> {
  options.signal?.throwIfAborted()
  const backing = await openBacking(file, options)
  try {
    return await attachDescriptor(backing, options)
  } finally {
    native.close(backing)
  }
}

/**
 * The same of a file that is open.
 *
 * @param backing may be closed after this
 * @param nodes as of {@link openBeside}
 * @throws DiskError
 * @internal
 */
export async function attachDescriptor(backing: number, options: AttachOptions, nodes = -1): Promise<Disk> {
  checkSize((await lookAt(backing)).size, options)
  const fd = await bind(backing, options)
  // For writing it had to be open to be bound so; from now on it is held by a descriptor that is in nobody's way.
  const disk = await openBeside(fd, nodes).finally(() => native.closeDevice(fd, () => {}))
  if (options.directIo !== true || hasDirectIo(disk)) return disk
  await disk.close()
  throw new DiskError(NO_DIRECT_IO, 'EINVAL')
}

const NO_DIRECT_IO = 'the filesystem of the file cannot do direct I/O, or not for such sectors; leave out --direct-io'

/** The kernel does without where the file cannot be read so. */
function hasDirectIo({ kname }: Disk): boolean {
  try {
    return readFileSync(`/sys/block/${kname}/loop/dio`, 'latin1').trim() === '1'
  } catch (error) {
    errnoOf(error)
    return false
  }
}

/**
 * Opens a file as {@link attachDescriptor} needs it.
 *
 * @throws DiskError
 * @internal
 */
export async function openBacking(file: string, { readOnly = false }: AttachOptions): Promise<number> {
  if (file === '') throw new DiskError('an empty argument names no file', 'EINVAL')
  // Not O_RDWR at once: a FIFO or a device might do something when it is opened.
  const node = await openPath(file, native.O_PATH)
  try {
    const found = await stat(node)
    if (found.isDirectory()) throw new DiskError('a directory cannot be a disk', 'EISDIR')
    if (!found.isFile()) throw new DiskError('neither a regular file nor a block device', 'EINVAL')
    return await openPath(`/proc/self/fd/${node}`, readOnly ? constants.O_RDONLY : constants.O_RDWR)
  } finally {
    native.close(node)
  }
}

/**
 * @param bytes of the file
 * @returns the length of the disk, bytes
 * @throws DiskError
 * @internal
 */
export function checkSize(bytes: bigint, { offset = 0n, size = 0n, sectorSize = SECTOR }: AttachOptions): bigint {
  if (bytes === 0n) throw new DiskError('the file is empty, and so would be the disk; make it larger (truncate --size=1G FILE)', 'EINVAL')
  if (offset >= bytes) throw new DiskError(`the offset is not within the file, which has ${bytes} bytes`, 'EINVAL')
  if (offset + size > bytes) throw new DiskError(`offset and size reach beyond the end of the file, which has ${bytes} bytes`, 'EINVAL')
  const length = size === 0n ? bytes - offset : size
  // The kernel would leave off what is over.
  if (length % BigInt(sectorSize) !== 0n) {
    throw new DiskError(`${length} bytes are no whole number of sectors of ${sectorSize} bytes; give a --size that is`, 'EINVAL')
  }
  return length
}

/**
 * What an open file is, as fstat(2) has it.
 *
 * @throws DiskError
 * @internal
 */
export function lookAt(fd: number): Promise<{ mode: number; size: bigint; device: bigint; inode: bigint }> {
  return new Promise((resolve, reject) => {
    native.statFile(fd, (error, mode, size, device, inode) => {
      if (error === 0) resolve({ mode, size, device, inode })
      else reject(new DiskError(`cannot be looked at: ${errnoName(error)}`, errnoName(error)))
    })
  })
}

async function openPath(path: string, flags: number): Promise<number> {
  try {
    return await openFile(path, flags)
  } catch (error) {
    const errno = errnoOf(error)
    throw new DiskError(describeFile(errno), errnoName(errno))
  }
}

function describeFile(errno: number): string {
  switch (errno) {
    case E.ENOENT:
      return 'no such file'
    case E.EACCES:
    case E.EPERM:
      return 'permission denied; --read-only needs less'
    case E.EROFS:
      return 'the filesystem is read-only; use --read-only'
    case E.ETXTBSY:
      return 'it is a program that runs, or swap that is on; use --read-only'
    default:
      return `cannot be opened: ${errnoName(errno)}`
  }
}

/** @returns a descriptor of the loop device */
function bind(backing: number, options: AttachOptions): Promise<number> {
  const { readOnly = false, directIo = false, partscan = false, offset = 0n, size = 0n, sectorSize = SECTOR } = options
  const flags =
    native.LO_FLAGS_AUTOCLEAR |
    (readOnly ? native.LO_FLAGS_READ_ONLY : 0) |
    (directIo ? native.LO_FLAGS_DIRECT_IO : 0) |
    (partscan ? native.LO_FLAGS_PARTSCAN : 0)
  return new Promise((resolve, reject) => {
    native.attachLoop(backing, flags, offset, size, sectorSize, (errno, step, fd) => {
      if (errno === 0) resolve(fd)
      else reject(new DiskError(describeStep(errno, step, options), errnoName(errno)))
    })
  })
}

function describeStep(errno: number, step: 'control' | 'open' | 'configure', { directIo = false, sectorSize }: AttachOptions): string {
  if (errno === E.EACCES || errno === E.EPERM) {
    return process.geteuid?.() === 0
      ? 'loop devices may not be used, not even by root: a device cgroup or a security module forbids it'
      : "loop devices are root's; run this as root"
  }
  if (step === 'control' && (errno === E.ENOENT || errno === E.ENXIO || errno === E.ENODEV)) {
    return 'this kernel has no loop devices; load the module (modprobe loop)'
  }
  if (step === 'configure' && errno === E.EINVAL) {
    if (sectorSize !== undefined) return `no loop device can have sectors of ${sectorSize} bytes there`
    if (directIo) return NO_DIRECT_IO
  }
  if (errno === E.ENOSPC) return 'there is no free loop device, and no more can be made'
  return `no loop device could be bound to it (${step}): ${errnoName(errno)}`
}
