// SPDX-License-Identifier: MIT
/** `diskseqfs resolve`: which path in the tree something has now. */
import { resolve as find } from '../disks/open.js'
import { UserError } from '../util/errno.js'
import { printable, toJson } from '../util/text.js'

interface Resolved {
  readonly argument: string
  readonly path?: string
  readonly diskseq?: string
  readonly partition?: number
  readonly majmin?: string
  readonly kname?: string
  readonly error?: string
}

/** @returns the exit code: 1 where one of the arguments could not be resolved */
export async function resolve(devices: readonly string[], json: boolean): Promise<number> {
  const results: Resolved[] = []
  for (const device of devices) results.push(await resolveOne(device))
  if (json) {
    process.stdout.write(toJson({ devices: results }))
  } else {
    for (const { argument, path, error } of results) {
      if (path !== undefined) process.stdout.write(`${path}\n`)
      else process.stderr.write(`diskseqfs: ${printable(argument)}: ${error}\n`)
    }
  }
  return results.some((result) => result.error !== undefined) ? 1 : 0
}

async function resolveOne(argument: string): Promise<Resolved> {
  try {
    const { path, diskseq, partition, majmin, kname } = await find(argument)
    return { argument, path, diskseq: String(diskseq), partition, majmin, kname }
  } catch (error) {
    if (error instanceof UserError) return { argument, error: error.message }
    throw error
  }
}
