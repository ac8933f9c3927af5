// SPDX-License-Identifier: MIT
/**
 * No user can make the daemon open a disk that the user could not open itself. A user that may open
 * the device node may open its name in the tree; no other user may, and a refused open has not
 * disturbed the disk.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, chownSync, closeSync, existsSync, openSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import {
  cleanup,
  loopDisk,
  openDevices,
  type Output,
  run,
  sleep,
  startTree,
  type Twin,
  until,
  watchNode,
  type ZramDisk,
  zramDisk,
} from '../helpers/tree.js'

const NOBODY = 65534
/** A group without members, unless a test adds one. */
const GROUP = 54321

const UNPRIVILEGED = ['--reuid', String(NOBODY), '--regid', String(NOBODY)]

/** Runs a shell script as the user nobody; `$1` is the path. */
function asNobody(script: string, path: string, more: readonly string[] = ['--clear-groups']): Promise<Output> {
  return run('setpriv', [...UNPRIVILEGED, ...more, 'sh', '-c', script, 'sh', path])
}

const READ = ': <"$1"'
const WRITE = ': >>"$1"'
const READ_WRITE = ': <>"$1"'

/** Ten opens of each kind; none may succeed. */
const TRY_HARD = `
  for i in 1 2 3 4 5 6 7 8 9 10; do
    (${READ}) && exit 9
    (${WRITE}) && exit 9
    (${READ_WRITE}) && exit 9
    dd if="$1" of=/dev/null count=1 && exit 9
  done
  exit 0
`

async function setup(t: Test, twin?: Twin) {
  const zram = zramDisk(t)
  const tree = await startTree(t, twin ? { twin } : {})
  const seen = await watchNode(t, zram.path, tree)
  return { zram, tree, path: join(tree.mountpoint, zram.diskseq()), seen }
}

async function refused(t: Test, path: string, seen: Awaited<ReturnType<typeof watchNode>>, more?: readonly string[]) {
  const { code, stderr } = await asNobody(TRY_HARD, path, more)
  t.equal(code, 0, 'no open succeeds')
  t.match(stderr, /Permission denied/, 'EACCES')
  t.notMatch(stderr, /No such file|Input\/output/, 'and no other error')
  t.equal((await seen()).open, 0, 'the device was not opened')
}

t.test('a caller that may not open the device is refused, and the device is not opened', async (t) => {
  const { zram, tree, path, seen } = await setup(t)
  await refused(t, path, seen)
  t.strictSame(openDevices(tree.pid), [], 'the daemon does not have it open')
  zram.reset()
  t.pass('it can be reset at once')
})

t.test('twin: without the access check, the device is opened', async (t) => {
  const { path, seen } = await setup(t, 'no-access-rule')
  const { code } = await asNobody(TRY_HARD, path)
  t.equal(code, 0, 'the kernel refuses the opens all the same')
  t.ok((await seen()).open > 0, 'but the device was opened')
})

/** @returns how many loop devices were still bound after losetup -d, while a user keeps trying to open them */
async function lateDetaches(t: Test, rounds: number, twin?: Twin): Promise<number> {
  const tree = await startTree(t, twin ? { twin } : {})
  let late = 0
  for (let i = 0; i < rounds; i++) {
    const loop = loopDisk(t)
    const path = join(tree.mountpoint, loop.diskseq())
    const trying = spawn('setpriv', [...UNPRIVILEGED, '--clear-groups', 'sh', '-c', `echo; while :; do (${READ}); done`, 'sh', path], {
      stdio: ['ignore', 'pipe', 'ignore'],
    })
    cleanup(t, () => trying.kill('SIGKILL'))
    const ended = new Promise((resolve) => trying.on('close', resolve))
    await once(trying.stdout, 'data')
    await sleep(20)
    loop.detach()
    if (existsSync(`/sys/block/${loop.kname}/loop/backing_file`)) late++
    trying.kill('SIGKILL')
    await ended
  }
  return late
}

t.test('refused opens do not put off a detach', async (t) => {
  t.equal(await lateDetaches(t, 20), 0)
})

t.test('twin: without the access check, they do', async (t) => {
  t.ok((await lateDetaches(t, 20, 'no-access-rule')) > 0)
})

t.test('a caller that may not open may still look', async (t) => {
  const { zram, path, seen } = await setup(t)
  const { code, stdout } = await asNobody('stat -c "%a %u %g" "$1" && test -e "$1" && ! test -r "$1" && ls -l "$1" >&2', path)
  t.equal(code, 0, 'stat, access and ls work')
  t.equal(stdout.trim(), '600 0 0')
  t.equal((await seen()).open, 0, 'without the device being opened')
  zram.reset()
})

/** How the device node is set up, the caller's ids, and whether it may read and write. */
const CASES: [string, (zram: ZramDisk) => void, string[], boolean, boolean][] = [
  ['the owner', ({ path }) => chownSync(path, NOBODY, 0), ['--clear-groups'], true, true],
  ['an owner that may only read', ({ path }) => (chownSync(path, NOBODY, 0), chmodSync(path, 0o466)), ['--clear-groups'], true, false],
  [
    'an owner without rights, where all others have them',
    ({ path }) => (chownSync(path, NOBODY, 0), chmodSync(path, 0o066)),
    ['--clear-groups'],
    false,
    false,
  ],
  ['the primary group', ({ path }) => (chownSync(path, 0, NOBODY), chmodSync(path, 0o660)), ['--clear-groups'], true, true],
  ['a supplementary group', ({ path }) => (chownSync(path, 0, GROUP), chmodSync(path, 0o660)), ['--groups', `1,2,${GROUP}`], true, true],
  [
    'a supplementary group that may only read',
    ({ path }) => (chownSync(path, 0, GROUP), chmodSync(path, 0o640)),
    ['--groups', String(GROUP)],
    true,
    false,
  ],
  [
    'a supplementary group that may only write',
    ({ path }) => (chownSync(path, 0, GROUP), chmodSync(path, 0o620)),
    ['--groups', String(GROUP)],
    false,
    true,
  ],
  [
    'a group without rights, where all others have them',
    ({ path }) => (chownSync(path, 0, GROUP), chmodSync(path, 0o606)),
    ['--groups', String(GROUP)],
    false,
    false,
  ],
  ['other groups', ({ path }) => (chownSync(path, 0, GROUP), chmodSync(path, 0o660)), ['--groups', '1,2,3'], false, false],
  ['all users', ({ path }) => chmodSync(path, 0o666), ['--clear-groups'], true, true],
  ['another user, by mode', ({ path }) => chmodSync(path, 0o660), ['--clear-groups'], false, false],
]

for (const [who, prepare, groups, reads, writes] of CASES) {
  t.test(`rights of ${who}: as on the device node`, async (t) => {
    const { zram, path, seen } = await setup(t)
    prepare(zram)
    for (const [script, may] of [
      [READ, reads],
      [WRITE, writes],
      [READ_WRITE, reads && writes],
    ] as const) {
      const own = await asNobody(script, zram.path, groups)
      t.equal(own.code === 0, may, `${script}: ${may ? 'may' : 'may not'}, says the kernel about the device node`)
      await seen()
      const { code, stderr } = await asNobody(script, path, groups)
      t.equal(code === 0, may, `and so on its name in the tree ${stderr.trim()}`)
      if (!reads && !writes) t.equal((await seen()).open, 0, 'the device was not opened')
    }
  })
}

const CAPABLE = ['--clear-groups', '--inh-caps', '+dac_override', '--ambient-caps', '+dac_override']

t.test('a capability that overrides modes lets the caller in', async (t) => {
  const { path } = await setup(t)
  const { code, stderr } = await asNobody(READ_WRITE, path, CAPABLE)
  t.equal(code, 0, `CAP_DAC_OVERRIDE opens ${stderr}`)
})

t.test('root of its own user namespace has no rights here', async (t) => {
  const { path, seen } = await setup(t)
  const inNamespace = (script: string) =>
    asNobody(`exec unshare --user --map-root-user sh -c '${script.replaceAll("'", `'\\''`)}' sh "$1"`, path)
  if ((await inNamespace('exit 0')).code !== 0) {
    t.pass('a namespace of their own', { skip: 'users may not make namespaces here' })
    return
  }
  const { code, stdout, stderr } = await inNamespace(`id -u; ${TRY_HARD}`)
  t.equal(stdout.trim(), '0', 'the process is root there')
  t.equal(code, 0, 'no open succeeds')
  t.match(stderr, /Permission denied/, 'EACCES')
  t.equal((await seen()).open, 0, 'the device was not opened')
})

t.test('no caller is let in because another one has the disk open', async (t) => {
  const { tree, path, seen } = await setup(t)
  const fd = openSync(path, 'r')
  await seen()
  await refused(t, path, seen)
  closeSync(fd)
  await until(() => openDevices(tree.pid).length === 0, 1000)
})
