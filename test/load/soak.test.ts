// SPDX-License-Identifier: MIT
/**
 * Everything at once: disks and partitions that are recycled, daemons that are restarted and
 * killed, uevents that are lost, a user without rights that asks for all names, and programs that
 * want to work. In the last third the daemon is left alone, to see what it keeps.
 *
 *   make soak MINUTES=30    the long form; in `make check` it takes half a minute
 */
import { mkdirSync, mkdtempSync, readlinkSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { addCounts, blk } from '../helpers/blk.js'
import { LONG, twoForms } from '../helpers/long.js'
import { ROOT } from '../helpers/root.js'
import {
  cleanup,
  descriptors,
  loopDisk,
  type ManagedTree,
  openDevices,
  resident,
  run,
  sleep,
  startBlk,
  startManaged,
  threads,
  until,
} from '../helpers/tree.js'

const MINUTES = process.env['SOAK_MINUTES']
const SECONDS = MINUTES !== undefined ? Number(MINUTES) * 60 : LONG ? 30 : 10
/** How long daemons are restarted; after that, one daemon stays. */
const RESTARTS_S = (SECONDS * 2) / 3
/** How long a daemon serves, at most. */
const SERVES_MS = 4000
const ABUSE_MS = 1000
const NOBODY = '65534'
/** A daemon that stands still for so long loses uevents. */
const STALL_MS = 300
/** Growth after warm-up, in the long form. In half a minute a heap does not reach its size. */
const GROWTH_MAX = 1.05

/** Runs `work` again and again, with pauses, until told to stop. */
function again(work: () => Promise<void>, pauseMs: () => number): () => Promise<void> {
  let going = true
  const done = (async () => {
    while (going) {
      await sleep(pauseMs())
      if (going) await work()
    }
  })()
  return () => {
    going = false
    return done
  }
}

interface Snapshot {
  readonly resident: number
  readonly descriptors: number
  readonly threads: number
  /** Descriptors of the manager: what it keeps, and a few of its own. */
  readonly kept: number
}

/** Descriptors without the files of callers and of devices, of which the daemon keeps the last few. */
function lasting(pid: number): number {
  const paths = descriptors(pid).map((fd) => {
    try {
      return readlinkSync(`/proc/${pid}/fd/${fd}`)
    } catch {
      return undefined // closed since
    }
  })
  return paths.filter((path) => path !== undefined && !/^\/proc\/\d+\/syscall|^\/sys\//.test(path)).length
}

function snapshot(tree: ManagedTree): Snapshot {
  const pid = tree.pid()
  return {
    resident: resident(pid),
    descriptors: lasting(pid),
    threads: threads(pid).length,
    kept: descriptors(tree.manager).length,
  }
}

/** Ends the daemon, and waits until the next one is ready. */
async function restart(tree: ManagedTree, signal: 'SIGTERM' | 'SIGKILL'): Promise<void> {
  const ready = tree.ready()
  tree.end(signal)
  await until(() => tree.ready() > ready, 60_000)
}

async function stall(pid: number): Promise<void> {
  try {
    process.kill(pid, 'SIGSTOP')
    await sleep(STALL_MS)
    process.kill(pid, 'SIGCONT')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error // killed meanwhile
  }
}

/** Works with a disk of its own, as a program does; what went wrong. */
async function consume(disk: string, directory: string): Promise<string[]> {
  const steps: [string, ...string[]][] = [
    ['mkfs.ext4', '-q', '-F', disk],
    ['mount', disk, directory],
    ['cp', '/bin/true', directory],
    ['umount', directory],
    ['e2fsck', '-fn', disk],
    ['blkid', '-p', disk],
    ['dd', `if=${disk}`, 'of=/dev/null', 'bs=64k', 'status=none'],
  ]
  const failed: string[] = []
  for (const [file, ...args] of steps) {
    const { code, stderr } = await run(file, args)
    if (code !== 0) failed.push(`${file}: ${code} ${stderr.trim()}`)
  }
  return failed
}

t.test(twoForms(`${SECONDS} s of everything at once`), { timeout: (SECONDS + 120) * 1000 }, async (t: Test) => {
  const scratch = mkdtempSync(join(tmpdir(), 'diskseqfs-soak-'))
  cleanup(t, () => rmSync(scratch, { recursive: true }))
  const directory = join(scratch, 'mnt')
  mkdirSync(directory)
  const loop = loopDisk(t, { size: 16 << 20 })
  cleanup(t, () => run('umount', ['--quiet', directory]))
  const tree = await startManaged(t, { twin: 'small-buffer' })
  const disk = join(tree.mountpoint, loop.diskseq())
  const start = snapshot(tree)

  const churns = [[], ['--parts']].map((options) =>
    blk(
      'churn',
      '--mode',
      'tree',
      '--dir',
      tree.mountpoint,
      '--seconds',
      String(SECONDS),
      '--recyclers',
      '2',
      '--openers',
      '4',
      ...options,
    ),
  )
  const abuser = await startBlk(t, 'abuse', '--dir', tree.mountpoint, '--uid', NOBODY, '--threads', '20')
  const restarts = { SIGTERM: 0, SIGKILL: 0 }
  const failed: string[] = []
  let consumed = 0
  const stops = [
    again(
      async () => {
        await abuser.ask()
        await sleep(ABUSE_MS)
        await abuser.ask()
      },
      () => 4 * ABUSE_MS,
    ),
    again(
      () => stall(tree.pid()),
      () => 10 * STALL_MS,
    ),
    again(
      async () => {
        failed.push(...(await consume(disk, directory)))
        consumed++
      },
      () => 200,
    ),
  ]
  const stopRestarts = again(
    async () => {
      const signal = Math.random() < 0.5 ? 'SIGTERM' : 'SIGKILL'
      await restart(tree, signal)
      restarts[signal]++
    },
    () => Math.random() * SERVES_MS,
  )
  await sleep(RESTARTS_S * 1000)
  await stopRestarts()
  await sleep(((SECONDS - RESTARTS_S) / 3) * 1000)
  const warm = snapshot(tree)
  const results = await Promise.all(churns)
  const end = snapshot(tree)
  for (const stop of stops) await stop()
  const abused = await abuser.end()
  await until(() => openDevices(tree.pid()).length === 0)
  const idle = snapshot(tree)

  const sum = (field: string) => results.reduce((total, result) => total + result[field], 0)
  const errors: Record<string, number> = {}
  for (const result of results) addCounts(errors, result['errors'])
  const wrong = sum('wrong_diskseq') + sum('wrong_data') + sum('wrong_part')
  const lost = tree.log().filter(({ msg }) => /dropped uevents/.test(String(msg))).length
  const report = {
    seconds: SECONDS,
    'opens right': sum('opens_ok'),
    'opens wrong': wrong,
    'opens failed': errors,
    'longest wait, ms': Math.round(Math.max(...results.map((result) => result['max_open_us'])) / 1000),
    'disks recycled': sum('recycles'),
    restarts,
    'uevents lost, times': lost,
    'programs that worked': consumed,
    'programs that failed': failed,
    start,
    warm,
    end,
    idle,
  }
  for (const [name, value] of Object.entries(report)) t.comment(`${name}: ${typeof value === 'object' ? JSON.stringify(value) : value}`)
  t.comment(`abuse: ${abused}`)
  mkdirSync(join(ROOT, 'build'), { recursive: true })
  writeFileSync(join(ROOT, 'build/soak.json'), JSON.stringify(report, null, 2))

  t.equal(wrong, 0, 'no open reached another disk')
  t.strictSame(
    Object.keys(errors).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'),
    [],
    'no errno but those for a disk that is gone',
  )
  t.strictSame(failed, [], 'every program could do its work')
  t.ok(sum('opens_ok') > 100 && consumed > 0, 'there was work')
  t.ok(restarts.SIGTERM + restarts.SIGKILL > SECONDS / 20, 'daemons came and went')
  t.ok(lost > 0, 'and uevents were lost')
  // Both counts have the sockets of pins; the rest must not grow.
  t.equal(idle.descriptors - idle.kept, start.descriptors - start.kept, 'no descriptor is left')
  t.ok(end.kept - warm.kept <= 64, 'what is kept does not grow')
  if (MINUTES !== undefined)
    t.ok(end.resident / warm.resident < GROWTH_MAX, `resident memory: ${(end.resident / warm.resident).toFixed(3)} of what it was`)
})
