// SPDX-License-Identifier: MIT
/** A disk that the daemon holds, as those see it who ask for it. */
import { resolve } from 'node:path'

import { type AttachOptions, openBacking } from '../disks/attach.js'
import { DiskError, isDevice, openAt } from '../disks/open.js'
import { native } from '../native.js'
import { DEFAULT_MOUNTPOINT } from '../util/mountpoint.js'
import { Client, describe, findControlSocket } from './client.js'
import type { LeaseReply, Rule } from './lease-reply.js'
import { VarlinkError } from './varlink.js'

/** How a file becomes a disk, and for how long. */
export interface LeaseOptions extends Omit<AttachOptions, 'signal'> {
  /** The same disk for all who share the same part of the file. */
  readonly share?: boolean
  /**
   * `grace`: for some seconds, by when somebody else should have opened the disk; `keep`: until it is released; `connection`, the
   * default: until it is released or this process ends.
   */
  readonly rule?: Rule
  /** With `grace`: 30 by default. Counted in seconds in which the daemon runs. */
  readonly graceSeconds?: number
  /** What `diskseqfs leases` is to say of it. */
  readonly reason?: string
  /** Where the tree of the daemon is mounted. */
  readonly tree?: string
}

/** The daemon holds the disk, so its path and its number stay. */
export class Lease implements AsyncDisposable {
  /** By which `diskseqfs detach` ends it. */
  readonly id: string
  /** Of the disk, in the tree: `13`. */
  readonly name: string
  /** Of the disk, in the tree. */
  readonly path: string
  /** The kernel's sequence number of the disk. */
  readonly diskseq: bigint

  /** @internal */
  constructor(
    /** @internal */
    readonly reply: LeaseReply,
    private readonly client: Client,
  ) {
    this.id = reply.lease
    this.name = reply.name
    this.path = reply.path
    this.diskseq = BigInt(reply.diskseq)
  }

  /**
   * Ends it; that it has ended already is no error. Who has opened the disk keeps it.
   *
   * @throws UserError if the daemon has ended
   */
  async release(): Promise<void> {
    try {
      await this.client.call('io.diskseqfs.Release', { what: this.id })
    } catch (error) {
      if (!(error instanceof VarlinkError)) throw error
    } finally {
      this.client.close()
    }
  }

  /** Releases it at the end of a block (`await using`). */
  [Symbol.asyncDispose](): Promise<void> {
    return this.release()
  }

  /** Leaves it to its rule; one of `connection` ends. */
  close(): void {
    this.client.close()
  }
}

/**
 * Makes a regular file a disk, or takes a disk that is there, and has the daemon hold it, for others to open it by its path.
 *
 * @param what path of a file or a block device; opened by this process, which needs the right to
 * @throws DiskError where it cannot be a disk
 * @throws UserError where no daemon answers
 */
export async function lease(what: string, options: LeaseOptions = {}): Promise<Lease> {
  const device = await isDevice(what)
  const fd = device ? (await openAt(what)).fd : await openBacking(what, options)
  let client
  try {
    client = await Client.connect(findControlSocket(options.tree ?? DEFAULT_MOUNTPOINT))
    const { lease } = (await client.call('io.diskseqfs.Attach', parametersOf(what, options, device), [fd])) as unknown as {
      lease: LeaseReply
    }
    return new Lease(lease, client)
  } catch (error) {
    client?.close()
    if (!(error instanceof VarlinkError)) throw error
    const { code } = error.parameters
    throw new DiskError(describe(error), typeof code === 'string' ? code : 'EINVAL')
  } finally {
    native.closeDevice(fd, () => {})
  }
}

function parametersOf(what: string, options: LeaseOptions, device: boolean) {
  const { readOnly, directIo, partscan, offset, size, sectorSize, share, rule = 'connection', graceSeconds, reason } = options
  return {
    fileDescriptor: 0,
    ...(readOnly && !device && { readOnly }),
    ...(directIo && { directIo }),
    ...(partscan && { partscan }),
    ...(offset !== undefined && { offset: Number(offset) }),
    ...(size !== undefined && { size: Number(size) }),
    ...(sectorSize !== undefined && { sectorSize }),
    ...(share && { share }),
    ...{ rule, file: resolve(what) },
    ...(graceSeconds !== undefined && { graceSeconds }),
    ...(reason !== undefined && { reason }),
  }
}
