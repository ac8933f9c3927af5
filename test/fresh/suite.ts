// SPDX-License-Identifier: MIT
/**
 * The first minute with the project: `make run` in a minimal Debian of one release. It has only
 * what the README asks for, and npm with its default configuration. See test/fresh/run.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, readFileSync, readlinkSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { ROOT } from '../helpers/root.js'
import { cleanup, loopDisk, until } from '../helpers/tree.js'

type Release = 'bookworm' | 'trixie'

const ROOTS = join(ROOT, 'build/fresh')
const TIMEOUT_MS = 30 * 60_000
/** For apt-get on a busy machine; npm's attempts to reach a host that does not answer take five minutes. */
const SILENCE_S = 240
const CONTENT = 'the disk itself.'

interface Fresh {
  readonly child: ChildProcess
  /** All that it has printed. */
  output(): string
  /** The line after which it was silent for the longest time. */
  silence(): { seconds: number; line: string }
  readonly ended: Promise<number | null>
}

function start(t: Test, release: Release, diskseq: string): Fresh {
  const child = spawn(join(ROOT, 'test/fresh/run'), [release, diskseq], { stdio: ['ignore', 'pipe', 'pipe'] })
  const ended = new Promise<number | null>((resolve) => child.on('close', resolve))
  cleanup(t, async () => {
    child.kill('SIGTERM')
    await ended
  })
  let output = ''
  let last = performance.now()
  let silence = { seconds: 0, line: '' }
  const heard = (chunk: Buffer) => {
    const now = performance.now()
    const seconds = Math.round((now - last) / 1000)
    if (seconds > silence.seconds) silence = { seconds, line: output.trimEnd().split('\n').at(-1) as string }
    last = now
    output += chunk.toString()
  }
  child.stdout.on('data', heard)
  child.stderr.on('data', heard)
  return { child, output: () => output, silence: () => silence, ended }
}

/** What is left of the roots: directories, mounts, processes. */
function remains(): string[] {
  const roots = existsSync(ROOTS) ? readdirSync(ROOTS) : []
  const mounts = readFileSync('/proc/self/mounts', 'utf8')
    .split('\n')
    .filter((line) => line.includes(ROOTS))
  const processes = readdirSync('/proc').filter((pid) => {
    try {
      return /^\d/.test(pid) && readlinkSync(`/proc/${pid}/root`).startsWith(ROOTS)
    } catch {
      return false // it has just ended
    }
  })
  return [...roots, ...mounts, ...processes]
}

/** Names of the disks that the kernel has now. */
const disks = (): string[] =>
  readdirSync('/sys/block').flatMap((kname) => {
    try {
      const needs = kname.startsWith('loop') ? 'loop' : 'dev' // a path of a multipath NVMe disk has no number
      return !existsSync(`/sys/block/${kname}/${needs}`) ? [] : [readFileSync(`/sys/block/${kname}/diskseq`, 'utf8').trim()]
    } catch {
      return [] // it has just gone
    }
  })

export async function makeRun(release: Release): Promise<void> {
  t.setTimeout(TIMEOUT_MS)
  await t.test(`make run on ${release}`, { timeout: TIMEOUT_MS }, async (t) => {
    const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-fresh-'))
    cleanup(t, () => rmSync(directory, { recursive: true }))
    const file = join(directory, 'disk.img')
    writeFileSync(file, CONTENT)
    truncateSync(file, 1 << 20)
    const disk = loopDisk(t, { file })
    const before = disks()

    const fresh = start(t, release, disk.diskseq())
    t.equal(await fresh.ended, 0, 'the root was made')
    const output = fresh.output()
    /** The words after that one in the output; undefined if it was not printed. */
    const said = (word: string) => new RegExp(`^fresh: ${word}((?: .*)?)$`, 'm').exec(output)?.[1]?.trim()

    t.comment(`mounted after ${said('mounted')} s`)
    const { seconds, line } = fresh.silence()
    t.comment(`silent for ${seconds} s at most, after: ${line}`)
    t.ok(said('mounted'), 'it mounts')
    const after = disks()
    const listed = said('names')?.split(' ') ?? []
    t.strictSame(
      before.filter((name) => after.includes(name) && !listed.includes(name)),
      [],
      'all disks are in the tree',
    )
    t.match(output, new RegExp(`^b.* ${disk.diskseq()}$`, 'm'), 'the disk is shown')
    t.equal(said('content'), CONTENT, 'a name opens its disk')
    t.equal(said('unmounted'), '', 'Ctrl-C unmounts')

    t.match(output, /^setup: installing the npm packages$/m, 'it says when it installs packages')
    t.match(output, /^setup: compiling the addon$/m, 'it says when it compiles')
    t.ok(seconds < SILENCE_S, 'it is not silent for long')

    t.equal(said('scripts'), '', "no package's install script was run")
    t.equal(said('rebuilt'), undefined, 'twin: they want more than the registries')
    t.equal(said('headers'), 'fuse-native esbuild', 'twin: what they leave behind would be noticed')

    t.strictSame(remains(), [], 'nothing of the root is left')
    if (!t.passing()) t.comment(output)
  })
}

export async function endsEarly(release: Release): Promise<void> {
  await t.test('nothing is left when it ends early', { timeout: TIMEOUT_MS }, async (t) => {
    const fresh = start(t, release, '0')
    await until(() => fresh.output().includes('setup: apt-get') || fresh.child.exitCode !== null, TIMEOUT_MS)
    t.not(remains().length, 0, 'there was something')
    fresh.child.kill('SIGTERM')
    t.not(await fresh.ended, 0, 'it has ended')
    t.strictSame(remains(), [], 'and took all of it along')
  })
}
