// SPDX-License-Identifier: MIT
/** The parts that answer requests, from the tree to the pins, put together. */
import { DeviceNodes } from '../devices/device-node.js'
import type { DiskSeq } from '../devices/names.js'
import type { Registry } from '../devices/registry.js'
import type { Sysfs } from '../devices/sysfs.js'
import type { KernelCache, TransportName } from '../fuse/transport.js'
import { Access } from '../gate/access.js'
import { Crowd } from '../gate/crowd.js'
import { Gate } from '../gate/gate.js'
import type { InodeTable } from '../gate/inode.js'
import { Intents } from '../gate/intent.js'
import { PinLifetime } from '../gate/pin-lifetime.js'
import { PinOpener } from '../gate/pin.js'
import type { PinStore } from '../handover/pin-store.js'
import type { SharedState } from '../handover/shared-state.js'
import type { Native } from '../native.js'
import { Tree } from '../tree/tree.js'
import { errnoName, UserError } from '../util/errno.js'
import type { Logger } from '../util/log.js'

export interface AnswersOptions {
  /** See {@link PinLifetimeOptions}; both. */
  readonly lingerMs: number
  readonly holdSeconds: number
  /** How long a caller waits for a disk that does not answer, ms. */
  readonly openTimeoutMs: number
  /** What stands between the kernel and the tree. */
  readonly transport?: TransportName
}

/**
 * What a test may replace: to switch one safety mechanism off and show
 * that it is missed.
 */
export interface Replaced {
  readonly opener?: (native: Native, devDirectory: number, pinStore: PinStore | undefined) => PinOpener
  readonly intents?: (native: Native) => Intents
  readonly access?: (native: Native) => Access
  readonly native?: Native
  readonly lookupsWait?: boolean
}

export interface AnswersParts {
  readonly native: Native
  readonly registry: Registry
  readonly sysfs: Sysfs
  readonly inodes: InodeTable
  /** Where pins are stored for another daemon, if one can go on. */
  readonly pinStore: PinStore | undefined
  readonly state: SharedState
  readonly kernel: KernelCache
  readonly options: AnswersOptions
  readonly replaced: Replaced
  /** See {@link TreeParts}; both. */
  readonly whenReady: (diskseq: DiskSeq, ready: () => void) => void
  readonly takesOver: boolean
  readonly log: Logger
}

export class Answers {
  readonly tree: Tree
  readonly opener: PinOpener
  readonly intents: Intents
  readonly gate: Gate
  readonly lifetime: PinLifetime
  private readonly crowd: Crowd
  private readonly devDirectory: number

  /** @throws UserError where /dev cannot be opened */
  constructor(private readonly parts: AnswersParts) {
    const { native, registry, sysfs, inodes, pinStore, state, kernel, options, replaced, whenReady, takesOver, log } = parts
    this.devDirectory = native.openDirectory('/dev')
    if (this.devDirectory < 0) throw new UserError(`cannot open /dev: ${errnoName(this.devDirectory)}`)
    const devnodes = new DeviceNodes(native, this.devDirectory)
    const opener = replaced.opener?.(native, this.devDirectory, pinStore) ?? new PinOpener(native, this.devDirectory, pinStore)
    const intents = replaced.intents?.(native) ?? new Intents(native)
    const access = replaced.access?.(native) ?? new Access(native)
    const lifetime = new PinLifetime({ native, inodes, opener, intents, state, kernel, options, log })
    const crowd = new Crowd(kernel, intents)
    const lookupsWait = replaced.lookupsWait ?? options.transport === 'fuse-native'
    const gate = new Gate({
      ...{ registry, sysfs, inodes, devnodes, opener, lifetime, intents, access, crowd },
      options: { ...options, lookupsWait },
      log,
    })
    this.tree = new Tree({ registry, sysfs, inodes, devnodes, gate, crowd, lifetime, intents, whenReady, takesOver })
    this.gate = gate
    this.opener = opener
    this.intents = intents
    this.lifetime = lifetime
    this.crowd = crowd
  }

  close(): void {
    this.lifetime.close()
    this.crowd.close()
    this.intents.close()
    this.parts.native.close(this.devDirectory)
  }
}
