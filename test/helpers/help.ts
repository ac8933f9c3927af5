// SPDX-License-Identifier: MIT
/** What the program's help says. */
import { CLI, run } from './tree.js'

export const COMMANDS = ['mount', 'unmount', 'list', 'resolve', 'exec', 'attach', 'detach', 'leases', 'status', 'watch', 'wait', 'doctor']

/** The options of a command, with their dashes. An option with two forms is listed by the long one. */
export async function optionsOf(command: string): Promise<string[]> {
  const { stdout } = await run('env', ['--unset=NODE_OPTIONS', process.execPath, CLI, command, '--help'])
  return [...stdout.matchAll(/^ +(?:-\w, )?(--[a-z-]+|-o)\b/gm)].map((match) => match[1] as string)
}
