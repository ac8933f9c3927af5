/** Intents: which system calls can open a disk, and that whatever is not plain is taken for one that can. */
import { execFileSync, spawn } from 'node:child_process'
import { constants, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { E } from '../src/errno.js'
import { type Call, Intents } from '../src/intent.js'
import { native } from '../src/native.js'
import { until } from './helpers/tree.js'

const number = (name: string) => {
  const value = native.syscalls[name]
  if (value === undefined) throw new Error(`no system call ${name}`)
  return value
}

/** Calls that the addon has no name for, since nothing depends on them. */
const OTHERS: Record<string, number> = {
  fsconfig: 431,
  ...(process.arch === 'arm64'
    ? { mount: 40, ioctl: 29, swapon: 224, clock_nanosleep: 115 }
    : { mount: 165, ioctl: 16, swapon: 167, clock_nanosleep: 230 }),
}

const INSPECTING = [
  'stat', 'lstat', 'fstat', 'newfstatat', 'statx',
  'readlink', 'readlinkat', 'access', 'faccessat', 'faccessat2',
  'getxattr', 'lgetxattr', 'fgetxattr', 'getxattrat', 'listxattr', 'llistxattr', 'flistxattr', 'listxattrat',
  'statfs', 'fstatfs', 'inotify_add_watch', 'name_to_handle_at',
  'chmod', 'fchmod', 'fchmodat', 'fchmodat2', 'chown', 'lchown', 'fchown', 'fchownat',
  'utime', 'utimes', 'futimesat', 'utimensat',
  'setxattr', 'lsetxattr', 'fsetxattr', 'setxattrat', 'removexattr', 'lremovexattr', 'fremovexattr', 'removexattrat',
  'mkdir', 'mkdirat', 'mknod', 'mknodat', 'symlink', 'symlinkat', 'link', 'linkat',
  'rename', 'renameat', 'renameat2', 'unlink', 'unlinkat', 'rmdir',
]
/** Not on every architecture: the newer ones have only their *at forms. */
const OLD = ['open', 'creat', 'stat', 'lstat', 'readlink', 'access']

const SP = '0x7ffd1a2b3c48'
const PC = '0x7f12d4e5a6b7'
const TID = 4711

/** As proc_pid_syscall (fs/proc/base.c) writes it. */
const line = (call: number, args: (number | string)[] = [], pc = PC) => {
  const six = Array.from({ length: 6 }, (_, i) => args[i] ?? 0)
  const hex = six.map((arg) => (typeof arg === 'number' ? `0x${arg.toString(16)}` : arg))
  return `${call} ${hex.join(' ')} ${SP} ${pc}\n`
}

function fakeProc(t: Test) {
  const proc = mkdtempSync(join(tmpdir(), 'diskseqfs-proc-'))
  t.teardown(() => rmSync(proc, { recursive: true }))
  mkdirSync(join(proc, `${TID}`))
  const intents = new Intents(native, proc)
  t.teardown(() => intents.close())
  const write = (text: string | Buffer) => writeFileSync(join(proc, `${TID}/syscall`), text)
  return {
    proc,
    intents,
    write,
    of(text: string | Buffer): Call {
      write(text)
      return intents.of(TID)
    },
  }
}

const UNKNOWN: Call = { intent: 'unknown', number: -1 }

t.test('looking at a node is inspecting', async (t) => {
  const { of } = fakeProc(t)
  for (const name of INSPECTING) {
    const call = native.syscalls[name]
    if (call === undefined) t.ok(OLD.includes(name) && process.arch !== 'x64', `${name} is not on ${process.arch}`)
    else t.strictSame(of(line(call)), { intent: 'inspect', number: call }, name)
  }
})

t.test('opening it is opening', async (t) => {
  const { of } = fakeProc(t)
  const { O_RDONLY, O_RDWR, O_WRONLY, O_EXCL, O_NONBLOCK, O_CREAT, O_TRUNC, O_DIRECT, O_NOFOLLOW } = constants
  const flags = [O_RDONLY, O_WRONLY, O_RDWR, O_RDONLY | O_EXCL | O_NONBLOCK, O_RDWR | O_CREAT | O_TRUNC, O_RDWR | O_DIRECT | O_NOFOLLOW]
  for (const flag of flags) {
    const call = number('openat')
    t.strictSame(of(line(call, ['0xffffffffffffff9c', '0x55d0c0', flag])), { intent: 'open', number: call }, `openat ${flag}`)
    if (process.arch !== 'x64') continue
    t.match(of(line(number('open'), ['0x55d0c0', flag])), { intent: 'open' }, `open ${flag}`)
  }
  t.strictSame(of(line(number('openat2'))), { intent: 'open', number: number('openat2') }, 'openat2')
  if (process.arch === 'x64') t.match(of(line(number('creat'))), { intent: 'open' }, 'creat')
})

t.test('an open that can never reach a device is inspecting', async (t) => {
  const { of } = fakeProc(t)
  for (const flag of [native.O_PATH, native.O_PATH | constants.O_NOFOLLOW | 0x80000, constants.O_DIRECTORY]) {
    t.match(of(line(number('openat'), [0, 0, flag])), { intent: 'inspect' }, `openat ${flag}`)
    if (process.arch === 'x64') t.match(of(line(number('open'), [0, flag])), { intent: 'inspect' }, `open ${flag}`)
  }
})

t.test('only the flags tell, not what lies beside them', async (t) => {
  const { of } = fakeProc(t)
  const path = native.O_PATH
  t.match(of(line(number('openat'), [path, path, 0, path, path, path])), { intent: 'open' }, 'other arguments of openat')
  t.match(of(line(number('openat2'), [path, path, path, path])), { intent: 'open' }, 'openat2 has them in memory')
  if (process.arch !== 'x64') return
  t.match(of(line(number('open'), [path, 0, path])), { intent: 'open' }, 'other arguments of open')
  t.match(of(line(number('creat'), [path, path, path])), { intent: 'open' }, 'creat has none')
})

t.test('garbage in the upper half of a register is no flag', async (t) => {
  const { of } = fakeProc(t)
  const path = native.O_PATH.toString(16)
  t.match(of(line(number('openat'), [0, 0, `0x${path}00000000`])), { intent: 'open' }, 'O_PATH above the flags')
  t.match(of(line(number('openat'), [0, 0, '0xdeadbeef00000002'])), { intent: 'open' })
  t.match(of(line(number('openat'), [0, 0, '0xffffffff00000000'])), { intent: 'open' })
  t.match(of(line(number('openat'), [0, 0, `0xdeadbeef${path.padStart(8, '0')}`])), { intent: 'inspect' }, 'O_PATH below it')
  t.match(of(line(number('openat'), [0, 0, '0xffffffff80000000'])), { intent: 'open' }, 'the sign bit')
  // As a floating-point number it would be rounded up to O_DIRECTORY.
  t.match(of(line(number('openat'), [0, 0, '0xdeadbeef0000ffff'])), { intent: 'open' }, 'no bit from rounding')
})

t.test('whatever else reaches a node may open it', async (t) => {
  const { of } = fakeProc(t)
  for (const name of ['mount', 'fsconfig', 'ioctl', 'swapon', 'clock_nanosleep']) {
    const call = OTHERS[name] as number
    t.strictSame(of(line(call)), { intent: 'unknown', number: call }, name)
  }
  const uring = number('io_uring_enter')
  t.strictSame(of(line(uring)), { intent: 'unknown', number: uring }, 'io_uring_enter')
  t.strictSame(of(line(9999)), { intent: 'unknown', number: 9999 }, 'a call of the future')
  const known = new Set([...INSPECTING, 'open', 'openat', 'openat2', 'creat', 'io_uring_enter'])
  t.strictSame(Object.keys(native.syscalls).filter((name) => !known.has(name)), [], 'and no call is listed that this test does not know')
})

t.test('a thread outside of any call, or in kernel code of its own, is unknown', async (t) => {
  const { of } = fakeProc(t)
  t.match(of(`-1 ${SP} ${PC}\n`), UNKNOWN)
  t.match(of('-1 0x0 0x0\n'), UNKNOWN)
  t.match(of(line(-1)), { intent: 'unknown' })
})

t.test('the same number means another call below 4 GiB', async (t) => {
  const { of } = fakeProc(t)
  for (const pc of ['0xf7f4a579', '0x8048000', '0xffffffff', '0x0']) {
    t.strictSame(of(line(number('newfstatat'), [], pc)), UNKNOWN, `stat at ${pc}`)
    t.strictSame(of(line(number('openat'), [0, 0, native.O_PATH], pc)), UNKNOWN, `O_PATH at ${pc}`)
    t.match(of(line(number('openat'), [], pc)), { intent: 'unknown' }, `open at ${pc}`)
  }
  t.match(of(line(number('newfstatat'), [], '0x100000000')), { intent: 'inspect' })
})

t.test('garbage is unknown', async (t) => {
  const { of } = fakeProc(t)
  const stat = number('newfstatat')
  const texts = [
    '\n', ' ', 'x', 'running', 'running\n', '0x', `${stat}\n`, `${stat}`, 'NaN 0 0 0 0 0 0 0 0\n',
    line(stat).replace(`${stat} `, ''), line(stat).replace(' 0x0', ''), `${line(stat).trimEnd()} 0x1\n`,
    line(stat, [], 'x'), line(stat, [], ''), line(stat, [], '-0x7f0000000000'), line(stat).replace(`${stat}`, `${stat}.5`),
    line(stat).replace(`${stat}`, 'stat'), `x${line(stat)}`, line(stat) + line(stat),
  ]
  for (const text of texts) t.match(of(text), { intent: 'unknown' }, JSON.stringify(text))
  t.match(of(Buffer.from(Array.from({ length: 4096 }, (_, i) => (i * 73 + 11) & 0xff))), { intent: 'unknown' }, 'bytes')
  for (const flags of ['', '0x', 'zz', '-']) {
    const { intent } = of(line(number('openat'), [0, 0, flags || ' ']))
    t.not(intent, 'inspect', `flags ${JSON.stringify(flags)}`)
  }
})

t.test('a line that is cut off is not completed by an earlier one', async (t) => {
  const { of, intents } = fakeProc(t)
  const whole = line(number('newfstatat'))
  for (let length = 1; length < whole.length; length++) {
    t.equal(of(whole).intent, 'inspect')
    t.strictSame(of(whole.slice(0, length)), UNKNOWN, `after ${length} bytes`)
    t.equal(intents.mayStillBeIn(TID, OTHERS['ioctl']!), true, 'nor does it tell that a call is over')
  }
})

t.test('a file that is empty, missing or unreadable is unknown', async (t) => {
  const { of, intents, proc } = fakeProc(t)
  t.strictSame(intents.of(TID), UNKNOWN, 'missing')
  t.strictSame(of(''), UNKNOWN, 'empty')
  mkdirSync(join(proc, '5/syscall'), { recursive: true })
  t.strictSame(intents.of(5), UNKNOWN, 'unreadable')
})

t.test('a caller in another pid namespace is unknown', async (t) => {
  const { proc, intents } = fakeProc(t)
  mkdirSync(join(proc, '0'))
  writeFileSync(join(proc, '0/syscall'), line(number('newfstatat')))
  t.strictSame(intents.of(0), UNKNOWN)
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
  const { intents } = wakeful(2, line(number('openat')))
  t.match(intents.of(TID), { intent: 'open' })
})

t.test('but not for ever', async (t) => {
  const { intents, reads } = wakeful(Infinity, '')
  t.strictSame(intents.of(TID), UNKNOWN)
  t.ok(reads() > 2 && reads() < 100, `${reads()} times`)
})

t.test('a thread that has the id of an earlier one is looked at anew', async (t) => {
  const openat = line(number('openat'))
  const stat = line(number('newfstatat'))
  // Descriptors of /proc files fail with ESRCH once their thread is gone.
  const files = new Map<number, string | undefined>()
  let content = openat
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
  content = line(OTHERS['mount'] as number)
  t.match(intents.of(TID), { intent: 'unknown', number: OTHERS['mount'] as number })
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
    readAgain: (_, into) => Buffer.from(into.buffer, into.byteOffset).write(line(number('openat'))),
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

t.test('a caller may still be in its call until it is seen elsewhere', async (t) => {
  const { intents, write, proc } = fakeProc(t)
  const openat = number('openat')
  write(line(openat))
  t.equal(intents.mayStillBeIn(TID, openat), true, 'there it is')
  t.equal(intents.mayStillBeIn(TID, number('newfstatat')), false, 'in another')
  t.equal(intents.mayStillBeIn(TID, -1), true, 'nobody knows which it was')
  write('running\n')
  t.equal(intents.mayStillBeIn(TID, openat), true, 'running, perhaps in the kernel')
  write(`-1 ${SP} ${PC}\n`)
  t.equal(intents.mayStillBeIn(TID, openat), false, 'in none')
  rmSync(join(proc, `${TID}`), { recursive: true })
  t.equal(intents.mayStillBeIn(TID, openat), false, 'gone')
  t.equal(intents.mayStillBeIn(TID, -1), false, 'gone, wherever it was')
})

t.test('a caller that may not be looked at may still be in its call', async (t) => {
  const answering = (errno: number) => new Intents({ ...native, readFile: () => -errno, readAgain: () => -errno, openFile: () => -errno })
  const openat = number('openat')
  t.equal(answering(E.EPERM).mayStillBeIn(TID, openat), true, 'a hardened kernel')
  t.equal(answering(E.EACCES).mayStillBeIn(TID, openat), true, 'a security module')
  t.equal(answering(E.EMFILE).mayStillBeIn(TID, openat), true, 'no descriptor left to look with')
  t.equal(answering(E.ENOENT).mayStillBeIn(TID, openat), false, 'gone')
  t.equal(answering(E.ESRCH).mayStillBeIn(TID, openat), false, 'gone while it was looked at')
})

t.test('only calls that open by number outlast the inode', async (t) => {
  const intents = new Intents(native)
  const call = (intent: Call['intent'], number: number) => intents.outlastsInode({ intent, number })
  t.equal(call('unknown', OTHERS['mount'] as number), true)
  t.equal(call('unknown', OTHERS['ioctl'] as number), true)
  t.equal(call('unknown', OTHERS['fsconfig'] as number), true)
  t.equal(call('unknown', number('io_uring_enter')), false)
  t.equal(call('unknown', -1), false)
  t.equal(call('open', number('openat')), false)
  t.equal(call('inspect', number('statx')), false)
})

t.test('a real process that sleeps is seen in its call', async (t) => {
  const intents = new Intents(native)
  t.teardown(() => intents.close())
  const child = spawn('sleep', ['60'])
  t.teardown(() => child.kill())
  const pid = child.pid as number
  const nanosleep = OTHERS['clock_nanosleep'] as number
  await until(() => intents.of(pid).number === nanosleep)
  t.strictSame(intents.of(pid), { intent: 'unknown', number: nanosleep })
  t.equal(intents.mayStillBeIn(pid, nanosleep), true)
  t.equal(intents.mayStillBeIn(pid, number('openat')), false)
  const ended = new Promise((resolve) => child.on('exit', resolve))
  child.kill()
  await ended
  t.equal(intents.mayStillBeIn(pid, nanosleep), false, 'until it ends')
  t.strictSame(intents.of(pid), UNKNOWN)
})

t.test('a real process that opens is seen opening', async (t) => {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-fifo-'))
  const fifo = join(directory, 'fifo')
  execFileSync('mkfifo', [fifo])
  const intents = new Intents(native)
  t.teardown(() => intents.close())
  const child = spawn('cat', [fifo])
  t.teardown(() => {
    child.kill()
    rmSync(directory, { recursive: true })
  })
  const pid = child.pid as number
  const openat = number('openat')
  // Its libraries are opened as well, but that does not take a writer.
  await until(() => intents.of(pid).intent === 'open')
  t.strictSame(intents.of(pid), { intent: 'open', number: openat })
  t.equal(intents.mayStillBeIn(pid, openat), true)
  const writer = await open(fifo, 'w')
  await until(() => !intents.mayStillBeIn(pid, openat))
  t.match(intents.of(pid), { intent: 'unknown' }, 'then it reads')
  await writer.close()
})
