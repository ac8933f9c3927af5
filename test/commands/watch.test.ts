// SPDX-License-Identifier: MIT
/** `diskseqfs watch` and `diskseqfs wait`: disks that come and go, each told once and in order. */
import { spawn } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'

import t, { type Test } from 'tap'

import { cleanup, CLI, type LoopDisk, loopDisk, run, sleep, until } from '../helpers/tree.js'

const NOBODY = 65534
const PROGRAM = ['--unset=NODE_OPTIONS', process.execPath, CLI]
const wait = (...args: string[]) => run('env', [...PROGRAM, 'wait', ...args])

type Line = Record<string, unknown>

/** Starts to watch, and returns once all that is there has been told. */
async function startWatch(t: Test) {
  const child = spawn('env', [...PROGRAM, 'watch', '--json', '--existing'], { stdio: ['ignore', 'pipe', 'pipe'] })
  let out = ''
  child.stdout.on('data', (chunk: Buffer) => (out += chunk.toString()))
  const ended = new Promise((resolve) => child.on('close', resolve))
  cleanup(t, async () => {
    child.kill('SIGKILL')
    await ended
  })
  const lines = () =>
    out
      .split('\n')
      .slice(0, -1)
      .map((line) => JSON.parse(line) as Line)
  const ready = () => lines().findIndex(({ event }) => event === 'ready')
  await until(() => ready() >= 0, 30_000)
  return { child, ended, existing: lines().slice(0, ready()), since: () => lines().slice(ready() + 1) }
}

const short = ({ event, name }: Line) => (name === undefined ? `${event}` : `${event} ${name}`)

/** Those of some disks. */
const about = (disks: Iterable<string>, lines: readonly Line[]) => {
  const diskseqs = new Set(disks)
  return lines.filter(({ diskseq }) => diskseqs.has(diskseq as string)).map(short)
}

t.test('what is there is told first, and then what comes and goes', async (t) => {
  const disk = loopDisk(t)
  const n = disk.diskseq()
  const watch = await startWatch(t)
  t.match(
    watch.existing.find(({ name }) => name === n),
    { event: 'add', diskseq: n, partition: 0, kname: disk.kname, majmin: readFileSync(`/sys/block/${disk.kname}/dev`, 'utf8').trim() },
  )
  disk.addPartition(2, 64, 64)
  await until(() => about([n], watch.since()).length === 1)
  disk.deletePartition(2)
  await until(() => about([n], watch.since()).length === 2)
  disk.detach()
  await until(() => about([n], watch.since()).length === 3)
  t.strictSame(about([n], watch.since()), [`add ${n}p2`, `remove ${n}p2`, `remove ${n}`])
  await run('losetup', [disk.path, disk.file])
  cleanup(t, () => run('losetup', ['--detach', disk.path]))
  const next = disk.diskseq()
  await until(() => about([next], watch.since()).length === 1)
  t.strictSame(about([next], watch.since()), [`add ${next}`], 'another one on the same device')
})

const ROUNDS = 40

/** A disk that comes and goes; the numbers it had. */
async function recycle(disk: LoopDisk): Promise<string[]> {
  const numbers = [disk.diskseq()]
  for (let i = 0; i < ROUNDS; i++) {
    await run('losetup', ['--detach', disk.path])
    if ((await run('losetup', [disk.path, disk.file])).code === 0) numbers.push(disk.diskseq())
  }
  return numbers
}

t.test('many disks at once: what comes is told once, and goes once, after that', async (t) => {
  const disks = [loopDisk(t), loopDisk(t), loopDisk(t)]
  const watch = await startWatch(t)
  const numbers = (await Promise.all(disks.map(recycle))).flat()
  // The last ones; what was there for too short a time to be looked at may be missing.
  const last = new Set(disks.map((disk) => disk.diskseq()))
  for (const disk of disks) disk.detach()
  const all = () => about(numbers, [...watch.existing, ...watch.since()])
  await until(() => [...last].every((n) => all().includes(`remove ${n}`)), 30_000)
  for (const n of numbers) {
    const told = all().filter((line) => line.endsWith(` ${n}`))
    t.strictSame(told, told.length === 0 && !last.has(n) ? [] : [`add ${n}`, `remove ${n}`])
  }
  const seen = all().length / 2
  t.ok(seen > numbers.length / 2, `${seen} disks of ${numbers.length}`)
})

t.test('for people, and until nobody reads it', async (t) => {
  const disk = loopDisk(t)
  const { stdout } = await run('timeout', ['3', 'env', ...PROGRAM, 'watch', '--existing'])
  t.match(stdout, `add ${disk.diskseq()} ${disk.kname} ${readFileSync(`/sys/block/${disk.kname}/dev`, 'utf8').trim()}\n`)
  t.match(stdout, /\nready\n/)
  const watch = await startWatch(t)
  watch.child.stdout.destroy()
  t.ok(loopDisk(t).diskseq(), 'there is an event')
  t.equal(await Promise.race([watch.ended, sleep(10_000, 'still there', { ref: false })]), 0)
})

t.test('wait: for a name, a file; until it is there, and until it is gone', async (t) => {
  const disk = loopDisk(t)
  const n = disk.diskseq()
  const path = `/dev/disk/by-diskseq/${n}`
  const DONE = { code: 0, stdout: `${path}\n`, stderr: '' }
  t.strictSame(await wait(n), DONE)
  t.strictSame(await wait('--loop-file', disk.file), DONE)
  const gone = wait('--gone', n)
  const goneFile = wait('--gone', '--loop-file', disk.file)
  const partition = wait(`${n}-part5`)
  await sleep(500)
  disk.addPartition(5, 64, 64)
  t.strictSame(await partition, { code: 0, stdout: `${path}p5\n`, stderr: '' })
  disk.detach()
  t.strictSame(await gone, { code: 0, stdout: '', stderr: '' })
  t.equal((await goneFile).code, 0)
  const link = `${disk.file}.link`
  symlinkSync(disk.file, link)
  const again = wait('--loop-file', link)
  await sleep(500)
  await run('losetup', [disk.path, disk.file])
  cleanup(t, () => run('losetup', ['--detach', disk.path]))
  t.strictSame(await again, { code: 0, stdout: `/dev/disk/by-diskseq/${disk.diskseq()}\n`, stderr: '' })
})

t.test('wait: what does not come, and what is asked wrongly', async (t) => {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-watch-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const disk = loopDisk(t)
  for (const args of [
    ['18446744073709551615'],
    ['--loop-file', join(directory, 'missing')],
    ['--dm-name', 'no-such'],
    ['--gone', disk.diskseq()],
  ]) {
    const { code, stdout, stderr } = await wait('--timeout', '0.3', ...args)
    t.strictSame({ code, stdout }, { code: 1, stdout: '' }, args.join(' '))
    t.match(stderr, /^diskseqfs: \S+ was not (there|gone) within 0.3 s\n$/)
  }
  for (const args of [
    [],
    ['1', '--dm-name', 'x'],
    ['--dm-name', 'x', '--loop-file', 'y'],
    ['/dev/sda'],
    [''],
    ['1', '2'],
    ['--timeout', '-1', '1'],
    ['--timeout', 'x', '1'],
  ]) {
    const { code, stdout, stderr } = await wait(...args)
    t.strictSame({ code, stdout }, { code: 2, stdout: '' }, args.join(' '))
    t.match(stderr, /^diskseqfs: [^\n]+\n$/)
  }
})

t.test('wait: what is there is there, whatever the time limit; and a file by any of its names', async (t) => {
  const disk = loopDisk(t)
  const n = disk.diskseq()
  t.equal((await wait('--timeout', '0', n)).stdout, `/dev/disk/by-diskseq/${n}\n`)
  t.equal((await wait('--timeout', '0', '--gone', '18446744073709551615')).code, 0)
  const directory = dirname(disk.file)
  const coming = run('env', ['--chdir', directory, ...PROGRAM, 'wait', '--loop-file', './later'])
  await sleep(500)
  writeFileSync(join(directory, 'later'), Buffer.alloc(1 << 20))
  const later = loopDisk(t, { file: join(directory, 'later') })
  t.equal((await coming).stdout, `/dev/disk/by-diskseq/${later.diskseq()}\n`)
  t.match(await wait('--timeout', '3000000', n), { code: 2, stderr: /up to 2000000/ })
})

t.test('wait: what cannot be seen is not taken for gone', async (t) => {
  const n = loopDisk(t).diskseq()
  const { code, stderr } = await run('unshare', [
    '--mount',
    'sh',
    '-c',
    `umount --lazy /sys; exec env ${PROGRAM.join(' ')} wait --gone ${n}`,
  ])
  t.equal(code, 1)
  t.equal(stderr, 'diskseqfs: cannot read /sys/class/block: ENOENT; is sysfs mounted at /sys?\n')
  const denied = await run('env', [...PROGRAM, 'wait', n], { uid: NOBODY, gid: NOBODY })
  t.match(denied, { code: 1, stderr: /permission denied; run this as root\n$/ })
})

t.test('an unprivileged user may watch, and wait until something is gone', async (t) => {
  const disk = loopDisk(t)
  const gone = run('env', [...PROGRAM, 'wait', '--gone', '--timeout', '20', disk.diskseq()], { uid: NOBODY, gid: NOBODY })
  await sleep(500)
  disk.detach()
  t.equal((await gone).code, 0)
})
