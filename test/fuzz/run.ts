// SPDX-License-Identifier: MIT
/**
 * The long form: as many inputs as wanted, with the same checks as the short one.
 *
 *   make fuzz [INPUTS=10000000] [SEED=n] [SURFACE=name]
 */
import { setTimeout as sleep } from 'node:timers/promises'

import { type Ended, ended, guardFuzzPath, node } from '../helpers/sanitized.js'
import { Random } from './choices.js'
import { smaller } from './corpus.js'
import { generate, SURFACES, type Surface } from './surfaces.js'

const [inputs = '10000000', seed = String(Date.now() % 2 ** 31), only] = process.argv.slice(2)
/** Shares of all inputs. A surface that needs a world for each input gets fewer. */
const SHARES: Readonly<Record<string, number>> = { 'FUSE requests': 60, uevents: 10, names: 10, sysfs: 6, 'hand-over': 1 }
const shown = SURFACES.filter(({ name }) => only === undefined || name === only)
const shares = shown.map(({ name }) => SHARES[name] ?? 2)
const all = shares.reduce((sum, share) => sum + share, 0)

/** How much more memory may be in use after a surface than before it, in MiB: code and caches. */
const GROWTH_MAX = 8
/** How long a timer of the log keeps a world that is over, in ms. */
const LOG_LIMIT_MS = 1100

/**
 * Memory in use once garbage is gone, and resident memory, in MiB. The C library keeps more or less
 * of what was freed, so resident memory says little about leaks.
 */
async function memory(): Promise<{ used: number; resident: number }> {
  await sleep(LOG_LIMIT_MS)
  gc?.()
  await sleep(100) // buffers are freed on another thread
  gc?.()
  const { heapUsed, external, rss } = process.memoryUsage()
  return { used: (heapUsed + external) / 2 ** 20, resident: rss / 2 ** 20 }
}

let failures = 0
let uncaught: Error | undefined
process.on('uncaughtException', (error) => (uncaught ??= error))

/** @returns how many inputs there were */
async function fuzz(surface: Surface, count: number, from: number): Promise<number> {
  let done = 0
  const one = async (own: number) => {
    // Each input has a seed of its own, from which it can be made again.
    const input = generate(surface, new Random(own))
    done += input.length
    try {
      await surface.check(input)
      // If several are under way, it may be the failure of another input.
      if (uncaught !== undefined) throw uncaught
    } catch (error) {
      uncaught = undefined
      failures++
      console.log(`\n${surface.name}, seed ${own}: ${(error as Error).stack}`)
      for (const piece of await smaller(surface, input)) console.log(`  ${piece.toString('hex')}`)
    }
  }
  const { atOnce = 1 } = surface
  for (let own = from; done < count && failures < 10; own += atOnce) {
    await Promise.all(Array.from({ length: atOnce }, (_, i) => one(own + i)))
  }
  return done
}

console.log(`seed ${seed}`)
// Runs until memory is as full as it gets.
for (const surface of shown) await fuzz(surface, Math.max(surface.pieces * 300, 20_000), Number(seed))
const row = (...cells: string[]) => console.log(cells.map((cell, i) => (i === 0 ? cell.padEnd(20) : cell.padStart(14))).join(''))
row('surface', 'inputs', 'per second', 'failures', 'MiB in use', 'afterwards', 'MiB resident', 'afterwards')
let total = 0
for (const [i, surface] of shown.entries()) {
  const before = await memory()
  const known = failures
  const began = performance.now()
  const done = await fuzz(surface, Math.ceil((Number(inputs) * (shares[i] as number)) / all), Number(seed) + 1_000_000 * i)
  const seconds = (performance.now() - began) / 1000
  const after = await memory()
  if (after.used > before.used + GROWTH_MAX) {
    failures++
    console.log(`${surface.name}: ${(after.used - before.used).toFixed(1)} MiB more are in use`)
  }
  total += done
  const figures = [before.used, after.used, before.resident, after.resident].map((figure) => figure.toFixed(1))
  row(surface.name, String(done), (done / seconds).toFixed(0), String(failures - known), ...figures)
}

/** Programs with sanitizers run in processes of their own. */
async function sanitized(name: string, run: () => Promise<Ended & { leaks?: string[] }>): Promise<void> {
  if (only !== undefined && only !== name) return
  const began = performance.now()
  const { code, out, err, leaks = [] } = await run()
  const bad = code !== 0 || leaks.length > 0
  if (bad) console.log(`${name}: ${code}\n${out}${leaks.join('\n') || err}`)
  const { inputs: done } = JSON.parse(bad ? '{"inputs":0}' : out) as { inputs: number }
  if (bad) failures++
  total += done
  row(name, String(done), ((1000 * done) / (performance.now() - began)).toFixed(0), String(Number(bad)))
}
const few = String(Math.ceil(Number(inputs) / 100))
await sanitized('addon (sanitizers)', () => node('addon.js', few, seed))
await sanitized('guard (sanitizers)', () => ended(guardFuzzPath(), ['run', few, seed]))
row('all', String(total), '', String(failures))
process.exit(failures > 0 ? 1 : 0)
