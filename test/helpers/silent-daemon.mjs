// SPDX-License-Identifier: MIT
/**
 * A daemon that mounts, and answers nothing. It prints what the guard says to it.
 *
 *   diskseqfs-guard ... node silent-daemon.mjs MOUNTPOINT
 */
import { constants, openSync } from 'node:fs'

import { mountData, mountsAt, parseMountOptions } from '../../build/src/util/mountpoint.js'
import { native } from '../../build/src/native.js'
import { SharedState, STATE_SIZE } from '../../build/src/handover/shared-state.js'

const mountpoint = process.argv[2]
const guard = Number(process.env['DISKSEQFS_GUARD'])
const fuse = openSync('/dev/fuse', constants.O_RDWR | constants.O_NONBLOCK)
const options = parseMountOptions('', [])
if (native.mount('test', mountpoint, 'fuse.test', options.flags, mountData(fuse, options)) < 0) throw new Error('cannot mount')
const stateFd = native.sharedMemory(STATE_SIZE)
new SharedState(native.mapMemory(stateFd, STATE_SIZE)).mount = { mountpoint, device: mountsAt(mountpoint)[0].device, pidNamespace: 0 }
native.sendDescriptors(guard, 'put fuse', [fuse])
native.sendDescriptors(guard, 'put state', [stateFd])
native.sendDescriptors(guard, 'ready serving', [])
const buffer = new Uint8Array(64)
setInterval(() => {
  for (;;) {
    const found = native.receiveDescriptors(guard, buffer, false)
    if (typeof found === 'number') return
    if (found[0] === 0) process.exit() // the guard has ended
    console.log(Buffer.from(buffer.subarray(0, found[0])).toString())
  }
}, 20)
