// SPDX-License-Identifier: MIT
/** What a case of the tests in virtual machines is. */
import type { Test } from 'tap'

import type { Release, Vm } from './vm.js'

export interface Case {
  /** Its row in the table of results. */
  readonly name: string
  /** The one release that has it in the short form: of what depends little on which one it is; or none, of what is shown in another way as well. */
  readonly shortOn?: Release | 'none'
  /**
   * Runs before the package is installed, on a stock system; what it returns
   * is handed to {@link run}, to compare with.
   */
  readonly before?: (vm: Vm) => Promise<unknown>
  /** Runs with the package installed and its service running; cleans up what it makes, also when it fails. */
  readonly run: (t: Test, vm: Vm, before: unknown) => Promise<void>
}

/** Fewer rounds where many are only there for what is rare: continuous integration has an hour. */
export const SHORT = process.env['SHORT'] === '1'
