// SPDX-License-Identifier: MIT
/** Completion: it offers what the program accepts, and devices that exist. */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import t from 'tap'

import { TRANSPORTS } from '../../src/fuse/transport.js'
import { LOG_FORMATS, LOG_LEVELS } from '../../src/util/log.js'
import { ALL_COMMANDS, COMMANDS, DM_COMMANDS, optionsOf } from '../helpers/help.js'
import { ROOT } from '../helpers/root.js'
import { loopDisk, run, startTree } from '../helpers/tree.js'

const FILES = ['diskseqfs.bash', '_diskseqfs', 'diskseqfs.fish'].map((name) => join(ROOT, 'scripts/completion', name))

/** What bash offers after these words. */
async function offered(...words: string[]): Promise<string[]> {
  const script = `
    source '${FILES[0]}'
    COMP_WORDS=(diskseqfs "$@") COMP_CWORD=$#
    _diskseqfs
    printf '%s\\n' "\${COMPREPLY[@]}"`
  const { stdout, stderr } = await run('bash', ['-c', script, 'bash', ...words])
  if (stderr !== '') throw new Error(stderr)
  return stdout.split('\n').filter((line) => line !== '')
}

t.test('bash: each command, and its options', async (t) => {
  t.strictSame(
    (await offered('')).filter((word) => !word.startsWith('-')),
    [...COMMANDS, 'help'],
  )
  t.strictSame(
    (await offered('dm', '')).filter((word) => !word.startsWith('-')),
    [...DM_COMMANDS, 'help'],
  )
  for (const command of ALL_COMMANDS) {
    t.strictSame((await offered(...command.split(' '), '-')).sort(), (await optionsOf(command)).sort(), command)
  }
  t.strictSame(await offered('mount', '--transport', ''), TRANSPORTS)
  t.strictSame(await offered('mount', '--log-level', ''), LOG_LEVELS)
  t.strictSame(await offered('mount', '--log-format', ''), LOG_FORMATS)
})

t.test('bash: devices by all of their names, and trees', async (t) => {
  const tree = await startTree(t)
  const disk = loopDisk(t)
  t.strictSame(await offered('resolve', disk.kname), [disk.kname])
  const path = join(tree.mountpoint, disk.diskseq())
  t.ok((await offered('resolve', path)).includes(path), 'the names come from the tree')
  t.ok((await offered('unmount', tree.mountpoint)).includes(tree.mountpoint))
  t.strictSame(await offered('unmount', ROOT), [], 'no other directory is offered')
})

t.test('zsh and fish: no option is missing', async (t) => {
  const words = [...TRANSPORTS, ...LOG_LEVELS, ...LOG_FORMATS, ...COMMANDS, ...DM_COMMANDS]
  for (const command of ALL_COMMANDS) words.push(...(await optionsOf(command)).map((option) => option.replace(/^-+/, '')))
  for (const file of FILES.slice(1)) {
    const text = readFileSync(file, 'utf8')
    t.strictSame(
      words.filter((word) => !new RegExp(`(^|[^a-z-])-*${word}([^a-z-]|$)`, 'm').test(text)),
      [],
      file,
    )
  }
})
