// SPDX-License-Identifier: MIT
/**
 * The tree on the npm package fuse-native, as its documentation would have one
 * write it: callbacks by path, errors as negative numbers, stat objects. Which
 * devices there are, and that they are the right ones, is found out by the
 * daemon's own modules (registry, pins); so what differs is the library.
 *
 *   node fuse-native.mjs MOUNTPOINT
 *
 * The library tells neither who asks nor when the kernel has forgotten a name.
 * So a stat opens the disk as well, and a pin is held for a second after its last
 * use, whoever may still need it then.
 */
import Fuse from 'fuse-native'

import { DeviceNodes } from '../../build/src/devices/device-node.js'
import { linkName, parseName, nodeName } from '../../build/src/devices/names.js'
import { E } from '../../build/src/util/errno.js'
import { native } from '../../build/src/native.js'
import { PinOpener } from '../../build/src/gate/pin.js'
import { Registry } from '../../build/src/devices/registry.js'
import { sameDevice, Sysfs } from '../../build/src/devices/sysfs.js'
import { UeventSocket } from '../../build/src/devices/uevents.js'

const HOLD_MS = 1000
const { S_IFDIR, S_IFLNK, S_IFBLK } = { S_IFDIR: 0o040000, S_IFLNK: 0o120000, S_IFBLK: 0o060000 }

const OPTIONS = {
  allowOther: true,
  defaultPermissions: true,
  // Without `dev` no node can be opened (EACCES); the library has no option for
  // it, but checks no value either.
  fsname: 'diskseqfs-native,dev,noexec',
  subtype: 'diskseqfs-native',
  // As text, since the library takes 0 for an option that is not given; and one
  // jiffy, which holds for the root, too: there is one value for all.
  entryTimeout: '0',
  attrTimeout: '0.000001',
}

const log = { error: console.error, warn: console.error, info() {}, debug() {} }
const sysfs = new Sysfs(native)
const registry = new Registry(sysfs, log)
const uevents = new UeventSocket({ native, listener: registry, log })
registry.drain = () => uevents.drain()
const directory = native.openDirectory('/dev')
const devnodes = new DeviceNodes(native, directory)
const opener = new PinOpener(native, directory)

/** By name. */
const pins = new Map()
/** Callbacks of those who wait for a device to be opened, by name. */
const opening = new Map()
const started = new Date()

function getattr(path, done) {
  if (path === '/') return done(0, { ...own(), mode: S_IFDIR | 0o1755, nlink: 2, size: 0 })
  const name = path.slice(1)
  const parsed = parseName(name)
  if (parsed === undefined) return done(Fuse.ENOENT)
  const target = nodeName(parsed.diskseq, parsed.partition)
  find(target, parsed.diskseq, (device) => {
    if (device === undefined) return done(Fuse.ENOENT)
    if (parsed.symlink) return done(0, { ...own(), mode: S_IFLNK | 0o777, nlink: 1, size: target.length })
    hold(device, (errno, pin) => (errno === 0 ? done(0, attributes(pin)) : done(-errno)))
  })
}

function find(name, diskseq, done) {
  const device = registry.find(name)
  if (device === undefined) registry.findSlowly(name, diskseq, done)
  else done(device)
}

/** Calls back with the device open and verified. */
function hold(device, done) {
  const held = pins.get(device.name)
  if (held !== undefined) {
    const current = sameDevice(held.pin.device, device) && opener.current(held.pin)
    if (current && !held.removable) {
      held.timer.refresh()
      return done(0, held.pin)
    }
    drop(device.name)
    if (!current) registry.refresh(device.kname)
  }
  const waiting = opening.get(device.name)
  if (waiting !== undefined) return waiting.push(done)
  opening.set(device.name, [done])
  opener.open(device, (result) => {
    const all = opening.get(device.name)
    opening.delete(device.name)
    if ('pin' in result) {
      const timer = setTimeout(drop, HOLD_MS, device.name)
      pins.set(device.name, { pin: result.pin, removable: sysfs.removable(device), timer })
    } else {
      registry.refresh(device.kname)
    }
    const answer = 'pin' in result ? [0, result.pin] : [result.errno ?? E.ENOENT]
    for (const each of all) each(...answer)
  })
}

function drop(name) {
  const { pin, timer } = pins.get(name)
  clearTimeout(timer)
  pins.delete(name)
  opener.close(pin)
}

function attributes({ fd, device }) {
  const stat = devnodes.stat(fd)
  return {
    mode: S_IFBLK | (stat.mode & 0o7777),
    uid: stat.uid,
    gid: stat.gid,
    nlink: 1,
    size: 0,
    rdev: ((device.minor & 0xff) | (device.major << 8) | ((device.minor & ~0xff) << 12)) >>> 0,
    // The library knows milliseconds only.
    atime: Math.floor(stat.atime * 1000 + stat.atimeNs / 1e6),
    mtime: Math.floor(stat.mtime * 1000 + stat.mtimeNs / 1e6),
    ctime: Math.floor(stat.ctime * 1000 + stat.ctimeNs / 1e6),
  }
}

const own = () => ({ uid: 0, gid: 0, atime: started, mtime: started, ctime: started })

let listed
function readdir(path, done) {
  if (path !== '/') return done(-E.ENOTDIR)
  const devices = registry.devices()
  if (listed?.devices !== devices) {
    const names = devices.flatMap(({ name, diskseq, partition }) => (partition === 0 ? [name] : [name, linkName(diskseq, partition)]))
    listed = { devices, names: ['.', '..', ...names] }
  }
  done(0, listed.names)
}

function readlink(path, done) {
  const parsed = parseName(path.slice(1))
  if (!parsed?.symlink) return done(Fuse.EINVAL)
  done(0, nodeName(parsed.diskseq, parsed.partition))
}

const statfs = (_, done) =>
  done(0, { bsize: 4096, frsize: 4096, blocks: 0, bfree: 0, bavail: 0, files: registry.size, ffree: 0, favail: 0, namemax: 255 })

const mountpoint = process.argv[2]
if (mountpoint === undefined) {
  console.error('usage: fuse-native.mjs MOUNTPOINT')
  process.exit(2)
}
uevents.open()
await registry.start()
const fuse = new Fuse(mountpoint, { getattr, readdir, readlink, statfs }, OPTIONS)
fuse.mount((error) => {
  if (error) throw error
  console.error(JSON.stringify({ msg: 'mounted', mountpoint, devices: registry.size }))
})
for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP']) {
  process.on(signal, () => {
    fuse.unmount((error) => {
      if (error) console.error(String(error))
      process.exit(error ? 1 : 0)
    })
  })
}
