// SPDX-License-Identifier: MIT
/**
 * Runs files of tests, and prints what they say as TAP. They were compiled before (`make build/test`), and none
 * loads anything of the runner's: with tap's own command, which compiles a file as it loads it and follows every
 * process that a test starts, a file of one small test takes four seconds, and here half of one.
 *
 *   node build/test/run.js [--jobs N] [--timeout SECONDS] [--grep PATTERN] [--invert] test/…/NAME.ts...
 */
import { statSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import t from 'tap'

import { ROOT } from './helpers/root.js'

/** These measure, or take all there is of something: each has the machine for itself, after the others. */
const alone = (file: string) => file.startsWith('test/load/')

const { values: options, positionals: files } = parseArgs({
  allowPositionals: true,
  options: {
    jobs: { type: 'string', default: '3' },
    timeout: { type: 'string', default: '480' },
    grep: { type: 'string' },
    invert: { type: 'boolean', default: false },
  },
})

const env = {
  ...process.env,
  TAP_TIMEOUT: options.timeout,
  ...(options.grep !== undefined && { TAP_GREP: options.grep }),
  ...(options.invert && { TAP_INVERT: '1' }),
}

/** The large ones first, as they take long, and one of them alone at the end would leave a processor idle. */
const size = new Map(files.map((file) => [file, statSync(join(ROOT, file)).size]))
const order = (file: string) => (alone(file) ? 0 : (size.get(file) ?? 0))

const jobs = Number(options.jobs)
t.jobs = jobs
t.setTimeout(0)
for (const file of [...files].sort((a, b) => order(b) - order(a))) {
  // Through env, as the library would have a Node.js that it starts itself load what follows processes.
  const compiled = join(ROOT, 'build', file.replace(/\.ts$/, '.js'))
  void t.spawn('env', ['--unset=NODE_OPTIONS', process.execPath, '--enable-source-maps', compiled], {
    name: file,
    env,
    cwd: ROOT,
    buffered: jobs > 1 && !alone(file),
    timeout: Number(options.timeout) * 1000,
  })
}
