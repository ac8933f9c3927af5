// SPDX-License-Identifier: MIT
/** The library, as it is installed from the package for npm; and the examples of docs/programs.md. */
import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { attach, DiskError, list, open, resolve, watch } from '../../src/index.js'
import { ROOT } from '../helpers/root.js'
import { loopDisk, run, scratch, until } from '../helpers/tree.js'

const examples = new Map(
  [...readFileSync(join(ROOT, 'docs/programs.md'), 'utf8').matchAll(/^```(\w+)\n(.*?)^```$/gms)].map(([, language, text]) => [
    language,
    text as string,
  ]),
)

const example = (language: string) => {
  const text = examples.get(language)
  if (text === undefined) throw new Error(`no example in ${language}`)
  return text
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
  writeFileSync(join(dir, 'disk.py'), example('python'))
  await verifies(t, 'python3', join(dir, 'disk.py'))
})

t.test('the package is installed without a compiler and a download, and has types', async (t) => {
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
