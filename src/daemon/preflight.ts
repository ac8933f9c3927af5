// SPDX-License-Identifier: MIT
/** What has to hold before a tree can be served here. */
import { readdirSync } from 'node:fs'

import type { Sysfs } from '../devices/sysfs.js'
import type { Native } from '../native.js'
import { errnoName, errnoOf, UserError } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { detach, FSTYPE, isDead, lockMountpoint, mountsAt, unlockMountpoint } from '../util/mountpoint.js'
import { procIsOwn } from '../util/pid-namespace.js'

export class Preflight {
  constructor(
    private readonly native: Native,
    private readonly sysfs: Sysfs,
    private readonly log: Logger,
  ) {}

  /** @throws UserError where this machine or this user will not do */
  check(): void {
    if (process.geteuid?.() !== 0) {
      throw new UserError('only root can mount the tree and open block devices; run this as root')
    }
    this.requireOwnProc()
    this.requireDiskSeq()
  }

  /**
   * One disk with a number is proof enough.
   * @throws UserError on a machine that cannot tell disks apart
   */
  private requireDiskSeq(): void {
    const { classDirectory } = this.sysfs
    const names = blockNames(classDirectory)
    if (names.length === 0) return
    if (names.some((name) => this.sysfs.attribute(name, 'uevent')?.includes('DISKSEQ='))) return
    throw new UserError('this kernel gives disks no sequence numbers; Linux 5.15 or later is needed')
  }

  /** @throws UserError if /proc has other processes, or none, for the ids of callers */
  private requireOwnProc(): void {
    if (procIsOwn()) return
    throw new UserError(
      '/proc is of another pid namespace, so that callers cannot be seen; mount /proc of this one (unshare --mount-proc), or run this where /proc is of',
    )
  }

  /**
   * Takes dead mounts away, and keeps others from mounting there.
   *
   * @returns the lock, see {@link lockMountpoint}
   * @throws UserError if another daemon has it
   */
  async claim(path: string): Promise<number> {
    let top = mountsAt(path).at(-1)
    while (top !== undefined) {
      if (top.type !== FSTYPE) {
        throw new UserError(`${path}: busy, ${top.type} (${top.source}) is mounted there; unmount it or choose another directory`)
      }
      if (!(await isDead(this.native, path))) {
        throw new UserError(`${path}: already served by another diskseqfs; see diskseqfs unmount --help`)
      }
      this.log.warn({ mountpoint: path }, 'taking away the mount of a daemon that died')
      const error = await detach(this.native, path)
      if (error !== 0) throw new UserError(`${path}: cannot unmount the dead mount: ${errnoName(error)}`)
      top = mountsAt(path).at(-1)
    }
    const lock = await lockMountpoint(this.native, path)
    // Another daemon may have mounted before this one got the lock.
    if (mountsAt(path).length === 0) return lock
    unlockMountpoint(this.native, lock)
    throw new UserError(`${path}: already served by another diskseqfs`)
  }
}

function blockNames(directory: string): string[] {
  try {
    return readdirSync(directory)
  } catch (error) {
    throw new UserError(`cannot read ${directory}: ${errnoName(errnoOf(error))}; is sysfs mounted at /sys?`)
  }
}
