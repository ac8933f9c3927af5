/** dmsetup: what it did and how often it failed, stock and with the package, 500 times in a row. */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../suite.js'
import type { Vm } from '../vm.js'

const ROUNDS = 500

/** Counts of failures by step and message. */
async function cycle(vm: Vm): Promise<string> {
  return vm.run(
    `
    declare -A failed
    for ((i = 0; i < ${ROUNDS}; i++)); do
      for step in "create a --table '0 8 zero'" "reload a --table '0 16 zero'" "suspend a" "resume a" "rename a b" "remove b"; do
        if ! message=$(eval dmsetup $step 2>&1); then
          failed["\${step%% *}: $message"]=$((\${failed["\${step%% *}: $message"]:-0} + 1))
        fi
      done
    done
    for message in "\${!failed[@]}"; do echo "\${failed[$message]} x $message"; done
    `,
    20 * 60_000,
  )
}

export const dmsetup: Case = {
  name: 'dmsetup, 500 times',
  before: cycle,
  async run(t: Test, vm: Vm, stock: unknown) {
    const failures = await cycle(vm)
    note(t, `failures: ${failures.trim() || 'none'}; stock: ${String(stock).trim() || 'none'}`)
    t.equal(failures, '', 'nothing failed')
    t.equal(await vm.run('ls /dev/mapper | grep -c "^[ab]$" || true'), '0\n', 'no link is left behind')
  },
}
