// SPDX-License-Identifier: MIT
/** The mount of the tree: the right to serve there, whether it is still there, and its end. */
import { constants, openSync } from 'node:fs'

import { WATCH_MASK } from '../gate/closes.js'
import type { Native } from '../native.js'
import { E, errnoName, errnoOf, UserError } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import {
  detach,
  FSTYPE,
  mountData,
  type MountEntry,
  type MountOptions,
  mountsAt,
  SOURCE,
  MountWatch,
  unlockMountpoint,
} from '../util/mountpoint.js'

export class TreeMount {
  /** The mount point, without symlinks. */
  path = ''
  /** See lockMountpoint(). */
  lock = -1
  private id = -1
  private watch: MountWatch | undefined

  constructor(
    private readonly native: Native,
    private readonly log: Logger,
  ) {}

  /**
   * @param fuse from {@link openFuse}
   * @returns the mount; undefined if somebody has unmounted it already
   * @throws UserError where the kernel refuses
   */
  mount(fuse: number, options: MountOptions): MountEntry | undefined {
    const rc = this.native.mount(SOURCE, this.path, FSTYPE, options.flags, mountData(fuse, options))
    if (rc < 0) throw new UserError(whyNotMounted(this.path, rc))
    return mountsAt(this.path).at(-1)
  }

  /**
   * Of the mount, of the inotify watch on its root, and of the root by a mount of its own.
   *
   * They walk a path into this mount, which has to answer: on other threads.
   * @throws UserError
   */
  async descriptors(): Promise<{ mount: number; closes: number; root: number }> {
    const { native, path } = this
    const [mount, closes, root] = await Promise.all([
      this.descriptor('fspick', (done) => native.pickMount(path, done)),
      this.descriptor('inotify', (done) => native.inotifyWatch(path, WATCH_MASK, done)),
      this.descriptor('open_tree', (done) => native.cloneMount(path, '.', done)),
    ])
    return { mount, closes, root }
  }

  /**
   * @param entry none, if it is gone already
   * @param gone called when somebody has unmounted it
   */
  watchFor(entry: MountEntry | undefined, gone: () => void): void {
    if (entry === undefined) return
    this.id = entry.id
    this.watch = new MountWatch(this.native, entry.id, () => {
      this.log.info({ mountpoint: this.path }, 'the tree was unmounted')
      gone()
    })
  }

  /** Takes it away, busy or not, if it is there and nothing is mounted over it. */
  async unmount(): Promise<void> {
    this.unwatch()
    if (this.id === -1 || mountsAt(this.path).at(-1)?.id !== this.id) return
    const mountpoint = this.path
    const error = await detach(this.native, mountpoint)
    if (error === 0) this.log.info({ mountpoint }, 'unmounted')
    else this.log.error({ errno: errnoName(error), mountpoint }, 'cannot unmount')
  }

  /** From now on another daemon may serve there. */
  unlock(): void {
    if (this.lock >= 0) unlockMountpoint(this.native, this.lock)
  }

  close(): void {
    this.unwatch()
    this.id = -1
    if (this.lock >= 0) this.native.close(this.lock)
    this.lock = -1
  }

  private unwatch(): void {
    this.watch?.close()
    this.watch = undefined
  }

  private descriptor(what: string, call: (done: (error: number, fd: number) => void) => void): Promise<number> {
    return new Promise((resolve, reject) => {
      call((error, fd) => {
        if (error === 0) resolve(fd)
        else reject(new UserError(`${what} failed on ${this.path}: ${errnoName(error)}${what === 'inotify' ? usedUp(error) : ''}`))
      })
    })
  }
}

function whyNotMounted(mountpoint: string, rc: number): string {
  if (rc === -E.EPERM) {
    return `cannot mount at ${mountpoint}: EPERM; CAP_SYS_ADMIN is needed (in a container: run it privileged, or on the host)`
  }
  if (rc === -E.EINVAL) return '/dev/fuse is not the FUSE device (character device 10:229), or the kernel does not know a mount option'
  return `cannot mount at ${mountpoint}: mount(2) says ${errnoName(rc)}`
}

/** What inotify(7) has a limit for, of all programs of a user together. */
function usedUp(error: number): string {
  const limit = error === E.EMFILE ? 'max_user_instances' : error === E.ENOSPC ? 'max_user_watches' : undefined
  return limit === undefined ? '' : `; root's programs have as many as they may: raise fs.inotify.${limit} (sysctl(8))`
}

/** @throws UserError where there is none */
export function openFuse(): number {
  try {
    return openSync('/dev/fuse', constants.O_RDWR | constants.O_NONBLOCK)
  } catch (error) {
    const errno = errnoOf(error)
    throw new UserError(
      errno === E.ENOENT || errno === E.ENODEV || errno === E.ENXIO
        ? '/dev/fuse is missing: load the module (modprobe fuse), or use a kernel with CONFIG_FUSE_FS'
        : `cannot open /dev/fuse: ${errnoName(errno)}`,
    )
  }
}
