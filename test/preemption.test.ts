/** Whether the kernel preempts itself, by what it says of that. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { gzipSync } from 'node:zlib'

import t, { type Test } from 'tap'

import { kernelPreempts } from '../src/preemption.js'

const DYNAMIC = '#1 SMP PREEMPT_DYNAMIC Debian 6.12.57-1 (2025-11-05)'

interface Said {
  readonly modes?: string
  readonly commandLine?: string
  readonly config?: string
  readonly version?: string
  readonly release?: string
}

/** What is found of a kernel that says that, and nothing else. */
function found(t: Test, { modes, commandLine, config, version = DYNAMIC, release = '6.12.57' }: Said): boolean {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-modes-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  const put = (name: string, content: string | Buffer | undefined) => {
    if (content !== undefined) writeFileSync(join(directory, name), content)
    return join(directory, name)
  }
  return kernelPreempts({
    modes: put('preempt', modes),
    commandLine: put('cmdline', commandLine),
    configs: [put('config.gz', undefined), put('config', config)],
    version,
    release,
  })
}

t.test('a kernel that can be told says how it is now', async (t) => {
  for (const [modes, expected] of [
    ['(none) voluntary full \n', false],
    ['none (voluntary) full \n', false],
    ['none voluntary (full) \n', true],
    ['full (lazy) \n', true],
    ['\n', true],
  ] as const) {
    t.equal(found(t, { modes }), expected, modes)
  }
  t.equal(found(t, { modes: 'none voluntary (full)\n', commandLine: 'preempt=none', config: 'CONFIG_PREEMPT_NONE=y\n' }), true)
})

t.test('where that cannot be read, what it was told at its start', async (t) => {
  for (const [commandLine, expected] of [
    ['quiet preempt=none\n', false],
    ['preempt=voluntary quiet\n', false],
    ['preempt=full\n', true],
    ['preempt=none preempt=full\n', true],
    ['xpreempt=none\n', true],
  ] as const) {
    t.equal(found(t, { commandLine }), expected, commandLine)
  }
  t.equal(found(t, { commandLine: 'preempt=full', config: 'CONFIG_PREEMPT_NONE=y\n' }), true)
  for (const other of [{ release: '7.0.1' }, { version: '#1 SMP PREEMPT_RT' }, { version: '#1 SMP PREEMPT' }]) {
    t.equal(found(t, { commandLine: 'preempt=none', ...other }), true, 'a kernel that takes no notice')
  }
})

t.test('or else what it was configured with', async (t) => {
  for (const [config, expected] of [
    ['CONFIG_PREEMPT_BUILD=y\nCONFIG_PREEMPT_NONE=y\n# CONFIG_PREEMPT is not set\n', false],
    ['CONFIG_PREEMPT_VOLUNTARY=y\nCONFIG_PREEMPT_DYNAMIC=y\n', false],
    ['CONFIG_PREEMPT_LAZY=y\n', true],
    ['CONFIG_PREEMPT=y\n', true],
    ['CONFIG_PREEMPT_VOLUNTARY=y\nCONFIG_PREEMPT_RT=y\n', true],
  ] as const) {
    t.equal(found(t, { commandLine: 'quiet', config }), expected, config)
  }
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-config-'))
  t.teardown(() => rmSync(directory, { recursive: true }))
  const packed = join(directory, 'config.gz')
  for (const [content, expected] of [
    [gzipSync('CONFIG_PREEMPT_NONE=y\n'), false],
    ['no archive', true],
  ] as const) {
    writeFileSync(packed, content)
    t.equal(kernelPreempts({ modes: '/nowhere', commandLine: '/nowhere', configs: [packed], version: DYNAMIC, release: '6.12.57' }), expected)
  }
})

t.test('or what it was built for', async (t) => {
  for (const [version, expected] of [
    ['#1 SMP Debian 5.10.249-1', false],
    [DYNAMIC, true],
    ['#1 SMP PREEMPT_RT Debian 6.12.57-1', true],
    ['#1 SMP PREEMPT Debian', true],
  ] as const) {
    t.equal(found(t, { version }), expected, version)
  }
  t.type(kernelPreempts(), 'boolean', 'this one')
})
