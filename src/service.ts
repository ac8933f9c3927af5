/**
 * What a systemd service tells its manager, sd_notify(3): that the tree
 * answers, that it stops, and, for the watchdog, that the daemon is alive.
 */
import { E, errnoName } from './errno.js'
import type { Logger } from './log.js'
import type { Native } from './native.js'

/** How long to wait before a message is tried again that the manager had no room for, ms. */
const RETRY_MS = 100

export class ServiceManager {
  private watchdog: NodeJS.Timeout | undefined

  constructor(
    private readonly native: Pick<Native, 'datagramOpen' | 'datagramSend' | 'close'>,
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
      // Half of what is allowed, as sd_watchdog_enabled(3) advises.
      this.watchdog = setInterval(() => this.send('WATCHDOG=1'), this.watchdogUs / 2000).unref()
    }
  }

  stopping(): void {
    clearInterval(this.watchdog)
    this.send('STOPPING=1\nSTATUS=unmounting')
  }

  private send(message: string): void {
    const fd = this.native.datagramOpen(this.socket)
    const rc = fd < 0 ? fd : this.native.datagramSend(fd, message)
    if (fd >= 0) this.native.close(fd)
    if (rc === -E.EAGAIN) setTimeout(() => this.send(message), RETRY_MS)
    else if (rc < 0) this.log.warn({ errno: errnoName(rc), socket: this.socket }, 'cannot tell the service manager')
  }
}
