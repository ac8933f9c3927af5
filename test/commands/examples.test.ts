// SPDX-License-Identifier: MIT
/**
 * The console examples of README, of other pages and of the manual pages. Each is run here, or is in the list of those that
 * need more than this machine. Words and shape of their output must be right; numbers, sizes and names differ.
 */
import { execFileSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t from 'tap'

import { ROOT } from '../helpers/root.js'
import { cleanup, CLI, loopDisk, run } from '../helpers/tree.js'

interface Example {
  readonly command: string
  readonly output: readonly string[]
}

/** The commands after a prompt in a block, each with its output, which goes up to the next prompt. */
function examplesIn(block: string): Example[] {
  const found: { command: string; output: string[] }[] = []
  for (const line of block.split('\n')) {
    const [, command] = /^[#$] (.*?)( {2,}#.*)?$/.exec(line) ?? []
    if (command !== undefined) found.push({ command, output: [] })
    else if (line !== '') found.at(-1)?.output.push(line)
  }
  return found
}

const blocks = [
  ...['README.md', 'CONTRIBUTING.md', 'docs/fuse-native.md', 'docs/programs.md'].flatMap((page) => [
    ...readFileSync(join(ROOT, page), 'utf8').matchAll(/^```console\n(.*?)^```$/gms),
  ]),
  ...readdirSync(join(ROOT, 'man')).flatMap((page) => [
    ...readFileSync(join(ROOT, 'man', page), 'utf8').matchAll(/^\.Bd -literal.*?\n(.*?)^\.Ed$/gms),
  ]),
].map(([, text]) => text as string)
const examples = blocks.flatMap(examplesIn)

/** Examples that need more than this machine may have, and where they run instead. */
const ELSEWHERE: readonly [RegExp, string][] = [
  [/^apt-get install \.\//, 'make check-vm installs the package'],
  [/^apt-get install libfuse2|^npm install --prefix/, 'make check installs fuse-native with the tests'],
  [/^npm install \.\/diskseqfs/, 'test/commands/programs.test.ts'],
  [/^scripts\/check test/, 'make check runs it'],
  [/^(udevadm|systemctl|journalctl|ln -s \/dev\/null|echo 'DISKSEQFS_OPTIONS)/, 'make check-vm, of udev and of the service'],
  [/^ls -l \/dev\/mapper|^readlink -f \/dev\/disk\/by-label/, 'make check-vm, of names'],
]

t.test('each example is run here or is in the list of exceptions', async (t) => {
  t.ok(examples.length > 25, `${examples.length} examples`)
  for (const { command } of examples) {
    const [, where] = ELSEWHERE.find(([pattern]) => pattern.test(command)) ?? []
    t.ok(where ?? /^(make|diskseq|ls -l \/mnt\/disks$)/.test(command), command)
  }
})

t.test('make knows each target in the examples', async (t) => {
  for (const { command } of examples.filter((example) => example.command.startsWith('make '))) {
    const { code, stderr } = await run('sh', ['-c', `cd '${ROOT}' && ${command.replace('make', 'make --dry-run')}`])
    t.strictSame({ code, stderr }, { code: 0, stderr: '' }, command)
  }
})

/** A line of output as a pattern that leaves open what differs between machines. */
const shapeOf = (line: string) =>
  new RegExp(
    `^${line
      .replace(/[.*+?^${}()|[\]\\]/g, '\\$&')
      .replace(/\d+/g, '\\d+')
      .replace(/ +/g, ' +')}$`,
  )

t.test('diskseqfs does what the examples show', async (t) => {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  const other = loopDisk(t)
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-examples-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  mkdirSync(join(directory, 'bin'))
  writeFileSync(join(directory, 'bin/diskseqfs'), `#!/bin/sh\nexec '${process.execPath}' '${CLI}' "$@"\n`, { mode: 0o755 })
  symlinkSync(join(ROOT, 'native/diskseq/diskseq'), join(directory, 'bin/diskseq'))
  writeFileSync(join(directory, 'disk.img'), Buffer.alloc(8 << 20))
  execFileSync('mkfs.ext4', ['-q', '-O', '^has_journal', other.path])
  // Devices of this test that stand in for those of the examples.
  for (const [name, path] of Object.entries({ loop0: disk.path, loop0p1: `${disk.path}p1`, sdb: other.path })) {
    symlinkSync(path, join(directory, name))
  }
  const here = (command: string) =>
    command
      .replaceAll('/dev/loop0', `${directory}/loop0`)
      .replaceAll('/dev/sdb', `${directory}/sdb`)
      .replace('253:0', readFileSync(`/sys/class/block/${disk.kname}/dev`, 'utf8').trim())
      .replace('loop9', 'loop999')
      // No tree is mounted where they expect it.
      .replace(/ (exec|attach) /, ' $1 --fd ')
      .replace(/ 42 /, ` ${other.diskseq()} `)
      .replace('disk.img', `${directory}/disk.img`)
  const asked = examples.filter(({ command }) => /^(diskseq|ls -l \/mnt)/.test(command) && !command.includes('fuse-native'))
  const script = asked.map(({ command }) => `echo '== ${command}'; ${here(command)} 2>&1 || true`).join('\n')
  // In a mount namespace of its own, so that no other process sees the mounts.
  const { stdout } = await run('unshare', [
    ...['--mount', '--propagation', 'private', 'bash', '-c'],
    `mount -t tmpfs none /mnt; PATH='${directory}/bin':$PATH; cd /; ${script}`,
  ])
  const printed = new Map(
    stdout
      .split(/^== /m)
      .slice(1)
      .map((part) => [part.slice(0, part.indexOf('\n')), part.slice(part.indexOf('\n') + 1).split('\n')]),
  )
  for (const { command, output } of asked) {
    const lines = printed.get(command) ?? []
    if (command === 'diskseqfs list') {
      // The disks here differ from those of the example.
      t.match(lines[0], shapeOf(output[0] as string), command)
      t.ok(
        lines.some((line) => new RegExp(`^ *${disk.diskseq()}p1 +${disk.kname}p1 +\\d+:\\d+ +\\S+ +0 part$`).test(line)),
        'a partition',
      )
      continue
    }
    for (const line of output) {
      t.ok(
        lines.some((found) => shapeOf(line.replace('loop9', 'loop999')).test(found)),
        `${command}: ${line}`,
      )
    }
    if (output.length === 0 && command.startsWith('diskseq')) t.strictSame(lines, [''], `${command}: prints nothing`)
    if (command.startsWith('ls ')) t.match(lines.join('\n'), new RegExp(`^b.* ${disk.diskseq()}p1$`, 'm'), command)
  }
})
