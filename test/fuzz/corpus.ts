/** Inputs that found something once, and how a long one is made short. */
import type { Input, Surface } from './surfaces.js'

export interface Case {
  readonly surface: string
  /** What it found, or what it is. */
  readonly about: string
  /** Each piece in hex, as the fuzzer prints it. */
  readonly pieces: readonly string[]
}

const TRIES_MAX = 400

/** What remains of a failing input when pieces are left out that it fails without. */
export async function smaller(surface: Surface, input: Input): Promise<Input> {
  let best = [...input]
  let tries = 0
  const fails = async (pieces: Input) => {
    try {
      await surface.check(pieces)
      return false
    } catch {
      return true
    }
  }
  for (let size = best.length >> 1; size >= 1; size >>= 1) {
    for (let at = 0; at < best.length && tries < TRIES_MAX; tries++) {
      const without = [...best.slice(0, at), ...best.slice(at + size)]
      if (without.length > 0 && (await fails(without))) best = without
      else at += size
    }
  }
  return best
}

export const CASES: readonly Case[] = []
