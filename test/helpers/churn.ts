// SPDX-License-Identifier: MIT
/** Opens disks in one way after another while their numbers are given to other disks: see churn.h. */
import { mkdtempSync, rmdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import tap, { type Test } from 'tap'

import { addCounts, blk, type BlkKind, blkOf } from './blk.js'
import { LONG, twoForms } from './long.js'
import { cleanup, run, type RunningTree, startTree, type Twin } from './tree.js'

/** Of one run. */
const SECONDS = LONG ? 1 : 0.4

/** How long a disk lives at most, in us, unless a test says something else; and where other work leaves little time. */
export const LIVES_US = 2000
const LIVES_LONG_US = 16_000
const RUNS_MAX = 60
const RUNS_BEFORE_LONGER = 3

/**
 * The results of `blk churn`, run again and again until the test has seen enough. On a machine that is busy with other
 * things few opens find a disk that lives 2 ms, so disks live longer the more runs it takes.
 */
export async function* churnRuns(args: readonly string[], lives = LIVES_US, program: BlkKind = 'blk') {
  for (let i = 1; i <= RUNS_MAX; i++) {
    yield await blkOf(program, 'churn', ...args, '--live-us', String(lives))
    if (i % RUNS_BEFORE_LONGER === 0 && lives < LIVES_LONG_US) lives *= 2
  }
}

/** A kind of openers. */
export interface Kind {
  readonly name: string
  /** See churn_ways*.c. */
  readonly way: string
  readonly program?: BlkKind
  readonly more?: readonly string[]
  /** How long a disk lives at most, in us. It is longer for callers that are let in one by one. */
  readonly lives?: number
  /** The least number of right opens, in the long form of the test. */
  readonly enough: number
  /** The mechanism without which wrong opens occur, if that can be shown in seconds. */
  readonly twin?: Twin
  /** Further errnos that say that a disk is gone, or going. */
  readonly errors?: readonly string[]
  /** The content of the disks, for ways that leave no descriptor to check. */
  readonly image?: Image
  /** Calls that some kernels refuse to 64-bit programs; or the processor that the way is written for. */
  readonly needs?: 'int80' | 'x32' | 'x64'
  /** The daemon runs in a pid namespace of its own. It then ends up to `--hold` later, as it cannot see callers outside. */
  readonly apart?: true
  /** The paths are in an overlay of the tree, which makes inodes of its own with the tree's device numbers. */
  readonly overlay?: true
}

type Image = keyof typeof IMAGES
const IMAGES = {
  ext4: { bytes: 256 << 10, make: ['mkfs.ext4', '-q', '-b', '1024', '-O', '^has_journal'] },
  swap: { bytes: 4100 << 10, make: ['mkswap'] },
} as const

/** `lost`: opens of which the disk could not be identified, or read. */
type Counts = { right: number; wrong: number; errors: Record<string, number>; lost: Record<string, number> }

async function churn(t: Test, tree: RunningTree, kind: Kind, lives: number, end: (sum: Counts) => boolean): Promise<Counts> {
  const sum: Counts = { right: 0, wrong: 0, errors: {}, lost: {} }
  const { way, program, more = [], image, apart, overlay } = kind
  const dir = overlay ? await overlayOf(t, tree) : tree.mountpoint
  const args = ['--mode', 'tree', '--dir', dir, '--seconds', String(SECONDS), '--way', way, ...more]
  if (image) args.push('--image', await imageFile(t, image), '--openers', '10')
  if (apart) args.push('--namespace-of', String(tree.pid))
  for await (const { opens_ok, wrong_diskseq, wrong_data, errors, read_errors } of churnRuns(args, lives, program)) {
    sum.right += opens_ok
    sum.wrong += wrong_diskseq + wrong_data
    addCounts(sum.errors, errors)
    addCounts(sum.lost, read_errors)
    if (end(sum)) break
  }
  t.comment(`${t.name}: ${sum.right} right, ${sum.wrong} wrong, errors ${JSON.stringify(sum.errors)}`)
  return sum
}

/** Mounts an overlay of the tree until the test ends. Without an upper directory it needs two lower ones. */
async function overlayOf(t: Test, tree: RunningTree): Promise<string> {
  const directories = ['empty', 'overlay'].map((what) => mkdtempSync(join(tmpdir(), `diskseqfs-${what}-`)))
  for (const directory of directories) cleanup(t, () => rmdirSync(directory))
  const [empty, overlay] = directories as [string, string]
  const { code, stderr } = await run('mount', ['-t', 'overlay', 'overlay', '-o', `lowerdir=${tree.mountpoint}:${empty}`, overlay])
  if (code !== 0) throw new Error(stderr)
  cleanup(t, () => run('umount', [overlay]))
  return overlay
}

export async function imageFile(t: Test, kind: Image): Promise<string> {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-image-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const image = join(directory, 'image')
  writeFileSync(image, '')
  const {
    bytes,
    make: [make, ...args],
  } = IMAGES[kind]
  truncateSync(image, bytes)
  const { code, stderr } = await run(make, [...args, image])
  if (code !== 0) throw new Error(stderr)
  return image
}

/** In the short form so many times fewer opens are enough. */
const SHORTER = 10

/** Tests that each open is right or fails because the disk is gone, and that the twin reaches wrong disks. */
export function testKind(kind: Kind): void {
  const { name, twin, errors = [], needs, image, apart } = kind
  const enough = LONG ? kind.enough : kind.enough / SHORTER
  const lives = image ? 5000 : LIVES_US
  const works = async () => (needs === 'x64' ? process.arch === needs : needs === undefined || (await blk(needs))['works'])
  const skip = async () => ((await works()) ? false : `no ${needs} calls here`)

  tap.test(twoForms(name), async (t) => {
    const reason = await skip()
    if (reason) return void t.comment(reason)
    const tree = await startTree(t, { apart: apart && 'own proc', args: apart ? ['--hold', '10'] : [] })
    const { right, wrong, errors: seen, lost } = await churn(t, tree, kind, kind.lives ?? lives, (sum) => sum.right >= enough)
    t.equal(wrong, 0, 'no disk but the one in the name')
    t.strictSame(lost, {}, 'an open disk stays that disk')
    t.ok(right >= enough, `${right} right`)
    const fine = ['ENOENT', 'ENXIO', ...errors, ...(image ? ['EBUSY', 'EINVAL'] : [])]
    t.strictSame(
      Object.keys(seen).filter((errno) => !fine.includes(errno)),
      [],
      'no errno but those for a disk that is gone',
    )
  })

  if (twin === undefined) return
  tap.test(`${name}, twin: ${twin}`, async (t) => {
    const reason = await skip()
    if (reason) return void t.comment(reason)
    const tree = await startTree(t, { twin, apart: apart && 'own proc', args: apart ? ['--hold', '1'] : [], expectErrors: true })
    const { wrong } = await churn(t, tree, kind, lives, (sum) => sum.wrong > 0)
    t.ok(wrong > 0, 'other disks are reached')
  })
}
