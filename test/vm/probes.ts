// SPDX-License-Identifier: MIT
/**
 * Commands that an administrator types, run on a system before the package is installed and after.
 * Their output is compared line by line.
 */
import type { Test } from 'tap'

import { note } from './findings.js'
import type { Release, Vm } from './vm.js'

export interface Probe {
  readonly what: string
  /**
   * `try 'COMMAND'` prints what a command prints, see {@link TRY}. The script undoes its changes, also when something fails.
   */
  readonly script: string
  /** Why the answers are known to differ. They must differ, so that this is removed once they do not. */
  readonly limit?: string
  /** The difference is on that release only. */
  readonly limitOn?: Release
  /** The difference comes and goes, as it depends on what happens first. */
  readonly limitMayBe?: true
}

/** For the slowest probe, including what emulation adds. */
const PROBE_S = 120

/**
 * Prints each line that a command prints, after the command, so that it can be told from others; and the command's status if
 * that is not 0.
 */
export const TRY = `
  export LC_ALL=C
  try() {
    local output line
    output=$(eval "$1" 2>&1 </dev/null) || output+="\${output:+ }(status $?)"
    while IFS= read -r line; do echo "$1: $line"; done <<<"$output"
  }
`

/** Numbers and identifiers that differ each time. */
const MOVING: readonly [RegExp, string][] = [
  [/\bdm-\d+/g, 'dm-N'],
  [/\bdm\\x2d\d+/g, 'dm\\x2dN'],
  [/by-diskseq\/(\.dm\/)?\d+/g, 'by-diskseq/$1N'],
  [/by\\x2ddiskseq-(\.dm-)?\d+/g, 'by\\x2ddiskseq-$1N'],
  [/\((\d+)(:|, ?)\d+\)/g, '($1:N)'],
  [/\b(linear) \d+:\d+/g, '$1 N:N'],
  [/\b(fd|pipe_ino)=\d+/g, '$1=N'],
  [/LVM-[a-zA-Z0-9]{64}/g, 'LVM-ID'],
  [/ +$/gm, ''],
]

async function ask(vm: Vm, directory: string, { script }: Probe): Promise<string> {
  // A process of its own, with a time limit: if one probe hangs, the others still run.
  const { output } = await vm.attempt(`
cat >${directory}/probe <<'PROBE'
. ${directory}/prelude
${script}
PROBE
timeout --kill-after=10 ${PROBE_S} bash ${directory}/probe
case $? in 124 | 137) echo 'not done after ${PROBE_S} s' ;; esac`)
  return MOVING.reduce((text, [pattern, fixed]) => text.replace(pattern, fixed), output.trimEnd())
}

export interface Answers {
  /** The output by probe. */
  readonly printed: ReadonlyMap<string, string>
  readonly seconds: number
}

/** Runs all probes, each in a shell that begins with the file `prelude` in the directory. */
export async function askAll(vm: Vm, directory: string, probes: readonly Probe[]): Promise<Answers> {
  const started = Date.now()
  const printed = new Map<string, string>()
  for (const probe of probes) printed.set(probe.what, await ask(vm, directory, probe))
  return { printed, seconds: Math.round((Date.now() - started) / 1000) }
}

function firstDifference(ours: string, stock: string): string {
  const [is, was] = [ours.split('\n'), stock.split('\n')]
  let i = 0
  while (is[i] === was[i]) i++
  return `${is[i] ?? 'nothing'} (stock: ${was[i] ?? 'nothing'})`
}

function compare(t: Test, { what, limit: known, limitOn, limitMayBe }: Probe, release: Release, ours: string, stock: string): void {
  const limit = limitOn === undefined || limitOn === release ? known : undefined
  if (ours !== stock) {
    note(t, `${what}: ${limit === undefined ? 'DIFFERENT' : `limit: ${limit}`}: ${firstDifference(ours, stock)}`)
  } else {
    // If both fail in the same way, they are the same, but show little.
    const failed = stock.match(/^.*\(status \d+\)$/gm) ?? []
    note(t, `${what}: same${failed.length > 0 ? `; fails on both: ${failed.join('; ')}` : ''}`)
  }
  if (limit === undefined) t.equal(ours, stock, what)
  else if (!limitMayBe) t.not(ours, stock, `${what}: a limit; if it is none any more, remove it`)
}

export function compareAll(t: Test, vm: Vm, probes: readonly Probe[], ours: Answers, stock: Answers): void {
  for (const probe of probes) compare(t, probe, vm.release, ours.printed.get(probe.what) ?? '', stock.printed.get(probe.what) ?? '')
  note(t, `${probes.length} probes in ${ours.seconds} s, stock: ${stock.seconds} s`)
}
