// SPDX-License-Identifier: MIT
/** The manual pages: they are well-formed, and no command, option or choice is missing. */
import { readdirSync } from 'node:fs'
import { join } from 'node:path'

import t from 'tap'

import { TRANSPORTS } from '../../src/fuse/transport.js'
import { LOG_FORMATS, LOG_LEVELS } from '../../src/util/log.js'
import { ALL_COMMANDS, optionsOf } from '../helpers/help.js'
import { ROOT } from '../helpers/root.js'
import { run } from '../helpers/tree.js'

const PAGES = readdirSync(join(ROOT, 'man')).map((name) => join(ROOT, 'man', name))
/** The page as plain text, without the overstrikes that make letters bold. */
const plain = async (page: string) => (await run('mandoc', ['-T', 'ascii', page])).stdout.replace(/.\x08/g, '')

t.test('they are well-formed', async (t) => {
  t.equal(PAGES.length, 4)
  for (const page of PAGES) {
    const { code, stdout, stderr } = await run('mandoc', ['-T', 'lint', '-W', 'warning', page])
    t.strictSame({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' }, page)
    t.match(await plain(page), /NAME[\s\S]*DESCRIPTION[\s\S]*SEE ALSO/, page)
  }
})

t.test('no option is missing', async (t) => {
  const text = await plain(join(ROOT, 'man/diskseqfs.8'))
  for (const command of ALL_COMMANDS) {
    const section =
      new RegExp(`^ +diskseqfs ${command}\\n([\\s\\S]*?)(?=^ +diskseqfs |^[A-Z])`, 'm').exec(
        text.slice(text.indexOf('DESCRIPTION')),
      )?.[1] ?? ''
    t.not(section, '', command)
    const options = (await optionsOf(command)).filter((option) => option !== '--help')
    t.strictSame(
      options.filter((option) => !new RegExp(`^ +(-\\w, )?${option}\\b`, 'm').test(section)),
      [],
      command,
    )
  }
  const words = [...TRANSPORTS, ...LOG_LEVELS, ...LOG_FORMATS]
  t.strictSame(
    words.filter((word) => !new RegExp(`\\b${word}\\b`).test(text)),
    [],
  )
})
