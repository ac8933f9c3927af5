// SPDX-License-Identifier: MIT
/** sysfs: real devices that come and go. */
import { execFileSync } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'

import t from 'tap'

import { native } from '../../src/native.js'
import { type Device, sameDevice, Sysfs } from '../../src/devices/sysfs.js'
import { loopDisk, zramDisk } from '../helpers/tree.js'

const scan = (sysfs: Sysfs) =>
  new Promise<{ error: number; knames: string[]; devices: Device[]; cpuMs: number }>((resolve) =>
    sysfs.scan((error, devices, cpuMs) => resolve({ error, knames: devices.map((device) => device.kname).sort(), devices, cpuMs })),
  )

t.test('a real loop device is shown while it is bound', async (t) => {
  const sysfs = new Sysfs(native)
  const disk = loopDisk(t)
  const device = sysfs.read(disk.kname)
  t.match(device, { kname: disk.kname, devname: disk.kname, major: 7, partition: 0, loop: true, name: disk.diskseq() })
  t.ok(
    (await scan(sysfs)).devices.some((found) => sameDevice(found, device as Device)),
    'a scan finds it too',
  )
  t.ok(sysfs.shows(device as Device), 'sysfs shows it')
  disk.detach()
  t.notOk(sysfs.shows(device as Device), 'detached')
  execFileSync('losetup', [disk.path, disk.file])
  t.teardown(() => execFileSync('losetup', ['--detach', disk.path]))
  t.notOk(sysfs.shows(device as Device), 'what is there now is another disk')
  t.ok(sysfs.shows(sysfs.read(disk.kname) as Device), 'the other disk is shown')
  sysfs.close()
})

t.test('a device that was removed and made again is another one', async (t) => {
  const sysfs = new Sysfs(native)
  t.teardown(() => sysfs.close())
  const number = readFileSync('/sys/class/zram-control/hot_add', 'utf8').trim()
  const device = sysfs.read(`zram${number}`) as Device
  t.ok(sysfs.shows(device))
  writeFileSync('/sys/class/zram-control/hot_remove', number)
  t.notOk(sysfs.shows(device), 'gone')
  const again = zramDisk(t)
  t.equal(again.kname, device.kname, 'it has the same name')
  t.notOk(sysfs.shows(device), 'it is not the same device')
  t.ok(sysfs.shows(sysfs.read(again.kname) as Device))
})
