// SPDX-License-Identifier: MIT
/** `diskseqfs mount`: the daemon in the foreground, or a child that is it. */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { createWriteStream, fstatSync } from 'node:fs'
import { resolve } from 'node:path'
import { setFlagsFromString } from 'node:v8'

import { type Command, InvalidArgumentError } from 'commander'

import type { MountArguments } from './options.js'
import { Daemon } from '../daemon/daemon.js'
import { errnoOf, E, UserError } from '../util/errno.js'
import { Guard } from '../handover/guard-client.js'
import { createLogger, defaultFormat } from '../util/log.js'
import { type MountOptions, parseMountOptions, withoutSymlinks } from '../util/mountpoint.js'
import { native } from '../native.js'
import { ServiceManager } from '../handover/service-manager.js'
import { OutgoingDaemon } from '../handover/replace.js'

/** Options that may also stand behind -o, as fstab has no other place for them. */
const OWN = {
  linger: '--linger',
  hold: '--hold',
  open_timeout: '--open-timeout',
  log_level: '--log-level',
  log_format: '--log-format',
  transport: '--transport',
}

/** Descriptor on which a daemon in the background tells its parent how the start went. */
const READY_FD = 3
/** Set for such a child only. */
const BACKGROUND = 'DISKSEQFS_BACKGROUND'

export async function mount(mountpoint: string, given: MountArguments, command: Command): Promise<void> {
  const mountOptions = parseMountOptions(given.o.join(','), Object.keys(OWN))
  const options = withMountOptions(given, mountOptions, command)
  if (options.foreground === true || process.env[BACKGROUND] === '1') return serve(mountpoint, options, mountOptions)
  await background()
}

/** Reads the options behind -o as the command line's own are read; those on the command line win. */
function withMountOptions(given: MountArguments, mount: MountOptions, command: Command): MountArguments {
  for (const [name, text] of mount.own) {
    const flag = OWN[name as keyof typeof OWN]
    const option = command.options.find((candidate) => candidate.long === flag)
    if (option?.parseArg === undefined) throw new Error(`no option ${flag} that takes a value`)
    if (command.getOptionValueSource(option.attributeName()) === 'cli') continue
    try {
      command.setOptionValue(option.attributeName(), option.parseArg(text, undefined))
    } catch (error) {
      if (!(error instanceof InvalidArgumentError)) throw error
      throw new UserError(`mount option ${name}=${text}: ${error.message}`, 2)
    }
  }
  return { ...given, ...command.opts<MountArguments>() }
}

async function serve(mountpoint: string, options: MountArguments, mount: MountOptions): Promise<void> {
  // What a request leaves behind is small. V8 would let it pile up to many MiB,
  // and never give the pages back.
  setFlagsFromString('--semi-space-growth-factor=1')
  if (options.transport === 'fuse-native' && options.replace) {
    throw new UserError('--transport fuse-native: no daemon can go on with its mount; leave out --replace', 2)
  }
  const inBackground = process.env[BACKGROUND] === '1'
  const { logger: log, flush } = await createLogger(
    options.logLevel,
    inBackground ? { kind: 'syslog', native } : { kind: 'stderr', format: options.logFormat ?? defaultFormat() },
  )
  const guard = options.transport === 'fuse-native' ? undefined : Guard.ofThisProcess(native, log)
  const manager = guard === undefined ? ServiceManager.ofThisProcess(native, log) : undefined
  const daemon = new Daemon({
    options: {
      mountpoint: resolve(mountpoint),
      mount,
      lingerMs: options.linger,
      holdSeconds: options.hold,
      openTimeoutMs: options.openTimeout * 1000,
      transport: options.transport,
    },
    guard,
    handedOver: () => process.exit(0),
    log,
  })
  // A daemon keeps nobody's directory busy.
  if (inBackground) process.chdir('/')
  // All disks are read once, and thousands are enough for V8 to load its optimizing
  // compiler, which takes 7 MiB. What is done more than once shall have it.
  setFlagsFromString('--no-opt')
  const starting = start(daemon, guard, mountpoint, options.replace === true).finally(() => setFlagsFromString('--opt'))
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.on(signal, () => {
      // A start under way is short, and cannot be left half done.
      starting.then(
        () => {
          if (daemon.canBeTakenOver) return exit(signal)
          log.info({ signal }, 'stopping')
          manager?.stopping('unmounting')
          return daemon.stop()
        },
        () => {},
      )
    })
  }
  /** What was begun stays as it is: the next daemon goes on with it, as it would after a crash. */
  let leaving = false
  const exit = async (why: string, code = 0) => {
    if (leaving) return
    leaving = true
    if (code === 0) daemon.pause()
    else daemon.halt()
    log.info({ why }, 'leaving the tree to the next daemon')
    manager?.stopping('leaving the tree to the next daemon')
    await flush()
    process.exit(code)
  }
  // A bug must not leave a dead mount behind: it would stop whatever looks at it.
  process.on('uncaughtException', (error) => {
    if (daemon.canBeTakenOver) {
      log.fatal({ err: error }, 'unexpected error')
      return void exit('unexpected error', 1)
    }
    log.fatal({ err: error }, 'unexpected error; unmounting')
    void daemon
      .stop()
      .then(flush)
      .finally(() => process.exit(1))
  })
  const tellParent = inBackground ? parentPipe() : undefined
  try {
    await starting
  } catch (error) {
    if (!daemon.canBeTakenOver) await daemon.stop()
    if (tellParent !== undefined && error instanceof UserError) {
      await tellParent(error.message)
      process.exit(error.exitCode)
    }
    await flush()
    throw error
  }
  await tellParent?.('')
  const status = `serving ${mountpoint}${daemon.tookOver ? ', taken over' : ''}`
  guard?.serves(status, () => void exit('another daemon goes on'))
  manager?.ready(status)
  await daemon.ended
  // A disk that hangs may hold a thread for ever; the rest is done.
  await flush()
  process.exit(0)
}

async function start(daemon: Daemon, guard: Guard | undefined, mountpoint: string, replace: boolean): Promise<void> {
  const before = replace ? await OutgoingDaemon.ask(native, withoutSymlinks(mountpoint)) : undefined
  await daemon.start(before?.stored ?? (await guard?.stored()), before?.daemon)
}

/** Starts this very command again as the daemon, and waits until the tree answers. */
async function background(): Promise<void> {
  const child = spawn(process.execPath, [...process.execArgv, ...process.argv.slice(1)], {
    detached: true,
    env: { ...process.env, [BACKGROUND]: '1' },
    stdio: ['ignore', 'ignore', 'ignore', 'pipe'],
  })
  const pipe = child.stdio[READY_FD]
  if (!pipe) throw new Error('no pipe to the daemon')
  const message = await new Promise<string | undefined>((told) => {
    let text = ''
    pipe.on('data', (chunk: Buffer) => (text += chunk.toString()))
    pipe.on('close', () => told(text === '' ? undefined : text.trimEnd()))
  })
  if (message === undefined) {
    throw new UserError('the daemon ended before the tree was mounted; run with -f to see why')
  }
  if (message !== 'ready') {
    if (child.exitCode === null) await once(child, 'exit')
    throw new UserError(message)
  }
  child.unref()
}

/** The way back to {@link background}: an empty message says that all is well. */
function parentPipe(): (error: string) => Promise<void> {
  try {
    fstatSync(READY_FD)
  } catch (error) {
    if (errnoOf(error) === E.EBADF) return async () => {}
    throw error
  }
  const pipe = createWriteStream('', { fd: READY_FD })
  pipe.on('error', () => {}) // the parent was killed; the daemon goes on
  return (error) => new Promise((told) => pipe.end(`${error || 'ready'}\n`, () => told()))
}
