// SPDX-License-Identifier: MIT
/** The types of what a command is given on its command line. */
import type { TransportName } from '../fuse/transport.js'
import type { LogFormat, LogLevel } from '../util/log.js'

/** How the program of `diskseqfs exec` and `attach` gets its disks. */
export interface RunArguments {
  /** As an open descriptor, instead of the path in the tree. */
  fd?: boolean
  /** Where that is mounted. */
  tree: string
}

/** What `diskseqfs exec` was told. */
export interface ExecArguments extends RunArguments {
  write?: boolean
  exclusive?: boolean
}

/** How a disk is made from a file. */
export interface FileArguments {
  readOnly?: boolean
  directIo?: boolean
  partscan?: boolean
  offset?: bigint
  size?: bigint
  sectorSize?: number
}

/** What `diskseqfs attach` was told, with a command. */
export interface AttachArguments extends RunArguments, FileArguments {}

/** What commands were told that ask the daemon of a tree. */
export interface TreeArguments {
  /** Where it is mounted. */
  tree: string
  json?: boolean
}

/** What `diskseqfs status` was told. */
export interface StatusArguments extends TreeArguments {
  prometheus?: boolean
}

/** What `diskseqfs attach` was told, without a command. */
export interface LeaseArguments extends TreeArguments, FileArguments {
  share?: boolean
  keep?: boolean
  /** s */
  grace?: number
  reason?: string
}

/** What `diskseqfs dm create` was told. */
export interface DmCreateArguments extends RunArguments {
  uuid?: string
  readOnly?: boolean
  untilUnused?: boolean
  /** s */
  grace?: number
  keep?: boolean
  json?: boolean
}

/** What `diskseqfs dm table` was told. */
export interface DmTableArguments {
  inactive?: boolean
  showKeys?: boolean
}

/** What `diskseqfs watch` was told. */
export interface WatchArguments {
  json?: boolean
  existing?: boolean
}

/** What `diskseqfs wait` was told. */
export interface WaitArguments {
  loopFile?: string
  dmName?: string
  gone?: boolean
  /** s */
  timeout?: number
}

/** What `diskseqfs list` was told. */
export interface ListArguments extends TreeArguments {
  output?: string
  bytes?: boolean
  noheadings?: boolean
  raw?: boolean
  pairs?: boolean
  paths?: boolean
  sort?: string
}

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
