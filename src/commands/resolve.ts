// SPDX-License-Identifier: MIT
/** `diskseqfs resolve`: which path in the tree something has now. */
import { closeSync, constants, fstatSync, openSync, readlinkSync } from 'node:fs'
import { basename, join, normalize } from 'node:path'

import { E, errnoName, errnoOf, UserError } from '../util/errno.js'
import { DEFAULT_MOUNTPOINT } from '../util/mountpoint.js'
import { native } from '../native.js'
import { parseDevice, Sysfs } from '../devices/sysfs.js'
import { printable, toJson } from './list.js'

interface Resolved {
  readonly argument: string
  readonly path?: string
  readonly diskseq?: string
  readonly partition?: number
  readonly majmin?: string
  readonly kname?: string
  readonly error?: string
}

/** @returns the exit code: 1 where one of the arguments could not be resolved */
export async function resolve(devices: readonly string[], json: boolean): Promise<number> {
  const results = devices.map(resolveOne)
  if (json) {
    process.stdout.write(toJson({ devices: results }))
  } else {
    for (const { argument, path, error } of results) {
      if (path !== undefined) process.stdout.write(`${path}\n`)
      else process.stderr.write(`diskseqfs: ${printable(argument)}: ${error}\n`)
    }
  }
  return results.some((result) => result.error !== undefined) ? 1 : 0
}

function resolveOne(argument: string): Resolved {
  try {
    return { argument, ...verify(locate(argument)) }
  } catch (error) {
    if (error instanceof UserError) return { argument, error: error.message }
    throw error
  }
}

/** What to open, and what the open device must then turn out to be. */
interface Target {
  readonly path: string
  readonly majmin?: string
  readonly kname?: string
  readonly dmName?: string
}

const sysfs = new Sysfs(native)

function locate(argument: string): Target {
  if (argument === '') throw new UserError('an empty argument names no device')
  if (argument.includes('/')) {
    argument = normalize(argument)
    // A link below /dev/mapper promises a device-mapper name.
    return argument.startsWith('/dev/mapper/') && argument !== '/dev/mapper/control'
      ? { path: argument, dmName: basename(argument) }
      : { path: argument }
  }
  if (/^\d+:\d+$/.test(argument)) {
    const devname = devnameOf(`/sys/dev/block/${argument}`)
    if (devname === undefined) throw new UserError('no block device has this number now')
    return { path: devname, majmin: argument }
  }
  const devname = argument === '.' || argument === '..' ? undefined : devnameOf(join(sysfs.classDirectory, argument))
  if (devname !== undefined) return { path: devname, kname: argument }
  return { path: `/dev/mapper/${argument}`, dmName: argument }
}

function devnameOf(directory: string): string | undefined {
  const buffer = Buffer.alloc(4096)
  const n = native.readFile(`${directory}/uevent`, buffer)
  const device = n < 0 ? undefined : parseDevice(basename(directory), buffer.toString('latin1', 0, n))
  return device && `/dev/${device.devname}`
}

function verify(target: Target): Omit<Resolved, 'argument'> {
  const fd = open(target)
  try {
    const stat = fstatSync(fd)
    if (!stat.isBlockDevice()) throw new UserError('not a block device')
    const major = ((stat.rdev >> 8) & 0xfff) >>> 0
    const minor = ((stat.rdev & 0xff) | ((stat.rdev >> 12) & 0xfff00)) >>> 0
    const majmin = `${major}:${minor}`
    const diskseq = native.diskseq(fd)
    if (typeof diskseq === 'number') {
      throw new UserError(
        diskseq === -E.ENOTTY
          ? 'this kernel gives disks no sequence numbers; Linux 5.15 or later is needed'
          : `its sequence number cannot be read: ${errnoName(diskseq)}`,
      )
    }
    // Held open, the number is this device's: what sysfs says of it is true.
    const kname = knameOf(majmin)
    const device = kname === undefined ? undefined : sysfs.read(kname)
    if (kname === undefined) throw new UserError('the device is gone')
    if (device === undefined) throw new UserError('not bound to any file; it has no identity to name')
    if (device.diskseq !== diskseq || `${device.major}:${device.minor}` !== majmin) {
      throw new UserError('the device changed while it was being looked at; try again')
    }
    if (target.majmin !== undefined && target.majmin !== majmin) {
      throw new UserError(`its node in /dev is ${majmin}; the device changed, try again`)
    }
    if (target.kname !== undefined && target.kname !== kname) {
      throw new UserError(`its node in /dev is ${kname}'s; the device changed, try again`)
    }
    if (target.dmName !== undefined) requireDmName(target, kname)
    return {
      path: join(DEFAULT_MOUNTPOINT, device.name),
      diskseq: String(diskseq),
      partition: device.partition,
      majmin,
      kname: kname.replaceAll('!', '/'),
    }
  } finally {
    closeSync(fd)
  }
}

function requireDmName(target: Target, kname: string): void {
  const name = sysfs.attribute(kname, 'dm/name')?.trimEnd()
  // The kernel's names may hold what a path cannot; libdevmapper writes it as \xNN.
  const wanted = target.dmName?.replace(/\\x([0-9a-f]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)))
  if (name !== wanted) {
    throw new UserError(
      `${printable(target.path)} leads to ${name === undefined ? kname : `the device-mapper device ${printable(name)}`}, not to ${printable(wanted ?? '')}`,
    )
  }
}

function open(target: Target): number {
  try {
    const node = openSync(target.path, native.O_PATH)
    try {
      if (!fstatSync(node).isBlockDevice()) throw new UserError('not a block device')
      return openSync(`/proc/self/fd/${node}`, constants.O_RDONLY | constants.O_NONBLOCK)
    } finally {
      closeSync(node)
    }
  } catch (error) {
    if (error instanceof UserError) throw error
    const errno = errnoOf(error)
    if (errno === E.ENOENT && target.dmName !== undefined && target.path.endsWith(`/${target.dmName}`)) {
      throw new UserError('no such path, kernel name or device-mapper name')
    }
    if (errno === E.EACCES || errno === E.EPERM) {
      throw new UserError(
        process.geteuid?.() === 0
          ? 'permission denied, to root: a device cgroup or a security module forbids it'
          : 'permission denied; run this as root',
      )
    }
    if (errno === E.ENOENT) throw new UserError('no such file')
    throw new UserError(`cannot be opened: ${errnoName(errno)}`)
  }
}

/** The sysfs name of the device with that number. */
function knameOf(majmin: string): string | undefined {
  try {
    return basename(readlinkSync(`/sys/dev/block/${majmin}`))
  } catch (error) {
    errnoOf(error)
    return undefined
  }
}
