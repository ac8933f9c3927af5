// SPDX-License-Identifier: MIT
/**
 * The cases of one release, in one machine: first the parts that need a stock system, then the
 * package is installed and all cases run with it.
 *
 * Environment: CASES=name,name runs only cases whose names contain one of these; SHORT=1, see
 * case.ts.
 */
import { copyFileSync, mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { blkPath } from '../helpers/blk.js'
import { type Case, SHORT, SUPPORTED } from './case.js'
import { hotplugDevices } from './cases/hotplug.js'
import { cases } from './cases.js'
import { taken } from './findings.js'
import { links, LEFT_ALONE } from './links.js'
import { LOGS, packagePath, type Release, Vm } from './vm.js'

export interface Row {
  readonly name: string
  readonly ok: boolean
  readonly seconds: number
  /** What the case printed as its findings, in a few words. */
  readonly notes: readonly string[]
}

const TIMEOUT_MS = 50 * 60_000

/** Rows of the release being tested. */
const rows: Row[] = []

export async function runSuite(release: Release): Promise<void> {
  t.setTimeout(SHORT ? TIMEOUT_MS : 6 * TIMEOUT_MS)
  const filter = process.env['CASES']?.split(',')
  const here = ({ shortOn }: Case) => !SHORT || shortOn === undefined || shortOn === release
  const wanted = cases
    .filter(({ on = SUPPORTED }) => on.includes(release))
    .filter((item) => filter?.some((part) => item.name.includes(part)) ?? here(item))
  const create = async () => {
    const vm = await Vm.create(release, hotplugDevices)
    t.teardown(() => vm.destroy())
    copyFileSync(blkPath(), join(vm.share, 'blk'))
    copyFileSync(packagePath(), join(vm.share, 'diskseqfs.deb'))
    await vm.boot()
    return vm
  }
  let vm = await create()

  const before = new Map<Case, unknown>()
  for (const item of wanted) {
    const started = Date.now()
    // An error here fails the test of this case, not those of the others.
    const ask = () => item.before?.(vm).catch((error: unknown) => new Failed(error))
    before.set(item, await ask())
    if (vm.panicked) {
      t.comment(`${item.name}: the stock system's kernel panicked (${vm.consoleOf('panic')}); once more, on another machine`)
      vm = await create()
      before.set(item, await ask())
    }
    if (item.before !== undefined) t.comment(`${item.name}: the stock system, ${secondsSince(started)} s`)
  }
  await t.test('install', (t) => attempt(t, vm, { name: 'install', run: install }, undefined))
  for (const item of wanted) {
    await t.test(item.name, { timeout: TIMEOUT_MS }, async (t) => {
      try {
        await attempt(t, vm, item, before.get(item))
      } catch (error) {
        // Under emulation a panic happens now and then. It is not blamed on any other case, and on
        // this one only the second time.
        if (!vm.panicked) throw error
        t.comment(`the machine's kernel panicked (${vm.consoleOf('panic')}); once more, on another machine`)
        rows.pop()
        vm = await create()
        await install(t, vm)
        await attempt(t, vm, item, before.get(item))
      }
    })
  }
  mkdirSync(LOGS, { recursive: true })
  writeFileSync(join(LOGS, `../${release}.json`), JSON.stringify(rows, null, 2))
}

const secondsSince = (started: number): number => Math.round((Date.now() - started) / 1000)

class Failed {
  constructor(readonly error: unknown) {}
}

async function attempt(t: Test, vm: Vm, item: Case, before: unknown): Promise<void> {
  const started = Date.now()
  taken()
  let thrown: unknown
  try {
    if (before instanceof Failed) throw before.error
    await item.run(t, vm, before)
  } catch (error) {
    thrown = error
  }
  const ok = thrown === undefined && t.passing()
  rows.push({ name: item.name, ok, seconds: secondsSince(started), notes: taken() })
  if (!ok) t.comment(`logs: ${await vm.saveLogs(item.name)}`)
  if (thrown !== undefined) throw thrown
}

async function install(t: Test, vm: Vm): Promise<void> {
  await vm.run('dpkg -i /share/diskseqfs.deb && udevadm settle')
  // udev 262 lets no rule set DISKSEQ, so names there are as on the stock system.
  if (!SUPPORTED.includes(vm.release)) return
  const { tree, stock, left, wrong } = await links(vm)
  t.ok(tree.length > 5, `${tree.length} links into the tree`)
  t.strictSame({ stock, left, wrong }, { stock: [], left: LEFT_ALONE, wrong: [] }, 'and no others, except for devices that are left alone')
}
