// SPDX-License-Identifier: MIT
/**
 * Links beneath the mount: the same names, for a process that does not see the mount, and for all
 * processes as soon as the mount is gone. The links stay right through arrivals, removals, and the
 * end of each part.
 */
import { spawn } from 'node:child_process'
import {
  chmodSync,
  closeSync,
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readlinkSync,
  rmdirSync,
  rmSync,
  statSync,
  symlinkSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'

import t, { type Test } from 'tap'

import { cleanup, errorOf, loopDisk, type LoopDisk, run, sleep, startBlk, startManaged, startTree, until } from '../helpers/tree.js'

/** Below /dev, as only there the daemon makes such links. */
function parentOf(t: Test): string {
  const parent = mkdtempSync('/dev/diskseqfs-beneath-')
  cleanup(t, () => rmSync(parent, { recursive: true }))
  return parent
}

/** /dev as a process sees it that does not have the mounts below it. */
async function otherView(t: Test): Promise<string> {
  const view = mkdtempSync(join(tmpdir(), 'diskseqfs-view-'))
  const { code, stderr } = await run('mount', ['--bind', '/dev', view])
  if (code !== 0) throw new Error(stderr)
  cleanup(t, async () => {
    await run('umount', [view])
    rmdirSync(view)
  })
  return view
}

/** All names of a disk and its partition. */
const namesOf = (disk: LoopDisk) => {
  const n = disk.diskseq()
  const kname = basename(disk.path)
  return [n, `${n}p1`, `${n}-part1`, `.dm/${n}/${kname}`, `.dm/${n}/${kname}p1`]
}
/** The device number that each name leads to. */
const leads = (directory: string, names: readonly string[]) => names.map((name) => statSync(join(directory, name)).rdev)

/** All names in a directory of links, with those in .dm. */
function linksIn(directory: string): string[] {
  const below = (path: string): string[] => {
    try {
      return readdirSync(join(directory, path), { withFileTypes: true }).flatMap((entry) =>
        entry.isDirectory() ? below(join(path, entry.name)) : [join(path, entry.name)],
      )
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
      return [] // the directory has gone with its device
    }
  }
  return below('').sort()
}

const own = (disk: LoopDisk, part: boolean) => statSync(disk.path + (part ? 'p1' : '')).rdev

t.test('a process that does not see the mount finds the devices by the same names', async (t) => {
  const parent = parentOf(t)
  const view = await otherView(t)
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  const { mountpoint, stop } = await startTree(t, { parent })
  const covered = join(view, mountpoint.slice('/dev'.length))
  const names = namesOf(disk)
  await until(() => linksIn(covered).includes(names.at(-1)!))
  const expected = [false, true, true, false, true].map((part) => own(disk, part))
  t.strictSame(leads(covered, names), expected)
  t.strictSame(leads(mountpoint, names), expected, 'as in the tree')
  t.match(readlinkSync(join(covered, disk.diskseq())), /^(\.\.\/)+loop\d+$/, 'with links that lead to the device node')
  t.equal(lstatSync(covered).mode & 0o777, 0o711, 'only root can keep the directory locked by reading it')
  t.equal(lstatSync(join(covered, '.dm')).mode & 0o777, 0o711)

  const later = loopDisk(t)
  await until(() => errorOf(() => statSync(join(covered, later.diskseq()))) === '')
  later.addPartition(1, 64, 64)
  await until(() => errorOf(() => statSync(join(covered, `${later.diskseq()}p1`))) === '')
  const gone = namesOf(later)
  later.detach()
  await until(() => !linksIn(covered).some((name) => gone.includes(name)))
  t.equal(
    errorOf(() => lstatSync(join(covered, '.dm', gone[0]!))),
    'ENOENT',
    'the directory of the disk is gone as well',
  )
  t.pass('the links come and go with the devices')

  await stop()
  t.strictSame(linksIn(mountpoint), [], 'links that udev does not know are gone with the tree')
  t.equal(lstatSync(mountpoint).mode & 0o777, 0o755)
})

t.test('the second path has its link beneath before the tree answers for it', async (t) => {
  const parent = parentOf(t)
  const view = await otherView(t)
  const { mountpoint } = await startTree(t, { parent })
  const covered = join(view, mountpoint.slice('/dev'.length))
  for (let i = 0; i < 50; i++) {
    const disk = loopDisk(t)
    const name = `.dm/${disk.diskseq()}/${basename(disk.path)}`
    statSync(join(mountpoint, name))
    const link = errorOf(() => lstatSync(join(covered, name)))
    const node = errorOf(() => statSync(join(covered, name)))
    if (link !== '' || node !== '') t.fail(`${name}: ${link || `it leads nowhere: ${node}`}`)
    disk.detach()
  }
  t.pass('fifty times')
})

t.test('a disk that comes while the daemon ends leaves no link', async (t) => {
  const parent = parentOf(t)
  const { mountpoint, stop } = await startTree(t, { parent })
  // With a directory of the tree open and asked, it takes a moment to end.
  const asks =
    "import os, sys, time; d = os.open(sys.argv[1], os.O_PATH); print(flush=True); end = time.monotonic() + 1\nwhile time.monotonic() < end:\n try: os.stat('0', dir_fd=d)\n except OSError: pass"
  const asking = spawn('python3', ['-c', asks, mountpoint], { stdio: ['ignore', 'pipe', 'inherit'] })
  const ended = new Promise((resolve) => asking.on('close', resolve))
  await new Promise((resolve) => asking.stdout.once('data', resolve))
  const stopped = stop()
  await until(() => statSync(mountpoint).dev === statSync(parent).dev)
  for (let i = 0; i < 5; i++) loopDisk(t)
  await stopped
  await ended
  t.strictSame(linksIn(mountpoint), [])
})

t.test('a process that keeps the directory locked holds up no other', async (t) => {
  const parent = parentOf(t)
  const view = await otherView(t)
  const { mountpoint, stop } = await startTree(t, { parent })
  const holder = await startBlk(
    t,
    'directory',
    '--dir',
    join(view, mountpoint.slice('/dev'.length)),
    '--mode',
    'lock',
    '--uid',
    '0',
    '--threads',
    '1',
  )
  for (let i = 0; i < 3; i++) {
    const disk = loopDisk(t)
    const began = performance.now()
    closeSync(openSync(join(mountpoint, `.dm/${disk.diskseq()}/${basename(disk.path)}`), 'r'))
    const ms = performance.now() - began
    // The lock is held until the holder is told to end.
    t.comment(`${ms.toFixed(0)} ms`)
  }
  const began = performance.now()
  // The kernel needs the lock to unmount, so the daemon ends only after the lock is released.
  const stopped = stop()
  await sleep(500)
  await holder.end()
  await stopped
  t.comment(`the daemon ended after ${(performance.now() - began).toFixed(0)} ms`)
  rmSync(parent, { recursive: true })
  mkdirSync(mountpoint, { recursive: true })
})

t.test('twin: if a LOOKUP waits for the links, it waits for that lock', async (t) => {
  const parent = parentOf(t)
  const view = await otherView(t)
  const { mountpoint } = await startTree(t, { parent, twin: 'waits-for-links' })
  const covered = join(view, mountpoint.slice('/dev'.length))
  const holder = await startBlk(t, 'directory', '--dir', covered, '--mode', 'lock', '--uid', '0', '--threads', '1')
  const disk = loopDisk(t)
  const opener = run('dd', [`if=${join(mountpoint, `.dm/${disk.diskseq()}/${basename(disk.path)}`)}`, 'of=/dev/null', 'count=1'])
  t.equal(await Promise.race([opener, sleep(1000, 'waits')]), 'waits')
  await holder.end()
  t.equal((await opener).code, 0)
  rmSync(join(covered, 'x'), { recursive: true, force: true })
})

t.test('twin: if no links are made, no name is there', async (t) => {
  const parent = parentOf(t)
  const view = await otherView(t)
  const { mountpoint } = await startTree(t, { parent, twin: 'no-links-beneath' })
  const disk = loopDisk(t)
  const name = `.dm/${disk.diskseq()}/${basename(disk.path)}`
  statSync(join(mountpoint, name))
  t.equal(
    errorOf(() => statSync(join(view, mountpoint.slice('/dev'.length), name))),
    'ENOENT',
  )
})

t.test('old links are put right, and what is not a name of the tree is left alone', async (t) => {
  const parent = parentOf(t)
  const view = await otherView(t)
  const disk = loopDisk(t)
  const { mountpoint } = await startTree(t, {
    parent,
    before: async (path) => {
      symlinkSync('../../null', join(path, disk.diskseq()))
      symlinkSync('../../null', join(path, '4000000000'))
      symlinkSync('../../null', join(path, 'mine'))
      mkdirSync(join(path, '.dm/4000000000'), { recursive: true })
      symlinkSync('../../../../null', join(path, '.dm/4000000000/dm-9'))
    },
  })
  const covered = join(view, mountpoint.slice('/dev'.length))
  await until(() => !linksIn(covered).includes('4000000000'))
  t.strictSame(leads(covered, [disk.diskseq()]), [own(disk, false)])
  t.equal(
    errorOf(() => lstatSync(join(covered, '.dm/4000000000'))),
    'ENOENT',
  )
  t.equal(readlinkSync(join(covered, 'mine')), '../../null')
  rmSync(join(covered, 'mine'))
})

t.test('the links are right again after a restart, and none dangles when the mount is removed', async (t) => {
  const parent = parentOf(t)
  const view = await otherView(t)
  const [stays, goes] = [loopDisk(t), loopDisk(t)]
  const tree = await startManaged(t, { parent })
  const covered = join(view, tree.mountpoint.slice('/dev'.length))
  await until(() => linksIn(covered).includes(goes.diskseq()))
  const old = namesOf(goes)
  tree.hold(true)
  const ready = tree.ready()
  tree.end('SIGKILL')
  goes.detach()
  const comes = loopDisk(t)
  tree.hold(false)
  await until(() => tree.ready() > ready, 20_000)
  await until(() => linksIn(covered).includes(comes.diskseq()))
  await until(() => !linksIn(covered).some((name) => old.includes(name)))
  t.pass('links of disks that went while there was no daemon are gone')
  const names = [stays.diskseq(), `.dm/${stays.diskseq()}/${basename(stays.path)}`]
  t.strictSame(leads(tree.mountpoint, names), [own(stays, false), own(stays, false)])
  // The next daemon would mount it again.
  tree.hold(true)
  const daemon = tree.pid()
  await run('umount', ['--lazy', tree.mountpoint])
  t.strictSame(leads(tree.mountpoint, names), [own(stays, false), own(stays, false)], 'without the mount, at once')
  // It makes links, of disks of other tests, until it has noticed.
  await until(() => !existsSync(`/proc/${daemon}`), 20_000)
  chmodSync(tree.mountpoint, 0o755)
  rmSync(join(tree.mountpoint, '.dm'), { recursive: true, force: true })
  for (const name of linksIn(tree.mountpoint)) rmSync(join(tree.mountpoint, name))
})

t.test('outside of /dev there are no links', async (t) => {
  const { mountpoint, stop } = await startTree(t)
  await stop()
  t.strictSame(readdirSync(mountpoint), [])
})
