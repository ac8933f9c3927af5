// SPDX-License-Identifier: MIT
/** Whether this kernel preempts threads inside system calls. */
import { readFileSync } from 'node:fs'
import { release, version } from 'node:os'
import { gunzipSync } from 'node:zlib'

/** Where a kernel tells its preemption mode. */
export interface PreemptionSources {
  /** "none (voluntary) full", of a kernel that can be told at any time (CONFIG_PREEMPT_DYNAMIC; kernel/sched/debug.c). */
  readonly modes: string
  /** The kernel's command line: "preempt=none" (ignored by 7.x, which always preempts). */
  readonly commandLine: string
  /** Copies of the kernel's configuration; the first that exists counts. */
  readonly configs: readonly string[]
  /** As `uname -v` and `uname -r` tell them. */
  readonly version: string
  readonly release: string
}

const SOURCES: PreemptionSources = {
  // Debugfs: not in containers.
  modes: '/sys/kernel/debug/sched/preempt',
  commandLine: '/proc/cmdline',
  configs: ['/proc/config.gz', `/boot/config-${release()}`],
  version: version(),
  release: release(),
}

/** True in doubt. */
export function kernelPreempts({ modes, commandLine, configs, version, release }: PreemptionSources = SOURCES): boolean {
  if (!/\bPREEMPT/.test(version)) return false
  if (/\bPREEMPT_RT\b/.test(version)) return true
  const told = () =>
    version.includes('PREEMPT_DYNAMIC') && Number.parseInt(release, 10) < 7
      ? [...textOf(commandLine).matchAll(/(?<!\S)preempt=(\w+)/g)].at(-1)?.[1]
      : undefined
  const mode = /\((\w+)\)/.exec(textOf(modes))?.[1] ?? told() ?? configured(configs)
  return mode !== 'none' && mode !== 'voluntary'
}

function configured(configs: readonly string[]): string | undefined {
  let config = ''
  for (const path of configs) config ||= textOf(path)
  if (/^CONFIG_PREEMPT_RT=y$/m.test(config)) return 'full'
  return /^CONFIG_PREEMPT_(NONE|VOLUNTARY)=y$/m.exec(config)?.[1]?.toLowerCase()
}

/** Empty if the file cannot be read or unpacked. */
function textOf(path: string): string {
  try {
    const bytes = readFileSync(path)
    return (path.endsWith('.gz') ? gunzipSync(bytes) : bytes).toString('latin1')
  } catch {
    return ''
  }
}
