// SPDX-License-Identifier: MIT
/** The daemon: its parts, put together, and the order in which they start and stop. */
import { constants, openSync } from 'node:fs'
import { basename, dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

import { Access } from '../gate/access.js'
import { Beneath, openBeneath } from './beneath.js'
import { type CloseListener, CloseWatch, WATCH_MASK } from '../gate/closes.js'
import { Crowd } from '../gate/crowd.js'
import { DeadNames } from '../tree/dead-names.js'
import { DeviceNodes } from '../devices/device-node.js'
import { directoryId, type DiskSeq, nodeName, parseId } from '../devices/names.js'
import { E, errnoName, errnoOf, Exhausted, UserError } from '../util/errno.js'
import { FuseNativeTransport } from '../fuse/libfuse.js'
import { Gate } from '../gate/gate.js'
import type { Guard } from '../handover/guard-client.js'
import { giveUpMount, highestOf, findTakeover, DESCRIPTOR } from '../handover/takeover.js'
import { Intents } from '../gate/intent.js'
import type { Logger } from '../util/log.js'
import {
  detach,
  FSTYPE,
  mountData,
  type MountEntry,
  type MountOptions,
  mountsAt,
  MountWatch,
  prepareMountpoint,
  SOURCE,
  unlockMountpoint,
  withoutSymlinks,
} from '../util/mountpoint.js'
import { type Native, native as realNative } from '../native.js'
import { NodeTable } from '../gate/inode.js'
import { ownPidNamespace } from '../util/pid-namespace.js'
import { PinOpener } from '../gate/pin.js'
import { PinLifetime } from '../gate/pin-lifetime.js'
import { Registry, type RegistryListener } from '../devices/registry.js'
import { FuseSession } from '../fuse/session.js'
import { type Device, Sysfs } from '../devices/sysfs.js'
import type { Descriptors } from '../handover/service-manager.js'
import { SharedState, STATE_SIZE } from '../handover/shared-state.js'
import { type TreeOwner, type OutgoingDaemon, socketOf, HandOver } from '../handover/replace.js'
import type { Inodes, Transport, TransportName } from '../fuse/transport.js'
import { Tree } from '../tree/tree.js'
import { UeventSocket } from '../devices/uevents.js'
import { TakenOverPins } from '../gate/taken-over-pins.js'
import { Preflight } from './preflight.js'
import { UdevWatch } from './udev-watch.js'
import { PinStore } from '../handover/pin-store.js'

export interface DaemonOptions {
  readonly mountpoint: string
  readonly mount: MountOptions
  /** See {@link PinLifetimeOptions}. */
  readonly lingerMs: number
  readonly holdSeconds: number
  /** How long a caller waits for a disk that does not answer, ms. */
  readonly openTimeoutMs: number
  /** What stands between the kernel and the tree. */
  readonly transport?: TransportName
}

/**
 * The parts a test may replace: to switch one safety mechanism off and show
 * that it is missed.
 */
export interface Parts {
  readonly opener?: (native: Native, devDirectory: number, pinStore: PinStore | undefined) => PinOpener
  readonly intents?: (native: Native) => Intents
  readonly access?: (native: Native) => Access
  readonly native?: Native
  readonly lookupsWait?: boolean
}

/**
 * How long this daemon wants to have a processor for at a time, ns: the least that the
 * kernel takes. Whoever wants it for so short a time has it soon (kernel/sched/fair.c), and callers wait for us.
 */
const SLICE_NS = 100_000

/**
 * So long, ms, a LOOKUP waits for its directory to be watched and for links beneath; they are there in a fraction of one.
 * Then the disk is answered for without.
 */
const READY_MS = 50

/** So long, ms, a daemon that ends waits for links beneath to be taken away: somebody may have the directory locked. */
const LEAVE_MS = 1000

export class Daemon implements CloseListener, TreeOwner, Inodes, RegistryListener {
  private mountpoint = ''
  private mountId = -1
  private lock = -1
  private devDirectory = -1
  private mountWatch: MountWatch | undefined
  private stopping: Promise<void> | undefined
  private ending: Promise<void> | undefined
  private over!: () => void
  /** Resolves when the tree is gone, by {@link stop} or because somebody unmounted it, and nothing is held any more. */
  readonly ended = new Promise<void>((resolve) => (this.over = resolve))
  /** Whether another daemon can go on with the tree when this one just ends. */
  canBeTakenOver = false
  /** Whether it went on with the mount of an earlier one. */
  tookOver = false
  private transport: Transport | undefined
  private state = new SharedState()
  private stateFd = -1
  private pinStore: PinStore | undefined
  private handOver: HandOver | undefined
  /** What somebody else needs to go on with the tree; see {@link DESCRIPTOR}. */
  private toHandOver = new Map<string, readonly number[]>()
  private closes: CloseWatch | undefined
  private root = -1
  private beneath: Beneath | undefined
  private readonly native: Native
  private readonly nodes = new NodeTable()
  private readonly registry: Registry
  private readonly sysfs: Sysfs
  private readonly uevents: UeventSocket
  private lifetime: PinLifetime | undefined
  private crowd: Crowd | undefined
  private readonly dead = new DeadNames(
    (id) => this.prune(id),
    () => this.lifetime?.pruneAll(),
  )
  private opener: PinOpener | undefined
  private intents: Intents | undefined
  private readonly udevWatch: UdevWatch

  constructor(
    private readonly options: DaemonOptions,
    private readonly log: Logger,
    private readonly parts: Parts = {},
    /** The guard that has started this daemon, if one has: with it, the tree outlives the daemon. */
    private readonly guard?: Guard,
    /** Called when another daemon has taken over: this process is to end at once. */
    private readonly onHandedOver?: () => void,
  ) {
    this.native = parts.native ?? realNative
    this.sysfs = new Sysfs(this.native)
    this.registry = new Registry(this.sysfs, log)
    this.uevents = new UeventSocket(this.native, this.registry, log)
    this.udevWatch = new UdevWatch(
      (name) => this.registry.find(name),
      (device, done) => this.opener?.touch(device, done),
    )
    this.registry.drain = () => this.uevents.drain()
  }

  /**
   * Mounts the tree, or takes over a mounted one; resolves once it answers.
   *
   * @param kept descriptors of an earlier daemon
   * @param outgoing that daemon, if it is still there
   * @throws UserError where this machine, this user or this mount point will not do
   */
  async start(kept: Descriptors = new Map(), outgoing?: OutgoingDaemon): Promise<void> {
    const preflight = new Preflight(this.native, this.sysfs, this.log)
    preflight.check()
    const slice = this.native.setSlice(SLICE_NS)
    if (slice < 0) this.log.debug({ errno: errnoName(slice) }, 'no short slices: where processors are busy, callers wait longer')
    // Listen first: what changes during the scan is then not missed.
    this.uevents.open()
    await this.registry.start(highestOf(this.native, kept))
    if (kept.size > 0) {
      if (await this.takeOver(kept, outgoing)) return
      if (outgoing !== undefined) {
        throw new UserError(`${this.options.mountpoint}: what the daemon that serves it has does not fit; it goes on`)
      }
      this.guard?.remove(Object.values(DESCRIPTOR))
      await giveUpMount(this.native, kept, this.log)
    }
    this.mountpoint = prepareMountpoint(this.options.mountpoint)
    try {
      this.lock = await preflight.claim(this.mountpoint)
      await (this.options.transport === 'fuse-native' ? this.serveByLibrary() : this.serve())
    } catch (error) {
      this.unlock()
      throw error
    }
    this.log.info({ mountpoint: this.mountpoint, devices: this.registry.size }, 'mounted')
  }

  private async serveByLibrary(): Promise<void> {
    // A disk has one number for all its life.
    const renumbers = (ino: bigint) => (parseId(ino)?.partition ?? 0) !== 0
    const transport = new FuseNativeTransport(this.mountpoint, this.options.mount, renumbers, this.log)
    this.transport = transport
    await transport.start(this.assemble(false).tree)
    this.watchMount(mountsAt(this.mountpoint).at(-1))
  }

  private async serve(): Promise<void> {
    this.shareState()
    const { tree } = this.assemble(false)
    const beneath = openBeneath(this.mountpoint)
    const fuse = openFuse()
    const transport = this.connect(fuse)
    const rc = this.native.mount(SOURCE, this.mountpoint, FSTYPE, this.options.mount.flags, mountData(fuse, this.options.mount))
    if (rc < 0) {
      throw new UserError(
        rc === -E.EPERM
          ? `cannot mount at ${this.mountpoint}: EPERM; CAP_SYS_ADMIN is needed (in a container: run it privileged, or on the host)`
          : rc === -E.EINVAL
            ? '/dev/fuse is not the FUSE device (character device 10:229), or the kernel does not know a mount option'
            : `cannot mount at ${this.mountpoint}: mount(2) says ${errnoName(rc)}`,
      )
    }
    const mount = mountsAt(this.mountpoint).at(-1)
    this.watchMount(mount)
    // Whoever takes such links away by their path does not get at them any more.
    this.keepLinks(beneath)
    await transport.start(tree)
    // Both walk a path into this mount: only now, and on another thread.
    const [mountFd, watchFd, root] = await Promise.all([
      this.descriptor('fspick', (done) => this.native.pickMount(this.mountpoint, done)),
      this.descriptor('inotify', (done) => this.native.inotifyWatch(this.mountpoint, WATCH_MASK, done)),
      this.descriptor('open_tree', (done) => this.native.cloneMount(this.mountpoint, '.', done)),
    ])
    this.root = root
    this.lifetime?.start(mountFd)
    this.closes = new CloseWatch({ native: this.native, fd: watchFd, root, listener: this, log: this.log })
    if (mount !== undefined) {
      this.state.mount = { mountpoint: this.mountpoint, device: mount.device, pidNamespace: ownPidNamespace() }
      this.allowTakeover(mount.device, { mount: mountFd, closes: watchFd, root, beneath, fuse })
    }
  }

  /** @param fd from {@link openBeneath} */
  private keepLinks(fd: number): void {
    if (fd < 0) return
    this.beneath = new Beneath(this.native, fd, this.mountpoint, this.log)
    this.beneath.start(this.registry.devices())
  }

  /** From now on another daemon can go on: one that asks, or one that the guard starts after this. */
  private allowTakeover(device: string, own: Readonly<Record<string, number>>): void {
    const { native, guard, stateFd, lock, log } = this
    const all = { lock, ...own, state: stateFd }
    this.toHandOver = new Map(
      Object.entries(all)
        .filter(([, fd]) => fd >= 0)
        .map(([name, fd]) => [name, [fd]]),
    )
    this.canBeTakenOver = guard !== undefined
    if (guard !== undefined && !this.tookOver) for (const [name, fds] of this.descriptors()) guard.put(name, fds)
    if (guard !== undefined) return
    this.handOver = new HandOver(native, socketOf(device), this, log)
    this.handOver.start()
  }

  /** See {@link TreeOwner}; as are the three below. */
  descriptors(): Descriptors {
    return new Map([...this.toHandOver, [DESCRIPTOR.pins, this.pinStore?.all ?? []]])
  }

  /** Sockets that were made for pins. */
  private keepPins(sockets: readonly number[]): void {
    if (this.canBeTakenOver) this.guard?.put(DESCRIPTOR.pins, sockets)
    this.handOver?.send(DESCRIPTOR.pins, sockets)
  }

  /** What was begun stays as it is, for the daemon that comes next: this process is to end at once. */
  pause(): void {
    if (this.transport instanceof FuseSession) this.transport.pauseForHandOver()
  }

  /** As {@link pause}, because of an error: what was begun may be the reason, and is counted as such. */
  halt(): void {
    if (this.transport instanceof FuseSession) this.transport.pause()
  }

  goOn(): void {
    if (this.transport instanceof FuseSession) this.transport.goOn()
  }

  handedOver(): void {
    this.onHandedOver?.()
  }

  private connect(fuse: number): FuseSession {
    const transport = new FuseSession(this.native, fuse, this.log, this.state)
    void transport.ended.then(() => this.end())
    this.transport = transport
    return transport
  }

  /** @param mount none, if it is gone already */
  private watchMount(mount: MountEntry | undefined): void {
    if (mount === undefined) return
    this.mountId = mount.id
    this.mountWatch = new MountWatch(this.native, mount.id, () => {
      this.log.info({ mountpoint: this.mountpoint }, 'the tree was unmounted')
      void this.end()
    })
  }

  private shareState(): void {
    const fd = this.native.sharedMemory(STATE_SIZE)
    const memory = fd < 0 ? fd : this.native.mapMemory(fd, STATE_SIZE)
    if (typeof memory === 'number') throw new Error(`no memory to share: ${errnoName(memory)}`)
    this.useState(new SharedState(memory), fd)
  }

  private useState(state: SharedState, fd: number): PinStore {
    this.state = state
    this.stateFd = fd
    state.highest = this.registry.highest
    return (this.pinStore = new PinStore(this.native, state, (sockets) => this.keepPins(sockets), this.log))
  }

  /**
   * Goes on with a mount that an earlier daemon has left. Whoever waits for an
   * answer of that one is answered.
   *
   * @returns false where there is none, or not the one that is wanted
   */
  private async takeOver(kept: Descriptors, outgoing: OutgoingDaemon | undefined): Promise<boolean> {
    const takeover = findTakeover(this.native, kept, withoutSymlinks(this.options.mountpoint))
    if (takeover === undefined) return false
    const { fuse, mountFd, closes, root = -1, beneath = -1, lock, stateFd, state, mountpoint, mount } = takeover
    const sockets = [...takeover.pins]
    // What fails from here on is no reason to take the tree away: the one before goes on, or the next one.
    this.canBeTakenOver = outgoing !== undefined || this.guard !== undefined
    sockets.push(...((await (outgoing ?? this.guard)?.take())?.get(DESCRIPTOR.pins) ?? []))
    this.tookOver = true
    this.mountpoint = mountpoint
    this.lock = lock
    const pinStore = this.useState(state, stateFd)
    const pins = pinStore.takeOver(sockets)
    const { tree, ...parts } = this.assemble(true)
    this.watchMount(mount)
    const transport = this.connect(fuse)
    const { native, nodes, registry } = this
    const takenOver = new TakenOverPins({ ...parts, native, nodes, registry, pinStore, holdSeconds: this.options.holdSeconds })
    for (const pin of pins) takenOver.takeOver(pin)
    this.lifetime?.start(mountFd)
    this.root = root
    this.closes = new CloseWatch({ native, fd: closes, root, listener: this, log: this.log })
    this.keepLinks(beneath)
    outgoing?.serves()
    this.allowTakeover(mount.device, { mount: mountFd, closes, root, beneath, fuse })
    transport.resume(tree)
    if (root < 0) this.find(DESCRIPTOR.root, this.mountpoint, '.', (fd) => this.closes?.useRoot((this.root = fd)))
    if (beneath < 0 && mountpoint.startsWith('/dev/')) {
      this.find(DESCRIPTOR.beneath, dirname(mountpoint), basename(mountpoint), (fd) => this.keepLinks(fd))
    }
    this.closes.forgetOthers((diskseq) => this.registry.find(nodeName(diskseq, 0)) !== undefined)
    this.log.info({ mountpoint, devices: this.registry.size, pins: pins.length }, 'took over the tree from an earlier daemon')
    return true
  }

  /** A daemon of an earlier version has not left that directory. */
  private find(name: string, target: string, directory: string, use: (fd: number) => void): void {
    this.native.cloneMount(target, directory, (error, fd) => {
      if (error !== 0)
        return this.log.warn({ errno: errnoName(error), name }, 'a directory that earlier versions did not leave cannot be had')
      use(fd)
      this.toHandOver.set(name, [fd])
      this.guard?.put(name, [fd])
    })
  }

  /** Takes the mount away, busy or not: open files stay open, they are the devices themselves. */
  stop(): Promise<void> {
    return (this.stopping ??= this.unmount().finally(() => this.end()))
  }

  /**
   * The mount is gone, or the connection, and no FORGET comes any more. But
   * somebody may have been answered who is still to open what he was promised.
   * Whoever waits for an answer gets an error.
   */
  private end(): Promise<void> {
    return (this.ending ??= this.settle())
  }

  private async settle(): Promise<void> {
    this.guard?.over()
    // Under a guard, udev is asked to look after these names again.
    await Promise.race([this.beneath?.leave(this.guard !== undefined), sleep(LEAVE_MS, undefined, { ref: false })])
    // Somebody else may mount there from here on.
    this.unlock()
    const { lifetime } = this
    if (lifetime !== undefined) {
      const late = sleep(this.options.holdSeconds * 1000, undefined, { ref: false })
      await Promise.race([new Promise<void>((resolve) => lifetime.whenDrained(resolve)), late])
    }
    this.release()
  }

  private unlock(): void {
    if (this.lock >= 0) unlockMountpoint(this.native, this.lock)
  }

  private async unmount(): Promise<void> {
    this.canBeTakenOver = false
    this.mountWatch?.close()
    this.mountWatch = undefined
    if (this.mountId === -1 || mountsAt(this.mountpoint).at(-1)?.id !== this.mountId) return
    const { mountpoint } = this
    const error = await detach(this.native, mountpoint)
    if (error === 0) this.log.info({ mountpoint }, 'unmounted')
    else this.log.error({ errno: errnoName(error), mountpoint }, 'cannot unmount')
  }

  /** Lets go of everything; the mount, if it is still there, is dead after this. */
  private release(): void {
    this.handOver?.close()
    this.mountId = -1
    this.mountWatch?.close()
    this.mountWatch = undefined
    this.guard?.close()
    this.closes?.close()
    this.beneath?.close()
    this.lifetime?.close()
    this.crowd?.close()
    this.dead.close()
    this.intents?.close()
    this.transport?.close()
    this.pinStore?.close()
    this.registry.close()
    this.sysfs.close()
    this.uevents.close()
    for (const fd of [this.devDirectory, this.lock, this.stateFd, this.root]) if (fd >= 0) this.native.close(fd)
    this.devDirectory = this.lock = this.stateFd = this.root = -1
    this.over()
  }

  /** See {@link CloseListener}. */
  closed(name: string, wrote: boolean): void {
    if (wrote) this.udevWatch.tell(name)
    const node = this.nodes.named(name)
    if (node !== undefined) this.lifetime?.closedByUser(node)
  }

  closedByKernelName(diskseq: DiskSeq, kname: string, wrote: boolean): void {
    try {
      const device = this.registry.called(kname, diskseq)
      if (device !== undefined) this.closed(device.name, wrote)
    } catch (error) {
      if (!(error instanceof Exhausted)) throw error
      this.lost()
    }
  }

  lost(): void {
    this.log.warn('the kernel dropped events of closes; udev may not be told of a writer')
  }

  /** @param takesOver the kernel may know inodes from an earlier daemon */
  private assemble(takesOver: boolean) {
    const { native, registry, sysfs, nodes, log, options, parts, pinStore, state } = this
    this.devDirectory = native.openDirectory('/dev')
    if (this.devDirectory < 0) {
      throw new UserError(`cannot open /dev: ${errnoName(this.devDirectory)}`)
    }
    const devnodes = new DeviceNodes(native, this.devDirectory)
    const opener = parts.opener?.(native, this.devDirectory, pinStore) ?? new PinOpener(native, this.devDirectory, pinStore)
    const intents = parts.intents?.(native) ?? new Intents(native)
    const access = parts.access?.(native) ?? new Access(native)
    const lifetime = new PinLifetime({ native, nodes, opener, intents, state, inodes: this, options, log })
    const crowd = new Crowd(this, intents)
    const whenReady = (diskseq: DiskSeq, ready: () => void) => this.whenReady(diskseq, ready)
    const gate = new Gate({
      registry,
      sysfs,
      nodes,
      devnodes,
      opener,
      lifetime,
      intents,
      access,
      crowd,
      options: { ...options, lookupsWait: parts.lookupsWait ?? options.transport === 'fuse-native' },
      log,
    })
    this.opener = opener
    this.intents = intents
    this.lifetime = lifetime
    this.crowd = crowd
    registry.listener = this
    const tree = new Tree({ registry, sysfs, nodes, devnodes, gate, crowd, lifetime, intents, whenReady, takesOver })
    return { tree, opener, lifetime, intents }
  }

  /** See {@link TreeParts}. */
  private whenReady(diskseq: DiskSeq, ready: () => void): void {
    let timer: NodeJS.Timeout | undefined
    let waits = true
    const go = () => {
      if (!waits) return
      waits = false
      clearTimeout(timer)
      ready()
    }
    this.whenPrepared(diskseq, go)
    if (waits) timer = setTimeout(go, READY_MS)
  }

  /** The same, however long it takes. */
  private whenPrepared(diskseq: DiskSeq, ready: () => void): void {
    const made = () => (this.beneath === undefined ? ready() : this.beneath.whenMade(diskseq, ready))
    if (this.closes === undefined) made()
    else this.closes.watch(diskseq, made)
  }

  /** See {@link Inodes}: of the library, which says nothing of its inodes, the kernel has them all. */
  invalidate(id: bigint): boolean {
    return this.transport instanceof FuseSession ? this.transport.invalidate(id) : true
  }

  prune(id: bigint): boolean {
    return this.transport instanceof FuseSession ? this.transport.prune(id) : true
  }

  /** See {@link RegistryListener}. */
  appeared(device: Device): void {
    this.state.highest = this.registry.highest
    this.beneath?.add(device)
  }

  /** Its number, or its file (LOOP_CHANGE_FD), may be another one's from here on: nobody opens it unasked. */
  vanished(device: Device): void {
    this.beneath?.remove(device)
    const directory = device.partition === 0 ? directoryId(device.diskseq) : undefined
    if (directory !== undefined) {
      this.closes?.unwatch(device.diskseq)
      const has = () => this.invalidate(directory)
      this.dead.add({
        id: directory,
        get known() {
          return has()
        },
      })
    }
    const node = this.nodes.known(device)
    if (node === undefined) return
    if (node.trusted) this.lifetime?.distrust(node)
    this.dead.add(node)
  }

  private descriptor(what: string, call: (done: (error: number, fd: number) => void) => void): Promise<number> {
    return new Promise((resolve, reject) => {
      call((error, fd) => {
        if (error === 0) resolve(fd)
        else reject(new UserError(`${what} failed on ${this.mountpoint}: ${errnoName(error)}`))
      })
    })
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
