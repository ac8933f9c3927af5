// SPDX-License-Identifier: MIT
/** Disks that the daemon holds: `diskseqfs attach` without a command, `detach`, `leases`. */
import { resolve } from 'node:path'

import { openBacking } from '../disks/attach.js'
import { open } from '../disks/open.js'
import { native } from '../native.js'
import { UserError } from '../util/errno.js'
import { aligned, printable, toJson } from '../util/text.js'
import { ask } from './ask.js'
import { isDevice, refuseFileOptions } from './attach.js'
import type { LeaseArguments, TreeArguments } from './options.js'

/** As in the interface file. */
interface Lease {
  readonly lease: string
  readonly name: string
  readonly path: string
  readonly kernelName: string
  readonly rule: 'grace' | 'keep' | 'connection'
  readonly graceSeconds?: number
  readonly createdUSec: number
  readonly file?: string
  readonly reason?: string
}

const print = (text: string) => void process.stdout.write(text)

/** Makes a file a disk, or holds a disk, and prints its path in the tree. */
export async function lend(what: string, options: LeaseArguments): Promise<void> {
  const { keep, grace, json, reason, share } = options
  if (keep === true && grace !== undefined) throw new UserError('--keep and --grace exclude each other', 2)
  const device = await isDevice(what)
  if (device) {
    refuseFileOptions(options, 2)
    if (share === true) throw new UserError('--share is for files, and this is a device', 2)
  }
  const fd = device ? (await open(what.includes('/') ? what : `./${what}`)).fd : await opened(what, options)
  const { readOnly, directIo, partscan, offset, size, sectorSize } = options
  const parameters = {
    fileDescriptor: 0,
    ...(readOnly && !device && { readOnly }),
    ...(directIo && { directIo }),
    ...(partscan && { partscan }),
    ...(offset !== undefined && { offset: Number(offset) }),
    ...(size !== undefined && { size: Number(size) }),
    ...(sectorSize !== undefined && { sectorSize }),
    ...(share && { share }),
    ...{ rule: keep === true ? 'keep' : 'grace', file: resolve(what) },
    ...(grace !== undefined && { graceSeconds: Math.ceil(grace) }),
    ...(reason !== undefined && { reason }),
  }
  const { lease } = (await ask(options.tree, 'Attach', parameters, [fd], what)) as { lease: Lease }
  native.closeDevice(fd, () => {})
  print(json === true ? toJson(lease) : `${lease.path}\n`)
}

async function opened(file: string, options: LeaseArguments): Promise<number> {
  try {
    return await openBacking(file, options)
  } catch (error) {
    if (!(error instanceof UserError)) throw error
    throw new UserError(`${printable(file)}: ${error.message}`)
  }
}

/**
 * Ends leases, by themselves or by the names of their disks.
 *
 * @returns the exit code: 1 where there is none
 */
export async function detach(what: readonly string[], { tree }: TreeArguments): Promise<number> {
  let code = 0
  for (const each of what) {
    try {
      await ask(tree, 'Release', { what: each }, [], each)
    } catch (error) {
      if (!(error instanceof UserError)) throw error
      process.stderr.write(`diskseqfs: ${error.message}\n`)
      code = 1
    }
  }
  return code
}

const HEADINGS = ['LEASE', 'NAME', 'KNAME', 'RULE', 'SINCE', 'FILE', 'REASON']

export async function leases({ tree, json }: TreeArguments): Promise<void> {
  const found = (await ask(tree, 'ListLeases')) as { leases: Lease[] }
  if (json === true) return print(toJson(found))
  if (found.leases.length === 0) return
  const rows = found.leases.map(({ lease, name, kernelName, rule, graceSeconds, createdUSec, file = '', reason = '' }) => [
    ...[lease, name, kernelName, rule === 'keep' ? rule : `${rule} ${graceSeconds} s`],
    ...[new Date(createdUSec / 1000).toISOString().slice(0, 19), printable(file), printable(reason)],
  ])
  for (const line of aligned([HEADINGS, ...rows])) print(`${line}\n`)
}
