// SPDX-License-Identifier: MIT
/**
 * The registry: it knows changes quickly, is exact about devices that are gone, and is cheap to ask about
 * names that never existed.
 */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import type { DiskSeq } from '../../../src/devices/names.js'
import { parseName } from '../../../src/devices/names.js'
import { E } from '../../../src/util/errno.js'
import type { Logger } from '../../../src/util/log.js'
import { native } from '../../../src/native.js'
import { Registry } from '../../../src/devices/registry.js'
import { type Device, Sysfs } from '../../../src/devices/sysfs.js'
import { sleep, until } from '../../helpers/tree.js'

type ScanCallback = Parameters<typeof native.scanBlock>[1]

/** A registry on a /sys/class/block of files, whose scans are counted and can be held back. */
function fixture(t: Test, { directory: given, cpuMs }: { directory?: string; cpuMs?: number } = {}) {
  const own = mkdtempSync(join(tmpdir(), 'diskseqfs-registry-'))
  t.teardown(() => rmSync(own, { recursive: true }))
  const directory = given ?? own
  const state = {
    scans: 0,
    /** While this is set, results are held back. */
    held: false,
    waiting: [] as (() => void)[],
    /** Errno of the next scans. */
    scanError: 0,
    /** Errno of the next reads. */
    readError: 0,
  }
  const errors: { fields: unknown; text: string | undefined }[] = []
  const log = { error: (fields: unknown, text?: string) => void errors.push({ fields, text }) } as unknown as Logger
  const sysfs = new Sysfs(
    {
      ...native,
      readFile: (path, into) => (state.readError !== 0 ? -state.readError : native.readFile(path, into)),
      scanBlock(path, done: ScanCallback) {
        state.scans++
        native.scanBlock(path, (error, next, took) => {
          const deliver = () => (state.scanError !== 0 ? done(state.scanError, () => [], cpuMs ?? took) : done(error, next, cpuMs ?? took))
          if (state.held) state.waiting.push(deliver)
          else deliver()
        })
      },
    },
    directory,
  )
  const registry = new Registry(sysfs, log)
  t.teardown(() => registry.close())
  const write = (kname: string, lines: string[]) => {
    mkdirSync(join(directory, kname), { recursive: true })
    writeFileSync(join(directory, kname, 'uevent'), lines.map((line) => `${line}\n`).join(''))
  }
  return {
    registry,
    errors,
    state,
    disk(kname: string, diskseq: number, minor = 0) {
      write(kname, ['MAJOR=9', `MINOR=${minor}`, `DEVNAME=${kname}`, 'DEVTYPE=disk', `DISKSEQ=${diskseq}`])
    },
    partition(kname: string, diskseq: number, partition: number, minor = 0) {
      write(kname, ['MAJOR=259', `MINOR=${minor}`, `DEVNAME=${kname}`, 'DEVTYPE=partition', `DISKSEQ=${diskseq}`, `PARTN=${partition}`])
    },
    bind(kname: string) {
      mkdirSync(join(directory, kname, 'loop'), { recursive: true })
      writeFileSync(join(directory, kname, 'loop/backing_file'), '/tmp/disk.img\n')
    },
    remove: (path: string) => rmSync(join(directory, path), { recursive: true }),
    changed: (...knames: string[]) => registry.changed(new Set(knames)),
    found: (name: string) => registry.find(name)?.kname,
    slowly: (name: string) =>
      new Promise<string | number | undefined>((resolve) =>
        registry.findSlowly(name, diskseqOf(name), (found) => resolve(typeof found === 'object' ? found.kname : found || undefined)),
      ),
    names: () => registry.devices().map((device: Device) => device.name),
    release() {
      state.held = false
      for (const deliver of state.waiting.splice(0)) deliver()
    },
  }
}

const diskseqOf = (name: string) => parseName(name)?.diskseq as DiskSeq

/** Waits until no scan is held back because of the one before it. */
const quiet = () => sleep(30)

t.test('it starts with all that sysfs has, in order', async (t) => {
  const { registry, disk, partition, found, names } = fixture(t)
  disk('sdb', 10)
  partition('sdb2', 10, 2)
  partition('sdb10', 10, 10)
  partition('sdb1', 10, 1)
  disk('sda', 9)
  await registry.start()
  t.strictSame(names(), ['9', '10', '10p1', '10p2', '10p10'])
  t.equal(registry.size, 5)
  t.equal(found('10p2'), 'sdb2')
  t.equal(found('9'), 'sda')
  t.equal(found('9p1'), undefined)
})

t.test('an unbound loop device is not listed', async (t) => {
  const { registry, disk, bind, remove, changed, names } = fixture(t)
  disk('loop0', 5)
  disk('loop1', 6)
  bind('loop1')
  await registry.start()
  t.strictSame(names(), ['6'])
  bind('loop0')
  changed('loop0')
  t.strictSame(names(), ['5', '6'])
  remove('loop1/loop')
  changed('loop1')
  t.strictSame(names(), ['5'])
})

t.test('an event adds, changes and removes a device', async (t) => {
  const { registry, disk, remove, changed, found, names } = fixture(t)
  await registry.start()
  disk('sda', 7)
  t.equal(found('7'), undefined, 'not before the event')
  changed('sda')
  t.equal(found('7'), 'sda')
  disk('sda', 8)
  changed('sda')
  t.strictSame(names(), ['8'])
  disk('sda', 8, 16)
  changed('sda')
  t.match(registry.find('8'), { minor: 16 })
  remove('sda')
  changed('sda')
  t.strictSame(names(), [])
  t.equal(registry.size, 0)
})

t.test('waiting events are handled before an answer', async (t) => {
  const { registry, disk, found, names } = fixture(t)
  await registry.start()
  disk('sda', 7)
  registry.drain = () => registry.changed(new Set(['sda']))
  t.equal(found('7'), 'sda')
  disk('sda', 8)
  t.strictSame(names(), ['8'])
})

t.test('events that come twice, late, out of order or for no device do no harm', async (t) => {
  const { registry, disk, partition, remove, changed, names } = fixture(t)
  await registry.start()
  partition('sda1', 7, 1)
  changed('sda1', 'sda1')
  disk('sda', 7)
  changed('sda')
  changed('sda', 'sda1', 'sda')
  t.strictSame(names(), ['7', '7p1'], 'the partition before the disk')
  changed('never', 'sdz9', '.', 'x'.repeat(4000))
  t.strictSame(names(), ['7', '7p1'], 'of nothing')
  remove('sda')
  remove('sda1')
  disk('sda', 8)
  changed('sda1')
  changed('sda')
  changed('sda1')
  t.strictSame(names(), ['8'], 'the removal after the next disk')
  t.equal(registry.size, 1)
})

t.test('a disk that takes another number takes the names of its partitions with it', async (t) => {
  const { registry, disk, partition, remove, changed, names } = fixture(t)
  disk('sda', 7)
  partition('sda1', 7, 1)
  partition('sda2', 7, 2)
  disk('sdb', 70)
  partition('sdb1', 70, 1)
  await registry.start()
  disk('sda', 8)
  partition('sda1', 8, 1)
  remove('sda2')
  changed('sda')
  t.strictSame(names(), ['8', '8p1', '70', '70p1'], 'by one event of the disk')
})

t.test('a disk that goes takes the names of its partitions with it', async (t) => {
  const { registry, disk, partition, remove, changed, names } = fixture(t)
  disk('sda', 7)
  partition('sda1', 7, 1)
  await registry.start()
  remove('sda')
  remove('sda1')
  changed('sda')
  t.strictSame(names(), [])
})

t.test('a device node that is used again is another disk', async (t) => {
  const { registry, disk, remove, changed, found, names } = fixture(t)
  disk('loopx', 7)
  await registry.start()
  remove('loopx')
  disk('loopx', 8)
  changed('loopx')
  t.equal(found('7'), undefined)
  t.equal(found('8'), 'loopx')
  disk('other', 9)
  remove('loopx')
  changed('other', 'loopx')
  t.strictSame(names(), ['9'])
})

t.test('a change without an event is found when the new name is asked for', async (t) => {
  const { registry, disk, found, slowly } = fixture(t)
  disk('md0', 20)
  await registry.start()
  disk('md0', 21)
  t.equal(found('21'), undefined)
  t.equal(await slowly('21'), 'md0')
  t.equal(found('21'), 'md0', 'it is known from then on')
  t.equal(found('20'), undefined, 'the old name is not known any more')
})

t.test('a device that went without an event is noticed by the next scan', async (t) => {
  const { registry, disk, remove, slowly, names } = fixture(t)
  disk('sda', 1)
  disk('sdb', 2)
  await registry.start()
  remove('sda')
  t.equal(await slowly('3'), undefined)
  t.strictSame(names(), ['2'])
})

t.test('a device that goes while it is read is not listed', async (t) => {
  const { registry, disk, remove, changed, names } = fixture(t)
  disk('sda', 1)
  disk('sdb', 2)
  remove('sdb/uevent') // listed in the directory, and gone when it is read
  await registry.start()
  t.strictSame(names(), ['1'])
  remove('sda/uevent')
  changed('sda', 'sdb')
  t.strictSame(names(), [])
})

t.test('many callers that wait share a scan', async (t) => {
  const { registry, disk, state, slowly } = fixture(t)
  await registry.start()
  await quiet()
  disk('sda', 5000)
  const before = state.scans
  const answers = await Promise.all(Array.from({ length: 1000 }, (_, i) => slowly(`${4500 + i}`)))
  t.ok(state.scans - before <= 2, `${state.scans - before} for a thousand`)
  t.strictSame(
    answers.filter((kname) => kname !== undefined),
    ['sda'],
    'each gets the answer to its own question',
  )
  t.equal(answers[500], 'sda')
})

t.test('a question during a scan is answered from the next one', async (t) => {
  const { registry, disk, state, slowly, release } = fixture(t)
  await registry.start()
  await quiet()
  state.held = true
  const early = slowly('8')
  await until(() => state.waiting.length === 1)
  disk('md0', 9) // too late for the scan under way
  const late = slowly('9')
  release()
  t.equal(await early, undefined)
  t.equal(await late, 'md0')
})

t.test('an event during a scan is newer than the scan', async (t) => {
  const { registry, disk, partition, remove, changed, state, slowly, release, names } = fixture(t)
  disk('sda', 1)
  disk('sdb', 2)
  partition('sdb1', 2, 1)
  disk('sdc', 3)
  await registry.start()
  await quiet()
  state.held = true
  const miss = slowly('99')
  await until(() => state.waiting.length === 1)
  disk('sda', 11)
  remove('sdb')
  remove('sdb1')
  disk('sdd', 4)
  changed('sda', 'sdb', 'sdd')
  release()
  await miss
  t.strictSame(names(), ['3', '4', '11'])
})

t.test('events that wait when a scan ends are newer than the scan, too', async (t) => {
  const { registry, disk, state, slowly, release, names } = fixture(t)
  disk('sda', 1)
  await registry.start()
  await quiet()
  state.held = true
  const asked = slowly('11')
  await until(() => state.waiting.length === 1)
  disk('sda', 11)
  registry.drain = () => {
    registry.drain = () => {}
    registry.changed(new Set(['sda']))
  }
  release()
  t.equal(await asked, 'sda')
  t.strictSame(names(), ['11'])
})

t.test('a name that is proven absent is not searched for again, until an event', async (t) => {
  const { registry, disk, changed, state, slowly } = fixture(t)
  await registry.start()
  t.equal(await slowly('50'), undefined)
  const before = state.scans
  for (let i = 0; i < 100; i++) t.equal(await slowly('50'), undefined)
  t.equal(state.scans, before)
  disk('md0', 50)
  changed('other')
  t.equal(await slowly('50'), 'md0', 'any event ends that')
})

t.test('numbers that were given out before two scans need no other scan to be proven absent', async (t) => {
  const { registry, disk, partition, state, slowly } = fixture(t)
  disk('sda', 1)
  disk('sdb', 60)
  partition('sda1', 1, 1)
  await registry.start()
  for (const ask of ['100', '101']) t.equal(await slowly(ask), undefined)
  const before = state.scans
  for (let number = 2; number < 60; number++) t.equal(await slowly(`${number}`), undefined)
  t.equal(await slowly('30p7'), undefined)
  t.equal(state.scans, before, 'no scan for any of them')
  t.equal(await slowly('61'), undefined)
  t.equal(state.scans, before + 1, 'one scan for a number that may be new')
})

t.test('nor do numbers that were given out while an earlier daemon ran', async (t) => {
  for (const [highest, scans] of [
    [50n, 0],
    [0n, 1],
  ] as const) {
    const { registry, disk, state, slowly } = fixture(t)
    disk('sda', 1)
    disk('sdb', 60)
    await registry.start(highest)
    const before = state.scans
    for (let number = 2; number <= 50; number++) t.equal(await slowly(`${number}`), undefined)
    t.equal(state.scans > before, scans > 0, `known: ${highest}`)
    const known = state.scans
    t.equal(await slowly('59'), undefined)
    t.equal(state.scans, known + 1 - scans, 'a higher one needs a scan')
    t.equal(registry.highest, 60n)
  }
})

t.test('they need a scan if events were lost since, or are lost during the scan', async (t) => {
  const { registry, disk, state, slowly, release } = fixture(t)
  disk('sda', 60)
  await registry.start()
  for (const ask of ['100', '101']) t.equal(await slowly(ask), undefined)
  registry.lost()
  disk('late', 30)
  t.equal(await slowly('30'), 'late')
  await quiet()
  state.held = true
  // On a busy machine there may have been a second scan by now, after which no number up to 60 needs one.
  registry.lost()
  const asked = slowly('31')
  await until(() => state.waiting.length === 1)
  registry.lost()
  release()
  t.equal(await asked, undefined)
  for (const ask of ['102', '103']) await slowly(ask)
  disk('later', 32)
  registry.lost()
  t.equal(await slowly('32'), 'later')
})

t.test('a disk that is known by events only is gone when they say so', async (t) => {
  const { registry, disk, changed, state, slowly } = fixture(t)
  await registry.start()
  const event = (kname: string, diskseq: bigint, gone = false) => {
    registry.numbered(kname, diskseq as DiskSeq, gone)
    changed(kname)
  }
  event('md0', 20n)
  event('md0', 22n)
  event('md0', 21n) // out of order
  event('sda', 23n)
  event('sda', 23n, true)
  const before = state.scans
  for (const name of ['20', '20p1', '21', '23']) t.equal(await slowly(name), undefined, name)
  t.equal(state.scans, before, 'no scan for any of them')
  disk('md0', 22)
  t.equal(await slowly('22'), 'md0', 'the highest number may be there')
  t.equal(state.scans, before + 1)
})

t.test('absence is forgotten when events were lost', async (t) => {
  const { registry, disk, slowly } = fixture(t)
  await registry.start()
  t.equal(await slowly('50'), undefined)
  disk('md0', 50)
  registry.lost()
  t.equal(await slowly('50'), 'md0')
})

t.test('absence is believed for a second at most', async (t) => {
  const { registry, disk, slowly } = fixture(t)
  await registry.start()
  t.equal(await slowly('50'), undefined)
  disk('md0', 50)
  await sleep(1100)
  t.equal(await slowly('50'), 'md0')
})

t.test('a number that is used up is never searched for again', async (t) => {
  const { registry, disk, partition, remove, changed, state, slowly } = fixture(t)
  disk('sda', 7)
  partition('sda1', 7, 1)
  disk('loop0', 8)
  await registry.start()
  disk('sda', 9)
  remove('sda1')
  changed('sda')
  const before = state.scans
  for (let i = 0; i < 20; i++) {
    changed('other') // after which nothing is proven absent
    t.equal(await slowly('7'), undefined)
    t.equal(await slowly('7p1'), undefined)
    t.equal(await slowly('7p2'), undefined)
  }
  t.equal(state.scans, before)
})

t.test('a partition that goes may come back', async (t) => {
  const { registry, disk, partition, remove, changed, found, slowly } = fixture(t)
  disk('sda', 7)
  partition('sda1', 7, 1)
  await registry.start()
  remove('sda1')
  changed('sda1')
  t.equal(await slowly('7p1'), undefined)
  partition('sda1', 7, 1)
  changed('sda1')
  t.equal(found('7p1'), 'sda1', 'it is found again')
})

t.test('a partition that a known disk does not have is not searched for', async (t) => {
  const { registry, disk, partition, changed, state, found, slowly } = fixture(t)
  disk('sda', 70)
  partition('sda1', 70, 1)
  partition('sdb1', 71, 1) // its disk is not known
  await registry.start()
  await quiet()
  const before = state.scans
  const lacks = (name: string) => registry.lacks(name, diskseqOf(name))
  for (let number = 2; number < 256; number++) {
    if (!lacks(`70p${number}`)) t.fail(`70p${number}`)
    if ((await slowly(`70p${number}`)) !== undefined) t.fail(`70p${number}`)
  }
  t.equal(state.scans, before, 'no scan for any of them')
  t.equal(lacks('71p2'), false, 'a partition of an unknown disk may exist')
  t.equal(lacks('72'), false)
  t.equal(await slowly('71p2'), undefined)
  t.equal(state.scans, before + 1)
  partition('sda2', 70, 2)
  changed('sda2')
  t.equal(found('70p2'), 'sda2', 'a new partition is found')
})

t.test('it is searched for after events were lost, until a scan has ended', async (t) => {
  const { registry, disk, partition, changed, state, slowly, release, errors } = fixture(t)
  disk('sda', 70)
  await registry.start()
  await quiet()
  const lacks = () => registry.lacks('70p1', diskseqOf('70p1'))
  t.equal(lacks(), true)
  partition('sda1', 70, 1)
  state.held = true
  registry.lost()
  t.equal(lacks(), false, 'it may exist')
  const asked = slowly('70p1')
  await until(() => state.waiting.length === 1)
  t.equal(lacks(), false, 'it may exist as long as the scan takes')
  release()
  t.equal(await asked, 'sda1')
  t.equal(registry.lacks('70p2', diskseqOf('70p2')), true, 'then all partitions are known again')
  // The same for an event whose device could not be read.
  partition('sda2', 70, 2)
  state.readError = E.EMFILE
  changed('sda2')
  state.readError = 0
  t.equal(await slowly('70p2'), 'sda2')
  t.match(errors, [{ fields: { errno: 'EMFILE' } }])
})

t.test('a scan that failed does not make up for lost events', async (t) => {
  const { registry, disk, partition, state, slowly } = fixture(t)
  disk('sda', 70)
  await registry.start()
  partition('sda1', 70, 1)
  state.scanError = E.ENOMEM
  registry.lost()
  t.equal(await slowly('70p1'), E.ENOMEM)
  t.equal(registry.lacks('70p1', diskseqOf('70p1')), false)
  state.scanError = 0
  t.equal(await slowly('70p1'), 'sda1')
})

/** What the listener is told: "+name kname" and "-name kname". */
function told(registry: Registry): string[] {
  const events: string[] = []
  registry.listener = {
    appeared: ({ name, kname }) => void events.push(`+${name} ${kname}`),
    vanished: ({ name, kname }) => void events.push(`-${name} ${kname}`),
  }
  return events
}

t.test('the listener is told of each device that comes and goes', async (t) => {
  const { registry, disk, partition, remove, changed, slowly } = fixture(t)
  const events = told(registry)
  const news = () => events.splice(0).sort()
  disk('sda', 7)
  partition('sda1', 7, 1)
  await registry.start()
  t.strictSame(news(), ['+7 sda', '+7p1 sda1'], 'by the first scan')
  changed('sda', 'sda1')
  t.strictSame(news(), [], 'not of devices that stay the same')
  disk('sdb', 9)
  changed('sdb')
  t.strictSame(news(), ['+9 sdb'], 'by an event')
  disk('sda', 8)
  remove('sda1')
  changed('sda')
  t.strictSame(news(), ['+8 sda', '-7 sda', '-7p1 sda1'], 'a number that changes takes the names of partitions along')
  disk('sdb', 9, 16)
  changed('sdb')
  t.strictSame(news(), ['+9 sdb', '-9 sdb'], 'another device number is another device')
  disk('md0', 30)
  t.equal(await slowly('30'), 'md0')
  t.strictSame(news(), ['+30 md0'], 'by a scan')
  remove('sda')
  remove('sdb')
  t.equal(await slowly('31'), undefined)
  t.strictSame(news(), ['-8 sda', '-9 sdb'], 'and what a scan misses')
  t.strictSame([registry.size, registry.devices().length], [1, 1])
})

t.test('if two devices claim a name, one has it, and each comes and goes once', async (t) => {
  const { registry, disk, remove, changed, found, names } = fixture(t)
  const events = told(registry)
  disk('sda', 7)
  await registry.start()
  events.length = 0
  disk('sdb', 7)
  changed('sdb')
  t.strictSame(events.splice(0), ['-7 sda', '+7 sdb'])
  t.equal(found('7'), 'sdb')
  t.strictSame(names(), ['7'])
  remove('sda')
  changed('sda')
  t.strictSame(events.splice(0), [], 'the device that had lost the name takes nothing away')
  t.equal(found('7'), 'sdb')
  remove('sdb')
  changed('sdb')
  t.strictSame(events.splice(0), ['-7 sdb'])
  t.strictSame(names(), [])
})

t.test('a listener finds the registry as it was told', async (t) => {
  const { registry, disk, remove, changed } = fixture(t)
  const wrong: string[] = []
  registry.listener = {
    appeared(device) {
      if (registry.find(device.name) !== device || !registry.devices().includes(device)) wrong.push(`+${device.name}`)
    },
    vanished(device) {
      if (registry.find(device.name) !== undefined || registry.devices().includes(device)) wrong.push(`-${device.name}`)
    },
  }
  disk('sda', 7)
  disk('sdb', 8)
  await registry.start()
  disk('sda', 9)
  remove('sdb')
  changed('sda', 'sdb')
  t.strictSame(wrong, [])
})

t.test('devices stay in order, whatever comes, goes and takes other numbers', async (t) => {
  const { registry, disk, partition, remove, changed, slowly } = fixture(t)
  await registry.start()
  const state = new Map<string, [diskseq: number, partition: number]>()
  let seed = 20260102
  const below = (n: number) => {
    seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff
    return (seed >> 8) % n
  }
  let next = 1000
  const shown = () => registry.devices().map(({ kname, name }) => `${kname} ${name}`)
  const expected = () =>
    [...state]
      .sort(([, a], [, b]) => a[0] - b[0] || a[1] - b[1])
      .map(([kname, [diskseq, number]]) => `${kname} ${number === 0 ? diskseq : `${diskseq}p${number}`}`)
  let wrong = 0
  for (let i = 0; i < 400; i++) {
    const kname = `d${below(12)}`
    const number = below(4)
    const diskseq = state.get(kname)?.[0]
    const own = `${kname}p${number}`
    if (number === 0 && below(2) === 0 && diskseq !== undefined) {
      // The disk goes, or takes another number, and its partitions go.
      for (const other of [1, 2, 3].map((n) => `${kname}p${n}`).filter((name) => state.delete(name))) remove(other)
      state.delete(kname)
      if (below(2) === 0) {
        disk(kname, next)
        state.set(kname, [next++, 0])
      } else {
        remove(kname)
      }
      changed(kname)
    } else if (diskseq === undefined) {
      // Some numbers come out of order.
      const fresh = below(3) === 0 ? next++ - 500 : next++
      disk(kname, fresh)
      state.set(kname, [fresh, 0])
      changed(kname)
    } else if (number > 0) {
      if (state.has(own)) {
        state.delete(own)
        remove(own)
      } else {
        state.set(own, [diskseq, number])
        partition(own, diskseq, number, i)
      }
      changed(own)
    }
    if (JSON.stringify(shown()) !== JSON.stringify(expected()) && wrong++ === 0) t.strictSame(shown(), expected(), `after ${i} changes`)
    if (registry.size !== state.size) wrong++
  }
  t.equal(wrong, 0)
  // The same by a scan that finds all of it different.
  for (const kname of [...state.keys()]) {
    remove(kname)
    state.delete(kname)
  }
  for (let i = 0; i < 10; i++) {
    disk(`e${i}`, 5000 - i)
    state.set(`e${i}`, [5000 - i, 0])
  }
  await slowly('9999')
  t.strictSame(shown(), expected())
})

t.test('names that do not exist cost a tenth of a processor at most', async (t) => {
  const { registry, state, slowly } = fixture(t, { cpuMs: 20 })
  await registry.start()
  const before = state.scans
  const end = performance.now() + 1000
  let misses = 0
  const ask = async () => {
    while (performance.now() < end) await slowly(`${1_000_000 + misses++}`)
  }
  await Promise.all(Array.from({ length: 200 }, ask))
  const scans = state.scans - before
  t.ok(scans >= 2 && scans <= 7, `${scans} scans of 20 ms in a second`)
  t.ok(misses > scans * 50, `for ${misses} names`)
})

t.test('cheap scans keep a distance, too', async (t) => {
  const { registry, state, slowly } = fixture(t, { cpuMs: 0 })
  await registry.start()
  const before = state.scans
  const start = performance.now()
  let misses = 0
  while (performance.now() - start < 300) await slowly(`${1_000_000 + misses++}`)
  const took = performance.now() - start
  t.ok(state.scans - before <= took + 1, `${state.scans - before} in ${Math.round(took)} ms`)
})

t.test('other work gets a turn between the answers to a scan', async (t) => {
  const { registry, state, release } = fixture(t)
  await registry.start()
  state.held = true
  let answered = 0
  for (let i = 0; i < 200; i++) registry.findSlowly(`${1_000_000 + i}`, diskseqOf(`${1_000_000 + i}`), () => answered++)
  await until(() => state.waiting.length > 0)
  release()
  t.ok(answered < 20, `${answered} at once`)
  await until(() => answered === 200)
  t.pass('all are answered in the end')
})

t.test('the list stays the same until something changes', async (t) => {
  const { registry, disk, remove, changed, names } = fixture(t)
  disk('sda', 1)
  await registry.start()
  const first = registry.devices()
  const [device] = first
  changed('sda')
  t.equal(registry.devices(), first, 'a uevent alone changes nothing')
  t.equal(registry.devices()[0], device)
  disk('sdb', 2)
  changed('sdb')
  t.strictSame(names(), ['1', '2'])
  t.equal(registry.devices()[0], device, 'it does not change another device')
  remove('sda')
  changed('sda')
  t.strictSame(names(), ['2'])
})

t.test('lost events make it read everything again', async (t) => {
  const { registry, disk, remove, found, names } = fixture(t)
  disk('sda', 1)
  disk('sdb', 2)
  await registry.start()
  remove('sda')
  disk('sdb', 3)
  disk('sdc', 4)
  registry.lost()
  await until(() => found('4') !== undefined)
  t.strictSame(names(), ['3', '4'])
})

t.test('a flood of lost events causes few scans', async (t) => {
  const { registry, disk, state, found } = fixture(t)
  await registry.start()
  await quiet()
  const before = state.scans
  disk('sda', 1)
  for (let i = 0; i < 1000; i++) registry.lost()
  await until(() => found('1') !== undefined)
  await quiet()
  t.ok(state.scans - before <= 2, `${state.scans - before}`)
})

t.test('an empty directory is an empty registry', async (t) => {
  const { registry, errors, names } = fixture(t)
  await registry.start()
  t.strictSame(names(), [])
  t.strictSame(errors, [])
})

t.test('a missing directory is reported, and all questions are still answered', async (t) => {
  const { registry, errors, slowly, names } = fixture(t, { directory: '/nonexistent/class/block' })
  await registry.start()
  t.match(errors, [{ fields: { errno: 'ENOENT', path: '/nonexistent/class/block' }, text: /sysfs/ }])
  t.equal(await slowly('5'), E.ENOENT, 'that says nothing about the disk')
  t.strictSame(names(), [])
})

t.test('a scan that failed removes no device', async (t) => {
  const { registry, disk, state, slowly, errors, names } = fixture(t)
  disk('sda', 1)
  await registry.start()
  state.scanError = E.ENOMEM
  t.equal(await slowly('2'), E.ENOMEM)
  t.match(errors, [{ fields: { errno: 'ENOMEM' } }])
  t.strictSame(names(), ['1'])
})

t.test('a scan that failed proves no name absent', async (t) => {
  const { registry, disk, state, slowly } = fixture(t)
  await registry.start()
  disk('md0', 2)
  state.scanError = E.EMFILE
  t.equal(await slowly('2'), E.EMFILE)
  state.scanError = 0
  t.equal(await slowly('2'), 'md0')
})

t.test('a device that cannot be read for lack of descriptors is not taken for gone', async (t) => {
  const { registry, disk, changed, state, found, slowly } = fixture(t)
  disk('sda', 1)
  await registry.start()
  state.readError = E.EMFILE
  changed('sda')
  state.readError = 0
  t.equal(found('1') ?? (await slowly('1')), 'sda')
})

t.test('close() during a scan makes no callback, and leaves nothing running', async (t) => {
  const { registry, disk, state, release } = fixture(t)
  await registry.start()
  await quiet()
  disk('sda', 1)
  let called = 0
  state.held = true
  registry.findSlowly('1', diskseqOf('1'), () => called++)
  await until(() => state.waiting.length === 1)
  registry.findSlowly('2', diskseqOf('2'), () => called++)
  registry.close()
  const scans = state.scans
  release()
  registry.findSlowly('3', diskseqOf('3'), () => called++)
  registry.lost()
  await quiet()
  t.equal(called, 0)
  t.equal(registry.size, 0)
  t.equal(state.scans, scans, 'no scan is begun')
})

t.test('close() cancels a scan that was to come', async (t) => {
  const { registry, state } = fixture(t, { cpuMs: 5 })
  await registry.start()
  let called = 0
  registry.findSlowly('1', diskseqOf('1'), () => called++)
  const scans = state.scans
  registry.close()
  await sleep(80)
  t.equal(called, 0)
  t.equal(state.scans, scans)
})
