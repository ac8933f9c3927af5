// SPDX-License-Identifier: MIT
/**
 * Block devices as sysfs has them now. Each has one `uevent` file that tells,
 * in a single read, its number, its node below /dev, its diskseq and its
 * partition number; so what is read together belongs together.
 */
import { type DiskSeq, nodeName, parseDiskSeq } from './names.js'
import { Exhausted } from '../util/errno.js'
import { CachedFiles } from './cached-files.js'
import type { Native } from '../native.js'

/** A disk or partition that sysfs showed at some moment. */
export interface Device {
  /** Its directory in /sys/class/block: the kernel's name with `!` for `/`. */
  readonly kname: string
  /** Its node below /dev. */
  readonly devname: string
  readonly major: number
  readonly minor: number
  readonly diskseq: DiskSeq
  /** The kernel's PARTN; 0 is the whole disk. */
  readonly partition: number
  /** A loop device or a partition of one: it needs the check of a bound device. */
  readonly loop: boolean
  /** Its name in the tree. */
  readonly name: string
}

/** Files kept open: two for a loop device that is looked at again and again, one for any other. */
const FILES_MAX = 16

/** A loop device or partition of one; what it begins with is the loop device's name. */
const LOOP = /^(loop\d+)(p\d+)?$/
const BACKING_FILE = 'loop/backing_file'
const CONNECTED_ANEW = /^(?:nbd|md)/

/** The value in the first line `KEY=value` of a sysfs `uevent` file. */
export function valueOf(uevent: string, key: string): string | undefined {
  const line = `${key}=`
  const at = uevent.startsWith(line) ? 0 : uevent.indexOf(`\n${line}`) + 1
  if (!uevent.startsWith(line, at)) return undefined
  const end = uevent.indexOf('\n', at)
  return uevent.slice(at + line.length, end < 0 ? undefined : end)
}

function parseSmall(text: string | undefined): number | undefined {
  return text !== undefined && /^\d{1,7}$/.test(text) ? Number(text) : undefined
}

/**
 * @param uevent the text of the device's sysfs `uevent` file
 * @returns undefined for what has no node of its own (hidden paths of a
 *   multipath NVMe disk), no diskseq, or nonsense in it
 */
export function parseDevice(kname: string, uevent: string): Device | undefined {
  const major = parseSmall(valueOf(uevent, 'MAJOR'))
  const minor = parseSmall(valueOf(uevent, 'MINOR'))
  const devname = valueOf(uevent, 'DEVNAME')
  const diskseq = parseDiskSeq(valueOf(uevent, 'DISKSEQ') ?? '')
  const type = valueOf(uevent, 'DEVTYPE')
  const partition = type === 'partition' ? parseSmall(valueOf(uevent, 'PARTN')) : 0
  if (major === undefined || minor === undefined || !devname || diskseq === undefined) return undefined
  if (partition === undefined || (type === 'partition') !== partition > 0) return undefined
  if (type !== 'disk' && type !== 'partition') return undefined
  return {
    kname,
    devname: devname === kname ? kname : devname, // one text for both
    major,
    minor,
    diskseq,
    partition,
    loop: LOOP.test(kname),
    name: nodeName(diskseq, partition),
  }
}

export function sameDevice(a: Device, b: Device): boolean {
  return a === b || (a.name === b.name && a.major === b.major && a.minor === b.minor && a.kname === b.kname)
}

/** A /sys/class/block; which one can be chosen, so that tests may build their own. */
export class Sysfs {
  private readonly buffer = Buffer.alloc(4096)
  /** Below {@link classDirectory}. */
  private readonly files: CachedFiles<string>

  constructor(
    private readonly native: Pick<Native, 'readFile' | 'scanBlock' | 'openFile' | 'readAgain' | 'close'>,
    readonly classDirectory = '/sys/class/block',
  ) {
    this.files = new CachedFiles(native, (name) => `${classDirectory}/${name}`, FILES_MAX)
  }

  /** Closes the files that stay open for speed; they are opened again when needed. */
  close(): void {
    this.files.close()
  }

  /**
   * The text of a file below a device's directory, undefined where there is none.
   * @throws Exhausted
   */
  attribute(kname: string, name: string): string | undefined {
    const n = this.native.readFile(`${this.classDirectory}/${kname}/${name}`, this.buffer)
    Exhausted.check(n)
    return n < 0 ? undefined : this.buffer.toString('utf8', 0, n)
  }

  /**
   * A loop device without a backing file has no identity to protect, and no
   * place in the tree. Its partitions may outlive the file (lo_flags without
   * LO_FLAGS_PARTSCAN, 6.18); they have no place either.
   */
  private bound(kname: string): boolean {
    const loop = LOOP.exec(kname)?.[1]
    return loop === undefined || this.attribute(loop, BACKING_FILE) !== undefined
  }

  read(kname: string): Device | undefined {
    const uevent = this.attribute(kname, 'uevent')
    const device = uevent === undefined ? undefined : parseDevice(kname, uevent)
    return device !== undefined && this.bound(kname) ? device : undefined
  }

  /** Whether sysfs still shows exactly this device. */
  shows(device: Device): boolean {
    const { kname } = device
    const uevent = this.again(kname, 'uevent')
    const now = uevent === undefined ? undefined : parseDevice(kname, uevent)
    if (now === undefined || !sameDevice(now, device)) return false
    const loop = LOOP.exec(kname)?.[1]
    return loop === undefined || this.again(loop, BACKING_FILE) !== undefined
  }

  /** As {@link attribute}, of a file that is read often. */
  private again(kname: string, name: string): string | undefined {
    const n = this.files.read(`${kname}/${name}`)
    Exhausted.check(n)
    return n < 0 ? undefined : this.files.buffer.toString('utf8', 0, n)
  }

  /** Whether its medium may be changed; of a partition, its disk's. */
  removable(device: Device): boolean {
    return this.isSet(device, 'removable')
  }

  /**
   * Whether it may become another disk while it is open: LOOP_CHANGE_FD of a
   * loop device that is read-only, a medium that is changed, an nbd that is connected anew, an
   * array that is assembled anew.
   */
  changes(device: Device): boolean {
    if (CONNECTED_ANEW.test(device.kname)) return true
    return this.removable(device) || (device.loop && this.isSet(device, 'ro'))
  }

  /** An attribute of the disk that is 0 or 1; true where there is no descriptor to read it. */
  private isSet({ kname, partition }: Device, name: string): boolean {
    try {
      return this.attribute(kname, partition === 0 ? name : `../${name}`) === '1\n'
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      return true
    }
  }

  /** All devices, read on another thread. `error` is an errno, or 0; `cpuMs` what it cost. */
  scan(done: (error: number, devices: Device[], cpuMs: number) => void): void {
    this.native.scanBlock(this.classDirectory, (error, next, cpuMs) => {
      const devices: Device[] = []
      for (let list = next(); list.length > 0; list = next()) {
        for (let i = 0; i < list.length; i += 3) {
          if (list[i + 2] === false) continue
          const device = parseDevice(list[i] as string, list[i + 1] as string)
          if (device !== undefined) devices.push(device)
        }
      }
      done(error, devices, cpuMs)
    })
  }
}
