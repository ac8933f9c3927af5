// SPDX-License-Identifier: MIT
/** Inputs that found an error once, and the code that shortens a long one. */
import type { Input, Surface } from './surfaces.js'

export interface Case {
  readonly surface: string
  /** What it found, or what it is. */
  readonly about: string
  /** Each piece in hex, as the fuzzer prints it. */
  readonly pieces: readonly string[]
}

const TRIES_MAX = 400

/** What remains of a failing input after all pieces are left out that are not needed for the failure. */
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

export const CASES: readonly Case[] = [
  {
    surface: '/proc/TID/syscall',
    about: 'an address that is none',
    pieces: ['3420307830203078302030783020307830203078302030783020307837666664316132623363343820496e66696e6974790a'],
  },
  {
    surface: '/proc/TID/syscall',
    about: 'a call that is no number',
    pieces: ['3078342030783020307830203078302030783020307830203078302030783766666431613262336334382030783766313264346535613662370a'],
  },
  {
    surface: '/proc/TID/syscall',
    about: 'garbage is no proof that a call is over',
    pieces: ['78'],
  },
  {
    surface: '/proc/TID/syscall',
    about: 'a line that is cut off',
    pieces: ['34203078302030783020307830203078302030783020307830203078376666643161326233633438203078376631326434653561366237'],
  },
  {
    surface: 'shared memory',
    about: 'a pin with more callers than it has room for',
    pieces: ['184133000445000000'],
  },
  {
    surface: 'shared memory',
    about: 'a pin with so many callers that they would lie beyond the memory',
    pieces: ['1841330004ffffffff'],
  },
  {
    surface: 'pinStore',
    about: 'a socket of the last of several pins, and none of the others',
    pieces: ['01010132'],
  },
  {
    surface: 'pinStore',
    about: 'a place that is no number in decimal',
    pieces: ['010103307831'],
  },
  {
    surface: 'pinStore',
    about: 'a message without a text, which nobody took out',
    pieces: ['020100010131'],
  },
  {
    surface: 'pinStore',
    about: 'more than one descriptor',
    pieces: ['01030130'],
  },
  {
    surface: 'pinStore',
    about: 'several messages that are no pins',
    pieces: ['0301017802000000'],
  },
  {
    surface: 'FUSE requests',
    about: 'no descriptor is left for a look at xattrs',
    pieces: [
      '0108d65017',
      '015752968c',
      '002d000000010000004e0b000000000000010000000000000061ea00000000000062120000000000003136703100',
      '003000000017000000840b0000000000000200010000000000ffffffffe80300005d120000000000000000000000000000',
    ],
  },
]
