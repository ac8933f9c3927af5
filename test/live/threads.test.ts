// SPDX-License-Identifier: MIT
/** What the addon reports about real threads: what they are doing, and their credentials. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { release } from 'node:os'
import { Worker } from 'node:worker_threads'

import t, { type Test } from 'tap'

import { native, type SeenThread, type ThreadCredentials } from '../../src/native.js'
import { sleep, startTree, until } from '../helpers/tree.js'

const USER = 60001
const GROUP = 61001
/** NGROUPS_MAX */
const GROUPS_MAX = 65536

const look = (threads: (number | boolean)[]) => new Promise<(SeenThread | undefined)[]>((resolve) => native.lookAtThreads(threads, resolve))
const lookAt = async (tid: number, stack = false) => (await look([tid, stack]))[0]

const credentials = (tid: number, groups: number[] = []) =>
  new Promise<ThreadCredentials | undefined>((resolve) => native.credentials(tid, groups, resolve))

function child(t: Test, program: string, args: readonly string[]): ChildProcess & { pid: number } {
  const started = spawn(program, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  t.teardown(() => started.kill('SIGKILL'))
  return started as ChildProcess & { pid: number }
}

/** Processor time of this thread, in ns, without what other work takes meanwhile. */
const processorNs = () => Number(readFileSync('/proc/thread-self/schedstat', 'latin1').split(' ')[0])
const stateOf = (pid: number) => readFileSync(`/proc/${pid}/stat`, 'latin1').replace(/^.*\) /s, '')[0]
const isCalled = (pid: number, name: string) => readFileSync(`/proc/${pid}/status`, 'utf8').startsWith(`Name:\t${name}\n`)

/** No thread has this id: it is larger than pid_max can be. */
const NONE = 0x7fffffff

/** The slice in ms; undefined if the kernel does not show it. */
function sliceOf(path: string): number | undefined {
  const [, slice] = /^se\.slice +: +(\d+)$/m.exec(readFileSync(path, 'latin1').replaceAll('\t', ' ')) ?? []
  return slice === undefined ? undefined : Number(slice) / 1e6
}

t.test('the daemon asks for short time slices, and so do its threads', async (t) => {
  const [major = 0, minor = 0] = release().split('.').map(Number)
  if (major < 6 || (major === 6 && minor < 12)) return void t.comment('slices cannot be chosen before Linux 6.12')
  if (sliceOf('/proc/self/sched') === undefined) return void t.comment('this kernel does not show slices')
  const { pid } = await startTree(t)
  t.equal(sliceOf(`/proc/${pid}/sched`), 0.1)
  const threads = readdirSync(`/proc/${pid}/task`).map((tid) => sliceOf(`/proc/${pid}/task/${tid}/sched`))
  t.ok(threads.filter((slice) => slice === 0.1).length > 1, threads.join())
  t.not(sliceOf('/proc/self/sched'), 0.1, 'a process that does not ask has another slice')
})

t.test('a thread that sleeps: its call, where its code lies, and its stack on request', async (t) => {
  const { pid } = child(t, 'sleep', ['60'])
  await until(() => isCalled(pid, 'sleep') && stateOf(pid) === 'S')
  const [syscall, stack, state, memory, userUs] = (await lookAt(pid)) as SeenThread
  t.equal(syscall, readFileSync(`/proc/${pid}/syscall`, 'latin1'), 'the same as in its file')
  t.match(syscall, /^\d+( 0x[0-9a-f]+){8}\n$/)
  t.equal(stack, '', 'it was not asked for')
  t.equal(state, 'S')
  t.ok(memory > 0x10000, `it has code at ${memory.toString(16)}`)
  t.equal(userUs, -1, 'the time is read only of threads that run')
  t.match((await lookAt(pid, true))?.[1], /nanosleep/, 'its stack')
})

t.test('a thread that computes: its time outside the kernel grows', async (t) => {
  const { pid } = child(t, 'sh', ['-c', 'while :; do :; done'])
  const spent = async () => {
    const found = await lookAt(pid)
    return found?.[0] === 'running\n' ? found[4] : -1
  }
  let first = -1
  await until(async () => (first = await spent()) > 0)
  await until(async () => (await spent()) > first)
  t.equal((await lookAt(pid))?.[2], 'R')
  const user = Number(
    readFileSync(`/proc/${pid}/stat`, 'latin1')
      .replace(/^.*\) /s, '')
      .split(' ')[11],
  )
  const us = await spent()
  t.ok(us / 1e4 >= user - 1 && us / 1e4 <= user + 50, `${us} us; its file said ${user} ticks`)
})

t.test('a name that looks like the rest of its line does no harm', async (t) => {
  const { pid } = child(t, 'sh', ['-c', "printf ') S 0 0 0' >/proc/$$/comm; read x </dev/zero"])
  await until(() => isCalled(pid, ') S 0 0 0'))
  await until(async () => (await lookAt(pid))?.[2] === 'R')
  const [, , , memory] = (await lookAt(pid)) as SeenThread
  t.ok(memory > 0x10000)
})

t.test('a thread that is gone is none', async (t) => {
  t.equal(await lookAt(NONE), undefined)
  const gone = child(t, 'true', [])
  await once(gone, 'exit')
  t.equal(await lookAt(gone.pid), undefined)
})

t.test('a thread that has ended and was not reaped is in no call', async (t) => {
  // The shell becomes sleep, which reaps no children.
  const parent = child(t, 'sh', ['-c', 'true & exec sleep 60'])
  let zombie = 0
  await until(() => {
    const [first] = readFileSync(`/proc/${parent.pid}/task/${parent.pid}/children`, 'latin1').trim().split(' ')
    zombie = Number(first)
    return isCalled(parent.pid, 'sleep') && zombie > 0 && stateOf(zombie) === 'Z'
  })
  const [syscall, , state, memory] = (await lookAt(zombie)) as SeenThread
  t.equal(state, 'Z')
  // Without memory it has no code, and there is no call to read.
  t.equal(memory, 0)
  t.equal(syscall, '')
})

t.test("a thread of the kernel's own has no code, and can be looked at all the same", async (t) => {
  const kernel = readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .find((pid) => {
      try {
        return isCalled(pid, 'kthreadd')
      } catch {
        return false
      }
    })
  if (kernel === undefined) {
    t.pass('a kernel thread', { skip: 'none is visible here' })
    return
  }
  let found: SeenThread | undefined
  await until(async () => (found = await lookAt(kernel, true))?.[0] !== 'running\n')
  t.equal(found?.[3], 0, 'no code')
  t.match(found?.[0], /^(-1|\d+) 0x/, 'its call')
  t.match(found?.[1], /kthreadd/, 'and its stack')
})

t.test('many threads at once, each in its place', async (t) => {
  const sleeping = Array.from({ length: 20 }, () => child(t, 'sleep', ['60']).pid)
  await until(() => sleeping.every((pid) => isCalled(pid, 'sleep') && stateOf(pid) === 'S'))
  const asked = sleeping.flatMap((pid, i) => [pid, i % 2 === 1, NONE, true])
  const found = await look(asked)
  t.equal(found.length, 40)
  for (const [i, pid] of sleeping.entries()) {
    t.equal(found[2 * i]?.[0], readFileSync(`/proc/${pid}/syscall`, 'latin1'))
    t.equal(found[2 * i]?.[1] !== '', i % 2 === 1)
    t.equal(found[2 * i + 1], undefined)
  }
  t.strictSame(await look([]), [], 'and none')
})

t.test('a thread that is not the first of its process is seen', async (t) => {
  const worker = new Worker('require("worker_threads").parentPort.postMessage(0); setInterval(() => {}, 1000)', { eval: true })
  t.teardown(() => worker.terminate())
  await once(worker, 'message')
  const tids = readdirSync('/proc/self/task')
    .map(Number)
    .filter((tid) => tid !== process.pid)
  const found = await look(tids.flatMap((tid) => [tid, false]))
  t.ok(tids.length > 0)
  t.ok(
    found.some((one) => one?.[2] === 'S' && /^\d/.test(one[0])),
    `of ${tids.length} some sleep in a call`,
  )
})

t.test('the page faults of a thread are its own', async (t) => {
  // The first thread waits for the second, which touches memory again and again.
  const script = `import mmap, threading
def touch():
    while True:
        page = mmap.mmap(-1, 4096)
        page[0] = 1
        page.close()
thread = threading.Thread(target=touch)
thread.start()
print(flush=True)
thread.join()`
  const python = child(t, 'python3', ['-c', script])
  await once(python.stdout as NodeJS.ReadableStream, 'data')
  const second = () =>
    readdirSync(`/proc/${python.pid}/task`)
      .map(Number)
      .find((tid) => tid !== python.pid)
  await until(() => second() !== undefined)
  const faults = async () => (await look([python.pid, false, second() as number, false])).map((one) => one?.[5] as number)
  let before: number[] = []
  // Waits until the first thread sleeps.
  await until(async () => (await lookAt(python.pid))?.[2] === 'S' && (before = await faults()).length === 2)
  let after = before
  await until(async () => (after = await faults())[1]! > before[1]! + 100)
  t.ok(after[0]! - before[0]! < 100, `${after[0]! - before[0]!} of one that waits, ${after[1]! - before[1]!} of another`)
})

/** Starts a process with these ids that sleeps. */
async function sleeper(t: Test, ...args: string[]): Promise<number> {
  const { pid } = child(t, 'setpriv', [...args, 'sleep', '60'])
  await until(() => isCalled(pid, 'sleep'))
  return pid
}

const PLAIN = ['--reuid', `${USER}`, '--regid', `${GROUP}`]

t.test('the credentials of a thread: its ids, its groups and its capabilities', async (t) => {
  t.strictSame(await credentials(await sleeper(t, ...PLAIN, '--clear-groups'), [GROUP]), [USER, GROUP, 0n, 0, false], 'none')
  const groups = [4, 61002, 4294967294]
  const pid = await sleeper(t, ...PLAIN, '--groups', groups.join())
  t.strictSame(
    await credentials(pid, [61002, 6100, 61003, 4, 2, GROUP, 4294967294, 4294967295]),
    [USER, GROUP, 0n, 3, true, false, false, true, false, false, true, false],
    'only supplementary groups count, and only whole numbers',
  )
  t.strictSame(await credentials(pid), [USER, GROUP, 0n, 3], 'no group was asked for')
})

t.test('the capabilities that a thread has, not those that it might have', async (t) => {
  const caps = ['--inh-caps', '+dac_read_search,+sys_admin', '--ambient-caps', '+dac_read_search']
  t.strictSame(await credentials(await sleeper(t, ...PLAIN, '--clear-groups', ...caps)), [USER, GROUP, 1n << 2n, 0])
  const [, , all] = (await credentials(process.pid)) as ThreadCredentials
  t.equal(all & 0x3fn, 0x3fn, "root's")
  t.equal(all, BigInt(`0x${/^CapEff:\t(\w+)$/m.exec(readFileSync('/proc/self/status', 'latin1'))?.[1]}`))
})

t.test('the ids that a thread opens files with', async (t) => {
  // setfsuid and setfsgid, in a thread that otherwise stays root.
  const script = `import ctypes, time
libc = ctypes.CDLL(None)
libc.setfsgid(${GROUP})
libc.setfsuid(${USER})
print(flush=True)
time.sleep(60)`
  const python = child(t, 'python3', ['-c', script])
  await once(python.stdout as NodeJS.ReadableStream, 'data')
  // Scripts such as pyenv become python, so the pid is the same.
  const [fsuid, fsgid] = (await credentials(python.pid)) as ThreadCredentials
  t.strictSame([fsuid, fsgid], [USER, GROUP])
})

t.test('as many groups as there can be', async (t) => {
  const first = 1_000_000_000
  const script = `import os, time
os.setgroups(range(${first}, ${first + GROUPS_MAX}))
os.setgid(${GROUP})
os.setuid(${USER})
print(flush=True)
time.sleep(60)`
  const python = child(t, 'python3', ['-c', script])
  await once(python.stdout as NodeJS.ReadableStream, 'data')
  const last = first + GROUPS_MAX - 1
  t.strictSame(await credentials(python.pid, [first, last, first + 30_000, first - 1, last + 1, GROUP]), [
    USER,
    GROUP,
    0n,
    GROUPS_MAX,
    true,
    true,
    true,
    false,
    false,
    false,
  ])
})

t.test('reading many groups does not hold up a thread that does other work', async (t) => {
  const script = `import os, time
os.setgroups(range(1000000000, 1000000000 + ${GROUPS_MAX}))
print(flush=True)
time.sleep(60)`
  const python = child(t, 'python3', ['-c', script])
  await once(python.stdout as NodeJS.ReadableStream, 'data')
  let done = 0
  const began = processorNs()
  for (let i = 0; i < 20; i++) native.credentials(python.pid, [5], () => done++)
  t.equal(done, 0, 'nothing is known at once')
  await until(() => done === 20)
  const all = processorNs() - began
  const own = processorNs()
  for (let i = 0; i < 20; i++) readFileSync(`/proc/${python.pid}/status`)
  const read = processorNs() - own
  // This thread only had to begin it and to take the results.
  t.ok(all < read / 4, `${all / 1e6} ms of this thread's time, to read it here ${read / 1e6}`)
})

t.test('the user behind a user namespace, however deep namespaces are nested', async (t) => {
  const { pid: ours } = child(t, 'sleep', ['60'])
  t.equal(native.userNamespace(ours), undefined, 'ours')
  t.equal(native.userNamespace(NONE), undefined, 'a thread that is gone has none')
  const within = async (...program: string[]) => {
    const { pid } = child(t, program[0] as string, program.slice(1))
    await until(() => isCalled(pid, 'sleep'))
    return { of: native.userNamespace(pid), namespace: Number(/\d+/.exec(readlinkSync(`/proc/${pid}/ns/user`))) }
  }
  const made = ['unshare', '--user', '--map-root-user']
  const { of: roots, namespace } = await within(...made, 'sleep', '60')
  t.equal(roots, -namespace, "a namespace of root's counts for itself")
  const plain = ['setpriv', ...PLAIN, '--clear-groups']
  if (spawnSync('setpriv', [...plain.slice(1), ...made, 'true']).status !== 0) {
    t.comment('users may not make user namespaces here, so these cannot be tested')
    return
  }
  t.equal((await within(...plain, ...made, 'sleep', '60')).of, USER)
  t.equal((await within(...plain, ...made, ...made, ...made, 'sleep', '60')).of, USER, 'three')
  const { of, namespace: inner } = await within(...made, ...made, 'sleep', '60')
  t.ok((of as number) < 0 && of !== -inner, "nested namespaces of root's: the outermost counts")
})

t.test('a name is neither a group nor a capability', async (t) => {
  const { pid } = child(t, 'setpriv', [
    ...PLAIN,
    '--clear-groups',
    'sh',
    '-c',
    "printf '\\nGroups:\\t4 5' >/proc/$$/comm; while :; do sleep 1; done",
  ])
  await until(() => readFileSync(`/proc/${pid}/comm`, 'latin1').includes('Groups'))
  t.strictSame(await credentials(pid, [4, 5]), [USER, GROUP, 0n, 0, false, false])
})

t.test('a thread that is gone has no credentials', async (t) => {
  t.equal(await credentials(NONE, [1]), undefined)
  const gone = child(t, 'true', [])
  await once(gone, 'exit')
  t.equal(await credentials(gone.pid), undefined)
})

t.test('none of this keeps a descriptor open', async (t) => {
  const { pid } = child(t, 'sh', ['-c', 'while :; do :; done'])
  await until(async () => ((await lookAt(pid))?.[4] ?? -1) > 0)
  await sleep(10)
  const before = readdirSync('/proc/self/fd').length
  for (let i = 0; i < 50; i++) {
    await look([pid, true, NONE, true])
    await credentials(pid, [1])
  }
  // Those that other threads have open go when these get a processor.
  await until(() => readdirSync('/proc/self/fd').length === before)
  t.pass('as many as before')
})
