// SPDX-License-Identifier: MIT
/** The daemon's control socket: io.diskseqfs.varlink, which says what each method does. */
import { constants, readFileSync } from 'node:fs'

import { attachDescriptor, type AttachOptions, checkSize, lookAt } from '../disks/attach.js'
import { DiskError, openBeside } from '../disks/open.js'
import { type Native, native } from '../native.js'
import { monotonicMs } from '../util/clock.js'
import { isSectorSize } from '../util/sector-size.js'
import { packageVersion } from '../util/version.js'
import { Interface } from './idl.js'
import { interfaceText } from './interface-text.js'
import type { Rule } from './lease-reply.js'
import { GRACE_SECONDS, Leases, LEASES_MAX, type LeasesParts, PENDING_MAX, type TakeDisk } from './leases.js'
import { type Call, type MethodBody, type Parameters, type Reply, serviceInfo, VarlinkError, VarlinkServer } from './varlink.js'

/** The interface, as its file has it. */
export const readInterface = () => new Interface(interfaceText('io.diskseqfs'))

const error = (name: string, parameters: Parameters) => new VarlinkError(`io.diskseqfs.${name}`, parameters)

export interface BrokerParts extends LeasesParts {
  readonly native: Native
  /** The parts of `Status` that are the tree's. */
  readonly status: () => Parameters & { readonly now: Parameters }
  /** Those of `ListPins`. */
  readonly pins: () => readonly Parameters[]
}

export class Broker {
  readonly leases: Leases
  private server: VarlinkServer | undefined
  private paused = false
  private closed = false
  private readonly began = monotonicMs()

  constructor(private readonly parts: BrokerParts) {
    this.leases = new Leases(parts)
  }

  /**
   * Goes on with leases of an earlier daemon, and takes calls.
   *
   * @param leases as of {@link Leases.takeOver}
   * @param listener of a socket that listens, owned by the caller; negative: none
   */
  async start(leases: readonly number[], listener: number): Promise<void> {
    const { native, log } = this.parts
    await this.leases.takeOver(leases)
    if (this.closed || listener < 0) return
    const methods: Readonly<Record<string, MethodBody>> = {
      Attach: (call) => this.attach(call),
      Release: ({ parameters }) => this.release(parameters['what'] as string),
      ListLeases: () => ({ parameters: { leases: this.leases.list() } }),
      Status: () => ({ parameters: this.status() }),
      ListPins: () => ({ parameters: { pins: this.parts.pins() } }),
    }
    this.server = new VarlinkServer({ native, listener, interfaceText: interfaceText('io.diskseqfs'), methods, info: serviceInfo(), log })
    if (this.paused) this.server.pause()
  }

  /** Takes no more calls: another daemon goes on. */
  pause(): void {
    this.paused = true
    this.server?.pause()
    this.leases.pause()
  }

  /** After {@link pause}: it does not. */
  goOn(): void {
    this.paused = false
    this.leases.goOn()
    this.server?.goOn()
  }

  close(): void {
    this.closed = true
    this.server?.close()
    this.leases.close()
  }

  private async attach({ parameters, fds, connection }: Call): Promise<Reply> {
    const file = fds[parameters['fileDescriptor'] as number]
    if (file === undefined) throw VarlinkError.invalid('fileDescriptor')
    const rule = (parameters['rule'] ?? 'grace') as Rule
    const graceSeconds = (parameters['graceSeconds'] ?? GRACE_SECONDS) as number
    if (graceSeconds < 0 || graceSeconds > GRACE_MAX_S) throw VarlinkError.invalid('graceSeconds')
    const [reason, name] = [textOf(parameters, 'reason'), textOf(parameters, 'file')]
    if (this.leases.full) throw error('TooManyLeases', { limit: LEASES_MAX })
    if (this.leases.stuck) throw error('TooManyUnderWay', { limit: PENDING_MAX })
    try {
      const { take, share } = await this.source(file, parameters)
      const lease = await this.leases.add(take, { rule, graceSeconds, file: name, reason, share })
      const held = this.leases.find(lease, parameters['diskDescriptor'] === true)
      if (held === undefined) throw new DiskError('it was released as soon as it was made', 'ESTALE')
      if (rule === 'connection') connection.onEnd(() => this.leases.leave(lease))
      return {
        parameters: { lease: held.info, ...(held.fd >= 0 && { diskDescriptor: 0 }) },
        fds: held.fd >= 0 ? [held.fd] : [],
        undelivered: () => this.leases.leave(lease),
      }
    } catch (failed) {
      if (!(failed instanceof DiskError)) throw failed
      throw error('CannotAttach', { code: failed.code, message: failed.message })
    }
  }

  /** What the descriptor is of, and so how its disk is had. */
  private async source(file: number, parameters: Parameters): Promise<{ take: TakeDisk; share: string | undefined }> {
    const found = await lookAt(file)
    if ((found.mode & constants.S_IFMT) === constants.S_IFBLK) {
      const given = FILE_OPTIONS.find((option) => parameters[option] !== undefined && parameters[option] !== null)
      if (given !== undefined) throw VarlinkError.invalid(given)
      return { take: (nodes) => openBeside(file, nodes), share: undefined }
    }
    if ((found.mode & constants.S_IFMT) !== constants.S_IFREG) throw new DiskError('neither a regular file nor a block device', 'EINVAL')
    const access = accessOf(file)
    if (access !== constants.O_RDONLY && access !== constants.O_RDWR) throw new DiskError('the descriptor is not open for reading', 'EBADF')
    const options = attachOptions(parameters, access === constants.O_RDWR)
    const length = checkSize(found.size, options)
    const { readOnly, directIo, partscan, offset, sectorSize } = options
    const how = [found.device, found.inode, offset ?? 0n, length, sectorSize ?? 0, readOnly, directIo, partscan].map(String)
    return { take: (nodes) => attachDescriptor(file, options, nodes), share: parameters['share'] === true ? how.join() : undefined }
  }

  private async release(what: string): Promise<Reply> {
    const leases = await this.leases.release(what)
    if (leases.length === 0) throw error('NoSuchLease', { what })
    return { parameters: { leases } }
  }

  private status(): Parameters {
    const tree = this.parts.status()
    const now = { ...tree.now, leases: this.leases.count, connections: this.server?.connected ?? 0 }
    const uptimeUSec = Math.round((monotonicMs() - this.began) * 1000)
    return { version: packageVersion(), pid: process.pid, mountpoint: this.parts.mountpoint, uptimeUSec, ...tree, now }
  }
}

/** A year: longer is "keep". */
const GRACE_MAX_S = 31_536_000
/** Of the names in a call, which are stored with the lease: characters. */
const TEXT_MAX = 4096

const FILE_OPTIONS = ['readOnly', 'directIo', 'partscan', 'offset', 'size', 'sectorSize', 'share'] as const

/** How a descriptor of this process is open, see proc_pid_fdinfo(5). */
function accessOf(fd: number): number {
  const flags = /^flags:\s*([0-7]+)$/m.exec(readFileSync(`/proc/self/fdinfo/${fd}`, 'latin1'))?.[1] ?? '0'
  return Number.parseInt(flags, 8) & (native.O_PATH | constants.O_WRONLY | constants.O_RDWR)
}

function attachOptions(parameters: Parameters, writable: boolean): AttachOptions {
  const bytes = (name: string) => {
    const value = (parameters[name] ?? undefined) as number | undefined
    if (value !== undefined && value < 0) throw VarlinkError.invalid(name)
    return value === undefined ? {} : { [name]: BigInt(value) }
  }
  const sectorSize = (parameters['sectorSize'] ?? undefined) as number | undefined
  if (sectorSize !== undefined && !isSectorSize(sectorSize)) {
    throw VarlinkError.invalid('sectorSize')
  }
  return {
    ...bytes('offset'),
    ...bytes('size'),
    ...(sectorSize !== undefined && { sectorSize }),
    readOnly: parameters['readOnly'] === true || !writable,
    directIo: parameters['directIo'] === true,
    partscan: parameters['partscan'] === true,
  }
}

function textOf(parameters: Parameters, name: string): string | undefined {
  const text = (parameters[name] ?? undefined) as string | undefined
  if (text !== undefined && text.length > TEXT_MAX) throw VarlinkError.invalid(name)
  return text
}
