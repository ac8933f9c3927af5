// SPDX-License-Identifier: MIT
/** Where the control socket of a tree is. */
import { existsSync, mkdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'

import type { Native } from '../native.js'
import { errnoName, errnoOf } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { DEFAULT_MOUNTPOINT, RUNTIME_DIRECTORY } from '../util/mountpoint.js'

const NAME = 'io.diskseqfs'

/** @param device of the mount, as in mountinfo */
export const controlSocketOf = (mountpoint: string, device: string): string =>
  join(RUNTIME_DIRECTORY, mountpoint === DEFAULT_MOUNTPOINT ? NAME : `${device}.${NAME}`)

/** The socket that listens for calls. */
export class ControlSocket {
  /** Negative where there is none. */
  fd = -1

  constructor(
    private readonly native: Pick<Native, 'streamListen' | 'close'>,
    readonly path: string,
    private readonly log: Logger,
  ) {}

  /**
   * Without it the tree is served all the same.
   *
   * @param earlier that of an earlier daemon, if it had one; owned from now on
   * @returns whether it is a new one
   */
  open(earlier: number | undefined): boolean {
    if (earlier !== undefined && existsSync(this.path)) {
      this.fd = earlier
      return false
    }
    if (earlier !== undefined) this.native.close(earlier)
    try {
      mkdirSync(RUNTIME_DIRECTORY, { mode: 0o700, recursive: true })
      rmSync(this.path, { force: true }) // of a daemon that died
      this.fd = this.native.streamListen(this.path)
    } catch (error) {
      this.fd = -errnoOf(error)
    }
    if (this.fd < 0) {
      this.log.warn({ errno: errnoName(this.fd), socket: this.path }, 'no control socket: no leases (diskseqfs attach) from this daemon')
    }
    return this.fd >= 0
  }

  /** For good: nobody goes on with it. */
  close(): void {
    if (this.fd < 0) return
    this.native.close(this.fd)
    this.fd = -1
    rmSync(this.path, { force: true })
  }
}
