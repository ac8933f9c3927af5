// SPDX-License-Identifier: MIT
/** The interface file is what calls are checked by: it is read as varlink has it, and values are compared with it. */
import { readFileSync } from 'node:fs'

import t from 'tap'

import { Interface, type Type } from '../../../src/broker/idl.js'

const TEXT = `# About it
interface org.example.some-thing

# A comment
type Colour (red, green) # another one
type Point (x: int, y: ?float, colour: Colour, tags: []string, more: [string]int, any: object)
method Move(point: Point, inline: ?(a: bool, b: (one, two))) -> (points: []Point)
method Nothing() -> ()
error Stuck(why: string)
`

const read = new Interface(TEXT)
const point = (type = 'Point'): Type => ({ kind: 'named', name: type })
const POINT = { x: 1, y: 1.5, colour: 'red', tags: ['a'], more: { b: 2 }, any: {} }

t.test('members', async (t) => {
  t.equal(read.name, 'org.example.some-thing')
  t.equal(read.text, TEXT)
  t.strictSame([...read.types.keys()], ['Colour', 'Point'])
  t.strictSame([...read.methods.keys()], ['Move', 'Nothing'])
  t.strictSame([...read.errors.keys()], ['Stuck'])
  t.strictSame(read.methods.get('Nothing')?.gives, { kind: 'struct', fields: new Map() })
})

t.test('values that are of their types', async (t) => {
  for (const value of [POINT, { ...POINT, y: null }, { ...POINT, y: undefined }, { ...POINT, tags: [], more: {} }]) {
    t.equal(read.mismatch(value, point()), undefined)
  }
  const move = read.methods.get('Move')?.takes as Type
  t.equal(read.mismatch({ point: POINT }, move), undefined)
  t.equal(read.mismatch({ point: POINT, inline: { a: true, b: 'two' } }, move), undefined)
})

t.test('values that are not, by the path of what is wrong', async (t) => {
  for (const [value, path] of [
    [{ ...POINT, x: 1.5 }, 'x'],
    [{ ...POINT, x: 2 ** 53 }, 'x'],
    [{ ...POINT, x: '1' }, 'x'],
    [{ ...POINT, y: 'much' }, 'y'],
    [{ ...POINT, colour: 'blue' }, 'colour'],
    [{ ...POINT, tags: ['a', 1] }, 'tags.1'],
    [{ ...POINT, tags: {} }, 'tags'],
    [{ ...POINT, more: { b: true } }, 'more.b'],
    [{ ...POINT, more: [] }, 'more'],
    [{ ...POINT, any: 1 }, 'any'],
    [{ ...POINT, unknown: 1 }, 'unknown'],
    [{ x: 1 }, 'colour'],
    [JSON.parse('{"__proto__": 1}'), 'x'],
  ] as const) {
    t.equal(read.mismatch(value, point()), path, JSON.stringify(value))
  }
  for (const value of [null, [], 'text', 1, undefined]) t.equal(read.mismatch(value, point()), '', JSON.stringify(value))
})

t.test('what is no interface is refused, with the line', async (t) => {
  for (const [text, says] of [
    ['', /line 1: "interface" expected/],
    ['interface a.b\nmethod M(', /line 2: a name expected/],
    ['interface a.b\nmethod M() (', /line 2: "->" expected/],
    ['interface a.b\nthing M()', /line 2: "thing" is no member/],
    ['interface a.b\ntype T (a: int b: int)', /line 2: "," or "\)" expected after a/],
    ['interface a.b\ntype T (a: int, b)', /some have types, and some have none/],
    ['interface a.b\nmethod M(a) -> ()', /each of these needs a type/],
  ] as const) {
    t.throws(() => new Interface(text), { message: says }, text)
  }
  const unknown = new Interface('interface a.b\ntype T (a: Other)')
  t.throws(() => unknown.mismatch({ a: 1 }, point('T')), /no type Other/)
})

t.test('the interface of the control socket', async (t) => {
  const own = new Interface(readFileSync(new URL('../../../src/broker/io.diskseqfs.varlink', import.meta.url), 'utf8'))
  t.equal(own.name, 'io.diskseqfs')
  t.strictSame([...own.methods.keys()], ['Attach', 'Release', 'ListLeases', 'Status', 'ListPins'])
})
