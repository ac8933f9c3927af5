// SPDX-License-Identifier: MIT
/** cryptsetup: a volume's whole life by path, and closing it right after it was opened, many times. */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

const ROUNDS = SHORT ? 10 : 100
/** Enough to see whether it is ever busy. */
const STOCK_ROUNDS = SHORT ? 4 : 20

// A key derivation that emulation can do.
const FAST = '--pbkdf pbkdf2 --pbkdf-force-iterations 1000'

/** The results in which stock and the package must agree, and how long it took. */
interface Life {
  /** One line for each step, and the whole output of `cryptsetup status` and `dmsetup deps`. */
  readonly steps: string
  /** Failures of the rounds, by message, with their counts. */
  readonly failures: string
  /** How often cryptsetup had to try again to close, which hides EBUSY for some seconds. */
  readonly busy: number
  readonly seconds: number
}

/**
 * Two volumes, on a logical volume and on a loop device. `$lv` and `$loop` are their paths;
 * `leads_right NAME` fails if a name leads elsewhere.
 */
function machine(by: 'name' | 'diskseq', withTree: boolean, script: string): string {
  return `
    cd /tmp
    close_all() { for name in opened looped; do dmsetup remove -f --retry $name; done; losetup -D; lvremove -qqy vm/crypt; rm -f key image; }
    trap 'close_all >/dev/null 2>&1' EXIT
    lvcreate -qqy -L 24M -n crypt vm
    truncate -s 24M image
    lv=/dev/mapper/vm-crypt loop=$(losetup -f --show image)
    if [ ${by} = diskseq ]; then
      lv=/dev/disk/by-diskseq/$(cat /sys/class/block/dm-$(dmsetup info -c --noheadings -o minor vm-crypt)/diskseq)
      loop=/dev/disk/by-diskseq/$(cat /sys/class/block/\${loop#/dev/}/diskseq)
    fi
    head -c 32 /dev/urandom >key
    leads_right() {
      local dm=dm-$(dmsetup info -c --noheadings -o minor $1) wanted
      if ${withTree}; then wanted=/dev/disk/by-diskseq/.dm/$(cat /sys/class/block/$dm/diskseq)/$dm; else wanted=../$dm; fi
      [ "$(readlink /dev/mapper/$1)" = $wanted ] || { echo "$1 leads to $(readlink /dev/mapper/$1), not $wanted"; return 1; }
    }
    ${script}
  `
}

/** All steps for one volume. A failed step says so, and the others follow. */
const LIFE = `
  step() {
    local message
    if message=$("\${@:2}" 2>&1); then echo "$1: done \${message:+, $message}"; else echo "$1: FAILED: $message"; fi
  }
  # udev looks at what somebody has written to, some time after the close, and has it open then.
  quiet() { sleep 0.5; udevadm settle; }
  life() {
    local path=$1 name=$2 what=$3
    step "$what: luksFormat" cryptsetup luksFormat -q ${FAST} $path key
    step "$what: isLuks" cryptsetup isLuks $path
    step "$what: open" cryptsetup open --key-file key $path $name
    step "$what: link" leads_right $name
    cryptsetup status $name
    step "$what: use" dd if=/dev/urandom of=/dev/mapper/$name bs=64k count=16 status=none oflag=direct
    quiet
    local sum=$(head -c 1M /dev/mapper/$name | md5sum)
    step "$what: shrink" cryptsetup resize --key-file key --device-size 4M $name
    cryptsetup status $name | grep '^ *size:'
    step "$what: grow" cryptsetup resize --key-file key $name
    cryptsetup status $name | grep '^ *size:'
    step "$what: link" leads_right $name
    quiet
    step "$what: status by path" cryptsetup status /dev/mapper/$name
    # By path while it is open: cryptsetup has to find out by itself that it is.
    step "$what: reencrypt, open" cryptsetup reencrypt -q --key-file key ${FAST} $path
    step "$what: link" leads_right $name
    step "$what: data" [ "$(head -c 1M /dev/mapper/$name | md5sum)" = "$sum" ]
    quiet
    dmsetup deps -o devname $name | sed 's/loop[0-9]*/loopN/'
    step "$what: close" cryptsetup close /dev/mapper/$name
    step "$what: link is gone" [ ! -L /dev/mapper/$name ]
    step "$what: reencrypt, closed" cryptsetup reencrypt -q --key-file key ${FAST} $path
    step "$what: open" cryptsetup open --key-file key $path $name
    step "$what: data" [ "$(head -c 1M /dev/mapper/$name | md5sum)" = "$sum" ]
    step "$what: close" cryptsetup close $name
  }
  { life $lv opened LV; life $loop looped loop; } | sed -E 's#/dev/loop[0-9]+#/dev/loopN#'
`

const CYCLE = `
  declare -A failed
  count() { failed["$1"]=$((\${failed["$1"]:-0} + 1)); }
  cryptsetup luksFormat -q ${FAST} $lv key
  busy=0 start=$SECONDS
  for ((i = 0; i < rounds; i++)); do
    message=$(cryptsetup open --key-file key $lv opened 2>&1) || count "open: $message"
    # Every other time something has used it through its name, and it is closed by path.
    name=opened
    if ((i % 2)); then
      name=/dev/mapper/opened
      message=$(leads_right opened 2>&1) || count "link: $message"
      message=$(dd if=/dev/mapper/opened of=/dev/null bs=4k count=1 status=none 2>&1) || count "read: $message"
    fi
    message=$(cryptsetup --debug close $name 2>&1) || count "close: $message"
    busy=$((busy + $(grep -ci 'busy' <<<"$message")))
    if [ -L /dev/mapper/opened ]; then count 'link left behind'; fi
  done
  echo "$busy $((SECONDS - start))"
  for message in "\${!failed[@]}"; do echo "\${failed[$message]} x $message"; done
`

async function live(vm: Vm, by: 'name' | 'diskseq', withTree: boolean, rounds: number): Promise<Life> {
  const steps = await vm.run(machine(by, withTree, `set +e\n${LIFE}`), 10 * 60_000)
  const output = await vm.run(machine(by, withTree, `set +e\nrounds=${rounds}\n${CYCLE}`), 20 * 60_000)
  const [figures, ...failures] = output.trimEnd().split('\n') as [string, ...string[]]
  const [busy, seconds] = figures.split(' ').map(Number) as [number, number]
  return { steps, failures: failures.join('\n'), busy, seconds }
}

export const cryptsetup: Case = {
  name: 'cryptsetup',
  shortOn: 'trixie',
  before: (vm) => live(vm, 'name', false, STOCK_ROUNDS),
  async run(t: Test, vm: Vm, before: unknown) {
    const stock = before as Life
    t.notMatch(stock.steps, /FAILED/, 'stock: every step works')
    for (const by of ['name', 'diskseq'] as const) {
      const rounds = by === 'name' ? ROUNDS : Math.ceil(ROUNDS / 5)
      const ours = await live(vm, by, true, rounds)
      t.equal(ours.steps, stock.steps, `by ${by}: every step works, and cryptsetup prints the same as on a stock system`)
      t.equal(ours.failures, '', `by ${by}: closed straight after it was opened, ${rounds} times`)
      t.ok(ours.busy <= stock.busy, `by ${by}: EBUSY not more often than on a stock system`, { ours: ours.busy, stock: stock.busy })
      note(
        t,
        `by ${by}: open and close ${rounds} times in ${ours.seconds} s, ${ours.busy} times busy, failures: ${ours.failures || 'none'}` +
          `; stock: ${STOCK_ROUNDS} times in ${stock.seconds} s, ${stock.busy} times busy, failures: ${stock.failures || 'none'}`,
      )
    }
  },
}
