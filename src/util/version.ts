// SPDX-License-Identifier: MIT
import { readFileSync } from 'node:fs'

/** Of this package. */
export function packageVersion(): string {
  return (version ??= read())
}

let version: string | undefined

/** From the built program in dist/, or from a source file in a folder of src/. */
function read(): string {
  for (const place of ['../package.json', '../../package.json']) {
    try {
      return (JSON.parse(readFileSync(new URL(place, import.meta.url), 'utf8')) as { version: string }).version
    } catch {
      continue
    }
  }
  throw new Error('package.json is missing')
}
