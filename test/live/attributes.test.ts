// SPDX-License-Identifier: MIT
/**
 * Owner, mode, times, ACL and xattrs of a name in the tree are those of the device node. A change
 * on either side shows on both.
 */
import { chmodSync, chownSync, lchownSync, statSync, utimesSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { cleanup, loopDisk, openDevices, run, startTree, until, watchNode } from '../helpers/tree.js'

const NOBODY = 65534

interface Pair {
  readonly name: string
  readonly own: string
  readonly shown: string
}

/** A disk and a partition, each with both of its paths. */
async function setup(t: Test) {
  const disk = loopDisk(t)
  // The device node of a loop device outlives the disk.
  const { mode, uid, gid, atime, mtime } = statSync(disk.path)
  cleanup(t, async () => {
    await run('setfacl', ['-b', disk.path])
    chownSync(disk.path, uid, gid)
    chmodSync(disk.path, mode & 0o7777)
    utimesSync(disk.path, atime, mtime)
  })
  chownSync(disk.path, 0, 0)
  chmodSync(disk.path, 0o600)
  disk.addPartition(1, 64, 64)
  const tree = await startTree(t)
  const n = disk.diskseq()
  const pairs: Pair[] = [
    { name: 'a disk', own: disk.path, shown: join(tree.mountpoint, n) },
    { name: 'a partition', own: `${disk.path}p1`, shown: join(tree.mountpoint, `${n}p1`) },
  ]
  return { disk, tree, pairs, link: join(tree.mountpoint, `${n}-part1`) }
}

const FIELDS = ['mode', 'uid', 'gid', 'atimeNs', 'mtimeNs', 'ctimeNs'] as const

function same(t: Test, { own, shown }: Pair, after: string): void {
  const a = statSync(own, { bigint: true })
  const b = statSync(shown, { bigint: true })
  t.strictSame(
    FIELDS.map((field) => b[field]),
    FIELDS.map((field) => a[field]),
    `both agree after ${after}`,
  )
}

t.test('mode, owner and times are the same on both sides, whichever one is changed', async (t) => {
  const { pairs, tree, link } = await setup(t)
  for (const pair of pairs) {
    for (const [side, path, other] of [
      ['the tree', pair.shown, pair.own],
      ['the device node', pair.own, pair.shown],
    ] as const) {
      chmodSync(path, 0o640)
      t.equal(statSync(other).mode & 0o7777, 0o640, `chmod of ${pair.name} through ${side}`)
      same(t, pair, 'chmod')
      chownSync(path, NOBODY, 1234)
      t.equal(statSync(other).uid, NOBODY, 'chown: owner')
      t.equal(statSync(other).gid, 1234, 'chown: group')
      same(t, pair, 'chown')
      await run('chown', ['root', path])
      t.strictSame([statSync(other).uid, statSync(other).gid], [0, 1234], 'chown of the owner alone')
      await run('chgrp', ['0', path])
      t.strictSame([statSync(other).uid, statSync(other).gid], [0, 0], 'chgrp')
      utimesSync(path, 1_000_000_000.25, 1_100_000_000.5)
      t.strictSame(
        [statSync(other).atimeMs, statSync(other).mtimeMs],
        [1_000_000_000_250, 1_100_000_000_500],
        'utimes, with fractions of a second',
      )
      await run('touch', ['-a', path])
      t.ok(Date.now() - statSync(other).atimeMs < 60_000, 'touch -a sets the present time')
      t.equal(statSync(other).mtimeMs, 1_100_000_000_500, 'and leaves mtime alone')
      same(t, pair, 'utimes')
      chmodSync(path, 0o600)
    }
  }
  chmodSync(link, 0o604)
  t.equal(statSync(pairs[1]!.own).mode & 0o7777, 0o604, 'chmod of the symlink changes the partition')
  t.throws(() => lchownSync(link, 1, 1), { code: 'EPERM' }, 'the symlink itself cannot be given away')
  await until(() => openDevices(tree.pid).length === 0, 1000)
})

t.test('a caller may change a name only if it may change the device node', async (t) => {
  const { disk, tree, pairs } = await setup(t)
  const shown = pairs[0]!.shown
  const asNobody = (...command: string[]) =>
    run('setpriv', ['--reuid', String(NOBODY), '--regid', String(NOBODY), '--clear-groups', ...command])
  const seen = await watchNode(t, disk.path, tree)
  for (const command of [
    ['chmod', '666', shown],
    ['chown', String(NOBODY), shown],
    ['touch', '-d', '2020-01-01', shown],
    ['setfacl', '-m', `u:${NOBODY}:rw`, shown],
    ['setfattr', '-n', 'trusted.x', '-v', '1', shown],
  ]) {
    const { code, stderr } = await asNobody(...command)
    t.ok(code !== 0 && /Operation not permitted|Permission denied/.test(stderr), `${command[0]}: ${stderr.trim()}`)
  }
  t.equal((await seen()).open, 0, 'and the device was not opened')
  chownSync(disk.path, NOBODY, 0)
  t.equal((await asNobody('chmod', '640', shown)).code, 0, 'its owner may change its mode')
  t.equal(statSync(disk.path).mode & 0o7777, 0o640)
  t.not((await asNobody('chown', '1', shown)).code, 0, 'but not give it away')
})

const acl = async (path: string) => (await run('getfacl', ['-pcn', path])).stdout.trim()

t.test('ACLs are the same on both sides, whichever one is changed', async (t) => {
  const { pairs } = await setup(t)
  for (const pair of pairs) {
    for (const [side, path, other] of [
      ['the tree', pair.shown, pair.own],
      ['the device node', pair.own, pair.shown],
    ] as const) {
      const set = await run('setfacl', ['-m', 'u:1234:rw,g:5678:r', path])
      t.equal(set.code, 0, `setfacl on ${pair.name} through ${side} ${set.stderr}`)
      t.match(await acl(other), /^user:1234:rw-$/m)
      t.match(await acl(other), /^group:5678:r--$/m)
      t.equal(await acl(pair.shown), await acl(pair.own), 'both agree')
      same(t, pair, 'setfacl')
      t.equal((await run('ls', ['-l', path])).stdout[10], '+', 'ls shows that there is one')
      await run('setfacl', ['-x', 'u:1234', path])
      t.notMatch(await acl(other), /1234/, 'an entry is removed')
      await run('setfacl', ['-b', path])
      t.equal(await acl(other), 'user::rw-\ngroup::---\nother::---', 'all are removed')
    }
  }
  const { code, stderr } = await run('setfacl', ['-d', '-m', 'u:1234:rw', pairs[0]!.shown])
  t.not(code, 0, `a default ACL is for directories: ${stderr.trim()}`)
})

t.test('a user that has rights by the ACL alone gets in', async (t) => {
  const { disk, pairs } = await setup(t)
  const shown = pairs[0]!.shown
  const asNobody = async (script: string, path: string, groups: readonly string[]) => {
    const ids = ['--reuid', String(NOBODY), '--regid', String(NOBODY)]
    return (await run('setpriv', [...ids, ...groups, 'sh', '-c', script, 'sh', path])).code === 0
  }
  const read = ': <"$1"'
  const write = ': <>"$1"'
  t.equal(await asNobody(read, shown, ['--clear-groups']), false, 'not before')
  for (const [entries, groups, reads, writes] of [
    [`u:${NOBODY}:rw`, ['--clear-groups'], true, true],
    [`u:${NOBODY}:r`, ['--clear-groups'], true, false],
    ['g:1234:rw', ['--groups', '1234'], true, true],
    ['g:1234:rw', ['--groups', '1235'], false, false],
    [`u:${NOBODY}:rw,m::r`, ['--clear-groups'], true, false],
    [`u:${NOBODY}:rw,m::-`, ['--clear-groups'], false, false],
    [`u:${NOBODY}:-,o::rw,m::rw`, ['--clear-groups'], false, false],
    // A mask without any right: the kernel does not look at the ACL at all.
    [`u:${NOBODY}:-,o::rw,m::-`, ['--clear-groups'], true, true],
    [`u:${NOBODY}:rw,g::-,m::-`, ['--clear-groups'], false, false],
  ] as const) {
    await run('setfacl', ['-b', disk.path])
    chmodSync(disk.path, 0o600)
    await run('setfacl', ['-m', entries, disk.path])
    const rights = async (path: string) => [await asNobody(read, path, groups), await asNobody(write, path, groups)]
    t.strictSame(await rights(disk.path), [reads, writes], `${entries}: may read, write, says the kernel about the device node`)
    t.strictSame(await rights(shown), [reads, writes], 'and so on its name in the tree')
  }
})

const getfattr = (path: string, name: string) => run('getfattr', ['--only-values', '-n', name, path])

t.test('xattrs are the same on both sides, whichever one is changed', async (t) => {
  const { pairs, tree } = await setup(t)
  for (const pair of pairs) {
    for (const [side, path, other] of [
      ['the tree', pair.shown, pair.own],
      ['the device node', pair.own, pair.shown],
    ] as const) {
      const value = `von ${side}`
      const set = await run('setfattr', ['-n', 'trusted.diskseqfs-test', '-v', value, path])
      t.equal(set.code, 0, `setfattr on ${pair.name} through ${side} ${set.stderr}`)
      t.equal((await getfattr(other, 'trusted.diskseqfs-test')).stdout, value)
      t.match((await run('getfattr', ['-d', '-m-', other])).stdout, /trusted\.diskseqfs-test/, 'it is listed')
      await run('setfattr', ['-n', 'trusted.diskseqfs-test', '-v', 'x'.repeat(4000), path])
      t.equal((await getfattr(other, 'trusted.diskseqfs-test')).stdout.length, 4000, 'a long one replaces it')
      await run('setfattr', ['-x', 'trusted.diskseqfs-test', path])
      const { code, stderr } = await getfattr(other, 'trusted.diskseqfs-test')
      t.ok(code !== 0 && /No such attribute/.test(stderr), `removed: ${stderr.trim()}`)
    }
    for (const name of ['trusted.missing', 'security.missing']) {
      t.match((await getfattr(pair.shown, name)).stderr, /No such attribute/, `${name}: ENODATA`)
    }
    const own = await run('setfattr', ['-n', 'user.x', '-v', '1', pair.own])
    const shown = await run('setfattr', ['-n', 'user.x', '-v', '1', pair.shown])
    t.match(shown.stderr, /Operation not (permitted|supported)/, `user.*: ${shown.stderr.trim()}`)
    t.equal(shown.code, own.code, 'as on the device node')
    const nonsense = await run('setfattr', ['-n', 'nonsense.x', '-v', '1', pair.shown])
    t.match(nonsense.stderr, /Operation not supported/, 'an unknown namespace: EOPNOTSUPP')
  }
  for (const args of [
    ['-n', 'trusted.x', '-v', '1'],
    ['-n', 'user.x', '-v', '1'],
  ]) {
    const { code, stderr } = await run('setfattr', [...args, tree.mountpoint])
    t.ok(code !== 0 && /Operation not (permitted|supported)/.test(stderr), `the tree itself has none: ${stderr.trim()}`)
  }
  await until(() => openDevices(tree.pid).length === 0, 1000)
})
