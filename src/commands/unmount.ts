// SPDX-License-Identifier: MIT
/** `diskseqfs unmount` */
import { E, errnoName, UserError } from '../util/errno.js'
import { detach, FSTYPE, mountsAt, withoutSymlinks } from '../util/mountpoint.js'
import { native } from '../native.js'

export async function unmount(path: string): Promise<void> {
  const mountpoint = withoutSymlinks(path)
  const top = mountsAt(mountpoint).at(-1)
  if (top === undefined) throw new UserError(`${path}: nothing is mounted there`)
  if (top.type !== FSTYPE) {
    throw new UserError(`${path}: ${top.type} (${top.source}) is mounted there, not diskseqfs`)
  }
  // Detached: files open through the tree are the devices themselves, and
  // whoever has one keeps it. The daemon sees the end of the connection.
  const error = await detach(native, mountpoint)
  if (error === E.EPERM) throw new UserError(`${path}: only root can unmount the tree`)
  if (error !== 0) throw new UserError(`${path}: cannot unmount: ${errnoName(error)}`)
}
