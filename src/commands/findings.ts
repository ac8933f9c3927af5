// SPDX-License-Identifier: MIT
/** What `diskseqfs doctor` looks for: each function looks at one kind of faults, and finds none, or some. */
import { existsSync, lstatSync, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs'
import { basename } from 'node:path'

import { DM_NAME, parseDiskSeq, parseName, sameDmName } from '../devices/names.js'
import { DEFAULT_MOUNTPOINT, FSTYPE, type MountEntry } from '../util/mountpoint.js'
import { printable } from '../util/text.js'

/** `broken`: opens fail, or reach no tree. `warning`: something is not as it should be. `note`: may be meant so. */
export type Severity = 'broken' | 'warning' | 'note'

export interface Finding {
  readonly severity: Severity
  /** What was seen. */
  readonly what: string
  /** What to do about it. */
  readonly advice: string
}

const finding = (severity: Severity, what: string, advice: string): Finding => ({ severity, what, advice })

/** Below which everything is looked at; '' for this machine, so that tests may build others. */
export type Root = string

function read(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8').trim()
  } catch {
    return undefined // there is none, or it may not be read
  }
}

function namesIn(path: string): string[] {
  try {
    return readdirSync(path).sort()
  } catch {
    return []
  }
}

function linkAt(path: string): string | undefined {
  try {
    return readlinkSync(path)
  } catch {
    return undefined // no symlink
  }
}

/** Yama's scope in which nobody, not even root, may look at other processes. */
const NO_ATTACH = '3'

export function kernel(root: Root): Finding[] {
  const found: Finding[] = []
  const disks = namesIn(`${root}/sys/block`)
  if (disks.length === 0) found.push(finding('broken', 'there is no disk in /sys/block', 'mount sysfs at /sys'))
  else if (!disks.some((disk) => existsSync(`${root}/sys/block/${disk}/diskseq`))) {
    found.push(finding('broken', 'this kernel gives disks no sequence numbers', 'use Linux 5.15 or later'))
  }
  if (!existsSync(`${root}/dev/fuse`)) found.push(finding('broken', '/dev/fuse is missing', 'load the module: modprobe fuse'))
  if (read(`${root}/proc/sys/kernel/yama/ptrace_scope`) === NO_ATTACH) {
    found.push(
      finding(
        'warning',
        'kernel.yama.ptrace_scope is 3: the daemon cannot see what callers do, so even a stat opens the disk for a moment',
        'set it to 2 or less (it needs a reboot)',
      ),
    )
  }
  return found
}

/** How long a request may be parked: for a disk that does not answer, s. */
const PARKED_S = 10

export function requestTimeout(root: Root): Finding[] {
  const limit = Number(read(`${root}/proc/sys/fs/fuse/max_request_timeout`) ?? 0)
  if (limit === 0 || limit > 2 * PARKED_S) return []
  return [
    finding(
      'warning',
      `fs.fuse.max_request_timeout is ${limit} s: if a disk does not answer for so long, the kernel ends the whole tree`,
      `set it to 0, or to more than twice --open-timeout (${PARKED_S} s by default)`,
    ),
  ]
}

/** Where udev looks for rules: the first that has a file of a name wins. */
const RULE_PLACES = ['/etc/udev/rules.d', '/run/udev/rules.d', '/usr/local/lib/udev/rules.d', '/usr/lib/udev/rules.d', '/lib/udev/rules.d']
const RULES = ['59-diskseqfs.rules', '60-z-diskseqfs.rules', '61-diskseqfs.rules', '99-z-diskseqfs.rules']
/** Where the package, or `make install`, has put them. */
const isShipped = (place: string) => place.startsWith('/usr/') || place.startsWith('/lib/')

export function rules(root: Root): Finding[] {
  const found: Finding[] = []
  const missing: string[] = []
  for (const name of RULES) {
    const places = RULE_PLACES.filter((place) => existsSync(`${root}${place}/${name}`) || linkAt(`${root}${place}/${name}`) !== undefined)
    const first = places[0]
    if (!places.some(isShipped)) missing.push(name)
    if (first === undefined || isShipped(first)) continue
    const path = `${first}/${name}`
    const masked = linkAt(root + path) === '/dev/null' || read(root + path) === ''
    found.push(
      masked
        ? finding('warning', `${path} masks the rules of that name`, 'remove it if links are to lead into the tree')
        : finding('warning', `${path} stands in for the rules of that name`, 'compare them; after an upgrade they may not fit'),
    )
  }
  if (missing.length === RULES.length) {
    found.push(finding('note', 'the udev rules are not installed: no link leads into the tree', 'install the package, if links are to'))
  } else if (missing.length > 0) {
    found.push(finding('warning', `udev rules are missing: ${missing.join(', ')}`, 'install the package again'))
  }
  return found
}

const UNIT = 'diskseqfs.service'
const UNIT_PLACES = ['/usr/lib/systemd/system', '/lib/systemd/system', '/usr/local/lib/systemd/system']

export function unit(root: Root): Finding[] {
  const masks = ['/etc', '/run'].map((place) => `${place}/systemd/system/${UNIT}`).filter((path) => linkAt(root + path) === '/dev/null')
  if (masks.length > 0) return [finding('warning', `${UNIT} is masked`, `systemctl unmask ${UNIT}`)]
  if (!UNIT_PLACES.some((place) => existsSync(`${root}${place}/${UNIT}`))) return []
  const wants = `/etc/systemd/system/sysinit.target.wants/${UNIT}`
  if (linkAt(root + wants) !== undefined) return []
  return [finding('warning', `${UNIT} does not start at boot`, `systemctl enable ${UNIT}`)]
}

/** @param mounts what is mounted at the tree's place, topmost last */
export function mounts(mounts: readonly MountEntry[]): Finding[] {
  const at = DEFAULT_MOUNTPOINT
  const top = mounts.at(-1)
  const trees = mounts.filter(({ type }) => type === FSTYPE)
  if (top === undefined || trees.length === 0) {
    return [finding('broken', `no tree is mounted at ${at}`, 'systemctl start diskseqfs, or diskseqfs mount')]
  }
  const found: Finding[] = []
  if (top.type !== FSTYPE) {
    found.push(finding('broken', `${at} is covered by a mount of ${printable(top.source)} (${printable(top.type)})`, `umount ${at}`))
  }
  if (trees.length > 1) found.push(finding('warning', `${trees.length} trees are mounted at ${at}, one over the other`, `umount ${at}`))
  const options = (trees.at(-1) as MountEntry).options.split(',')
  if (options.includes('nodev')) {
    found.push(finding('broken', 'the tree is mounted nodev: nobody can open its nodes', 'mount it without, as diskseqfs mount does'))
  }
  for (const [option, without] of [
    ['default_permissions', 'any user could open any disk'],
    ['allow_other', 'nobody but root sees it'],
  ] as const) {
    if (!options.includes(option))
      found.push(finding('broken', `the tree is mounted without ${option}: ${without}`, 'mount it again, with diskseqfs mount'))
  }
  return found
}

/** Links in /dev/mapper, and in the directories of volume groups, that lead into the tree. */
export function links(root: Root): Finding[] {
  const holders = new Map(namesIn(`${root}/sys/block`).map((disk) => [read(`${root}/sys/block/${disk}/diskseq`), disk]))
  const groups = namesIn(`${root}/dev`).filter((name) => lstatSync(`${root}/dev/${name}`, { throwIfNoEntry: false })?.isDirectory())
  return groups.flatMap((group) =>
    namesIn(`${root}/dev/${group}`).flatMap((name) => {
      const target = linkAt(`${root}/dev/${group}/${name}`)
      return target?.startsWith(`${DEFAULT_MOUNTPOINT}/`) ? link(root, holders, `/dev/${group}/${name}`, target) : []
    }),
  )
}

/** @param holders kernel names of disks, by diskseq */
function link(root: Root, holders: ReadonlyMap<string | undefined, string>, path: string, target: string): Finding[] {
  const again = `udevadm trigger --settle ${path}, or remove the link`
  const [first = '', second, third] = target.slice(DEFAULT_MOUNTPOINT.length + 1).split('/')
  const kname = first === DM_NAME ? third : undefined
  const diskseq = first === DM_NAME ? parseDiskSeq(second ?? '') : parseName(first)?.diskseq
  if (diskseq === undefined)
    return [finding('broken', `${printable(path)} leads to ${printable(target)}, which is no name in the tree`, again)]
  const holder = holders.get(String(diskseq))
  if (holder === undefined || (kname !== undefined && !kname.startsWith(holder))) {
    return [finding('broken', `${printable(path)} leads to disk ${diskseq}, which is gone`, again)]
  }
  const name = read(`${root}/sys/block/${holder}/dm/name`)
  if (!path.startsWith('/dev/mapper/') || (name !== undefined && sameDmName(name, basename(path)))) return []
  return [finding('broken', `${printable(path)} leads to ${holder}, which is called ${printable(name ?? holder)}`, again)]
}

/** @param paths links beneath the mount */
export function beneath(paths: readonly string[]): Finding[] {
  const foreign = paths.filter((path) => !path.startsWith(`${DM_NAME}/`) && parseName(path) === undefined)
  if (foreign.length === 0) return []
  const names = foreign.slice(0, 5).map(printable).join(', ')
  return [
    finding(
      'note',
      `beneath the tree are links that are not its own: ${names}${foreign.length > 5 ? ' and others' : ''}`,
      'they are seen only where the tree is not mounted; remove them there if nothing needs them',
    ),
  ]
}

/** @param status what the guard says of its daemon: the service's status text */
export function service(status: string | undefined): Finding[] {
  if (status === undefined || status === '' || status.startsWith('serving')) return []
  return [finding('broken', `diskseqfs.service: ${printable(status)}`, 'journalctl -u diskseqfs says why')]
}

/**
 * @param program the file that the daemon was started from
 * @param startedMs when it was started, ms since 1970
 */
export function version(program: string, startedMs: number): Finding[] {
  const changed = statSync(program, { throwIfNoEntry: false })?.mtimeMs ?? 0
  if (changed <= startedMs) return []
  return [finding('warning', 'the daemon that runs was started before this version was installed', 'systemctl restart diskseqfs')]
}
