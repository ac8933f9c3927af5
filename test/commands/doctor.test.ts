// SPDX-License-Identifier: MIT
/** `diskseqfs doctor` on this machine, with a tree where it belongs, in a mount namespace of its own. What it looks for: test/unit/commands/findings.test.ts. */
import { existsSync, mkdirSync, rmdirSync } from 'node:fs'

import t from 'tap'

import type { Finding } from '../../src/commands/findings.js'
import { cleanup, CLI, run } from '../helpers/tree.js'

const PROGRAM = `env --unset=NODE_OPTIONS ${process.execPath} ${CLI}`
const NOBODY = 65534

t.test('a tree that is well, hangs, is dead, and is gone', async (t) => {
  // For a mount there, which nobody else sees.
  if (!existsSync('/dev/disk')) {
    mkdirSync('/dev/disk')
    cleanup(t, () => rmdirSync('/dev/disk'))
  }
  const script = `
    doctor() { echo "== $1"; ${PROGRAM} doctor --json; echo "exit $?"; }
    tree=/dev/disk/by-diskseq
    mount -t tmpfs none /dev/disk
    mkdir $tree; ln -s nowhere $tree/mine
    ${PROGRAM} mount -f $tree 2>/dev/null & daemon=$!
    until mountpoint -q $tree; do sleep 0.05; done
    doctor well
    kill -STOP $daemon; doctor hangs; kill -CONT $daemon
    kill -KILL $daemon; wait $daemon; doctor dead
    umount $tree; doctor gone`
  const { stdout, stderr } = await run('unshare', ['--mount', '--propagation', 'private', 'bash', '-c', script])
  const results = new Map(
    stdout
      .split(/^== /m)
      .slice(1)
      .map((part) => {
        const [, what = '', json = '', code] = /^(\w+)\n(.*)^exit (\d)$/ms.exec(part) ?? []
        // What is installed on this machine is another matter.
        const found = (JSON.parse(json) as { findings: Finding[] }).findings.filter(({ what }) => !/rules|unit|service/.test(what))
        return [what, { code, found: found.map(({ severity, what }) => `${severity}: ${what}`) }]
      }),
  )
  t.notMatch(stderr, /at .*:\d+:\d+/, 'no stack trace')
  const beneath = 'note: beneath the tree are links that are not its own: mine'
  t.match(results.get('well'), { code: '0', found: [beneath] })
  t.match(results.get('hangs'), { code: '2', found: ['broken: the daemon of the tree does not answer', beneath] })
  t.match(results.get('dead'), { code: '2', found: ['broken: the daemon of the tree is gone', beneath] })
  t.match(results.get('gone'), { code: '2', found: ['broken: no tree is mounted at /dev/disk/by-diskseq'] })
})

t.test('for people, and for users', async (t) => {
  const { code, stdout, stderr } = await run('sh', ['-c', `${PROGRAM} doctor`], { uid: NOBODY, gid: NOBODY })
  t.strictSame({ code, stderr }, { code: 2, stderr: '' })
  t.match(stdout, /^broken: no tree is mounted at \/dev\/disk\/by-diskseq; [^\n]+\n/m)
  t.match(stdout, /^note: not all can be seen; run this as root\n/m)
})
