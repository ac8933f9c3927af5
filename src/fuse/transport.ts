// SPDX-License-Identifier: MIT
/**
 * What stands between the kernel and the tree. A transport turns requests into
 * calls of {@link TreeOperations} and each {@link Reply} into one answer. The
 * session on /dev/fuse is one transport, the package fuse-native another; anything
 * that can call these few methods can serve the same tree.
 */
import type { Attr, Entry, Validity } from './wire.js'

/** What `--transport` takes: the daemon's own session, or the npm package (libfuse.ts). */
export const TRANSPORTS = ['session', 'fuse-native'] as const
export type TransportName = (typeof TRANSPORTS)[number]

/** The caller of a request. */
export interface Caller {
  /** Thread id; 0 where it lives in another pid namespace or is not known. */
  readonly tid: number
  readonly uid: number
  readonly gid: number
}

/** The one answer to a request. Each request gets exactly one. */
export interface Reply {
  /** These return false if the caller was gone: then the answer had no effect. */
  entry(entry: Entry): boolean
  attr(attr: Attr, valid: Validity): boolean
  open(handle: bigint): boolean
  data(bytes: Uint8Array): void
  xattrSize(size: number): void
  statfs(nameLength: number): void
  ok(): void
  /** A positive errno. */
  error(errno: number): void
  /**
   * The caller wants to give up (a signal). Only called while the request is
   * unanswered; at once if the signal came before. The last listener counts.
   */
  onInterrupt(listener: () => void): void
}

export interface AttrChange {
  readonly mode?: number
  readonly uid?: number
  readonly gid?: number
  readonly size?: true
  /** Seconds and nanoseconds, or the time of the change. */
  readonly atime?: readonly [number, number] | 'now'
  readonly mtime?: readonly [number, number] | 'now'
}

/** Everything this filesystem can be asked. Whatever else arrives, the transport refuses. */
export interface TreeOperations {
  lookup(caller: Caller, parent: bigint, name: string, reply: Reply): void
  /** There are no more requests to be read for now, and what was submitted to other threads has had a moment. */
  turnEnds(): void
  forget(nodeid: bigint, count: bigint): void
  getattr(caller: Caller, nodeid: bigint, reply: Reply): void
  setattr(caller: Caller, nodeid: bigint, change: AttrChange, reply: Reply): void
  readlink(caller: Caller, nodeid: bigint, reply: Reply): void
  opendir(nodeid: bigint, reply: Reply): void
  readdir(nodeid: bigint, cookie: bigint, size: number, reply: Reply): void
  statfs(reply: Reply): void
  getxattr(caller: Caller, nodeid: bigint, name: string, size: number, reply: Reply): void
  listxattr(caller: Caller, nodeid: bigint, size: number, reply: Reply): void
  setxattr(caller: Caller, nodeid: bigint, name: string, value: Uint8Array, flags: number, reply: Reply): void
  removexattr(caller: Caller, nodeid: bigint, name: string, reply: Reply): void
  unlink(caller: Caller, reply: Reply): void
}

/** What the kernel can be asked and told of an inode. */
export interface KernelCache {
  /** Whether it has one of that id; takes its attributes back. */
  invalidate(id: bigint): boolean
  /** Makes the kernel forget the inode, unless it is in use; false if the kernel cannot be told that. */
  prune(id: bigint): boolean
}

export interface Transport {
  /** Serves until the mount goes; resolves once the kernel has agreed to the protocol. */
  start(operations: TreeOperations): Promise<void>
  /** Resolves when the kernel has ended the connection (an unmount, an abort). */
  readonly ended: Promise<void>
  /** Lets go of the connection. Requests under way fail with ENOTCONN. */
  close(): void
}
