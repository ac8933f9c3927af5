#!/usr/bin/env node
// SPDX-License-Identifier: MIT
/** The command line. Exit codes: 0 done, 1 cannot be done, 2 asked wrongly. */
import { readFileSync } from 'node:fs'

import { Command, CommanderError, InvalidArgumentError, Option } from 'commander'

import { UserError } from './util/errno.js'
import type { MountArguments } from './commands/options.js'
import { LOG_FORMATS, LOG_LEVELS } from './util/log.js'
import { DEFAULT_MOUNTPOINT } from './util/mountpoint.js'
import { TRANSPORTS } from './fuse/transport.js'

/** Upper limits that only keep a typing error from looking like an intention. */
const LINGER_MAX_MS = 60_000
const HOLD_MAX_S = 86_400

/** A whole number from 0 to `max`, for an option's argument. */
function wholeNumber(max: number): (text: string) => number {
  return (text) => {
    if (!/^\d{1,9}$/.test(text) || Number(text) > max) {
      throw new InvalidArgumentError(`It must be a whole number from 0 to ${max}.`)
    }
    return Number(text)
  }
}

function program(): Command {
  const root = new Command('diskseqfs')
    .description('Block device paths that can never reach the wrong disk.')
    .version(version(), '-V, --version')
    .exitOverride()
    .configureOutput({ outputError: (text, write) => write(`diskseqfs: ${text.replace(/^error: /, '').replace(/\n(?=\()/, ' ')}`) })

  root
    .command('mount')
    .summary('serve the tree')
    .description(
      `Mounts the tree of block devices by sequence number, and serves it.\n` +
        `Returns once the tree answers; with -f it stays and logs to stderr.`,
    )
    .argument('[mountpoint]', 'where to mount; made if missing', DEFAULT_MOUNTPOINT)
    .option('-f, --foreground', 'stay in the foreground')
    .option('--replace', 'take the tree over from the daemon that serves it, which ends; users of the tree do not notice')
    .addOption(
      new Option(
        '-o <options>',
        'mount options, comma-separated: those below as name=value (linger, hold, open_timeout, transport,\n' +
          'log_level, log_format); context=, fscontext=, defcontext=, rootcontext= (SELinux); ro, noatime, relatime and the like',
      )
        .argParser((text, before: string[]) => [...before, text])
        .default([], 'none'),
    )
    .option(
      '--linger <ms>',
      'how long a disk is held after the kernel let go of its name, for a program that cannot be seen',
      wholeNumber(LINGER_MAX_MS),
      5,
    )
    .option('--hold <seconds>', 'for how long at most a disk is held for a program that cannot be seen', wholeNumber(HOLD_MAX_S), 30)
    .option('--open-timeout <seconds>', 'how long a program waits for a disk that does not answer', wholeNumber(HOLD_MAX_S), 10)
    .addOption(
      new Option(
        '--transport <name>',
        'what speaks with the kernel: session, which all that is promised rests on, or the npm package fuse-native,\n' +
          'which tells too little for that (it says at its start what is missing)',
      )
        .choices(TRANSPORTS)
        .default('session'),
    )
    .addOption(new Option('--log-level <level>', 'least important lines to log').choices(LOG_LEVELS).default('info'))
    .addOption(
      new Option(
        '--log-format <format>',
        'format of log lines on stderr (default: pretty on a terminal, journal in a systemd service, else json)',
      ).choices(LOG_FORMATS),
    )
    .action(async (mountpoint: string, options: MountArguments, command: Command) => {
      const { mount } = await import('./commands/mount.js')
      await mount(mountpoint, options, command)
    })

  root
    .command('unmount')
    .summary('take the tree away')
    .description('Unmounts the tree; its daemon ends. Files that are open stay open.')
    .argument('[mountpoint]', 'where it is mounted', DEFAULT_MOUNTPOINT)
    .action(async (mountpoint: string) => {
      const { unmount } = await import('./commands/unmount.js')
      await unmount(mountpoint)
    })

  root
    .command('list')
    .summary('show disks and partitions with their sequence numbers')
    .description('Lists disks and partitions as the kernel has them now. Needs no daemon.')
    .option('--json', 'print JSON')
    .action(async (options: { json?: boolean }) => {
      const { list } = await import('./commands/list.js')
      await list(options.json === true)
    })

  root
    .command('resolve')
    .summary('say which path in the tree a device has')
    .description(
      'Prints the path in the tree of what each argument is now: opened, and verified on the open descriptor.\n' +
        'Needs no daemon. Exit code 1 where one of them is no block device.',
    )
    .argument(
      '<device...>',
      'a path (/dev/sda1, /dev/mapper/vm-root), MAJOR:MINOR, a kernel name (sda1), or a device-mapper name (vm-root)',
    )
    .option('--json', 'print JSON')
    .action(async (devices: string[], options: { json?: boolean }) => {
      const { resolve } = await import('./commands/resolve.js')
      process.exitCode = await resolve(devices, options.json === true)
    })

  for (const command of root.commands) {
    command.exitOverride().configureOutput(root.configureOutput())
  }
  return root
}

function version(): string {
  const manifest = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as {
    version: string
  }
  return manifest.version
}

// Whoever reads our output may go away; that is no reason to fail, and for the
// daemon none to end.
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error
  })
}

program()
  .parseAsync()
  .catch((error: unknown) => {
    if (error instanceof CommanderError) {
      // Commander has said what was wrong; help and version are no error.
      process.exitCode = error.exitCode === 0 ? 0 : 2
    } else if (error instanceof UserError) {
      process.stderr.write(`diskseqfs: ${error.message}\n`)
      // A thread may wait for a daemon that hangs.
      process.exit(error.exitCode)
    } else {
      throw error
    }
  })
