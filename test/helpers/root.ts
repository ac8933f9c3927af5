// SPDX-License-Identifier: MIT
/** The project's own directory, also for what was compiled to somewhere else below it. */
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'

function root(directory: string): string {
  return existsSync(join(directory, 'package.json')) ? directory : root(dirname(directory))
}

export const ROOT = root(import.meta.dirname)
