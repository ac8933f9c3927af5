// SPDX-License-Identifier: MIT
/** `diskseqfs list`: what sysfs has, for people and for programs, with or without a daemon. */
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { humanSize, type Listed } from '../../src/commands/columns.js'
import { deviceType, tree } from '../../src/commands/list.js'
import { printable } from '../../src/util/text.js'
import { native } from '../../src/native.js'
import { type Device, parseDevice, Sysfs } from '../../src/devices/sysfs.js'
import { stoppedCaller } from '../helpers/stopped.js'
import { cleanup, CLI, loopDisk, run, type RunningTree, startTree, zramDisk } from '../helpers/tree.js'

const NOBODY = 65534

/** Without NODE_OPTIONS, by which tap loads itself into each node. */
const PROGRAM = ['--unset=NODE_OPTIONS', process.execPath, CLI, 'list']
const list = (...args: string[]) => run('env', [...PROGRAM, ...args])

async function listed(): Promise<Listed[]> {
  const { code, stdout, stderr } = await list('--json')
  if (code !== 0 || stderr !== '') throw new Error(stderr)
  return (JSON.parse(stdout) as { devices: Listed[] }).devices
}

/** The line of the table for a kernel name. */
async function line(kname: string): Promise<string[]> {
  const { stdout } = await list()
  const [found, ...others] = stdout.split('\n').filter((line) => line.trim().split(/ +/)[1] === kname)
  if (found === undefined || others.length > 0) throw new Error(`not one line for ${kname}:\n${stdout}`)
  return found.trim().split(/ +/)
}

/** A loop device on a file of that name. */
function loopOn(t: Test, name: string): { kname: string; file: string } {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-list-'))
  const file = join(directory, name)
  writeFileSync(file, Buffer.alloc(65536))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  return loopDisk(t, { file })
}

t.test('a loop device is known by its file', async (t) => {
  const disk = loopDisk(t, { size: 3 << 20 })
  const entry = (await listed()).find(({ kname }) => kname === disk.kname)
  t.strictSame(entry, {
    diskseq: disk.diskseq(),
    name: disk.diskseq(),
    kname: disk.kname,
    majmin: readFileSync(`/sys/class/block/${disk.kname}/dev`, 'utf8').trim(),
    size: 3 << 20,
    ro: false,
    type: 'loop',
    holder: disk.file,
    children: [],
  })
  t.strictSame(await line(disk.kname), [disk.diskseq(), disk.kname, entry?.majmin, '3M', '0', 'loop', disk.file])
})

t.test('a read-only disk is shown as one', async (t) => {
  const disk = loopDisk(t, { args: ['--read-only'] })
  t.equal((await listed()).find(({ kname }) => kname === disk.kname)?.ro, true)
  t.equal((await line(disk.kname))[4], '1')
})

t.test('partitions are listed below their disk, in order', async (t) => {
  const disk = loopDisk(t)
  disk.addPartition(10, 512, 128)
  disk.addPartition(2, 64, 128)
  const entry = (await listed()).find(({ kname }) => kname === disk.kname)
  t.match(entry?.children, [
    { diskseq: disk.diskseq(), name: `${disk.diskseq()}p2`, kname: `${disk.kname}p2`, size: 65536, type: 'part', holder: null },
    { diskseq: disk.diskseq(), name: `${disk.diskseq()}p10`, kname: `${disk.kname}p10`, size: 65536, type: 'part', holder: null },
  ])
  const { stdout } = await list()
  const lines = stdout.split('\n')
  const at = lines.findIndex((line) => line.startsWith(`${disk.diskseq()} `))
  t.match(lines[at + 1], new RegExp(`^  ${disk.diskseq()}p2 +${disk.kname}p2 .* 64K +0 part$`))
  t.match(lines[at + 2], new RegExp(`^  ${disk.diskseq()}p10 +${disk.kname}p10 .* 64K +0 part$`))
  disk.deletePartition(10)
  disk.deletePartition(2)
})

t.test('a zram disk is a disk of its size', async (t) => {
  const disk = zramDisk(t, { size: 5 << 20 })
  t.match(
    (await listed()).find(({ kname }) => kname === disk.kname),
    {
      name: disk.diskseq(),
      size: 5 << 20,
      ro: false,
      type: 'disk',
      holder: null,
    },
  )
})

t.test('a loop device without a file is not listed', async (t) => {
  const disk = loopDisk(t)
  disk.detach()
  t.notOk((await listed()).some(({ kname }) => kname === disk.kname))
})

t.test('the list is sorted by sequence number, as a number', async (t) => {
  loopDisk(t)
  zramDisk(t)
  loopDisk(t)
  const numbers = (await listed()).map(({ diskseq }) => BigInt(diskseq))
  t.ok(numbers.length >= 3)
  t.strictSame(
    numbers,
    [...numbers].sort((a, b) => (a < b ? -1 : 1)),
  )
  const { stdout } = await list()
  const shown = stdout
    .split('\n')
    .filter((line) => /^\d/.test(line))
    .map((line) => BigInt(line.split(' ')[0] as string))
  t.strictSame(
    shown,
    [...shown].sort((a, b) => (a < b ? -1 : 1)),
    'the table has the same order',
  )
})

t.test('the table has a heading, and columns that line up', async (t) => {
  loopDisk(t)
  const lines = (await list()).stdout.trimEnd().split('\n')
  t.match(lines[0], /^NAME +KNAME +MAJ:MIN +SIZE RO TYPE +HOLDER$/)
  const at = (lines[0] as string).indexOf('KNAME')
  for (const line of lines.slice(1)) t.match(line.slice(at - 1, at + 1), /^ \S$/)
})

t.test('a file name cannot write to the terminal', async (t) => {
  const { kname, file } = loopOn(t, 'a\u001b]0;evil\u0007\nb\u009b31m')
  const { stdout } = await list()
  t.notMatch(stdout, /[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/)
  const shown = stdout.split('\n').filter((line) => line.includes(` ${kname} `))
  t.equal(shown.length, 1)
  t.match(shown[0], /a\?\]0;evil\?\?b/)
  const json = await list('--json')
  t.notMatch(json.stdout, /[\u0000-\u0009\u000b-\u001f\u007f-\u009f]/, 'nor as JSON')
  t.equal((await listed()).find((entry) => entry.kname === kname)?.holder, file, 'JSON has the name as it is')
})

t.test('a file name may have letters of any script, and blanks', async (t) => {
  const { kname, file } = loopOn(t, 'Gäste – 客 disk.img ')
  t.equal((await listed()).find((entry) => entry.kname === kname)?.holder, file)
  t.match((await list()).stdout, file.trimEnd())
})

t.test('it is the same with and without a daemon, and for a user that may open no disk', async (t) => {
  const disk = loopDisk(t)
  const of = (entries: Listed[]) => entries.find(({ kname }) => kname === disk.kname)
  const without = of(await listed())
  await startTree(t)
  t.strictSame(of(await listed()), without)
  const { code, stdout, stderr } = await run('env', [...PROGRAM, '--json'], { uid: NOBODY, gid: NOBODY })
  t.strictSame({ code, stderr }, { code: 0, stderr: '' })
  t.strictSame(of(JSON.parse(stdout).devices), without)
})

t.test('without sysfs it says so', async (t) => {
  for (const options of ['', '--json']) {
    const { code, stdout, stderr } = await run('unshare', [
      '--mount',
      'sh',
      '-c',
      `mount -t tmpfs none /sys; exec env ${PROGRAM.join(' ')} ${options}`,
    ])
    t.strictSame({ code, stdout }, { code: 1, stdout: '' })
    t.equal(stderr, 'diskseqfs: cannot read /sys/class/block: ENOENT; is sysfs mounted at /sys?\n')
  }
})

t.test('without any disk there is a heading, or an empty list', async (t) => {
  const none = (options: string) =>
    run('unshare', ['--mount', 'sh', '-c', `mount -t tmpfs none /sys; mkdir -p /sys/class/block; exec env ${PROGRAM.join(' ')} ${options}`])
  t.strictSame(await none(''), { code: 0, stdout: 'NAME KNAME MAJ:MIN SIZE RO TYPE HOLDER\n', stderr: '' })
  const { code, stdout } = await none('--json')
  t.strictSame({ code, devices: JSON.parse(stdout) }, { code: 0, devices: { devices: [] } })
})

/** A device as sysfs has it. */
function device(kname: string, diskseq: number | bigint, partition = 0): Device {
  const found = parseDevice(
    kname,
    `MAJOR=8\nMINOR=${partition}\nDEVNAME=${kname.replaceAll('!', '/')}\nDISKSEQ=${diskseq}\n` +
      (partition === 0 ? 'DEVTYPE=disk\n' : `DEVTYPE=partition\nPARTN=${partition}\n`),
  )
  if (found === undefined) throw new Error(`no device: ${kname}`)
  return found
}

t.test('deviceType', async (t) => {
  for (const [kname, dmUuid, mdLevel, type] of [
    ['sda', undefined, undefined, 'disk'],
    ['nvme0n1', undefined, undefined, 'disk'],
    ['zram0', undefined, undefined, 'disk'],
    ['loop7', undefined, undefined, 'loop'],
    ['sr0', undefined, undefined, 'rom'],
    ['md127', undefined, 'raid1', 'raid1'],
    ['md127', undefined, 'linear', 'linear'],
    ['md0', undefined, '', 'disk'], // stopped: it has no level
    ['dm-0', 'LVM-abcdEFGH', undefined, 'lvm'],
    ['dm-0', 'CRYPT-LUKS2-0123-name', undefined, 'crypt'],
    ['dm-0', 'mpath-3600508b4', undefined, 'mpath'],
    ['dm-0', 'part1-mpath-3600508b4', undefined, 'part'],
    ['dm-0', 'DMRAID-isw_x', undefined, 'dmraid'],
    ['dm-0', '', undefined, 'dm'],
    ['dm-0', undefined, undefined, 'dm'],
    ['dm-0', 'nodash', undefined, 'dm'],
    ['dm-0', '-dash', undefined, 'dm'],
  ] as const) {
    t.equal(deviceType(device(kname, 1), dmUuid, mdLevel), type, `${kname} ${dmUuid ?? ''}${mdLevel ?? ''}`)
  }
  t.equal(deviceType(device('loop0p1', 1, 1), undefined, undefined), 'part')
  t.equal(deviceType(device('md0p1', 1, 1), undefined, undefined), 'part')
})

t.test('humanSize', async (t) => {
  const KIB = 1024
  for (const [bytes, text] of [
    [0, '0B'],
    [512, '512B'],
    [1023, '1023B'],
    [KIB, '1K'],
    [1.5 * KIB, '1.5K'],
    [KIB ** 2, '1M'],
    [1.5 * KIB ** 3, '1.5G'],
    [465.76 * KIB ** 3, '465.8G'],
    [2 * KIB ** 4, '2T'],
    [KIB ** 5, '1P'],
    [8 * KIB ** 6, '8E'],
    [5000 * KIB ** 6, '5000E'],
  ] as const) {
    t.equal(humanSize(bytes), text)
  }
})

t.test('printable keeps letters and removes control characters', async (t) => {
  t.equal(printable('Gäste – 客 disk'), 'Gäste – 客 disk')
  t.equal(printable('a\u0000b\u001bc\u007fd\u009be\nf\tg'), 'a?b?c?d?e?f?g')
})

t.test('tree', async (t) => {
  const sysfs = new Sysfs(native, '/nonexistent')
  const devices = [
    device('sdb', 18446744073709551n), // beyond 2^53, where numbers would be rounded
    device('sda10', 9, 10),
    device('sda', 9),
    device('sdc1', 77, 1),
    device('cciss!c0d0', 10),
    device('sda2', 9, 2),
  ]
  const order = [...devices]
  const disks = tree(sysfs, devices)
  t.strictSame(
    disks.map(({ name }) => name),
    ['9', '10', String(devices[0]?.diskseq)],
    'disks by number',
  )
  t.strictSame(
    disks[0]?.children?.map(({ name }) => name),
    ['9p2', '9p10'],
    'partitions by number',
  )
  t.equal(disks[1]?.kname, 'cciss/c0d0', 'the name is as in the kernel, not as sysfs has to write it')
  t.match(disks[0], { size: 0, ro: false, type: 'disk', holder: null }, 'what sysfs does not show is left out')
  t.notOk(JSON.stringify(disks).includes('sdc1'), 'a partition whose disk has gone meanwhile is left out')
  t.strictSame(devices, order, 'the given devices are unchanged')
})

t.test('only those that are named, by whatever they are called', async (t) => {
  const disk = loopDisk(t)
  const n = disk.diskseq()
  disk.addPartition(2, 64, 128)
  const link = `${disk.file}.link`
  symlinkSync(disk.path, link)
  const majmin = readFileSync(`/sys/class/block/${disk.kname}/dev`, 'utf8').trim()
  for (const argument of [n, disk.path, link, disk.kname, majmin]) {
    const { code, stdout } = await list('-no', 'NAME', argument)
    t.strictSame({ code, stdout }, { code: 0, stdout: `${n}\n  ${n}p2\n` }, argument)
  }
  for (const argument of [`${n}p2`, `${n}-part2`, `${disk.kname}p2`]) {
    t.equal((await list('-no', 'KNAME', argument)).stdout, `${disk.kname}p2\n`, argument)
  }
  const { code, stdout, stderr } = await list('-no', 'NAME', 'nonsense', `${n}p2`, '/dev/null', '')
  t.strictSame({ code, stdout }, { code: 1, stdout: `${n}p2\n` })
  t.equal(stderr, ['nonsense', '/dev/null', ''].map((name) => `diskseqfs: ${name}: no disk or partition is called so now\n`).join(''))
  disk.deletePartition(2)
})

t.test('columns and formats are those of lsblk', async (t) => {
  const disk = loopDisk(t, { size: 3 << 20 })
  const n = disk.diskseq()
  const show = async (...args: string[]) => (await list(...args, n)).stdout
  t.equal(await show('-b', '-o', 'size,kname'), `   SIZE KNAME\n3145728 ${disk.kname}\n`)
  t.equal(await show('-n', '-o', 'SIZE'), '3M\n')
  t.equal(await show('-p', '-n', '-o', 'NAME'), `/dev/disk/by-diskseq/${n}\n`)
  t.equal(await show('-n', '-o', 'PATH,DISKSEQ'), `/dev/disk/by-diskseq/${n} ${n}\n`)
  t.match(await show('-o', '+BACK-FILE'), /^NAME +KNAME .* HOLDER +BACK-FILE\n/)
  t.equal(
    await show('-P', '-o', 'NAME,RO,MAJ:MIN,MOUNTPOINTS').then((text) => text.replace(/\d+:\d+/, 'M')),
    `NAME="${n}" RO="0" MAJ_MIN="M" MOUNTPOINTS=""\n`,
  )
  t.strictSame(JSON.parse(await show('-J', '-o', 'NAME,SIZE,PARTN,MOUNTPOINTS')), {
    devices: [{ name: n, size: 3 << 20, partn: null, mountpoints: [], children: [] }],
  })
  t.strictSame(JSON.parse(await show('-J')), JSON.parse(await show('--json')))
  const { kname } = loopOn(t, 'a "b" $c \\ d\n`')
  t.match((await list('-rno', 'BACK-FILE', kname)).stdout, /\/a\\x20"b"\\x20\$c\\x20\\x5c\\x20d\\x0a`\n$/)
  t.match((await list('-Po', 'BACK-FILE', kname)).stdout, /\/a \\x22b\\x22 \\x24c \\x5c d\\x0a\\x60"\n$/)
})

t.test('in the order of a column', async (t) => {
  const [small, large] = [loopDisk(t, { size: 1 << 20 }), loopDisk(t, { size: 900 << 20 })]
  const knames = (await list('-rno', 'KNAME', '-x', 'SIZE')).stdout.split('\n')
  t.ok(knames.indexOf(small.kname) < knames.indexOf(large.kname))
  large.addPartition(10, 2048, 64)
  large.addPartition(9, 4096, 64)
  const names = (await list('-rno', 'NAME', '-x', 'NAME', large.kname)).stdout
  t.equal(names, ['', 'p9', 'p10'].map((part) => `${large.diskseq()}${part}\n`).join(''))
  large.deletePartition(10)
  large.deletePartition(9)
})

t.test('where it is mounted', async (t) => {
  const disk = loopDisk(t, { size: 2 << 20 })
  await run('mkfs.ext4', ['-q', disk.path])
  const where = join(mkdtempSync(join(tmpdir(), 'diskseqfs-list-')), 'a b ü')
  cleanup(t, () => rmSync(join(where, '..'), { recursive: true }))
  mkdirSync(where)
  t.equal((await run('mount', [disk.path, where])).code, 0)
  cleanup(t, () => run('umount', [where]))
  t.equal((await list('-no', 'MOUNTPOINTS', disk.kname)).stdout, `${where}\n`)
})

t.test('what is asked wrongly', async (t) => {
  t.match(await list('-o', 'NAME,NONSENSE'), {
    code: 2,
    stdout: '',
    stderr: /^diskseqfs: no column is called NONSENSE; there are NAME, PATH, /,
  })
  t.match(await list('-x', ''), { code: 2, stdout: '', stderr: /no column is called/ })
  t.match(await list('-r', '-J'), {
    code: 2,
    stdout: '',
    stderr: /^diskseqfs: --raw, --json and --pairs are different formats; choose one\n$/,
  })
})

t.test('colour is for terminals, unless NO_COLOR is set', async (t) => {
  const on = (env: string) => run('script', ['--quiet', '--command', `env ${env} ${PROGRAM.join(' ')}`, '/dev/null'])
  t.match((await on('NO_COLOR=')).stdout, /^\u001b\[1mNAME/)
  t.notMatch((await on('NO_COLOR=1')).stdout, '\u001b')
  t.notMatch((await list()).stdout, '\u001b')
})

t.test('leases are those of the daemon, which is asked for nothing else', async (t) => {
  const { mountpoint } = await startTree(t)
  const [disk, other] = [loopDisk(t), loopDisk(t)]
  const { stdout: made } = await run(process.execPath, [CLI, 'attach', '--json', '--tree', mountpoint, disk.path])
  const { lease } = JSON.parse(made) as { lease: string }
  const leases = (...args: string[]) => list('--tree', mountpoint, '-no', 'KNAME,LEASES', ...args)
  t.equal((await leases(disk.kname, other.kname)).stdout, `${disk.kname} ${lease}\n${other.kname}\n`)
  const { stdout } = await list('--tree', mountpoint, '-J', '-o', 'leases', disk.kname)
  t.match(JSON.parse(stdout), { devices: [{ leases: [lease] }] })
  t.match(await list('--tree', '/nowhere', '-o', '+LEASES'), {
    code: 1,
    stdout: '',
    stderr: /^diskseqfs: \/nowhere: no tree is mounted there\n$/,
  })
  t.match(await list('--tree', '/nowhere', disk.kname), { code: 0, stderr: '' })
  await run(process.execPath, [CLI, 'detach', '--tree', mountpoint, lease])
})

t.test('pins are those of the daemon', async (t) => {
  const pinned: unknown[] = []
  const look = async ({ mountpoint }: RunningTree) => {
    const { stdout } = await list('--tree', mountpoint, '-J', '-o', 'kname,pins')
    pinned.push(...JSON.parse(stdout).devices.filter(({ pins }: { pins: unknown[] }) => pins.length > 0))
  }
  await stoppedCaller(t, 'none', { meanwhile: look })
  t.match(pinned, [{ kname: /^loop/, pins: ['caller'] }])
  t.equal(pinned.length, 1)
})
