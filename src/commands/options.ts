// SPDX-License-Identifier: MIT
/** The types of what a command is given on its command line. */
import type { TransportName } from '../fuse/transport.js'
import type { LogFormat, LogLevel } from '../util/log.js'

/** What `diskseqfs mount` was told. */
export interface MountArguments {
  foreground?: boolean
  replace?: boolean
  o: string[]
  linger: number
  hold: number
  openTimeout: number
  transport: TransportName
  logLevel: LogLevel
  logFormat?: LogFormat
}
