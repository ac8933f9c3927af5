// SPDX-License-Identifier: MIT
/**
 * Links beneath the mount, in the directory of devtmpfs that it covers: the names of the
 * tree, each to the device's node in /dev, as udev makes them on a system without the tree. They are
 * seen where the mount is not: in a chroot with /dev bound into it, in a container, and
 * everywhere after the mount is gone. They are exactly as good as a stock
 * system's names.
 *
 * They are there before the tree answers for a device by the kernel's name, which is what
 * links elsewhere lead to, and go with it. From now on only root can open the directory, as a user who
 * reads it may keep it locked. A user may have it open from before, so no request
 * waits for these links for long.
 */
import { constants, existsSync, openSync, statfsSync } from 'node:fs'
import { relative } from 'node:path'

import { type DiskSeq, DM_NAME, linkName, parseName } from '../devices/names.js'
import { errnoName, errnoOf } from '../util/errno.js'
import { type Logger, LogLimit } from '../util/log.js'
import type { Native } from '../native.js'
import type { Device } from '../devices/sysfs.js'

/** TMPFS_MAGIC, which devtmpfs has as well. */
const TMPFS = 0x0102_1994
/** `.dm/N/K` */
const DEPTH = 2
const MODE_SERVED = 0o711
const MODE_STOCK = 0o755
/** Removed, so that there is a change to give the directory its mode with. */
const NO_LINK = `${DM_NAME}/none`
/** Where udev notes which links it has made. */
const UDEV_LINKS = '/run/udev/links'

type Calls = Pick<Native, 'changeLinks' | 'listLinks' | 'close'>

/**
 * @param mountpoint where nothing is mounted yet
 * @returns a descriptor; -1 where links would be of no use: outside of /dev
 */
export function openBeneath(mountpoint: string): number {
  if (!mountpoint.startsWith('/dev/')) return -1
  try {
    if (statfsSync(mountpoint).type !== TMPFS) return -1
    return openSync(mountpoint, constants.O_RDONLY | constants.O_DIRECTORY)
  } catch (error) {
    errnoOf(error)
    return -1
  }
}

/** Whether a name is one of the tree's, so that a link of that name is kept here. */
function isOurs(path: string): boolean {
  return path.startsWith(`${DM_NAME}/`) || parseName(path) !== undefined
}

export interface BeneathParts {
  readonly native: Calls
  /** From {@link openBeneath}, or an earlier daemon's; owned from now on. */
  readonly fd: number
  readonly mountpoint: string
  readonly log: Logger
}

export class Beneath {
  /** What is to be changed, the latest for each path; "" for a link that is to go. */
  private changes = new Map<string, string>()
  /** Disks whose links are not there yet, and what waits for them. */
  private unmade = new Map<DiskSeq, (() => void)[]>()
  /** Those that are being made. */
  private making = new Map<DiskSeq, (() => void)[]>()
  private changing = false
  private fd: number
  private mode = MODE_SERVED
  private readonly made = new Set<string>()
  private readonly idle: (() => void)[] = []
  private readonly failures: LogLimit
  private readonly toDev: string

  constructor(private readonly parts: BeneathParts) {
    const { fd, mountpoint, log } = parts
    this.fd = fd
    this.failures = new LogLimit((suppressed) => log.warn({ suppressed }, 'more links beneath the tree failed than are logged'))
    this.toDev = relative(mountpoint, '/dev')
  }

  /** Has exactly these devices' links there, and none of others. */
  start(devices: readonly Device[]): void {
    this.changes.set(NO_LINK, '')
    for (const device of devices) this.add(device)
    this.parts.native.listLinks(this.fd, DEPTH, (paths) => {
      for (const path of paths) if (isOurs(path) && !this.made.has(path)) this.changes.set(path, '')
      this.flush()
    })
  }

  add(device: Device): void {
    if (this.mode === MODE_STOCK) return // the tree is gone
    if (!this.unmade.has(device.diskseq)) this.unmade.set(device.diskseq, [])
    for (const [path, target] of this.linksOf(device)) {
      this.changes.set(path, target)
      this.made.add(path)
    }
    this.flush()
  }

  remove(device: Device): void {
    for (const [path] of this.linksOf(device)) {
      this.changes.set(path, '')
      this.made.delete(path)
    }
    this.flush()
  }

  /** Calls back when the links of a disk are there: at once, but for the first time. */
  whenMade(diskseq: DiskSeq, ready: () => void): void {
    const waiters = this.unmade.get(diskseq) ?? this.making.get(diskseq)
    if (waiters === undefined) ready()
    else waiters.push(ready)
  }

  private linksOf({ diskseq, partition, name, kname, devname }: Device): [string, string][] {
    const node = `${this.toDev}/${devname}`
    const links: [string, string][] = [
      [name, node],
      [`${DM_NAME}/${diskseq}/${kname}`, `../../${node}`],
    ]
    if (partition !== 0) links.push([linkName(diskseq, partition), node])
    return links
  }

  private flush(): void {
    if (this.changing || this.fd < 0) return
    if (this.changes.size === 0) {
      for (const done of this.idle.splice(0)) done()
      return
    }
    const changes = [...this.changes].flat()
    this.changes.clear()
    this.making = this.unmade
    this.unmade = new Map()
    this.changing = true
    this.parts.native.changeLinks(this.fd, this.mode, changes, (error) => {
      this.changing = false
      if (error !== 0 && this.failures.take()) {
        this.parts.log.warn({ errno: errnoName(error), mountpoint: this.parts.mountpoint }, 'links beneath the tree cannot be changed')
      }
      this.release(this.making)
      this.flush()
    })
  }

  /**
   * The tree is gone for good.
   *
   * @param isHanded whether the guard looks after the links from now on; else those that are not udev's are removed
   */
  async leave(isHanded: boolean): Promise<void> {
    if (this.fd < 0 || isHanded) return
    this.mode = MODE_STOCK
    const paths = await new Promise<string[]>((done) => this.parts.native.listLinks(this.fd, DEPTH, done))
    for (const path of paths) if (isOurs(path) && !this.isUdevs(path)) this.changes.set(path, '')
    this.changes.set(NO_LINK, '')
    await new Promise<void>((done) => {
      this.idle.push(done)
      this.flush()
    })
  }

  /** util_path_encode(), systemd: a link's name with `\x2f` for each slash. */
  private isUdevs(path: string): boolean {
    const name = `${this.parts.mountpoint}/${path}`.slice('/dev'.length).replaceAll('/', '\\x2f')
    return existsSync(`${UDEV_LINKS}/${name}`)
  }

  close(): void {
    if (this.fd >= 0) this.parts.native.close(this.fd)
    this.fd = -1
    this.release(this.unmade)
    this.release(this.making)
  }

  private release(waiting: Map<DiskSeq, (() => void)[]>): void {
    const waiters = [...waiting.values()].flat()
    waiting.clear()
    for (const ready of waiters) ready()
  }
}
