// SPDX-License-Identifier: MIT
/**
 * Device-mapper devices: made so that their sequence number is known before anybody else can know of them, and changed
 * by their number while they are held open, so that each call reaches that very device, or fails. What a table names by
 * a path is opened, verified, and named by its number for as long as the kernel needs to take it.
 */
import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'

import { sameDmName } from '../devices/names.js'
import { type DmFound, type DmTarget, native } from '../native.js'
import { E, errnoName, errnoOf } from '../util/errno.js'
import { ownPidNamespace } from '../util/pid-namespace.js'
import { printable } from '../util/text.js'
import { devices, type Disk, DiskError, open, type OpenOptions } from './open.js'

/** Of libdevmapper.h. */
const TASK = {
  CREATE: 0,
  RELOAD: 1,
  REMOVE: 2,
  SUSPEND: 4,
  RESUME: 5,
  INFO: 6,
  RENAME: 8,
  STATUS: 10,
  TABLE: 11,
  LIST: 13,
  MESSAGE: 17,
} as const

/** Of native/addon/devmapper.cc. */
const READ_ONLY = 1
const DEFERRED = 2
const NO_FLUSH = 4
const SKIP_LOCKFS = 8
const INACTIVE = 16
/** Wait until udev has handled the event of it. */
const SYNC = 32
/** That event is for its name alone: nothing looks at what is on the device. */
const NAME_ONLY = 64

interface Call {
  readonly flags?: number
  /** Else by name. */
  readonly device?: { readonly major: number; readonly minor: number }
  readonly name?: string
  readonly text?: string
  readonly uuid?: string
  readonly sector?: bigint
  readonly targets?: readonly DmTarget[]
}

const FAILS: Readonly<Record<number, string>> = {
  [TASK.CREATE]: 'it cannot be made',
  [TASK.RELOAD]: 'the kernel does not take the table',
  [TASK.REMOVE]: 'it cannot be removed',
  [TASK.SUSPEND]: 'it cannot be suspended',
  [TASK.RESUME]: 'it cannot be resumed',
  [TASK.RENAME]: 'it cannot be renamed',
  [TASK.MESSAGE]: 'its target does not take the message',
}

/** @throws DiskError */
function call(task: number, { flags = 0, device, name = '', text = '', uuid = '', sector = 0n, targets = [] }: Call): Promise<DmFound> {
  const { major, minor } = device ?? { major: -1, minor: 0 }
  return new Promise((resolve, reject) => {
    native.deviceMapper(task, flags, major, minor, name, text, uuid, sector, targets, (error, said, found) => {
      if (error === 0) resolve(found)
      else reject(failed(task, error, said))
    })
  })
}

function failed(task: number, errno: number, said: string): DiskError {
  const code = errnoName(errno)
  if (errno === E.ENOSYS && !/ioctl/.test(said)) {
    return new DiskError(`libdevmapper cannot be loaded (${printable(said)}); install it (apt install libdevmapper1.02.1)`, code)
  }
  if (process.geteuid?.() !== 0) return new DiskError("device-mapper is root's; run this as root", 'EACCES')
  // Not a device of such a name.
  if (said.includes('/dev/mapper/control'))
    return new DiskError('this kernel has no device-mapper; load the module (modprobe dm-mod)', 'ENODEV')
  if (task === TASK.CREATE && errno === E.EBUSY) return new DiskError('there is a device with this UUID already', 'EEXIST')
  const hint = task === TASK.RELOAD ? '; the kernel says why in its log (journalctl -k)' : ''
  return new DiskError(`${FAILS[task] ?? 'device-mapper cannot be asked'}: ${code}${hint}`, code)
}

// Tables

/**
 * @param text as dmsetup(8) takes it: rows of start, length, both in sectors of 512 bytes, type, and what the type needs
 * @throws DiskError
 */
export function parseTable(text: string): DmTarget[] {
  const targets: DmTarget[] = []
  for (const [i, line] of text.split('\n').entries()) {
    const row = line.trim()
    if (row === '' || row.startsWith('#')) continue
    const [, start = '', length = '', type = '', params = ''] = /^(\d{1,19})\s+(\d{1,19})\s+(\S+)\s*(.*)$/.exec(row) ?? []
    if (type === '') {
      throw new DiskError(`line ${i + 1} of the table is not "START LENGTH TYPE PARAMETERS": ${printable(row)}`, 'EINVAL')
    }
    if (row.includes('\0')) throw new DiskError(`line ${i + 1} of the table has a NUL in it`, 'EINVAL')
    if (Buffer.byteLength(type) > TYPE_MAX) throw new DiskError(`line ${i + 1} of the table: no target has such a long name`, 'EINVAL')
    targets.push({ start: BigInt(start), length: BigInt(length), type, params })
  }
  if (targets.length === 0) throw new DiskError('the table is empty', 'EINVAL')
  return targets
}

/** DM_MAX_TYPE_NAME, uapi/linux/dm-ioctl.h */
const TYPE_MAX = 15

/**
 * Has the devices that are named by paths held open while `use` has them by their numbers.
 *
 * @throws DiskError
 */
async function withDevices<T>(targets: readonly DmTarget[], use: (targets: readonly DmTarget[]) => Promise<T>): Promise<T> {
  const held: Disk[] = []
  const byNumber = async (word: string): Promise<string> => {
    if (!word.startsWith('/')) return word
    try {
      const disk = await open(word)
      held.push(disk)
      return disk.majmin
    } catch (error) {
      if (!(error instanceof DiskError)) throw error
      // A file's name, for a target that wants one.
      if (error.code === 'ENOTBLK') return word
      throw new DiskError(`in the table, ${printable(word)}: ${error.message}`, error.code)
    }
  }
  try {
    const named = []
    for (const target of targets) {
      const words = []
      for (const word of target.params.split(/(\s+)/)) words.push(await byNumber(word))
      named.push({ ...target, params: words.join('') })
    }
    return await use(named)
  } finally {
    await Promise.all(held.map((disk) => disk.close()))
  }
}

// Names

/** DM_NAME_LEN and DM_UUID_LEN, uapi/linux/dm-ioctl.h, bytes without the NUL. */
const NAME_MAX = 127
const UUID_MAX = 128

/** What libdevmapper writes as it is; all else as \xNN. */
const PLAIN = /^[#+\-.:=@_0-9A-Za-z]$/

/** @throws DiskError where no device may be called so */
export function checkDmName(name: string): void {
  const refuse = (why: string): never => {
    throw new DiskError(`no device-mapper device can be called ${printable(name) || 'nothing'}: ${why}`, 'EINVAL')
  }
  if (name === '') refuse('it needs a name')
  if (name === '.' || name === '..' || name === 'control') refuse('/dev/mapper has that name for something else')
  if (name.includes('/')) refuse('a name has no slash; give it without /dev/mapper/')
  if (/[\u0000-\u001f\u007f-\u009f\ufffd]/.test(name)) refuse('it has control characters, or is no UTF-8')
  const bytes = [...Buffer.from(name).toString('latin1')].reduce((sum, byte) => sum + (PLAIN.test(byte) ? 1 : 4), 0)
  if (bytes > NAME_MAX) refuse(`it takes ${bytes} bytes as device-mapper writes it, and there is room for ${NAME_MAX}`)
}

function checkUuid(uuid: string): void {
  if (Buffer.byteLength(uuid) <= UUID_MAX && !/[\u0000-\u001f\u007f-\u009f]/.test(uuid)) return
  throw new DiskError(`no UUID: ${printable(uuid)}; it has at most ${UUID_MAX} bytes, and no control characters`, 'EINVAL')
}

/**
 * What a device is called while it is made: whose it is, in case that process is killed before it is done. Nobody else
 * can know the name, so nobody else opens it, or makes another one of that name.
 */
const NEW = 'diskseqfs-new'

function newName(): string {
  return [NEW, ownPidNamespace(), process.pid, startOf(process.pid), randomBytes(8).toString('hex')].join('-')
}

/** When a process was started, in clock ticks since boot; undefined if there is none. */
function startOf(pid: number | string): string | undefined {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1')
    // The program's name may have blanks and parentheses in it.
    return stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]
  } catch (error) {
    errnoOf(error)
    return undefined
  }
}

/** Removes what processes left that were killed while they made a device. */
async function removeAbandoned(): Promise<void> {
  const { names } = await call(TASK.LIST, {})
  for (const name of names) {
    const [, namespace, pid = '', start] = new RegExp(`^${NEW}-(\\d+)-(\\d+)-(\\d+)-[0-9a-f]+$`).exec(name) ?? []
    if (namespace !== String(ownPidNamespace()) || startOf(pid) === start) continue
    // Another process may be doing the same.
    await call(TASK.REMOVE, { name, flags: SYNC }).catch(() => {})
  }
}

// Operations

export interface DmCreateOptions {
  readonly uuid?: string
  readonly readOnly?: boolean
  /** The kernel removes it when its last user has closed it, the first of whom has the result. */
  readonly untilUnused?: boolean
}

/**
 * Makes a device.
 *
 * @param name which no other device-mapper device has
 * @param table as of {@link parseTable}
 * @returns it, open for reading
 * @throws DiskError
 */
export async function createDm(name: string, table: string, options: DmCreateOptions = {}): Promise<Disk> {
  const { uuid = '', readOnly = false, untilUnused = false } = options
  checkDmName(name)
  checkUuid(uuid)
  const targets = parseTable(table)
  await removeAbandoned()
  if ((await call(TASK.INFO, { name })).exists) throw taken()
  return withDevices(targets, async (targets) => {
    const unknown = newName()
    const { major, minor } = await call(TASK.CREATE, { name: unknown, uuid })
    const device = { major, minor }
    let disk: Disk | undefined
    try {
      await call(TASK.RELOAD, { device, targets, flags: readOnly ? READ_ONLY : 0 })
      disk = await open(`${major}:${minor}`)
      await verify(device, unknown)
      if (untilUnused) await call(TASK.REMOVE, { device, flags: DEFERRED })
      await call(TASK.RENAME, { name: unknown, text: name, flags: SYNC | NAME_ONLY }).catch(async (error: unknown) => {
        throw (await call(TASK.INFO, { name })).exists ? taken() : error
      })
      await call(TASK.RESUME, { device, flags: SYNC | (readOnly ? READ_ONLY : 0) })
      return disk
    } catch (error) {
      await disk?.close()
      await call(TASK.REMOVE, { name: unknown, flags: SYNC }).catch(() => {})
      if (disk !== undefined && !untilUnused) await removeIfOurs(name, disk)
      throw error
    }
  })
}

const taken = () => new DiskError('a device-mapper device of this name exists', 'EEXIST')

/** @throws DiskError where the device that is held is not the one of that name */
async function verify(device: { major: number; minor: number }, name: string): Promise<DmFound> {
  const found = await call(TASK.INFO, { device })
  if (sameDmName(found.name, name)) return found
  throw new DiskError(`it was renamed to ${printable(found.name)} meanwhile`, 'ESTALE')
}

/** A device that has got its name, but could not be resumed. */
async function removeIfOurs(name: string, { diskseq }: Disk): Promise<void> {
  try {
    const disk = await openDm(name)
    if (disk.diskseq === diskseq) await removeHeld(disk)
    else await disk.close()
  } catch (error) {
    if (!(error instanceof DiskError)) throw error
  }
}

/**
 * Opens a device-mapper device.
 *
 * @param what as of {@link open}
 * @throws DiskError
 */
export async function openDm(what: string, options: Pick<OpenOptions, 'signal'> = {}): Promise<Disk> {
  const disk = await open(what, options)
  if (/^dm-\d+$/.test(disk.kname) && disk.partition === 0) return disk
  await disk.close()
  throw new DiskError(`${printable(disk.kname)} is no device-mapper device`, 'ENOTTY')
}

/** The number of a device, which is its own while it is open. */
function numberOf({ majmin }: Disk): { major: number; minor: number } {
  const [major, minor] = majmin.split(':').map(Number) as [number, number]
  return { major, minor }
}

/** How often, and how long after each time, ms, it is looked whether a device is still in use. */
const TRIES = 25
const TRY_MS = 200
const GONE_TRIES = 500
const GONE_MS = 10

/**
 * Removes a device; returns when it is gone.
 *
 * @param disk is closed
 * @param options deferred: with its last user, and returns at once
 * @throws DiskError EBUSY if others have it open
 */
export async function removeHeld(disk: Disk, { deferred = false }: { readonly deferred?: boolean } = {}): Promise<void> {
  const device = numberOf(disk)
  try {
    // By now or by the time that it is closed here nobody else must have it open: so it goes with its last user, which is this one.
    for (let tries = 0; !deferred; tries++) {
      const { openCount } = await call(TASK.INFO, { device })
      if (openCount <= 1) break
      if (tries === TRIES) throw inUse(openCount - 1)
      await sleep(TRY_MS)
    }
    await call(TASK.REMOVE, { device, flags: DEFERRED })
    const { openCount } = await call(TASK.INFO, { device })
    if (!deferred && openCount > 1) {
      await call(TASK.MESSAGE, { device, text: '@cancel_deferred_remove' })
      throw inUse(openCount - 1)
    }
  } finally {
    await disk.close()
  }
  for (let tries = 0; !deferred && tries < GONE_TRIES; tries++) {
    if (!(await devices()).some(({ diskseq }) => diskseq === disk.diskseq)) return
    await sleep(GONE_MS)
  }
  if (!deferred) throw new DiskError('somebody has opened it meanwhile; it goes when that is closed', 'EBUSY')
}

const inUse = (others: number) =>
  new DiskError(`it is in use: open ${others} time${others === 1 ? '' : 's'}; --deferred removes it with its last user`, 'EBUSY')

/** Keeps I/O from it until it is resumed. */
export async function suspendDm(disk: Disk, { noFlush = false, noLockfs = false } = {}): Promise<void> {
  await call(TASK.SUSPEND, { device: numberOf(disk), flags: (noFlush ? NO_FLUSH : 0) | (noLockfs ? SKIP_LOCKFS : 0) })
}

/** Puts the table that was loaded last in place, and lets I/O go on. */
export async function resumeDm(disk: Disk): Promise<void> {
  await call(TASK.RESUME, { device: numberOf(disk), flags: SYNC })
}

/** Loads a table, which {@link resumeDm} puts in place. */
export async function reloadDm(disk: Disk, table: string, { readOnly = false } = {}): Promise<void> {
  await withDevices(parseTable(table), (targets) => call(TASK.RELOAD, { device: numberOf(disk), targets, flags: readOnly ? READ_ONLY : 0 }))
}

/**
 * The kernel renames by name alone. If the device was renamed by somebody else in that moment, another one of that name
 * may have been renamed: then this fails, and says so.
 */
export async function renameDm(disk: Disk, name: string): Promise<void> {
  checkDmName(name)
  const device = numberOf(disk)
  const before = await call(TASK.INFO, { device })
  if (sameDmName(before.name, name)) return
  if ((await call(TASK.INFO, { name })).exists) throw taken()
  await call(TASK.RENAME, { name: before.name, text: name, flags: SYNC })
  await verify(device, name)
}

/** @param sector of 512 bytes, which the target has that is meant */
export async function messageDm(disk: Disk, sector: bigint, message: string): Promise<void> {
  await call(TASK.MESSAGE, { device: numberOf(disk), text: message, sector })
}

/** What its targets say of themselves. */
export async function statusOfDm(disk: Disk): Promise<DmFound> {
  return call(TASK.STATUS, { device: numberOf(disk) })
}

/**
 * Its table.
 *
 * @param options inactive: the one that resuming it puts in place. showKeys: with the keys of encrypted devices, which are zeros otherwise.
 */
export async function tableOfDm(disk: Disk, { inactive = false, showKeys = false } = {}): Promise<readonly DmTarget[]> {
  const { targets } = await call(TASK.TABLE, { device: numberOf(disk), flags: inactive ? INACTIVE : 0 })
  return showKeys ? targets : targets.map(withoutKey)
}

/** A key that is a hexadecimal number. One in the kernel's keyring is named only, with colons. */
export function withoutKey(target: DmTarget): DmTarget {
  if (target.type !== 'crypt') return target
  const words = target.params.split(' ')
  words[1] = (words[1] ?? '').replace(/^[0-9a-f]+$/i, (key) => '0'.repeat(key.length))
  return { ...target, params: words.join(' ') }
}
