// SPDX-License-Identifier: MIT
/**
 * The daemon recognizes an open whichever way the caller makes it: calls that libc does not make,
 * 32-bit calls of 64-bit programs, registers that lie, io_uring, mount(2). A caller that only
 * looks, by whatever call, has nothing opened.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, chownSync, closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs'
import { constants, tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { blk, type BlkKind, blkOf, blkWithCodeAtZero } from '../helpers/blk.js'
import { imageFile, type Kind, testKind } from '../helpers/churn.js'
import { stoppedCaller } from '../helpers/stopped.js'
import {
  cleanup,
  loopDisk,
  type LoopDisk,
  renumber,
  run,
  type RunningTree,
  startBlk,
  startTree,
  type Twin,
  watchNode,
} from '../helpers/tree.js'

const NOBODY = 65534
const GROUP = 60_000

const KINDS: readonly Kind[] = [
  { name: 'openat2(2) that follows no symlinks', way: 'openat2', enough: 300, twin: 'no-pins' },
  { name: 'O_PATH, opened through /proc', way: 'opath', enough: 300, twin: 'no-pins' },
  { name: 'open_by_handle_at(2)', way: 'handle', enough: 100, twin: 'no-pins', errors: ['ESTALE'] },
  { name: 'io_uring', way: 'uring', enough: 200, twin: 'no-pins' },
  { name: 'io_uring, by a worker that was made in stat(2)', way: 'uring-in-stat', enough: 200, twin: 'workers-believed' },
  {
    name: 'io_uring with the rights of another group',
    way: 'uring-others',
    enough: 100,
    lives: 100_000,
    more: ['--node-gid', String(GROUP)],
  },
  { name: 'a 32-bit open of a 64-bit program', way: 'int80', enough: 300, twin: 'numbers-believed', needs: 'int80' },
  {
    name: 'the same with registers that lie',
    way: 'int80-garbage',
    enough: 200,
    twin: 'no-confirm',
    more: ['--node-uid', String(NOBODY)],
    needs: 'int80',
  },
  { name: 'a 32-bit mount of a 64-bit program', way: 'int80-mount', enough: 20, twin: 'numbers-believed', image: 'ext4', needs: 'int80' },
  { name: 'mount(2) of a static program', way: 'mount', program: 'blk-fixed', enough: 20, twin: 'linger-only', image: 'ext4' },
  { name: 'mount(2) by a process that may mount and nothing else', way: 'mount-nobody', enough: 20, lives: 100_000, image: 'ext4' },
]

t.test('a caller that gets no processor, while the other threads of its program go on', async (t) => {
  t.strictSame(await stoppedCaller(t, 'none'), { recycled: false, opened: 'its disk' })
})

t.test('twin: if page faults of all threads are counted, it is taken to have gone on, and opens another disk', async (t) => {
  t.strictSame(await stoppedCaller(t, 'faults-of-all'), { recycled: true, opened: 'another disk' })
})

/** A caller that gets no processor for longer than the daemon waits for callers that it cannot see. */
const longerThanHold = (t: Test, twin: Twin) => stoppedCaller(t, twin, { args: ['--hold', '1'], wantedMs: 2300 })

t.test('a caller that gets no processor for longer than --hold', async (t) => {
  t.strictSame(await longerThanHold(t, 'none'), { recycled: false, opened: 'its disk' })
})

t.test('twin: if --hold limits the wait for all callers, it opens another disk', async (t) => {
  t.strictSame(await longerThanHold(t, 'hold-for-all'), { recycled: true, opened: 'another disk' })
})

/**
 * A user opens a disk, makes an O_PATH descriptor from the open file, and keeps only that. The
 * daemon hears nothing of it. Then root opens the disk. Counts how many of the user's opens right
 * after that reach the disk without a request to the daemon, which is stopped.
 */
const UNASKED = `import os, select, signal, sys, time
path, uid, daemon, rounds = sys.argv[1], *map(int, sys.argv[2:])
unasked = 0
for _ in range(rounds):
    heard, said = os.pipe()
    told, tell = os.pipe()
    user = os.fork()
    if user == 0:
        os.setgroups([]), os.setgid(uid), os.setuid(uid)
        disk = os.open(path, os.O_RDONLY)
        kept = os.open(f'/proc/self/fd/{disk}', os.O_PATH)
        os.close(disk)
        os.write(said, b'.')
        os.read(told, 1)
        os.open(f'/proc/self/fd/{kept}', os.O_RDONLY)
        os.write(said, b'.')
        os._exit(0)
    os.read(heard, 1)
    time.sleep(0.1)
    disk = os.open(path, os.O_RDONLY)
    os.kill(daemon, signal.SIGSTOP)
    os.write(tell, b'.')
    unasked += len(select.select([heard], [], [], 0.2)[0])
    os.kill(daemon, signal.SIGCONT)
    os.waitpid(user, 0)
    for fd in disk, heard, said, told, tell: os.close(fd)
print(unasked)`
const UNASKED_ROUNDS = 20

async function unasked(t: Test, twin: Twin): Promise<number> {
  const disk = loopDisk(t)
  chownSync(disk.path, NOBODY, NOBODY)
  cleanup(t, () => chownSync(disk.path, 0, 6))
  const tree = await startTree(t, { twin })
  const path = join(tree.mountpoint, disk.diskseq())
  const { code, stdout, stderr } = await run('python3', ['-c', UNASKED, path, `${NOBODY}`, `${tree.pid}`, `${UNASKED_ROUNDS}`])
  t.equal(code, 0, stderr)
  return Number(stdout)
}

t.test("a user's open through a descriptor made from another asks the daemon, even if root opens the disk meanwhile", async (t) => {
  t.equal(await unasked(t, 'none'), 0)
})

t.test('twin: if a caller that opens is not taken to keep the inode, it does not', async (t) => {
  const count = await unasked(t, 'openers-keep-nothing')
  t.ok(count > 0, `${count} of ${UNASKED_ROUNDS}`)
})

/** A caller that gets no processor, of a program whose code begins at 0. */
function codeAtZero(t: Test, twin: Twin) {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-program-'))
  cleanup(t, () => rmSync(directory, { recursive: true }))
  const program = join(directory, 'blk')
  blkWithCodeAtZero(program)
  return stoppedCaller(t, twin, { program })
}

t.test('a caller whose program is made to look as if it had no memory', async (t) => {
  t.strictSame(await codeAtZero(t, 'none'), { recycled: false, opened: 'its disk' })
})

t.test('twin: if the start of its code alone decides, it is taken for gone, and opens another disk', async (t) => {
  t.strictSame(await codeAtZero(t, 'code-alone'), { recycled: true, opened: 'another disk' })
})

KINDS.forEach(testKind)

/**
 * How often the daemon opens a disk of a group for a caller that is not in the group and can open the disk
 * all the same.
 */
async function pinsFor(t: Test, way: string, twin: Twin): Promise<number> {
  const loop = loopDisk(t, { file: await imageFile(t, 'ext4') })
  chownSync(loop.path, 0, GROUP)
  cleanup(t, () => chownSync(loop.path, 0, 0))
  chmodSync(loop.path, 0o660)
  const tree = await startTree(t, { twin })
  const seen = await watchNode(t, loop.path, tree)
  const { error } = await blk('way', '--way', way, '--path', join(tree.mountpoint, loop.diskseq()), '--node-gid', String(GROUP))
  t.comment(`errno ${error}`)
  if (twin === 'none') t.equal(error, 0, 'the caller opens the disk')
  return (await seen()).open
}

for (const way of ['uring-others', 'mount-nobody']) {
  t.test(`${way}: the node's mode and the caller's groups do not decide`, async (t) => {
    t.ok((await pinsFor(t, way, 'none')) > 0, 'the disk is held meanwhile')
  })

  t.test(`${way}, twin: if they do, the disk is not held`, async (t) => {
    t.equal(await pinsFor(t, way, 'purpose-open'), 0)
  })
}

t.test('a caller that may not open a disk gets EACCES, also by a 32-bit call', async (t) => {
  if (!(await blk('int80'))['works']) return void t.comment('no 32-bit calls here')
  const loop = loopDisk(t)
  const tree = await startTree(t)
  const seen = await watchNode(t, loop.path, tree)
  const path = join(tree.mountpoint, loop.diskseq())
  for (let i = 0; i < 2; i++) {
    const { error } = await blk('way', '--way', 'int80', '--path', path, '--uid', String(NOBODY))
    t.equal(error, constants.errno.EACCES)
  }
  t.equal((await seen()).open, 0, 'the disk is not opened for it')
})

/** How often a slow drive with a removable medium, which no process has open, is opened for one open(2). */
async function opensOfDrive(t: Test, twin: Twin): Promise<number> {
  const loop = loopDisk(t)
  const tree = await startTree(t, { twin: `${twin}+slow` as Twin })
  const seen = await watchNode(t, loop.path, tree)
  closeSync(openSync(join(tree.mountpoint, loop.diskseq()), 'r'))
  // Not counted: the open of the caller, which is by the node in the tree.
  return (await seen()).open
}

t.test('a slow drive with a removable medium is opened once for an open(2)', async (t) => {
  t.equal(await opensOfDrive(t, 'removable-drives'), 1)
})

t.test('twin: if the daemon does not remember for which caller that began, it is opened twice', async (t) => {
  t.equal(await opensOfDrive(t, 'removable-drives-anew'), 2)
})

/** Each call with the errors it ends in, which show that it reached the device. */
const INSPECTING = {
  openat2: [''],
  'openat2-directory': ['ENOTDIR'],
  open: ['ENOTDIR'],
  open_tree: [''],
  chdir: ['ENOTDIR'],
  umount2: ['EINVAL'],
  truncate: ['EINVAL'],
  fanotify_mark: [''],
  file_getattr: ['ENOSYS', 'ENOTTY', 'EOPNOTSUPP'],
  name_to_handle_at: [''],
  statx: [''],
  lstat: [''],
}

async function opensOf(t: Test, program: BlkKind, twin: Twin): Promise<Record<string, number>> {
  const loop = loopDisk(t)
  const tree = await startTree(t, { twin })
  const seen = await watchNode(t, loop.path, tree)
  const opens: Record<string, number> = {}
  for (const [call, errors] of Object.entries(INSPECTING)) {
    await seen()
    const { error } = await blkOf(program, 'inspect', '--path', join(tree.mountpoint, loop.diskseq()), '--call', call)
    if (twin === 'none' && !errors.includes(error)) t.fail(`${call}: ${error || 'no error'}`)
    opens[call] = (await seen()).open
  }
  return opens
}

for (const program of ['blk', 'blk-fixed'] as const) {
  const what = program === 'blk' ? 'a program with PIE' : 'a static program without'

  t.test(`${what} that only looks has no disk opened, whatever call it uses`, async (t) => {
    for (const [call, opens] of Object.entries(await opensOf(t, program, 'none'))) t.equal(opens, 0, call)
  })

  t.test(`${what}, twin: if each caller is taken to open, it has`, async (t) => {
    const opens = await opensOf(t, program, 'no-inspect')
    t.ok(
      Object.values(opens).some((count) => count > 0),
      JSON.stringify(opens),
    )
  })
}

/** The calls that end in another error than usual where the daemon may not open the disk itself. */
async function refusedLooks(t: Test, twin: Twin): Promise<string[]> {
  const tree = await startTree(t, { twin, expectErrors: true })
  const path = join(tree.mountpoint, loopDisk(t).diskseq())
  t.throws(() => openSync(path, 'r'), { code: 'EPERM' }, 'an open fails with EPERM')
  const refused: string[] = []
  for (const [call, errors] of Object.entries(INSPECTING)) {
    const { error } = await blk('inspect', '--path', path, '--call', call)
    if (!errors.includes(error)) refused.push(`${call}: ${error}`)
  }
  return refused
}

t.test('a caller that only looks at a disk sees no error if the daemon may not open it', async (t) => {
  t.strictSame(await refusedLooks(t, 'may-not-open'), [])
})

t.test('twin: if no caller is taken to only look, it does', async (t) => {
  t.match((await refusedLooks(t, 'may-not-open+unseen')).join(), /openat2: EPERM/)
})

/**
 * Partition 1 of a disk gets another device number, while a partition of another disk gets the
 * number that it had.
 */
async function renumbered(t: Test, tree: RunningTree, keep: (path: string) => Promise<unknown>): Promise<LoopDisk> {
  const disk = loopDisk(t)
  disk.addPartition(1, 64, 64)
  await keep(join(tree.mountpoint, `${disk.diskseq()}p1`))
  await renumber(disk, loopDisk(t))
  return disk
}

/** Ways to keep an inode. `reached` is the diskseq of what it leads to, undefined if nothing. */
const KEEPERS: Readonly<
  Record<string, (t: Test, tree: RunningTree) => Promise<{ disk: LoopDisk; reached: () => Promise<string | undefined> }>>
> = {
  'an O_PATH descriptor': async (t, tree) => {
    let held: Awaited<ReturnType<typeof startBlk>> | undefined
    const disk = await renumbered(t, tree, async (path) => {
      held = await startBlk(t, 'hold', '--flags', 'path', '--path', path)
    })
    const reached = async () => {
      const { diskseq } = JSON.parse((await held?.ask()) ?? '') as { diskseq?: number }
      return diskseq === undefined ? undefined : String(diskseq)
    }
    return { disk, reached }
  },
  'a bind mount': async (t, tree) => {
    const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-bind-'))
    cleanup(t, () => rmSync(directory, { recursive: true }))
    const bound = join(directory, 'bound')
    writeFileSync(bound, '')
    const disk = await renumbered(t, tree, async (path) => {
      const { code, stderr } = await run('mount', ['--bind', path, bound])
      if (code !== 0) throw new Error(stderr)
      cleanup(t, () => run('umount', [bound]))
    })
    const reached = async () => {
      const held = await blk('hold', '--path', bound).catch(() => undefined)
      return held === undefined ? undefined : String(held['diskseq'])
    }
    return { disk, reached }
  },
}

for (const [what, keeper] of Object.entries(KEEPERS)) {
  t.test(`a partition that got another number is not reached through ${what} by the old one`, async (t) => {
    const tree = await startTree(t)
    const { disk, reached } = await keeper(t, tree)
    const path = join(tree.mountpoint, `${disk.diskseq()}p1`)
    const fd = openSync(path, 'r')
    closeSync(fd)
    const others = async (when: string) => {
      for (let i = 0; i < 10; i++) {
        const diskseq = await reached()
        t.ok(diskseq === undefined || diskseq === disk.diskseq(), `${when}: ${diskseq ?? 'nothing is reached'}`)
      }
    }
    await others('after an open of the name')
    // The daemon may have read a request whose caller no longer takes the answer.
    for (let round = 0; round < 3; round++) {
      const stats = spawn('sh', ['-c', 'while :; do stat -L "$0"; done', path], { stdio: 'ignore', detached: true })
      const ended = once(stats, 'close')
      await others('while stat runs on the name')
      process.kill(-(stats.pid as number), 'SIGKILL')
      await ended
      await others('after those were killed')
    }
  })

  t.test(`${what}, twin: with one inode for each name it is another disk's`, async (t) => {
    const tree = await startTree(t, { twin: 'one-inode-per-name', expectErrors: true })
    const { disk, reached } = await keeper(t, tree)
    const diskseq = await reached()
    t.ok(diskseq !== undefined && diskseq !== disk.diskseq(), diskseq ?? 'nothing is reached')
  })
}

for (const flags of ['path', 'rdonly']) {
  const what = flags === 'path' ? 'an O_PATH descriptor' : 'an open file'

  t.test(`LOOP_CHANGE_FD: ${what} does not lead to the new disk`, async (t) => {
    const tree = await startTree(t)
    const { right, early, wrong, refused } = await blk('change-fd', '--dir', tree.mountpoint, '--flags', flags, '--rounds', '60')
    t.equal(wrong, 0, 'no open that began after the change is wrong')
    t.comment(`${early} opens in the middle of the change`)
    if (flags === 'path') t.equal(early, 0, 'nor any in the middle of the change')
    t.ok(right > 60 && refused > 60, `${right} before it, ${refused} refused after it`)
  })
}

t.test('LOOP_CHANGE_FD, twin: an O_PATH descriptor leads to the new disk while attributes are valid', async (t) => {
  const tree = await startTree(t, { twin: 'valid-attributes', expectErrors: true })
  const { early, wrong } = await blk('change-fd', '--dir', tree.mountpoint, '--flags', 'path', '--rounds', '60')
  t.ok(early + wrong > 0, `${early + wrong} opens`)
})
