/** Names and node ids: one name for one thing, one id for one device, and nothing else is a name. */
import t from 'tap'

import { type DiskSeq, linkName, NAME_LENGTH_MAX, nodeId, nodeName, parseDiskSeq, parseName, waitingId } from '../src/diskseq.js'

const MAX = 2n ** 64n - 1n
const seq = (value: bigint) => value as DiskSeq

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
    '', '.', '..', '/', 'p', 'p1', '-part1',
    '0', '00', '05', '0p1', '05p1', '-1', '+5', ' 5', '5 ', '5p 1', '5.0', '5e3', '0x5', '1_000', '5n',
    '5p', '5p0', '5p01', '5P1', '5p1p1', '5p-1', '5p+1', '5p1-part1', '5p100000',
    '5-part', '5-part0', '5-part01', '5-Part1', '5-part1p1', '5part1', '5--part1', '5-part100000',
    `${MAX + 1n}`, `${MAX + 1n}p1`, '99999999999999999999', '100000000000000000000',
    '5'.repeat(300), `5p${'1'.repeat(300)}`, 'x'.repeat(NAME_LENGTH_MAX + 1),
    '5\n', '\n5', '5\np1', '5p1\n', '1\n5', '5\r', '5\0', '5p1\0',
    Buffer.from([0x35, 0xff]).toString('latin1'),
    Buffer.from([0xc3, 0x35]).toString('latin1'),
    Buffer.from([0xa0, 0x35]).toString('latin1'),
    Buffer.from([0x35, 0xb2]).toString('latin1'),
    '\u0665', '5p\u0661', '\uff15',
  ]
  for (const name of names) t.equal(parseName(name), undefined, JSON.stringify(name.slice(0, 40)))
})

t.test('no name is longer than the longest there can be', async (t) => {
  t.equal(`${MAX}-part99999`.length, NAME_LENGTH_MAX)
})

t.test('what is made of numbers is read back as these numbers', async (t) => {
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

t.test('each disk, partition and symlink has a node id of its own, and none is the root', async (t) => {
  const diskseqs = new Set<bigint>()
  for (let i = 1n; i <= 600n; i++) diskseqs.add(i)
  for (let bit = 0n; bit < 52n; bit++) {
    for (const near of [-1n, 0n, 1n]) {
      const value = (1n << bit) + near
      if (value >= 1n && value < 1n << 52n) diskseqs.add(value)
    }
  }
  const partitions = [...Array(130).keys(), 255, 256, 511, 512, 1022, 1023]
  const seen = new Set<bigint>()
  let asked = 0
  let outOfRange = 0
  for (const diskseq of diskseqs) {
    for (const partition of partitions) {
      for (const symlink of [false, true]) {
        const id = nodeId(seq(diskseq), partition, symlink)
        asked += 2 // itself, and the link that stands for it while its disk is slow
        for (const each of id === undefined ? [undefined] : [id, waitingId(id)]) {
          if (each === undefined || each <= 1n || each > MAX) outOfRange++
          else seen.add(each)
        }
      }
    }
  }
  t.equal(outOfRange, 0, 'all of them fit into 64 bits, above the ids 0 and 1')
  t.equal(seen.size, asked, `${asked} different ids`)
})

t.test('a node id stays the same for ever', async (t) => {
  // A kernel that outlives the daemon has them from the one before.
  t.equal(nodeId(seq(13n), 0, false), 13n << 12n)
  t.equal(nodeId(seq(13n), 1, false), (13n << 12n) | 2n)
  t.equal(nodeId(seq(13n), 1, true), (13n << 12n) | 3n)
})

t.test('numbers too large for a node id have none', async (t) => {
  t.type(nodeId(seq(2n ** 52n - 1n), 1023, true), 'bigint')
  t.equal(nodeId(seq(2n ** 52n), 0, false), undefined)
  t.equal(nodeId(seq(2n ** 52n + 1n), 0, false), undefined)
  t.equal(nodeId(seq(MAX), 0, false), undefined)
  t.equal(nodeId(seq(1n), 1024, false), undefined)
  t.equal(nodeId(seq(1n), 99999, true), undefined)
})
