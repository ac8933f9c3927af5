// SPDX-License-Identifier: MIT
/** `diskseq`, the small program for scripts: it says what `diskseqfs resolve` says. */
import { existsSync, mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import t from 'tap'

import { parseName } from '../../src/devices/names.js'
import { ROOT } from '../helpers/root.js'
import { CLI, loopDisk, mapperLink, run, scratch, startTree, until, zramDisk } from '../helpers/tree.js'

const NOBODY = 65534
const DISKSEQ = join(ROOT, 'native/diskseq/diskseq')
const diskseq = (...args: string[]) => run(DISKSEQ, args)
const resolve = (...args: string[]) => run('env', ['--unset=NODE_OPTIONS', process.execPath, CLI, 'resolve', ...args])

t.test('it finds, and refuses, what diskseqfs resolve does', async (t) => {
  const disk = loopDisk(t)
  const ram = zramDisk(t)
  const unbound = loopDisk(t)
  const gone = unbound.diskseq()
  unbound.detach()
  disk.addPartition(3, 64, 128)
  await until(() => existsSync(`${disk.path}p3`))
  const dir = scratch(t)
  symlinkSync(disk.path, join(dir, 'link'))
  symlinkSync('link', join(dir, '13'))
  writeFileSync(join(dir, 'file'), '')
  const { mountpoint } = await startTree(t)
  const majmin = (kname: string) => readFileSync(`/sys/class/block/${kname}/dev`, 'utf8').trim()
  const n = disk.diskseq()
  const found = [
    disk.path,
    disk.kname,
    n,
    `${n}p3`,
    `${n}-part3`,
    `${disk.path}p3`,
    `${disk.kname}p3`,
    majmin(disk.kname),
    majmin(`${disk.kname}p3`),
  ]
  found.push(ram.path, ram.kname, ram.diskseq(), join(dir, 'link'), join(dir, '13'), join(mountpoint, n), join(mountpoint, `${n}-part3`))
  const refused = [
    '',
    '.',
    '..',
    '/',
    dir,
    join(dir, 'file'),
    join(dir, 'missing'),
    '/dev/null',
    'nonsense',
    'loop99999',
    '999:999',
    '1:2:3',
    '-1:0',
  ]
  refused.push(
    unbound.path,
    unbound.kname,
    majmin(unbound.kname),
    gone,
    `${n}p4`,
    `${n}p0`,
    `${n}p03`,
    `0${n}`,
    `${n}p`,
    `${n}-part`,
    `+${n}`,
    '0',
    '18446744073709551616',
  )
  refused.push(mapperLink(t, 'diskseqfs-test', disk.path), 'diskseqfs-test')
  for (const argument of [...found, ...refused]) {
    const [quick, full] = [await diskseq('--', argument), await resolve('--', argument)]
    t.strictSame({ code: quick.code, stdout: quick.stdout }, { code: full.code, stdout: full.stdout }, argument)
    t.equal(full.code, found.includes(argument) ? 0 : 1, argument)
    t.match(quick.stderr, found.includes(argument) ? /^$/ : /^diskseq: [^\n]*: [^\n]+\n$/, argument)
  }
  t.strictSame(await diskseq(n, 'nonsense', ram.kname), {
    code: 1,
    stdout: `/dev/disk/by-diskseq/${n}\n/dev/disk/by-diskseq/${ram.diskseq()}\n`,
    stderr: 'diskseq: nonsense: no such path, kernel name or device-mapper name\n',
  })
  disk.deletePartition(3)
})

t.test('names are those of the tree, and no others', async (t) => {
  const texts = [
    '1',
    '01',
    '0',
    '00',
    '1p1',
    '1p0',
    '1p01',
    '1p99999',
    '1p100000',
    '1-part1',
    '1-part0',
    '1-part01',
    '1p',
    '1-part',
    '1x',
    '1p1x',
    ' 1',
    '1 ',
    '-1',
    '+1',
  ]
  texts.push('18446744073709551615', '18446744073709551616', '99999999999999999999', '1P1', '1-Part1', '１')
  for (const text of texts) {
    const { stderr } = await diskseq(text)
    const isName = /no (disk has this number|partition has this name) now/.test(stderr)
    // Number 1 may be there.
    t.equal(isName || text === '1', parseName(text) !== undefined, JSON.stringify(text))
  }
})

t.test('a program gets the open disk', async (t) => {
  const disk = loopDisk(t)
  writeFileSync(disk.file, Buffer.alloc(1 << 20, 'q'))
  const n = disk.diskseq()
  t.strictSame(await diskseq('--open', n, '--', 'head', '--bytes=3', '{}'), { code: 0, stdout: 'qqq', stderr: '' })
  t.strictSame(await diskseq('--open', n, '--', 'echo', 'a{}b{}', '{', '{}'), {
    code: 0,
    stdout: 'a/proc/self/fd/3b/proc/self/fd/3 { /proc/self/fd/3\n',
    stderr: '',
  })
  const flags = ['sh', '-c', 'grep ^flags: /proc/self/fdinfo/3', 'sh', '{}']
  t.match((await diskseq('--open', n, '--', ...flags)).stdout, /0\n$/)
  t.match((await diskseq('--open', n, '--write', '--', ...flags)).stdout, /2\n$/)
  t.equal((await diskseq('--open', n, '--', 'sh', '-c', 'exit 9')).code, 9)
  t.match(await diskseq('--open', n, '--', '/nonexistent'), { code: 127, stderr: /^diskseq: \/nonexistent: No such file or directory\n$/ })
  t.match(await diskseq('--open', n, '--', '/'), { code: 126, stderr: /^diskseq: \/: Permission denied\n$/ })
})

t.test('without standard descriptors the disk is none of them', async (t) => {
  const disk = loopDisk(t)
  writeFileSync(disk.file, Buffer.alloc(1 << 20, 'q'))
  for (const closed of ['<&-', '>&-', '2>&-', '<&- >&- 2>&-']) {
    await run('sh', ['-c', `${DISKSEQ} --open ${disk.path} --write -- sh -c 'echo text; echo text >&2' ${closed}`])
    await run('sh', ['-c', `${DISKSEQ} --open ${disk.path} --write -- /nonexistent ${closed}`])
  }
  t.equal((await run('head', ['--bytes=4', disk.path])).stdout, 'qqqq')
})

t.test('a path is what the kernel takes it for', async (t) => {
  const [one, two] = [loopDisk(t), loopDisk(t)]
  const dir = scratch(t)
  mkdirSync(join(dir, 'a/sub'), { recursive: true })
  mkdirSync(join(dir, 'b'))
  symlinkSync(one.path, join(dir, 'a/disk'))
  symlinkSync(two.path, join(dir, 'b/disk'))
  symlinkSync('../a/sub', join(dir, 'b/link'))
  const path = `/dev/disk/by-diskseq/${one.diskseq()}\n`
  for (const program of [diskseq, resolve]) t.equal((await program(`${dir}/b/link/../disk`)).stdout, path)
  const link = mapperLink(t, 'diskseqfs-test', one.path)
  for (const way of [link, '/dev//mapper/diskseqfs-test', '/dev/./mapper/diskseqfs-test', `${dir}/../../dev/mapper/diskseqfs-test`]) {
    for (const program of [diskseq, resolve]) t.match(await program(way), { code: 1, stdout: '', stderr: /leads to/ }, way)
  }
  for (const program of [diskseq, resolve]) t.equal((await program(`/dev/mapper/../../${dir}/a/disk`)).stdout, path)
  const long = `/dev/${'./'.repeat(2045)}${one.kname}`
  t.match(await diskseq(long), { code: 1, stdout: '', stderr: /File name too long\n$/ })
})

t.test('what it is asked wrongly', async (t) => {
  const usage = /^usage: diskseq DEVICE/
  t.match(await diskseq(), { code: 2, stdout: '', stderr: usage })
  t.match(await diskseq('--nonsense'), { code: 2, stdout: '', stderr: usage })
  t.match(await diskseq('--help'), { code: 0, stdout: usage, stderr: '' })
  for (const args of [['--open'], ['--open', '1'], ['--open', '1', '--'], ['--open', '1', 'true'], ['--open', '1', '--write', '--']]) {
    t.match(await diskseq(...args), { code: 125, stdout: '', stderr: usage }, args.join(' '))
  }
  t.match(await diskseq('--open', 'nonsense', '--', 'echo', 'ran'), { code: 125, stdout: '', stderr: /no such path/ })
  const disk = loopDisk(t)
  t.match(await run(DISKSEQ, [disk.path], { uid: NOBODY, gid: NOBODY }), { code: 1, stderr: /permission denied; run this as root\n$/ })
  const { stderr } = await diskseq('a\u001b[31m\nb')
  t.equal(stderr, 'diskseq: a?[31m?b: no such path, kernel name or device-mapper name\n', 'nothing reaches the terminal')
  t.equal((await run('sh', ['-c', `${DISKSEQ} ${disk.path} >/dev/full`])).code, 1, 'what cannot be written is no success')
})
