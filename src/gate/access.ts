// SPDX-License-Identifier: MIT
/**
 * Whether a caller may open a device node at all. The kernel checks that again (the mount has
 * default_permissions); this check only prevents that an unprivileged
 * caller makes the daemon open a disk. So the answer is false only if the
 * kernel is certain to refuse, and true in doubt.
 */
import { LRUCache } from 'lru-cache'

import { FairQueue } from '../fuse/fair-queue.js'
import type { Native, ThreadCredentials } from '../native.js'
import type { Caller } from '../fuse/transport.js'

export interface Permissions {
  readonly mode: number
  readonly uid: number
  readonly gid: number
  /** system.posix_acl_access, where the node has one. */
  readonly acl?: Uint8Array
}

/** capability.h */
const CAP_DAC_OVERRIDE = 1n << 1n
const CAP_DAC_READ_SEARCH = 1n << 2n
const CAP_SYS_ADMIN = 1n << 21n

const READ_OR_WRITE = 0o6

/** uapi/linux/posix_acl.h and posix_acl_xattr.h */
const ACL_VERSION = 2
const ACL_HEADER = 4
const ACL_ENTRY = 8
const AclTag = { USER_OBJ: 1, USER: 2, GROUP_OBJ: 4, GROUP: 8, MASK: 16, OTHER: 32 } as const

/** Reading the status of a thread with this many groups takes long: such users wait in a lane of their own. */
const MANY_GROUPS = 1024
/** Users for which that is remembered. */
const USERS_MAX = 4096

/** What a caller is about to do, as far as that decides which rights it needs. */
export type Purpose =
  /** open(2): the node's mode and ACL decide. */
  | 'open'
  /** By number (mount(2), for example), which CAP_SYS_ADMIN allows whatever the node's mode is. */
  | 'by number'
  /** With credentials that may not be those of its thread (io_uring's personalities). */
  | 'unclear'

interface Question {
  readonly caller: Caller
  /** See {@link Native.userNamespace}. */
  readonly namespace: number | undefined
  /** The user who owns the caller's user namespace: one for all ids that a user maps into its own namespaces. */
  readonly user: number
  readonly node: Permissions
  readonly purpose: Purpose
  readonly done: (may: boolean) => void
}

/** Reads one thread's credentials at a time; users take turns. */
class Lane {
  readonly waiting = new FairQueue<Question>()
  busy = false
}

export class Access {
  private readonly buffer = Buffer.alloc(4096)
  private readonly quick = new Lane()
  private readonly slow = new Lane()
  private readonly manyGroups = new LRUCache<number, true>({ max: USERS_MAX })

  constructor(
    private readonly native: Pick<Native, 'readFile' | 'credentials' | 'userNamespace'>,
    private readonly proc = '/proc',
  ) {}

  /**
   * Whether the ids in the request are enough to allow the open. Groups are not in the request and are expensive to
   * find out; and for everybody but the owner an ACL may say something else than the mode.
   */
  certain({ uid }: Caller, node: Pick<Permissions, 'mode' | 'uid'>): boolean {
    return uid === 0 || (uid === node.uid && allows(node.mode >> 6))
  }

  /** Whether only the owner may, and the caller is not the owner: then it may not, whatever it is doing. */
  static hopeless(caller: Caller, { mode, uid }: Pick<Permissions, 'mode' | 'uid'>): boolean {
    return caller.uid !== uid && !allows(mode >> 3) && !allows(mode)
  }

  /**
   * Reads the caller's credentials on another thread, as 65,536 groups take milliseconds. False
   * only if the kernel is certain to refuse.
   *
   * @param caller blocked in the request in question
   */
  mayOpen(caller: Caller, node: Permissions, purpose: Purpose, done: (may: boolean) => void): void {
    if (caller.tid === 0 || purpose === 'unclear' || this.certain(caller, node) || forEverybodyElse(caller, node)) return done(true)
    const namespace = this.native.userNamespace(caller.tid)
    const user = namespace ?? caller.uid
    const lane = this.manyGroups.has(user) ? this.slow : this.quick
    lane.waiting.add(user, { caller, namespace, user, node, purpose, done })
    this.next(lane)
  }

  private next(lane: Lane): void {
    if (lane.busy) return
    const question = lane.waiting.take()
    if (question === undefined) return
    lane.busy = true
    const { caller, user, node, done } = question
    const groups = groupsOf(node)
    this.native.credentials(caller.tid, groups, (found) => {
      lane.busy = false
      if (found !== undefined && found[3] > MANY_GROUPS) this.manyGroups.set(user, true)
      try {
        done(this.judge(question, groups, found))
      } finally {
        this.next(lane)
      }
    })
  }

  private judge({ caller, namespace, node, purpose }: Question, groups: readonly number[], found: ThreadCredentials | undefined): boolean {
    if (found === undefined) return true
    const [fsuid, fsgid, capabilities, , ...member] = found
    // The thread's ids are not those of the request.
    if (fsuid !== caller.uid || fsgid !== caller.gid) return true
    const own = new Set(groups.filter((_, i) => member[i]))
    if (granted(node, caller.uid, own.add(caller.gid))) return true
    const overrides = (capabilities & (CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)) !== 0n
    // True in doubt.
    const ours = namespace === undefined
    if (overrides && (ours || this.maps(caller.tid, node))) return true
    return purpose === 'by number' && (capabilities & CAP_SYS_ADMIN) !== 0n && ours
  }

  /**
   * A capability counts only where the node's owner and group exist in the
   * caller's user namespace (capable_wrt_inode_uidgid). Anybody may make a
   * namespace and have all capabilities in it, but not map other users' ids.
   */
  private maps(tid: number, { uid, gid }: Permissions): boolean {
    return this.hasId(tid, 'uid_map', uid) && this.hasId(tid, 'gid_map', gid)
  }

  private hasId(tid: number, file: string, id: number): boolean {
    const n = this.native.readFile(`${this.proc}/${tid}/${file}`, this.buffer)
    if (n < 0) return true
    // "inside outside length" a line
    return this.buffer
      .toString('latin1', 0, n)
      .split('\n')
      .some((line) => {
        const [, outside, length] = line.trim().split(/\s+/).map(Number)
        return outside !== undefined && length !== undefined && id >= outside && id < outside + length
      })
  }
}

const allows = (bits: number) => (bits & READ_OR_WRITE) !== 0

/** Whether the caller is not the owner, and groups make no difference. */
const forEverybodyElse = (caller: Caller, { mode, uid, acl }: Permissions) =>
  caller.uid !== uid && acl === undefined && allows(mode >> 3) && allows(mode)

/** Whether the mode or the ACL let these ids read or write (posix_acl_permission, fs/posix_acl.c). */
export function granted(node: Permissions, uid: number, groups: ReadonlySet<number>): boolean {
  if (uid === node.uid) return allows(node.mode >> 6)
  const entries = node.acl === undefined ? [] : parseAcl(node.acl)
  if (entries === undefined) return true
  // Without any group bit the kernel does not look at the ACL (acl_permission_check).
  if (entries.length === 0 || (node.mode & 0o070) === 0) {
    return allows(groups.has(node.gid) ? node.mode >> 3 : node.mode)
  }
  const mask = entries.find((entry) => entry.tag === AclTag.MASK)?.permissions ?? 0o7
  const user = entries.find((entry) => entry.tag === AclTag.USER && entry.id === uid)
  if (user !== undefined) return allows(user.permissions & mask)
  const ofGroups = entries.filter(
    (entry) => (entry.tag === AclTag.GROUP_OBJ && groups.has(node.gid)) || (entry.tag === AclTag.GROUP && groups.has(entry.id)),
  )
  if (ofGroups.length > 0) return ofGroups.some((entry) => allows(entry.permissions & mask))
  return allows(node.mode)
}

/** All groups that can make a difference. */
function groupsOf(node: Permissions): number[] {
  const entries = (node.acl === undefined ? undefined : parseAcl(node.acl)) ?? []
  return [node.gid, ...entries.filter(({ tag }) => tag === AclTag.GROUP).map(({ id }) => id)]
}

interface AclEntry {
  readonly tag: number
  readonly permissions: number
  readonly id: number
}

/** @returns undefined for what is no ACL of the version known here */
function parseAcl(bytes: Uint8Array): AclEntry[] | undefined {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  if (bytes.length < ACL_HEADER || view.getUint32(0, true) !== ACL_VERSION) return undefined
  if ((bytes.length - ACL_HEADER) % ACL_ENTRY !== 0) return undefined
  const entries: AclEntry[] = []
  for (let at = ACL_HEADER; at < bytes.length; at += ACL_ENTRY) {
    entries.push({
      tag: view.getUint16(at, true),
      permissions: view.getUint16(at + 2, true),
      id: view.getUint32(at + 4, true),
    })
  }
  return entries
}
