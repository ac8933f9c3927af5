// SPDX-License-Identifier: MIT
/** `diskseqfs exec`: runs a program that takes paths of disks, which are held open, verified, until it ends. */
import { spawn } from 'node:child_process'
import { constants } from 'node:os'
import { stat } from 'node:fs/promises'
import { join } from 'node:path'

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
  const paths = await Promise.all(disks.map((disk, i) => (fd ? `/proc/self/fd/${FIRST_FD + i}` : pathOf(disk, tree))))
  const [file, ...args] = command.map((argument) => insert(argument, paths)) as [string, ...string[]]
  const code = await run(file, args, fd ? disks.map((disk) => disk.fd) : [])
  await Promise.all(disks.map((disk) => disk.close()))
  return code
}

/** Of the descriptors that a program gets: those after its standard input, output and error. */
const FIRST_FD = 3

/** The path in the tree; it must lead to the disk, which cannot get another number meanwhile. */
async function pathOf(disk: Disk, tree: string): Promise<string> {
  const path = join(tree, disk.name)
  const hint = `is the tree mounted at ${tree}? --fd passes the open disk itself`
  try {
    const { rdev } = await stat(path)
    if (rdev === (await stat(`/proc/self/fd/${disk.fd}`)).rdev) return path
  } catch (error) {
    throw new UserError(`${path}: ${errnoName(errnoOf(error))}; ${hint}`, EXIT.FAILED)
  }
  throw new UserError(`${path} is another device; ${hint}`, EXIT.FAILED)
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

function run(file: string, args: readonly string[], fds: readonly number[]): Promise<number> {
  return new Promise((resolve, reject) => {
    // Before the program is started: a signal in between would end this one alone.
    const passOn = (signal: NodeJS.Signals) => void child.kill(signal)
    const ignore = () => {}
    for (const signal of PASSED_ON) process.on(signal, passOn)
    for (const signal of FROM_TERMINAL) process.on(signal, process.stdin.isTTY ? ignore : passOn)
    const child = spawn(file, args, { stdio: ['inherit', 'inherit', 'inherit', ...fds] })
    child.on('error', (error: NodeJS.ErrnoException) => {
      const code = error.code === 'ENOENT' ? EXIT.NOT_FOUND : error.code === 'EACCES' ? EXIT.NOT_EXECUTABLE : EXIT.FAILED
      reject(new UserError(`${printable(file)}: ${describe(error)}`, code))
    })
    child.on('close', (code, signal) => resolve(signal === null ? (code as number) : EXIT.SIGNAL + constants.signals[signal]))
  })
}

function describe({ code = 'unknown error' }: NodeJS.ErrnoException): string {
  if (code === 'ENOENT') return 'no such program'
  return code === 'EACCES' ? 'it may not be executed' : `it cannot be started: ${code}`
}
