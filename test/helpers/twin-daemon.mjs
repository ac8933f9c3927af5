/**
 * The daemon with one safety mechanism switched off: what the tests that prove
 * the mechanism must fail against. Never shipped.
 *
 *   node twin-daemon.mjs TWIN[+slow] MOUNTPOINT
 *
 * With +slow each disk is answered for 30 ms after it was verified, as it may
 * be on a busy machine: time enough for anything to happen in between.
 */
import { Access } from '../../dist/access.js'
import { Daemon } from '../../dist/daemon.js'
import { Intents } from '../../dist/intent.js'
import { createLogger } from '../../dist/log.js'
import { parseMountOptions } from '../../dist/mountpoint.js'
import { native } from '../../dist/native.js'
import { PinOpener } from '../../dist/pin.js'

/** Verifies as the real one does, and then holds something else than the device. */
class OtherPins extends PinOpener {
  constructor(calls, directory, hold) {
    super(calls, directory)
    this.hold = hold
  }
  openVerified(device, flags, done) {
    super.openVerified(device, flags, (result) => {
      if (!('pin' in result)) return done(result)
      this.hold(device, (fd) => {
        this.close(result.pin)
        this.count++
        done(fd < 0 ? { errno: -fd } : { pin: { fd, device } })
      })
    })
  }
  // Held or not, it is believed.
  current() {
    return true
  }
}

const inspectsEverything = { of: () => ({ intent: 'inspect', number: -1 }) }
const opensEverything = { of: () => ({ intent: 'open', number: -1 }) }
const withIntents = (answers) => (calls) => Object.assign(new Intents(calls), answers)

const SLOW_MS = 30

/** Real pins, late answers. */
const slow = (opener) => {
  const open = opener.open.bind(opener)
  return Object.assign(opener, {
    open: (device, done) => open(device, (result) => setTimeout(done, SLOW_MS, result)),
  })
}

const twins = {
  /** Nothing is switched off. */
  'none': {},
  /** Nothing held: an O_PATH descriptor of the node keeps no number from being reused. */
  'no-pins': {
    opener: (calls, directory) =>
      new OtherPins(calls, directory, (device, done) => done(calls.openNode(directory, device.devname))),
  },
  /** For a partition, its disk is held instead. */
  'whole-disk-pins': {
    opener: (calls, directory) =>
      new OtherPins(calls, directory, (device, done) => {
        const disk = device.devname.replace(/p\d+$/, '')
        calls.openDevice(directory, disk, 0, false, (error, fd) => done(error === 0 ? fd : -error))
      }),
  },
  /** A loop device is believed to be bound without a look at it. */
  'no-loop-check': {
    native: {
      ...native,
      openDevice: (directory, name, flags, _, done) => native.openDevice(directory, name, flags, false, done),
    },
  },
  /** Every caller is taken for one that opens. */
  'no-inspect': { intents: withIntents(opensEverything) },
  /** Every caller is taken for one that only looks. */
  'always-inspect': { intents: withIntents(inspectsEverything) },
  /** Who asks does not matter. */
  'no-access-rule': { access: () => Object.assign(new Access(native), { mayOpen: () => true }) },
  /** The kernel keeps names for as long as it likes. */
  'no-prune': { native: { ...native, prune: (_, done) => setImmediate(done, 0) } },
  /** udev is not told of writers. */
  'no-touch': {
    opener: (calls, directory) => Object.assign(new PinOpener(calls, directory), { touch: (_, done) => done() }),
  },
}

const [twin, mountpoint] = process.argv.slice(2)
const [name, pace] = twin.split('+')
const parts = twins[name]
if (parts === undefined) throw new Error(`no such twin: ${name}`)
const makeOpener = parts.opener ?? ((calls, directory) => new PinOpener(calls, directory))
const opener = pace === 'slow' ? (...given) => slow(makeOpener(...given)) : makeOpener
const { logger: log } = await createLogger('info', { kind: 'stderr', format: 'json' })
const daemon = new Daemon(
  {
    mountpoint,
    mount: parseMountOptions('', []),
    lingerMs: 5,
    holdSeconds: 30,
    openTimeoutMs: 10_000,
  },
  log,
  { ...parts, opener },
)
process.once('SIGTERM', () => daemon.stop())
await daemon.start()
await daemon.ended
process.exit(0)
