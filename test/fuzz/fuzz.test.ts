// SPDX-License-Identifier: MIT
/**
 * Garbage on each input: nothing throws, nothing hangs, nothing is left over, and input that is not
 * understood has the harmless reading. The inputs and the rules are in test/fuzz/; the long form is
 * `make fuzz`.
 */
import fc from 'fast-check'
import t, { type Test } from 'tap'

import { Message, Opcode } from '../../src/fuse/wire.js'
import { nodeName, parseName } from '../../src/devices/names.js'
import { Intents, someCall } from '../../src/gate/intent.js'
import { PinOpener } from '../../src/gate/pin.js'
import { FuseSession } from '../../src/fuse/session.js'
import { SharedState } from '../../src/handover/shared-state.js'
import { LONG, twoForms } from '../helpers/long.js'
import { Random, Tape } from './choices.js'
import { CASES, smaller } from './corpus.js'
import { generate, type Input, names, requests, state, type Surface, SURFACES, syscallFiles } from './surfaces.js'

/** Differs in each run; FUZZ_SEED repeats a run. */
const SEED = Number(process.env['FUZZ_SEED'] ?? Date.now() % 2 ** 31)

/** How long each surface is fuzzed, in ms: with inputs that can be shortened, then with many others. */
const SHRINKABLE_MS = 400
const MANY_MS: Readonly<Record<string, number>> = LONG ? { 'FUSE requests': 7000, 'hand-over': 3000 } : {}
const MANY_OTHERS_MS = 500

const hex = (input: Input) => input.map((piece) => piece.toString('hex')).join('\n')

t.test('inputs that found an error once', async (t) => {
  for (const { surface: name, about, pieces } of CASES) {
    const surface = SURFACES.find((each) => each.name === name)
    try {
      await surface?.check(pieces.map((piece) => Buffer.from(piece, 'hex')))
      t.ok(surface, `${name}: ${about}`)
    } catch (error) {
      t.fail(`${name}: ${about}: ${(error as Error).message}`)
    }
  }
})

t.test('seeds that stay the same', async (t) => {
  for (const surface of SURFACES) {
    for (let seed = 1; seed <= (surface.pieces > 1 ? 5 : 200); seed++) {
      try {
        await surface.check(generate(surface, new Random(seed)))
      } catch (error) {
        t.fail(`${surface.name}, seed ${seed}: ${(error as Error).message}`)
      }
    }
  }
})

/** A tape for each piece, so that the number of pieces and each piece can be reduced. */
const inputs = (surface: Surface) =>
  fc
    .array(fc.uint8Array({ maxLength: 300 }), { minLength: 1, maxLength: Math.min(surface.pieces, 60) })
    .map((tapes): Input => tapes.map((tape, i) => surface.piece(new Tape(tape), i)))

for (const surface of SURFACES) {
  t.test(twoForms(`${surface.name}: whatever comes`), async (t) => {
    const run = await fc.check(
      fc.asyncProperty(inputs(surface), async (input) => surface.check(input)),
      { seed: SEED, numRuns: 1e6, interruptAfterTimeLimit: SHRINKABLE_MS, skipEqualValues: false },
    )
    if (run.counterexample !== null) t.fail(`seed ${SEED}: ${run.errorInstance}\n${hex(run.counterexample[0])}`)
    const until = performance.now() + (MANY_MS[surface.name] ?? MANY_OTHERS_MS)
    let count = 0
    let failed = false
    for (let i = 0; performance.now() < until && !failed; i++) {
      const input = generate(surface, new Random(SEED + i))
      count += input.length
      try {
        await surface.check(input)
      } catch (error) {
        failed = true
        t.fail(`seed ${SEED + i}: ${(error as Error).message}\n${hex(await smaller(surface, input))}`)
      }
    }
    t.pass(`seed ${SEED}: ${run.numRuns} inputs that could be shortened, ${count} others`)
  })
}

/**
 * The fuzzer must find this error in a daemon with one defence less. It may find another error first, as timing differs between machines.
 */
async function finds(t: Test, surface: Surface, what: RegExp): Promise<void> {
  let last = 'nothing'
  for (let i = 0; i < 200_000 / surface.pieces; i++) {
    try {
      await surface.check(generate(surface, new Random(i)))
    } catch (error) {
      last = (error as Error).message
      if (!what.test(last)) continue
      t.pass(last.split('\n')[0] as string)
      return
    }
  }
  t.fail(`found ${last}, not ${what}`)
}

/** Any length is enough. */
class Endless extends Message {
  override get bodySize() {
    return Infinity
  }
}

t.test('twin: bodies whose size is not checked', async (t) => {
  class Trusting extends FuseSession {
    override handle(message: Message, slot?: number) {
      return super.handle(new Endless(message.bytes, message.length), slot)
    }
  }
  await finds(t, requests({ session: Trusting }), /a request failed unexpectedly: RangeError/)
})

t.test('twin: a request that is answered twice', async (t) => {
  class Talkative extends FuseSession {
    override send(unique: bigint, error: number, payload: number) {
      super.send(unique, error, payload)
      return super.send(unique, error, payload)
    }
  }
  await finds(t, requests({ session: Talkative }), /an answer that nobody waits for/)
})

t.test('twin: a pin that is taken to be unchanged', async (t) => {
  class Believing extends PinOpener {
    override current() {
      return true
    }
  }
  await finds(t, requests({ opener: Believing }), /a caller may open what is not pinned/)
})

t.test('twin: memory whose numbers are believed', async (t) => {
  const believing = (memory: ArrayBuffer) =>
    Object.assign(new SharedState(memory), { callers: (at: number) => new DataView(memory).getUint32(at + 8, true) })
  await finds(t, state(believing), /was not written down|outside the bounds/)
})

t.test('twin: names that are parsed too leniently', async (t) => {
  const kind = (text: string) => parseName(text.trim().replace(/^0+/, ''))
  await finds(t, names(kind), /is no name/)
  t.equal(kind(` ${nodeName(13n as never, 1)}`)?.diskseq, 13n)
})

t.test('twin: a line of /proc/TID/syscall that is not checked closely', async (t) => {
  const lax = syscallFiles((native) =>
    Object.assign(new Intents(native), {
      parse: (_: number, line: Buffer) => {
        const number = Number.parseInt(line.toString('latin1'), 10)
        return { ...someCall('inspect', number), intent: native.syscalls['openat'] === number ? 'open' : 'inspect' }
      },
    }),
  )
  await finds(t, lax, /is unknown, not inspect/)
})

t.test('twin: numbers that are believed beside any pointer', async (t) => {
  const believing = syscallFiles((native) => Object.assign(new Intents(native), { confirms: () => true }))
  await finds(t, believing, /is unknown, not (inspect|open)/)
})

t.test('twin: a LOOKUP that waits', async (t) => {
  class Waiting extends FuseSession {
    override handle(message: Message, slot?: number) {
      const { opcode } = message.header()
      if (opcode !== Opcode.LOOKUP) return super.handle(message, slot)
      const own = new Message(Buffer.from(message.bytes), message.length)
      setImmediate(() => super.handle(own))
      return undefined
    }
  }
  await finds(t, requests({ session: Waiting }), /a LOOKUP waits/)
})
