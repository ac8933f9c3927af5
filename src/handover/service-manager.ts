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

export class ServiceManager {
  private watchdog: NodeJS.Timeout | undefined
  /** What the manager had no room for, in the order in which it is to be heard. */
  private readonly waiting: string[] = []

  constructor(
    private readonly native: Calls,
    private readonly log: Logger,
    private readonly socket: string,
    /** How often the manager wants to hear of us, us; 0 for never. */
    private readonly watchdogUs = 0,
  ) {}

  /** `undefined` where no manager wants to know. Programs that this one starts are not told of it. */
  static ofThisProcess(native: Native, log: Logger): ServiceManager | undefined {
    const { NOTIFY_SOCKET, WATCHDOG_PID, WATCHDOG_USEC } = process.env
    for (const name of ['NOTIFY_SOCKET', 'WATCHDOG_PID', 'WATCHDOG_USEC']) delete process.env[name]
    if (NOTIFY_SOCKET === undefined) return undefined
    const watched = WATCHDOG_PID === undefined || WATCHDOG_PID === String(process.pid)
    return new ServiceManager(native, log, NOTIFY_SOCKET, watched ? Number(WATCHDOG_USEC ?? 0) : 0)
  }

  ready(status: string): void {
    this.send(`READY=1\nSTATUS=${status}`)
    if (this.watchdogUs > 0) {
      // Half of what is allowed, as sd_watchdog_enabled(3) advises. A longer interval than
      // that of a timer would be taken for 1 ms.
      const interval = Math.min(this.watchdogUs / 2000, INTERVAL_MAX_MS)
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
      const socket = this.native.datagramOpen(this.socket)
      const rc = socket < 0 ? socket : this.native.sendDescriptors(socket, next, [])
      if (socket >= 0) this.native.close(socket)
      if (rc === -E.EAGAIN) return void setTimeout(() => this.flush(), RETRY_MS)
      if (rc < 0) this.log.warn({ errno: errnoName(rc), socket: this.socket }, 'cannot tell the service manager')
    }
  }
}
