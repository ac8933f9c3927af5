// SPDX-License-Identifier: MIT
/** A call of the daemon, by its control socket, and its errors in words. */
import { Client, findControlSocket } from '../broker/client.js'
import { VarlinkError } from '../broker/varlink.js'
import { UserError } from '../util/errno.js'
import { printable } from '../util/text.js'

/**
 * @param tree where it is mounted
 * @param about what an error is about
 * @throws UserError
 */
export async function ask(
  tree: string,
  method: string,
  parameters: Readonly<Record<string, unknown>> = {},
  fds: readonly number[] = [],
  about = tree,
): Promise<Readonly<Record<string, unknown>>> {
  const client = await Client.connect(findControlSocket(tree))
  try {
    return await client.call(`io.diskseqfs.${method}`, parameters, fds)
  } catch (error) {
    if (!(error instanceof VarlinkError)) throw error
    throw new UserError(`${printable(about)}: ${describe(error)}`)
  } finally {
    client.close()
  }
}

function describe({ error, parameters }: VarlinkError): string {
  switch (error.slice(error.lastIndexOf('.') + 1)) {
    case 'CannotAttach':
      return String(parameters['message'])
    case 'NoSuchLease':
      return 'there is no such lease, and no lease of a disk of that name (diskseqfs leases shows all)'
    case 'TooManyLeases':
      return `the daemon holds ${String(parameters['limit'])} disks already; release some (diskseqfs leases, detach)`
    case 'TooManyConnections':
      return `${String(parameters['limit'])} clients are connected already`
    case 'InvalidParameter':
      return `${String(parameters['parameter'])} is not possible there`
    default:
      return error
  }
}
