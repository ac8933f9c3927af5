// SPDX-License-Identifier: MIT
/** What the program's help says. */
import { CLI, run } from './tree.js'

export const COMMANDS = [
  'mount',
  'unmount',
  'list',
  'resolve',
  'exec',
  'attach',
  'detach',
  'leases',
  'status',
  'dm',
  'watch',
  'wait',
  'doctor',
]

/** Those of a command that has some. */
export const DM_COMMANDS = ['create', 'remove', 'suspend', 'resume', 'reload', 'rename', 'message', 'status', 'table']

/** With their words. */
export const ALL_COMMANDS = [...COMMANDS, ...DM_COMMANDS.map((command) => `dm ${command}`)]

/** The options of a command, with their dashes. An option with two forms is listed by the long one. */
export async function optionsOf(command: string): Promise<string[]> {
  const { stdout } = await run('env', ['--unset=NODE_OPTIONS', process.execPath, CLI, ...command.split(' '), '--help'])
  return [...stdout.matchAll(/^ +(?:-\w, )?(--[a-z-]+|-o)\b/gm)].map((match) => match[1] as string)
}
