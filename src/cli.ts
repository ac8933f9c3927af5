#!/usr/bin/env node
// SPDX-License-Identifier: MIT
/** The command line. Exit codes: 0 done, 1 cannot be done, 2 asked wrongly. */
import { Command, CommanderError, InvalidArgumentError, Option } from 'commander'

import { UserError } from './util/errno.js'
import type {
  AttachArguments,
  DmCreateArguments,
  DmTableArguments,
  ExecArguments,
  LeaseArguments,
  ListArguments,
  MountArguments,
  StatusArguments,
  TreeArguments,
  WaitArguments,
  WatchArguments,
} from './commands/options.js'
import { LOG_FORMATS, LOG_LEVELS } from './util/log.js'
import { DEFAULT_MOUNTPOINT } from './util/mountpoint.js'
import { isSectorSize } from './util/sector-size.js'
import { printable } from './util/text.js'
import { packageVersion } from './util/version.js'
import { TRANSPORTS } from './fuse/transport.js'

/** Upper limits that only keep a typing error from looking like an intention. */
const LINGER_MAX_MS = 60_000
const HOLD_MAX_S = 86_400
/** Three weeks: a timer takes no more. */
const WAIT_MAX_S = 2_000_000

/** A whole number from 0 to `max`, for an option's argument. */
function wholeNumber(max: number): (text: string) => number {
  return (text) => {
    if (!/^\d{1,9}$/.test(text) || Number(text) > max) {
      throw new InvalidArgumentError(`It must be a whole number from 0 to ${max}.`)
    }
    return Number(text)
  }
}

/** Bytes, in decimal or with a unit of 1024, as losetup(8) takes them: 512, 64K, 1M, 10GiB. */
function byteCount(text: string): bigint {
  const [, digits, unit = ' '] = /^(\d{1,19})(?:([KMGTPE])(?:iB)?)?$/.exec(text) ?? []
  const value = digits === undefined ? -1n : BigInt(digits) << BigInt(10 * ' KMGTPE'.indexOf(unit))
  if (value < 0n || value >= 1n << 63n) {
    throw new InvalidArgumentError('It must be a number of bytes, or one with K, M, G, T, P or E for powers of 1024.')
  }
  return value
}

function seconds(text: string): number {
  if (!/^\d{1,7}(\.\d{1,3})?$/.test(text) || Number(text) > WAIT_MAX_S) {
    throw new InvalidArgumentError(`It must be a number of seconds, such as 30 or 0.5, up to ${WAIT_MAX_S}.`)
  }
  return Number(text)
}

function sectorSize(text: string): number {
  const value = Number(byteCount(text))
  if (!isSectorSize(value)) {
    throw new InvalidArgumentError('It must be a power of two from 512 on.')
  }
  return value
}

function program(): Command {
  const root = new Command('diskseqfs')
    .description('Block device paths that can never reach the wrong disk.')
    .version(packageVersion(), '-V, --version')
    .exitOverride()
    .configureOutput({
      outputError: (text, write) => {
        const said = text.replace(/^error: /, '').replace(/\n(?=\()/, ' ')
        write(`diskseqfs: ${printable(said.trimEnd())}\n`)
      },
    })

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

  asking(root.command('list'))
    .summary('show disks and partitions with their sequence numbers')
    .description(
      'Lists disks and partitions as the kernel has them now; or only those that are named: in the tree, by the kernel, by\n' +
        'device-mapper, or by a path, which is not opened. Letters and columns are those of lsblk. Needs no daemon.',
    )
    .argument('[device...]', 'only these')
    .option(
      '-o, --output <columns>',
      'NAME, PATH, KNAME, MAJ:MIN, DISKSEQ, PARTN, SIZE, RO, TYPE, HOLDER, DM-NAME, DM-UUID, BACK-FILE, MOUNTPOINTS,\n' +
        'LEASES and PINS (of the daemon); with + in front, more than the default',
    )
    .option('-b, --bytes', 'sizes in bytes')
    .option('-n, --noheadings', 'no headings')
    .option('-r, --raw', 'columns separated by one blank, what is special as \\xNN')
    .option('-P, --pairs', 'KEY="value" pairs')
    .option('-J, --json', 'print JSON')
    .option('-p, --paths', 'paths in the tree instead of names')
    .option('-x, --sort <column>', 'in the order of a column, partitions among disks')
    .action(async (devices: string[], options: ListArguments) => {
      const { list } = await import('./commands/list.js')
      process.exitCode = await list(devices, options)
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

  running(root.command('exec <device...>'), ['[options] DEVICE... -- COMMAND [ARGUMENT...]'])
    .summary('run a program with disks that stay what they are')
    .description(
      'Opens and verifies disks, and runs a program: {} in its arguments, or {1}, {2}, become their paths in the tree.\n' +
        'The disks are held open until it ends, so it may look up their numbers as late as it likes. Needs no daemon.\n' +
        'Exit code: that of the program, 128 + the signal that ended it; 127 not found, 126 not executable, 125 any other failure.',
    )
    .option('--write', 'hold them open for writing')
    .option('--exclusive', 'hold them exclusively (O_EXCL): it fails while something else does, a mount for instance')
    .action(async (devices: string[], options: ExecArguments) => {
      const { exec } = await import('./commands/exec.js')
      process.exitCode = await exec(devices, programToRun('exec DEVICE...'), options)
    })

  running(root.command('attach <file>'), ['[options] FILE', '[options] FILE -- COMMAND [ARGUMENT...]'])
    .summary('make a file a disk, for a time or while a program runs')
    .description(
      'Binds a loop device to a regular file, and prints its path in the tree; or runs a program: {} in its arguments becomes\n' +
        'the path. The kernel takes the loop device away with its last user. Until somebody uses it, the daemon holds it\n' +
        '(a lease), or this command does while the program runs, for which no daemon is needed; then the exit code is as of\n' +
        'exec. A block device is held as it is.',
    )
    .option('--read-only', 'nothing is written to the file')
    .option('--direct-io', 'past the page cache of the filesystem that the file is on')
    .option('--partscan', 'look for a partition table')
    .option('--offset <bytes>', 'where the disk begins in the file', byteCount)
    .option('--size <bytes>', 'how long it is (default: all that follows)', byteCount)
    .option('--sector-size <bytes>', 'of the disk: a power of two from 512 on', sectorSize)
    .option('--share', 'without a command: the same disk for all who share the same part of the file')
    .option('--grace <seconds>', 'without a command: for how long the daemon holds it (default: 30)', seconds)
    .option('--keep', 'without a command: the daemon holds it until detach')
    .option('--reason <text>', 'without a command: what leases is to say of it')
    .option('--json', 'without a command: print JSON')
    .action(async (file: string, options: AttachArguments & LeaseArguments) => {
      refuseWith(afterDashes < 0 ? ['fd'] : ['share', 'grace', 'keep', 'reason', 'json'], options)
      if (afterDashes < 0) {
        const { lend } = await import('./commands/leases.js')
        return lend(file, options)
      }
      const { attach } = await import('./commands/attach.js')
      process.exitCode = await attach(file, programToRun('attach FILE'), options)
    })

  asking(root.command('detach'))
    .summary('let the daemon hold a disk no longer')
    .description('Ends leases. A disk that is open stays there until it is closed.')
    .argument('<what...>', 'a lease, or the name of a disk in the tree (13, 13p1), of which all leases end')
    .action(async (what: string[], options: TreeArguments) => {
      const { detach } = await import('./commands/leases.js')
      process.exitCode = await detach(what, options)
    })

  asking(root.command('leases'))
    .summary('show the disks that the daemon holds')
    .option('--json', 'print JSON')
    .action(async (options: TreeArguments) => {
      const { leases } = await import('./commands/leases.js')
      await leases(options)
    })

  asking(root.command('status'))
    .summary('show what the daemon has to do')
    .description('Prints what the daemon has done since its start, and what it holds now. It asks the daemon, and looks at no disk.')
    .option('--json', 'print JSON')
    .addOption(new Option('--prometheus', "print metrics, for the textfile collector of Prometheus' node_exporter").conflicts('json'))
    .action(async (options: StatusArguments) => {
      const { status } = await import('./commands/status.js')
      await status(options)
    })

  deviceMapper(root.command('dm'))

  root
    .command('watch')
    .summary('tell of disks that come and go')
    .description(
      'Prints a line for each disk or partition that comes or goes, until it is ended. Another medium is another disk.\n' +
        '"resync" says that events were lost; what has changed meanwhile comes next. Needs no daemon.',
    )
    .option('--json', 'print JSON, one object a line')
    .option('--existing', 'begin with those that are there, and "ready"')
    .action(async (options: WatchArguments) => {
      const { watch } = await import('./commands/watch.js')
      await watch(options)
    })

  root
    .command('wait')
    .summary('wait for a disk')
    .description(
      'Waits until a disk is there, opens and verifies it, and prints its path in the tree; or, with --gone, until there is none.\n' +
        'Exit code 1 if that takes too long. Needs no daemon.',
    )
    .argument('[name]', 'its name in the tree: 13, 13p1')
    .option('--loop-file <file>', 'a loop device on that file')
    .option('--dm-name <name>', 'a device-mapper device of that name')
    .option('--gone', 'wait until there is none')
    .option('--timeout <seconds>', 'for how long at most (default: for ever)', seconds)
    .action(async (name: string | undefined, options: WaitArguments) => {
      const { wait } = await import('./commands/watch.js')
      process.exitCode = await wait(name, options)
    })

  root
    .command('doctor')
    .summary('say what is wrong')
    .description(
      'Looks at the kernel, the mount, the service, the udev rules and the links that lead into the tree, and says what is wrong and\n' +
        'what to do about it. Exit code 0: nothing; 1: warnings; 2: something is broken, or the command line is wrong.',
    )
    .option('--json', 'print JSON')
    .action(async (options: { json?: boolean }) => {
      const { doctor } = await import('./commands/doctor.js')
      // A thread may wait for a daemon that hangs.
      process.exit(await doctor(options.json === true))
    })

  root.command('storage-provider', { hidden: true }).action(async () => {
    const { storageProvider } = await import('./commands/storage-provider.js')
    await storageProvider()
  })

  for (const command of [...root.commands, ...root.commands.flatMap(({ commands }) => commands)]) {
    command.exitOverride().configureOutput(root.configureOutput())
  }
  return root
}

const DM_DEVICE = ['<device>', 'a device-mapper device: its name in the tree, a path, or its device-mapper name'] as const
const DM_TABLE = ['[table]', 'its text, as of dmsetup; - for standard input', '-'] as const

/** Each is of the device that it was given, or fails: it is held open meanwhile, and meant by its number. */
function deviceMapper(root: Command): void {
  root
    .summary('make and change device-mapper devices by what they are')
    .description(
      'Device-mapper devices by what they are: each call is of the device that was opened, by its number, while it is held, so that it\n' +
        'reaches that very device or fails. Devices that a table names by a path are opened and verified. Needs no daemon.',
    )
  running(root.command('create'), ['[options] NAME [TABLE|-]', '[options] NAME [TABLE|-] -- COMMAND [ARGUMENT...]'])
    .summary('make a device, and print its path in the tree')
    .description(
      'Makes a device and prints its path in the tree; or runs a program: {} in its arguments becomes the path, the device is held\n' +
        'until it ends, and the exit code is as of exec.',
    )
    .argument('<name>', 'what it is to be called')
    .argument(...DM_TABLE)
    .option('--uuid <uuid>', 'its UUID')
    .option('--read-only', 'nothing can be written to it')
    .option('--until-unused', 'the kernel removes it with its last user; without a command the daemon holds it meanwhile (a lease)')
    .option('--grace <seconds>', 'with --until-unused: for how long the daemon holds it (default: 30)', seconds)
    .option('--keep', 'with --until-unused: the daemon holds it until detach')
    .option('--json', 'without a command: print JSON')
    .action(async (name: string, table: string, options: DmCreateArguments) => {
      refuseForDm(options)
      const { create } = await import('./commands/dm.js')
      process.exitCode = await create(name, table, programIfAny(), options)
    })
  root
    .command('remove')
    .summary('remove a device')
    .argument(...DM_DEVICE)
    .option('--deferred', 'with its last user, if it is in use')
    .action(async (device: string, options: { deferred?: boolean }) => {
      const { remove } = await import('./commands/dm.js')
      await remove(device, options)
    })
  root
    .command('suspend')
    .summary('keep I/O from a device')
    .argument(...DM_DEVICE)
    .option('--no-flush', 'do not wait for I/O that has begun')
    .option('--no-lockfs', 'do not freeze the filesystem on it')
    .action(async (device: string, options: { flush: boolean; lockfs: boolean }) => {
      const { suspend } = await import('./commands/dm.js')
      await suspend(device, options)
    })
  root
    .command('resume')
    .summary('put the table in place that was loaded last, and let I/O go on')
    .argument(...DM_DEVICE)
    .action(async (device: string) => {
      const { resume } = await import('./commands/dm.js')
      await resume(device)
    })
  root
    .command('reload')
    .summary('load another table, which resume puts in place')
    .argument(...DM_DEVICE)
    .argument(...DM_TABLE)
    .option('--read-only', 'nothing can be written to it then')
    .action(async (device: string, table: string, options: { readOnly?: boolean }) => {
      const { reload } = await import('./commands/dm.js')
      await reload(device, table, options)
    })
  root
    .command('rename')
    .summary('give a device another name')
    .argument(...DM_DEVICE)
    .argument('<name>', 'what it is to be called')
    .action(async (device: string, name: string) => {
      const { rename } = await import('./commands/dm.js')
      await rename(device, name)
    })
  root
    .command('message')
    .summary('send a message to a target of a device')
    .argument(...DM_DEVICE)
    .argument('<sector>', 'of 512 bytes, which the target has that is meant', sectorNumber)
    .argument('<word...>', 'the message')
    .action(async (device: string, sector: bigint, words: string[]) => {
      const { message } = await import('./commands/dm.js')
      await message(device, sector, words)
    })
  root
    .command('status')
    .summary('show what the targets of a device say of themselves')
    .argument(...DM_DEVICE)
    .action(async (device: string) => {
      const { status } = await import('./commands/dm.js')
      await status(device)
    })
  root
    .command('table')
    .summary('show the table of a device, as create and reload take it')
    .argument(...DM_DEVICE)
    .option('--inactive', 'the one that was loaded and is not in place')
    .option('--show-keys', 'with the keys of encrypted devices, which are shown as zeros otherwise')
    .action(async (device: string, options: DmTableArguments) => {
      const { table } = await import('./commands/dm.js')
      await table(device, options)
    })
}

function sectorNumber(text: string): bigint {
  if (!/^\d{1,19}$/.test(text)) throw new InvalidArgumentError('It must be a whole number.')
  return BigInt(text)
}

/** @throws UserError where options do not go together */
function refuseForDm({ untilUnused, keep, grace, json, fd }: DmCreateArguments): void {
  const code = runs ? 125 : 2
  if (untilUnused !== true && (keep !== undefined || grace !== undefined))
    throw new UserError('--keep and --grace are for --until-unused', code)
  if (runs && (keep ?? grace ?? json) !== undefined)
    throw new UserError('--keep, --grace and --json are for dm create without a command', code)
  if (!runs && fd === true) throw new UserError('--fd is for dm create with a command', code)
}

/** Of commands that ask the daemon of a tree. */
const asking = (command: Command) =>
  command.addOption(new Option('--tree <mountpoint>', 'where the tree is mounted').default(DEFAULT_MOUNTPOINT))

/** Of commands that run a program. */
function running(command: Command, usages: readonly string[]): Command {
  return asking(command.usage(usages.join(`\n       diskseqfs ${command.name()} `))).option(
    '--fd',
    'pass the open disk itself, as /proc/self/fd/N: for where no tree is mounted',
  )
}

/** Runs a program: what comes after the first "--" is not for this one; and exit codes are those of env(1), as 1 and 2 may be the program's. */
const mayRun = /^(exec|attach|dm create)\b/.test(process.argv.slice(2, 4).join(' '))
const afterDashes = mayRun ? process.argv.indexOf('--') : -1
const runs = process.argv[2] === 'exec' || afterDashes >= 0
const OWN_ARGUMENTS = afterDashes < 0 ? process.argv : process.argv.slice(0, afterDashes)

/** @throws UserError where an option is not for this use of a command */
function refuseWith(names: readonly string[], options: object): void {
  const given = names.find((name) => name in options)
  if (given === undefined) return
  throw new UserError(`--${given} is for attach ${afterDashes < 0 ? 'with' : 'without'} a command`, runs ? 125 : 2)
}

const programIfAny = (): string[] => (afterDashes < 0 ? [] : process.argv.slice(afterDashes + 1))

function programToRun(usage: string): string[] {
  const command = programIfAny()
  if (command.length === 0) throw new UserError(`say what to run: diskseqfs ${usage} -- COMMAND [ARGUMENT...]`, 125)
  return command
}

// Whoever reads our output may go away; that is no reason to fail, and for the
// daemon none to end.
for (const stream of [process.stdout, process.stderr]) {
  stream.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code === 'EPIPE') return
    if (stream === process.stdout) process.stderr.write(`diskseqfs: standard output: ${error.code}\n`)
    process.exit(1)
  })
}

program()
  .parseAsync(OWN_ARGUMENTS)
  .catch((error: unknown) => {
    if (error instanceof CommanderError) {
      // Commander has said what was wrong; help and version are no error.
      process.exitCode = error.exitCode === 0 ? 0 : runs ? 125 : 2
    } else if (error instanceof UserError) {
      process.stderr.write(`diskseqfs: ${error.message}\n`)
      // A thread may wait for a daemon that hangs.
      process.exit(error.exitCode)
    } else {
      throw error
    }
  })
