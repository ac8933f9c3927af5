// SPDX-License-Identifier: MIT
/**
 * sd_notify(3), for a daemon that runs as a service without the guard: it answers, it
 * stops, and, for the watchdog, it is alive.
 */
import { E, errnoName } from '../util/errno.js'
import type { Logger } from '../util/log.js'
import type { Native } from '../native.js'

/** Time before a message that the manager had no room for is sent again, ms. */
const RETRY_MS = 100

/** The longest interval of a timer, ms (TIMEOUT_MAX of Node's). */
const INTERVAL_MAX_MS = 2 ** 31 - 1

/** Descriptors by name; a name may stand for many. */
export type Descriptors = ReadonlyMap<string, readonly number[]>

/** Descriptors in one message; the kernel's limit is SCM_MAX_FD, 253. */
const BATCH = 250

/** In batches that fit into one message. */
export function* batches(fds: readonly number[]): Generator<readonly number[]> {
  for (let i = 0; i < fds.length; i += BATCH) yield fds.slice(i, i + BATCH)
}

type Calls = Pick<Native, 'datagramOpen' | 'sendDescriptors' | 'close'>

export interface ServiceManagerParts {
  readonly native: Calls
  /** $NOTIFY_SOCKET */
  readonly socket: string
  /** $WATCHDOG_USEC: how often the manager must hear from us, us; 0 for never. */
  readonly watchdogUs: number
  readonly log: Logger
}

export class ServiceManager {
  private watchdog: NodeJS.Timeout | undefined
  /** Messages that the manager had no room for, in order. */
  private readonly waiting: string[] = []

  constructor(private readonly parts: ServiceManagerParts) {}

  /** The manager of this process, if there is one. Removes its variables, so that child processes do not use them. */
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
      // Half of the limit, as sd_watchdog_enabled(3) advises. Node.js takes an interval that is
      // too long for 1 ms.
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
