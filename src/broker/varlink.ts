// SPDX-License-Identifier: MIT
/**
 * The server's side of varlink (varlink.org) on a Unix socket: JSON objects, each ended by NUL; descriptors come with
 * the call that names their index, as in systemd's interfaces. One call of a connection at a time. What a client sends is bounded,
 * checked by the interface file, and never the end of the server.
 */
import { readlinkSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'

import { afterTicks } from '../util/clock.js'
import { E, errnoName } from '../util/errno.js'
import { packageVersion } from '../util/version.js'
import type { Logger } from '../util/log.js'
import type { Native, Poll } from '../native.js'
import { Interface, isObject } from './idl.js'

/** Of a call, bytes. */
export const MESSAGE_MAX = 65_536
export const CONNECTIONS_MAX = 64
/** That come with one call. */
const DESCRIPTORS_MAX = 16
/** What the kernel keeps of replies that a client has not read yet, bytes. */
const SEND_BYTES = 1 << 20
/** A client that reads none of its reply for so long is cut off, ms; in ticks, as the client may be starved with the daemon. */
const UNREAD_MS = 10_000
/** Time until the rest of a reply is sent, ms: each time twice as long, up to a limit. */
const RETRY_MS = 5
const RETRY_MAX_MS = 500

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
  /** The client takes more than one reply. */
  readonly more: boolean
  /** Those that came with the call; those that are still in here at its end are closed. */
  readonly fds: number[]
  /** Ends with the connection. */
  readonly connection: Connection
}

export interface Reply {
  readonly parameters: Parameters
  /** Of the replies before it, to a call that takes more than one. */
  readonly earlier?: readonly Parameters[]
  /** The receiver gets copies; these are closed. */
  readonly fds?: readonly number[]
  /** Called where the client has gone, and does not get this. */
  readonly undelivered?: () => void
}

/** @throws VarlinkError */
export type MethodBody = (call: Call) => Promise<Reply> | Reply

interface ServiceInfo {
  readonly vendor: string
  readonly product: string
  readonly version: string
  readonly url: string
}

export const serviceInfo = (): ServiceInfo => ({
  vendor: 'diskseqfs',
  product: 'diskseqfs',
  version: packageVersion(),
  url: 'man:diskseqfs(8)',
})

type Calls = Pick<
  Native,
  'Poll' | 'acceptConnection' | 'peerUser' | 'sendBuffer' | 'sendDescriptors' | 'receiveDescriptors' | 'write' | 'close' | 'closeFile'
>

export interface ServiceParts {
  readonly native: Calls
  readonly interfaceText: string
  readonly methods: Readonly<Record<string, MethodBody>>
  readonly info: ServiceInfo
  readonly log: Logger
}

export interface ServerParts extends ServiceParts {
  /** Of a socket that listens; owned by the caller. */
  readonly listener: number
}

/** Serves one client until it goes. */
export function serveConnection(fd: number, parts: ServiceParts): Promise<void> {
  return new Promise((resolve) => {
    const connection = new Connection(fd, new Interface(parts.interfaceText), parts, {
      ready: () => setImmediate(() => connection.takeCall()),
      gone: resolve,
    })
    if (isOurs(parts.native.peerUser(fd))) connection.start()
    else connection.refuse(permissionDenied())
  })
}

/** The socket file is root's; but it may have been made accessible, or inherited. */
const isOurs = (uid: number) => uid === process.geteuid?.()
const permissionDenied = () => new VarlinkError(`${SERVICE}.PermissionDenied`)

export class VarlinkServer {
  private interface: Interface | undefined
  private readonly poll: Poll
  private readonly connections = new Set<Connection>()
  /** Connections with a call that is not begun, in order. */
  private readonly ready = new Set<Connection>()
  private turn: NodeJS.Immediate | undefined

  constructor(readonly parts: ServerParts) {
    this.poll = new parts.native.Poll(parts.listener, () => this.accept())
  }

  get connected(): number {
    return this.connections.size
  }

  /** Begins no more calls until {@link goOn}. */
  pause(): void {
    this.poll.pause()
    clearImmediate(this.turn)
    this.turn = undefined
    for (const connection of this.connections) connection.pause()
  }

  goOn(): void {
    this.poll.resume()
    for (const connection of this.connections) connection.goOn()
  }

  close(): void {
    this.poll.close()
    clearImmediate(this.turn)
    for (const connection of this.connections) connection.close()
  }

  /** One call in a turn of the event loop, from each connection in turn: however many there are, the tree is served in between. */
  private enqueue(connection: Connection): void {
    this.ready.add(connection)
    this.turn ??= setImmediate(() => {
      this.turn = undefined
      const [next] = this.ready
      if (next === undefined) return
      this.ready.delete(next)
      const [after] = this.ready
      if (after !== undefined) this.enqueue(after)
      next.takeCall()
    })
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
    native.sendBuffer(fd, SEND_BYTES)
    // That takes longer than the rest of a start: the first client has to wait for it.
    const own = (this.interface ??= new Interface(this.parts.interfaceText))
    const connection: Connection = new Connection(fd, own, this.parts, {
      ready: () => this.enqueue(connection),
      gone: () => {
        this.connections.delete(connection)
        this.ready.delete(connection)
      },
    })
    if (!isOurs(native.peerUser(fd))) return connection.refuse(permissionDenied())
    if (this.connections.size >= CONNECTIONS_MAX) {
      return connection.refuse(new VarlinkError(`${own.name}.TooManyConnections`, { limit: CONNECTIONS_MAX }))
    }
    this.connections.add(connection)
    connection.start()
  }
}

interface ConnectionEvents {
  /** There is a call to be taken. */
  ready(): void
  /** The client has gone, or was cut off: it counts no more. */
  gone(): void
}

/** Descriptors that came in one piece: with the call that has the last byte of it. */
interface Piece {
  /** Behind it, in bytes since the connection began. */
  readonly end: number
  readonly fds: readonly number[]
}

/** A client. */
export class Connection {
  private readonly input = Buffer.alloc(MESSAGE_MAX)
  private used = 0
  /** Bytes of calls that were taken. */
  private taken = 0
  private pieces: Piece[] = []
  private poll: Poll | undefined
  private polling = true
  /** A call is under way. */
  private busy = false
  private paused = false
  /** Nothing more comes from the client; it may still read. */
  private ended = false
  private closed = false
  private readonly ends: (() => void)[] = []

  constructor(
    private readonly fd: number,
    private readonly own: Interface,
    private readonly parts: ServiceParts,
    private readonly events: ConnectionEvents,
  ) {}

  start(): void {
    this.poll = new this.parts.native.Poll(this.fd, () => this.readable())
  }

  pause(): void {
    this.paused = true
    this.listen()
  }

  goOn(): void {
    this.paused = false
    this.look()
  }

  /** Calls back when it is closed, by whichever side. */
  onEnd(call: () => void): void {
    if (this.closed || this.ended) call()
    else this.ends.push(call)
  }

  refuse(error: VarlinkError): void {
    const text = message(error)
    this.parts.native.sendDescriptors(this.fd, text, [])
    this.close()
  }

  close(): void {
    if (this.closed) return
    this.closed = true
    this.poll?.close()
    this.parts.native.close(this.fd)
    for (const { fds } of this.pieces.splice(0)) this.closeAll(fds)
    this.end()
  }

  /** The first call in the input, if there is a whole one. */
  takeCall(): void {
    if (this.closed || this.busy || this.paused) return
    const length = this.callLength()
    if (length === 0) return
    const text = this.input.toString('utf8', 0, length - 1)
    this.input.copyWithin(0, length, this.used)
    this.used -= length
    this.taken += length
    const fds: number[] = []
    for (let piece; (piece = this.pieces[0]) !== undefined && piece.end <= this.taken; this.pieces.shift()) fds.push(...piece.fds)
    this.busy = true
    this.listen()
    void this.serve(text, fds).finally(() => {
      this.closeAll(fds)
      this.busy = false
      this.look()
    })
  }

  /** With its NUL; 0 where there is no whole one. */
  private callLength(): number {
    return this.input.subarray(0, this.used).indexOf(NUL) + 1
  }

  /** What comes next: a call that is there, or more of one, or nothing. */
  private look(): void {
    if (this.closed) return
    if (this.callLength() > 0) {
      if (!this.paused) this.events.ready()
    } else if (this.used === MESSAGE_MAX) {
      return this.cut(`a call of more than ${MESSAGE_MAX} bytes`)
    } else if (this.ended && !this.busy) {
      return this.close()
    }
    this.listen()
  }

  /**
   * Also while a call is under way, as far as there is room: that the client has gone is known by its end. Descriptors stay with the kernel
   * until the call that they come with is the next one.
   */
  private listen(): void {
    const wanted = !this.paused && !this.ended && this.used < MESSAGE_MAX && !(this.callLength() > 0 && this.pieces.length > 0)
    if (wanted !== this.polling) (wanted ? this.poll?.resume : this.poll?.pause)?.call(this.poll)
    this.polling = wanted
  }

  private readable(): void {
    const found = this.parts.native.receiveDescriptors(this.fd, this.input.subarray(this.used), false)
    if (found === -E.EAGAIN) return
    if (typeof found === 'number' || found[0] === 0) {
      this.end()
      return this.look()
    }
    const [length = 0, ...fds] = found
    this.used += length
    if (fds.length > 0) this.pieces.push({ end: this.taken + this.used, fds })
    if (this.pieces.reduce((sum, piece) => sum + piece.fds.length, 0) > DESCRIPTORS_MAX)
      return this.cut('too many descriptors with one call')
    // No call has a use for one; and the other end of this very connection, in here, would keep it open for ever.
    if (fds.some(isSocket)) return this.cut('a socket among the descriptors of a call')
    this.look()
  }

  /** The client has gone, or will send no more. */
  private end(): void {
    if (this.ended) return
    this.ended = true
    this.events.gone()
    for (const call of this.ends.splice(0)) call()
  }

  private async serve(text: string, fds: number[]): Promise<void> {
    const call = parseCall(text)
    if (call === undefined) return this.cut('what is no call of varlink')
    try {
      const reply = await this.dispatch(call, fds)
      const { earlier = [], fds: own = [] } = reply
      const text = earlier.map((parameters) => message({ parameters, continues: true })).join('') + message(reply)
      const sent = call.oneway || (await this.send(text, own))
      this.closeAll(own)
      if (!sent) reply.undelivered?.()
    } catch (error) {
      if (!(error instanceof VarlinkError)) {
        this.parts.log.error({ err: error, method: call.method }, 'a call failed unexpectedly')
        return this.close()
      }
      if (!call.oneway) await this.send(message(error), [])
    }
  }

  private async dispatch({ method: name, parameters, more }: ParsedCall, fds: number[]): Promise<Reply> {
    const { own } = this
    const { methods, info } = this.parts
    const dot = name.lastIndexOf('.')
    const [interfaceName, member] = dot < 0 ? ['', name] : [name.slice(0, dot), name.slice(dot + 1)]
    if (interfaceName === own.name) {
      const method = own.methods.get(member)
      const body = methods[member]
      if (method === undefined || body === undefined) throw new VarlinkError(`${SERVICE}.MethodNotFound`, { method: name })
      const wrong = own.mismatch(parameters, method.takes)
      if (wrong !== undefined) throw VarlinkError.invalid(wrong)
      return body({ parameters, more, fds, connection: this })
    }
    if (interfaceName !== SERVICE) throw new VarlinkError(`${SERVICE}.InterfaceNotFound`, { interface: interfaceName })
    if (member === 'GetInfo') return { parameters: { ...info, interfaces: [own.name, SERVICE] } }
    if (member !== 'GetInterfaceDescription') throw new VarlinkError(`${SERVICE}.MethodNotFound`, { method: name })
    const { interface: wanted } = parameters
    if (typeof wanted !== 'string') throw VarlinkError.invalid('interface')
    const description = wanted === own.name ? own.text : wanted === SERVICE ? SERVICE_INTERFACE : undefined
    if (description === undefined) throw new VarlinkError(`${SERVICE}.InterfaceNotFound`, { interface: wanted })
    return { parameters: { description } }
  }

  /** @returns whether the client has got all of it, as far as can be known */
  private async send(text: string, fds: readonly number[]): Promise<boolean> {
    if (this.closed) return false
    const bytes = Buffer.from(text)
    const sent = this.parts.native.sendDescriptors(this.fd, text, fds)
    return sent === bytes.length || this.sendRest(bytes, sent, sent > 0 ? [] : fds)
  }

  /** Waits until the client has read more of what it was sent; it gets no other reply meanwhile. */
  private async sendRest(bytes: Buffer, sent: number, fds: readonly number[]): Promise<boolean> {
    const { native } = this.parts
    let at = Math.max(0, sent)
    let waits = RETRY_MS
    let late = false
    let inTime = afterTicks(UNREAD_MS, () => (late = true))
    while (sent >= 0 || sent === -E.EAGAIN) {
      if (sent > 0) {
        waits = RETRY_MS
        inTime()
        inTime = afterTicks(UNREAD_MS, () => (late = true))
      }
      if (at === bytes.length || this.closed || late) break
      await sleep(waits)
      waits = Math.min(2 * waits, RETRY_MAX_MS)
      if (this.closed) break
      const rest = bytes.subarray(at)
      sent = at === 0 ? native.sendDescriptors(this.fd, rest.toString(), fds) : native.write(this.fd, rest, rest.length)
      at += Math.max(0, sent)
    }
    inTime()
    if (late) this.cut('a client that does not read its reply')
    return at === bytes.length
  }

  private cut(why: string): void {
    this.parts.log.warn({ why }, 'a connection to the control socket is closed')
    this.close()
  }

  private closeAll(fds: readonly number[]): void {
    for (const fd of fds) this.parts.native.closeFile(fd, () => {})
  }
}

/** By its name in /proc: to look at a file might wait for its filesystem. */
const isSocket = (fd: number): boolean => readlinkSync(`/proc/self/fd/${fd}`).startsWith('socket:')

const message = ({ error, parameters, continues }: { error?: string; parameters: Parameters; continues?: boolean }): string =>
  `${JSON.stringify({ ...(error !== undefined && { error }), parameters, ...(continues === true && { continues }) })}\0`

interface ParsedCall {
  readonly method: string
  readonly parameters: Parameters
  readonly oneway: boolean
  readonly more: boolean
}

function parseCall(text: string): ParsedCall | undefined {
  let call: unknown
  try {
    call = JSON.parse(text)
  } catch {
    return undefined
  }
  if (!isObject(call)) return undefined
  const { method, parameters, oneway, more } = call
  if (typeof method !== 'string') return undefined
  if (parameters !== undefined && parameters !== null && !isObject(parameters)) return undefined
  return { method, parameters: parameters ?? {}, oneway: oneway === true, more: more === true }
}

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
