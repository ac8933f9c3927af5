/**
 * Whether a caller could open a node at all. The kernel decides that again
 * (the mount has default_permissions); here it only keeps an unprivileged
 * caller from making the daemon open a disk which that caller could not.
 * So: false only when the kernel is certain to refuse, true in doubt.
 */
import { readlinkSync } from 'node:fs'

import { errnoOf } from './errno.js'
import type { Native } from './native.js'
import type { Caller } from './transport.js'

export interface Permissions {
  readonly mode: number
  readonly uid: number
  readonly gid: number
  /** system.posix_acl_access, where the node has one. */
  readonly acl?: Uint8Array
}

interface Credentials {
  readonly groups: ReadonlySet<number>
  /** CAP_DAC_OVERRIDE or CAP_DAC_READ_SEARCH in its own user namespace. */
  readonly overrides: boolean
}

/** capability.h */
const CAP_DAC_OVERRIDE = 1n << 1n
const CAP_DAC_READ_SEARCH = 1n << 2n

const READ_OR_WRITE = 0o6

/** /proc/TID/status of a task with 65,536 groups (NGROUPS_MAX). */
const STATUS_MAX = 1 << 20

/** uapi/linux/posix_acl.h and posix_acl_xattr.h */
const ACL_VERSION = 2
const ACL_HEADER = 4
const ACL_ENTRY = 8
const AclTag = { USER_OBJ: 1, USER: 2, GROUP_OBJ: 4, GROUP: 8, MASK: 16, OTHER: 32 } as const

export class Access {
  private readonly buffer = Buffer.alloc(STATUS_MAX)

  constructor(
    private readonly native: Pick<Native, 'readFile'>,
    private readonly proc = '/proc',
  ) {}

  mayOpen(caller: Caller, node: Permissions): boolean {
    if (caller.uid === 0 || caller.tid === 0) return true
    // Its owner, or anybody where groups make no difference: no need to ask for them.
    const groupsMatter = node.acl !== undefined || !allows(node.mode >> 3)
    const own = new Set([caller.gid])
    if ((caller.uid === node.uid || !groupsMatter) && granted(node, caller.uid, own)) return true
    const credentials = this.credentials(caller.tid)
    if (credentials === undefined) return true
    if (granted(node, caller.uid, new Set([...credentials.groups, caller.gid]))) return true
    return credentials.overrides && this.ownsMapped(caller.tid, node)
  }

  private credentials(tid: number): Credentials | undefined {
    const n = this.native.readFile(`${this.proc}/${tid}/status`, this.buffer)
    if (n <= 0) return undefined
    const text = this.buffer.toString('latin1', 0, n)
    // A line ends with a line feed and nothing else: the thread's name, which it
    // chooses itself, may hold whatever JavaScript also takes for an end ("\r").
    const groups = /\nGroups:\t((?:\d+ )*) ?\n/.exec(text)?.[1]
    const effective = /\nCapEff:\t([0-9a-f]{16})\n/.exec(text)?.[1]
    if (groups === undefined || effective === undefined) return undefined
    const capabilities = BigInt(`0x${effective}`)
    return {
      groups: new Set(groups.split(' ').filter((group) => group !== '').map(Number)),
      overrides: (capabilities & (CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)) !== 0n,
    }
  }

  /**
   * A capability counts only where the node's owner and group exist in the
   * caller's user namespace (capable_wrt_inode_uidgid). Anybody may make a
   * namespace and have all capabilities in it, but not map other users' ids.
   */
  private ownsMapped(tid: number, node: Permissions): boolean {
    try {
      if (
        readlinkSync(`${this.proc}/${tid}/ns/user`) === readlinkSync(`${this.proc}/self/ns/user`)
      ) {
        return true
      }
    } catch (error) {
      errnoOf(error)
      return true
    }
    return this.maps(tid, 'uid_map', node.uid) && this.maps(tid, 'gid_map', node.gid)
  }

  private maps(tid: number, file: string, id: number): boolean {
    const n = this.native.readFile(`${this.proc}/${tid}/${file}`, this.buffer)
    if (n < 0) return true
    // "inside outside length" a line
    return this.buffer
      .toString('latin1', 0, n)
      .split('\n')
      .some((line) => {
        const [, outside, length] = line.trim().split(/\s+/).map(Number)
        return (
          outside !== undefined && length !== undefined && id >= outside && id < outside + length
        )
      })
  }
}

const allows = (bits: number) => (bits & READ_OR_WRITE) !== 0

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
    (entry) =>
      (entry.tag === AclTag.GROUP_OBJ && groups.has(node.gid)) ||
      (entry.tag === AclTag.GROUP && groups.has(entry.id)),
  )
  if (ofGroups.length > 0) return ofGroups.some((entry) => allows(entry.permissions & mask))
  return allows(node.mode)
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
