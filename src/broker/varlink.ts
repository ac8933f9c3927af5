// SPDX-License-Identifier: MIT
/**
 * The server's side of varlink (varlink.org) on a Unix socket: JSON objects, each ended by NUL; descriptors come with
 * the call that names their index, as in systemd's interfaces. One call of a connection at a time. What a client sends is bounded,
 * checked by the interface file, and never the end of the server.
 */
import { E, errnoName } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import type { Native, Poll } from '../native.js'
import type { Interface } from './idl.js'

/** Of a call, bytes. */
export const MESSAGE_MAX = 65_536
export const CONNECTIONS_MAX = 64
/** That come with one call. */
const DESCRIPTORS_MAX = 16
/** Replies that a client has not read; then it is cut off. Bytes. */
const UNREAD_MAX = 1 << 20

const NUL = 0
const SERVICE = 'org.varlink.service'

export type Parameters = Readonly<Record<string, unknown>>

/** A reply that is an error of varlink, or of the interface. */
export class VarlinkError extends Error {
  constructor(
    readonly error: string,
    readonly parameters: Parameters = {},
  ) {
    super(error)
  }

  static invalid(parameter: string): VarlinkError {
    return new VarlinkError(`${SERVICE}.InvalidParameter`, { parameter })
  }
}

/** What a method is called with: parameters of the types in the interface file, null for those that were left out. */
export interface Call {
  readonly parameters: Parameters
  /** Those that came with the call; those that are still in here at its end are closed. */
  readonly fds: number[]
  /** Ends with the connection. */
  readonly connection: Connection
}

export interface Reply {
  readonly parameters: Parameters
  /** The receiver gets copies. */
  readonly fds?: readonly number[]
}

/** @throws VarlinkError */
export type MethodBody = (call: Call) => Promise<Reply> | Reply

export interface ServiceInfo {
  readonly vendor: string
  readonly product: string
  readonly version: string
  readonly url: string
}

type Calls = Pick<
  Native,
  'Poll' | 'acceptConnection' | 'peerUser' | 'sendBuffer' | 'sendDescriptors' | 'receiveDescriptors' | 'close' | 'closeDevice'
>

export interface ServerParts {
  readonly native: Calls
  /** Of a socket that listens; owned by the caller. */
  readonly listener: number
  readonly interface: Interface
  readonly methods: Readonly<Record<string, MethodBody>>
  readonly info: ServiceInfo
  readonly log: Logger
}

export class VarlinkServer {
  private readonly poll: Poll
  private readonly connections = new Set<Connection>()

  constructor(readonly parts: ServerParts) {
    this.poll = new parts.native.Poll(parts.listener, () => this.accept())
  }

  get connected(): number {
    return this.connections.size
  }

  /** Begins no more calls until {@link goOn}. */
  pause(): void {
    this.poll.pause()
    for (const connection of this.connections) connection.pause()
  }

  goOn(): void {
    this.poll.resume()
    for (const connection of this.connections) connection.goOn()
  }

  close(): void {
    this.poll.close()
    for (const connection of this.connections) connection.close()
  }

  private accept(): void {
    const { native, log } = this.parts
    const fd = native.acceptConnection(this.parts.listener)
    if (fd === -E.EAGAIN) return
    if (fd < 0) {
      // It would be told again at once of a connection that there are no descriptors for.
      this.poll.pause()
      setTimeout(() => this.poll.resume(), 100)
      return log.warn({ errno: errnoName(fd) }, 'cannot accept a connection to the control socket')
    }
    native.sendBuffer(fd, UNREAD_MAX)
    const connection = new Connection(fd, this.parts, () => this.connections.delete(connection))
    const uid = native.peerUser(fd)
    // The socket file is root's; but it may have been made accessible, or inherited.
    if (uid !== process.geteuid?.()) return connection.refuse(new VarlinkError(`${SERVICE}.PermissionDenied`))
    if (this.connections.size >= CONNECTIONS_MAX) {
      return connection.refuse(new VarlinkError(`${this.parts.interface.name}.TooManyConnections`, { limit: CONNECTIONS_MAX }))
    }
    this.connections.add(connection)
    connection.start()
  }
}

/** A client. */
export class Connection {
  private readonly input = Buffer.alloc(MESSAGE_MAX)
  private used = 0
  /** That came with what is in `input`. */
  private fds: number[] = []
  private poll: Poll | undefined
  private busy = false
  private paused = false
  private closed = false
  private readonly ends: (() => void)[] = []

  constructor(
    private readonly fd: number,
    private readonly parts: ServerParts,
    private readonly gone: () => void,
  ) {}

  start(): void {
    this.poll = new this.parts.native.Poll(this.fd, () => this.readable())
  }

  pause(): void {
    this.paused = true
    this.poll?.pause()
  }

  goOn(): void {
    this.paused = false
    this.next()
  }

  /** Calls back when it is closed, by whichever side. */
  onEnd(call: () => void): void {
    if (this.closed) call()
    else this.ends.push(call)
  }

  refuse(error: VarlinkError): void {
    this.send(error, [])
    this.close()
  }

  close(): void {
    if (this.closed) return
    this.closed = true
    this.poll?.close()
    this.parts.native.close(this.fd)
    this.closeDescriptors(this.fds)
    this.gone()
    for (const call of this.ends) call()
  }

  private readable(): void {
    // One call at a time; the next one stays with the kernel.
    while (!this.busy && !this.paused && !this.closed) {
      const found = this.parts.native.receiveDescriptors(this.fd, this.input.subarray(this.used), false)
      if (found === -E.EAGAIN) return
      if (typeof found === 'number' || found[0] === 0) return this.close()
      const [length, ...fds] = found
      this.used += length as number
      this.fds.push(...fds)
      if (this.fds.length > DESCRIPTORS_MAX) return this.cut('too many descriptors with one call')
      this.takeCall()
    }
  }

  /** The first call in the input, if there is a whole one. */
  private takeCall(): void {
    const end = this.input.subarray(0, this.used).indexOf(NUL)
    if (end < 0) {
      if (this.used === MESSAGE_MAX) this.cut(`a call of more than ${MESSAGE_MAX} bytes`)
      return
    }
    const text = this.input.toString('utf8', 0, end)
    this.input.copyWithin(0, end + 1, this.used)
    this.used -= end + 1
    const fds = this.fds
    this.fds = []
    this.busy = true
    this.poll?.pause()
    void this.serve(text, fds).finally(() => {
      this.closeDescriptors(fds)
      this.busy = false
      this.next()
    })
  }

  private next(): void {
    if (this.closed || this.busy || this.paused) return
    this.poll?.resume()
    this.takeCall()
  }

  private async serve(text: string, fds: number[]): Promise<void> {
    const call = parseCall(text)
    if (call === undefined) return this.cut('what is no call of varlink')
    try {
      const { parameters, fds: out = [] } = await this.dispatch(call.method, call.parameters, fds)
      if (!call.oneway) this.send({ parameters }, out)
    } catch (error) {
      if (!(error instanceof VarlinkError)) throw error
      if (!call.oneway) this.send(error, [])
    }
  }

  private async dispatch(name: string, parameters: Parameters, fds: number[]): Promise<Reply> {
    const { interface: own, methods, info } = this.parts
    const [, member = ''] = name.startsWith(`${own.name}.`) ? [own.name, name.slice(own.name.length + 1)] : []
    const method = own.methods.get(member)
    const body = methods[member]
    if (method !== undefined && body !== undefined) {
      const wrong = own.mismatch(parameters, method.takes)
      if (wrong !== undefined) throw VarlinkError.invalid(wrong)
      return body({ parameters, fds, connection: this })
    }
    if (name === `${SERVICE}.GetInfo`) return { parameters: { ...info, interfaces: [own.name, SERVICE] } }
    if (name === `${SERVICE}.GetInterfaceDescription`) {
      const { interface: wanted } = parameters
      if (typeof wanted !== 'string') throw VarlinkError.invalid('interface')
      const description = wanted === own.name ? own.text : wanted === SERVICE ? SERVICE_INTERFACE : undefined
      if (description === undefined) throw new VarlinkError(`${SERVICE}.InterfaceNotFound`, { interface: wanted })
      return { parameters: { description } }
    }
    const dot = name.lastIndexOf('.')
    const known = [own.name, SERVICE].includes(name.slice(0, Math.max(0, dot)))
    throw known
      ? new VarlinkError(`${SERVICE}.MethodNotFound`, { method: name })
      : new VarlinkError(`${SERVICE}.InterfaceNotFound`, { interface: name.slice(0, Math.max(0, dot)) })
  }

  private send(reply: { parameters: Parameters; error?: string }, fds: readonly number[]): void {
    if (this.closed) return
    const { error, parameters } = reply
    const text = `${JSON.stringify({ ...(error !== undefined && { error }), parameters })}\0`
    const sent = this.parts.native.sendDescriptors(this.fd, text, fds)
    if (sent === Buffer.byteLength(text)) return
    if (sent >= 0 || sent === -E.EAGAIN) this.cut('a client that does not read its replies')
    else this.close()
  }

  private cut(why: string): void {
    this.parts.log.warn({ why }, 'a connection to the control socket is closed')
    this.close()
  }

  private closeDescriptors(fds: number[]): void {
    for (const fd of fds.splice(0)) this.parts.native.closeDevice(fd, () => {})
  }
}

function parseCall(text: string): { method: string; parameters: Parameters; oneway: boolean } | undefined {
  let call: unknown
  try {
    call = JSON.parse(text)
  } catch {
    return undefined
  }
  if (!isObject(call)) return undefined
  const { method, parameters, oneway } = call
  if (typeof method !== 'string') return undefined
  if (parameters !== undefined && parameters !== null && !isObject(parameters)) return undefined
  return { method, parameters: parameters ?? {}, oneway: oneway === true }
}

const isObject = (value: unknown): value is Parameters => typeof value === 'object' && value !== null && !Array.isArray(value)

/** As varlink.org has it. */
const SERVICE_INTERFACE = `interface org.varlink.service
method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)
error InterfaceNotFound(interface: string)
error MethodNotFound(method: string)
error MethodNotImplemented(method: string)
error InvalidParameter(parameter: string)
error PermissionDenied()
error ExpectedMore()
`
