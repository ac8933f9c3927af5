// SPDX-License-Identifier: MIT
/**
 * Disks as storage volumes of systemd (261 and later): `mount -t storage.ext4 diskseq:13 /mnt`, `storagectl`,
 * `systemd-vmspawn --bind-volume=`. The client gets a descriptor of the very disk that it asked for. The service manager
 * starts a process for each connection: no daemon is needed.
 */
import { interfaceText } from '../broker/interface-text.js'
import { type Call, type MethodBody, type Parameters, type Reply, serveConnection, serviceInfo, VarlinkError } from '../broker/varlink.js'
import { mangledDmName, parseName } from '../devices/names.js'
import { Sysfs } from '../devices/sysfs.js'
import { devices, type Disk, DiskError, open, reopen } from '../disks/open.js'
import { native } from '../native.js'
import { E, UserError } from '../util/errno.js'
import { globPattern } from '../util/glob.js'
import { createLogger, defaultFormat } from '../util/log.js'
import type { Listed } from './columns.js'
import { flatten, tree } from './list.js'

const INTERFACE = 'io.systemd.StorageProvider'
/** The first descriptor that the service manager passes: sd_listen_fds(3). */
const FIRST_PASSED = 3
const DM_PREFIX = 'dm:'

/** @throws UserError where it was not started for a connection */
export async function storageProvider(): Promise<void> {
  const { LISTEN_FDS, LISTEN_PID } = process.env
  if (LISTEN_FDS !== '1' || LISTEN_PID !== String(process.pid)) {
    throw new UserError('systemd starts this for each connection, by diskseqfs-storage.socket: see storagectl(1)', 2)
  }
  const methods: Readonly<Record<string, MethodBody>> = { Acquire: acquire, ListVolumes: listVolumes, ListTemplates: listTemplates }
  const { logger: log } = await createLogger('info', { kind: 'stderr', format: defaultFormat() })
  await serveConnection(FIRST_PASSED, { native, interfaceText: interfaceText(INTERFACE), methods, info: serviceInfo(), log })
}

const sysfs = new Sysfs(native)
const error = (name: string) => new VarlinkError(`${INTERFACE}.${name}`)

async function acquire({ parameters }: Call): Promise<Reply> {
  const { name, createMode, template, readOnly, requestAs } = parameters as { readonly [key: string]: string | boolean | null | undefined }
  if (createMode === 'new') throw error('CreateNotSupported')
  if ((template ?? '') !== '') throw error('NoSuchTemplate')
  const what = placeOf(name as string)
  try {
    if ((requestAs ?? 'blk') !== 'blk') {
      // mount(8) asks for a regular file first, and shows the answer to that.
      await (await open(what)).close()
      throw error('TypeNotSupported')
    }
    const { disk, writable } = await openAs(what, readOnly as boolean | null | undefined)
    return { parameters: { fileDescriptorIndex: 0, type: 'blk', readOnly: !writable }, fds: [disk.fd] }
  } catch (failed) {
    if (!(failed instanceof DiskError)) throw failed
    throw reasonOf(failed)
  }
}

/** What to open for the name of a volume: a name in the tree, or `dm:` and a device-mapper name. */
function placeOf(name: string): string {
  if (parseName(name) !== undefined) return name
  const link = name.startsWith(DM_PREFIX) ? mangledDmName(name.slice(DM_PREFIX.length)) : undefined
  if (link === undefined) throw error('NoSuchVolume')
  return `/dev/mapper/${link}`
}

/** @param readOnly neither true nor false: writable, if that is possible */
async function openAs(what: string, readOnly: boolean | null | undefined): Promise<{ disk: Disk; writable: boolean }> {
  const disk = await open(what)
  // Many drivers refuse the write, not the open.
  const refused = sysfs.attribute(disk.kname.replaceAll('/', '!'), 'ro') === '1\n'
  if (readOnly === true || (refused && readOnly !== false)) return { disk, writable: false }
  if (refused) {
    await disk.close()
    throw error('ReadOnlyVolume')
  }
  try {
    return { disk: await reopen(disk, { write: true }), writable: true }
  } catch (failed) {
    if (readOnly === false || !(failed instanceof DiskError) || !WRITE_REFUSED.includes(failed.code)) throw failed
    return { disk: await open(what), writable: false }
  }
}

const WRITE_REFUSED = ['EROFS', 'EACCES', 'EPERM']
const NO_DISK = ['ENOENT', 'ENXIO', 'ENODEV', 'ESTALE', 'ENOTBLK']

function reasonOf({ code }: DiskError): VarlinkError {
  if (NO_DISK.includes(code)) return error('NoSuchVolume')
  if (WRITE_REFUSED.includes(code)) return error('ReadOnlyVolume')
  const errno = (E as Readonly<Record<string, number>>)[code]
  // sd-varlink's own error for any errno
  return new VarlinkError('io.systemd.System', { origin: 'linux', ...(errno !== undefined && { errno }), errnoName: code })
}

/** Those that are not empty, as of loop devices that nothing is bound to. */
async function listVolumes({ parameters, more }: Call): Promise<Reply> {
  requireMore(more)
  const { matchName } = parameters as { matchName?: string | null }
  const pattern = globPattern(matchName ?? '*')
  const volumes = tree(sysfs, await devices())
    .flatMap(flatten)
    .filter(({ size }) => size > 0)
    .map(volumeOf)
  const found = volumes.filter(({ name, aliases = [] }) => [name, ...aliases].some((each) => pattern.test(each)))
  const last = found.pop()
  if (last === undefined) throw error('NoSuchVolume')
  return { earlier: found, parameters: last }
}

function volumeOf({ name, kname, holder, size, ro }: Listed): Parameters & { name: string; aliases?: string[] } {
  const dmName = kname.startsWith('dm-') ? holder : null
  return { name, ...(dmName !== null && { aliases: [DM_PREFIX + dmName] }), type: 'blk', readOnly: ro, sizeBytes: size }
}

/** There are none. */
function listTemplates({ more }: Call): Reply {
  requireMore(more)
  throw error('NoSuchTemplate')
}

function requireMore(more: boolean): void {
  if (!more) throw new VarlinkError('org.varlink.service.ExpectedMore')
}
