// SPDX-License-Identifier: MIT
/** Callers and device nodes, for the tests of the access rule. */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import type { Test } from 'tap'

import type { Caller } from '../../src/fuse/transport.js'
import { Access, type Permissions, type Purpose } from '../../src/gate/access.js'
import { native } from '../../src/native.js'

/** Ids that no account needs to have. */
export const OWNER = 60001
export const NAMED_USER = 60002
export const STRANGER = 60003
export const GROUP = 61001
export const NAMED_GROUP = 61002
export const OTHER_GROUP = 61003

/** An ACL in the kernel's format, made by hand. */
export function acl(...entries: [tag: number, permissions: number, id?: number][]): Buffer {
  const bytes = Buffer.alloc(4 + 8 * entries.length)
  bytes.writeUInt32LE(2, 0)
  entries.forEach(([tag, permissions, id = 0xffffffff], i) => {
    bytes.writeUInt16LE(tag, 4 + 8 * i)
    bytes.writeUInt16LE(permissions, 6 + 8 * i)
    bytes.writeUInt32LE(id, 8 + 8 * i)
  })
  return bytes
}

export const ROOTS: Permissions = { mode: 0o060600, uid: 0, gid: 0 }
export const DISK: Permissions = { mode: 0o060660, uid: 0, gid: GROUP }
export const TID = 4711

export const caller = { tid: TID, uid: STRANGER, gid: OTHER_GROUP }

export const CAP_CHOWN = 1n << 0n
export const CAP_DAC_OVERRIDE = 1n << 1n
export const CAP_DAC_READ_SEARCH = 1n << 2n
export const CAP_FOWNER = 1n << 3n
export const CAP_SYS_ADMIN = 1n << 21n
export const ALL_CAPS = (1n << 41n) - 1n

/** The decision as a promise: mayOpen() may call `done` at once, or later. */
export const may = (access: Access, who: Caller, node: Permissions, purpose: Purpose = 'open') =>
  new Promise<boolean>((resolve) => access.mayOpen(who, node, purpose, resolve))

/** One thread: its credentials, as the addon reports them, and a /proc made of files. */
export function fakeThread(t: Test) {
  const proc = mkdtempSync(join(tmpdir(), 'diskseqfs-proc-'))
  t.teardown(() => rmSync(proc, { recursive: true }))
  const thread = {
    /** The user behind its user namespace, if that is not ours. */
    namespace: undefined as number | undefined,
    there: true,
    fsuid: STRANGER,
    fsgid: OTHER_GROUP,
    capabilities: 0n,
    groups: [] as number[],
    /** How often the credentials were read. */
    asked: 0,
  }
  const access = new Access(
    {
      ...native,
      userNamespace: () => thread.namespace,
      credentials(tid, groups, done) {
        thread.asked++
        const { there, fsuid, fsgid, capabilities, groups: own } = thread
        if (tid !== TID || !there) return done(undefined)
        done([fsuid, fsgid, capabilities, own.length, ...groups.map((group) => own.includes(group))])
      },
    },
    proc,
  )
  return {
    access,
    thread,
    put: (file: string, text: string | Buffer) => writeFileSync(join(proc, `${TID}`, file), text),
    task(namespace?: number) {
      thread.namespace = namespace
      mkdirSync(join(proc, `${TID}`), { recursive: true })
    },
    remove: (path: string) => rmSync(join(proc, path), { recursive: true }),
  }
}
