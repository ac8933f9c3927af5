// SPDX-License-Identifier: MIT
/** Whether the kernel preempts itself, according to what it shows. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'

import t, { type Test } from 'tap'

import { kernelPreempts } from '../../../src/gate/preemption.js'

const DYNAMIC = '#1 SMP PREEMPT_DYNAMIC Debian 6.12.57-1 (2025-11-05)'

interface Said {
  readonly modes?: string
  readonly commandLine?: string
  readonly config?: string
  readonly packed?: string | Buffer
  readonly version?: string
  readonly release?: string
}

/** The result for a kernel that shows that, and nothing else. */
function found(t: Test, { modes, commandLine, config, packed, version = DYNAMIC, release = '6.12.57' }: Said): boolean {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-modes-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  const put = (name: string, content: string | Buffer | undefined) => {
    if (content !== undefined) writeFileSync(join(directory, name), content)
    return join(directory, name)
  }
  return kernelPreempts({
    modes: put('preempt', modes),
    commandLine: put('cmdline', commandLine),
    configs: [put('config.gz', packed), put('config', config)],
    version,
    release,
  })
}

/** The results for each text, if the kernel shows it in that place. */
function foundFor(t: Test, said: (text: string) => Said, rows: readonly (readonly [text: string, expected: boolean])[]): void {
  for (const [text, expected] of rows) t.equal(found(t, said(text)), expected, text)
}

t.test('a kernel that can be switched shows its present mode', async (t) => {
  foundFor(t, (modes) => ({ modes }), [
    ['(none) voluntary full \n', false],
    ['none (voluntary) full \n', false],
    ['none voluntary (full) \n', true],
    ['full (lazy) \n', true],
    ['\n', true],
  ])
  t.equal(found(t, { modes: 'none voluntary (full)\n', commandLine: 'preempt=none', config: 'CONFIG_PREEMPT_NONE=y\n' }), true)
})

t.test('if that cannot be read, the command line counts', async (t) => {
  foundFor(t, (commandLine) => ({ commandLine }), [
    ['quiet preempt=none\n', false],
    ['preempt=voluntary quiet\n', false],
    ['preempt=full\n', true],
    ['preempt=none preempt=full\n', true],
    ['xpreempt=none\n', true],
  ])
  t.equal(found(t, { commandLine: 'preempt=full', config: 'CONFIG_PREEMPT_NONE=y\n' }), true)
  for (const other of [{ release: '7.0.1' }, { version: '#1 SMP PREEMPT_RT' }, { version: '#1 SMP PREEMPT' }]) {
    t.equal(found(t, { commandLine: 'preempt=none', ...other }), true, 'a kernel that ignores that option')
  }
})

t.test('otherwise the configuration counts', async (t) => {
  foundFor(t, (config) => ({ commandLine: 'quiet', config }), [
    ['CONFIG_PREEMPT_BUILD=y\nCONFIG_PREEMPT_NONE=y\n# CONFIG_PREEMPT is not set\n', false],
    ['CONFIG_PREEMPT_VOLUNTARY=y\nCONFIG_PREEMPT_DYNAMIC=y\n', false],
    ['CONFIG_PREEMPT_LAZY=y\n', true],
    ['CONFIG_PREEMPT=y\n', true],
    ['CONFIG_PREEMPT_VOLUNTARY=y\nCONFIG_PREEMPT_RT=y\n', true],
  ])
  t.equal(found(t, { packed: gzipSync('CONFIG_PREEMPT_NONE=y\n') }), false, 'packed')
  t.equal(found(t, { packed: 'no archive' }), true, 'a configuration that cannot be unpacked')
})

t.test('otherwise the build version counts', async (t) => {
  foundFor(t, (version) => ({ version }), [
    ['#1 SMP Debian 5.10.249-1', false],
    [DYNAMIC, true],
    ['#1 SMP PREEMPT_RT Debian 6.12.57-1', true],
    ['#1 SMP PREEMPT Debian', true],
  ])
  t.type(kernelPreempts(), 'boolean', 'this one')
})
