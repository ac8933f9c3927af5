// SPDX-License-Identifier: MIT
/**
 * The addon and the guard with sanitizers: whatever input comes, nothing is read or written where
 * it must not be. The long form is `make fuzz`.
 */
import { spawn } from 'node:child_process'

import t, { type Test } from 'tap'

import { changedGuardSources, twinGuard } from '../helpers/guard.js'
import { ended, guardFuzzPath, guardPath, node } from '../helpers/sanitized.js'
import { cleanup, descriptors, sleep, until } from '../helpers/tree.js'

const SEED = Number(process.env['FUZZ_SEED'] ?? Date.now() % 2 ** 31)

t.test('the addon, whatever it is called with', async (t) => {
  t.comment(`seed ${SEED}`)
  const { code, out, err, leaks } = await node('addon.js', '30000', String(SEED))
  t.equal(code, 0, err.slice(0, 4000))
  t.match(JSON.parse(out || '{}'), { descriptors: 0 })
  t.strictSame(leaks, [])
})

t.test('an environment that ends while the addon is at work for it', async (t) => {
  const { code, err } = await node('ends.js', '20', String(SEED))
  t.equal(code, 0, `seed ${SEED}: ${err.slice(0, 4000)}`)
})

for (const [twin, says] of [
  ['overrun', 'heap-buffer-overflow'],
  ['useAfterFree', 'heap-use-after-free'],
  ['overflow', 'signed integer overflow'],
] as const) {
  t.test(`twin: ${twin} in the addon does not go unnoticed`, async (t) => {
    const { code, err } = await node('addon.js', '0', '0', twin)
    t.equal(code, null, 'SIGABRT')
    t.match(err, says)
  })
}

t.test('twin: a leak in the addon does not go unnoticed', async (t) => {
  const { leaks } = await node('addon.js', '0', '0', 'leak')
  t.match(leaks, [/471100 byte/])
})

t.test('the functions of the guard, whatever they are called with', async (t) => {
  t.comment(`seed ${SEED}`)
  const { code, out, err } = await ended(guardFuzzPath(), ['run', '5000', String(SEED)])
  t.equal(code, 0, out + err.slice(0, 4000))
  t.match(JSON.parse(out || '{}'), { accepted: Number, requests: Number })
})

t.test('twin: a guard that believes how many slots are in use', async (t) => {
  const sources = changedGuardSources(t, ['return count < slots->count ? count : slots->count;', 'return count;'])
  const { code, err } = await ended(guardFuzzPath(sources), ['run', '5000', '1'])
  t.not(code, 0)
  t.match(err, 'AddressSanitizer')
})

/** A guard that starts daemons which say anything, and a line for each daemon that has got to its end. */
function spoken(t: Test, program: string) {
  // Otherwise the guard would take a daemon that says nothing more for one that hangs.
  const never = ['-h', '4000000000', '-a', '4000000000']
  const daemon = [guardFuzzPath(), 'speak', '2000', String(SEED)]
  const guard = spawn(program, [...never, ...daemon], { stdio: ['ignore', 'pipe', 'pipe'] })
  cleanup(t, () => guard.kill('SIGKILL'))
  const heard = { said: '', out: '' }
  guard.stderr.on('data', (chunk: Buffer) => (heard.said += chunk.toString()))
  guard.stdout.on('data', (chunk: Buffer) => (heard.out += chunk.toString()))
  return { guard, heard }
}

t.test('a guard that runs, whatever daemons say', async (t) => {
  const { guard, heard } = spoken(t, guardPath())
  const fds = () => descriptors(guard.pid as number).length
  await until(() => heard.out.split('\n').length > 2, 20_000)
  const before = fds()
  await until(() => heard.out.split('\n').length > 4, 60_000)
  await until(() => fds() <= before)
  t.equal(guard.exitCode, null, `seed ${SEED}: it goes on`)
  t.notMatch(heard.said, /Sanitizer|runtime error/)
})

t.test('twin: if an empty message is taken for its end, no daemon gets there', async (t) => {
  const { guard, heard } = spoken(t, twinGuard(t, '    if (n == 0 && !has_hung_up(daemon->socket)) return;\n', ''))
  await sleep(5000)
  t.strictSame([guard.exitCode, heard.out], [null, ''], `seed ${SEED}`)
})
