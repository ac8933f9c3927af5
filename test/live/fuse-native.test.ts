// SPDX-License-Identifier: MIT
/**
 * The tree on the package fuse-native: what its transport does and the daemon's own does not. Tests
 * of what both do are with the others.
 */
import { execFileSync } from 'node:child_process'
import { chmodSync, closeSync, mkdtempSync, openSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { blk } from '../helpers/blk.js'
import { ROOT } from '../helpers/root.js'
import { cleanup, CLI, cli, errorOf, loopDisk, openDevices, renumber, run, type RunningTree, startTree, until } from '../helpers/tree.js'

const TRANSPORT = ['--transport', 'fuse-native']
const SECONDS = 10
/** The time that the transport holds a pin; a busy machine may take longer. */
const HOLD_MS = 1000

/** The twin shows a wrong open or two in 60,000. It goes on until there is one, for at most so many rounds. */
const TWIN_ROUNDS = 6
const ROUNDS_MAX = 6

async function churn(t: Test, { mountpoint }: RunningTree) {
  // Openers of the lowest priority may get no processor for longer than the hold lasts, and then it does not
  // protect them.
  const result = await blk('churn', '--mode', 'tree', '--dir', mountpoint, '--seconds', String(SECONDS))
  t.comment(`${result['opens_ok']} opens right, ${result['wrong_diskseq']} wrong, ${result['recycles']} disks recycled`)
  return result
}

t.test('opens reach the disk in their name', async (t) => {
  const tree = await startTree(t, { args: TRANSPORT })
  let opens = 0
  let recycles = 0
  // A busy machine gets there later.
  for (let round = 0; round < ROUNDS_MAX && (opens <= 100 || recycles <= 10); round++) {
    const result = await churn(t, tree)
    t.equal(result['wrong_diskseq'] + result['wrong_data'], 0, 'no open reached another disk')
    opens += result['opens_ok']
    recycles += result['recycles']
  }
  t.ok(opens > 100 && recycles > 10, 'while disks came and went')
})

t.test('twin: without a hold, wrong opens get through', async (t) => {
  const tree = await startTree(t, { args: TRANSPORT, twin: 'no-hold', expectErrors: true })
  let wrong = 0
  for (let round = 0; round < TWIN_ROUNDS && wrong === 0; round++) wrong = (await churn(t, tree))['wrong_diskseq']
  t.ok(wrong > 0, 'opens reached other disks')
})

t.test('a pin is held for a second after the last request, and no longer', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t, { args: TRANSPORT })
  const path = join(tree.mountpoint, disk.diskseq())
  for (let i = 0; i < 5; i++) closeSync(openSync(path, 'r'))
  t.strictSame(openDevices(tree.pid), [disk.path], 'held once')
  const began = performance.now()
  await until(() => openDevices(tree.pid).length === 0, 10 * HOLD_MS)
  t.ok(performance.now() - began > HOLD_MS / 2, 'it is held for a time')
})

t.test('at its start it says what it does not guarantee', async (t) => {
  const tree = await startTree(t, { args: TRANSPORT })
  t.match(
    tree.log().find(({ level }) => level === 'warn'),
    { msg: /may get another disk; a look at a disk opens it/, holdMs: HOLD_MS },
  )
})

t.test('it lists what the tree of the other transport lists', async (t) => {
  loopDisk(t).addPartition(1, 64, 64)
  const own = await startTree(t)
  const other = await startTree(t, { args: TRANSPORT })
  // The devices of other programs come and go.
  await until(() => readdirSync(own.mountpoint).sort().join() === readdirSync(other.mountpoint).sort().join(), 10_000)
  t.pass('the same names')
})

t.test('owner and mode are the same on both sides, whichever one is changed', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t, { args: TRANSPORT })
  const path = join(tree.mountpoint, disk.diskseq())
  const { mode, uid, gid } = statSync(disk.path)
  cleanup(t, () =>
    execFileSync('sh', ['-c', 'chmod "$1" "$3" && chown "$2" "$3"', 'sh', (mode & 0o777).toString(8), `${uid}:${gid}`, disk.path]),
  )
  chmodSync(path, 0o640)
  t.equal(statSync(disk.path).mode & 0o777, 0o640)
  chmodSync(disk.path, 0o600)
  t.equal((await run('stat', ['-c', '%a', path])).stdout, '600\n')
  execFileSync('chown', ['1:2', path])
  t.match(statSync(disk.path), { uid: 1, gid: 2 })
  execFileSync('chgrp', ['3', path])
  t.match(statSync(disk.path), { uid: 1, gid: 3 }, 'chgrp leaves the owner')
})

t.test('only the owner may use a node with an ACL, as the kernel does not see the ACL', async (t) => {
  const disk = loopDisk(t)
  const tree = await startTree(t, { args: TRANSPORT })
  const path = join(tree.mountpoint, disk.diskseq())
  const { gid, mode } = statSync(disk.path)
  cleanup(t, () =>
    execFileSync('sh', [
      '-c',
      'setfacl -b "$1" && chgrp "$2" "$1" && chmod "$3" "$1"',
      'sh',
      disk.path,
      String(gid),
      (mode & 0o777).toString(8),
    ]),
  )
  // The mode then shows the mask, rw-, for a group that has no rights.
  execFileSync('sh', ['-c', 'chgrp 65534 "$1" && setfacl -m u:1:rw,g::-,o::-,m::rw "$1"', 'sh', disk.path])
  t.equal(statSync(disk.path).mode & 0o777, 0o660)
  t.equal((await run('stat', ['-c', '%a', path])).stdout, '600\n')
  const { code } = await run('setpriv', ['--reuid=65534', '--regid=65534', '--clear-groups', 'head', '-c', '1', path])
  t.not(code, 0, 'that group does not get in')
})

t.test('a partition whose number has changed is refused, as the library keeps the inode', async (t) => {
  const disk = loopDisk(t)
  const other = loopDisk(t)
  disk.addPartition(1, 64, 64)
  const tree = await startTree(t, { args: TRANSPORT })
  const path = join(tree.mountpoint, `${disk.diskseq()}p1`)
  statSync(path)
  await until(() => openDevices(tree.pid).length === 0, 10 * HOLD_MS)
  await renumber(disk, other)
  // Node.js has no name for ESTALE.
  t.match(
    errorOf(() => openSync(path, 'r')),
    /-116/,
  )
})

t.test('SIGTERM unmounts, and so does umount', async (t) => {
  const tree = await startTree(t, { args: TRANSPORT })
  t.equal(await tree.stop(), 0)
  t.strictSame(readdirSync(tree.mountpoint), [])
  const again = await startTree(t, { args: TRANSPORT })
  t.equal((await run('umount', [again.mountpoint])).code, 0)
  t.equal(await again.ended, 0)
})

t.test('options that do not go together are refused with a reason', async (t) => {
  for (const [args, reason] of [
    [['--replace'], /no daemon can go on with its mount/],
    [['-o', 'ro'], /no mount options can be set/],
    [['-o', 'context=system_u:object_r:device_t'], /no mount options can be set/],
  ] as const) {
    const { code, stderr } = await cli('mount', '-f', ...TRANSPORT, ...args, '/mnt')
    t.equal(code, 2, args.join(' '))
    t.match(stderr, reason)
  }
  const unknown = await cli('mount', '--transport', 'pigeon', '/mnt')
  t.equal(unknown.code, 2)
  t.match(unknown.stderr, /session, fuse-native/)
})

t.test('without libfuse 2 it says what to install', async (t) => {
  const empty = join(t.testdir({}), 'empty')
  writeFileSync(empty, '')
  const { code, stderr } = await run('unshare', [
    '--mount',
    'sh',
    '-c',
    'for lib in /lib/*/libfuse.so.2; do mount --bind "$1" "$(readlink -f "$lib")"; done; shift; exec "$@"',
    'sh',
    empty,
    process.execPath,
    CLI,
    'mount',
    '-f',
    ...TRANSPORT,
    '/mnt',
  ])
  t.equal(code, 1)
  t.match(stderr, /^diskseqfs: --transport fuse-native: libfuse\.so\.2 is missing; apt-get install libfuse2/)
})

t.test('without the package it says how to install it', async (t) => {
  // Not below the project, where Node.js would find the project's own package.
  const elsewhere = mkdtempSync(join(tmpdir(), 'diskseqfs-installed-'))
  cleanup(t, () => rmSync(elsewhere, { recursive: true }))
  const what = ['package.json', 'dist', 'native/build/Release/diskseqfs_native.node']
  execFileSync('cp', ['-R', '--parents', ...what, elsewhere], { cwd: ROOT })
  const { code, stderr } = await run(process.execPath, [join(elsewhere, 'dist/cli.js'), 'mount', '-f', ...TRANSPORT, '/mnt'])
  t.equal(code, 1)
  t.match(stderr, new RegExp(`^diskseqfs: --transport fuse-native: the package is missing; npm install --prefix ${elsewhere}/ fuse-native`))
})
