// SPDX-License-Identifier: MIT
/** `diskseqfs watch` and `diskseqfs wait`: disks as they come and go. */
import { readFileSync, realpathSync } from 'node:fs'
import { resolve } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

import { nodeName, parseName, sameDmName } from '../devices/names.js'
import type { DiskInfo } from '../disks/info.js'
import { DiskError, resolve as find } from '../disks/open.js'
import { type DiskEvent, watch as events } from '../disks/watch.js'
import { UserError } from '../util/errno.js'
import { printable } from '../util/text.js'
import type { WaitArguments, WatchArguments } from './options.js'

/** Goes on until it is ended, or nobody reads what it prints. */
export async function watch({ json = false, existing = false }: WatchArguments): Promise<void> {
  const ending = new AbortController()
  process.stdout.on('error', () => ending.abort())
  for await (const event of events({ existing, signal: ending.signal })) {
    // With a reader that is slow, events wait where their number is bounded.
    if (!process.stdout.write(json ? lineOfJson(event) : line(event))) {
      await new Promise((resolve) => process.stdout.once('drain', resolve).once('error', resolve))
    }
  }
}

function line(event: DiskEvent): string {
  if (!('disk' in event)) return `${event.event}\n`
  const { name, kname, majmin } = event.disk
  return `${event.event} ${name} ${printable(kname)} ${majmin}\n`
}

function lineOfJson(event: DiskEvent): string {
  if (!('disk' in event)) return `${JSON.stringify(event)}\n`
  const { name, diskseq, partition, kname, majmin } = event.disk
  return `${JSON.stringify({ event: event.event, name, diskseq: String(diskseq), partition, kname, majmin })}\n`
}

/** What is waited for: which devices count. */
type Wanted = (device: DiskInfo) => boolean

/** What has no event of its own (a device-mapper device got its table, or another name) is looked at this often, ms. */
const LOOK_MS = 250

/**
 * Waits until a disk is there, and prints its path in the tree; or until there is none.
 *
 * @returns the exit code: 1 where the time was over
 */
export async function wait(name: string | undefined, { loopFile, dmName, gone = false, timeout }: WaitArguments): Promise<number> {
  const given = [name, loopFile, dmName].filter((what) => what !== undefined)
  if (given.length !== 1) throw new UserError('say one thing to wait for: a name, --loop-file or --dm-name', 2)
  const wanted = name !== undefined ? named(name) : loopFile !== undefined ? ofFile(loopFile) : withDmName(dmName as string)
  const over = new AbortController()
  const timer = timeout === undefined ? undefined : setTimeout(() => over.abort(), timeout * 1000)
  const live = new Live(wanted)
  const holds = async () => (gone ? live.none() : live.path())
  try {
    const answer = await live.until(holds, over.signal)
    if (answer === undefined) {
      process.stderr.write(`diskseqfs: ${printable(given[0] as string)} was not ${gone ? 'gone' : 'there'} within ${timeout} s\n`)
      return 1
    }
    if (!gone) process.stdout.write(`${answer}\n`)
    return 0
  } finally {
    clearTimeout(timer)
  }
}

function named(text: string): Wanted {
  const parsed = parseName(text)
  if (parsed === undefined) {
    throw new UserError(`${printable(text)} is no name in the tree, such as 13 or 13p1; --loop-file and --dm-name take others`, 2)
  }
  const name = nodeName(parsed.diskseq, parsed.partition)
  return (device) => device.name === name
}

function attribute({ kname }: DiskInfo, name: string): string | undefined {
  try {
    return readFileSync(`/sys/class/block/${kname.replaceAll('/', '!')}/${name}`, 'utf8').replace(/\n$/, '')
  } catch {
    return undefined // it has none, or is gone
  }
}

/** Loop devices on that file, which may be made while we wait. */
function ofFile(file: string): Wanted {
  if (file.includes('\ufffd')) throw new UserError('--loop-file: a name that is not UTF-8 cannot be told from others', 2)
  const path = resolve(file)
  return (device) => {
    const backing = device.partition === 0 ? attribute(device, 'loop/backing_file') : undefined
    return backing !== undefined && backing === realOf(path)
  }
}

function realOf(path: string): string {
  try {
    return realpathSync(path)
  } catch {
    return path
  }
}

/** Device-mapper devices of that name that can be used. */
function withDmName(name: string): Wanted {
  return (device) =>
    sameDmName(attribute(device, 'dm/name') ?? '', name) && attribute(device, 'dm/suspended') === '0' && attribute(device, 'size') !== '0'
}

/** Of an open: waiting changes nothing. */
const FOR_GOOD: readonly string[] = ['EACCES', 'EPERM', 'EMFILE', 'ENFILE']

/** The devices that are there now. */
class Live {
  private readonly devices = new Map<string, DiskInfo>()

  constructor(private readonly wanted: Wanted) {}

  private find(): DiskInfo | undefined {
    for (const device of this.devices.values()) if (this.wanted(device)) return device
    return undefined
  }

  none(): string | undefined {
    return this.find() === undefined ? 'none' : undefined
  }

  /** The path of one that is wanted, and was opened and verified. */
  async path(): Promise<string | undefined> {
    const device = this.find()
    if (device === undefined) return undefined
    try {
      return (await find(device.name)).path
    } catch (error) {
      // It is gone again, or cannot be opened yet.
      if (error instanceof DiskError && !FOR_GOOD.includes(error.code)) return undefined
      throw error
    }
  }

  /** Calls `holds` when something has changed, until it has an answer; undefined where the time is over first. */
  async until(holds: () => Promise<string | undefined>, signal: AbortSignal): Promise<string | undefined> {
    const stop = new AbortController()
    let ready = false
    let answer: string | undefined
    const look = async () => {
      if (ready) answer ??= await holds()
      // Time is over only when what is there has been looked at.
      if (answer !== undefined || (ready && signal.aborted)) stop.abort()
    }
    signal.addEventListener('abort', () => ready && stop.abort(), { once: true })
    const follow = async () => {
      for await (const event of events({ existing: true, signal: stop.signal })) {
        if (event.event === 'add') this.devices.set(event.disk.name, event.disk)
        if (event.event === 'remove') this.devices.delete(event.disk.name)
        if (event.event === 'ready') ready = true
        await look()
      }
    }
    const lookAgain = async () => {
      while (!stop.signal.aborted) {
        await sleep(LOOK_MS, undefined, { signal: stop.signal }).catch(() => {})
        if (!stop.signal.aborted) await look()
      }
    }
    await Promise.all([follow(), lookAgain()])
    // The time may be over because this process got none.
    await look()
    return answer
  }
}
