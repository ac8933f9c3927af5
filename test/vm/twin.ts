/** A daemon with one mechanism switched off, in a machine that has the package. */
import { copyFileSync } from 'node:fs'
import { join } from 'node:path'

import { ROOT } from '../helpers/root.js'
import type { Twin } from '../helpers/tree.js'
import type { Vm } from './vm.js'

const DIRECTORY = '/run/twin'
export const TWIN_MOUNTPOINT = `${DIRECTORY}/mnt`

/** Runs `use` while such a daemon serves {@link TWIN_MOUNTPOINT}. */
export async function withTwin<T>(vm: Vm, twin: Twin, use: () => Promise<T>): Promise<T> {
  copyFileSync(join(ROOT, 'test/helpers/twin-daemon.mjs'), join(vm.share, 'twin-daemon.mjs'))
  await vm.run(`
    mkdir -p ${DIRECTORY}/test/helpers ${TWIN_MOUNTPOINT}
    cp /share/twin-daemon.mjs ${DIRECTORY}/test/helpers
    ln -sfn /usr/lib/diskseqfs/dist ${DIRECTORY}/dist
    node ${DIRECTORY}/test/helpers/twin-daemon.mjs ${twin} ${TWIN_MOUNTPOINT} 2>${DIRECTORY}/log &
    echo $! >${DIRECTORY}/pid
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
      kill $(cat ${DIRECTORY}/pid)
      while mountpoint -q ${TWIN_MOUNTPOINT}; do sleep 0.1; done
      rm -rf --one-file-system ${DIRECTORY}`)
  }
}
