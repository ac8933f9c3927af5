// SPDX-License-Identifier: MIT
/** Where the control socket of a tree is. */
import { mkdirSync, readlinkSync, renameSync, rmSync, statSync, symlinkSync, unlinkSync } from 'node:fs'
import { join } from 'node:path'

import type { Native } from '../native.js'
import { errnoName, errnoOf } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { DEFAULT_MOUNTPOINT, RUNTIME_DIRECTORY } from '../util/mountpoint.js'

const NAME = 'io.diskseqfs'

/** A symlink to the socket of the tree at /dev/disk/by-diskseq. */
export const DEFAULT_CONTROL_SOCKET = join(RUNTIME_DIRECTORY, NAME)

/** @param device of the mount, as in mountinfo: no other mount has it, in whichever mount namespace */
export const controlSocketOf = (device: string): string => join(RUNTIME_DIRECTORY, `${device}.${NAME}`)

export interface ControlSocketParts {
  readonly native: Pick<Native, 'streamListen' | 'close'>
  /** Of the tree. */
  readonly mountpoint: string
  /** Of the mount, as in mountinfo. */
  readonly device: string
  readonly log: Logger
}

/** The socket that listens for calls. */
export class ControlSocket {
  /** Negative where there is none. */
  fd = -1
  private readonly path: string

  constructor(private readonly parts: ControlSocketParts) {
    this.path = controlSocketOf(parts.device)
  }

  /**
   * Without it the tree is served all the same.
   *
   * @param earlier that of an earlier daemon, if it had one; owned from now on
   * @returns whether it is a new one
   */
  open(earlier: number | undefined): boolean {
    if (earlier !== undefined && isSocket(this.path)) {
      this.fd = earlier
      this.link()
      return false
    }
    if (earlier !== undefined) this.parts.native.close(earlier)
    this.fd = this.attempt(() => {
      mkdirSync(RUNTIME_DIRECTORY, { mode: 0o700, recursive: true })
      rmSync(this.path, { force: true }) // of a daemon that died
      return this.parts.native.streamListen(this.path)
    })
    if (this.fd < 0) {
      const fields = { errno: errnoName(this.fd), socket: this.path }
      this.parts.log.warn(fields, 'no control socket: no leases (diskseqfs attach) from this daemon')
      return false
    }
    this.link()
    return true
  }

  /** For good: nobody goes on with it. */
  close(): void {
    if (this.fd < 0) return
    this.parts.native.close(this.fd)
    this.fd = -1
    const error = this.attempt(() => {
      rmSync(this.path, { force: true })
      // A daemon in another mount namespace may have made it its own.
      if (this.isDefault && readlinkSync(DEFAULT_CONTROL_SOCKET) === this.path) unlinkSync(DEFAULT_CONTROL_SOCKET)
      return 0
    })
    if (error < 0) this.parts.log.warn({ errno: errnoName(error), socket: this.path }, 'cannot remove the control socket')
  }

  private get isDefault(): boolean {
    return this.parts.mountpoint === DEFAULT_MOUNTPOINT
  }

  /** The name that does not change. */
  private link(): void {
    if (!this.isDefault) return
    const temporary = `${DEFAULT_CONTROL_SOCKET}.${process.pid}`
    const error = this.attempt(() => {
      symlinkSync(this.path, temporary)
      renameSync(temporary, DEFAULT_CONTROL_SOCKET)
      return 0
    })
    if (error < 0) this.parts.log.warn({ errno: errnoName(error), link: DEFAULT_CONTROL_SOCKET }, 'no link to the control socket')
  }

  private attempt(work: () => number): number {
    try {
      return work()
    } catch (error) {
      return -errnoOf(error)
    }
  }
}

function isSocket(path: string): boolean {
  try {
    return statSync(path).isSocket()
  } catch (error) {
    errnoOf(error)
    return false
  }
}
