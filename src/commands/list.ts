// SPDX-License-Identifier: MIT
/** `diskseqfs list`: what sysfs has now, for people and for programs. */
import { readFileSync, statSync } from 'node:fs'

import type { LeaseReply } from '../broker/lease-reply.js'
import { type DiskSeq, nodeName, parseName, sameDmName } from '../devices/names.js'
import { devices } from '../disks/open.js'
import { errnoOf, UserError } from '../util/errno.js'
import { native } from '../native.js'
import { type Device, Sysfs } from '../devices/sysfs.js'
import { unescapeOctal } from '../util/mountpoint.js'
import { printable } from '../util/text.js'
import { ask } from './ask.js'
import { DEFAULT_COLUMNS, type Format, type Listed, parseColumn, parseColumns, show, type Showing, sorted } from './columns.js'
import type { ListArguments } from './options.js'

/** sysfs counts in sectors of 512 bytes, whatever the disk does. */
const SECTOR = 512

/**
 * @param which only these: names in the tree, kernel names, device-mapper names, or paths
 * @returns the exit code: 1 where one of them is none of the list
 */
export async function list(which: readonly string[], options: ListArguments): Promise<number> {
  const sysfs = new Sysfs(native)
  const columns = options.output === undefined ? DEFAULT_COLUMNS : parseColumns(options.output)
  const sort = options.sort === undefined ? undefined : parseColumn(options.sort)
  // Only the daemon knows of them.
  const ifShown = async (column: string, find: (mountpoint: string) => Promise<ByName>) =>
    [...columns, sort].includes(column) ? find(options.tree) : new Map<string, string[]>()
  const held = { leases: await ifShown('LEASES', leasesByName), pins: await ifShown('PINS', pinsByName) }
  const showing = showingOf(sysfs, columns, held, options)
  const all = tree(sysfs, await devices())
  const { found, missing } = select(all, which)
  const flat = sort === undefined ? found : sorted(found.flatMap(flatten), sort, showing)
  process.stdout.write(show(flat, showing))
  for (const argument of missing) process.stderr.write(`diskseqfs: ${printable(argument)}: no disk or partition is called so now\n`)
  return missing.length === 0 ? 0 : 1
}

function showingOf(
  sysfs: Sysfs,
  columns: readonly string[],
  held: { readonly leases: ByName; readonly pins: ByName },
  { bytes = false, noheadings = false, raw, json, pairs, paths = false }: ListArguments,
): Showing {
  const formats = [raw && 'raw', json && 'json', pairs && 'pairs'].filter((format) => typeof format === 'string') as Format[]
  if (formats.length > 1) throw new UserError('--raw, --json and --pairs are different formats; choose one', 2)
  let mounts: Map<string, string[]> | undefined
  return {
    columns,
    format: formats[0] ?? 'table',
    bytes,
    headings: !noheadings,
    paths,
    coloured: process.stdout.isTTY && (process.env['NO_COLOR'] ?? '') === '',
    details: {
      attribute: ({ kname }, name) => sysfs.attribute(kname.replaceAll('/', '!'), name)?.replace(/\n$/, ''),
      mountpoints: (majmin) => (mounts ??= readMounts()).get(majmin) ?? [],
      leases: ({ name }) => held.leases.get(name) ?? [],
      pins: ({ name }) => held.pins.get(name) ?? [],
    },
  }
}

/** What is said of devices, by their names in the tree. */
type ByName = ReadonlyMap<string, readonly string[]>

async function leasesByName(mountpoint: string): Promise<ByName> {
  const { leases } = (await ask(mountpoint, 'ListLeases')) as { leases: LeaseReply[] }
  return byName(leases, ({ lease }) => lease)
}

async function pinsByName(mountpoint: string): Promise<ByName> {
  const { pins } = (await ask(mountpoint, 'ListPins')) as { pins: { name: string; why: string }[] }
  return byName(pins, ({ why }) => why)
}

function byName<T extends { readonly name: string }>(those: readonly T[], what: (that: T) => string): ByName {
  const found = new Map<string, string[]>()
  for (const that of those) found.set(that.name, [...(found.get(that.name) ?? []), what(that)])
  return found
}

/** Those of the list that are asked for, each with its partitions. */
function select(all: readonly Listed[], which: readonly string[]): { found: readonly Listed[]; missing: string[] } {
  if (which.length === 0) return { found: all, missing: [] }
  const devices = all.flatMap((disk) => [disk, ...(disk.children ?? [])])
  const wanted = which.map((argument) => devices.find(calledBy(argument)))
  return { found: wanted.filter((device) => device !== undefined), missing: which.filter((_, i) => wanted[i] === undefined) }
}

/** Nothing is opened for it: of a path, the number counts that it has now. */
function calledBy(argument: string): (device: Listed) => boolean {
  if (argument.includes('/')) {
    const number = numberOf(argument)
    return ({ majmin }) => majmin === number
  }
  const parsed = parseName(argument)
  const name = parsed === undefined ? undefined : nodeName(parsed.diskseq, parsed.partition)
  if (name !== undefined) return (device) => device.name === name
  return ({ kname, majmin, holder }) =>
    kname === argument || majmin === argument || (kname.startsWith('dm-') && sameDmName(holder ?? '', argument))
}

function numberOf(path: string): string | undefined {
  try {
    const found = statSync(path)
    return found.isBlockDevice() ? majminOf(found.rdev) : undefined
  } catch (error) {
    errnoOf(error)
    return undefined
  }
}

/** gnu_dev_makedev */
const majminOf = (rdev: number) => `${((rdev >> 8) & 0xfff) >>> 0}:${((rdev & 0xff) | ((rdev >> 12) & 0xfff00)) >>> 0}`

/** A disk, and then its partitions. */
export const flatten = (device: Listed): Listed[] => {
  const { children = [], ...alone } = device
  return [alone, ...children]
}

/** By device number, of filesystems that have one of their own; and swap. */
function readMounts(): Map<string, string[]> {
  const found = new Map<string, string[]>()
  const add = (majmin: string, where: string) => void found.set(majmin, [...(found.get(majmin) ?? []), where])
  for (const line of readFileSync('/proc/self/mountinfo', 'utf8').split('\n')) {
    const [, , majmin, , where] = line.split(' ')
    if (majmin !== undefined && where !== undefined && !majmin.startsWith('0:')) add(majmin, unescapeOctal(where))
  }
  for (const line of readFileSync('/proc/swaps', 'utf8').split('\n').slice(1)) {
    const [path = '', type] = line.split(/\s+/)
    const majmin = type === 'partition' ? numberOf(unescapeOctal(path)) : undefined
    if (majmin !== undefined) add(majmin, '[SWAP]')
  }
  return found
}

/** Disks in order of diskseq, with their partitions. */
export function tree(sysfs: Sysfs, devices: readonly Device[]): Listed[] {
  const partitions = new Map<DiskSeq, Device[]>()
  for (const device of devices) {
    if (device.partition === 0) continue
    const siblings = partitions.get(device.diskseq)
    if (siblings === undefined) partitions.set(device.diskseq, [device])
    else siblings.push(device)
  }
  return devices
    .filter((device) => device.partition === 0)
    .sort((a, b) => (a.diskseq < b.diskseq ? -1 : 1))
    .map((disk) => ({
      ...describe(sysfs, disk),
      children: (partitions.get(disk.diskseq) ?? [])
        .sort((a, b) => a.partition - b.partition)
        .map((partition) => describe(sysfs, partition)),
    }))
}

function describe(sysfs: Sysfs, device: Device): Listed {
  const attribute = (name: string) => sysfs.attribute(device.kname, name)?.replace(/\n$/, '')
  return {
    diskseq: String(device.diskseq),
    name: device.name,
    kname: device.kname.replaceAll('!', '/'),
    majmin: `${device.major}:${device.minor}`,
    size: Number(attribute('size') ?? 0) * SECTOR,
    ro: attribute('ro') === '1',
    type: deviceType(device, attribute('dm/uuid'), attribute('md/level')),
    holder: attribute('dm/name') ?? attribute('loop/backing_file') ?? null,
  }
}

/** As in lsblk: the prefix of a device-mapper UUID names the program that made the device. */
export function deviceType(device: Device, dmUuid: string | undefined, mdLevel: string | undefined): string {
  if (device.partition !== 0) return 'part'
  if (device.kname.startsWith('dm-')) {
    const owner = /^([A-Za-z]+)\d*-/.exec(dmUuid ?? '')?.[1]
    return owner === undefined ? 'dm' : owner.toLowerCase()
  }
  if (device.kname.startsWith('loop')) return 'loop'
  if (device.kname.startsWith('sr')) return 'rom'
  if (mdLevel) return mdLevel
  return 'disk'
}
