// SPDX-License-Identifier: MIT
/** Requests to the gate, and its answers. */
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
  /** The kernel may use the attributes for a moment without a request; only for a pinned inode. */
  readonly trusted: boolean
}

/** The gate's answer. */
export type Verdict =
  | Shown
  /** Make the caller wait where it delays nobody; `follows`: it follows symlinks. */
  | { readonly later: true; readonly follows: boolean }
  /** Send the caller to the device's node in /dev; it waits on its way there. */
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
  /** Sets the function to call when the caller gives up. */
  readonly onInterrupt: (listener: () => void) => void
}

export interface LookupRequest extends Request, Name {
  /** The directory that the name is looked up in. */
  readonly directory: NodeId
  /** Whether it is the kernel's name of the device. */
  readonly byKernelName: boolean
  /** @returns false if the caller was gone */
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
