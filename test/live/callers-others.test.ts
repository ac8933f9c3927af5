// SPDX-License-Identifier: MIT
/**
 * More unusual callers: traced and supervised processes, shared descriptor tables, namespaces, and
 * opens that the kernel makes itself (mount, swap, overlay). The others are in callers.test.ts.
 */
import tap from 'tap'

import { type Kind, testKind } from '../helpers/churn.js'
import { CLI, loopDisk, run, startTree } from '../helpers/tree.js'

const NOBODY = 65534

const KINDS: readonly Kind[] = [
  { name: 'open(2) in an overlay of the tree', way: 'open', enough: 300, twin: 'no-pins', errors: ['ESTALE'], overlay: true },
  { name: 'O_PATH in an overlay of the tree', way: 'opath', enough: 300, twin: 'no-pins', errors: ['ESTALE'], overlay: true },
  { name: 'fsconfig(2), which mounts in steps', way: 'fsconfig', enough: 20, twin: 'linger-only', image: 'ext4' },
  { name: 'swapon(2)', way: 'swapon', enough: 20, twin: 'no-pins', image: 'swap' },
  // Most kernels refuse x32 calls (they need CONFIG_X86_X32_ABI, and on Debian "syscall.x32=y"). Where they do, there is no
  // twin either.
  { name: 'an x32 call', way: 'x32', enough: 300, twin: 'no-pins', needs: 'x32' },
  { name: 'a process that opens for another one, with a shared descriptor table', way: 'shared-files', enough: 300, twin: 'no-pins' },
  { name: 'a process in another pid namespace', way: 'pid-namespace', enough: 200, twin: 'no-pins' },
  { name: 'one outside the pid namespace of the daemon', way: 'open', enough: 100, twin: 'no-pins', apart: true },
  { name: 'one inside it', way: 'namespace-of', enough: 200, twin: 'no-pins', apart: true },
  { name: 'root of a user namespace, with the uid of root', way: 'user-namespace', enough: 200, twin: 'no-pins' },
  {
    name: 'root of a user namespace, with the uid of nobody',
    way: 'user-namespace-nobody',
    enough: 100,
    twin: 'no-pins',
    more: ['--node-uid', String(NOBODY)],
  },
  { name: 'a child of vfork(2)', way: 'vfork', enough: 200, twin: 'no-pins' },
  { name: 'a thread whose program is replaced by execve(2) meanwhile', way: 'exec', enough: 40, twin: 'no-pins', errors: ['EINTR'] },
  { name: 'a traced process', way: 'traced', enough: 200, twin: 'no-pins' },
  { name: 'a traced process, made to open in place of another call', way: 'traced-replaced', enough: 200, twin: 'no-pins', needs: 'x64' },
  { name: 'a seccomp supervisor, for a process that is in open(2) meanwhile', way: 'notified-addfd', enough: 200, twin: 'no-pins' },
  { name: 'a process that a seccomp supervisor lets go on', way: 'notified-continue', enough: 200, twin: 'no-pins' },
]

KINDS.forEach(testKind)

// A request carries the caller's id in the pid namespace that the tree was mounted in. If /proc is of another one,
// that id is another thread there, or none. One in some thousand opens in churn then reached another disk.
tap.test('a daemon whose /proc is of another pid namespace does not start', async (t) => {
  await t.rejects(startTree(t, { apart: 'outer proc', expectErrors: true }), /\/proc is of another pid namespace/)
})

tap.test('another pid namespace, twin: without that check, it starts', async (t) => {
  await startTree(t, { apart: 'outer proc', twin: 'any-proc', args: ['--hold', '1'] })
})

tap.test('a daemon does not take over a tree that was mounted in another pid namespace', async (t) => {
  loopDisk(t)
  const { mountpoint, log } = await startTree(t, { apart: 'own proc', args: ['--hold', '1'] })
  const [, pid = '', path = ''] = /^\/proc\/(\d+)\/root(.*)$/.exec(mountpoint) ?? []
  // Runs in the mount namespace of that daemon, with the /proc of this pid namespace.
  const proc = ['unshare', '--mount', 'sh', '-c', 'mount -t proc proc /proc; exec "$@"', 'sh']
  const replace = ['nsenter', '--mount', '--target', pid, ...proc, process.execPath, CLI, 'mount', '-f', '--replace', path]
  const { code, stderr } = await run('env', ['--unset=NODE_OPTIONS', ...replace])
  t.equal(code, 1)
  t.match(stderr, /what the daemon that serves it has does not fit; it goes on/)
  t.equal((await run('ls', [mountpoint])).code, 0, 'it does')
  t.ok(log().length > 0)
})
