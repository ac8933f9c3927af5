/** A daemon with one mechanism switched off, in a machine that has the package. */
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'

import { ROOT } from '../helpers/root.js'
import type { Twin } from '../helpers/tree.js'
import type { Vm } from './vm.js'

const DIRECTORY = '/run/twin'
export const TWIN_MOUNTPOINT = `${DIRECTORY}/mnt`
/** A file with its process id. */
export const TWIN_PID = `${DIRECTORY}/pid`

/** Runs `use` while such a daemon serves {@link TWIN_MOUNTPOINT}. */
export async function withTwin<T>(vm: Vm, twin: Twin, use: () => Promise<T>): Promise<T> {
  // With all that it imports, except the addon.
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
