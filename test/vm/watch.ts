// SPDX-License-Identifier: MIT
/** Watches names of devices, mounts, swap and units while the service is stopped, started or the like. */
import type { Vm } from './vm.js'

/** What is done to the service, and the shell commands for it. */
export interface Deed {
  readonly what: string
  readonly script: string
}

export interface Watched {
  readonly what: string
  /** How often each name was looked at. */
  readonly looks: number
  /** How long it took, in s, without what udev and the service manager do afterwards. */
  readonly seconds: number
  /** How long names led nowhere, in ms, for the names that did. */
  readonly gaps: readonly { readonly name: string; readonly ms: number }[]
  /** Anything else that changed: mounts, swap areas, units; and names that lead nowhere in the end. */
  readonly troubles: readonly string[]
}

/**
 * @param names - the shell's pattern for the names
 * @param units - units that must be as active afterwards as before
 */
export async function watched(vm: Vm, deeds: readonly Deed[], names: string, units: string): Promise<Watched[]> {
  const output = await vm.run(
    `set +e
    cd $(mktemp -d)
    for name in ${names}; do [ ! -b $name ] || names+=($name); done
    # A process for each pause would take longer than the pause.
    mkfifo never
    exec {never}<>never
    sample() {
      local samples=0 name began
      declare -A since
      until [ -e enough ]; do
        for name in "\${names[@]}"; do
          began=\${since[$name]:-}
          if [ ! -b $name ]; then
            since[$name]=\${began:-\${EPOCHREALTIME/./}}
          elif [ "$began" ]; then
            echo "gap $name $(((\${EPOCHREALTIME/./} - began) / 1000))"
            since[$name]=
          fi
        done
        samples=$((samples + 1))
        read -rt 0.02 -u $never
      done
      for name in "\${!since[@]}"; do [ -z "\${since[$name]}" ] || echo "$name leads nowhere"; done
      echo "looks $samples"
    }
    state() {
      grep ^/dev/ /proc/mounts
      echo "$(($(wc -l </proc/swaps) - 1)) swap areas"
      systemctl is-active ${units}
      systemctl --failed --no-legend --plain
    }
    # The service manager has its time as well.
    watch() {
      rm -f enough
      sample &
      began=\${EPOCHREALTIME/./}
      "$1" 2>&1
      echo "took $(((\${EPOCHREALTIME/./} - began) / 1000))"
      udevadm settle --timeout=300
      sleep 1
      touch enough
      wait $!
      diff before <(state)
    }
    state >before
    ${deeds.map(({ what, script }) => `deed() { ${script}\n}; echo 'deed ${what}'; watch deed`).join('\n')}`,
    deeds.length * 300_000,
  )
  return output
    .trimEnd()
    .split(/^deed /m)
    .slice(1)
    .map((text) => {
      const [what, ...lines] = text.trimEnd().split('\n') as [string, ...string[]]
      const number = (key: string) => Number(lines.find((line) => line.startsWith(`${key} `))?.split(' ')[1])
      const gaps = lines.filter((line) => line.startsWith('gap ')).map((line) => line.split(' ') as [string, string, string])
      return {
        what,
        looks: number('looks'),
        seconds: number('took') / 1000,
        gaps: gaps.map(([, name, ms]) => ({ name, ms: Number(ms) })),
        troubles: lines.filter((line) => !/^(looks|took|gap) /.test(line)),
      }
    })
}

/** The result in a few words, with the longest gap. */
export function inWords({ what, looks, seconds, gaps, troubles }: Watched): string {
  const longest = Math.max(0, ...gaps.map(({ ms }) => ms))
  const gap =
    gaps.length === 0 ? 'no name led nowhere' : `${new Set(gaps.map(({ name }) => name)).size} names led nowhere, for ${longest} ms at most`
  return `${what} (${seconds.toFixed(1)} s, looked at ${looks} times): ${[gap, ...troubles].join('; ')}`
}
