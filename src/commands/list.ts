// SPDX-License-Identifier: MIT
/** `diskseqfs list`: what sysfs has now, for people and for programs. */
import type { DiskSeq } from '../devices/names.js'
import { errnoName, UserError } from '../util/errno.js'
import { native } from '../native.js'
import { type Device, Sysfs } from '../devices/sysfs.js'
import { printable, toJson } from '../util/text.js'

/** A line of the list. Sizes are in bytes. */
export interface Listed {
  readonly diskseq: string
  /** Its name in the tree. */
  readonly name: string
  readonly kname: string
  readonly majmin: string
  readonly size: number
  readonly ro: boolean
  readonly type: string
  /** The device-mapper name or the loop device's backing file: what people know it by. */
  readonly holder: string | null
  readonly children?: readonly Listed[]
}

/** sysfs counts in sectors of 512 bytes, whatever the disk does. */
const SECTOR = 512

export async function list(json: boolean): Promise<void> {
  const sysfs = new Sysfs(native)
  const devices = await scan(sysfs)
  const disks = tree(sysfs, devices)
  if (json) process.stdout.write(toJson({ devices: disks }))
  else process.stdout.write(table(disks))
}

function scan(sysfs: Sysfs): Promise<Device[]> {
  return new Promise((resolve, reject) => {
    sysfs.scan((error, devices) => {
      if (error === 0) resolve(devices)
      else {
        reject(new UserError(`cannot read ${sysfs.classDirectory}: ${errnoName(error)}; is sysfs mounted at /sys?`))
      }
    })
  })
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

function table(disks: readonly Listed[]): string {
  const rows = [['NAME', 'KNAME', 'MAJ:MIN', 'SIZE', 'RO', 'TYPE', 'HOLDER']]
  const add = (device: Listed, indent: string) => {
    rows.push([
      indent + device.name,
      device.kname,
      device.majmin,
      humanSize(device.size),
      device.ro ? '1' : '0',
      device.type,
      printable(device.holder ?? ''),
    ])
    for (const child of device.children ?? []) add(child, '  ')
  }
  for (const disk of disks) add(disk, '')
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)))
  const right = new Set([3, 4])
  return rows
    .map((row) =>
      row
        .map((cell, column) => (right.has(column) ? cell.padStart(widths[column]!) : cell.padEnd(widths[column]!)))
        .join(' ')
        .trimEnd(),
    )
    .map((line) => `${line}\n`)
    .join('')
}

/** Powers of 1024 with at most one decimal, as lsblk prints them: 512B, 1.5G. */
export function humanSize(bytes: number): string {
  const units = ['B', 'K', 'M', 'G', 'T', 'P', 'E']
  let value = bytes
  let unit = 0
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024
    unit++
  }
  return `${Number(value.toFixed(1))}${units[unit]}`
}
