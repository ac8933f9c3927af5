// SPDX-License-Identifier: MIT
/** What `diskseqfs list` can show of a device, and the formats it shows it in: with the letters and meanings of lsblk(8). */
import { join } from 'node:path'

import { UserError } from '../util/errno.js'
import { DEFAULT_MOUNTPOINT } from '../util/mountpoint.js'
import { aligned, printable, toJson } from '../util/text.js'

/** A device of the list. Sizes are in bytes. */
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

/** What columns need that is not in {@link Listed}, looked up only for them. */
export interface Details {
  /** A file below the device's directory in sysfs. */
  attribute(device: Listed, name: string): string | undefined
  /** Where filesystems on devices with that number are mounted; `[SWAP]` for swap. */
  mountpoints(majmin: string): readonly string[]
  /** Those by which the daemon holds it. */
  leases(device: Listed): readonly string[]
  /** Why the daemon holds it open for programs that were answered. */
  pins(device: Listed): readonly string[]
}

type Value = string | number | boolean | null | readonly string[]

interface Column {
  readonly right?: true
  readonly value: (device: Listed, details: Details) => Value
}

const partitionOf = ({ name }: Listed) => Number(/p(\d+)$/.exec(name)?.[1] ?? 0)

/** By the name that people give; in JSON the letters are small. */
export const COLUMNS: Readonly<Record<string, Column>> = {
  NAME: { value: ({ name }) => name },
  PATH: { value: ({ name }) => join(DEFAULT_MOUNTPOINT, name) },
  KNAME: { value: ({ kname }) => kname },
  'MAJ:MIN': { value: ({ majmin }) => majmin },
  DISKSEQ: { right: true, value: ({ diskseq }) => diskseq },
  PARTN: { right: true, value: (device) => partitionOf(device) || null },
  SIZE: { right: true, value: ({ size }) => size },
  RO: { right: true, value: ({ ro }) => ro },
  TYPE: { value: ({ type }) => type },
  HOLDER: { value: ({ holder }) => holder },
  'DM-NAME': { value: (device, { attribute }) => attribute(device, 'dm/name') ?? null },
  'DM-UUID': { value: (device, { attribute }) => attribute(device, 'dm/uuid') || null },
  'BACK-FILE': { value: (device, { attribute }) => attribute(device, 'loop/backing_file') ?? null },
  MOUNTPOINTS: { value: ({ majmin }, { mountpoints }) => mountpoints(majmin) },
  LEASES: { value: (device, { leases }) => leases(device) },
  PINS: { value: (device, { pins }) => pins(device) },
}

export const DEFAULT_COLUMNS = ['NAME', 'KNAME', 'MAJ:MIN', 'SIZE', 'RO', 'TYPE', 'HOLDER']

/** @param text names separated by commas; after a `+`, in addition to the default */
export function parseColumns(text: string): string[] {
  const names = text.replace(/^\+/, '').split(',').map(parseColumn)
  return text.startsWith('+') ? [...DEFAULT_COLUMNS, ...names] : names
}

export function parseColumn(text: string): string {
  const name = text.toUpperCase()
  if (!(name in COLUMNS)) throw new UserError(`no column is called ${printable(text)}; there are ${Object.keys(COLUMNS).join(', ')}`, 2)
  return name
}

export type Format = 'table' | 'raw' | 'pairs' | 'json'

export interface Showing {
  readonly columns: readonly string[]
  readonly format: Format
  /** Sizes in bytes. */
  readonly bytes: boolean
  readonly headings: boolean
  /** NAME shows paths. */
  readonly paths: boolean
  readonly coloured: boolean
  readonly details: Details
}

/** A row and how deep it stands below its disk. */
interface Row {
  readonly cells: readonly string[]
  readonly depth: number
}

export function show(devices: readonly Listed[], showing: Showing): string {
  if (showing.format === 'json') return toJson({ devices: devices.map((device) => jsonOf(device, showing)) })
  const rows = devices.flatMap((device) => rowsOf(device, 0, showing))
  if (showing.format === 'pairs') return rows.map(({ cells }) => `${pairs(showing.columns, cells)}\n`).join('')
  const all = showing.headings ? [{ cells: showing.columns, depth: 0 }, ...rows] : rows
  if (showing.format === 'raw') return all.map(({ cells }) => `${cells.map(rawCell).join(' ')}\n`).join('')
  return table(all, showing)
}

function rowsOf(device: Listed, depth: number, showing: Showing): Row[] {
  const cells = showing.columns.map((name) => textOf(name, value(name, device, showing), showing))
  return [{ cells, depth }, ...(device.children ?? []).flatMap((child) => rowsOf(child, depth + 1, showing))]
}

function value(name: string, device: Listed, { paths, details }: Showing): Value {
  const column = COLUMNS[name === 'NAME' && paths ? 'PATH' : name] as Column
  return column.value(device, details)
}

function textOf(name: string, value: Value, { bytes, format }: Showing): string {
  if (value === null) return ''
  if (typeof value === 'boolean') return value ? '1' : '0'
  if (typeof value === 'object') return value.join(format === 'table' ? ', ' : '\n')
  return name === 'SIZE' && !bytes ? humanSize(value as number) : String(value)
}

/** All members that there have always been; or, where columns are asked for, those. */
function jsonOf(device: Listed, showing: Showing): unknown {
  const asked = showing.columns !== DEFAULT_COLUMNS
  const { children, ...members } = device
  const shown = asked
    ? Object.fromEntries(showing.columns.map((name) => [name === 'MAJ:MIN' ? 'majmin' : name.toLowerCase(), value(name, device, showing)]))
    : members
  return children === undefined ? shown : { ...shown, children: children.map((child) => jsonOf(child, showing)) }
}

/** As lsblk -P: a shell may read it. */
function pairs(columns: readonly string[], cells: readonly string[]): string {
  return cells.map((cell, i) => `${(columns[i] as string).replace(/[^A-Z]/g, '_')}="${escaped(cell, /["\\$`]/)}"`).join(' ')
}

/** As lsblk -r: blanks separate columns, and an empty one is nothing. */
const rawCell = (cell: string) => escaped(cell, /[ \\]/)

/** Control characters, and those, as \xNN. */
function escaped(text: string, others: RegExp): string {
  const unsafe = new RegExp(`[\\u0000-\\u001f\\u007f-\\u009f]|${others.source}`, 'g')
  return text.replace(unsafe, (character) => [...Buffer.from(character)].map((byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join(''))
}

function table(rows: readonly Row[], { columns, coloured, headings }: Showing): string {
  const cellsOf = ({ cells, depth }: Row) => cells.map((cell, i) => '  '.repeat(columns[i] === 'NAME' ? depth : 0) + printable(cell))
  return aligned(rows.map(cellsOf), (i) => COLUMNS[columns[i] as string]?.right === true)
    .map((line, i) => (coloured && headings && i === 0 ? `\u001b[1m${line}\u001b[0m\n` : `${line}\n`))
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

/** In the order of a column: numbers by their size, all else by its letters. */
export function sorted(devices: readonly Listed[], name: string, showing: Showing): Listed[] {
  const key = (device: Listed) => {
    const found = value(name, device, showing)
    return name === 'DISKSEQ' ? BigInt(found as string) : typeof found === 'object' ? String(found ?? '') : found
  }
  const compare = (a: Listed, b: Listed) => {
    const [x, y] = [key(a), key(b)]
    if (typeof x === 'string' && typeof y === 'string') return x.localeCompare(y, 'en', { numeric: true })
    return x < y ? -1 : x > y ? 1 : 0
  }
  return devices.toSorted(compare)
}
