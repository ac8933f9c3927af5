/**
 * What a systemd service tells its manager, sd_notify(3): that the tree
 * answers, that it stops, and, for the watchdog, that the daemon is alive. And
 * what the manager keeps for it: descriptors, for the daemon that comes next.
 */
import { E, errnoName } from './errno.js'
import type { Logger } from './log.js'
import type { Native } from './native.js'

/** How long to wait before a message is tried again that the manager had no room for, ms. */
const RETRY_MS = 100

/** The longest interval of a timer, ms (TIMEOUT_MAX of Node's). */
const INTERVAL_MAX_MS = 2 ** 31 - 1

/** The first descriptor that a manager hands over (SD_LISTEN_FDS_START). */
const FIRST_FD = 3

/** Descriptors by name; a name may stand for many. */
export type Descriptors = ReadonlyMap<string, readonly number[]>

/** Descriptors in one message; the kernel's limit is SCM_MAX_FD, 253. */
const BATCH = 250

/** So many at a time as one message has room for. */
export function* batches(fds: readonly number[]): Generator<readonly number[]> {
  for (let i = 0; i < fds.length; i += BATCH) yield fds.slice(i, i + BATCH)
}

/** Keeps descriptors open for a daemon that takes over. */
export interface DescriptorStore {
  put(name: string, fds: readonly number[]): void
  /** Everything that was put there under these names. */
  remove(names: readonly string[]): void
}

type Calls = Pick<Native, 'datagramOpen' | 'sendDescriptors' | 'close'>

export class ServiceManager implements DescriptorStore {
  private watchdog: NodeJS.Timeout | undefined
  /** What the manager had no room for, in the order in which it is to be heard. */
  private readonly waiting: { readonly message: string; readonly fds: readonly number[] }[] = []

  constructor(
    private readonly native: Calls,
    private readonly log: Logger,
    private readonly socket: string,
    /** How often the manager wants to hear of us, us; 0 for never. */
    private readonly watchdogUs = 0,
    /** What it has kept for us. */
    readonly kept: Descriptors = new Map(),
  ) {}

  /** `undefined` where no manager wants to know. Programs that this one starts are not told of it. */
  static ofThisProcess(native: Native, log: Logger): ServiceManager | undefined {
    const { NOTIFY_SOCKET, WATCHDOG_PID, WATCHDOG_USEC, LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES } = process.env
    for (const name of Object.keys(process.env)) {
      if (/^(NOTIFY_SOCKET|WATCHDOG_(PID|USEC)|LISTEN_(PID|FDS|FDNAMES))$/.test(name)) delete process.env[name]
    }
    if (NOTIFY_SOCKET === undefined) return undefined
    const watched = WATCHDOG_PID === undefined || WATCHDOG_PID === String(process.pid)
    const kept = LISTEN_PID === String(process.pid) ? descriptors(LISTEN_FDS ?? '', LISTEN_FDNAMES ?? '') : new Map()
    return new ServiceManager(native, log, NOTIFY_SOCKET, watched ? Number(WATCHDOG_USEC ?? 0) : 0, kept)
  }

  /** @param answers whether the tree has answered since this was last asked */
  ready(status: string, answers: () => boolean): void {
    this.send(`READY=1\nSTATUS=${status}`)
    if (this.watchdogUs > 0) {
      // Half of what is allowed, as sd_watchdog_enabled(3) advises. A longer interval than
      // that of a timer would be taken for 1 ms.
      const interval = Math.min(this.watchdogUs / 2000, INTERVAL_MAX_MS)
      this.watchdog = setInterval(() => {
        if (answers()) this.send('WATCHDOG=1')
        else this.log.error('the tree has not answered for a while')
      }, interval).unref()
    }
  }

  stopping(status: string): void {
    clearInterval(this.watchdog)
    this.send(`STOPPING=1\nSTATUS=${status}`)
  }

  put(name: string, fds: readonly number[]): void {
    // Without FDPOLL=0 it would let go of a socket whose other end is closed.
    for (const batch of batches(fds)) this.send(`FDSTORE=1\nFDNAME=${name}\nFDPOLL=0`, batch)
  }

  remove(names: readonly string[]): void {
    for (const name of names) this.send(`FDSTOREREMOVE=1\nFDNAME=${name}`)
  }

  private send(message: string, fds: readonly number[] = []): void {
    this.waiting.push({ message, fds })
    if (this.waiting.length === 1) this.flush()
  }

  private flush(): void {
    for (let next; (next = this.waiting[0]) !== undefined; this.waiting.shift()) {
      const socket = this.native.datagramOpen(this.socket)
      const rc = socket < 0 ? socket : this.native.sendDescriptors(socket, next.message, next.fds)
      if (socket >= 0) this.native.close(socket)
      if (rc === -E.EAGAIN) return void setTimeout(() => this.flush(), RETRY_MS)
      if (rc < 0) this.log.warn({ errno: errnoName(rc), socket: this.socket }, 'cannot tell the service manager')
    }
  }
}

/** sd_listen_fds_with_names(3). Beyond their number lie descriptors of our own: one that makes no sense is 0. */
function descriptors(fds: string, names: string): Descriptors {
  const count = /^\d{1,9}$/.test(fds) ? Number(fds) : 0
  const found = new Map<string, number[]>()
  names.split(':').forEach((name, i) => {
    if (i >= count) return
    const fds = found.get(name)
    if (fds === undefined) found.set(name, [FIRST_FD + i])
    else fds.push(FIRST_FD + i)
  })
  return found
}
