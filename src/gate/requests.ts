// SPDX-License-Identifier: MIT
/** What comes to the gate, and what it answers. */
import type { NodeStat } from '../devices/device-node.js'
import type { DiskSeq, NodeId } from '../devices/names.js'
import type { Device } from '../devices/sysfs.js'
import type { Caller } from '../fuse/transport.js'
import type { Inode } from './inode.js'

/** What a caller is to be shown of an inode. `stat` and `device` belong together. */
export interface Shown {
  readonly inode: Inode
  readonly device: Device
  readonly stat: NodeStat
  /** The kernel may use the attributes for a moment without asking; only ever of a pinned inode. */
  readonly trusted: boolean
}

/** The gate's answer. */
export type Verdict =
  | Shown
  /** Have the caller wait where it holds up nobody; whether it follows symlinks. */
  | { readonly later: true; readonly follows: boolean }
  /** Have the caller go by the device's own node, and wait on its way there. */
  | { readonly own: true }
  | { readonly errno: number }

/** A name that stands for a device. */
export interface Name {
  readonly name: string
  readonly diskseq: DiskSeq
  readonly partition: number
}

/** A request at the gate. */
export interface Request {
  readonly caller: Caller
  /** Tells how the gate can be told that the caller gives up. */
  readonly onInterrupt: (listener: () => void) => void
}

export interface LookupRequest extends Request, Name {
  /** Where the name is asked for. */
  readonly directory: NodeId
  /** It is the kernel's name of the device. */
  readonly byKernelName: boolean
  /** @returns false where nobody was left to take a device */
  readonly done: (verdict: Verdict) => boolean
}

export interface InodeRequest extends Request {
  readonly inode: Inode
  readonly done: (verdict: Shown | { readonly errno: number }) => boolean
}

export interface WaitRequest extends Request, Name {
  readonly byKernelName: boolean
  /** Gets an errno, or 0: look again. */
  readonly done: (errno: number) => void
}
