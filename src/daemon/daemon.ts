// SPDX-License-Identifier: MIT
/** The daemon: its parts, put together, and the order in which they start and stop. */
import { basename, dirname } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

import { Broker } from '../broker/broker.js'
import { STORED_LEASES } from '../broker/leases.js'
import { ControlSocket } from '../broker/socket.js'
import { directoryId, nodeName, parseId } from '../devices/names.js'
import { Registry, type RegistryListener } from '../devices/registry.js'
import { type Device, Sysfs } from '../devices/sysfs.js'
import { UeventSocket } from '../devices/uevents.js'
import { FuseNativeTransport } from '../fuse/libfuse.js'
import { FuseSession } from '../fuse/session.js'
import type { KernelCache, Transport } from '../fuse/transport.js'
import { InodeTable } from '../gate/inode.js'
import { TakenOverPins } from '../gate/taken-over-pins.js'
import type { Guard } from '../handover/guard-client.js'
import type { OutgoingDaemon, TreeOwner } from '../handover/replace.js'
import type { Descriptors } from '../handover/service-manager.js'
import { DESCRIPTOR, findTakeover, giveUpMount, highestOf, type Takeover } from '../handover/takeover.js'
import { type Native, native as realNative } from '../native.js'
import { DeadNames } from '../tree/dead-names.js'
import { errnoName, UserError } from '../util/errno.js'
import { afterTicks } from '../util/clock.js'
import type { Logger } from '../util/log.js'
import { type MountOptions, mountsAt, prepareMountpoint, withoutSymlinks } from '../util/mountpoint.js'
import { ownPidNamespace } from '../util/pid-namespace.js'
import { Answers, type AnswersOptions, type Replaced } from './answers.js'
import { openBeneath } from './beneath.js'
import { Directories } from './directories.js'
import { HandOverSet } from './hand-over-set.js'
import { Preflight } from './preflight.js'
import { pinsOf, statusOf } from './status.js'
import { openFuse, TreeMount } from './tree-mount.js'
import { UserCloses } from './user-closes.js'

export interface DaemonOptions extends AnswersOptions {
  readonly mountpoint: string
  readonly mount: MountOptions
}

export interface DaemonParts {
  readonly options: DaemonOptions
  readonly log: Logger
  readonly replaced?: Replaced
  /** The guard that has started this daemon, if one has: with it, the tree outlives the daemon. */
  readonly guard?: Guard | undefined
  /** Called when another daemon has taken over: this process is to end at once. */
  readonly handedOver?: () => void
}

/**
 * How long this daemon wants to have a processor for at a time, ns: the least that the
 * kernel accepts. Threads with short slices run first (kernel/sched/fair.c), and callers wait for this one.
 */
const SLICE_NS = 100_000

/** How long a daemon that ends waits until links beneath are removed, ms: a user may have the directory locked. */
const LEAVE_MS = 1000

/** A disk has one device number for all its life; a partition may get another. */
const renumbers = (ino: bigint) => (parseId(ino)?.partition ?? 0) !== 0

export class Daemon implements TreeOwner, KernelCache, RegistryListener {
  /** Whether it went on with the mount of an earlier one. */
  tookOver = false
  private over!: () => void
  /** Resolves when the tree was unmounted, by {@link stop} or by somebody else, and no pin is held any more. */
  readonly ended = new Promise<void>((resolve) => (this.over = resolve))
  private stopping: Promise<void> | undefined
  private ending: Promise<void> | undefined
  private readonly native: Native
  private readonly inodes = new InodeTable()
  private readonly registry: Registry
  private readonly sysfs: Sysfs
  private readonly uevents: UeventSocket
  private readonly mount: TreeMount
  private readonly directories: Directories
  private readonly handOver: HandOverSet
  private readonly dead: DeadNames
  private answers: Answers | undefined
  private transport: Transport | undefined
  private broker: Broker | undefined
  private control: ControlSocket | undefined

  constructor(private readonly parts: DaemonParts) {
    const { guard, log, replaced } = parts
    const native = (this.native = replaced?.native ?? realNative)
    this.sysfs = new Sysfs(native)
    this.registry = new Registry(this.sysfs, log)
    this.uevents = new UeventSocket({ native, listener: this.registry, log })
    this.registry.drain = () => this.uevents.drain()
    this.mount = new TreeMount(native, log)
    this.directories = new Directories(native, log)
    this.handOver = new HandOverSet({ native, guard, owner: this, log })
    this.dead = new DeadNames(
      (id) => this.prune(id),
      () => this.answers?.lifetime.pruneAll(),
    )
  }

  /** Whether another daemon can go on with the tree when this one just ends. */
  get canBeTakenOver(): boolean {
    return this.handOver.canBeTakenOver
  }

  /**
   * Mounts the tree, or takes over a mounted one; resolves once it answers.
   *
   * @param stored descriptors of an earlier daemon
   * @param outgoing that daemon, if it is still there
   * @throws UserError where this machine, this user or this mount point will not do
   */
  async start(stored: Descriptors = new Map(), outgoing?: OutgoingDaemon): Promise<void> {
    const { native } = this
    const { log, options, guard } = this.parts
    const preflight = new Preflight(native, this.sysfs, log)
    preflight.check()
    const slice = native.setSlice(SLICE_NS)
    if (slice < 0) log.debug({ errno: errnoName(slice) }, 'no short slices: where processors are busy, callers wait longer')
    // Listen first: what changes during the scan is then not missed.
    this.uevents.open()
    await this.registry.start(highestOf(native, stored))
    if (stored.size > 0) {
      const found = findTakeover(native, stored, withoutSymlinks(options.mountpoint))
      if (found !== undefined) return this.takeOver(found, stored, outgoing)
      if (outgoing !== undefined) {
        throw new UserError(`${options.mountpoint}: what the daemon that serves it has does not fit; it goes on`)
      }
      guard?.remove(Object.values(DESCRIPTOR))
      await giveUpMount(native, new Map([...stored].filter(([name]) => name !== STORED_LEASES)), log)
    }
    const mountpoint = (this.mount.path = prepareMountpoint(options.mountpoint))
    try {
      this.mount.lock = await preflight.claim(mountpoint)
      await (options.transport === 'fuse-native' ? this.serveByLibrary() : this.serve(stored.get(STORED_LEASES) ?? []))
    } catch (error) {
      this.mount.unlock()
      throw error
    }
    log.info({ mountpoint, devices: this.registry.size }, 'mounted')
  }

  private async serveByLibrary(): Promise<void> {
    const { path: mountpoint } = this.mount
    const { options, log } = this.parts
    const transport = new FuseNativeTransport({ mountpoint, options: options.mount, renumbers, log })
    this.transport = transport
    await transport.start(this.assemble().tree)
    this.mount.watchFor(mountsAt(mountpoint).at(-1), () => void this.end())
  }

  /** @param leases of an earlier daemon, whose mount was of no use */
  private async serve(leases: readonly number[]): Promise<void> {
    const { mount, handOver, directories } = this
    const { path: mountpoint } = mount
    const { options } = this.parts
    handOver.share()
    const { tree, lifetime, closes } = this.assemble()
    const beneath = openBeneath(mountpoint)
    const fuse = openFuse()
    const transport = this.connect(fuse)
    const entry = mount.mount(fuse, options.mount)
    mount.watchFor(entry, () => void this.end())
    // Now that the tree covers them, others cannot remove these links by path.
    directories.keepLinks(beneath, mountpoint, this.registry.devices())
    await transport.start(tree)
    const descriptors = await mount.descriptors()
    lifetime.start(descriptors.mount)
    directories.watch(descriptors.closes, descriptors.root, closes)
    if (entry === undefined) return
    handOver.state.mount = { mountpoint, device: entry.device, pidNamespace: ownPidNamespace() }
    handOver.allow(entry.device, { lock: mount.lock, ...descriptors, beneath, fuse }, false)
    this.lend(leases, entry.device, undefined)
  }

  private connect(fd: number): FuseSession {
    const transport = new FuseSession({ native: this.native, fd, requests: this.handOver.state, log: this.parts.log })
    void transport.ended.then(() => this.end())
    this.transport = transport
    return transport
  }

  /**
   * Goes on with the mount of an outgoing daemon, and answers the requests that
   * that one has left.
   */
  private async takeOver(found: Takeover, stored: Descriptors, outgoing: OutgoingDaemon | undefined): Promise<void> {
    const { native, inodes, registry, mount, directories, handOver } = this
    const { options, log } = this.parts
    const { fuse, mountFd, closes, root = -1, beneath = -1, mountpoint } = found
    const since = await handOver.take(outgoing)
    const sockets = [...found.pins, ...(since.get(DESCRIPTOR.pins) ?? [])]
    this.tookOver = true
    mount.path = mountpoint
    mount.lock = found.lock
    const pinStore = handOver.use(found.state, found.stateFd)
    const pins = pinStore.takeOver(sockets)
    const { tree, opener, lifetime, intents, closes: listener } = this.assemble()
    mount.watchFor(found.mount, () => void this.end())
    const transport = this.connect(fuse)
    const takenOver = new TakenOverPins({ native, inodes, registry, opener, lifetime, intents, pinStore, holdSeconds: options.holdSeconds })
    for (const pin of pins) takenOver.takeOver(pin)
    lifetime.start(mountFd)
    directories.watch(closes, root, listener)
    directories.keepLinks(beneath, mountpoint, registry.devices())
    outgoing?.serves()
    handOver.allow(found.mount.device, { lock: mount.lock, mount: mountFd, closes, root, beneath, fuse }, true)
    transport.resume(tree)
    if (root < 0) this.find(DESCRIPTOR.root, mountpoint, '.', (fd) => directories.useRoot(fd))
    if (beneath < 0 && mountpoint.startsWith('/dev/')) {
      const use = (fd: number) => directories.keepLinks(fd, mountpoint, registry.devices())
      this.find(DESCRIPTOR.beneath, dirname(mountpoint), basename(mountpoint), use)
    }
    directories.forgetOthers((diskseq) => registry.find(nodeName(diskseq, 0)) !== undefined)
    const leases = [stored, since].flatMap((each) => each.get(STORED_LEASES) ?? [])
    this.lend(leases, found.mount.device, stored.get(DESCRIPTOR.control)?.at(-1))
    log.info({ mountpoint, devices: registry.size, pins: pins.length, leases: leases.length }, 'took over the tree from an earlier daemon')
  }

  /**
   * Goes on with leases of an earlier daemon, and then takes calls. The tree does not wait for that.
   *
   * @param listener of the control socket, if an earlier daemon had one
   */
  private lend(leases: readonly number[], device: string, listener: number | undefined): void {
    const { native, handOver, registry, inodes } = this
    const { path: mountpoint } = this.mount
    const { log } = this.parts
    const control = (this.control = new ControlSocket({ native, mountpoint, device, log }))
    if (control.open(listener)) handOver.add(DESCRIPTOR.control, control.fd)
    else if (control.fd >= 0) handOver.keep(DESCRIPTOR.control, control.fd)
    const status = () => {
      const metrics = this.transport instanceof FuseSession ? this.transport.metrics : undefined
      const found = statusOf({ inodes, metrics, gate: this.answers?.gate, uevents: this.uevents })
      return { tookOver: this.tookOver, ...found, now: { devices: registry.size, pins: this.answers?.opener.count ?? 0 } }
    }
    const pins = () => pinsOf(inodes)
    const nodes = this.answers?.opener.nodes ?? -1
    const broker = (this.broker = new Broker({ native, store: handOver, nodes, mountpoint, status, pins, log }))
    broker.start(leases, control.fd).catch((error: unknown) => {
      // The tree is worth more.
      log.error({ err: error }, 'unexpected error; no leases from this daemon')
    })
  }

  /** A daemon of an earlier version has not left that directory. */
  private find(name: string, target: string, directory: string, use: (fd: number) => void): void {
    this.native.cloneMount(target, directory, (error, fd) => {
      if (error !== 0) {
        const fields = { errno: errnoName(error), name }
        return this.parts.log.warn(fields, 'a directory that earlier versions did not leave cannot be had')
      }
      use(fd)
      this.handOver.add(name, fd)
    })
  }

  /** See {@link TreeOwner}: what was begun stays as it is, for the daemon that comes next; this process is to end at once. */
  pause(): void {
    this.broker?.pause()
    if (this.transport instanceof FuseSession) this.transport.pauseForHandOver()
  }

  /** As {@link pause}, because of an error: what was begun may be the reason, and is counted as such. */
  halt(): void {
    this.broker?.pause()
    if (this.transport instanceof FuseSession) this.transport.pause()
  }

  /** See {@link TreeOwner}. */
  goOn(): void {
    this.broker?.goOn()
    if (this.transport instanceof FuseSession) this.transport.goOn()
  }

  /** See {@link TreeOwner}. */
  handedOver(): void {
    this.parts.handedOver?.()
  }

  /** Takes the mount away, busy or not: open files stay open, they are the devices themselves. */
  stop(): Promise<void> {
    this.handOver.canBeTakenOver = false
    return (this.stopping ??= this.mount.unmount().finally(() => this.end()))
  }

  /**
   * The mount or the connection is gone, and no FORGET comes any more. Callers that were
   * answered may still be about to open their devices, so pins stay until these are done.
   * Requests that wait fail.
   */
  private end(): Promise<void> {
    return (this.ending ??= this.drain().finally(() => this.close()))
  }

  private async drain(): Promise<void> {
    const { guard, options } = this.parts
    this.broker?.close()
    this.control?.close()
    guard?.over()
    // Under a guard, udev is asked to look after these names again.
    await new Promise<void>((resolve) => {
      const cancel = afterTicks(LEAVE_MS, resolve)
      void this.directories
        .leaveLinks(guard !== undefined)
        .then(resolve)
        .finally(cancel)
    })
    this.mount.unlock()
    if (this.transport instanceof FuseSession) await this.transport.whenQuiet()
    const lifetime = this.answers?.lifetime
    if (lifetime === undefined) return
    const late = sleep(options.holdSeconds * 1000, undefined, { ref: false })
    await Promise.race([new Promise<void>((resolve) => lifetime.whenDrained(resolve)), late])
  }

  /** Lets go of everything; the mount, if it is still there, is dead after this. */
  private close(): void {
    const { handOver, mount, directories, answers, dead, transport, registry, sysfs, uevents } = this
    for (const part of [this.parts.guard, directories, answers, dead, transport, handOver, registry, sysfs, uevents, mount]) part?.close()
    this.over()
  }

  private assemble() {
    const { native, registry, sysfs, inodes, tookOver, directories } = this
    const { options, log, replaced = {} } = this.parts
    const { pinStore, state } = this.handOver
    state.highest = registry.highest
    const answers = (this.answers = new Answers({
      ...{ native, registry, sysfs, inodes, pinStore, state, options, replaced, log },
      kernel: this,
      whenReady: (diskseq, ready) => directories.whenReady(diskseq, ready),
      takesOver: tookOver,
    }))
    registry.listener = this
    const { tree, opener, lifetime, intents } = answers
    return { tree, opener, lifetime, intents, closes: new UserCloses({ registry, inodes, lifetime, opener, log }) }
  }

  /** See {@link KernelCache}: of the library, which says nothing of its inodes, the kernel has them all. */
  invalidate(id: bigint): boolean {
    return this.transport instanceof FuseSession ? this.transport.invalidate(id) : true
  }

  prune(id: bigint): boolean {
    return this.transport instanceof FuseSession ? this.transport.prune(id) : true
  }

  /** See {@link RegistryListener}. */
  appeared(device: Device): void {
    this.handOver.state.highest = this.registry.highest
    this.directories.appeared(device)
  }

  /** From now on its number, or its file (LOOP_CHANGE_FD), may be another's: the kernel must ask before each open. */
  vanished(device: Device): void {
    this.directories.vanished(device)
    const id = device.partition === 0 ? directoryId(device.diskseq) : undefined
    if (id !== undefined) {
      const known = () => this.invalidate(id)
      this.dead.add({
        id,
        get known() {
          return known()
        },
      })
    }
    this.broker?.leases.vanished(device.name)
    const inode = this.inodes.known(device)
    if (inode === undefined) return
    if (inode.trusted) this.answers?.lifetime.distrust(inode)
    this.dead.add(inode)
  }
}
