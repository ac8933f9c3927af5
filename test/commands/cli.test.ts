// SPDX-License-Identifier: MIT
/** The command line as such: help, versions, and wrong arguments. No command here does anything. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { ROOT } from '../helpers/root.js'
import { CLI, run } from '../helpers/tree.js'

/** Without NODE_OPTIONS, by which tap loads itself into each node. */
const program = (...args: string[]) => run('env', ['--unset=NODE_OPTIONS', process.execPath, CLI, ...args])

const COMMANDS = {
  mount: [
    '[mountpoint]',
    '-f, --foreground',
    '--replace',
    '-o <options>',
    '--linger <ms>',
    '--hold <seconds>',
    '--open-timeout <seconds>',
    '--transport <name>',
    '--log-level <level>',
    '--log-format <format>',
    '-h, --help',
  ],
  unmount: ['[mountpoint]', '-h, --help'],
  list: [
    '[device...]',
    '-o, --output <columns>',
    '-b, --bytes',
    '-n, --noheadings',
    '-r, --raw',
    '-P, --pairs',
    '-J, --json',
    '-p, --paths',
    '-x, --sort <column>',
    '--tree <mountpoint>',
    '-h, --help',
  ],
  resolve: ['<device...>', '--json', '-h, --help'],
  exec: ['DEVICE...', '-- COMMAND', '--tree <mountpoint>', '--fd', '--write', '--exclusive', '-h, --help'],
  attach: [
    'FILE',
    '-- COMMAND',
    '--tree <mountpoint>',
    '--fd',
    '--read-only',
    '--direct-io',
    '--partscan',
    '--offset <bytes>',
    '--size <bytes>',
    '--sector-size <bytes>',
    '--share',
    '--grace <seconds>',
    '--keep',
    '--reason <text>',
    '--json',
    '-h, --help',
  ],
  detach: ['<what...>', '--tree <mountpoint>', '-h, --help'],
  leases: ['--tree <mountpoint>', '--json', '-h, --help'],
  status: ['--tree <mountpoint>', '--json', '--prometheus', '-h, --help'],
  dm: ['create', 'remove', 'suspend', 'resume', 'reload', 'rename', 'message', 'status', 'table', '-h, --help'],
  watch: ['--json', '--existing', '-h, --help'],
  doctor: ['--json', '-h, --help'],
  wait: ['[name]', '--loop-file <file>', '--dm-name <name>', '--gone', '--timeout <seconds>', '-h, --help'],
}

t.test('--help names every command', async (t) => {
  for (const args of [['--help'], ['-h'], ['help']]) {
    const { code, stdout, stderr } = await program(...args)
    t.strictSame({ code, stderr }, { code: 0, stderr: '' }, args.join(' '))
    t.match(stdout, /^Usage: diskseqfs /)
    for (const name of Object.keys(COMMANDS)) t.match(stdout, new RegExp(`^  ${name} `, 'm'))
    for (const option of ['-V, --version', '-h, --help']) t.ok(stdout.includes(option), option)
    t.notMatch(stdout, /undefined|\[object|\(default: \[\]\)/, 'no text that only a programmer understands')
  }
})

for (const [name, options] of Object.entries(COMMANDS)) {
  t.test(`${name} --help names every argument and option`, async (t) => {
    const { code, stdout, stderr } = await program(name, '--help')
    t.strictSame({ code, stderr }, { code: 0, stderr: '' })
    t.match(stdout, new RegExp(`^Usage: diskseqfs ${name} `))
    for (const option of options) t.ok(stdout.includes(option), option)
    const known = stdout.match(/^ {2}-[^ ,]+(?:, --[^ ]+)?(?: <[^ ]+>)?/gm) ?? []
    for (const option of known) t.ok(options.includes(option.trim()), `${option.trim()} is known to this test`)
    t.notMatch(stdout, /undefined|\[object|\(default: \[\]\)/, 'no text that only a programmer understands')
    t.strictSame(await program('help', name), { code, stdout, stderr }, `the same as help ${name}`)
  })
}

t.test('mount --help shows the defaults', async (t) => {
  const text = (await program('mount', '--help')).stdout.replace(/\s+/g, ' ')
  for (const [option, value] of [
    ['--linger <ms>', '5'],
    ['--hold <seconds>', '30'],
    ['--open-timeout <seconds>', '10'],
    ['mountpoint ', '"/dev/disk/by-diskseq"'],
  ] as const) {
    const at = text.lastIndexOf(option)
    t.match(text.slice(at), new RegExp(`^[^]{0,120}?\\(default: ${value}\\)`), option)
  }
})

t.test('--version prints the version of the package, alone', async (t) => {
  const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string }
  for (const option of ['--version', '-V']) {
    t.strictSame(await program(option), { code: 0, stdout: `${version}\n`, stderr: '' })
  }
})

t.test('without a command it shows its help on stderr, and fails', async (t) => {
  const { code, stdout, stderr } = await program()
  t.strictSame({ code, stdout }, { code: 2, stdout: '' })
  t.match(stderr, /^Usage: diskseqfs /)
})

t.test('help for an unknown command shows the known ones, and fails', async (t) => {
  const { code, stdout, stderr } = await program('help', 'format')
  t.strictSame({ code, stdout }, { code: 2, stdout: '' })
  t.match(stderr, /^ {2}unmount /m)
})

/** Exit code 2, and one line that a person understands. */
async function refusedAsWrong(t: Test, args: string[], says: RegExp): Promise<void> {
  const { code, stdout, stderr } = await program(...args)
  t.equal(code, 2)
  t.equal(stdout, '', 'nothing on stdout')
  t.match(stderr, /^diskseqfs: [^\n]+\n$/, 'one line on stderr')
  t.match(stderr, says, 'which says what is wrong')
}

const NUMBERS = {
  '--linger': 60_000,
  '--hold': 86_400,
  '--open-timeout': 86_400,
}

const wrong: [string[], RegExp][] = [
  [['format'], /unknown command 'format'/],
  [['umount'], /unknown command 'umount'.*unmount/],
  [['--fancy'], /unknown option '--fancy'/],
  [['mount', '--fancy'], /unknown option '--fancy'/],
  [['mount', '-x'], /unknown option '-x'/],
  [['mount', '--hodl', '3'], /unknown option '--hodl'.*--hold/],
  [['unmount', '--force'], /unknown option '--force'/],
  [['list', '--xml'], /unknown option '--xml'/],
  [['resolve', '--xml', 'loop0'], /unknown option '--xml'/],
  [['mount', '/a', '/b'], /too many arguments/],
  [['unmount', '/a', '/b'], /too many arguments/],
  [['list', '-o'], /'-o, --output <columns>' argument missing/],
  [['watch', 'loop0'], /too many arguments/],
  [['resolve'], /missing required argument 'device'/],
  [['mount', '-o'], /'-o <options>' argument missing/],
  [['mount', '--linger'], /'--linger <ms>' argument missing/],
  [['mount', '--log-level', 'loud'], /'loud'.*fatal, error, warn, info, debug, trace, silent/],
  [['mount', '--log-format', 'xml'], /'xml'.*pretty, json/],
  [['mount', '-f', '-o', 'nodev', '/nonexistent'], /nodev/],
  ...Object.entries(NUMBERS).flatMap(([option, max]) =>
    ['', 'x', '-1', '+1', '1.5', '1e3', '0x10', ' 1', '5s', '9'.repeat(30), String(max + 1)].map((value): [string[], RegExp] => [
      ['mount', `${option}=${value}`],
      new RegExp(`'${option} .*whole number from 0 to ${max}`),
    ]),
  ),
]

t.test('wrong arguments are refused', async (t) => {
  for (const [args, says] of wrong) {
    t.test(args.join(' '), (t) => refusedAsWrong(t, args, says))
  }
})

t.test('the largest and smallest numbers are taken', async (t) => {
  // -o is read after the numbers, and is what fails here.
  for (const [option, max] of Object.entries(NUMBERS)) {
    for (const value of [0, max]) {
      await refusedAsWrong(t, ['mount', option, String(value), '-o', 'nodev'], /nodev/)
    }
  }
})

t.test('a command that cannot be done exits with 1 and one line', async (t) => {
  for (const [args, says] of [
    [['unmount', '/nonexistent'], /\/nonexistent: nothing is mounted there/],
    [['resolve', '/nonexistent'], /\/nonexistent: /],
    [['mount', '-f', '/dev/null'], /\/dev\/null: not a directory/],
    [['mount', '/dev/null'], /\/dev\/null: not a directory/],
  ] as const) {
    const { code, stdout, stderr } = await program(...args)
    t.strictSame({ code, stdout }, { code: 1, stdout: '' }, args.join(' '))
    t.match(stderr, /^diskseqfs: [^\n]+\n$/)
    t.match(stderr, says)
  }
})

t.test('a reader of the output that goes away is no error', async (t) => {
  for (const command of ['list', 'list --json', '--help', 'resolve --json /nonexistent']) {
    const { stderr } = await run('sh', [
      '-c',
      `{ env --unset=NODE_OPTIONS '${process.execPath}' '${CLI}' ${command}; echo "code $?" >&2; } | true`,
    ])
    t.equal(stderr, `code ${command.startsWith('resolve') ? 1 : 0}\n`, command)
  }
})
