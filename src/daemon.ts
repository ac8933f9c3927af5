/** The daemon: its parts, put together, and the order in which they start and stop. */
import { constants, openSync, readdirSync } from 'node:fs'

import { Access } from './access.js'
import { CloseWatch, WATCH_MASK } from './closes.js'
import { DeviceNodes } from './devnode.js'
import { E, errnoName, errnoOf, UserError } from './errno.js'
import { Gate, LOOKUP_PATIENCE_MS } from './gate.js'
import { Intents } from './intent.js'
import type { Logger } from './log.js'
import {
  detach,
  FSTYPE,
  isDead,
  mountData,
  type MountOptions,
  mountsAt,
  MountWatch,
  prepareMountpoint,
  SOURCE,
} from './mountpoint.js'
import { type Native, native as realNative } from './native.js'
import { type Node, NodeTable } from './node.js'
import { PinOpener } from './pin.js'
import { Reaper } from './reaper.js'
import { Registry } from './registry.js'
import { FuseSession } from './session.js'
import { Sysfs } from './sysfs.js'
import type { Transport } from './transport.js'
import { Tree } from './tree.js'
import { UeventSocket } from './uevent.js'

export interface DaemonOptions {
  readonly mountpoint: string
  readonly mount: MountOptions
  /** See {@link ReaperOptions}. */
  readonly lingerMs: number
  readonly holdSeconds: number
  /** How long a caller waits for a disk that does not answer, ms. */
  readonly openTimeoutMs: number
}

/**
 * The parts a test may replace: to switch one safety mechanism off and show
 * that it is missed.
 */
export interface Parts {
  readonly opener?: (native: Native, devDirectory: number) => PinOpener
  readonly intents?: (native: Native) => Intents
  readonly access?: (native: Native) => Access
  readonly native?: Native
  readonly lookupPatienceMs?: number
}

export class Daemon {
  private mountpoint = ''
  private mountId = -1
  private lock = -1
  private devDirectory = -1
  private mountWatch: MountWatch | undefined
  private stopping: Promise<void> | undefined
  private transport: Transport | undefined
  private closes: CloseWatch | undefined
  private readonly native: Native
  private readonly nodes = new NodeTable()
  private readonly registry: Registry
  private readonly sysfs: Sysfs
  private readonly uevents: UeventSocket
  private reaper: Reaper | undefined
  private opener: PinOpener | undefined
  private intents: Intents | undefined
  private readonly touching = new Map<Node, boolean>()

  constructor(
    private readonly options: DaemonOptions,
    private readonly log: Logger,
    private readonly parts: Parts = {},
  ) {
    this.native = parts.native ?? realNative
    this.sysfs = new Sysfs(this.native)
    this.registry = new Registry(this.sysfs, log)
    this.uevents = new UeventSocket(this.native, this.registry, log)
    this.registry.drain = () => this.uevents.drain()
  }

  /**
   * Mounts the tree; resolves once it answers.
   * @throws UserError where this machine, this user or this mount point will not do
   */
  async start(): Promise<void> {
    if (process.geteuid?.() !== 0) {
      throw new UserError('only root can mount the tree and open block devices; run this as root')
    }
    this.requireDiskSeq()
    // Listen first: what changes during the scan is then not missed.
    this.uevents.open()
    await this.registry.start()
    this.mountpoint = prepareMountpoint(this.options.mountpoint)
    await this.claimMountpoint()
    const tree = this.assemble()
    const fuse = openFuse()
    const transport = new FuseSession(this.native, fuse, this.log)
    this.transport = transport
    const rc = this.native.mount(
      SOURCE,
      this.mountpoint,
      FSTYPE,
      this.options.mount.flags,
      mountData(fuse, this.options.mount),
    )
    if (rc < 0) {
      throw new UserError(
        rc === -E.EPERM
          ? `cannot mount at ${this.mountpoint}: EPERM; CAP_SYS_ADMIN is needed (in a container: run it privileged, or on the host)`
          : rc === -E.EINVAL
            ? '/dev/fuse is not the FUSE device (character device 10:229), or the kernel does not know a mount option'
            : `cannot mount at ${this.mountpoint}: mount(2) says ${errnoName(rc)}`,
      )
    }
    this.mountId = mountsAt(this.mountpoint).at(-1)?.id ?? -1
    this.mountWatch = new MountWatch(this.native, this.mountId, () => {
      this.log.info({ mountpoint: this.mountpoint }, 'somebody unmounted the tree')
      this.release()
    })
    await transport.start(tree)
    // Both walk a path into this mount: only now, and on another thread.
    const [mountFd, watchFd] = await Promise.all([
      this.descriptor('fspick', (done) => this.native.pickMount(this.mountpoint, done)),
      this.descriptor('inotify', (done) =>
        this.native.inotifyWatch(this.mountpoint, WATCH_MASK, done),
      ),
    ])
    this.reaper?.start(mountFd)
    this.closes = new CloseWatch(this.native, watchFd, this, this.log)
    this.log.info({ mountpoint: this.mountpoint, devices: this.registry.size }, 'mounted')
  }

  /** Resolves when the tree is gone, by {@link stop} or because somebody unmounted it. */
  get ended(): Promise<void> {
    return this.transport?.ended ?? Promise.resolve()
  }

  /** Takes the mount away, busy or not: open files stay open, they are the devices themselves. */
  stop(): Promise<void> {
    return (this.stopping ??= this.unmount().finally(() => this.release()))
  }

  private async unmount(): Promise<void> {
    this.mountWatch?.close()
    this.mountWatch = undefined
    if (this.mountId === -1 || mountsAt(this.mountpoint).at(-1)?.id !== this.mountId) return
    const { mountpoint } = this
    const error = await detach(this.native, mountpoint)
    if (error === 0) this.log.info({ mountpoint }, 'unmounted')
    else this.log.error({ errno: errnoName(error), mountpoint }, 'cannot unmount')
  }

  /** Lets go of everything; the mount, if it is still there, is dead after this. */
  release(): void {
    this.mountId = -1
    this.mountWatch?.close()
    this.mountWatch = undefined
    this.closes?.close()
    this.reaper?.close()
    this.intents?.close()
    this.transport?.close()
    this.registry.close()
    this.uevents.close()
    for (const fd of [this.devDirectory, this.lock]) if (fd >= 0) this.native.close(fd)
    this.devDirectory = this.lock = -1
  }

  /** See {@link CloseListener}. */
  opened(name: string): void {
    const node = this.nodes.named(name)
    if (node !== undefined) this.reaper?.opened(node)
  }

  closed(name: string, wrote: boolean): void {
    const node = this.nodes.named(name)
    if (node === undefined) return
    if (wrote) this.touch(node)
    this.reaper?.closed(node)
  }

  lost(): void {
    this.log.warn('the kernel dropped open and close events; unused disks are let go of a little later')
    this.reaper?.lostTrack()
  }

  /**
   * udev watches the device's own node for writers that close it, to look at
   * what they wrote. It does not see those that came through the tree.
   */
  private touch(node: Node): void {
    const device = this.registry.find(node.name)
    if (device === undefined) return
    if (this.touching.has(node)) {
      this.touching.set(node, true) // once more when this one is done
      return
    }
    this.touching.set(node, false)
    this.opener?.touch(device, () => {
      const again = this.touching.get(node)
      this.touching.delete(node)
      if (again) this.touch(node)
    })
  }

  private assemble(): Tree {
    const { native, registry, sysfs, nodes, log, options, parts } = this
    this.devDirectory = native.openDirectory('/dev')
    if (this.devDirectory < 0) {
      throw new UserError(`cannot open /dev: ${errnoName(this.devDirectory)}`)
    }
    const devnodes = new DeviceNodes(native, this.devDirectory)
    const opener = parts.opener?.(native, this.devDirectory) ?? new PinOpener(native, this.devDirectory)
    const intents = parts.intents?.(native) ?? new Intents(native)
    const access = parts.access?.(native) ?? new Access(native)
    const reaper = new Reaper(native, nodes, opener, intents, options, log)
    const gate = new Gate(
      registry,
      sysfs,
      nodes,
      devnodes,
      opener,
      reaper,
      intents,
      access,
      { ...options, lookupPatienceMs: parts.lookupPatienceMs ?? LOOKUP_PATIENCE_MS },
      log,
    )
    this.opener = opener
    this.intents = intents
    this.reaper = reaper
    return new Tree(registry, sysfs, nodes, devnodes, gate, reaper, intents)
  }

  /**
   * One disk with a number is proof enough.
   * @throws UserError on a machine that cannot tell disks apart
   */
  private requireDiskSeq(): void {
    const { classDirectory } = this.sysfs
    const names = blockNames(classDirectory)
    if (names.length === 0) return
    if (names.some((name) => this.sysfs.attribute(name, 'uevent')?.includes('DISKSEQ='))) return
    throw new UserError('this kernel gives disks no sequence numbers; Linux 5.15 or later is needed')
  }

  private async claimMountpoint(): Promise<void> {
    const path = this.mountpoint
    let top = mountsAt(path).at(-1)
    while (top !== undefined) {
      if (top.type !== FSTYPE) {
        throw new UserError(
          `${path}: busy, ${top.type} (${top.source}) is mounted there; unmount it or choose another directory`,
        )
      }
      if (!isDead(path)) {
        throw new UserError(`${path}: already served by another diskseqfs; see diskseqfs unmount --help`)
      }
      this.log.warn({ mountpoint: path }, 'taking away the mount of a daemon that died')
      const error = await detach(this.native, path)
      if (error !== 0) throw new UserError(`${path}: cannot unmount the dead mount: ${errnoName(error)}`)
      top = mountsAt(path).at(-1)
    }
    this.lock = this.native.lockDirectory(path)
    if (this.lock === -E.EAGAIN) {
      throw new UserError(`${path}: another diskseqfs is starting there`)
    }
    if (this.lock < 0) throw new UserError(`${path}: cannot be opened: ${errnoName(this.lock)}`)
    // Between the look and the lock somebody may have been faster.
    if (mountsAt(path).length > 0) {
      throw new UserError(`${path}: already served by another diskseqfs`)
    }
  }

  private descriptor(
    what: string,
    call: (done: (error: number, fd: number) => void) => void,
  ): Promise<number> {
    return new Promise((resolve, reject) => {
      call((error, fd) => {
        if (error === 0) resolve(fd)
        else reject(new UserError(`${what} failed on ${this.mountpoint}: ${errnoName(error)}`))
      })
    })
  }
}

function blockNames(directory: string): string[] {
  try {
    return readdirSync(directory)
  } catch (error) {
    throw new UserError(
      `cannot read ${directory}: ${errnoName(errnoOf(error))}; is sysfs mounted at /sys?`,
    )
  }
}

function openFuse(): number {
  try {
    return openSync('/dev/fuse', constants.O_RDWR | constants.O_NONBLOCK)
  } catch (error) {
    const errno = errnoOf(error)
    throw new UserError(
      errno === E.ENOENT || errno === E.ENODEV || errno === E.ENXIO
        ? '/dev/fuse is missing: load the module (modprobe fuse), or use a kernel with CONFIG_FUSE_FS'
        : `cannot open /dev/fuse: ${errnoName(errno)}`,
    )
  }
}
