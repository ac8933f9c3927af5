// SPDX-License-Identifier: MIT
/** Opens a healthy disk again and again, to show what trouble with other disks costs its users. */
import type { Vm } from './vm.js'

/** The service's --open-timeout. */
export const OPEN_TIMEOUT_S = 10
/** The extra time that emulation takes. */
export const SLACK_S = 20

/**
 * Starts opening the disk in the background.
 *
 * @returns a function that stops it and resolves to what `blk openlat` reports
 */
export function opener(vm: Vm): () => Promise<Record<string, any>> {
  const running = vm.start(`
    /share/blk openlat --path /dev/mapper/vm-srv --count 100000000 --pause-ms 5 --close-immediately &
    until [ -e /run/enough ]; do sleep 0.2; done
    kill -TERM $!
    wait $! || true
    rm /run/enough`)
  return async () => {
    await vm.run('touch /run/enough')
    return JSON.parse((await running.ended()).output)
  }
}
