// SPDX-License-Identifier: MIT
/** The project's own directory, also for code that was compiled to another place below it. */
import { existsSync, readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'

function root(directory: string): string {
  return existsSync(join(directory, 'package.json')) ? directory : root(dirname(directory))
}

export const ROOT = root(import.meta.dirname)

/** The C sources in a directory, which make up one program. */
export const sourcesIn = (directory: string): string[] =>
  readdirSync(directory)
    .filter((name) => name.endsWith('.c'))
    .map((name) => join(directory, name))
