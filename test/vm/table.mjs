// SPDX-License-Identifier: MIT
// Prints what the last runs of the cases in virtual machines found: case x release.
import { readFileSync } from 'node:fs'

const results = new Map()
for (const release of ['bookworm', 'trixie', 'forky']) {
  try {
    results.set(release, JSON.parse(readFileSync(new URL(`../../build/vm/${release}.json`, import.meta.url), 'utf8')))
  } catch (error) {
    if (error.code !== 'ENOENT') throw error
  }
}
const names = [...new Set([...results.values()].flatMap((rows) => rows.map(({ name }) => name)))]
const releases = [...results.keys()]
const width = Math.max(4, ...names.map((name) => name.length))
const line = (name, cells) => console.log([name.padEnd(width), ...cells.map((cell) => cell.padEnd(14))].join('  ').trimEnd())
line('case', releases)
for (const name of names) {
  const rows = releases.map((release) => results.get(release)?.find((row) => row.name === name))
  line(
    name,
    rows.map((row) => (row === undefined ? '-' : `${row.ok ? 'ok' : 'FAILED'} (${row.seconds} s)`)),
  )
  for (const [i, row] of rows.entries()) for (const note of row?.notes ?? []) console.log(`    ${releases[i]}: ${note}`)
}
