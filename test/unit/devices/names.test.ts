// SPDX-License-Identifier: MIT
/** Names and node ids: one name for one thing, one id for one device, and nothing else is a name. */
import t from 'tap'

import {
  directoryId,
  type DiskSeq,
  entryCookie,
  inodeId,
  linkId,
  type LinkKind,
  linkName,
  mangledDmName,
  NAME_LENGTH_MAX,
  nodeName,
  parseDiskSeq,
  parseId,
  parseName,
  sameDmName,
} from '../../../src/devices/names.js'

const MAX = 2n ** 64n - 1n
const seq = (value: bigint) => value as DiskSeq

const LINKS: readonly LinkKind[] = ['part', 'waiting', 'kernel', 'unknown', 'own']

/** Numbers at both ends of each bit, and some in sequence. */
function numbers(bits: bigint): DiskSeq[] {
  const values = new Set<bigint>()
  for (let i = 1n; i <= 300n; i++) values.add(i)
  for (let bit = 0n; bit <= bits; bit++) {
    for (const near of [-1n, 0n, 1n]) {
      const value = (1n << bit) + near
      if (value >= 1n && value < 1n << bits) values.add(value)
    }
  }
  return [...values] as DiskSeq[]
}

t.test('a name says which disk and which partition', async (t) => {
  const names: [string, bigint, number, boolean][] = [
    ['13', 13n, 0, false],
    ['1', 1n, 0, false],
    ['13p1', 13n, 1, false],
    ['13p255', 13n, 255, false],
    ['13-part1', 13n, 1, true],
    ['10-part20', 10n, 20, true],
    [`${MAX}`, MAX, 0, false],
    [`${MAX}p1`, MAX, 1, false],
    [`${MAX}-part99999`, MAX, 99999, true],
  ]
  for (const [name, diskseq, partition, symlink] of names) {
    t.strictSame(parseName(name), { diskseq, partition, symlink }, name)
  }
})

t.test('everything else is no name', async (t) => {
  const names = [
    '',
    '.',
    '..',
    '/',
    'p',
    'p1',
    '-part1',
    '0',
    '00',
    '05',
    '0p1',
    '05p1',
    '-1',
    '+5',
    ' 5',
    '5 ',
    '5p 1',
    '5.0',
    '5e3',
    '0x5',
    '1_000',
    '5n',
    '5p',
    '5p0',
    '5p01',
    '5P1',
    '5p1p1',
    '5p-1',
    '5p+1',
    '5p1-part1',
    '5p100000',
    '5-part',
    '5-part0',
    '5-part01',
    '5-Part1',
    '5-part1p1',
    '5part1',
    '5--part1',
    '5-part100000',
    `${MAX + 1n}`,
    `${MAX + 1n}p1`,
    '99999999999999999999',
    '100000000000000000000',
    '5'.repeat(300),
    `5p${'1'.repeat(300)}`,
    'x'.repeat(NAME_LENGTH_MAX + 1),
    '5\n',
    '\n5',
    '5\np1',
    '5p1\n',
    '1\n5',
    '5\r',
    '5\0',
    '5p1\0',
    Buffer.from([0x35, 0xff]).toString('latin1'),
    Buffer.from([0xc3, 0x35]).toString('latin1'),
    Buffer.from([0xa0, 0x35]).toString('latin1'),
    Buffer.from([0x35, 0xb2]).toString('latin1'),
    '\u0665',
    '5p\u0661',
    '\uff15',
  ]
  for (const name of names) t.equal(parseName(name), undefined, JSON.stringify(name.slice(0, 40)))
})

t.test('no name is longer than the longest there can be', async (t) => {
  t.equal(`${MAX}-part99999`.length, NAME_LENGTH_MAX)
})

t.test('a name made of numbers is parsed into the same numbers', async (t) => {
  for (const diskseq of [1n, 9n, 10n, 13n, 2n ** 32n, 2n ** 53n + 1n, MAX]) {
    for (const partition of [0, 1, 9, 10, 128, 255, 256, 99999]) {
      const name = nodeName(seq(diskseq), partition)
      t.strictSame(parseName(name), { diskseq, partition, symlink: false }, name)
      if (partition === 0) continue
      const link = linkName(seq(diskseq), partition)
      t.strictSame(parseName(link), { diskseq, partition, symlink: true }, link)
    }
  }
})

t.test('a diskseq is decimal, at least 1, and has 64 bits', async (t) => {
  t.equal(parseDiskSeq('1'), 1n)
  t.equal(parseDiskSeq(`${MAX}`), MAX)
  for (const text of ['', '0', '01', '-1', '+1', ' 1', '1 ', '1\n', 'x', '1p1', `${MAX + 1n}`, '9'.repeat(21)]) {
    t.equal(parseDiskSeq(text), undefined, JSON.stringify(text))
  }
})

t.test('each disk, partition and symlink has an id of its own, and none has that of the root', async (t) => {
  const seen = new Set<bigint>()
  let asked = 0
  let outOfRange = 0
  const add = (id: bigint | undefined) => {
    asked++
    if (id === undefined || id <= 1n || id > MAX) outOfRange++
    else seen.add(id)
  }
  for (const diskseq of numbers(51n)) {
    add(inodeId(diskseq, 0, 0))
    add(directoryId(diskseq))
    for (const partition of [0, 1, 2, 127, 128, 254, 255]) {
      for (const kind of LINKS) if (kind !== 'part' || partition !== 0) add(linkId(diskseq, partition, kind))
    }
  }
  for (const diskseq of numbers(35n)) {
    for (const partition of [1, 2, 127, 128, 254, 255]) {
      for (const minor of [0, 1, 2, 255, 256, 0x7ffff, 0x80000, 0xfffff]) add(inodeId(diskseq, partition, minor))
    }
  }
  t.equal(outOfRange, 0, 'all of them fit into 64 bits, above the ids 0 and 1')
  t.equal(seen.size, asked, `${asked} different ids`)
})

t.test('two device numbers of one partition are two inodes', async (t) => {
  const ids = Array.from({ length: 4096 }, (_, minor) => inodeId(seq(13n), 1, minor))
  t.equal(new Set(ids).size, ids.length)
  t.notOk(ids.includes(undefined))
  t.equal(inodeId(seq(13n), 0, 1), inodeId(seq(13n), 0, 2), 'a disk has one number all its life')
})

t.test('an id can be taken apart again', async (t) => {
  let wrong = 0
  let asked = 0
  const expect = (id: bigint | undefined, made: object) => {
    asked++
    if (id !== undefined && JSON.stringify(parseId(id), text) === JSON.stringify(made, text)) return
    if (wrong++ === 0) t.strictSame(id === undefined ? undefined : parseId(id), made, `id ${id}`)
  }
  const text = (_: string, value: unknown) => (typeof value === 'bigint' ? `${value}` : value)
  for (const diskseq of numbers(51n)) {
    expect(inodeId(diskseq, 0, 7), { diskseq, partition: 0, kind: 'inode', minor: undefined })
    for (const partition of [0, 1, 254, 255]) {
      for (const kind of LINKS) {
        if (kind !== 'part' || partition !== 0) expect(linkId(diskseq, partition, kind), { diskseq, partition, kind })
      }
    }
  }
  for (const diskseq of numbers(35n)) {
    for (const partition of [1, 128, 255]) {
      for (const minor of [0, 1, 0xfffff]) expect(inodeId(diskseq, partition, minor), { diskseq, partition, kind: 'inode', minor })
    }
  }
  t.equal(wrong, 0, `${asked} ids`)
})

t.test('an id that is never made cannot be taken apart', async (t) => {
  const partitionInode = 1n << 63n
  const ids: [bigint, string][] = [
    [0n, 'none'],
    [1n, 'the root'],
    [2n, 'partition 1 of no disk'],
    [3n, 'its symlink'],
    [1n << 11n, 'the diskseq that stands for no disk'],
    [(1n << 12n) - 1n, 'all bits but those of a disk'],
    [(13n << 12n) | 1n, 'a symlink of a whole disk'],
    [(13n << 12n) | 2n, "a partition's inode in the form that disks have"],
    [partitionInode, 'a partition of nothing'],
    [partitionInode | (1n << 20n), 'partition 1 of no disk, with its number'],
    [partitionInode | (13n << 28n), 'partition 0 of a disk'],
    [partitionInode | (13n << 28n) | 5n, 'the same with a number'],
  ]
  for (const [id, what] of ids) t.equal(parseId(id), undefined, what)
})

t.test('the parts of an id make the same id again, whatever the kernel asks for', async (t) => {
  let made = 0
  let nothing = 0
  const wrong: bigint[] = []
  let id = 0x1234567n
  for (let i = 0; i < 50_000; i++) {
    // splitmix64
    id = (id + 0x9e3779b97f4a7c15n) & MAX
    let mixed = ((id ^ (id >> 30n)) * 0xbf58476d1ce4e5b9n) & MAX
    mixed = ((mixed ^ (mixed >> 27n)) * 0x94d049bb133111ebn) & MAX
    // Ids of both forms, with few bits and with many.
    const asked = i % 3 === 0 ? mixed & 0xffffffn : i % 3 === 1 ? mixed >> 1n : mixed | (1n << 63n)
    const parsed = parseId(asked)
    if (parsed === undefined) {
      nothing++
      continue
    }
    made++
    const { diskseq, partition, kind } = parsed
    const again =
      kind === 'inode'
        ? inodeId(diskseq, partition, parsed.minor ?? 0)
        : kind === 'directory'
          ? directoryId(diskseq)
          : linkId(diskseq, partition, kind)
    if (again !== asked) wrong.push(asked)
  }
  t.strictSame(wrong, [])
  t.ok(made > 10_000 && nothing > 100, `${made} of something, ${nothing} of nothing`)
})

t.test('an id stays the same for ever', async (t) => {
  // The kernel keeps the ids of one daemon for the next.
  t.equal(inodeId(seq(13n), 0, 0), 13n << 12n)
  t.equal(inodeId(seq(13n), 1, 5), (1n << 63n) | (13n << 28n) | (1n << 20n) | 5n)
  t.equal(linkId(seq(13n), 1, 'part'), (13n << 12n) | 3n)
  t.equal(linkId(seq(13n), 0, 'waiting'), (13n << 12n) | (1n << 11n))
  t.equal(linkId(seq(13n), 1, 'waiting'), (13n << 12n) | (1n << 11n) | 2n)
  t.equal(linkId(seq(13n), 1, 'unknown'), (13n << 12n) | (1n << 11n) | 3n)
})

t.test('numbers that are too large have no id', async (t) => {
  t.type(inodeId(seq(2n ** 51n - 1n), 0, 0), 'bigint')
  t.equal(inodeId(seq(2n ** 51n), 0, 0), undefined)
  t.equal(inodeId(seq(2n ** 51n + 1n), 0, 0), undefined)
  t.equal(inodeId(seq(MAX), 0, 0), undefined)
  t.type(inodeId(seq(2n ** 35n - 1n), 255, 0xfffff), 'bigint')
  t.equal(inodeId(seq(2n ** 35n), 1, 0), undefined, 'fewer disks have partitions')
  t.equal(inodeId(seq(1n), 256, 0), undefined)
  t.equal(inodeId(seq(1n), 99999, 0), undefined)
  for (const kind of LINKS) {
    t.type(linkId(seq(2n ** 51n - 1n), 255, kind), 'bigint')
    t.equal(linkId(seq(2n ** 51n), 1, kind), undefined)
    t.equal(linkId(seq(MAX), 1, kind), undefined)
    t.equal(linkId(seq(1n), 256, kind), undefined)
    t.equal(linkId(seq(1n), 99999, kind), undefined)
  }
})

t.test('entries of the directory ascend by disk, then partition, then symlink', async (t) => {
  const cookies: bigint[] = [1n, 2n] // of "." and ".."
  for (const diskseq of [1n, 2n, 9n, 10n, 2n ** 35n - 1n, 2n ** 51n - 1n]) {
    cookies.push(entryCookie(seq(diskseq), 0))
    for (const partition of [1, 2, 9, 10, 255, 1023]) {
      const cookie = entryCookie(seq(diskseq), partition)
      cookies.push(cookie, cookie + 1n)
    }
  }
  t.strictSame(
    cookies,
    [...cookies].sort((a, b) => (a < b ? -1 : 1)),
  )
  t.equal(new Set(cookies).size, cookies.length, 'none twice')
  t.ok((cookies.at(-1) as bigint) < 1n << 63n, 'all are positive as an loff_t')
})

t.test('device-mapper names as the kernel has them', async (t) => {
  for (const [name, mangled] of [
    ['vm-root', 'vm-root'],
    ['a#b+c.d:e=f@g_h', 'a#b+c.d:e=f@g_h'],
    ['two words', 'two\\x20words'],
    ['two\\x20words', 'two\\x20words'],
    ['a\\b', 'a\\x5cb'],
    ['\u00fc\u{1f600}', '\\xc3\\xbc\\xf0\\x9f\\x98\\x80'],
  ] as const) {
    t.equal(mangledDmName(name), mangled)
  }
  t.ok(sameDmName('a b', 'a\\x20b') && sameDmName('a\\x20b', 'a b') && sameDmName('..', '..'))
  t.notOk(sameDmName('a b', 'a_b') || sameDmName('..', '.') || sameDmName('', 'a'))
  for (const name of ['', '.', '..', 'control', 'a/b', 'a\0']) t.equal(mangledDmName(name), undefined, JSON.stringify(name))
})
