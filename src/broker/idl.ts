// SPDX-License-Identifier: MIT
/**
 * Interface definitions of varlink (varlink.org/Interface-Definition), and whether values are of their types: the
 * interface file is what calls are checked by.
 */

export type Type =
  | { readonly kind: 'bool' | 'int' | 'float' | 'string' | 'object' }
  | { readonly kind: 'array' | 'map' | 'maybe'; readonly of: Type }
  | { readonly kind: 'struct'; readonly fields: ReadonlyMap<string, Type> }
  | { readonly kind: 'enum'; readonly values: readonly string[] }
  | { readonly kind: 'named'; readonly name: string }

type Struct = Extract<Type, { kind: 'struct' }>

export interface Method {
  readonly takes: Struct
  readonly gives: Struct
}

export class Interface {
  readonly name: string
  readonly types = new Map<string, Type>()
  readonly methods = new Map<string, Method>()
  readonly errors = new Map<string, Struct>()

  /**
   * @param text as GetInterfaceDescription replies with it
   * @throws Error with the place of what is wrong
   */
  constructor(readonly text: string) {
    const parser = new Parser(text)
    parser.expect('interface')
    this.name = parser.word()
    while (!parser.atEnd) {
      const what = parser.word()
      const name = parser.word()
      if (what === 'type') this.types.set(name, parser.type())
      else if (what === 'error') this.errors.set(name, parser.struct())
      else if (what === 'method') {
        const takes = parser.struct()
        parser.expect('->')
        this.methods.set(name, { takes, gives: parser.struct() })
      } else throw parser.wrong(`"${what}" is no member`)
    }
  }

  /** @returns the path of the first part of a value that is not of a type, `lease.rule`; undefined where all is */
  mismatch(value: unknown, type: Type, path = ''): string | undefined {
    const each = (found: Iterable<readonly [string, unknown]>, of: (key: string) => Type | undefined) => {
      for (const [key, part] of found) {
        const at = path === '' ? key : `${path}.${key}`
        const expected = of(key)
        const wrong = expected === undefined ? at : this.mismatch(part, expected, at)
        if (wrong !== undefined) return wrong
      }
      return undefined
    }
    const ok = (holds: boolean) => (holds ? undefined : path)
    switch (type.kind) {
      case 'bool':
        return ok(typeof value === 'boolean')
      case 'int':
        return ok(Number.isSafeInteger(value))
      case 'float':
        return ok(typeof value === 'number')
      case 'string':
        return ok(typeof value === 'string')
      case 'object':
        return ok(isObject(value))
      case 'enum':
        return ok(typeof value === 'string' && type.values.includes(value))
      case 'maybe':
        return value === undefined || value === null ? undefined : this.mismatch(value, type.of, path)
      case 'array':
        return Array.isArray(value) ? each(Object.entries(value), () => type.of) : path
      case 'map':
        return isObject(value) ? each(Object.entries(value), () => type.of) : path
      case 'named': {
        const named = this.types.get(type.name)
        if (named === undefined) throw new Error(`${this.name} has no type ${type.name}`)
        return this.mismatch(value, named, path)
      }
      case 'struct': {
        if (!isObject(value)) return path
        const all = new Map([...[...type.fields.keys()].map((key) => [key, undefined] as const), ...Object.entries(value)])
        return each(all, (key) => type.fields.get(key))
      }
    }
  }
}

export const isObject = (value: unknown): value is Readonly<Record<string, unknown>> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

const BASIC = ['bool', 'int', 'float', 'string', 'object'] as const

class Parser {
  /** Words, arrows, brackets and other signs, without comments. */
  private readonly tokens: { readonly text: string; readonly line: number }[] = []
  private at = 0

  constructor(text: string) {
    for (const [i, line] of text.split('\n').entries()) {
      for (const [token] of line.replace(/#.*/, '').matchAll(/[A-Za-z][\w.-]*\w|[A-Za-z]|->|\[string\]|\[\]|\S/g)) {
        this.tokens.push({ text: token, line: i + 1 })
      }
    }
  }

  get atEnd(): boolean {
    return this.at === this.tokens.length
  }

  wrong(what: string): Error {
    return new Error(`line ${this.tokens[Math.min(Math.max(0, this.at - 1), this.tokens.length - 1)]?.line ?? 1}: ${what}`)
  }

  word(): string {
    const token = this.tokens[this.at++]?.text ?? ''
    if (!/^[A-Za-z]/.test(token)) throw this.wrong(`a name expected, not "${token}"`)
    return token
  }

  expect(token: string): void {
    if (!this.accept(token)) throw this.wrong(`"${token}" expected`)
  }

  struct(): Struct {
    const type = this.list()
    if (type.kind !== 'struct') throw this.wrong('each of these needs a type')
    return type
  }

  type(): Type {
    if (this.accept('?')) return { kind: 'maybe', of: this.type() }
    if (this.accept('[]')) return { kind: 'array', of: this.type() }
    if (this.accept('[string]')) return { kind: 'map', of: this.type() }
    if (this.tokens[this.at]?.text === '(') return this.list()
    const name = this.word()
    const basic = BASIC.find((each) => each === name)
    return basic === undefined ? { kind: 'named', name } : { kind: basic }
  }

  /** (a: int, b: string), or (one, two). */
  private list(): Struct | Extract<Type, { kind: 'enum' }> {
    const fields = new Map<string, Type>()
    const values: string[] = []
    this.expect('(')
    while (!this.accept(')')) {
      const name = this.word()
      if (this.accept(':')) fields.set(name, this.type())
      else values.push(name)
      if (!this.accept(',') && this.tokens[this.at]?.text !== ')') throw this.wrong(`"," or ")" expected after ${name}`)
    }
    if (values.length > 0 && fields.size > 0) throw this.wrong('some have types, and some have none')
    return values.length > 0 ? { kind: 'enum', values } : { kind: 'struct', fields }
  }

  private accept(token: string): boolean {
    if (this.tokens[this.at]?.text !== token) return false
    this.at++
    return true
  }
}
