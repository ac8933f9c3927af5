// SPDX-License-Identifier: MIT
/**
 * What an outgoing daemon hands over, and whether this daemon can go on with it. The
 * descriptors come from the guard, or from the outgoing daemon itself
 * (replace.ts).
 */
import { errnoName } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { detach, type MountEntry, mountsAt, unlockMountpoint } from '../util/mountpoint.js'
import type { Native } from '../native.js'
import { ownPidNamespace } from '../util/pid-namespace.js'
import type { Descriptors } from './service-manager.js'
import { type MountIdentity, SharedState, STATE_SIZE } from './shared-state.js'

/** The descriptors' names. */
export const DESCRIPTOR = {
  /** The connection, /dev/fuse. */
  fuse: 'fuse',
  /** Of the mount, from fspick(2). */
  mount: 'mount',
  /** The inotify watches on its directories. */
  closes: 'closes',
  /** The root directory, see {@link Native.cloneMount}. Earlier versions had none, and no `beneath`. */
  root: 'root',
  /** The directory beneath the mount. */
  beneath: 'beneath',
  /** The mount point's, see lockMountpoint(). */
  lock: 'lock',
  /** The memory of {@link SharedState}. */
  state: 'state',
  /** The control socket, see broker/socket.ts. Versions before leases had none. */
  control: 'control',
  /** The sockets of {@link PinStore}, many. */
  pins: 'pins',
} as const

type Calls = Pick<Native, 'mapMemory' | 'unmount' | 'unlock' | 'close'>

export interface Takeover {
  readonly fuse: number
  readonly mountFd: number
  readonly closes: number
  readonly root: number | undefined
  readonly beneath: number | undefined
  readonly lock: number
  readonly stateFd: number
  readonly pins: readonly number[]
  readonly state: SharedState
  readonly mountpoint: string
  readonly mount: MountEntry
}

function stateOf(native: Calls, stored: Descriptors): SharedState | undefined {
  const fd = stored.get(DESCRIPTOR.state)?.at(-1)
  const memory = fd === undefined ? -1 : native.mapMemory(fd, STATE_SIZE)
  return typeof memory === 'number' ? undefined : new SharedState(memory)
}

/** The highest diskseq that the outgoing daemon has seen; 0 if unknown. */
export function highestOf(native: Calls, stored: Descriptors): bigint {
  const state = stateOf(native, stored)
  return state?.compatible ? state.highest : 0n
}

/** The mount of a state, if it is still there. */
function mountOf(state: SharedState | undefined): MountEntry | undefined {
  const identity = state?.mount
  if (identity === undefined) return undefined
  // Something else may be mounted over it.
  return mountsAt(identity.mountpoint).findLast(({ device }) => device === identity.device)
}

/**
 * @param mountpoint where the tree is to be, without symlinks
 * @returns undefined if these descriptors are of no use there
 */
export function findTakeover(native: Calls, stored: Descriptors, mountpoint: string): Takeover | undefined {
  const [fuse, mountFd, closes, lock, stateFd] = [
    DESCRIPTOR.fuse,
    DESCRIPTOR.mount,
    DESCRIPTOR.closes,
    DESCRIPTOR.lock,
    DESCRIPTOR.state,
  ].map((name) => stored.get(name)?.at(-1))
  const state = stateOf(native, stored)
  const mount = mountOf(state)
  if (fuse === undefined || mountFd === undefined || closes === undefined || lock === undefined) return undefined
  if (stateFd === undefined || state === undefined || !state.compatible) return undefined
  if (mount === undefined || mount.target !== mountpoint) return undefined
  // Requests name callers as in the pid namespace of the mount. Earlier versions did not record it.
  const { pidNamespace } = state.mount as MountIdentity
  if (pidNamespace !== 0 && pidNamespace !== ownPidNamespace()) return undefined
  const [root, beneath] = [DESCRIPTOR.root, DESCRIPTOR.beneath].map((name) => stored.get(name)?.at(-1))
  return { fuse, mountFd, closes, root, beneath, lock, stateFd, pins: stored.get(DESCRIPTOR.pins) ?? [], state, mountpoint, mount }
}

/** Takes a mount away that nobody can go on with, so that its callers do not wait for ever. */
export async function giveUpMount(native: Calls, stored: Descriptors, log: Logger): Promise<void> {
  log.warn('what an earlier daemon left does not fit; its mount is taken away')
  const mount = mountOf(stateOf(native, stored))
  if (mount !== undefined) {
    const error = await detach(native, mount.target, true)
    if (error !== 0) log.error({ errno: errnoName(error), mountpoint: mount.target }, 'cannot unmount')
  }
  for (const fd of stored.get(DESCRIPTOR.lock) ?? []) unlockMountpoint(native, fd)
  for (const fds of stored.values()) for (const fd of fds) native.close(fd)
}
