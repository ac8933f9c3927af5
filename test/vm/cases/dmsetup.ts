// SPDX-License-Identifier: MIT
/** dmsetup: what it did and how often it failed, on a stock system and with the package, one right after the other. */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

const ROUNDS = SHORT ? 80 : 500
/** Enough to see whether it ever fails. */
const STOCK_ROUNDS = SHORT ? 40 : 100
/** The number of shells that share the rounds: under emulation one would take a quarter of an hour. */
const SHELLS = 4

/** Counts of failures by step and message. */
async function cycle(vm: Vm, rounds: number): Promise<string> {
  return vm.run(
    `
    for ((shell = 0; shell < ${SHELLS}; shell++)); do
      for ((i = 0; i < ${Math.ceil(rounds / SHELLS)}; i++)); do
        for step in "create a$shell --table '0 8 zero'" "reload a$shell --table '0 16 zero'" "rename a$shell b$shell" "remove b$shell"; do
          message=$(eval dmsetup $step 2>&1) || echo "\${step%% *}: $message"
        done
      done &
    done | sed 's/[0-9]//g' | sort | uniq -c
    wait`,
    20 * 60_000,
  )
}

export const dmsetup: Case = {
  name: `dmsetup, ${ROUNDS} times`,
  shortOn: 'none',
  before: (vm) => cycle(vm, STOCK_ROUNDS),
  async run(t: Test, vm: Vm, stock: unknown) {
    const failures = await cycle(vm, ROUNDS)
    note(t, `${ROUNDS} rounds, failures: ${failures.trim() || 'none'}; stock: ${STOCK_ROUNDS} rounds, ${String(stock).trim() || 'none'}`)
    t.equal(failures, '', 'nothing failed')
    t.equal(await vm.run('ls /dev/mapper | grep -c "^[ab][0-9]$" || true'), '0\n', 'no link is left behind')
  },
}
