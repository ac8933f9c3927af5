// SPDX-License-Identifier: MIT
/**
 * The program that udev runs for device-mapper devices, run by hand: no user can keep it from its
 * work. The virtual machines show what it makes of real devices.
 */
import {
  chmodSync,
  existsSync,
  lstatSync,
  mkdtempSync,
  readdirSync,
  readlinkSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { held } from '../helpers/flock.js'
import { type Change, twinLink } from '../helpers/guard.js'
import { ROOT } from '../helpers/root.js'
import { cleanup, type Output, run, until } from '../helpers/tree.js'

const LINK = join(ROOT, 'udev/diskseqfs-link')
const LOCK = '/run/diskseqfs.lock'
const NOBODY = 65534
/** The number of a disk that never existed. */
const DISKSEQ = '4000000000'
/** LOCK_SECONDS of the program; and a time that counts as soon. */
const LIMIT_MS = 3000
const SOON_MS = 1500

/** A directory that stands for /dev/mapper, with a link into the tree. */
function mapper(t: Test) {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-link-'))
  chmodSync(directory, 0o755)
  cleanup(t, () => rmSync(directory, { recursive: true }))
  if (!existsSync(LOCK)) cleanup(t, () => rmSync(LOCK, { force: true }))
  const link = join(directory, 'vm-root')
  writeFileSync(join(directory, 'control'), '') // an empty directory would be removed with its last link
  symlinkSync(`/dev/disk/by-diskseq/${DISKSEQ}`, link)
  return { directory, link }
}

/** The device of the link goes, and udev runs the program. */
async function removed(link: string, program: string): Promise<Output & { ms: number }> {
  const began = performance.now()
  const output = await run('timeout', ['6', program, 'removed'], {
    env: { DEVNAME: '/dev/dm-9999', DISKSEQ, DISKSEQFS_LINKS: link },
  })
  return { ...output, ms: performance.now() - began }
}

/** The program with its lock where it used to be: on a directory that any user may open. */
const onDirectory = (t: Test, directory: string) =>
  twinLink(
    t,
    ['open(LOCK, O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600)', `open("${directory}", O_RDONLY | O_DIRECTORY | O_CLOEXEC)`],
    ['!S_ISREG(file.st_mode) || file.st_uid != 0 || (file.st_mode & 077)', '0'],
  )

t.test('the program understands the rules of an earlier version, which udev may still have', async (t) => {
  const codeOf = async (command: string) => (await run(LINK, [command], { env: { DEVNAME: '/dev/dm-9999', DISKSEQ } })).code
  t.equal(await codeOf('apply'), 0)
  t.equal(await codeOf('settle'), 0)
  t.equal(await codeOf('unsettle'), 2, 'twin: a word that no version used is refused')
})

t.test('no user can hold its lock', async (t) => {
  const { directory, link } = mapper(t)
  await held(t, directory, NOBODY)
  const { code, stderr, ms } = await removed(link, LINK)
  t.strictSame({ code, stderr }, { code: 0, stderr: '' })
  t.ok(ms < SOON_MS, `${ms.toFixed(0)} ms`)
  t.strictSame(readdirSync(directory), ['control'], 'the link is gone')
  const lock = lstatSync(LOCK)
  t.strictSame([lock.isFile(), lock.uid, lock.mode & 0o7777], [true, 0, 0o600], "the lock is root's alone")
  for (const flags of ['<', '>', '>>', '<>']) {
    t.not(
      (await run('sh', ['-c', `exec 9${flags}${LOCK}`], { uid: NOBODY, gid: NOBODY })).code,
      0,
      `an unprivileged user cannot open it: ${flags}`,
    )
  }
})

t.test('twin: if it locks the directory, any user can', async (t) => {
  const { directory, link } = mapper(t)
  await held(t, directory, NOBODY)
  const { stderr, ms } = await removed(link, onDirectory(t, directory))
  t.ok(ms > LIMIT_MS - 100, `it waits: ${ms.toFixed(0)} ms`)
  t.match(stderr, /still held/)
})

t.test('the program waits for a lock only for a limited time, and says so', async (t) => {
  const { directory, link } = mapper(t)
  await removed(join(directory, 'none'), LINK) // makes the file
  await held(t, LOCK, 0)
  const { code, stderr, ms } = await removed(link, LINK)
  t.strictSame({ code, stderr }, { code: 0, stderr: `diskseqfs-link: ${LOCK} is still held after 3 s; going on without a lock\n` })
  t.ok(ms > LIMIT_MS - 100 && ms < LIMIT_MS + SOON_MS, `${ms.toFixed(0)} ms`)
  t.strictSame(readdirSync(directory), ['control'], 'the link is gone')
})

t.test('twin: without the time limit it waits for ever', async (t) => {
  const { directory, link } = mapper(t)
  await removed(join(directory, 'none'), LINK)
  await held(t, LOCK, 0)
  const { ms } = await removed(link, twinLink(t, ['setitimer(ITIMER_REAL, &limit, NULL);', '']))
  t.ok(ms > LIMIT_MS + SOON_MS, `${ms.toFixed(0)} ms, until it is killed`)
  t.equal(readlinkSync(link), `/dev/disk/by-diskseq/${DISKSEQ}`, 'nothing was done')
})

t.test("a lock file that is not root's alone is not used", async (t) => {
  const { directory, link } = mapper(t)
  const before = existsSync(LOCK)
  if (before) renameSync(LOCK, `${LOCK}.aside`)
  cleanup(t, () => {
    rmSync(LOCK, { force: true })
    if (before) renameSync(`${LOCK}.aside`, LOCK)
  })
  writeFileSync(LOCK, '')
  chmodSync(LOCK, 0o644)
  await held(t, LOCK, NOBODY)
  const open = await removed(link, LINK)
  t.match(open.stderr, /not a file of root's alone/)
  t.ok(open.ms < SOON_MS)
  rmSync(LOCK)
  symlinkSync(join(directory, 'elsewhere'), LOCK)
  t.match((await removed(link, LINK)).stderr, /cannot open \/run\/diskseqfs\.lock: Too many levels/)
  t.notOk(existsSync(join(directory, 'elsewhere')), 'no file is made through a link')
})

/**
 * Runs the program until it is about to remove the link; then the name becomes another device's. -> where the link leads in
 * the end
 */
async function becomesAnothers(t: Test, ...changes: Change[]): Promise<string> {
  const { directory, link } = mapper(t)
  const [there, go] = ['there', 'go'].map((name) => join(directory, name)) as [string, string]
  const program = twinLink(
    t,
    [
      '  if (rename(link, temporary) < 0) return errno == ENOENT',
      `  close(open("${there}", O_CREAT | O_WRONLY, 0600));
  while (access("${go}", F_OK) < 0) usleep(1000);
  if (rename(link, temporary) < 0) return errno == ENOENT`,
    ],
    ...changes,
  )
  const ended = removed(link, program)
  await until(() => existsSync(there))
  symlinkSync('/dev/disk/by-diskseq/.dm/4000000001/dm-9998', `${link}.new`)
  renameSync(`${link}.new`, link)
  writeFileSync(go, '')
  t.match(await ended, { code: 0, stderr: '' })
  return existsSync(directory) && lstatSync(link, { throwIfNoEntry: false })?.isSymbolicLink() ? readlinkSync(link) : 'nothing'
}

t.test("a name that becomes another device's before its link is removed", async (t) => {
  t.equal(await becomesAnothers(t), '/dev/disk/by-diskseq/.dm/4000000001/dm-9998', 'is put back')
})

t.test('twin: if the link is not checked after it was renamed, it is lost', async (t) => {
  t.equal(await becomesAnothers(t, ['  if (!leads_to(temporary, diskseq, kernel)) {', '  if (0) {']), 'nothing')
})
