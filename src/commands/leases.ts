// SPDX-License-Identifier: MIT
/** Disks that the daemon holds: `diskseqfs attach` without a command, `detach`, `leases`. */
import { writeFileSync } from 'node:fs'

import { lease, type LeaseOptions } from '../broker/lease.js'
import type { LeaseReply } from '../broker/lease-reply.js'
import { DiskError, isDevice } from '../disks/open.js'
import { errnoName, errnoOf, UserError } from '../util/errno.js'
import { aligned, printable, toJson } from '../util/text.js'
import { ask } from './ask.js'
import { refuseFileOptions } from './attach.js'
import type { LeaseArguments, TreeArguments } from './options.js'

const print = (text: string) => void process.stdout.write(text)

/** Makes a file a disk, or holds a disk, and prints its path in the tree. What cannot be printed is not kept, as nobody knows of it. */
export async function lend(what: string, options: LeaseArguments): Promise<void> {
  const { keep, grace, json, share } = options
  const rule = ruleOf({ keep, grace })
  if (await isDevice(what)) {
    refuseFileOptions(options, 2)
    if (share === true) throw new UserError('--share is for files, and this is a device', 2)
  }
  const held = await about(what, lease(what, { ...options, ...rule }))
  held.close()
  try {
    writeFileSync(process.stdout.fd, json === true ? toJson(held.reply) : `${held.path}\n`)
  } catch (error) {
    await ask(options.tree, 'Release', { what: held.reply.lease })
    throw new UserError(`standard output: ${errnoName(errnoOf(error))}; the lease was ended`)
  }
}

/**
 * The rule by which a lease ends, as options say it.
 *
 * @throws UserError where they exclude each other
 */
export function ruleOf({
  keep,
  grace,
}: {
  keep?: boolean | undefined
  grace?: number | undefined
}): Pick<LeaseOptions, 'rule' | 'graceSeconds'> {
  if (keep === true && grace !== undefined) throw new UserError('--keep and --grace exclude each other', 2)
  if (keep === true) return { rule: 'keep' }
  return { rule: 'grace', ...(grace !== undefined && { graceSeconds: Math.ceil(grace) }) }
}

/** Says of an error which argument it is about. */
export async function about<T>(argument: string, work: Promise<T>, exitCode = 1): Promise<T> {
  try {
    return await work
  } catch (error) {
    if (!(error instanceof DiskError)) throw error
    throw new UserError(`${printable(argument)}: ${error.message}`, exitCode)
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
      await ask(tree, 'Release', { what: each }, each)
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
  const found = (await ask(tree, 'ListLeases')) as { leases: LeaseReply[] }
  if (json === true) return print(toJson(found))
  if (found.leases.length === 0) return
  const rows = found.leases.map(({ lease, name, kernelName, rule, graceSeconds, createdUSec, file = '', reason = '' }) => [
    ...[lease, name, kernelName, rule === 'keep' ? rule : `${rule} ${graceSeconds} s`],
    ...[new Date(createdUSec / 1000).toISOString().slice(0, 19), printable(file), printable(reason)],
  ])
  for (const line of aligned([HEADINGS, ...rows])) print(`${line}\n`)
}
