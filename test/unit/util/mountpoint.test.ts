// SPDX-License-Identifier: MIT
/** Mount options and mount points. */
import { mkdtempSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { UserError } from '../../../src/util/errno.js'
import { isDead, mountData, parseMountOptions, prepareMountpoint } from '../../../src/util/mountpoint.js'
import { native } from '../../../src/native.js'

/** sys/mount.h */
const MS_RDONLY = 1
const MS_NOSUID = 2
const MS_NODEV = 4
const MS_NOEXEC = 8
const MS_NOATIME = 1024
const MS_RELATIME = 1 << 21

const ALWAYS = MS_NOSUID | MS_NOEXEC
const OWN = ['linger', 'hold']

t.test('no options are needed', async (t) => {
  for (const text of ['', ',', ',,,', 'defaults', 'rw', 'defaults,rw']) {
    t.strictSame(parseMountOptions(text, OWN), { flags: ALWAYS, labels: [], own: new Map() }, JSON.stringify(text))
  }
})

t.test('flags of the mount are passed on', async (t) => {
  t.equal(parseMountOptions('ro', OWN).flags, ALWAYS | MS_RDONLY)
  t.equal(parseMountOptions('rw,noatime,relatime', OWN).flags, ALWAYS | MS_NOATIME | MS_RELATIME)
  t.equal(parseMountOptions('nosuid,noexec,dev', OWN).flags, ALWAYS, 'flags that are set anyway')
  for (const text of ['', 'ro', 'dev', 'noatime']) {
    t.equal(parseMountOptions(text, OWN).flags & (MS_NODEV | ALWAYS), ALWAYS, 'never nodev, always nosuid and noexec')
  }
})

t.test('options of the program are found', async (t) => {
  const { own, flags, labels } = parseMountOptions('ro,linger=5ms,hold=30,hold=40', OWN)
  t.strictSame(
    [...own],
    [
      ['linger', '5ms'],
      ['hold', '40'],
    ],
    'the last one counts',
  )
  t.equal(flags, ALWAYS | MS_RDONLY)
  t.strictSame(labels, [])
  t.strictSame([...parseMountOptions('linger=', OWN).own], [['linger', '']])
  t.strictSame([...parseMountOptions('linger=a=b', OWN).own], [['linger', 'a=b']])
})

t.test('a label may hold commas, in quotes', async (t) => {
  const context = 'context="system_u:object_r:fixed_disk_device_t:s0:c1,c2"'
  const { labels, own, flags } = parseMountOptions(`ro,${context},linger=7,fscontext=a:b:c,rootcontext="x,y",defcontext=z`, OWN)
  t.strictSame(labels, [context, 'fscontext=a:b:c', 'rootcontext="x,y"', 'defcontext=z'])
  t.strictSame([...own], [['linger', '7']])
  t.equal(flags, ALWAYS | MS_RDONLY)
})

const refused = (t: Test, text: string, pattern: RegExp) => {
  try {
    parseMountOptions(text, OWN)
    t.fail(`${text} was accepted`)
  } catch (error) {
    t.type(error, UserError, text)
    t.match((error as Error).message, pattern)
    t.equal((error as UserError).exitCode, 2)
  }
}

t.test('an option that would make the tree useless is refused, with the reason', async (t) => {
  for (const text of ['nodev', 'ro,nodev', 'nodev,dev', 'dev,nodev']) refused(t, text, /nodev.*no device could be opened.*remove/)
  refused(t, 'suid', /suid.*always mounted nosuid.*remove/)
  refused(t, 'rw,exec', /exec.*always mounted noexec.*remove/)
})

t.test('an unknown option is refused by its name', async (t) => {
  for (const option of [
    'nosuch',
    'nosuch=1',
    'RO',
    'ro=1',
    'max_read=4096',
    'fd=3',
    'rootmode=40000',
    'user_id=5',
    'noatimes',
    'linger',
    'context',
    'sync',
    'bind',
    'remount',
    ' ro',
    'x',
    '=',
    '=1',
    'toString',
    'constructor',
    'hasOwnProperty',
    '__proto__',
    'valueOf',
  ]) {
    refused(t, `ro,${option}`, /not known.*--help/)
  }
  refused(t, 'ro,nosuch=1,noatime', /nosuch=1/)
  refused(t, 'ro,"rw"', /not known/)
})

t.test('options for other programs are ignored', async (t) => {
  const text = 'x-systemd.requires=foo.service,x-systemd.automount,x-mount.mkdir=0755,x-gvfs-hide,comment=x,_netdev,nofail,noauto,user=joe'
  t.strictSame(parseMountOptions(text, OWN), { flags: ALWAYS, labels: [], own: new Map() })
})

t.test('the kernel is told to check permissions, for all users', async (t) => {
  const data = mountData(7, parseMountOptions('ro,linger=5,context="a:b,c"', OWN)).split(/,(?![^"]*"$)/)
  t.strictSame(data, ['fd=7', 'rootmode=40000', 'user_id=0', 'group_id=0', 'default_permissions', 'allow_other', 'context="a:b,c"'])
})

/** A directory for mount points. */
function temporary(t: Test) {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-mountpoint-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  return directory
}

t.test('a mount point is made, and its path is the real one', async (t) => {
  const top = temporary(t)
  const directory = join(top, 'a/b c/d')
  const before = process.umask(0o077)
  t.teardown(() => process.umask(before))
  t.equal(prepareMountpoint(directory), directory)
  for (const made of ['a', 'a/b c', 'a/b c/d']) t.equal(statSync(join(top, made)).mode & 0o7777, 0o755, made)
  t.equal(prepareMountpoint(directory), directory, 'also if it exists')
  t.equal(prepareMountpoint(`${top}/a/../a/b c/d/`), directory)
  symlinkSync(directory, join(top, 'link'))
  t.equal(prepareMountpoint(join(top, 'link')), directory)
})

t.test('a path that is no directory is no mount point', async (t) => {
  const top = temporary(t)
  writeFileSync(join(top, 'file'), '')
  for (const path of [join(top, 'file'), join(top, 'file/below')]) {
    t.throws(() => prepareMountpoint(path), { name: 'UserError', message: /: not a directory/ }, path)
  }
  t.throws(() => prepareMountpoint('/proc/self/nothing'), { name: 'UserError', message: /cannot be made a mount point: ENOENT/ })
})

t.test('a mount that answers is not dead', async (t) => {
  const top = temporary(t)
  t.equal(await isDead(native, top), false)
  t.equal(await isDead(native, join(top, 'missing')), false)
})
