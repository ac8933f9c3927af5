// SPDX-License-Identifier: MIT
/** A client of the control socket. */
import { setTimeout as sleep } from 'node:timers/promises'

import { type Native, native as ownNative, type Poll } from '../native.js'
import { E, errnoName, UserError } from '../util/errno.js'
import { DEFAULT_MOUNTPOINT, FSTYPE, mountsAt, withoutSymlinks } from '../util/mountpoint.js'
import { printable } from '../util/text.js'
import { controlSocketOf, DEFAULT_CONTROL_SOCKET } from './socket.js'
import { type Parameters, VarlinkError } from './varlink.js'

type Calls = Pick<Native, 'Poll' | 'streamConnect' | 'sendDescriptors' | 'receiveDescriptors' | 'close'>

/** Time until a connection is tried again that the daemon had no room for yet, ms. */
const RETRY_MS = 20
const NUL = 0

/**
 * The control socket of a tree.
 *
 * @throws UserError where none is mounted
 */
export function findControlSocket(tree: string): string {
  const mountpoint = withoutSymlinks(tree)
  const top = mountsAt(mountpoint).at(-1)
  if (top?.type === FSTYPE) return controlSocketOf(top.device)
  // It may be served where this process does not see the mount.
  if (mountpoint === DEFAULT_MOUNTPOINT) return DEFAULT_CONTROL_SOCKET
  throw new UserError(`${printable(tree)}: no tree is mounted there`)
}

export class Client {
  private readonly chunk = Buffer.alloc(65_536)
  private text: Buffer[] = []
  private poll: Poll | undefined
  private closed = false

  private constructor(
    private readonly native: Calls,
    private readonly fd: number,
    private readonly path: string,
  ) {}

  /** @throws UserError where nobody listens */
  static async connect(path: string, native: Calls = ownNative): Promise<Client> {
    for (;;) {
      const fd = native.streamConnect(path)
      if (fd >= 0) return new Client(native, fd, path)
      if (fd !== -E.EAGAIN) throw new UserError(`${path}: ${whyNotConnected(fd)}`)
      await sleep(RETRY_MS)
    }
  }

  /**
   * Calls a method, and waits for its reply for as long as that takes.
   *
   * @throws VarlinkError the error that is the reply
   * @throws UserError where the connection ends before
   */
  async call(method: string, parameters: Parameters = {}, fds: readonly number[] = []): Promise<Parameters> {
    const text = Buffer.from(`${JSON.stringify({ method, parameters })}\0`)
    const sent = this.native.sendDescriptors(this.fd, text.toString(), fds)
    // One that was refused has its reply already, and the other end is closed.
    if (sent !== text.length && sent !== -E.EPIPE)
      throw new UserError(`${this.path}: ${sent < 0 ? errnoName(sent) : 'a call that is too long'}`)
    const reply = JSON.parse(await this.receive()) as { error?: string; parameters?: Parameters }
    if (reply.error !== undefined) throw new VarlinkError(reply.error, reply.parameters ?? {})
    return reply.parameters ?? {}
  }

  close(): void {
    if (this.closed) return
    this.closed = true
    this.poll?.close()
    this.native.close(this.fd)
  }

  private receive(): Promise<string> {
    return new Promise((resolve, reject) => {
      const poll = (this.poll = new this.native.Poll(this.fd, () => {
        for (;;) {
          const found = this.native.receiveDescriptors(this.fd, this.chunk, false)
          if (found === -E.EAGAIN) return
          const [length = 0, ...fds] = typeof found === 'number' ? [] : found
          // None is asked for.
          for (const fd of fds) this.native.close(fd)
          this.text.push(Buffer.from(this.chunk.subarray(0, length)))
          const ended = this.chunk.subarray(0, length).at(-1) === NUL
          if (length > 0 && !ended) continue
          poll.close()
          if (!ended) return reject(new UserError(`${this.path}: the daemon closed the connection before it answered; try again`))
          const text = Buffer.concat(this.text).toString('utf8').slice(0, -1)
          this.text = []
          return resolve(text)
        }
      }))
    })
  }
}

function whyNotConnected(errno: number): string {
  switch (-errno) {
    case E.ENOENT:
      return 'there is no control socket; is the service running (systemctl start diskseqfs)?'
    case E.ECONNREFUSED:
      return 'nobody listens there any more; is the service running (systemctl start diskseqfs)?'
    case E.EACCES:
    case E.EPERM:
      return "permission denied: leases are root's; run this as root"
    default:
      return errnoName(errno)
  }
}

/** The error that is a reply, in words. */
export function describe({ error, parameters }: VarlinkError): string {
  switch (error.slice(error.lastIndexOf('.') + 1)) {
    case 'CannotAttach':
      return String(parameters['message'])
    case 'NoSuchLease':
      return 'there is no such lease, and no lease of a disk of that name (diskseqfs leases shows all)'
    case 'TooManyLeases':
      return `the daemon holds ${String(parameters['limit'])} disks already; release some (diskseqfs leases, detach)`
    case 'TooManyUnderWay':
      return `the daemon is busy with ${String(parameters['limit'])} others; does a filesystem hang?`
    case 'TooManyConnections':
      return `${String(parameters['limit'])} clients are connected already`
    case 'InvalidParameter':
      return `${String(parameters['parameter'])} is not possible there`
    default:
      return error
  }
}
