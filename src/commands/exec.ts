// SPDX-License-Identifier: MIT
/** `diskseqfs exec`: runs a program that takes paths of disks, which are held open, verified, until it ends. */
import { type ChildProcess, spawn, type StdioOptions } from 'node:child_process'
import { stat } from 'node:fs/promises'
import { constants } from 'node:os'
import { resolve } from 'node:path'

import { type Disk, open } from '../disks/open.js'
import { errnoName, errnoOf, UserError } from '../util/errno.js'
import { printable } from '../util/text.js'
import type { ExecArguments, RunArguments } from './options.js'

/** Exit codes, as env(1) has them. */
export const EXIT = { FAILED: 125, NOT_EXECUTABLE: 126, NOT_FOUND: 127, SIGNAL: 128 } as const

/** What a terminal sends to all programs in the foreground, which have it already. */
const FROM_TERMINAL = ['SIGINT', 'SIGQUIT'] as const
const PASSED_ON = ['SIGTERM', 'SIGHUP', 'SIGUSR1', 'SIGUSR2', 'SIGWINCH', 'SIGCONT'] as const

/** @returns the exit code */
export async function exec(devices: readonly string[], command: readonly string[], options: ExecArguments): Promise<number> {
  const { write = false, exclusive = false } = options
  const disks: Disk[] = []
  for (const device of devices) disks.push(await naming(device, open(device, { write, exclusive })))
  return runWith(disks, command, options)
}

/** Says of an error which argument it is about, and ends with the exit code for what this program could not do. */
export async function naming<T>(argument: string, work: Promise<T>): Promise<T> {
  try {
    return await work
  } catch (error) {
    if (!(error instanceof UserError)) throw error
    throw new UserError(`${printable(argument)}: ${error.message}`, EXIT.FAILED)
  }
}

/**
 * Runs a program, in whose arguments `{}` or `{1}`, `{2}` stand for the disks. They stay open until it ends.
 *
 * @returns the exit code
 */
export async function runWith(disks: readonly Disk[], command: readonly string[], { fd = false, tree }: RunArguments): Promise<number> {
  requireText(command)
  const paths = await Promise.all(disks.map((disk, i) => (fd ? `/proc/self/fd/${FIRST_FD + i}` : pathOf(disk, tree))))
  const [file, ...args] = command.map((argument) => insert(argument, paths)) as [string, ...string[]]
  const standard: StdioOptions = ['inherit', 'inherit', 'inherit']
  const stdio = fd ? [...standard, ...Array<'ignore'>(FIRST_FD - 3).fill('ignore'), ...disks.map((disk) => disk.fd)] : standard
  const code = await run(file, args, stdio)
  await Promise.all(disks.map((disk) => disk.close()))
  return code
}

/** Node replaces bytes that are no UTF-8: the program would get other arguments than were given. */
function requireText(command: readonly string[]): void {
  if (!command.some((argument) => argument.includes('\ufffd'))) return
  throw new UserError('an argument is not UTF-8, and cannot be passed on as it is; diskseq --open can', EXIT.FAILED)
}

/**
 * Numbers of the descriptors of disks. Those below may be what the program expects to get from its caller (a log, the
 * sockets of a service): they are closed, never a disk.
 */
const FIRST_FD = 10

/** The path in the tree; it must lead to the disk, which cannot get another number meanwhile. */
async function pathOf(disk: Disk, tree: string): Promise<string> {
  // The program may change its directory.
  const path = resolve(tree, disk.name)
  const hint = `is the tree mounted at ${printable(tree)}? --fd passes the open disk itself`
  try {
    const found = await stat(path)
    if (found.isBlockDevice() && found.rdev === (await stat(`/proc/self/fd/${disk.fd}`)).rdev) return path
  } catch (error) {
    throw new UserError(`${printable(path)}: ${errnoName(errnoOf(error))}; ${hint}`, EXIT.FAILED)
  }
  throw new UserError(`${printable(path)} is another device; ${hint}`, EXIT.FAILED)
}

function insert(argument: string, paths: readonly string[]): string {
  return argument.replace(/\{(\d*)\}/g, (placeholder, number: string) => {
    if (number === '' && paths.length > 1) {
      throw new UserError('{} could be any of the devices; write {1} for the first, {2} for the second', EXIT.FAILED)
    }
    const path = paths[number === '' ? 0 : Number(number) - 1]
    if (path === undefined) throw new UserError(`there is no device for ${placeholder}: ${paths.length} given`, EXIT.FAILED)
    return path
  })
}

function run(file: string, args: readonly string[], stdio: StdioOptions): Promise<number> {
  return new Promise((done, reject) => {
    // Before the program is started: a signal in between would end this one alone.
    const passOn = (signal: NodeJS.Signals) => void child?.kill(signal)
    const ignore = () => {}
    for (const signal of PASSED_ON) process.on(signal, passOn)
    for (const signal of FROM_TERMINAL) process.on(signal, process.stdin.isTTY ? ignore : passOn)
    const failed = (error: NodeJS.ErrnoException) => {
      const code = error.code === 'ENOENT' ? EXIT.NOT_FOUND : EXIT.NOT_EXECUTABLE
      reject(new UserError(`${printable(file)}: ${describe(error)}`, code))
    }
    let child: ChildProcess
    try {
      if (file === '') throw Object.assign(new Error(), { code: 'ENOENT' })
      child = spawn(file, args, { stdio })
    } catch (error) {
      return failed(error as NodeJS.ErrnoException)
    }
    child.on('error', failed)
    // Node has no names for real-time signals.
    child.on('close', (code, signal) => done(code ?? EXIT.SIGNAL + (constants.signals[signal as NodeJS.Signals] ?? 0)))
  })
}

function describe({ code = 'unknown error' }: NodeJS.ErrnoException): string {
  if (code === 'ENOENT') return 'no such program'
  return code === 'EACCES' ? 'it may not be executed' : `it cannot be started: ${code}`
}
