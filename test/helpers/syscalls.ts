// SPDX-License-Identifier: MIT
/** Numbers of system calls, on the architecture that the tests run on. */
import { native } from '../../src/native.js'

/** Calls that the addon has a name for. */
export const number = (name: string) => {
  const value = native.syscalls[name]
  if (value === undefined) throw new Error(`no system call ${name}`)
  return value
}

/** Calls that the addon has no name for, since nothing depends on them. */
const OTHERS: Record<string, number> = {
  fsconfig: 431,
  ...(process.arch === 'arm64'
    ? { mount: 40, ioctl: 29, swapon: 224, clock_nanosleep: 115, mq_open: 180, read: 63 }
    : { mount: 165, ioctl: 16, swapon: 167, clock_nanosleep: 230, mq_open: 240, read: 0 }),
}
export const other = (name: string) => OTHERS[name] as number
