// SPDX-License-Identifier: MIT
import { readFileSync } from 'node:fs'

/** Of this package. */
export function packageVersion(): string {
  return (version ??= read())
}

let version: string | undefined

/** From the built program in dist/, from src/util/, or from what is built of that. */
function read(): string {
  for (const place of ['../package.json', '../../package.json', '../../../package.json']) {
    try {
      return (JSON.parse(readFileSync(new URL(place, import.meta.url), 'utf8')) as { version: string }).version
    } catch {
      continue
    }
  }
  throw new Error('package.json is missing')
}
