// SPDX-License-Identifier: MIT
/**
 * The source of the generators' decisions: a generator of random numbers, for volume; or a tape of
 * bytes, which fast-check can shorten. In doubt they take the first and simplest possibility, which
 * is also what an ended tape gives.
 */
export abstract class Choices {
  /** 0 to n-1; n is 2^32 at most. */
  abstract below(n: number): number

  /** True once in `n` times. */
  oneIn(n: number): boolean {
    return this.below(n) === n - 1
  }

  pick<T>(from: readonly T[]): T {
    return from[this.below(from.length)] as T
  }

  u64(): bigint {
    return (BigInt(this.below(2 ** 32)) << 32n) | BigInt(this.below(2 ** 32))
  }

  bytes(length: number): Buffer {
    const bytes = Buffer.alloc(length)
    for (let i = 0; i < length; i++) bytes[i] = this.below(256)
    return bytes
  }

  /** One character for each byte. */
  text(length: number): string {
    return this.bytes(length).toString('latin1')
  }
}

/** The same seed makes the same decisions (sfc32). */
export class Random extends Choices {
  private a: number
  private b = 0x9e3779b9
  private c = 0x243f6a88
  private counter = 1

  constructor(seed: number) {
    super()
    this.a = seed | 0
    for (let i = 0; i < 15; i++) this.next()
  }

  private next(): number {
    const sum = (this.a + this.b + this.counter++) | 0
    this.a = this.b ^ (this.b >>> 9)
    this.b = (this.c + (this.c << 3)) | 0
    this.c = (((this.c << 21) | (this.c >>> 11)) + sum) | 0
    return sum >>> 0
  }

  below(n: number): number {
    return Math.floor((this.next() / 2 ** 32) * n)
  }
}

export class Tape extends Choices {
  private at = 0

  constructor(private readonly tape: Uint8Array) {
    super()
  }

  below(n: number): number {
    let value = 0
    for (let room = 1; room < n; room *= 256) value = value * 256 + (this.tape[this.at++] ?? 0)
    return value % n
  }
}
