// SPDX-License-Identifier: MIT
/**
 * `diskseqfs dm`, as far as it goes without device-mapper: what it refuses before it asks the kernel. What it does is
 * shown in a virtual machine (test/vm/cases/dm.ts).
 */
import { existsSync } from 'node:fs'

import t from 'tap'

import { checkDmName, parseTable, withoutKey } from '../../src/disks/dm.js'
import { DiskError } from '../../src/disks/open.js'
import { CLI, cli, loopDisk, run } from '../helpers/tree.js'

const dm = (...args: string[]) => cli('dm', ...args)
const TABLE = '0 8 zero'
const HAS_DM = existsSync('/sys/class/misc/device-mapper')

t.test('names that no device can have', async (t) => {
  for (const [name, why] of [
    ['', 'it needs a name'],
    ['.', 'has that name for something else'],
    ['..', 'has that name for something else'],
    ['control', 'has that name for something else'],
    ['a/b', 'without /dev/mapper/'],
    ['/dev/mapper/a', 'without /dev/mapper/'],
    ['x'.repeat(128), 'it takes 128 bytes as device-mapper writes it, and there is room for 127'],
    ['\u00e9'.repeat(16), 'it takes 128 bytes'],
    ['a\nb', 'control characters'],
    ['\ufffd', 'no UTF-8'],
  ] as const) {
    const error = catching(() => checkDmName(name))
    t.ok(error instanceof DiskError && error.code === 'EINVAL', JSON.stringify(name))
    t.match(error?.message, why)
    t.notMatch(error?.message, /[\u0000-\u001f]/)
  }
  for (const name of ['a', 'x'.repeat(127), 'vm-root', 'a b', '\u00e9'.repeat(15), '-', 'a\\x20b', '...']) checkDmName(name)
  const { code, stderr } = await dm('create', 'a/b', TABLE)
  t.strictSame([code, /^diskseqfs: a\/b: no device-mapper device can be called a\/b: .*\n$/.test(stderr)], [1, true], stderr)
})

function catching(run: () => void): Error | undefined {
  try {
    run()
  } catch (error) {
    return error as Error
  }
  return undefined
}

t.test('tables', async (t) => {
  t.strictSame(parseTable('# two\n0 8 zero\n\n  8   16\tlinear  7:0 0  \n'), [
    { start: 0n, length: 8n, type: 'zero', params: '' },
    { start: 8n, length: 16n, type: 'linear', params: '7:0 0' },
  ])
  t.equal(parseTable(`0 ${2n ** 63n} zero`)[0]?.length, 2n ** 63n)
  for (const [text, why] of [
    ['', 'the table is empty'],
    ['# nothing\n', 'the table is empty'],
    ['0 8 zero\n0 8\n', 'line 2 of the table is not "START LENGTH TYPE PARAMETERS": 0 8'],
    ['zero', 'line 1 of the table'],
    ['-1 8 zero', 'line 1 of the table'],
    ['0x10 8 zero', 'line 1 of the table'],
    [`0 8 ${'z'.repeat(16)}`, 'no target has such a long name'],
    ['0 8 zero \0', 'a NUL'],
  ] as const) {
    const error = catching(() => parseTable(text))
    t.ok(error instanceof DiskError, JSON.stringify(text))
    t.match(error?.message, why)
  }
})

t.test('keys are not shown, unless they are only names of keys', async (t) => {
  const shown = (params: string, type = 'crypt') => withoutKey({ start: 0n, length: 8n, type, params }).params
  t.equal(shown('aes-xts-plain64 00aFf9 0 7:0 0 1 allow_discards'), 'aes-xts-plain64 000000 0 7:0 0 1 allow_discards')
  t.equal(shown('aes-xts-plain64 :64:logon:a 0 7:0 0'), 'aes-xts-plain64 :64:logon:a 0 7:0 0')
  t.equal(shown('7:0 1234', 'linear'), '7:0 1234')
})

t.test('what is asked wrongly', async (t) => {
  for (const [args, code, said] of [
    [['create'], 2, /missing required argument 'name'/],
    [['create', 'x', TABLE, 'more'], 2, /too many arguments/],
    [['create', '--keep', 'x', TABLE], 2, /--keep and --grace are for --until-unused/],
    [['create', '--until-unused', '--keep', '--grace', '5', 'x', TABLE], 2, /exclude each other/],
    [['create', '--fd', 'x', TABLE], 2, /--fd is for dm create with a command/],
    [['create', '--json', 'x', TABLE, '--', 'true'], 125, /without a command/],
    [['create', 'x', 'nonsense', '--', 'true'], 125, /x: line 1 of the table/],
    [['create', '--uuid', 'x'.repeat(129), 'x', TABLE], 1, /x: no UUID: x+; it has at most 128 bytes/],
    [['message', 'x', 'sector', 'word'], 2, /It must be a whole number/],
    [['nosuch'], 2, /unknown command 'nosuch'/],
    [['table', '/dev/null'], 1, /\/dev\/null: not a block device/],
    [['remove', '99999999'], 1, /99999999: no disk has this number now/],
  ] as const) {
    const result = await dm(...args)
    t.equal(result.code, code, args.join(' ').slice(0, 60))
    t.match(result.stderr, said)
    t.match(result.stderr, /^diskseqfs: [^\n]*\n$/, 'in one line')
    t.equal(result.stdout, '')
  }
})

t.test('another disk is no device-mapper device', async (t) => {
  const disk = loopDisk(t)
  for (const args of [['remove'], ['suspend'], ['resume'], ['reload'], ['status'], ['table']] as const) {
    const { code, stderr } = await dm(...args, disk.path, ...(args[0] === 'reload' ? [TABLE] : []))
    t.strictSame({ code, stderr }, { code: 1, stderr: `diskseqfs: ${disk.path}: ${disk.kname} is no device-mapper device\n` }, args[0])
  }
})

t.test('who is not root', async (t) => {
  const result = await run(process.execPath, [CLI, 'dm', 'create', 'x', TABLE], { uid: 65534, gid: 65534 })
  t.strictSame(result, { code: 1, stdout: '', stderr: "diskseqfs: x: device-mapper is root's; run this as root\n" })
})

t.test('a kernel without device-mapper', { skip: HAS_DM && 'this kernel has it' }, async (t) => {
  const { code, stderr } = await dm('create', 'diskseqfs-test', TABLE)
  t.strictSame(
    { code, stderr },
    { code: 1, stderr: 'diskseqfs: diskseqfs-test: this kernel has no device-mapper; load the module (modprobe dm-mod)\n' },
  )
})
