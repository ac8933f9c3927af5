// SPDX-License-Identifier: MIT
/** `diskseqfs dm`: device-mapper devices, made and changed by what they are. */
import { readFileSync } from 'node:fs'

import { lease, type LeaseOptions } from '../broker/lease.js'
import * as dm from '../disks/dm.js'
import type { Disk } from '../disks/open.js'
import { errnoName, errnoOf, UserError } from '../util/errno.js'
import { printable, toJson } from '../util/text.js'
import { EXIT, runWith } from './exec.js'
import { about, ruleOf } from './leases.js'
import type { DmCreateArguments, DmTableArguments } from './options.js'

const print = (text: string) => void process.stdout.write(text)

/** @returns what `use` does, with the device held open */
async function withDevice<T>(what: string, use: (disk: Disk) => Promise<T>): Promise<T> {
  const disk = await about(what, dm.openDm(what))
  try {
    return await about(what, use(disk))
  } finally {
    await disk.close()
  }
}

/** @param table its text, or `-` for standard input */
function textOf(table: string, exitCode = 1): string {
  if (table !== '-') return table
  try {
    return readFileSync(0, 'utf8')
  } catch (error) {
    throw new UserError(`standard input: ${errnoName(errnoOf(error))}`, exitCode)
  }
}

/**
 * @param command to be run with the device, if any
 * @returns the exit code
 */
export async function create(name: string, table: string, command: readonly string[], options: DmCreateArguments): Promise<number> {
  const runs = command.length > 0
  const failed = runs ? EXIT.FAILED : 1
  const rule = ruleOf(options)
  const disk = await about(name, dm.createDm(name, textOf(table, failed), options), failed)
  if (runs) return runWith([disk], command, options)
  try {
    if (options.untilUnused === true) await lend(name, disk, { ...rule, tree: options.tree })
    print(options.json === true ? toJson(described(name, disk)) : `${disk.path}\n`)
  } finally {
    await disk.close()
  }
  return 0
}

/** Until somebody else has opened the device, the daemon holds it, or it would be gone with this command. */
async function lend(name: string, disk: Disk, options: LeaseOptions): Promise<void> {
  const held = await about(name, lease(`/dev/${disk.kname}`, { ...options, reason: `dm create ${name}` }))
  held.close()
  // It is open here, so its node leads to no other.
  if (held.diskseq !== disk.diskseq) throw new UserError(`${printable(name)}: /dev/${disk.kname} is another device's node`)
}

const described = (name: string, { name: inTree, path, diskseq, kname, majmin }: Disk) => ({
  ...{ name: inTree, path, diskseq: String(diskseq), kernelName: kname, deviceNumber: majmin, dmName: name },
})

export async function remove(what: string, { deferred = false }: { deferred?: boolean }): Promise<void> {
  await withDevice(what, (disk) => dm.removeHeld(disk, { deferred }))
}

export async function suspend(what: string, { flush, lockfs }: { flush: boolean; lockfs: boolean }): Promise<void> {
  await withDevice(what, (disk) => dm.suspendDm(disk, { noFlush: !flush, noLockfs: !lockfs }))
}

export async function resume(what: string): Promise<void> {
  await withDevice(what, dm.resumeDm)
}

export async function reload(what: string, table: string, options: { readOnly?: boolean }): Promise<void> {
  const text = textOf(table)
  await withDevice(what, (disk) => dm.reloadDm(disk, text, options))
}

export async function rename(what: string, name: string): Promise<void> {
  await withDevice(what, (disk) => dm.renameDm(disk, name))
}

export async function message(what: string, sector: bigint, words: readonly string[]): Promise<void> {
  await withDevice(what, (disk) => dm.messageDm(disk, sector, words.join(' ')))
}

export async function status(what: string): Promise<void> {
  const { targets } = await withDevice(what, dm.statusOfDm)
  printTargets(targets)
}

export async function table(what: string, options: DmTableArguments): Promise<void> {
  printTargets(await withDevice(what, (disk) => dm.tableOfDm(disk, options)))
}

function printTargets(targets: Awaited<ReturnType<typeof dm.tableOfDm>>): void {
  for (const { start, length, type, params } of targets) print(printable(`${start} ${length} ${type} ${params}`).trimEnd() + '\n')
}
