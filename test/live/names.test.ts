// SPDX-License-Identifier: MIT
/**
 * The names that the real mount has: those of disks and partitions that exist, each in one
 * spelling. Any other name is ENOENT and opens nothing.
 */
import {
  accessSync,
  closeSync,
  constants,
  existsSync,
  fsyncSync,
  linkSync,
  lstatSync,
  mkdirSync,
  openSync,
  type PathLike,
  readdirSync,
  readFileSync,
  readlinkSync,
  readSync,
  renameSync,
  rmdirSync,
  statSync,
  symlinkSync,
  unlinkSync,
  writeSync,
} from 'node:fs'
import { dirname, join } from 'node:path'

import t, { type Test } from 'tap'

import { blk } from '../helpers/blk.js'
import { LONG, twoForms } from '../helpers/long.js'
import {
  cleanup,
  diskseqOf,
  errorOf,
  loopDisk,
  manyDisks,
  onEachTransport,
  openDevices,
  run,
  sleep,
  startBlk,
  startTree,
  type Twin,
  until,
  watchNode,
  zramDisk,
} from '../helpers/tree.js'

function opens(path: PathLike, flags: string | number = 'r'): void {
  closeSync(openSync(path, flags))
}

/** Asks for a name in all ways; the errors, each once. */
function failures(path: PathLike): string[] {
  const calls = [
    () => statSync(path),
    () => lstatSync(path),
    () => accessSync(path),
    () => readlinkSync(path),
    () => opens(path),
    () => opens(path, 'r+'),
  ]
  return [...new Set(calls.map(errorOf))]
}

onEachTransport('a good name is the disk, the partition, or the symlink', async (t, args) => {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  disk.addPartition(12, 128, 64)
  const tree = await startTree(t, { args })
  const n = disk.diskseq()
  for (const [name, device, start] of [
    [n, disk.path, 0],
    [`${n}p1`, `${disk.path}p1`, 64],
    [`${n}p12`, `${disk.path}p12`, 128],
    [`${n}-part12`, `${disk.path}p12`, 128],
  ] as const) {
    const path = join(tree.mountpoint, name)
    t.equal(statSync(path).rdev, statSync(device).rdev, `${name} has the device's number`)
    t.ok(statSync(path).isBlockDevice(), 'is a block device')
    const fd = openSync(path, 'r+')
    const mark = Buffer.alloc(512, name)
    writeSync(fd, mark, 0, mark.length, 0)
    const back = Buffer.alloc(512)
    readSync(fd, back, 0, back.length, 0)
    t.ok(back.equals(mark), 'can be written and read')
    fsyncSync(fd)
    closeSync(fd)
    const at = start * 512
    t.ok(
      readFileSync(disk.file)
        .subarray(at, at + 512)
        .equals(mark),
      'what is written is where it should be',
    )
  }
  const link = join(tree.mountpoint, `${n}-part12`)
  t.equal(readlinkSync(link), `${n}p12`, 'the symlink is relative')
  t.ok(lstatSync(link).isSymbolicLink())
  t.equal(lstatSync(link).size, `${n}p12`.length, 'its size is that of its target')
  // With the library it takes a second until no pin is left.
  await until(() => openDevices(tree.pid).length === 0, 10_000)
  disk.deletePartition(12)
  for (const name of [`${n}p12`, `${n}-part12`]) {
    t.strictSame(failures(join(tree.mountpoint, name)), ['ENOENT'], `${name}: gone with the partition`)
  }
  t.equal(
    errorOf(() => opens(join(tree.mountpoint, `${n}p1`))),
    '',
    'the other partition is still there',
  )
})

onEachTransport('any other name is ENOENT, and opens nothing', async (t, args) => {
  const zram = zramDisk(t)
  const loop = loopDisk(t)
  loop.addPartition(2, 64, 64)
  const tree = await startTree(t, { args })
  const seen = [await watchNode(t, zram.path, tree), await watchNode(t, loop.path, tree), await watchNode(t, `${loop.path}p2`, tree)]
  const z = zram.diskseq()
  const n = loop.diskseq()
  const wrapped = (seq: string, bits: bigint) => String(BigInt(seq) + (1n << bits))
  const names = [
    '0',
    '00',
    '05',
    '-1',
    '+5',
    '5p',
    '5p0',
    '5p01',
    '5-part0',
    '5-part',
    '5-part01',
    '18446744073709551616',
    '99999999999999999999',
    '18446744073709551615',
    '18446744073709551615p1',
    '4503599627370496',
    '4503599627370495p2047',
    'a',
    'loop0',
    '...',
    '-',
    'p',
    'p1',
    '-part1',
    '.hidden',
    ' ',
    '\n',
    '*',
    '%',
    '\\',
    'sda',
    'by-diskseq',
    ...[z, n].flatMap((seq) => [
      `0${seq}`,
      `-${seq}`,
      `+${seq}`,
      ` ${seq}`,
      `${seq} `,
      `${seq}\n`,
      `\n${seq}`,
      `${seq}.`,
      `${seq},`,
      `${seq}.0`,
      `${seq}e0`,
      `0x${BigInt(seq).toString(16)}`,
      `${seq}n`,
      `${seq}p`,
      `${seq}p0`,
      `${seq}-part`,
      `${seq}-part0`,
      `${seq}-part1`,
      `${seq}p1`,
      `${seq}p3`,
      `${wrapped(seq, 64n)}`,
      `${wrapped(seq, 52n)}`,
      `${wrapped(seq, 32n)}`,
      `${wrapped(seq, 65n)}`,
      [...seq].map((digit) => String.fromCodePoint(0xff10 + Number(digit))).join(''),
    ]),
    `${n}p02`,
    `${n}-part02`,
    `${n}p+2`,
    `${n}p-2`,
    `${n}P2`,
    `${n}part2`,
    `${n}-Part2`,
    `${n}--part2`,
    `${n}-part-2`,
    `${n}p2p2`,
    `${n}p2-part2`,
    `${n}-part2p2`,
    `${n}p2 `,
    `${n}p2\n`,
    `${n}-part2\n`,
    `${n}p2050`,
    `${n}p258`,
    `${n}p65538`,
    `${n}p4294967298`,
    `${n}p18446744073709551618`,
  ]
  const wrong = names.filter((name) => {
    const got = failures(`${tree.mountpoint}/${name}`)
    return got.length !== 1 || got[0] !== 'ENOENT'
  })
  t.strictSame(wrong, [], `${names.length} names that must not exist`)

  const bytes = (...tail: (number | string)[]) =>
    Buffer.concat([`${tree.mountpoint}/`, ...tail].map((part) => Buffer.from(typeof part === 'number' ? [part] : part)))
  for (const path of [
    bytes(0xff),
    bytes(n, 0xff),
    bytes(0xb2),
    bytes(0xc0, 0xb5),
    bytes(n, 'p', 0xb2),
    bytes(n, 0x80),
    bytes(0x7f),
    bytes(1),
  ]) {
    t.strictSame(failures(path), ['ENOENT'], `bytes ${path.subarray(tree.mountpoint.length + 1).toString('hex')}`)
  }
  t.strictSame(failures(`${tree.mountpoint}/${'1'.repeat(255)}`), ['ENOENT'], '255 characters')
  for (const length of [256, 300, 1024]) {
    // The kernel does not check our limit on lengths, so the name reaches the daemon.
    const [error, ...others] = failures(`${tree.mountpoint}/${'1'.repeat(length)}`)
    t.ok(others.length === 0 && (error === 'ENAMETOOLONG' || error === 'ENOENT'), `${length} characters: ${error}`)
  }
  t.strictSame(failures(`${tree.mountpoint}/${'1'.repeat(4000)}`), ['ENAMETOOLONG'], '4000 characters')
  t.equal(statSync(`${tree.mountpoint}/..`).ino, statSync(dirname(tree.mountpoint)).ino, '.. is the directory above')
  t.ok(statSync(`${tree.mountpoint}/.`).isDirectory(), '. is the tree')
  for (const since of seen) {
    t.strictSame(await since(), { open: 0, close_write: 0, close_nowrite: 0 }, 'no device was opened')
  }
  t.strictSame(openDevices(tree.pid), [])
  for (const below of [`${z}/`, `${z}/.`, `${z}/..`, `${z}/1`, `${n}-part2/x`]) {
    t.equal(
      errorOf(() => opens(`${tree.mountpoint}/${below}`)),
      'ENOTDIR',
      `${below}: a disk is no directory`,
    )
  }
})

/** What the tree should list, going by sysfs alone. */
function inSysfs(): Set<string> {
  const names = new Set<string>()
  for (const kname of readdirSync('/sys/class/block')) {
    const directory = `/sys/class/block/${kname}`
    try {
      const uevent = readFileSync(`${directory}/uevent`, 'utf8')
      const diskseq = /^DISKSEQ=(\d+)$/m.exec(uevent)?.[1]
      const partition = /^PARTN=(\d+)$/m.exec(uevent)?.[1]
      if (/^loop\d+$/.test(kname) && !existsSync(`${directory}/loop/backing_file`)) continue
      if (/^loop\d+p\d+$/.test(kname) && !existsSync(`/sys/class/block/${kname.replace(/p\d+$/, '')}/loop`)) continue
      if (partition === undefined) names.add(`${diskseq}`)
      else names.add(`${diskseq}p${partition}`).add(`${diskseq}-part${partition}`)
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error // removed meanwhile
    }
  }
  return names
}

function compare(t: Test, listed: string[], before: Set<string>, after: Set<string>): void {
  t.equal(new Set(listed).size, listed.length, 'no name twice')
  const names = new Set(listed)
  // Devices of other programs come and go while this runs.
  t.strictSame(
    [...before].filter((name) => after.has(name) && !names.has(name)),
    [],
    'nothing is missing',
  )
  t.strictSame(
    listed.filter((name) => !before.has(name) && !after.has(name)),
    [],
    'nothing is listed that is not there',
  )
}

onEachTransport('the listing is what sysfs has', async (t, args) => {
  const zram = zramDisk(t)
  const disk = loopDisk(t)
  disk.addPartition(3, 64, 64)
  const tree = await startTree(t, { args })
  const before = inSysfs()
  const listed = readdirSync(tree.mountpoint)
  compare(t, listed, before, inSysfs())
  const n = disk.diskseq()
  const type = (name: string) => (listed.includes(name) ? lstatSync(join(tree.mountpoint, name)) : undefined)
  for (const name of [zram.diskseq(), n, `${n}p3`]) t.ok(type(name)?.isBlockDevice(), `${name} is a block device`)
  t.ok(type(`${n}-part3`)?.isSymbolicLink(), 'the other name of the partition is a symlink')
})

const MANY = LONG ? 1000 : 300

onEachTransport(twoForms('hundreds of disks are listed, each once, while others come and go'), async (t, args) => {
  const file = loopDisk(t).file
  const mine = (await manyDisks(t, MANY, file)).map(diskseqOf)
  t.ok(mine.length >= MANY, `${mine.length} disks`)
  const tree = await startTree(t, { args })
  const list = async () => (await run('ls', [tree.mountpoint])).stdout.trim().split('\n')
  const before = inSysfs()
  compare(t, await list(), before, inSysfs())
  let done = false
  let changes = 0
  const changing = loopDisk(t)
  const churn = (async () => {
    while (!done) {
      await run('losetup', ['--detach', changing.path])
      const { code } = await run('losetup', [changing.path, changing.file])
      if (code === 0) changes++
    }
  })()
  try {
    const wrong: string[] = []
    for (let i = 0; i < 30; i++) {
      const listed = await list()
      const names = new Set(listed)
      if (names.size !== listed.length) wrong.push(`${listed.length} names, ${names.size} of them different`)
      wrong.push(...mine.filter((name) => !names.has(name)).map((name) => `${name} is missing`))
    }
    t.strictSame(wrong, [], 'all are listed, each once')
    for (const name of mine) statSync(join(tree.mountpoint, name))
    t.pass('each can be looked at')
    for (const name of mine.slice(0, LONG ? 200 : 60)) opens(join(tree.mountpoint, name))
    t.pass('and opened')
  } finally {
    done = true
    await churn
  }
  t.ok(changes > 0, `${changes} disks came and went meanwhile`)
})

const GONE_ROUNDS = LONG ? 50 : 15

for (const twin of [undefined, 'deaf'] as (Twin | undefined)[]) {
  t.test(twoForms(`a disk appears at once and goes at once${twin ? ', also if no uevent ever arrives' : ''}`), async (t) => {
    const tree = await startTree(t, twin ? { twin } : {})
    const wrong: string[] = []
    for (let i = 0; i < GONE_ROUNDS; i++) {
      const disk = loopDisk(t)
      const name = disk.diskseq()
      const path = join(tree.mountpoint, name)
      for (const error of [errorOf(() => (i % 2 ? statSync(path) : opens(path))), errorOf(() => opens(path))]) {
        if (error !== '') wrong.push(`${name} is there, but ${error}`)
      }
      await sleep(i % 3 === 0 ? 20 : 0)
      while (openDevices(tree.pid).length > 0) await sleep(1)
      disk.detach()
      const errors = i % 2 ? failures(path) : failures(path).reverse()
      if (errors.join() !== 'ENOENT') wrong.push(`${name} is gone, but ${errors}`)
      // The sequence number that the empty loop device has now.
      const empty = join(tree.mountpoint, disk.diskseq())
      if (!existsSync(`/sys/block/${disk.kname}/loop/backing_file`)) {
        const errors = failures(empty)
        if (existsSync(`/sys/block/${disk.kname}/loop/backing_file`)) continue // another program took it
        if (errors.join() !== 'ENOENT') wrong.push(`${disk.diskseq()} is an empty loop device, but ${errors}`)
        if (!twin && readdirSync(tree.mountpoint).includes(disk.diskseq())) wrong.push(`${disk.diskseq()} is listed`)
      }
    }
    t.strictSame(wrong, [])
  })
}

onEachTransport('a partition left over on an empty loop device has no name', async (t, args) => {
  const disk = loopDisk(t)
  cleanup(t, () => blk('partition', 'del', disk.path, '1'))
  await blk('partition', 'add', disk.path, '1', '64', '64')
  const tree = await startTree(t, { args })
  const old = `${disk.diskseq()}p1`
  t.equal(
    errorOf(() => opens(join(tree.mountpoint, old))),
    '',
    'the partition can be opened',
  )
  while (openDevices(tree.pid).length > 0) await sleep(1)
  // losetup leaves alone partitions that it was not asked to scan for.
  disk.detach()
  const now = `${disk.diskseq()}p1`
  t.ok(existsSync(`/sys/class/block/${disk.kname}p1`), 'the kernel has kept the partition')
  t.not(existsSync(`/sys/class/block/${disk.kname}/loop/backing_file`), true, 'the loop device is empty')
  for (const name of [old, now]) {
    t.strictSame(failures(join(tree.mountpoint, name)), ['ENOENT'], name)
    t.notOk(readdirSync(tree.mountpoint).includes(name), `${name} is not listed`)
  }
})

onEachTransport('the shape of the tree cannot be changed, not even by root', async (t, args) => {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  const tree = await startTree(t, { args })
  const n = disk.diskseq()
  const there = (name: string) => join(tree.mountpoint, name)
  const calls: Record<string, () => unknown> = {
    create: () => openSync(there('x'), 'wx'),
    'create by a good name': () => openSync(there('4000000000'), 'w'),
    'create by a good name that is gone': () => openSync(there(`${n}p9`), constants.O_CREAT | constants.O_RDWR),
    mkdir: () => mkdirSync(there('x')),
    'mkdir of a directory and the ones above': () => mkdirSync(there('x/y/z'), { recursive: true }),
    'unlink of a disk': () => unlinkSync(there(n)),
    'unlink of a partition': () => unlinkSync(there(`${n}p1`)),
    'unlink of a symlink': () => unlinkSync(there(`${n}-part1`)),
    rename: () => renameSync(there(n), there('x')),
    'rename over another': () => renameSync(there(n), there(`${n}-part1`)),
    symlink: () => symlinkSync('/dev/null', there('x')),
    link: () => linkSync(there(n), there('x')),
  }
  for (const [what, call] of Object.entries(calls)) t.equal(errorOf(call), 'EPERM', what)
  const O_TMPFILE = 0o20000000 | constants.O_DIRECTORY
  // The library does not have such files.
  const refused = args.includes('fuse-native') ? 'ENOTSUP' : 'EPERM'
  t.equal(
    errorOf(() => openSync(tree.mountpoint, O_TMPFILE | constants.O_RDWR)),
    refused,
    'a file without a name',
  )
  t.equal(
    errorOf(() => rmdirSync(there(n))),
    'ENOTDIR',
    'rmdir',
  )
  for (const args of [
    ['mknod', there('x'), 'b', '7', '0'],
    ['mknod', there('x'), 'p'],
    ['mkdir', '-p', there('x/y')],
    ['ln', '-sf', '/dev/null', there(n)],
    ['ln', '-sfT', '/dev/null', there('x')],
    ['mv', there(n), there('x')],
    ['rm', '-f', there(n)],
  ] as const) {
    const [file, ...rest] = args
    const { code, stderr } = await run(file, rest)
    t.ok(code !== 0 && /Operation not permitted/.test(stderr), `${file} ${rest[0]}: ${stderr.trim()}`)
  }
  t.ok(existsSync(there(n)) && existsSync(there(`${n}-part1`)), 'all is still there')
  for (const flags of ['w', 'a', 'w+', constants.O_CREAT | constants.O_RDONLY]) {
    t.equal(
      errorOf(() => opens(there(n), flags)),
      '',
      `a disk can be opened with flags ${flags} (O_CREAT)`,
    )
  }
  t.equal(
    errorOf(() => opens(there(n), 'wx')),
    'EEXIST',
    'but not with O_EXCL as well',
  )
})

t.test('udev, which removes its links from before the mount, gets ENOENT', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t)
  const node = join(tree.mountpoint, disk.diskseq())
  for (const [comm, errno] of [
    ['(udev-worker)', 'ENOENT'],
    ['systemd-udevd', 'ENOENT'],
    ['udev-worker', 'EPERM'],
  ] as const) {
    // A thread may choose its own name.
    const script = `require('fs').writeFileSync('/proc/self/comm', process.argv[1]); try { require('fs').unlinkSync(process.argv[2]) } catch (error) { console.log(error.code) }`
    const answer = await run(process.execPath, ['-e', script, comm, node])
    t.equal(answer.stdout.trim(), errno, comm)
  }
  t.ok(existsSync(node), 'the node is still there')
})

/** What another open through an O_PATH descriptor leads to, after the loop device got another disk. */
async function reopen(t: Test, twin?: Twin) {
  const disk = loopDisk(t)
  // The descriptor keeps the name in use; so the daemon keeps the disk until the hold is over.
  const tree = await startTree(t, twin ? { twin, expectErrors: true } : { args: ['--hold', '1'] })
  const holder = await startBlk(t, 'hold', '--path', join(tree.mountpoint, disk.diskseq()), '--flags', 'path')
  const before = JSON.parse(await holder.ask()) as { diskseq?: number }
  t.equal(before.diskseq, Number(disk.diskseq()), 'it leads to the disk while that exists')
  while (openDevices(tree.pid).length > 0) await sleep(1)
  disk.detach()
  const gone = JSON.parse(await holder.ask()) as { error?: number }
  // Another program may have taken the device first. Its disk does as well.
  const { code } = await run('losetup', [disk.path, disk.file])
  if (code === 0) cleanup(t, () => run('losetup', ['--detach', disk.path]))
  const replaced = JSON.parse(await holder.ask()) as { error?: number; diskseq?: number }
  return { gone, replaced, next: Number(disk.diskseq()) }
}

t.test('a descriptor of the node does not lead to the next disk', async (t) => {
  const { gone, replaced } = await reopen(t)
  t.strictSame(gone, { error: 6 }, 'ENXIO once the disk is gone')
  t.strictSame(replaced, { error: 6 }, 'ENXIO once another one has its number')
})

t.test('twin: if no caller counts as an opener, it does', async (t) => {
  const { replaced, next } = await reopen(t, 'always-inspect')
  t.strictSame(replaced, { diskseq: next }, "the next disk's diskseq")
})

t.test('stat shows the same as for the device node', async (t) => {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  const tree = await startTree(t)
  const n = disk.diskseq()
  for (const [name, device] of [
    [n, disk.path],
    [`${n}p1`, `${disk.path}p1`],
    [`${n}-part1`, `${disk.path}p1`],
  ] as const) {
    const shown = statSync(join(tree.mountpoint, name), { bigint: true })
    const own = statSync(device, { bigint: true })
    for (const field of ['mode', 'uid', 'gid', 'rdev', 'nlink', 'size', 'blksize', 'blocks', 'atimeNs', 'mtimeNs', 'ctimeNs'] as const) {
      t.equal(shown[field], own[field], `${name}: ${field}`)
    }
  }
  const inodes = [n, `${n}p1`, `${n}-part1`].map((name) => lstatSync(join(tree.mountpoint, name)).ino)
  t.equal(new Set(inodes).size, 3, 'each name has an inode number of its own')
  const root = statSync(tree.mountpoint)
  // A reader of a directory can hold its lock for ever: see Tree.rootAttr().
  t.equal(root.mode, 0o41711, 'the tree itself is a directory that only root may change, or read')
})

onEachTransport('statfs works, and df', async (t, args) => {
  const tree = await startTree(t, { args })
  const { code, stdout } = await run('stat', ['-f', '-c', '%l %s %b', tree.mountpoint])
  t.equal(code, 0)
  t.equal(stdout.trim(), '255 4096 0', 'name length, block size, no blocks')
  const df = await run('df', [tree.mountpoint])
  t.equal(df.code, 0)
  t.match(df.stdout, tree.mountpoint)
  // Monitoring would report 100 % as an alarm.
  const inodes = await run('df', ['--output=itotal,iused,ipcent', tree.mountpoint])
  t.match(inodes.stdout, /^ *0 +0 +- *$/m, 'no inodes are counted, as on other file systems of devices')
})
