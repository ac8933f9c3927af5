// SPDX-License-Identifier: MIT
/** Intents: the daemon sees real processes in their calls, and none can make one call look like another. */
import { execFileSync, spawn } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { Intents, someCall, UNSEEN } from '../../src/gate/intent.js'
import { native, type SeenThread } from '../../src/native.js'
import { ROOT } from '../helpers/root.js'
import { until } from '../helpers/tree.js'
import { number, other } from '../helpers/syscalls.js'

const look = (tid: number, stack = false) =>
  new Promise<SeenThread | undefined>((resolve) => native.lookAtThreads([tid, stack], ([found]) => resolve(found)))

t.test('the call of a real process that sleeps is seen', async (t) => {
  const intents = new Intents(native)
  t.teardown(() => intents.close())
  const child = spawn('sleep', ['60'])
  t.teardown(() => child.kill())
  const pid = child.pid as number
  const nanosleep = other('clock_nanosleep')
  await until(() => intents.of(pid).number === nanosleep)
  const call = intents.of(pid)
  t.match(call, { intent: 'unknown', number: nanosleep })
  t.equal(intents.isSeen(call), true)
  t.equal(intents.of(pid).print, call.print, 'and in the same call the next time')
  t.equal(intents.mayStillBeIn(call, await look(pid)), true)
  t.equal(intents.mayStillBeIn(someCall('open', number('openat')), await look(pid)), false)
  const ended = new Promise((resolve) => child.on('exit', resolve))
  child.kill()
  await ended
  t.equal(intents.mayStillBeIn(call, await look(pid)), false, 'not after it has ended')
  t.equal(intents.of(pid), UNSEEN)
})

/** A FIFO. It keeps a process in open(2) until there is a writer. */
function fifo(t: Test): string {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-fifo-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  execFileSync('mkfifo', [join(directory, 'fifo')])
  return join(directory, 'fifo')
}

t.test('a real process in open(2) is seen to open', async (t) => {
  const path = fifo(t)
  const intents = new Intents(native)
  t.teardown(() => intents.close())
  const child = spawn('cat', [path])
  t.teardown(() => child.kill())
  const pid = child.pid as number
  // The process opens its libraries as well, but does not wait for a writer there.
  await until(async () => intents.of(pid).intent === 'open' && (await look(pid))?.[2] === 'S')
  const call = intents.of(pid)
  t.match(call, { intent: 'open', number: number('openat'), keeps: false, follows: true, locks: false })
  t.equal(intents.mayStillBeIn(call, await look(pid)), true)
  t.equal(intents.confirms(pid), true)
  const writer = await open(path, 'w')
  await until(async () => !intents.mayStillBeIn(call, await look(pid)))
  t.match(intents.of(pid), { intent: 'unknown' }, 'then it reads')
  await writer.close()
})

t.test('a real process cannot make a 32-bit open look like a 64-bit fstat', async (t) => {
  if (process.arch !== 'x64') {
    t.pass('int 0x80', { skip: `is not on ${process.arch}` })
    return
  }
  const path = fifo(t)
  const program = join(path, '../entry')
  execFileSync('cc', ['-O2', '-o', program, join(ROOT, 'test/helpers/entry.c')])
  const intents = new Intents(native)
  t.teardown(() => intents.close())
  const opener = async (how: string) => {
    const child = spawn(program, [how, path], { stdio: 'ignore' })
    t.teardown(() => child.kill())
    const pid = child.pid as number
    // A kernel that makes no 32-bit calls ends it with a signal.
    const hasEnded = () => child.exitCode !== null || child.signalCode !== null
    await until(async () => hasEnded() || /fifo_open|wait_for_partner/.test((await look(pid, true))?.[1] ?? ''))
    return hasEnded() ? undefined : pid
  }
  const plain = await opener('syscall')
  if (plain === undefined) throw new Error('it did not open')
  t.match(
    intents.of(plain),
    { intent: 'open', number: number('openat') },
    'a path below 4 GiB, in a call that the stack shows to be a 64-bit one',
  )
  const int80 = await opener('int80')
  if (int80 === undefined) {
    t.pass('int 0x80', { skip: 'this kernel makes no 32-bit calls' })
    return
  }
  t.match(intents.of(int80), { intent: 'unknown', number: 5 }, 'a 32-bit open')
  const dressed = (await opener('dressed')) as number
  const call = intents.of(dressed)
  t.match(call, { intent: 'inspect', number: number('fstat') }, 'made up to look like fstat')
  t.equal(intents.confirms(dressed), false, 'but the stack shows otherwise')
  t.equal(intents.confirms(plain), true)
  t.equal(intents.mayStillBeIn(call, await look(dressed)), true, 'it is followed like any other call')
})
