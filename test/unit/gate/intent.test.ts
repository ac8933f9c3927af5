// SPDX-License-Identifier: MIT
/** Intents: which system calls can open a disk, and that a call counts as one that can if it is not plain. */
import { constants, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { E } from '../../../src/util/errno.js'
import { type Call, Intents, RUNNING, someCall, UNSEEN } from '../../../src/gate/intent.js'
import { native, type SeenThread } from '../../../src/native.js'
import { number, other } from '../../helpers/syscalls.js'

/** The argument that is the path, or another pointer that the call needs. */
const POINTERS: readonly (readonly [argument: number, names: string])[] = [
  [0, 'stat lstat readlink access getxattr lgetxattr listxattr llistxattr statfs chdir chroot truncate umount2 execve'],
  [0, 'chmod chown lchown utime utimes setxattr lsetxattr removexattr lremovexattr'],
  [0, 'mkdir mknod link rename unlink rmdir'],
  [1, 'fstat newfstatat statx readlinkat faccessat faccessat2 fgetxattr getxattrat flistxattr listxattrat fstatfs'],
  [1, 'inotify_add_watch name_to_handle_at open_tree file_getattr file_setattr execveat'],
  [1, 'fchmodat fchmodat2 fchownat futimesat utimensat fsetxattr setxattrat fremovexattr removexattrat'],
  [1, 'mkdirat mknodat symlink linkat renameat renameat2 unlinkat'],
  [2, 'symlinkat'],
  [4, 'fanotify_mark'],
]
const INSPECTING = POINTERS.flatMap(([argument, names]) => names.split(' ').map((name) => [name, argument] as const))
/** These calls would change the shape of the tree. */
const SHAPE = 'mkdir mkdirat mknod mknodat symlink symlinkat link linkat rename renameat renameat2 unlink unlinkat rmdir'.split(' ')
/** A caller of these has the inode afterwards. */
const KEEPS = ['name_to_handle_at', 'open_tree']
/** The last component of their path is followed only with a flag. */
const NO_FOLLOW = ['lstat', 'readlink', 'readlinkat', 'lgetxattr', 'llistxattr', 'lchown', 'lsetxattr', 'lremovexattr', 'name_to_handle_at']
/** Calls that have a flag against following: argument, bits. */
const NO_FOLLOW_FLAG: Record<string, readonly [number, number]> = {
  newfstatat: [3, 0x100],
  statx: [2, 0x100],
  faccessat2: [3, 0x100],
  getxattrat: [2, 0x100],
  listxattrat: [2, 0x100],
  setxattrat: [2, 0x100],
  removexattrat: [2, 0x100],
  open_tree: [2, 0x100],
  file_getattr: [4, 0x100],
  file_setattr: [4, 0x100],
  execveat: [4, 0x100],
  fchmodat2: [3, 0x100],
  fchownat: [4, 0x100],
  utimensat: [3, 0x100],
  inotify_add_watch: [2, 0x02000000],
  fanotify_mark: [1, 0x4],
  umount2: [1, 0x8],
}

const SP = '0x7ffd1a2b3c48'
const PC = '0x7f12d4e5a6b7'
/** A path at an address where programs usually have them, and one that could also be a number. */
const PATH = '0x55d0c0de1000'
const LOW = '0x40d51000'
const TID = 4711

/** A line as proc_pid_syscall (fs/proc/base.c) writes it. */
const line = (call: number, args: (number | string)[] = [], pc = PC) => {
  const six = Array.from({ length: 6 }, (_, i) => args[i] ?? 0)
  const hex = six.map((arg) => (typeof arg === 'number' ? `0x${arg.toString(16)}` : arg))
  return `${call} ${hex.join(' ')} ${SP} ${pc}\n`
}
/** The same for a thread that is in no call. */
const OUTSIDE = `-1 ${SP} ${PC}\n`

/** Six arguments: one is a pointer, and some may be given. */
const args = (pointer: number, given: Readonly<Record<number, number | string>> = {}, at = PATH) =>
  Array.from({ length: 6 }, (_, i) => given[i] ?? (i === pointer ? at : 0))

const openat = (flags: number | string, path = PATH) => line(number('openat'), ['0xffffffffffffff9c', path, flags])

/** Stacks as proc_pid_stack writes them, on x86-64 and arm64. */
const FROM_64_BITS = [
  '[<0>] fuse_lookup_name+0xd8/0x2f0 [fuse]\n[<0>] do_syscall_64+0x71/0x280\n[<0>] entry_SYSCALL_64_after_hwframe+0x76/0x7e\n',
  '[<0>] fuse_lookup_name+0xd8/0x2f0\n[<0>] el0_svc+0x34/0x110\n[<0>] el0t_64_sync_handler+0x100/0x130\n[<0>] el0t_64_sync+0x190/0x194\n',
] as const
const FROM_32_BITS = [
  '[<0>] fuse_lookup_name+0xd8/0x2f0\n[<0>] do_int80_emulation+0xa8/0x1c0\n[<0>] asm_int80_emulation+0x16/0x20\n',
  '[<0>] fuse_lookup_name+0xd8/0x2f0\n[<0>] do_fast_syscall_32+0x4a/0x90\n[<0>] entry_SYSENTER_compat_after_hwframe+0x83/0x8d\n',
  '[<0>] fuse_lookup_name+0xd8/0x2f0\n[<0>] entry_SYSCALL_compat_after_hwframe+0x5c/0x66\n',
  '[<0>] fuse_lookup_name+0xd8/0x2f0\n[<0>] el0_svc_compat+0x34/0x110\n[<0>] el0t_32_sync_handler+0x98/0x140\n[<0>] el0t_32_sync+0x190/0x194\n',
] as const

function fakeProc(t: Test, preempts = false) {
  const proc = mkdtempSync(join(tmpdir(), 'diskseqfs-proc-'))
  t.teardown(() => rmSync(proc, { recursive: true }))
  mkdirSync(join(proc, `${TID}`))
  const intents = new Intents(native, proc, () => preempts)
  t.teardown(() => intents.close())
  const put = (file: string, text: string | Buffer) => writeFileSync(join(proc, `${TID}`, file), text)
  return {
    proc,
    intents,
    put,
    of(text: string | Buffer, stack = ''): Call {
      put('syscall', text)
      put('stack', stack)
      return intents.of(TID)
    },
  }
}

/** A thread that is seen doing this. */
const seen = (syscall: string, { stack = '', state = 'S', memory = 0x55d0c0de0000, userUs = -1, faults = 0 } = {}): SeenThread => [
  syscall,
  stack,
  state,
  memory,
  userUs,
  faults,
]

/** These are not on every architecture: newer ones have only the *at forms. */
const OLD =
  'open creat stat lstat readlink access chmod chown lchown utime utimes futimesat mkdir mknod symlink link rename unlink rmdir renameat'.split(
    ' ',
  )

t.test('looking at a node is inspecting', async (t) => {
  const { of } = fakeProc(t)
  for (const [name, pointer] of INSPECTING) {
    const call = native.syscalls[name]
    if (call === undefined) {
      t.ok(OLD.includes(name) && process.arch !== 'x64', `${name} is not on ${process.arch}`)
      continue
    }
    const { print, ...found } = of(line(call, args(pointer)))
    const shape = SHAPE.includes(name)
    t.strictSame(
      found,
      {
        intent: 'inspect',
        number: call,
        keeps: KEEPS.includes(name),
        follows: !NO_FOLLOW.includes(name),
        shape,
        locks: shape,
        blind: false,
        setsTimes: false,
        asks: false,
        userUs: -1,
        faults: -1,
      },
      name,
    )
    t.not(print, 0, name)
  }
})

t.test('the flags say whether a call follows a symlink', async (t) => {
  const { of } = fakeProc(t)
  for (const [name, pointer] of INSPECTING) {
    const call = native.syscalls[name]
    if (call === undefined) continue
    const [at, bits] = NO_FOLLOW_FLAG[name] ?? [-1, 0]
    const never = NO_FOLLOW.includes(name)
    for (const argument of [0, 1, 2, 3, 4, 5]) {
      if (argument === pointer || (name === 'name_to_handle_at' && argument === 4)) continue
      for (const flag of [0x4, 0x8, 0x100, 0x02000000]) {
        const says = argument === at && flag === bits
        t.equal(
          of(line(call, args(pointer, { [argument]: flag }))).follows,
          !never && !says,
          `${name} with ${flag} as argument ${argument}`,
        )
      }
      if (argument === at) {
        t.equal(of(line(call, args(pointer, { [at]: `0x${bits.toString(16)}00000000` }))).follows, true, `${name}: not in the upper half`)
        t.equal(of(line(call, args(pointer, { [at]: 0xffffffff }))).follows, false, `${name}: beside others`)
      }
    }
  }
  const handle = (flags: number) => of(line(number('name_to_handle_at'), args(1, { 4: flags }))).follows
  t.equal(handle(0), false, 'name_to_handle_at does not follow')
  t.equal(handle(0x1000), false, 'nor with another flag')
  t.equal(handle(0x400), true, 'but with AT_SYMLINK_FOLLOW')
  t.equal(handle(0x1400), true, 'and others')
})

t.test('opening it is opening', async (t) => {
  const { of } = fakeProc(t)
  const { O_RDONLY, O_RDWR, O_WRONLY, O_EXCL, O_NONBLOCK, O_CREAT, O_TRUNC, O_DIRECT, O_NOFOLLOW } = constants
  const all = [O_RDONLY, O_WRONLY, O_RDWR, O_RDONLY | O_EXCL | O_NONBLOCK, O_RDWR | O_CREAT | O_TRUNC, O_RDWR | O_DIRECT | O_NOFOLLOW]
  const opening = {
    intent: 'open',
    keeps: false,
    shape: false,
    blind: false,
    setsTimes: false,
    asks: false,
    userUs: -1,
    faults: -1,
  } as const
  for (const flags of all) {
    const tells = { ...opening, follows: (flags & O_NOFOLLOW) === 0, locks: (flags & O_CREAT) !== 0 }
    const { print, ...found } = of(openat(flags))
    t.strictSame(found, { ...tells, number: number('openat') }, `openat ${flags}`)
    t.not(print, 0)
    if (process.arch === 'x64') t.match(of(line(number('open'), [PATH, flags])), { ...tells, number: number('open') }, `open ${flags}`)
    t.match(
      of(line(number('open_by_handle_at'), [3, PATH, flags])),
      { ...tells, keeps: true, number: number('open_by_handle_at') },
      `open_by_handle_at ${flags}: it has the handle already`,
    )
  }
  if (process.arch === 'x64') {
    t.match(of(line(number('creat'), [PATH])), { ...opening, follows: true, locks: true, number: number('creat') }, 'creat')
  }
})

t.test('an open whose flags are not visible may be any kind of open', async (t) => {
  const { of } = fakeProc(t)
  const { print, ...found } = of(line(number('openat2'), args(1, { 2: PATH })))
  t.strictSame(found, {
    intent: 'open',
    number: number('openat2'),
    keeps: true,
    follows: false,
    shape: false,
    locks: true,
    blind: true,
    setsTimes: false,
    asks: false,
    userUs: -1,
    faults: -1,
  })
  t.not(print, 0)
})

t.test('an open that can never reach a device is inspecting', async (t) => {
  const { of } = fakeProc(t)
  const { O_NOFOLLOW, O_DIRECTORY, O_CREAT, O_EXCL, O_RDWR } = constants
  const opens = (flags: number, tells: Partial<Call>, what: string) => {
    t.match(of(openat(flags)), { intent: 'inspect', number: number('openat'), blind: false, ...tells }, `openat ${what}`)
    if (process.arch === 'x64') t.match(of(line(number('open'), [PATH, flags])), { intent: 'inspect', ...tells }, `open ${what}`)
  }
  opens(native.O_PATH, { keeps: true, follows: true, shape: false, locks: false }, 'O_PATH')
  opens(
    native.O_PATH | O_NOFOLLOW | 0x80000,
    { keeps: true, follows: false, shape: false, locks: false },
    'O_PATH | O_NOFOLLOW | O_CLOEXEC',
  )
  // do_open() looks at O_DIRECTORY, O_NOFOLLOW and O_CLOEXEC only, if O_PATH is set.
  opens(native.O_PATH | O_CREAT | O_EXCL, { keeps: true, shape: false, locks: false }, 'O_PATH, with which O_CREAT does nothing')
  opens(O_DIRECTORY, { keeps: false, follows: true, shape: false, locks: false }, 'O_DIRECTORY')
  opens(O_CREAT | O_EXCL | O_RDWR, { keeps: false, shape: true, locks: true }, 'O_CREAT | O_EXCL')
  t.match(of(openat(O_EXCL | O_RDWR)), { intent: 'open', shape: false }, 'O_EXCL by itself is an open')
})

t.test('only the flags count, not the other arguments', async (t) => {
  const { of } = fakeProc(t)
  const path = native.O_PATH
  t.match(of(line(number('openat'), [path, PATH, 0, path, path, path])), { intent: 'open' }, 'other arguments of openat')
  t.match(of(line(number('openat2'), [path, PATH, path, path])), { intent: 'open' }, 'openat2 has them in memory')
  if (process.arch !== 'x64') return
  t.match(of(line(number('open'), [PATH, 0, path])), { intent: 'open' }, 'other arguments of open')
  t.match(of(line(number('creat'), [PATH, path, path])), { intent: 'open' }, 'creat has none')
  t.match(of(line(number('creat'), [`${PATH.slice(0, -4)}${path.toString(16).padStart(4, '0')}`])), { intent: 'open' }, 'nor in its path')
})

t.test('garbage in the upper half of a register is no flag', async (t) => {
  const { of } = fakeProc(t)
  const path = native.O_PATH.toString(16)
  t.match(of(openat(`0x${path}00000000`)), { intent: 'open' }, 'O_PATH above the flags')
  t.match(of(openat('0xdeadbeef00000002')), { intent: 'open' })
  t.match(of(openat('0xffffffff00000000')), { intent: 'open' })
  t.match(of(openat(`0xdeadbeef${path.padStart(8, '0')}`)), { intent: 'inspect' }, 'O_PATH below it')
  t.match(of(openat('0xffffffff80000000')), { intent: 'open' }, 'the sign bit')
  // As a floating-point number it would be rounded up to O_DIRECTORY.
  t.match(of(openat('0xdeadbeef0000ff3f')), { intent: 'open' }, 'no bit from rounding')
})

t.test('any other call that reaches a node may open it', async (t) => {
  const { of, intents } = fakeProc(t)
  // With a path or not, on any stack: the number is of no known call.
  const unknown = (text: string, call: number, what: string) => {
    for (const stack of ['', FROM_64_BITS[0], FROM_32_BITS[0]]) {
      const found = of(text, stack)
      t.strictSame({ ...found, print: 0 }, someCall('unknown', call), what)
      t.equal(intents.isSeen(found), true, `${what}: it can be seen when it is over`)
    }
  }
  for (const name of ['mount', 'fsconfig', 'ioctl', 'swapon', 'clock_nanosleep', 'mq_open']) {
    unknown(line(other(name), [PATH, PATH]), other(name), name)
  }
  unknown(line(number('io_uring_enter'), [3, 1, 1]), number('io_uring_enter'), 'io_uring_enter')
  unknown(line(9999, [PATH, PATH]), 9999, 'a call of the future')
  // These have no path, and make no LOOKUP.
  for (const name of ['fchmod', 'fchown']) unknown(line(number(name), [3, PATH]), number(name), name)
  const names = INSPECTING.map(([name]) => name)
  const known = new Set([
    ...names,
    'open',
    'openat',
    'openat2',
    'creat',
    'open_by_handle_at',
    'io_uring_enter',
    'ioctl',
    'fchmod',
    'fchown',
  ])
  t.strictSame(
    Object.keys(native.syscalls).filter((name) => !known.has(name)),
    [],
    'this test knows all calls that are listed',
  )
})

t.test('a thread outside of any call, or in kernel code of its own, is not seen', async (t) => {
  const { of, intents } = fakeProc(t)
  t.equal(of(OUTSIDE), UNSEEN)
  t.match(of(line(-1)), { intent: 'unknown' })
  t.equal(intents.isSeen(UNSEEN), false)
})

t.test('an io_uring worker is known by its program counter, whatever its creator had in the registers', async (t) => {
  const { of, intents, put } = fakeProc(t)
  const ring = number('io_uring_enter')
  const shown = [
    line(ring, [3, PATH], '0x0'),
    line(number('newfstatat'), args(1), '0x0'), // made while its program was in stat(2)
    line(number('openat'), args(1), '0x0'),
    line(425, [], '0x0'), // io_uring_setup, with a thread that polls
    '0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0\n', // arm64
    '-1 0x0 0x0\n', // made at an interrupt
  ]
  put('stack', FROM_64_BITS[0] as string)
  for (const text of shown) {
    const call = of(text)
    t.match(call, { intent: 'unknown', number: ring, keeps: true }, text)
    t.equal(intents.isIoUring(call), true)
    t.equal(intents.isSeen(call), true)
    t.equal(intents.isOpening(call), false)
    t.equal(
      intents.mayStillBeIn(call, seen(text, { stack: '[<0>] io_issue_sqe+0x1/0x2\n[<0>] io_wq_submit_work+0x1/0x2\n' })),
      true,
      'at work',
    )
    t.equal(intents.mayStillBeIn(call, seen(text, { stack: '[<0>] io_wq_worker+0x1/0x2\n' })), false, 'idle')
  }
})

t.test('a lookup by the kernel for btrfs is known by its ioctl(2), also a 32-bit one, or by its thread', async (t) => {
  const { of, put } = fakeProc(t)
  const ioctl = (call: number, command: string) => of(line(call, ['0x3', command, PATH]))
  // BTRFS_IOC_SCAN_DEV, _ADD_DEV, _RM_DEV, _RM_DEV_V2, _DEV_REPLACE
  for (const command of ['0x50009404', '0x5000940a', '0x5000940b', '0x5000943a', '0xca289435', '0xffffffff5000940a']) {
    for (const call of [other('ioctl'), 54]) t.match(ioctl(call, command), { intent: 'unknown', number: call, setsTimes: true }, command)
    t.match(ioctl(other('mount'), command), { setsTimes: false }, 'no ioctl')
  }
  // BLKGETSIZE64, BLKGETDISKSEQ, DM_TABLE_LOAD, and commands that have the number in another place
  for (const command of ['0x80081272', '0x80081280', '0xc138fd09', '0x94', '0x940000', '0x9400000000']) {
    t.match(ioctl(other('ioctl'), command), { setsTimes: false }, command)
  }
  for (const [comm, setsTimes] of [
    ['btrfs-devrepl', true],
    ['iou-wrk-7', false],
    ['btrfs-devrepl2', false],
  ] as const) {
    put('comm', `${comm}\n`)
    t.match(of('0 0x0 0x0 0x0 0x0 0x0 0x0 0x0 0x0\n'), { intent: 'unknown', setsTimes }, comm)
    t.match(of(line(other('ioctl'), ['0x3', '0x0', PATH])), { setsTimes: false }, 'a program of that name')
  }
})

t.test('a number is believed beside a pointer above 4 GiB, or if the stack shows which kind of call it is', async (t) => {
  const { of, intents } = fakeProc(t)
  const cases: [string, number, number, number[]][] = [
    ...INSPECTING.filter(([name]) => native.syscalls[name] !== undefined).map(([name, pointer]): [string, number, number, number[]] => [
      name,
      number(name),
      pointer,
      [],
    ]),
    ['openat', number('openat'), 1, []],
    ['openat2', number('openat2'), 1, []],
    ['open_by_handle_at', number('open_by_handle_at'), 1, []],
    ...(process.arch === 'x64'
      ? ([
          ['open', number('open'), 0, []],
          ['creat', number('creat'), 0, []],
        ] as [string, number, number, number[]][])
      : []),
  ]
  for (const [name, call, pointer] of cases) {
    const others = Object.fromEntries([0, 1, 2, 3, 4, 5].filter((i) => i !== pointer && i !== 2 && i !== 1).map((i) => [i, PATH]))
    const believed = of(line(call, args(pointer)))
    t.not(believed.intent, 'unknown', name)
    for (const low of [LOW, '0x0', '0xffffffff']) {
      const text = line(call, args(pointer, others, low))
      for (const stack of ['', ...FROM_32_BITS]) {
        const found = of(text, stack)
        t.strictSame({ ...found, print: 0 }, someCall('unknown', call), `${name} with ${low}`)
        t.equal(intents.isSeen(found), true, `${name}: it can be seen when it is over`)
      }
      for (const stack of FROM_64_BITS) t.equal(of(text, stack).intent, believed.intent, `${name} with ${low}, by a 64-bit call`)
    }
    t.equal(of(line(call, args(pointer, {}, '0x100000000'))).intent, believed.intent, `${name}: 4 GiB is enough`)
  }
})

t.test('the address of the program makes no difference', async (t) => {
  const { of } = fakeProc(t)
  for (const pc of ['0x8048000', '0x401000', '0xffffffff', PC]) {
    t.match(of(line(number('newfstatat'), args(1), pc)), { intent: 'inspect' }, `a static program at ${pc}`)
    t.match(of(line(number('newfstatat'), args(1, {}, LOW), pc)), { intent: 'unknown' }, `with a path that may be of 32 bits at ${pc}`)
  }
})

t.test('only the stack shows which kind of call it is', async (t) => {
  const { intents, put, proc } = fakeProc(t)
  for (const stack of FROM_64_BITS) {
    put('stack', stack)
    t.equal(intents.confirms(TID), true, JSON.stringify(stack.slice(-60)))
  }
  const longest = `${'[<0>] some_function_with_a_long_name+0x12/0x345\n'.repeat(60)}${FROM_64_BITS[0]}`
  put('stack', longest)
  t.equal(intents.confirms(TID), true, 'a long stack')
  for (const stack of [...FROM_32_BITS, '', '\n', '[<0>] my_entry_SYSCALL_64+0x0/0x1\n', '[<0>] entry_SYSENTER_compat+0x1/0x2\n']) {
    put('stack', stack)
    t.equal(intents.confirms(TID), false, JSON.stringify(stack.slice(-60)))
  }
  rmSync(join(proc, `${TID}/stack`))
  t.equal(intents.confirms(TID), false, 'a stack that cannot be read')
})

t.test('a short stack does not continue into one that was read before', async (t) => {
  const { intents, put } = fakeProc(t)
  put('stack', FROM_64_BITS[0])
  t.equal(intents.confirms(TID), true)
  put('stack', FROM_64_BITS[0].slice(0, 20))
  t.equal(intents.confirms(TID), false)
})

t.test('a caller that asks for the attributes of the root arrives, or is there already', async (t) => {
  const { intents, put, proc } = fakeProc(t)
  const walk =
    '[<0>] fuse_permission+0x1a/0x2b\n[<0>] inode_permission+0xd9/0x180\n[<0>] link_path_walk.part.0.constprop.0+0x2ac/0x3c0\n[<0>] path_openat+0x9e/0x12d0\n'
  put('stack', walk + FROM_64_BITS[0])
  t.equal(intents.arrives(TID), true, 'on its way to a name')
  put('stack', '[<0>] fuse_permission+0x1a/0x2b\n[<0>] may_create+0xd9/0x180\n[<0>] path_openat+0x9e/0x12d0\n' + FROM_64_BITS[0])
  t.equal(intents.arrives(TID), false, 'it holds the lock')
  put('stack', '[<0>] fuse_getattr+0x1a/0x2b\n[<0>] vfs_statx+0xd9/0x180\n' + FROM_64_BITS[0])
  t.equal(intents.arrives(TID), false, 'a stat of the root')
  rmSync(join(proc, `${TID}/stack`))
  t.equal(intents.arrives(TID), false, 'nobody knows')
})

t.test('the same call has the same print, and any other register value makes another print', async (t) => {
  const { of } = fakeProc(t)
  const registers = ['0xffffffffffffff9c', PATH, '0x80000', '0x0', '0x1', '0xdeadbeefdeadbeef', SP, PC]
  const print = (values: readonly string[], call = number('openat')) => of(`${call} ${values.join(' ')}\n`).print
  const first = print(registers)
  t.equal(print(registers), first)
  const prints = new Map<number, string>([[first, 'none']])
  let twice = ''
  let shown = 0
  registers.forEach((register, i) => {
    for (let bit = 0n; bit < 64n; bit++) {
      const other = print(registers.with(i, `0x${(BigInt(register) ^ (1n << bit)).toString(16)}`))
      shown++
      if (other === 0 || prints.has(other)) twice ||= `bit ${bit} of ${i}, and ${prints.get(other)}`
      prints.set(other, `bit ${bit} of ${i}`)
    }
  })
  t.equal(shown, 512)
  t.equal(twice, '', 'none twice')
  const calls = ['openat', 'newfstatat', 'statx', 'execve'].map((name) => print(registers, number(name)))
  t.equal(new Set(calls).size, calls.length, 'another number makes another print')
  for (let i = 1; i < registers.length; i++) {
    const swapped = registers.with(i, registers[i - 1] as string).with(i - 1, registers[i] as string)
    t.not(print(swapped), first, `another order makes another print, ${i}`)
  }
})

t.test('garbage is unknown', async (t) => {
  const { of } = fakeProc(t)
  const stat = number('newfstatat')
  const good = line(stat, args(1))
  t.equal(of(good).intent, 'inspect')
  const texts = [
    '\n',
    ' ',
    'x',
    'running',
    'running\n',
    '0x',
    `${stat}\n`,
    `${stat}`,
    'NaN 0 0 0 0 0 0 0 0\n',
    good.replace(`${stat} `, ''),
    good.replace(' 0x0', ''),
    `${good.trimEnd()} 0x1\n`,
    line(stat, args(1), 'x'),
    line(stat, args(1), ''),
    line(stat, args(1), '-0x7f0000000000'),
    good.replace(`${stat}`, `${stat}.5`),
    good.replace(`${stat}`, 'stat'),
    `x${good}`,
    good + good,
    good.replace(' ', '  '),
    good.replace('0x0', '0X0'),
    good.replace(PATH, `0x${'1'.repeat(17)}`),
    good.replace(`${stat}`, `0${stat}`),
    `${good} `,
  ]
  for (const text of texts) t.strictSame(of(text), UNSEEN, JSON.stringify(text))
  t.match(of(Buffer.from(Array.from({ length: 4096 }, (_, i) => (i * 73 + 11) & 0xff))), { intent: 'unknown' }, 'bytes')
  for (const flags of ['', '0x', 'zz', '-']) {
    const { intent } = of(openat(flags || ' '))
    t.not(intent, 'inspect', `flags ${JSON.stringify(flags)}`)
  }
})

t.test('a line that is cut off is not completed by an earlier one', async (t) => {
  const { of, intents } = fakeProc(t)
  const whole = line(number('newfstatat'), args(1))
  const call = { ...someCall('unknown', other('ioctl')), print: 5 }
  for (let length = 1; length < whole.length; length++) {
    t.equal(of(whole).intent, 'inspect')
    t.strictSame(of(whole.slice(0, length)), UNSEEN, `after ${length} bytes`)
    t.equal(intents.mayStillBeIn(call, seen(whole.slice(0, length))), true, 'it does not show that a call is over')
  }
})

t.test('a file that is empty, missing or unreadable is unknown', async (t) => {
  const { of, intents, proc } = fakeProc(t)
  t.equal(intents.of(TID), UNSEEN, 'missing')
  t.equal(of(''), UNSEEN, 'empty')
  mkdirSync(join(proc, '5/syscall'), { recursive: true })
  t.equal(intents.of(5), UNSEEN, 'unreadable')
})

t.test('a caller in another pid namespace is unknown', async (t) => {
  const { proc, intents } = fakeProc(t)
  mkdirSync(join(proc, '0'))
  writeFileSync(join(proc, '0/syscall'), line(number('newfstatat'), args(1)))
  t.equal(intents.of(0), UNSEEN)
})

/** A thread that is seen running `times` times before it sleeps. */
function wakeful(times: number, then: string) {
  let reads = 0
  const answer = (into: Uint8Array) => Buffer.from(into.buffer, into.byteOffset).write(reads++ < times ? 'running\n' : then)
  const intents = new Intents({
    ...native,
    openFile: () => 77,
    close: () => 0,
    readFile: (_, into) => answer(into),
    readAgain: (_, into) => answer(into),
  })
  return { intents, reads: () => reads }
}

t.test('a caller that has not gone to sleep yet is looked at again', async (t) => {
  const { intents } = wakeful(2, openat(0))
  t.match(intents.of(TID), { intent: 'open' })
})

t.test('a caller that never sleeps is not looked at for ever', async (t) => {
  const { intents, reads } = wakeful(Infinity, '')
  t.equal(intents.of(TID), RUNNING)
  t.ok(reads() > 2 && reads() < 100, `${reads()} times`)
})

t.test('for a caller that may pretend to be on its way to sleep, it is checked first that it sleeps', async (t) => {
  const { proc, intents, put, of } = fakeProc(t, true)
  // The threads of the process itself show whether this can be checked here.
  for (const [tid, where] of [
    ['1', '0'],
    ['2', 'futex_wait_queue'],
  ]) {
    mkdirSync(join(proc, 'self/task', tid as string), { recursive: true })
    mkdirSync(join(proc, tid as string))
    writeFileSync(join(proc, tid as string, 'wchan'), where as string)
  }
  put('wchan', '0')
  t.match(of(openat(0)), { intent: 'open' }, 'not for root')
  t.equal(intents.of(TID, true), RUNNING)
  put('wchan', 'request_wait_answer')
  t.match(intents.of(TID, true), { intent: 'open' })
  rmSync(join(proc, `${TID}/wchan`))
  intents.close()
  t.match(intents.of(TID, true), { intent: 'open' }, 'in doubt it is read')
})

for (const [what, preempts, where] of [
  ['the kernel does not preempt itself', false, 'futex_wait_queue'],
  ['the kernel does not show it', true, '0'],
] as const) {
  t.test(`that is not checked if ${what}`, async (t) => {
    const { proc, intents, put } = fakeProc(t, preempts)
    mkdirSync(join(proc, 'self/task/1'), { recursive: true })
    mkdirSync(join(proc, '1'))
    writeFileSync(join(proc, '1/wchan'), where)
    put('wchan', '0')
    put('syscall', openat(0))
    t.match(intents.of(TID, true), { intent: 'open' })
  })
}

t.test('a thread that has the id of an earlier one is looked at anew', async (t) => {
  const opening = openat(0)
  const stat = line(number('newfstatat'), args(1))
  // Descriptors of /proc files fail with ESRCH once their thread is gone.
  const files = new Map<number, string | undefined>()
  let content = opening
  const intents = new Intents({
    ...native,
    openFile() {
      files.set(100 + files.size, content)
      return 99 + files.size
    },
    readAgain(fd, into) {
      const text = files.get(fd)
      return text === undefined ? -E.ESRCH : Buffer.from(into.buffer, into.byteOffset).write(text)
    },
    close: () => 0,
  })
  t.match(intents.of(TID), { intent: 'open' })
  files.set(100, undefined)
  content = stat
  t.match(intents.of(TID), { intent: 'inspect' })
  files.set(101, undefined)
  content = line(other('mount'))
  t.match(intents.of(TID), { intent: 'unknown', number: other('mount') })
})

t.test('however many threads ask, few files stay open, and none after close()', async (t) => {
  const open = new Set<number>()
  let next = 100
  let most = 0
  const intents = new Intents({
    ...native,
    openFile() {
      open.add(next)
      most = Math.max(most, open.size)
      return next++
    },
    readAgain: (_, into) => Buffer.from(into.buffer, into.byteOffset).write(openat(0)),
    close(fd) {
      if (!open.delete(fd)) t.fail(`descriptor ${fd} was closed twice`)
      return 0
    },
  })
  for (let tid = 1; tid <= 5000; tid++) intents.of(tid)
  t.ok(most > 0 && most <= 100, `${most} at most`)
  intents.close()
  t.equal(open.size, 0)
})

/** The call in which a thread was answered, as {@link Intents.of} saw it; and its line. */
function answered(t: Test, text: string) {
  const { intents, of } = fakeProc(t)
  return { intents, call: of(text), still: (call: Call, ...what: Parameters<typeof seen>) => intents.mayStillBeIn(call, seen(...what)) }
}

t.test('a caller may still be in its call until it is seen elsewhere', async (t) => {
  const { call, still, intents } = answered(t, openat(0))
  t.equal(still(call, openat(0)), true, 'it is in the same call')
  t.equal(still(call, openat(0), { state: 'D' }), true, 'whatever keeps it there')
  t.equal(still(call, line(number('newfstatat'), args(1))), false, 'in another')
  t.equal(still(call, line(number('newfstatat'), args(1)), { state: 'D' }), false, 'in another call, which waits for a disk')
  t.equal(still(call, line(other('ioctl'), [3])), false, 'in a call that is no open')
  t.equal(still(call, OUTSIDE), false, 'in none')
  t.equal(still(call, '-1 0x0 0x0\n'), false, 'in no call')
  t.equal(intents.mayStillBeIn(call, undefined), false, 'gone')
})

t.test('a caller that was answered in a mount(2) is followed until it leaves that', async (t) => {
  const text = line(other('mount'), [PATH, PATH])
  const { call, still, intents } = answered(t, text)
  t.match(call, { intent: 'unknown' })
  t.equal(intents.isSeen(call), true)
  for (const state of ['S', 'D']) t.equal(still(call, text, { state }), true, `in the same call, ${state}`)
  t.equal(still(call, line(other('mount'), [PATH, LOW])), false, 'in the next mount')
  t.equal(still(call, openat(0), { state: 'D' }), false, 'in an open, which will ask us')
  t.equal(still(call, OUTSIDE), false, 'in none')
  t.equal(intents.mayStillBeIn(call, undefined), false, 'gone')
})

t.test('a caller in its next open may be opening through the same inode, if it waits for a disk', async (t) => {
  const { call, still } = answered(t, openat(0))
  const next = openat(0, '0x55d0c0de2000')
  t.equal(still(call, next, { state: 'S' }), false, 'of a FIFO, for example')
  t.equal(still(call, next, { state: 'D' }), true, 'of a disk')
  for (const name of ['open', 'openat2', 'creat', 'open_by_handle_at']) {
    const opens = native.syscalls[name]
    if (opens === undefined) continue
    t.equal(still(call, line(opens, [PATH, PATH]), { state: 'D' }), true, `by ${name}`)
    t.equal(still(call, line(opens, [PATH, PATH]), { state: 'S' }), false, `by ${name}, asleep`)
  }
  t.equal(still(call, openat(0).replace(SP, '0x7ffd1a2b3c40'), { state: 'S' }), false, 'the same with another stack')
})

t.test('in the middle of an execve(2), or at its end, a thread has left the call that it was in', async (t) => {
  const { call, still } = answered(t, openat(0))
  t.equal(still(call, '', { memory: 0 }), false)
  t.equal(still(call, '', { memory: 0, state: 'D' }), false)
})

t.test('a caller that may not be looked at may still be in its call', async (t) => {
  const { call, still } = answered(t, openat(0))
  t.equal(still(call, ''), true, 'the file cannot be read')
  t.equal(still(call, '', { memory: 1 }), true, 'the file cannot be read, and it has memory')
  t.equal(still(call, '', { memory: -1 }), true, 'nor anything')
  t.equal(still(call, 'garbage\n'), true, 'the line is not understood')
  t.equal(still(call, openat(0).slice(0, -1)), true, 'the line is cut off')
})

t.test('a caller that runs may still be in its call until it has spent time outside the kernel', async (t) => {
  const { call, still } = answered(t, openat(0))
  t.equal(still(call, 'running\n'), true, 'the time is not known')
  t.equal(still(call, 'running\n', { userUs: -1 }), true)
  t.equal(call.userUs, -1)
  t.equal(still(call, 'running\n', { userUs: 5000 }), true, 'when it is first seen running')
  t.equal(still(call, 'running\n', { userUs: 5000 }), true, 'it has been in the kernel since')
  t.equal(still(call, 'running\n', { userUs: -1 }), true, 'the time is not known for once')
  t.equal(still(call, 'running\n', { userUs: 5001 }), false, 'it has been outside the kernel')
  const { call: fresh } = answered(t, openat(0))
  t.equal(still(fresh, 'running\n', { userUs: 0 }), true, 'a caller that never computed')
  t.equal(still(fresh, 'running\n', { userUs: 0 }), true)
  t.equal(still(fresh, 'running\n', { userUs: 4000 }), false)
})

t.test('a caller of an earlier daemon, known only by the number of its call, may be in any call of that kind', async (t) => {
  const { still, intents } = answered(t, openat(0))
  const opener = someCall('open', number('openat'))
  for (const state of ['S', 'D']) {
    t.equal(still(opener, openat(0), { state }), true, `in an open, ${state}`)
    t.equal(still(opener, line(number('openat2'), args(1)), { state }), true, `in another kind of open, ${state}`)
    t.equal(still(opener, line(number('newfstatat'), args(1)), { state }), false, `in a stat, ${state}`)
  }
  t.equal(still(opener, openat(0), { stack: '[<0>] request_wait_answer+0x1/0x2\n[<0>] fuse_get_acl+0x1/0x2\n' }), true, 'asking us')
  t.equal(still(opener, openat(0), { stack: '[<0>] wait_for_partner+0x1/0x2\n[<0>] fifo_open+0x1/0x2\n' }), false, 'in the open of a FIFO')
  t.equal(intents.wantsStack(opener), true)
  const mount = someCall('unknown', other('mount'))
  t.equal(still(mount, line(other('mount'), [LOW, PATH])), true, 'in a mount')
  t.equal(still(mount, line(other('ioctl'), [LOW, PATH])), false, 'in an ioctl')
  t.equal(still(mount, openat(0), { state: 'D' }), false, 'in an open')
  t.equal(still(opener, OUTSIDE), false, 'in none')
  t.equal(intents.mayStillBeIn(opener, undefined), false, 'gone')
  t.equal(still(someCall('open', -1), OUTSIDE), false, 'in no call, whichever it was in')
})

t.test('for io_uring the stack decides, whatever call the thread is seen in', async (t) => {
  const enter = line(number('io_uring_enter'), [3, 1, 1, 1])
  const { call, still, intents } = answered(t, enter)
  t.match(call, { intent: 'unknown' })
  t.equal(intents.isIoUring(call), true)
  const none = FROM_64_BITS[0]
  const works = [
    `[<0>] path_openat+0x1/0x2\n[<0>] io_openat2+0x1/0x2\n[<0>] io_issue_sqe+0x5d/0x3a0\n${none}`,
    `[<0>] fuse_lookup+0x1/0x2\n[<0>] __io_issue_sqe+0x5d/0x3a0\n${none}`,
    `[<0>] io_submit_sqes+0x5d/0x3a0\n${none}`,
    '[<0>] io_wq_submit_work+0xd9/0x2a0\n[<0>] io_worker_handle_work+0x1/0x2\n[<0>] io_wq_worker+0x1/0x2\n',
  ]
  for (const stack of works) {
    t.equal(still(call, enter, { stack }), true, stack.slice(0, 50))
    t.equal(still(call, line(other('read'), [3]), { stack }), true, 'by task work in another call')
  }
  t.equal(still(call, enter, { stack: `[<0>] io_cqring_wait+0x5d/0x3a0\n${none}` }), false, 'it waits for completions')
  t.equal(still(call, line(number('newfstatat'), args(1)), { stack: none }), false, 'in another call')
  t.equal(still(call, enter, { stack: '' }), true, 'a stack that cannot be read')
  t.equal(still(call, 'running\n', { userUs: 5000 }), true, 'running')
  t.equal(still(call, 'running\n', { userUs: 5001 }), true, 'a kernel thread spends no time elsewhere; a process may be at it again')
  t.equal(still(call, OUTSIDE, { stack: none }), false, 'in none')
  t.equal(intents.mayStillBeIn(call, undefined), false, 'gone')
})

t.test('only calls that open by number outlast the inode', async (t) => {
  const intents = new Intents(native)
  const outlasts = (intent: Call['intent'], number: number) => intents.outlastsInode(someCall(intent, number))
  t.equal(outlasts('unknown', other('mount')), true)
  t.equal(outlasts('unknown', other('ioctl')), true)
  t.equal(outlasts('unknown', other('fsconfig')), true)
  t.equal(outlasts('unknown', number('io_uring_enter')), false)
  t.equal(outlasts('unknown', -1), true, 'an unknown call may be one of these')
  t.equal(outlasts('open', number('openat')), false)
  t.equal(outlasts('inspect', number('statx')), false)
})

t.test('an open that asks for the attributes is about to open, whatever its flags say', async (t) => {
  const { intents, of } = fakeProc(t)
  t.equal(intents.isOpening(of(openat(0))), true)
  t.equal(intents.isOpening(of(openat(native.O_PATH))), true, 'O_PATH would not ask')
  t.equal(intents.isOpening(of(openat(0, LOW))), false, 'a call whose number is not believed is unknown')
  t.equal(intents.isOpening(of(line(number('openat2'), args(1)))), true)
  t.equal(intents.isOpening(of(line(number('open_by_handle_at'), args(1)))), true)
  t.equal(intents.isOpening(of(line(number('newfstatat'), args(1)))), false)
  t.equal(intents.isOpening(of(line(number('io_uring_enter')))), false)
  t.equal(intents.isOpening(of(line(other('mount'), [PATH, PATH]))), false)
  t.equal(intents.isOpening(UNSEEN), false)
})

t.test('the workers of udev have these names', async (t) => {
  const { intents, put } = fakeProc(t)
  for (const [comm, is] of [
    ['(udev-worker)\n', true],
    ['systemd-udevd\n', true],
    ['udev-worker\n', false],
    ['bash\n', false],
    ['x(udev-worker)\n', false],
    ['', false],
  ] as const) {
    put('comm', comm)
    t.equal(intents.isUdevWorker(TID), is, JSON.stringify(comm))
  }
})
