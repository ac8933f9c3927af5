// SPDX-License-Identifier: MIT
/** What a case of the tests in virtual machines is. */
import type { Test } from 'tap'

import type { Release, Vm } from './vm.js'

export interface Case {
  /** Its row in the table of results. */
  readonly name: string
  /** The releases that have the case; by default those that are supported, {@link SUPPORTED}. */
  readonly on?: readonly Release[]
  /**
   * The one release that has the case in the short form, if it depends little on the release; or 'none', if another test shows the same.
   */
  readonly shortOn?: Release | 'none'
  /**
   * Runs before the package is installed, on a stock system. Its result is handed to {@link run},
   * to compare with.
   */
  readonly before?: (vm: Vm) => Promise<unknown>
  /** Runs with the package installed and its service running. It cleans up what it makes, also when it fails. */
  readonly run: (t: Test, vm: Vm, before: unknown) => Promise<void>
}

export const SUPPORTED: readonly Release[] = ['bookworm', 'trixie']

/** Runs fewer rounds if many are needed only for what is rare: continuous integration has an hour. */
export const SHORT = process.env['SHORT'] === '1'
