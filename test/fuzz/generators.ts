// SPDX-License-Identifier: MIT
/** Inputs of each kind: mostly as the kernel writes them, then changed a little, or broken. */
import { constants } from 'node:os'

import { Opcode } from '../../src/fuse/wire.js'
import { directoryId, DM_ID, DM_NAME, type DiskSeq, inodeId, linkId, linkName, nodeName } from '../../src/devices/names.js'
import { native } from '../../src/native.js'
import type { Choices } from './choices.js'

/** Numbers at and around the sizes that matter. */
const NUMBERS = [
  0, 1, 2, 3, 4, 7, 8, 9, 10, 15, 16, 23, 24, 31, 32, 39, 40, 63, 64, 87, 88, 127, 128, 255, 256, 257, 1023, 1024, 4095, 4096, 65535, 65536,
  131072, 0x7fffffff, 0x80000000, 0xfffffffe, 0xffffffff,
]
const number = (c: Choices) => (c.oneIn(4) ? c.below(2 ** 32) : c.pick(NUMBERS))

/** Flips bits, and cuts out, doubles, overwrites or inserts pieces. */
export function mutate(c: Choices, bytes: Buffer, times = 1 + c.below(4)): Buffer {
  let mutant = Buffer.from(bytes)
  for (let i = 0; i < times; i++) {
    const at = c.below(mutant.length + 1)
    const rest = mutant.subarray(at)
    switch (c.below(7)) {
      case 0:
        if (at < mutant.length) mutant[at] = (mutant[at] as number) ^ (1 << c.below(8))
        break
      case 1:
        if (at < mutant.length) mutant[at] = c.below(256)
        break
      case 2:
        mutant = mutant.subarray(0, at)
        break
      case 3:
        mutant = Buffer.concat([mutant.subarray(0, at), rest.subarray(1 + c.below(8))])
        break
      case 4:
        mutant = Buffer.concat([mutant.subarray(0, at), rest.subarray(0, c.below(32)), rest])
        break
      case 5:
        mutant = Buffer.concat([mutant.subarray(0, at), c.bytes(c.below(16)), rest])
        break
      default:
        if (rest.length >= 4) rest.writeUInt32LE(number(c), 0)
    }
  }
  return mutant
}

/** The number of disks in the world; requests also ask for some that it does not have. */
export const DISKS = 8
/** The first number that a disk of the world can have. */
export const DISKSEQ_FIRST = 13n
export const PARTITIONS = 3

const diskseq = (c: Choices) =>
  (c.oneIn(8) ? c.pick([1n, 999n, 2n ** 52n - 1n, 2n ** 52n, 2n ** 64n - 1n]) : DISKSEQ_FIRST + BigInt(c.below(DISKS * 2))) as DiskSeq

export function name(c: Choices): Buffer {
  const n = diskseq(c)
  const partition = c.oneIn(6) ? c.pick([255, 256, 1023, 1024, 9999, 99999, 100000]) : 1 + c.below(PARTITIONS + 1)
  const text = c.pick([
    nodeName(n, 0),
    nodeName(n, partition),
    linkName(n, partition),
    `${n}p0`,
    `0${n}`,
    `${n}-part`,
    `+${n}`,
    `${n}p0${partition}`,
    ` ${n}`,
    `${n}\n`,
    `${n}p${partition}p1`,
    '0',
    '',
    '18446744073709551615',
    '18446744073709551616',
    '99999999999999999999',
    '..',
    'autorun.inf',
    'x'.repeat(255),
  ])
  const bytes = Buffer.from(text, 'latin1')
  return c.oneIn(4) ? mutate(c, bytes, 1) : bytes
}

/** A name that the world is likely to have. */
function realName(c: Choices): Buffer {
  const n = diskseq(c)
  const partition = 1 + c.below(PARTITIONS)
  return Buffer.from(c.pick([nodeName(n, 0), nodeName(n, 0), nodeName(n, partition), linkName(n, partition)]))
}

/** A name that the kernel may give a device of the world. */
function kernelName(c: Choices): Buffer {
  const index = c.below(DISKS)
  const partition = c.below(PARTITIONS + 1)
  const loop = c.oneIn(2)
  return Buffer.from(
    `${loop ? `loop${index}` : `sd${String.fromCharCode(97 + index)}`}${partition === 0 ? '' : `${loop ? 'p' : ''}${partition}`}`,
  )
}

/** Node ids of the world's nodes, and any others. */
export function anId(c: Choices): bigint {
  if (c.oneIn(8)) return c.u64()
  if (c.oneIn(8)) return 1n
  if (c.oneIn(12)) return c.oneIn(4) ? DM_ID : (directoryId(diskseq(c)) ?? DM_ID)
  const partition = c.below(PARTITIONS + 1)
  const n = diskseq(c)
  const minor = partition === 0 ? 0 : 16 * (c.oneIn(4) ? c.below(DISKS) : Number((n - DISKSEQ_FIRST) & 7n)) + partition
  const link = c.oneIn(3) ? linkId(n, partition, c.pick(['part', 'waiting', 'kernel', 'unknown'])) : undefined
  const id = link ?? inodeId(n, partition, minor) ?? 2n
  return c.oneIn(32) ? id ^ (1n << BigInt(c.below(64))) : id
}

const aDirectory = (c: Choices) => (c.oneIn(4) ? DM_ID : (directoryId(diskseq(c)) ?? DM_ID))

/** A directory handle; the daemon has none. */
const handle = (c: Choices) => (c.oneIn(4) ? c.u64() : 0n)

/** The first of the threads that requests come from. */
export const TID_FIRST = 4700
export const TIDS = 8
const UIDS = [0, 1000, 60001, 0xffffffff]

export const UNIQUE_FIRST = 1000n

const OPCODES = [
  Opcode.LOOKUP,
  Opcode.LOOKUP,
  Opcode.LOOKUP,
  Opcode.LOOKUP,
  Opcode.LOOKUP,
  Opcode.LOOKUP,
  Opcode.GETATTR,
  Opcode.GETATTR,
  Opcode.FORGET,
  Opcode.BATCH_FORGET,
  Opcode.INTERRUPT,
  Opcode.SETATTR,
  Opcode.READLINK,
  Opcode.OPENDIR,
  Opcode.READDIR,
  Opcode.READDIR,
  Opcode.RELEASEDIR,
  Opcode.STATFS,
  Opcode.GETXATTR,
  Opcode.SETXATTR,
  Opcode.LISTXATTR,
  Opcode.REMOVEXATTR,
  Opcode.UNLINK,
  Opcode.FSYNCDIR,
  Opcode.MKDIR,
  Opcode.RENAME2,
  Opcode.TMPFILE,
  Opcode.INIT,
  Opcode.DESTROY,
]
const XATTRS = ['user.a', 'system.posix_acl_access', 'security.selinux', 'trusted.x', '']

const u32 = (...values: number[]) => {
  const bytes = Buffer.alloc(4 * values.length)
  values.forEach((value, i) => bytes.writeUInt32LE(value >>> 0, 4 * i))
  return bytes
}
const u64 = (...values: bigint[]) => {
  const bytes = Buffer.alloc(8 * values.length)
  values.forEach((value, i) => bytes.writeBigUInt64LE(BigInt.asUintN(64, value), 8 * i))
  return bytes
}
const cstring = (text: string) => Buffer.from(`${text}\0`, 'latin1')
const cat = (...parts: Buffer[]) => Buffer.concat(parts)

function body(c: Choices, opcode: number, recent: bigint): Buffer {
  switch (opcode) {
    case Opcode.LOOKUP:
      return cat(c.oneIn(4) ? name(c) : c.oneIn(24) ? Buffer.from(DM_NAME) : c.oneIn(4) ? kernelName(c) : realName(c), Buffer.alloc(1))
    case Opcode.UNLINK:
    case Opcode.MKDIR:
      return cat(name(c), Buffer.alloc(1))
    case Opcode.GETATTR:
      return Buffer.alloc(16)
    case Opcode.FORGET:
      return u64(c.oneIn(8) ? c.u64() : BigInt(c.below(3)))
    case Opcode.BATCH_FORGET: {
      const count = c.below(5)
      const forgotten = Array.from({ length: count }, () => u64(anId(c), BigInt(c.below(3))))
      return cat(u32(c.oneIn(8) ? number(c) : count, 0), ...forgotten)
    }
    case Opcode.INTERRUPT:
      return u64(c.oneIn(8) ? c.u64() : recent - 2n * BigInt(c.below(16)))
    case Opcode.SETATTR: {
      const bytes = Buffer.alloc(88)
      bytes.writeUInt32LE(c.below(1 << 11), 0)
      for (const at of [32, 40]) bytes.writeBigUInt64LE(c.oneIn(4) ? c.u64() : 1700000000n, at)
      for (const at of [56, 60, 68, 76, 80]) bytes.writeUInt32LE(number(c), at)
      return bytes
    }
    case Opcode.READDIR:
      return cat(u64(handle(c), c.oneIn(3) ? anId(c) : 0n), u32(c.oneIn(2) ? 4096 : number(c), 0), u64(0n), u32(0, 0))
    case Opcode.RELEASEDIR:
      return cat(u64(handle(c)), u32(0, 0), u64(0n))
    case Opcode.GETXATTR:
      return cat(u32(c.oneIn(2) ? 0 : number(c), 0), cstring(c.pick(XATTRS)))
    case Opcode.LISTXATTR:
      return u32(c.oneIn(2) ? 0 : number(c), 0)
    case Opcode.REMOVEXATTR:
      return cstring(c.pick(XATTRS))
    case Opcode.SETXATTR: {
      const value = c.bytes(c.below(20))
      return cat(u32(c.oneIn(8) ? number(c) : value.length, c.below(4)), cstring(c.pick(XATTRS)), value)
    }
    case Opcode.INIT:
      return u32(c.oneIn(8) ? number(c) : 7, c.oneIn(8) ? number(c) : 38, 0, 0xffffffff, ...Array<number>(12).fill(0))
    default:
      return c.bytes(c.below(64))
  }
}

/** One request, mostly of the length that its header says. */
export function request(c: Choices, unique: bigint): Buffer {
  const opcode = c.oneIn(20) ? c.below(256) : c.pick(OPCODES)
  const nodeid = opcode === Opcode.LOOKUP || opcode === Opcode.OPENDIR ? (c.oneIn(16) ? anId(c) : c.oneIn(3) ? aDirectory(c) : 1n) : anId(c)
  let content = body(c, opcode, unique)
  if (c.oneIn(6)) content = mutate(c, content)
  const header = Buffer.alloc(40)
  header.writeUInt32LE(c.oneIn(24) ? number(c) : 40 + content.length, 0)
  header.writeUInt32LE(opcode, 4)
  // A number that is used twice, which no kernel does.
  header.writeBigUInt64LE(c.oneIn(200) ? unique - 2n * BigInt(c.below(8)) : unique, 8)
  header.writeBigUInt64LE(BigInt.asUintN(64, nodeid), 16)
  header.writeUInt32LE(c.pick(UIDS), 24)
  header.writeUInt32LE(c.pick(UIDS), 28)
  header.writeUInt32LE(c.oneIn(16) ? number(c) : TID_FIRST + c.below(TIDS), 32)
  const whole = cat(header, content)
  return c.oneIn(100) ? whole.subarray(0, c.below(whole.length + 1)) : whole
}

/** The kernel's uevents, lib/kobject_uevent.c. */
export function uevent(c: Choices): Buffer {
  const kname = c.pick(['loop0', 'sda', 'sda1', 'cciss!c0d0', 'nvme0n1p3', '..', '.', '', 'a b', 'x'.repeat(300)])
  const action = c.pick(['add', 'change', 'remove', 'bind', 'ADD', ''])
  const path = c.pick([`/devices/virtual/block/${kname}`, kname, `/${kname}`, '/', '', '/../../etc/passwd', `/a/${kname}/`])
  const fields = [
    `ACTION=${action}`,
    `DEVPATH=${path}`,
    c.pick(['SUBSYSTEM=block', 'SUBSYSTEM=net', 'XSUBSYSTEM=block', 'SUBSYSTEM=block=']),
    'MAJOR=7',
    'MINOR=0',
    `DEVNAME=${kname}`,
    'DEVTYPE=disk',
    'DISKSEQ=13',
    `SEQNUM=${c.below(1000)}`,
  ]
  if (c.oneIn(4)) fields.splice(c.below(fields.length), 1)
  if (c.oneIn(8)) fields.push(`DEVPATH=/devices/other/${c.text(c.below(6))}`)
  const whole = Buffer.from(`${action}@${path}\0${fields.map((field) => `${field}\0`).join('')}`, 'latin1')
  return c.oneIn(3) ? mutate(c, whole) : whole
}

/** A device's `uevent` file in sysfs. */
export function sysfsText(c: Choices): Buffer {
  const partition = c.oneIn(2)
  const value = (usual: string) =>
    c.oneIn(6)
      ? c.pick([
          '',
          '0',
          '-1',
          '007',
          '1e3',
          '0x10',
          ' 1',
          '1 ',
          '99999999',
          '18446744073709551615',
          '18446744073709551616',
          'x',
          '../../etc',
          '1\r',
          '1\0',
        ])
      : usual
  const lines = [
    `MAJOR=${value('259')}`,
    `MINOR=${value('3')}`,
    `DEVNAME=${value('loop0')}`,
    `DEVTYPE=${value(partition ? 'partition' : 'disk')}`,
    `DISKSEQ=${value('13')}`,
    ...(partition || c.oneIn(8) ? [`PARTN=${value('2')}`] : []),
  ]
  if (c.oneIn(5)) lines.splice(c.below(lines.length), 1)
  if (c.oneIn(5)) lines.push(c.pick(lines))
  if (c.oneIn(8)) lines.push(c.pick(['DISKSEQ=14', 'PARTN=3', '=', '==', 'MAJOR', 'MAJOR=']))
  const text = Buffer.from(lines.map((line) => `${line}\n`).join(''), 'latin1')
  return c.oneIn(5) ? mutate(c, text) : text
}

const CALLS = [...Object.values(native.syscalls), 165, 431, 54, 9999, -1, 0]

/** /proc/TID/syscall, proc_pid_syscall (fs/proc/base.c). */
export function syscallLine(c: Choices): Buffer {
  if (c.oneIn(12)) return Buffer.from(c.pick(['running\n', 'running', '-1 0x7ffd1a2b3c48 0x7f12d4e5a6b7\n', '', '\n', 'runnin']))
  const call = c.oneIn(8) ? c.pick(['', ' ', '0x4', '4.0', '4e0', '+4', '-0', '04', '257 ', 'NaN', 'Infinity', '1e400']) : c.pick(CALLS)
  const word = () => `0x${(c.oneIn(2) ? BigInt(number(c)) : c.u64()).toString(16)}`
  const flags = c.oneIn(2) ? word() : `0x${c.pick([0, 0x80000, native.O_PATH, constants.signals.SIGHUP, 0x10000, 0x5000940a]).toString(16)}`
  const pc = c.oneIn(8) ? c.pick(['0x400000', '1e99', 'Infinity', '0xffffffff', '0x100000000', '9999999999', '']) : '0x7f12d4e5a6b7'
  const fields = [call, word(), flags, flags, word(), word(), word(), '0x7ffd1a2b3c48', pc]
  if (c.oneIn(16)) fields.splice(c.below(9), 1)
  if (c.oneIn(16)) fields.splice(c.below(9), 0, c.pick(['', '0x0', 'x']))
  if (c.oneIn(16)) fields[1 + c.below(8)] = c.pick(['', '0x', 'x', '0', '0x0x0', '-0x1', '0X10', '0xg'])
  const line = Buffer.from(`${fields.join(' ')}${c.oneIn(8) ? c.pick(['', ' ', '\n\n', '\0']) : '\n'}`, 'latin1')
  return c.oneIn(6) ? mutate(c, line) : line
}

/** The group of the node that {@link statusText} is about. */
export const NODE_GROUP = 6

/** /proc/TID/status, fs/proc/array.c: in a name only line feeds and backslashes are escaped. */
export function statusText(c: Choices): Buffer {
  const groups = c.pick(['', '4 ', '61001 70000 ', `${NODE_GROUP} `, `4 ${NODE_GROUP} 70000 `, `1${NODE_GROUP} ${NODE_GROUP}1 `])
  const caps = c.pick(['0000000000000000', '000001ffffffffff', '0000000000000002', '0000000000000004', '0000000000000008'])
  const comm = c.pick([
    'qemu',
    `\rGroups:\t${NODE_GROUP}\r`,
    '\rCapEff:\t2\r',
    'Groups:\t6 ',
    '\x85CapEff:\t2',
    '\vCapEff:\t2\v',
    'a\\nGroups:\t6',
    c.text(15).replace(/[\n\0]/g, ''),
  ])
  const lines = [
    `Name:\t${comm}`,
    'State:\tS (sleeping)',
    'Uid:\t60001\t60001\t60001\t60001',
    'Gid:\t60001\t60001\t60001\t60001',
    'FDSize:\t64',
    `Groups:\t${groups} `,
    'NStgid:\t4711',
    'CapInh:\tffffffffffffffff',
    `CapEff:\t${caps}`,
    'CapBnd:\t000001ffffffffff',
  ]
  if (c.oneIn(6)) lines.splice(1 + c.below(lines.length - 1), 1)
  if (c.oneIn(12)) lines.push(`Groups:\t${NODE_GROUP} `)
  const text = Buffer.from(lines.map((line) => `${line}\n`).join(''), 'latin1')
  return c.oneIn(5) ? mutate(c, text) : text
}

/** /proc/TID/stat, do_task_stat (fs/proc/array.c): in the name only line feeds are escaped. */
export function statText(c: Choices): Buffer {
  const comm = c.pick([
    'qemu',
    ') S 1 2 3',
    '(',
    ')',
    '',
    'a b',
    ') R 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0',
    c.text(15).replace(/[\n\0]/g, ''),
  ])
  const fields = Array.from({ length: 49 }, () => String(c.oneIn(3) ? c.pick([-1, 0, 1, 94000000000000]) : number(c)))
  const whole = Buffer.from(`4711 (${comm}) ${c.pick(['S', 'D', 'R', 'Z'])} ${fields.join(' ')}\n`, 'latin1')
  return c.oneIn(4) ? mutate(c, whole) : c.oneIn(8) ? whole.subarray(0, c.below(whole.length)) : whole
}

/** system.posix_acl_access */
export function acl(c: Choices): Buffer {
  const entries = Array.from({ length: c.below(6) }, () => {
    const entry = Buffer.alloc(8)
    entry.writeUInt16LE(c.oneIn(8) ? c.below(65536) : 1 << c.below(6), 0)
    entry.writeUInt16LE(c.below(8), 2)
    entry.writeUInt32LE(c.pick([0xffffffff, 0, NODE_GROUP, 60001]), 4)
    return entry
  })
  const whole = cat(u32(c.oneIn(8) ? number(c) : 2), ...entries)
  return c.oneIn(4) ? mutate(c, whole) : whole
}

/** inotify_event, as read. */
export function inotifyEvents(c: Choices): Buffer {
  const events = Array.from({ length: c.below(5) }, () => {
    const text = name(c)
    const padded = Buffer.alloc(c.oneIn(4) ? 0 : (text.length + 16) & ~15)
    text.copy(padded)
    return cat(u32(1, c.oneIn(8) ? number(c) : c.pick([0x20, 0x8, 0x10, 0x4000]), 0, c.oneIn(8) ? number(c) : padded.length), padded)
  })
  const whole = cat(...events)
  return c.oneIn(4) ? mutate(c, whole) : whole
}

const { layout } = native
/** Where the memory of a hand-over has numbers, and the first few slots of each kind. */
const SLOTS = [
  [layout.STATE_SMALL_AT, layout.STATE_SMALL_SIZE],
  [layout.STATE_BIG_AT, layout.STATE_BIG_SIZE],
  [layout.STATE_PINS_AT, layout.STATE_PIN_SIZE],
] as const
export const SLOTS_TOUCHED = 6

/** Changes of shared memory: where (32 bits), how many bytes (8 bits), the bytes. */
export function patches(c: Choices): Buffer {
  return cat(
    ...Array.from({ length: c.below(8) }, () => {
      const [start, size] = c.pick(SLOTS)
      const at = c.pick([
        4 * c.below(12),
        layout.STATE_LANDING_AT + 4 * c.below(16),
        start + size * c.below(SLOTS_TOUCHED) + 4 * c.below(16),
        start + size * c.below(SLOTS_TOUCHED) + 4 * c.below(16),
        c.below(layout.STATE_PATH_AT + 300),
      ])
      const bytes = c.oneIn(4) ? c.bytes(1 + c.below(60)) : u32(number(c))
      return cat(u32(at), Buffer.from([bytes.length]), bytes)
    }),
  )
}

/** For each socket: how many messages; for each message the number of descriptors, the length, the text. */
export function vaultMessages(c: Choices): Buffer {
  const message = () => {
    const place = Buffer.from(
      c.oneIn(3) ? c.pick(['', ' ', '0x1', '1e0', '-1', '1.5', 'x', '00', '4096', '999999999999999999']) : String(c.below(6)),
    )
    const text = c.oneIn(8) ? c.bytes(c.below(30)) : place
    return cat(Buffer.from([c.oneIn(4) ? c.below(4) : 1, text.length]), text)
  }
  return cat(
    ...Array.from({ length: c.below(8) }, () => {
      const messages = Array.from({ length: c.oneIn(4) ? c.below(4) : 1 }, message)
      return cat(Buffer.from([messages.length]), ...messages)
    }),
  )
}

/** The first byte of an {@link item}. */
export const REQUEST = 0
export const EVENT = 1

/** One step of an episode: a request, or a change of the world. */
export function item(c: Choices, index: number): Buffer {
  if (c.oneIn(12)) return cat(Buffer.from([EVENT]), c.bytes(4))
  return cat(Buffer.from([REQUEST]), request(c, UNIQUE_FIRST + 2n * BigInt(index)))
}
