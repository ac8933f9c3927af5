// SPDX-License-Identifier: MIT
/**
 * What a service that is no guard's tells its manager, sd_notify(3): that the tree
 * answers, that it stops, and, for the watchdog, that the daemon is alive.
 */
import { E, errnoName } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import type { Native } from '../native.js'

/** How long to wait before a message is tried again that the manager had no room for, ms. */
const RETRY_MS = 100

/** The longest interval of a timer, ms (TIMEOUT_MAX of Node's). */
const INTERVAL_MAX_MS = 2 ** 31 - 1

/** Descriptors by name; a name may stand for many. */
export type Descriptors = ReadonlyMap<string, readonly number[]>

/** Descriptors in one message; the kernel's limit is SCM_MAX_FD, 253. */
const BATCH = 250

/** So many at a time as one message has room for. */
export function* batches(fds: readonly number[]): Generator<readonly number[]> {
  for (let i = 0; i < fds.length; i += BATCH) yield fds.slice(i, i + BATCH)
}

type Calls = Pick<Native, 'datagramOpen' | 'sendDescriptors' | 'close'>

export interface ServiceManagerParts {
  readonly native: Calls
  /** $NOTIFY_SOCKET */
  readonly socket: string
  /** How often the manager wants to hear of us, us; 0 for never. */
  readonly watchdogUs: number
  readonly log: Logger
}

export class ServiceManager {
  private watchdog: NodeJS.Timeout | undefined
  /** What the manager had no room for, in the order in which it is to be heard. */
  private readonly waiting: string[] = []

  constructor(private readonly parts: ServiceManagerParts) {}

  /** `undefined` where no manager wants to know. Programs that this one starts are not told of it. */
  static ofThisProcess(native: Native, log: Logger): ServiceManager | undefined {
    const { NOTIFY_SOCKET, WATCHDOG_PID, WATCHDOG_USEC } = process.env
    for (const name of ['NOTIFY_SOCKET', 'WATCHDOG_PID', 'WATCHDOG_USEC']) delete process.env[name]
    if (NOTIFY_SOCKET === undefined) return undefined
    const watched = WATCHDOG_PID === undefined || WATCHDOG_PID === String(process.pid)
    return new ServiceManager({ native, socket: NOTIFY_SOCKET, watchdogUs: watched ? Number(WATCHDOG_USEC ?? 0) : 0, log })
  }

  ready(status: string): void {
    this.send(`READY=1\nSTATUS=${status}`)
    if (this.parts.watchdogUs > 0) {
      // Half of what is allowed, as sd_watchdog_enabled(3) advises. A longer interval than
      // that of a timer would be taken for 1 ms.
      const interval = Math.min(this.parts.watchdogUs / 2000, INTERVAL_MAX_MS)
      this.watchdog = setInterval(() => this.send('WATCHDOG=1'), interval).unref()
    }
  }

  stopping(status: string): void {
    clearInterval(this.watchdog)
    this.send(`STOPPING=1\nSTATUS=${status}`)
  }

  private send(message: string): void {
    this.waiting.push(message)
    if (this.waiting.length === 1) this.flush()
  }

  private flush(): void {
    for (let next; (next = this.waiting[0]) !== undefined; this.waiting.shift()) {
      const socket = this.parts.native.datagramOpen(this.parts.socket)
      const rc = socket < 0 ? socket : this.parts.native.sendDescriptors(socket, next, [])
      if (socket >= 0) this.parts.native.close(socket)
      if (rc === -E.EAGAIN) return void setTimeout(() => this.flush(), RETRY_MS)
      if (rc < 0) this.parts.log.warn({ errno: errnoName(rc), socket: this.parts.socket }, 'cannot tell the service manager')
    }
  }
}
