// SPDX-License-Identifier: MIT
import t from 'tap'

import { globPattern } from '../../../src/util/glob.js'

t.test('what a glob matches', async (t) => {
  for (const [glob, yes, no] of [
    ['13', ['13'], ['130', '113', '']],
    ['13*', ['13', '13p1', '13/x'], ['1', '213']],
    ['?', ['a', '.'], ['', 'ab']],
    ['[1-3]p[!12]', ['1p3', '3p9'], ['4p3', '1p1', '1p']],
    ['[]a]', [']', 'a'], ['b']],
    ['[^a]', ['b'], ['a']],
    ['[a\\]', ['a', '\\'], ['b']],
    ['a.b+(c|d)$', ['a.b+(c|d)$'], ['axb+(c|d)$']],
    ['\\*\\', ['*\\'], ['a\\', '*']],
    ['[', ['['], ['']],
    ['[z-a]', [], ['z', 'a', '[z-a]']],
    ['dm:*', ['dm:', 'dm:vm-root', 'dm:a\nb'], ['vm-root']],
  ] as const) {
    for (const name of yes) t.match(name, globPattern(glob), `${glob} matches ${JSON.stringify(name)}`)
    for (const name of no) t.notMatch(name, globPattern(glob), `${glob} does not match ${JSON.stringify(name)}`)
  }
})
