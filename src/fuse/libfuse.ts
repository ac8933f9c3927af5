// SPDX-License-Identifier: MIT
/**
 * The tree on the npm package fuse-native, for those who would rather have a
 * library (libfuse 2) between the kernel and the daemon. It hands on paths, and
 * neither who asks nor what the kernel has forgotten. So:
 *
 * - whoever asks for a name may be about to open it, and has it pinned: a look at
 *   a disk opens it;
 * - a pin is held for a time after the last request, see {@link HOLD_MS};
 * - no successor can take the mount over;
 * - no xattrs can be asked for or set (a value larger than the caller's buffer would be
 *   read beyond its end), no times be set (it hands on one of the two), and
 *   the kernel does not know ACLs: a node that has one is its owner's alone.
 */
import { createRequire } from 'node:module'

import { ACL_ACCESS, type Attr, decodeNames, FUSE_ROOT_ID } from './wire.js'
import { E, UserError } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import { ALWAYS, FSTYPE, type MountOptions, SOURCE } from '../util/mountpoint.js'
import type { AttrChange, Reply, Transport, TreeOperations } from './transport.js'

/**
 * How long a pin is held after the last request for its name, ms: a program that
 * has asked and comes to open the device later than this may get another disk.
 */
export const HOLD_MS = 1000

const LISTING_MAX = 1 << 20
/** Every caller, as far as that is known here. What the kernel lets pass by mode and owner (default_permissions), passes. */
const SOMEBODY = { tid: 0, uid: 0, gid: 0 }
/** chown(2): leave it alone. */
const KEEP_ID = 0xffffffff
const S_IFMT = 0o170000
const S_IFDIR = 0o040000
const S_IFBLK = 0o060000

type Done<T extends unknown[] = []> = (error: number, ...results: T) => void

interface Fuse {
  mount(done: (error: Error | null) => void): void
}
type FuseConstructor = new (mountpoint: string, operations: object, options: object) => Fuse

/** @throws UserError where the package, or the library it needs, is missing */
function load(): FuseConstructor {
  try {
    return createRequire(import.meta.url)('fuse-native') as FuseConstructor
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException
    if (message.includes('libfuse.so.2')) {
      throw new UserError('--transport fuse-native: libfuse.so.2 is missing; apt-get install libfuse2 (Debian 13: libfuse2t64)')
    }
    if (code === 'MODULE_NOT_FOUND') {
      const directory = decodeURI(new URL('..', import.meta.url).pathname)
      throw new UserError(`--transport fuse-native: the package is missing; npm install --prefix ${directory} fuse-native`)
    }
    throw new UserError(`--transport fuse-native: the package does not load: ${message.split('\n')[0]}`)
  }
}

/** Requests that would change the shape of the tree, by how many arguments come before the callback. */
const SHAPE_CHANGES = { create: 2, mknod: 3, mkdir: 2, rmdir: 1, rename: 2, link: 2, symlink: 2 }

/** A reply of which some answers are expected; `failed` gets an errno. */
function reply(failed: (errno: number) => void, expected: Partial<Reply>): Reply {
  const unexpected = () => {
    throw new Error('an answer of the wrong kind')
  }
  return {
    entry: unexpected,
    attr: unexpected,
    open: unexpected,
    data: unexpected,
    xattrSize: unexpected,
    statfs: unexpected,
    ok: unexpected,
    error: failed,
    onInterrupt() {}, // the library does not tell
    ...expected,
  }
}

export interface FuseNativeParts {
  readonly mountpoint: string
  readonly options: MountOptions
  /** Whether the device with that inode's name may come back with another device number. */
  readonly renumbers: (ino: bigint) => boolean
  readonly log: Logger
}

export class FuseNativeTransport implements Transport {
  readonly ended: Promise<void>
  private readonly Fuse = load()
  private end!: () => void
  private operations!: TreeOperations
  /** Lookups that were answered, by node: forgotten when the hold is over. */
  private readonly held = new Map<bigint, { count: number; readonly timer: NodeJS.Timeout }>()
  /** The device number that the inode of a path was made with: the library makes no other. */
  private readonly numbers = new Map<string, number>()

  /** @throws UserError where it cannot be used, or not with these options */
  constructor(private readonly parts: FuseNativeParts) {
    const { options } = parts
    if (options.labels.length > 0 || options.flags !== ALWAYS) {
      throw new UserError('--transport fuse-native: no mount options can be set with it; leave them out, or the transport', 2)
    }
    this.ended = new Promise((resolve) => (this.end = resolve))
  }

  async start(operations: TreeOperations): Promise<void> {
    this.operations = operations
    const options = {
      allowOther: true,
      defaultPermissions: true,
      // The library has no options for these, but takes any text for a name:
      // without dev, no node could be opened.
      fsname: `${SOURCE},dev,noexec`,
      subtype: FSTYPE.slice('fuse.'.length),
      // As text: 0 is taken for an option that is not given. One jiffy, as in the tree's own answers.
      entryTimeout: '0',
      attrTimeout: '0.000001',
      timeout: false, // the gate has its own
    }
    const fuse = new this.Fuse(this.parts.mountpoint, this.handlers(), options)
    await new Promise<void>((resolve, reject) =>
      fuse.mount((error) =>
        error === null ? resolve() : reject(new UserError(`cannot mount at ${this.parts.mountpoint}: ${error.message}`)),
      ),
    )
    this.parts.log.warn(
      { holdMs: HOLD_MS },
      'transport fuse-native: opens are verified, but a program that opens a path later than the hold after it looked it up ' +
        'may get another disk; a look at a disk opens it; restarts unmount the tree',
    )
  }

  close(): void {
    for (const { timer } of this.held.values()) clearTimeout(timer)
    this.held.clear()
    this.end()
  }

  /** Finds the node of a path, and has it held. Directories are found without attributes. */
  private find(path: string, failed: Done, found: (id: bigint, attr: Attr | undefined) => void): void {
    const names = Buffer.from(path)
      .toString('latin1')
      .split('/')
      .filter((name) => name !== '')
    const fail = (errno: number) => failed(-errno)
    const step = (directory: bigint): void => {
      const name = names.shift()
      if (name === undefined) return found(directory, undefined)
      this.operations.lookup(
        SOMEBODY,
        directory,
        name,
        reply(fail, {
          entry: ({ nodeid, attr }) => {
            if ((attr.mode & S_IFMT) === S_IFDIR) {
              step(nodeid)
              return true
            }
            this.hold(nodeid)
            const errno = names.length > 0 ? E.ENOTDIR : this.objection(path, attr)
            if (errno === 0) found(nodeid, attr)
            else fail(errno)
            return true
          },
        }),
      )
    }
    step(FUSE_ROOT_ID)
  }

  /** What is wrong with an answer that the library cannot hand on; an errno, or 0. */
  private objection(path: string, attr: Attr): number {
    if ((attr.mode & S_IFMT) !== S_IFBLK || !this.parts.renumbers(attr.ino)) return 0
    const number = this.numbers.get(path) ?? attr.rdev
    this.numbers.set(path, number)
    return number === attr.rdev ? 0 : E.ESTALE
  }

  private hold(id: bigint): void {
    const held = this.held.get(id)
    if (held !== undefined) {
      held.count++
      held.timer.refresh()
      return
    }
    const timer = setTimeout(() => {
      const count = this.held.get(id)?.count ?? 0
      this.held.delete(id)
      this.operations.forget(id, BigInt(count))
    }, HOLD_MS)
    this.held.set(id, { count: 1, timer })
  }

  private change(path: string, change: AttrChange, done: Done): void {
    this.find(path, done, (id) =>
      this.operations.setattr(
        SOMEBODY,
        id,
        change,
        reply((errno) => done(-errno), { attr: () => (done(0), true) }),
      ),
    )
  }

  /** With what the library calls as its documentation says. */
  private handlers() {
    const { operations } = this
    return {
      getattr: (path: string, done: Done<[object?]>) =>
        this.find(path, done, (id, attr) => {
          if (attr !== undefined) {
            const answer = (permissions: number) => done(0, stat({ ...attr, mode: attr.mode & (S_IFMT | permissions) }))
            return operations.getxattr(
              SOMEBODY,
              id,
              ACL_ACCESS,
              0,
              reply(() => answer(0o777), { xattrSize: () => answer(0o700) }),
            )
          }
          operations.getattr(
            SOMEBODY,
            id,
            reply((errno) => done(-errno), { attr: (root) => (done(0, stat(root)), true) }),
          )
        }),
      readlink: (path: string, done: Done<[string?]>) =>
        this.find(path, done, (id) =>
          operations.readlink(
            SOMEBODY,
            id,
            reply((errno) => done(-errno), { data: (target) => done(0, Buffer.from(target).toString()) }),
          ),
        ),
      readdir: (path: string, done: Done<[string[]?]>) =>
        this.find(path, done, (id) => {
          const fail = (errno: number) => done(-errno)
          operations.opendir(
            id,
            reply(fail, {
              open: () => {
                const names: string[] = []
                const more = (cookie: bigint) =>
                  operations.readdir(
                    id,
                    cookie,
                    LISTING_MAX,
                    reply(fail, {
                      data: (bytes) => {
                        const last = decodeNames(bytes, names)
                        if (last !== undefined) return more(last)
                        done(0, names)
                      },
                    }),
                  )
                more(0n)
                return true
              },
            }),
          )
        }),
      statfs: (_: string, done: Done<[object?]>) =>
        operations.statfs(
          reply((errno) => done(-errno), {
            statfs: (namemax) => done(0, { bsize: 4096, frsize: 4096, namemax }),
          }),
        ),
      chmod: (path: string, mode: number, done: Done) => this.change(path, { mode }, done),
      chown: (path: string, uid: number, gid: number, done: Done) =>
        this.change(path, { ...(uid >>> 0 !== KEEP_ID && { uid }), ...(gid >>> 0 !== KEEP_ID && { gid }) }, done),
      ...Object.fromEntries(
        Object.entries(SHAPE_CHANGES).map(([name, count]) => [name, (...given: unknown[]) => (given[count] as Done)(-E.EPERM)]),
      ),
      unlink: (_: string, done: Done) =>
        operations.unlink(
          SOMEBODY,
          reply((errno) => done(-errno), {}),
        ),
    }
  }
}

/** The library knows times in ms only. */
function stat({ atimeNs, mtimeNs, ctimeNs, ...attr }: Attr): object {
  const ms = (seconds: number, nanoseconds: number) => seconds * 1000 + Math.floor(nanoseconds / 1e6)
  return {
    ...attr,
    ino: Number(BigInt.asUintN(32, attr.ino)),
    atime: ms(attr.atime, atimeNs),
    mtime: ms(attr.mtime, mtimeNs),
    ctime: ms(attr.ctime, ctimeNs),
  }
}
