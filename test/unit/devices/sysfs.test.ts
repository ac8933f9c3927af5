// SPDX-License-Identifier: MIT
/** sysfs: what is a device, what is none, and what a /sys/class/block contains. */
import { fstatSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { E, errnoName, Exhausted } from '../../../src/util/errno.js'
import { native } from '../../../src/native.js'
import { type Device, parseDevice, sameDevice, Sysfs, valueOf } from '../../../src/devices/sysfs.js'

const DISK = 'MAJOR=7\nMINOR=0\nDEVNAME=loop0\nDEVTYPE=disk\nDISKSEQ=13\n'
const PARTITION =
  'MAJOR=259\nMINOR=3\nDEVNAME=loop0p1\nDEVTYPE=partition\nDISKSEQ=13\nPARTN=1\n' +
  'PARTNAME=EFI = system\nPARTUUID=0f3e9a6c-1d1c-4f5e-9d5b-0c1c5d7c5a11\n'

t.test('a disk is read from its uevent file', async (t) => {
  t.strictSame(parseDevice('loop0', DISK), {
    kname: 'loop0',
    devname: 'loop0',
    major: 7,
    minor: 0,
    diskseq: 13n,
    partition: 0,
    loop: true,
    name: '13',
  })
})

t.test('so is a partition', async (t) => {
  t.strictSame(parseDevice('loop0p1', PARTITION), {
    kname: 'loop0p1',
    devname: 'loop0p1',
    major: 259,
    minor: 3,
    diskseq: 13n,
    partition: 1,
    loop: true,
    name: '13p1',
  })
})

t.test('a device node may be in a subdirectory', async (t) => {
  const text = 'MAJOR=104\nMINOR=0\nDEVNAME=cciss/c0d0\nDEVTYPE=disk\nDISKSEQ=4\n'
  t.match(parseDevice('cciss!c0d0', text), { kname: 'cciss!c0d0', devname: 'cciss/c0d0', name: '4' })
})

t.test('only loop devices and their partitions need the check of a bound device', async (t) => {
  for (const [kname, loop] of [
    ['loop0', true],
    ['loop12', true],
    ['loop12p3', true],
    ['sda', false],
    ['nvme0n1', false],
    ['loop', false],
    ['loopback0', false],
    ['xloop0', false],
    ['loop-control', false],
  ] as const) {
    t.equal(parseDevice(kname, DISK)?.loop, loop, kname)
  }
})

t.test('the largest possible numbers are read', async (t) => {
  const text = 'MAJOR=4095\nMINOR=1048575\nDEVNAME=x\nDEVTYPE=partition\nDISKSEQ=18446744073709551615\nPARTN=255\n'
  t.match(parseDevice('x', text), { major: 4095, minor: 1048575, diskseq: 2n ** 64n - 1n, partition: 255 })
})

const without = (text: string, key: string) => text.replace(new RegExp(`^${key}=.*\n`, 'm'), '')
const having = (text: string, key: string, value: string) => text.replace(new RegExp(`^${key}=.*$`, 'm'), `${key}=${value}`)

t.test('a text without a node or diskseq, or with nonsense in it, is no device', async (t) => {
  const texts: Record<string, string> = {
    nothing: '',
    'hidden path of a multipath disk': 'DEVTYPE=disk\nDISKSEQ=9\n',
    'no DEVNAME': without(DISK, 'DEVNAME'),
    'empty DEVNAME': having(DISK, 'DEVNAME', ''),
    'no MAJOR': without(DISK, 'MAJOR'),
    'no MINOR': without(DISK, 'MINOR'),
    'no DISKSEQ': without(DISK, 'DISKSEQ'),
    'empty DISKSEQ': having(DISK, 'DISKSEQ', ''),
    'DISKSEQ=0': having(DISK, 'DISKSEQ', '0'),
    'DISKSEQ=-1': having(DISK, 'DISKSEQ', '-1'),
    'DISKSEQ=013': having(DISK, 'DISKSEQ', '013'),
    'DISKSEQ of 65 bits': having(DISK, 'DISKSEQ', `${2n ** 64n}`),
    'no DEVTYPE': without(DISK, 'DEVTYPE'),
    'another DEVTYPE': having(DISK, 'DEVTYPE', 'usb_device'),
    'MAJOR=-7': having(DISK, 'MAJOR', '-7'),
    'MAJOR=0x7': having(DISK, 'MAJOR', '0x7'),
    'MINOR huge': having(DISK, 'MINOR', '9'.repeat(30)),
    'partition without PARTN': without(PARTITION, 'PARTN'),
    'PARTN=0': having(PARTITION, 'PARTN', '0'),
    'PARTN=-1': having(PARTITION, 'PARTN', '-1'),
    'PARTN=': having(PARTITION, 'PARTN', ''),
    'PARTN huge': having(PARTITION, 'PARTN', '9'.repeat(30)),
    'PARTN=1x': having(PARTITION, 'PARTN', '1x'),
    'partition without DISKSEQ': without(PARTITION, 'DISKSEQ'),
    garbage: Buffer.from(Array.from({ length: 4096 }, (_, i) => (i * 73 + 11) & 0xff)).toString('latin1'),
    'NULs for newlines': DISK.replaceAll('\n', '\0'),
    'keys without values': DISK.replaceAll('=', ''),
  }
  for (const [what, text] of Object.entries(texts)) t.equal(parseDevice('loop0', text), undefined, what)
})

t.test('a partition number that a disk claims is not believed', async (t) => {
  t.match(parseDevice('loop0', `${DISK}PARTN=3\n`), { partition: 0, name: '13' })
})

t.test('a value may contain "=", or be empty; a key is at the start of a line', async (t) => {
  const text = 'A=b=c\nBA=x\nnothing\n\nB=\nC=d'
  t.strictSame(
    ['A', 'b', 'BA', 'nothing', 'B', 'C', 'D'].map((key) => valueOf(text, key)),
    ['b=c', undefined, 'x', undefined, '', 'd', undefined],
  )
})

t.test('devices are the same only if name, number and kernel name are', async (t) => {
  const device = parseDevice('loop0p1', PARTITION) as Device
  t.ok(sameDevice(device, { ...device }))
  t.notOk(sameDevice(device, { ...device, major: 8 }))
  t.notOk(sameDevice(device, { ...device, minor: 8 }))
  t.notOk(sameDevice(device, { ...device, kname: 'loop1p1' }))
  t.notOk(sameDevice(device, { ...device, name: '14p1' }))
})

/** A file that is gone cannot be read, even through an open descriptor. */
function readAsInSysfs(fd: number, into: Uint8Array): number {
  return fstatSync(fd).nlink === 0 ? -E.ENODEV : native.readAgain(fd, into)
}

/** A /sys/class/block of files. */
function fakeSysfs(t: Test) {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-sysfs-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  return {
    directory,
    sysfs: new Sysfs({ ...native, readAgain: readAsInSysfs }, directory),
    put(kname: string, uevent: string, backing?: string) {
      mkdirSync(join(directory, kname, 'loop'), { recursive: true })
      writeFileSync(join(directory, kname, 'uevent'), uevent)
      if (backing !== undefined) writeFileSync(join(directory, kname, 'loop/backing_file'), backing)
    },
    remove: (path: string) => rmSync(join(directory, path), { recursive: true }),
  }
}

const scan = (sysfs: Sysfs) =>
  new Promise<{ error: number; knames: string[]; devices: Device[]; cpuMs: number }>((resolve) =>
    sysfs.scan((error, devices, cpuMs) => resolve({ error, knames: devices.map((device) => device.kname).sort(), devices, cpuMs })),
  )

t.test('a scan and a read of each device give the same result', async (t) => {
  const { sysfs, put, remove } = fakeSysfs(t)
  put('loop0', DISK, '/tmp/disk.img\n')
  put('loop0p1', PARTITION)
  put('loop1', DISK.replaceAll('loop0', 'loop1').replace('=13', '=14'))
  put('sda', 'MAJOR=8\nMINOR=0\nDEVNAME=sda\nDEVTYPE=disk\nDISKSEQ=2\n')
  put('sda1', 'MAJOR=8\nMINOR=1\nDEVNAME=sda1\nDEVTYPE=partition\nDISKSEQ=2\nPARTN=1\n')
  put('cciss!c0d0', 'MAJOR=104\nMINOR=0\nDEVNAME=cciss/c0d0\nDEVTYPE=disk\nDISKSEQ=4\n')
  put('nvme0c0n1', 'DEVTYPE=disk\nDISKSEQ=9\n')
  put('broken', 'garbage')
  put('vanished', DISK)
  remove('vanished/uevent')
  const { error, knames, devices, cpuMs } = await scan(sysfs)
  t.equal(error, 0)
  t.strictSame(knames, ['cciss!c0d0', 'loop0', 'loop0p1', 'sda', 'sda1'])
  for (const device of devices) t.strictSame(sysfs.read(device.kname), device, device.kname)
  for (const kname of ['loop1', 'nvme0c0n1', 'broken', 'vanished', 'never']) {
    t.equal(sysfs.read(kname), undefined, `${kname} is no device`)
  }
  t.ok(cpuMs >= 0 && cpuMs < 1000, 'the scan reports what it cost')
})

t.test('an unbound loop device is not shown, until it is bound', async (t) => {
  const { sysfs, put, remove } = fakeSysfs(t)
  put('loop0', DISK)
  t.equal(sysfs.read('loop0'), undefined)
  t.strictSame((await scan(sysfs)).knames, [])
  put('loop0', DISK, '/tmp/disk.img\n')
  t.match(sysfs.read('loop0'), { name: '13' })
  t.strictSame((await scan(sysfs)).knames, ['loop0'])
  remove('loop0/loop')
  t.equal(sysfs.read('loop0'), undefined)
})

t.test('a partition that is left after the file of its loop device has gone is not shown', async (t) => {
  const { sysfs, put, remove } = fakeSysfs(t)
  put('loop0', DISK, '/tmp/disk.img\n')
  put('loop0p1', PARTITION)
  t.strictSame((await scan(sysfs)).knames, ['loop0', 'loop0p1'])
  t.match(sysfs.read('loop0p1'), { name: '13p1' })
  remove('loop0/loop')
  t.equal(sysfs.read('loop0p1'), undefined)
  t.strictSame((await scan(sysfs)).knames, [])
})

t.test('sysfs shows a device only while everything about it is the same', async (t) => {
  const { sysfs, put, remove } = fakeSysfs(t)
  put('loop0', DISK, '/tmp/disk.img\n')
  put('loop0p1', PARTITION)
  const disk = sysfs.read('loop0') as Device
  const partition = sysfs.read('loop0p1') as Device
  t.ok(sysfs.shows(disk))
  t.ok(sysfs.shows(partition))
  put('loop0', DISK.replace('=13', '=14'))
  t.notOk(sysfs.shows(disk), 'another diskseq')
  put('loop0', DISK)
  t.ok(sysfs.shows(disk), 'as before')
  put('loop0p1', having(PARTITION, 'MINOR', '4'))
  t.notOk(sysfs.shows(partition), 'another number')
  put('loop0p1', having(PARTITION, 'PARTN', '2'))
  t.notOk(sysfs.shows(partition), 'another partition')
  remove('loop0/loop/backing_file')
  t.notOk(sysfs.shows(disk), 'detached')
  remove('loop0p1')
  t.notOk(sysfs.shows(partition), 'gone')
})

t.test('a longer file leaves nothing behind for a shorter one', async (t) => {
  const { sysfs, put } = fakeSysfs(t)
  put('sda1', PARTITION)
  put('sda', 'x')
  t.ok(sysfs.read('sda1'))
  t.equal(sysfs.attribute('sda', 'uevent'), 'x')
  t.equal(sysfs.attribute('sda', 'missing'), undefined)
})

t.test('being out of descriptors or memory says nothing about a device', async (t) => {
  const device = parseDevice('sda', DISK) as Device
  for (const errno of [E.EMFILE, E.ENFILE, E.ENOMEM]) {
    const sysfs = new Sysfs({ ...native, readFile: () => -errno, openFile: () => -errno })
    t.throws(() => sysfs.read('sda'), Exhausted, errnoName(errno))
    t.throws(() => sysfs.shows(device), Exhausted, errnoName(errno))
    t.equal(sysfs.removable(device), true, 'in doubt its medium may be changed')
  }
  for (const errno of [E.ENOENT, E.ENODEV, E.ENXIO, E.EIO]) {
    t.equal(new Sysfs({ ...native, readFile: () => -errno }).read('sda'), undefined, errnoName(errno))
  }
})

t.test('an empty directory is no error, a missing one is', async (t) => {
  const { sysfs, directory } = fakeSysfs(t)
  t.match(await scan(sysfs), { error: 0, knames: [] })
  t.match(await scan(new Sysfs(native, join(directory, 'missing'))), { error: 2, knames: [] })
  writeFileSync(join(directory, 'file'), '')
  t.match(await scan(new Sysfs(native, join(directory, 'file'))), { error: 20, knames: [] })
})

t.test('however many devices are read, few files stay open, and none after close()', async (t) => {
  const open = new Set<number>()
  let next = 100
  let most = 0
  const sysfs = new Sysfs({
    ...native,
    openFile() {
      open.add(next)
      most = Math.max(most, open.size)
      return next++
    },
    readAgain: (_, into) => Buffer.from(into.buffer, into.byteOffset).write(DISK),
    close(fd) {
      if (!open.delete(fd)) t.fail(`descriptor ${fd} was closed twice`)
      return 0
    },
  })
  for (let i = 0; i < 5000; i++) sysfs.shows(parseDevice(`sd${i}`, DISK) as Device)
  t.ok(most > 0 && most <= 100, `${most} at most`)
  sysfs.close()
  t.equal(open.size, 0)
})

t.test('devices that may become another disk while they are open', async (t) => {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-sysfs-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  /** @param disk where its disk's attributes are: for a partition, the directory above its own */
  const changes = (kname: string, attributes: Readonly<Record<string, string>> = {}, disk = kname) => {
    mkdirSync(join(directory, kname), { recursive: true })
    for (const [name, value] of Object.entries(attributes)) writeFileSync(join(directory, disk, name), `${value}\n`)
    const device = { ...(parseDevice(kname, DISK) as Device), partition: disk === kname ? 0 : 1 }
    return new Sysfs(native, directory).changes(device)
  }
  for (const kname of ['nbd0', 'nbd15p1', 'md0', 'md127', 'md_d0', 'md0p2']) t.equal(changes(kname), true, kname)
  for (const kname of ['sda', 'vda', 'dm-0', 'nvme0n1', 'zram0']) t.equal(changes(kname), false, kname)
  t.equal(changes('loop1', { ro: '1' }), true, 'a loop device that is read-only (LOOP_CHANGE_FD)')
  t.equal(changes('loop2', { ro: '0' }), false, 'a loop device that is not')
  t.equal(changes('sdb', { ro: '1' }), false, 'another device that is read-only')
  t.equal(changes('sr0', { removable: '1' }), true, 'removable media')
  t.equal(changes('sdc1', { removable: '1' }, '.'), true, 'a partition: by its disk')
})
