/** Whether the kernel preempts itself, by what it says of that. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t from 'tap'

import { kernelPreempts } from '../src/preemption.js'

const DYNAMIC = '#1 SMP PREEMPT_DYNAMIC Debian 6.12.57-1 (2025-11-05)'

t.test('a kernel that can be told says how it is now', async (t) => {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-modes-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  const modes = join(directory, 'preempt')
  for (const [text, expected] of [
    ['(none) voluntary full ', false],
    ['none (voluntary) full ', false],
    ['none voluntary (full) ', true],
    ['full (lazy) ', true],
    ['', true],
  ] as const) {
    writeFileSync(modes, `${text}\n`)
    t.equal(kernelPreempts(modes, DYNAMIC), expected, text)
  }
})

t.test('where that cannot be read, what it was built for', async (t) => {
  for (const [kernel, expected] of [
    ['#1 SMP Debian 5.10.249-1', false],
    [DYNAMIC, true],
    ['#1 SMP PREEMPT_RT Debian 6.12.57-1', true],
    ['#1 SMP PREEMPT Debian', true],
  ] as const) {
    t.equal(kernelPreempts('/nowhere', kernel), expected, kernel)
  }
  t.type(kernelPreempts(), 'boolean', 'this one')
})
