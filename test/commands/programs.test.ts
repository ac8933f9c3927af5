// SPDX-License-Identifier: MIT
/** The library, as it is installed from the package for npm; and the examples of docs/programs.md. */
import { execFileSync, spawn } from 'node:child_process'
import { mkdirSync, openSync, readFileSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { attach, DiskError, lease, list, open, resolve, watch } from '../../src/index.js'
import { mountsAt } from '../../src/util/mountpoint.js'
import { onlyAtLength } from '../helpers/long.js'
import { ROOT } from '../helpers/root.js'
import { cleanup, CLI, cli, errorOf, loopDisk, run, type RunningTree, scratch, startTree, until } from '../helpers/tree.js'

const examples = [...readFileSync(join(ROOT, 'docs/programs.md'), 'utf8').matchAll(/^```(\w+)\n(.*?)^```$/gms)].map(
  ([, language, text]) => ({ language, text: text as string }),
)

/** @param about a word in it, where there are several */
const example = (language: string, about = '') => {
  const found = examples.filter((each) => each.language === language && each.text.includes(about))
  if (found.length !== 1) throw new Error(`${found.length} examples in ${language} about ${about}`)
  return found[0]?.text as string
}

/** Runs an example on a disk, on another one, and on what is none. */
async function verifies(t: Test, file: string, ...args: string[]): Promise<void> {
  const disk = loopDisk(t)
  const unbound = loopDisk(t)
  const number = unbound.diskseq()
  unbound.detach()
  t.strictSame(await run(file, [...args, disk.path, disk.diskseq()]), { code: 0, stdout: 'that very disk\n', stderr: '' })
  t.match(await run(file, [...args, disk.path, number]), { code: 1, stdout: '', stderr: /Stale file handle/ })
  t.match(await run(file, [...args, unbound.path, number]), { code: 1, stdout: '', stderr: /No such device or address/ })
  t.match(await run(file, [...args, '/dev/null', '1']), { code: 1, stdout: '', stderr: /Block device required/ })
  disk.addPartition(1, 64, 64)
  t.equal((await run(file, [...args, `${disk.path}p1`, disk.diskseq()])).code, 0, 'a partition')
  disk.deletePartition(1)
}

t.test('the example in C', async (t) => {
  const dir = scratch(t)
  writeFileSync(join(dir, 'disk.c'), example('c'))
  execFileSync('cc', ['-Wall', '-Wextra', '-Werror', '-o', join(dir, 'disk'), join(dir, 'disk.c')])
  await verifies(t, join(dir, 'disk'))
})

t.test('the example in Python', async (t) => {
  const dir = scratch(t)
  writeFileSync(join(dir, 'disk.py'), example('python', 'BLKGETDISKSEQ'))
  await verifies(t, 'python3', join(dir, 'disk.py'))
})

/** The leases of a tree's daemon. */
async function leasesOf(tree: RunningTree): Promise<Record<string, any>[]> {
  const { stdout } = await cli('leases', '--json', '--tree', tree.mountpoint)
  return (JSON.parse(stdout) as { leases: Record<string, any>[] }).leases
}

t.test('the example of the control socket, in Python', async (t) => {
  const tree = await startTree(t)
  const dir = scratch(t)
  const [script, image, empty] = [join(dir, 'lease.py'), join(dir, 'disk.img'), join(dir, 'empty')]
  writeFileSync(script, example('python', 'send_fds'))
  writeFileSync(image, Buffer.alloc(1 << 20))
  writeFileSync(empty, '')
  const socket = `/run/diskseqfs/${mountsAt(tree.mountpoint).at(-1)?.device}.io.diskseqfs`
  const child = spawn('python3', [script, image, socket], { stdio: ['pipe', 'pipe', 'inherit'] })
  cleanup(t, () => child.kill())
  const ended = new Promise((resolve) => child.on('close', resolve))
  let printed = ''
  child.stdout.on('data', (chunk: Buffer) => (printed += chunk.toString()))
  await until(() => printed.includes('\n') || child.exitCode !== null, 30_000)
  const path = printed.trim()
  t.match(path, new RegExp(`^${tree.mountpoint}/\\d+$`))
  t.match(await leasesOf(tree), [{ rule: 'connection', path, file: image }])
  t.equal(
    errorOf(() => openSync(path, 'r+')),
    '',
    'the disk is there, and can be written to',
  )
  child.stdin.end()
  t.equal(await ended, 0)
  await until(() => errorOf(() => openSync(path, 'r')) === 'ENOENT')
  t.strictSame(await leasesOf(tree), [], 'it goes with the connection')
  const { code, stdout, stderr } = await run('python3', [script, empty, socket])
  t.strictSame({ code, stdout }, { code: 1, stdout: '' })
  t.match(stderr, /RuntimeError: \('io\.diskseqfs\.CannotAttach', \{'code': 'EINVAL', 'message': 'the file is empty/)
})

t.test('the example of leases, for scripts', async (t) => {
  const tree = await startTree(t)
  const dir = scratch(t)
  const image = join(dir, 'disk.img')
  writeFileSync(image, Buffer.alloc(8 << 20))
  execFileSync('mkfs.ext4', ['-q', '-O', '^has_journal', image])
  // It names no tree, as it is about the one of the service.
  mkdirSync(join(dir, 'bin'))
  const program = `#!/bin/sh\nexec '${process.execPath}' '${CLI}' "$@" --tree '${tree.mountpoint}'\n`
  writeFileSync(join(dir, 'bin/diskseqfs'), program, { mode: 0o755 })
  const script = `set -e; cd '${dir}'; PATH='${dir}/bin':$PATH; ${example('sh', 'diskseqfs attach')}echo "$disk"`
  // In a mount namespace of its own, so that no other process sees the mount at /mnt.
  const { code, stdout, stderr } = await run('unshare', ['--mount', '--propagation', 'private', 'bash', '-c', script])
  t.strictSame({ code, stderr }, { code: 0, stderr: '' })
  const [headings, lease, path, ...rest] = stdout.trimEnd().split('\n')
  t.match(headings, /^LEASE +NAME +KNAME +RULE +SINCE +FILE +REASON$/)
  t.match(lease, new RegExp(`^lease-[0-9a-f]{8} +\\d+ +loop\\d+ +grace 30 s +\\S+ +${image} +backup$`))
  t.match(path, new RegExp(`^${tree.mountpoint}/\\d+$`))
  t.strictSame(rest, [])
  t.strictSame(await leasesOf(tree), [], 'detach has ended it')
  await until(() => errorOf(() => openSync(path as string, 'r')) === 'ENOENT')
  t.pass('no loop device is left')
})

onlyAtLength('the package is installed without a compiler and a download, and has types', {}, async (t) => {
  const dir = scratch(t)
  execFileSync('make', ['--silent', '-C', ROOT, 'npm-package'], { stdio: 'pipe' })
  const { version } = JSON.parse(readFileSync(join(ROOT, 'package.json'), 'utf8')) as { version: string }
  writeFileSync(join(dir, 'package.json'), '{ "type": "module" }')
  // Only what is needed to run npm: there is no compiler.
  mkdirSync(join(dir, 'bin'))
  symlinkSync(process.execPath, join(dir, 'bin/node'))
  const npm = execFileSync('sh', ['-c', 'readlink -f "$(command -v npm)"'], { encoding: 'utf8' }).trim()
  const { code, stderr } = await run('env', [
    '--unset=NODE_OPTIONS',
    `PATH=${dir}/bin`,
    process.execPath,
    npm,
    'install',
    '--offline',
    '--no-audit',
    '--no-fund',
    `--prefix=${dir}`,
    join(ROOT, `build/diskseqfs-${version}.tgz`),
  ])
  t.strictSame({ code, stderr }, { code: 0, stderr: '' })
  writeFileSync(join(dir, 'disk.ts'), example('ts'))
  // Of other packages it has node's types only.
  mkdirSync(join(dir, 'node_modules/@types'))
  symlinkSync(join(ROOT, 'node_modules/@types/node'), join(dir, 'node_modules/@types/node'))
  symlinkSync(join(ROOT, 'node_modules/undici-types'), join(dir, 'node_modules/undici-types'))
  const tsc = [
    join(ROOT, 'node_modules/typescript/bin/tsc'),
    '--strict',
    '--target',
    'es2022',
    '--module',
    'nodenext',
    '--types',
    'node',
    '--lib',
    'es2022,esnext.disposable',
  ]
  const checked = await run('env', ['--unset=NODE_OPTIONS', '--chdir', dir, process.execPath, ...tsc, 'disk.ts'])
  t.strictSame(checked, { code: 0, stdout: '', stderr: '' }, 'the example is right, and its types are')
  const disk = loopDisk(t)
  const image = `${disk.file}.image`
  writeFileSync(image, Buffer.alloc(1 << 20))
  const node = (...args: string[]) => run('env', ['--unset=NODE_OPTIONS', '--chdir', dir, process.execPath, ...args])
  const { stdout } = await node('disk.js', disk.path, image)
  t.match(
    stdout,
    new RegExp(
      `^/dev/disk/by-diskseq/${disk.diskseq()} \\d+\n/dev/disk/by-diskseq/\\d+\ntrue\n(add \\S+\n)*add ${disk.diskseq()}\n(add \\S+\n)*$`,
    ),
    'it runs',
  )
  const plain = `const { resolve } = require('diskseqfs'); resolve('${disk.kname}').then(({ name }) => console.log(name))`
  t.strictSame(
    await node('--input-type=commonjs', '--eval', plain),
    { code: 0, stdout: `${disk.diskseq()}\n`, stderr: '' },
    'plain JavaScript',
  )
})

t.test('open: a disk, and what it fails with', async (t) => {
  const disk = loopDisk(t)
  const opened = await open(disk.diskseq(), { write: true })
  t.match(opened, {
    name: disk.diskseq(),
    diskseq: BigInt(disk.diskseq()),
    partition: 0,
    kname: disk.kname,
    path: `/dev/disk/by-diskseq/${disk.diskseq()}`,
  })
  disk.detach()
  await opened.close()
  await opened.close()
  t.pass('closed twice is closed once')
  for (const [what, code] of [
    [disk.kname, 'ENXIO'],
    ['18446744073709551615', 'ENOENT'],
    ['/dev/null', 'ENOTBLK'],
    ['/nonexistent', 'ENOENT'],
    ['', 'EINVAL'],
  ] as const) {
    const error = await open(what).catch((error: unknown) => error)
    t.ok(error instanceof DiskError, what)
    t.match(error, { code, message: /\S/ })
  }
  t.match(await open('18446744073709551615').catch((error: unknown) => error), { diskseq: 18446744073709551615n })
})

t.test('an end that is asked for', async (t) => {
  const disk = loopDisk(t)
  const reason = new Error('enough')
  await t.rejects(open(disk.path, { signal: AbortSignal.abort(reason) }), reason)
  await t.rejects(attach(disk.file, { signal: AbortSignal.abort(reason) }), reason)
  const ending = new AbortController()
  const opening = open(disk.path, { signal: ending.signal })
  ending.abort(reason)
  await t.rejects(opening, reason)
  const events: string[] = []
  const watching = new AbortController()
  for await (const event of watch({ existing: true, signal: watching.signal })) {
    events.push(event.event)
    if (event.event === 'ready') watching.abort()
  }
  t.equal(events.at(-1), 'ready')
  disk.detach()
  await until(() =>
    resolve(disk.kname).then(
      () => false,
      ({ code }) => code === 'ENXIO',
    ),
  )
  t.pass('what was opened too late is closed')
})

t.test('attach and list', async (t) => {
  const dir = scratch(t)
  const file = join(dir, 'file')
  writeFileSync(file, Buffer.alloc(1 << 20))
  const image = await attach(file)
  t.ok(
    (await list()).some(({ name }) => name === image.name),
    'it is there',
  )
  await image.close()
  await until(async () => !(await list()).some(({ name }) => name === image.name))
  t.pass('it goes with its last descriptor')
  const numbers = (await list()).map(({ diskseq }) => diskseq)
  t.strictSame(
    numbers,
    numbers.toSorted((a, b) => (a < b ? -1 : 1)),
  )
})

t.test('a lease', async (t) => {
  const { mountpoint: tree } = await startTree(t)
  const file = join(scratch(t), 'file')
  writeFileSync(file, Buffer.alloc(1 << 20))
  const held = await lease(file, { tree, reason: 'a test' })
  t.match(held, { id: /^lease-/, path: join(tree, held.name), name: String(held.diskseq) })
  t.ok(statSync(held.path).isBlockDevice())
  await held.release()
  await until(async () => !(await list()).some(({ name }) => name === held.name))
  const again = await lease(file, { tree, rule: 'keep' })
  again.close()
  const other = await lease(again.path, { tree })
  t.equal(other.name, again.name)
  await other.release()
  t.ok(
    (await list()).some(({ name }) => name === again.name),
    'it is kept',
  )
  t.equal((await cli('detach', '--tree', tree, again.id)).code, 0)
  await t.rejects(lease(file, { tree, offset: 1n << 30n }), { code: 'EINVAL', message: /not within the file/ })
  await t.rejects(lease(tree, { tree }), { code: 'EISDIR' })
  await t.rejects(lease(file, { tree: scratch(t) }), { message: /no tree is mounted there/ })
})
