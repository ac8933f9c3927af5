// SPDX-License-Identifier: MIT
/** `diskseqfs attach`: a file becomes a disk for as long as a program runs. */
import { attachFile } from '../disks/attach.js'
import { type Disk, isDevice, openAt } from '../disks/open.js'
import { EXIT, naming, runWith } from './exec.js'
import type { AttachArguments, FileArguments } from './options.js'
import { UserError } from '../util/errno.js'

/** @returns the exit code */
export async function attach(what: string, command: readonly string[], options: AttachArguments): Promise<number> {
  return runWith([await naming(what, diskOf(what, options))], command, options)
}

/** A device is a disk already. */
async function diskOf(what: string, options: AttachArguments): Promise<Disk> {
  if (!(await isDevice(what))) return attachFile(what, options)
  refuseFileOptions(options, EXIT.FAILED)
  return openAt(what)
}

/** @throws UserError where an option is for files alone */
export function refuseFileOptions({ directIo, partscan, offset, size, sectorSize }: FileArguments, exitCode: number): void {
  if (directIo || partscan || offset !== undefined || size !== undefined || sectorSize !== undefined) {
    throw new UserError('--direct-io, --partscan, --offset, --size and --sector-size are for files, and this is a device', exitCode)
  }
}
