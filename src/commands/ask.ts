// SPDX-License-Identifier: MIT
/** A call of the daemon, by its control socket, and its errors in words. */
import { Client, describe, findControlSocket } from '../broker/client.js'
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
  about = tree,
): Promise<Readonly<Record<string, unknown>>> {
  const client = await Client.connect(findControlSocket(tree))
  try {
    return await client.call(`io.diskseqfs.${method}`, parameters)
  } catch (error) {
    if (!(error instanceof VarlinkError)) throw error
    throw new UserError(`${printable(about)}: ${describe(error)}`)
  } finally {
    client.close()
  }
}
