// SPDX-License-Identifier: MIT
/** A daemon, or a program that udev runs, with one mechanism switched off, in a machine that has the package. */
import { execFileSync } from 'node:child_process'
import { copyFileSync } from 'node:fs'
import { join } from 'node:path'

import type { Test } from 'tap'

import { type Change, twinLink } from '../helpers/guard.js'
import { ROOT } from '../helpers/root.js'
import type { Twin } from '../helpers/tree.js'
import type { Vm } from './vm.js'

const DIRECTORY = '/run/twin'
export const TWIN_MOUNTPOINT = `${DIRECTORY}/mnt`
/** A file with its process id. */
export const TWIN_PID = `${DIRECTORY}/pid`

/** Runs `use` while such a daemon serves {@link TWIN_MOUNTPOINT}. */
export async function withTwin<T>(vm: Vm, twin: Twin, use: () => Promise<T>): Promise<T> {
  // Bundled with all its imports, except the addon.
  execFileSync(join(ROOT, 'node_modules/.bin/esbuild'), [
    join(ROOT, 'test/helpers/twin-daemon.mjs'),
    ...['--bundle', '--platform=node', '--target=node20', '--format=esm', '--external:fuse-native', '--log-level=warning'],
    '--banner:js=import { createRequire as requireFrom } from "node:module"; const require = requireFrom(import.meta.url)',
    `--outfile=${join(vm.share, 'twin-daemon.mjs')}`,
  ])
  await vm.run(`
    mkdir -p ${DIRECTORY}/dist ${TWIN_MOUNTPOINT}
    cp /share/twin-daemon.mjs ${DIRECTORY}/dist
    ln -sfn /usr/lib/diskseqfs/native ${DIRECTORY}/native
    node ${DIRECTORY}/dist/twin-daemon.mjs ${twin} ${TWIN_MOUNTPOINT} 2>${DIRECTORY}/log &
    echo $! >${TWIN_PID}
    for ((i = 0; i < 300; i++)); do
      mountpoint -q ${TWIN_MOUNTPOINT} && exit
      sleep 0.1
    done
    cat ${DIRECTORY}/log
    exit 1`)
  try {
    return await use()
  } finally {
    await vm.attempt(`
      kill $(cat ${TWIN_PID})
      while mountpoint -q ${TWIN_MOUNTPOINT}; do sleep 0.1; done
      rm -rf --one-file-system ${DIRECTORY}`)
  }
}

const INSTALLED = '/usr/lib/udev/diskseqfs-link'

/** Runs `use` while udev runs a program with these changes in place of the installed one. */
export async function withLink<T>(t: Test, vm: Vm, changes: readonly Change[], use: () => Promise<T>): Promise<T> {
  copyFileSync(twinLink(t, ...changes), join(vm.share, 'diskseqfs-link'))
  await vm.run(`cp -p ${INSTALLED} ${INSTALLED}.aside; install -m 755 /share/diskseqfs-link ${INSTALLED}`)
  try {
    return await use()
  } finally {
    await vm.run(
      `udevadm settle --timeout=300; mv ${INSTALLED}.aside ${INSTALLED}; udevadm trigger --subsystem-match=block; udevadm settle --timeout=300`,
      600_000,
    )
  }
}
