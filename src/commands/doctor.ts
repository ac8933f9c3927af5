// SPDX-License-Identifier: MIT
/** `diskseqfs doctor`: what is wrong on this machine, and what to do about it. */
import { execFile } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { dirname, basename } from 'node:path'
import { promisify } from 'node:util'

import { native } from '../native.js'
import { UserError } from '../util/errno.js'
import { DEFAULT_MOUNTPOINT, isDead, mountsAt } from '../util/mountpoint.js'
import { toJson } from '../util/text.js'
import { beneath, type Finding, kernel, links, mounts, requestTimeout, rules, service, unit, version } from './findings.js'

/** @returns the exit code: 0 nothing but notes, 1 warnings, 2 something is broken */
export async function doctor(json: boolean): Promise<number> {
  const found = await examine()
  process.stdout.write(json ? toJson({ findings: found }) : text(found))
  if (found.some(({ severity }) => severity === 'broken')) return 2
  return found.some(({ severity }) => severity === 'warning') ? 1 : 0
}

function text(found: readonly Finding[]): string {
  if (found.length === 0) return 'nothing is wrong\n'
  return found.map(({ severity, what, advice }) => `${severity}: ${what}; ${advice}\n`).join('')
}

async function examine(): Promise<Finding[]> {
  const found = [...kernel(''), ...requestTimeout(''), ...rules(''), ...unit('')]
  // The guard is asked before the tree: if the daemon hangs, it knows.
  const status = await statusOf()
  const mounted = mountsAt(DEFAULT_MOUNTPOINT)
  const served = mounted.length > 0
  found.push(...service(status), ...mounts(mounted))
  if (served && found.every(({ severity }) => severity !== 'broken')) found.push(...(await answers()))
  found.push(...links(''))
  if (process.geteuid?.() !== 0) {
    return [...found, { severity: 'note', what: 'not all can be seen', advice: 'run this as root' }]
  }
  if (served) found.push(...beneath(await linksBeneath()))
  const daemon = /\(daemon (\d+)\)/.exec(status ?? '')?.[1]
  if (daemon !== undefined) found.push(...version(process.argv[1] as string, startOf(daemon)))
  return found
}

/** The status text of the service; undefined where there is none. */
async function statusOf(): Promise<string | undefined> {
  if (!existsSync('/run/systemd/system')) return undefined
  const show = ['show', '--property', 'ActiveState,StatusText', 'diskseqfs.service']
  const { stdout } = await promisify(execFile)('systemctl', show).catch(() => ({ stdout: '' }))
  return /^ActiveState=active$/m.test(stdout) ? /^StatusText=(.*)$/m.exec(stdout)?.[1] : undefined
}

/** Whether somebody serves the tree. */
async function answers(): Promise<Finding[]> {
  const broken = (what: string): Finding => ({
    severity: 'broken',
    what,
    advice: 'systemctl restart diskseqfs, or diskseqfs unmount and mount',
  })
  try {
    return (await isDead(native, DEFAULT_MOUNTPOINT)) ? [broken('the daemon of the tree is gone')] : []
  } catch (error) {
    if (!(error instanceof UserError)) throw error
    return [broken('the daemon of the tree does not answer')]
  }
}

function linksBeneath(): Promise<string[]> {
  return new Promise((resolve) => {
    native.cloneMount(dirname(DEFAULT_MOUNTPOINT), basename(DEFAULT_MOUNTPOINT), (error, fd) => {
      if (error !== 0) return resolve([])
      native.listLinks(fd, 0, (paths) => {
        native.close(fd)
        resolve(paths)
      })
    })
  })
}

/** When a process was started, ms since 1970. */
function startOf(pid: string): number {
  try {
    // Fields after the name, which may have anything in it; the 22nd counts ticks of 10 ms since boot: proc(5).
    const fields = readFileSync(`/proc/${pid}/stat`, 'latin1')
      .replace(/^.*\) /s, '')
      .split(' ')
    const boot = /^btime (\d+)$/m.exec(readFileSync('/proc/stat', 'latin1'))?.[1]
    return Number(boot) * 1000 + Number(fields[22 - 3]) * 10
  } catch {
    return Infinity // it has ended; the next one is of this version
  }
}
