// SPDX-License-Identifier: MIT
/** Errnos by name, and errors that say what was wrong and what to do. */
import { constants } from 'node:os'

/** linux/errno.h; positive numbers. */
export const E = constants.errno

/** EOPNOTSUPP and ENOTSUP are one number on Linux; Node knows it by this name. */
export const EOPNOTSUPP = constants.errno.EOPNOTSUPP

/** asm-generic/errno.h; Node does not know it. */
export const ENOMEDIUM = 123

const names = new Map<number, string>([[ENOMEDIUM, 'ENOMEDIUM']])
for (const [name, number] of Object.entries(constants.errno)) {
  if (!names.has(number)) names.set(number, name)
}

/** `ENOENT` for 2 or -2. */
export function errnoName(errno: number): string {
  const number = Math.abs(errno)
  return names.get(number) ?? `errno ${number}`
}

/** An error for a person: its message is one line and needs no stack trace. */
export class UserError extends Error {
  override readonly name: string = 'UserError'
  constructor(
    message: string,
    /** Exit code of the command: 1 what was asked cannot be done, 2 it was asked wrongly; others as a command says. */
    readonly exitCode = 1,
  ) {
    super(message)
  }
}

/** The daemon has run out of descriptors or memory: that says nothing about what it wanted to look at. */
export class Exhausted extends Error {
  override readonly name = 'Exhausted'
  constructor(readonly errno: number) {
    super(`out of resources: ${errnoName(errno)}`)
  }

  /**
   * @param result what a system call returned: >= 0, or a negated errno
   * @throws Exhausted
   */
  static check(result: number): void {
    if (result === -E.EMFILE || result === -E.ENFILE || result === -E.ENOMEM) throw new Exhausted(-result)
  }
}

/** The errno of a failed Node file system call, rethrowing whatever is not one. */
export function errnoOf(error: unknown): number {
  if (error instanceof Error && 'errno' in error && typeof error.errno === 'number') {
    return Math.abs(error.errno)
  }
  throw error
}
