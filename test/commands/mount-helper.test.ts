// SPDX-License-Identifier: MIT
/**
 * The installed program, and mount(8) and fstab(5) with it. Its files are laid over those of the
 * system, in a mount namespace of the test's own, as mount(8) looks for helpers in /sbin only.
 */
import { spawn } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { ROOT } from '../helpers/root.js'
import { cleanup, loopDisk, type Output, run, until } from '../helpers/tree.js'

const TIME_LIMIT_MS = 20_000

function directory(t: Test): string {
  const path = mkdtempSync(join(tmpdir(), 'diskseqfs-helper-'))
  cleanup(t, () => rmSync(path, { recursive: true }))
  return path
}

const installed = directory(t)
await run('make', ['-C', ROOT, 'install', `DESTDIR=${installed}`, 'PREFIX=/usr'])

/** Runs a shell script to its end, with the installed files in their places. `$tree` is a directory. */
async function inSystem(t: Test, script: string): Promise<Output> {
  const tree = join(directory(t), 'tree')
  mkdirSync(tree)
  const setup = `
    unset NODE_OPTIONS
    mount -t overlay none -o 'lowerdir=${installed}/usr:/usr' /usr
    mount -t overlay none -o 'lowerdir=${installed}/sbin:/usr/sbin' /usr/sbin
    tree='${tree}'
    # What is mounted there: type, options of the mount.
    show() { awk -v tree="$tree" '$5 == tree { print $(NF - 2), $6 }' /proc/self/mountinfo; }
    `
  const child = spawn('unshare', ['--mount', 'sh', '-euc', setup + script], {
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
  })
  const timer = setTimeout(() => process.kill(-(child.pid as number), 'SIGKILL'), TIME_LIMIT_MS)
  let stdout = ''
  let stderr = ''
  child.stdout.on('data', (chunk: Buffer) => (stdout += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  const code = await new Promise<number>((resolve) => child.on('close', (code) => resolve(code ?? -1)))
  clearTimeout(timer)
  const daemons = () =>
    readdirSync('/proc').filter((pid) => {
      try {
        return /^\d+$/.test(pid) && readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0').includes(tree)
      } catch {
        return false // it has ended meanwhile
      }
    })
  try {
    await until(() => daemons().length === 0)
  } catch {
    for (const pid of daemons()) process.kill(Number(pid), 'SIGKILL')
    t.fail('a daemon is still running')
  }
  return { code, stdout, stderr }
}

t.test('make install', async (t) => {
  t.test('puts each file where it belongs', async (t) => {
    const mode = (path: string) => (statSync(join(installed, path)).mode & 0o777).toString(8)
    for (const [path, expected] of [
      ['usr/bin/diskseqfs', '755'],
      ['sbin/mount.fuse.diskseqfs', '755'],
      ['usr/lib/diskseqfs', '755'],
      ['usr/lib/diskseqfs/package.json', '644'],
      ['usr/lib/diskseqfs/dist/cli.js', '755'],
      ['usr/lib/diskseqfs/native/build/Release/diskseqfs_native.node', '755'],
      ['usr/lib/diskseqfs/dist/LICENSES', '644'],
      ['usr/share/man/man8/diskseqfs.8', '644'],
      ['usr/share/man/man5/diskseqfs.5', '644'],
      ['usr/share/bash-completion/completions/diskseqfs', '644'],
    ] as const) {
      t.equal(mode(path), expected, path)
    }
  })

  t.test('leaves out files that only building and testing need', async (t) => {
    for (const name of ['node_modules', 'build', 'test', 'src', 'native/addon/addon.cc']) {
      t.notOk(existsSync(join(installed, 'usr/lib/diskseqfs', name)), name)
    }
  })

  t.test('writes no path of the build machine into scripts', async (t) => {
    for (const path of ['usr/bin/diskseqfs', 'sbin/mount.fuse.diskseqfs']) {
      const text = readFileSync(join(installed, path), 'utf8')
      t.notMatch(text, installed)
      t.notMatch(text, ROOT)
      t.notMatch(text, '@BINDIR@')
    }
  })

  t.test('installs a program that works in place, and by a symlink', async (t) => {
    const dir = directory(t)
    await run('ln', ['-s', join(installed, 'usr/bin/diskseqfs'), join(dir, 'link')])
    for (const program of [join(installed, 'usr/bin/diskseqfs'), join(dir, 'link')]) {
      const { code, stdout, stderr } = await run('env', ['--unset=NODE_OPTIONS', program, 'list', '--json'])
      t.strictSame({ code, stderr }, { code: 0, stderr: '' })
      t.ok(Array.isArray(JSON.parse(stdout).devices))
    }
  })

  t.test('is undone by make uninstall', async (t) => {
    const dir = directory(t)
    const make = (target: string) => run('make', ['-C', ROOT, target, `DESTDIR=${dir}`, 'PREFIX=/opt/x', 'SBINDIR=/opt/x/sbin'])
    const files = async () => (await run('find', [dir, '!', '-type', 'd'])).stdout
    t.equal((await make('install')).code, 0)
    t.match(await files(), '/opt/x/bin/diskseqfs')
    t.equal((await make('uninstall')).code, 0)
    t.equal(await files(), '')
  })
})

t.test('the installed program lists and serves', async (t) => {
  const disk = loopDisk(t)
  const { code, stdout, stderr } = await inSystem(
    t,
    `diskseqfs list --json | grep -c '"kname": "${disk.kname}"'
     diskseqfs mount "$tree"
     head -c 512 "$tree/${disk.diskseq()}" | wc -c
     diskseqfs unmount "$tree"
     show`,
  )
  t.strictSame({ code, stdout, stderr }, { code: 0, stdout: '1\n512\n', stderr: '' })
})

t.test('mount -t fuse.diskseqfs', async (t) => {
  t.test('mounts a tree that answers, and umount ends it', async (t) => {
    const disk = loopDisk(t)
    const { code, stdout, stderr } = await inSystem(
      t,
      `mount -t fuse.diskseqfs diskseqfs "$tree"
       head -c 512 "$tree/${disk.diskseq()}" | wc -c
       show
       umount "$tree"
       show`,
    )
    t.strictSame({ code, stdout, stderr }, { code: 0, stdout: '512\nfuse.diskseqfs rw,nosuid,noexec,relatime\n', stderr: '' })
  })

  t.test('passes options on, of this program and of mount(8)', async (t) => {
    const { code, stdout, stderr } = await inSystem(
      t,
      `mount -v -t fuse.diskseqfs diskseqfs "$tree" -o noatime,linger=7,hold=60,open_timeout=3,log_level=error >/dev/null
       show
       umount "$tree"`,
    )
    t.strictSame({ code, stdout, stderr }, { code: 0, stdout: 'fuse.diskseqfs rw,nosuid,noexec,noatime\n', stderr: '' })
  })

  for (const [options, says] of [
    ['nodev', /^diskseqfs: mount option nodev: .*remove it$/m],
    ['fancy', /^diskseqfs: mount option fancy: not known/m],
    ['linger=soon', /^diskseqfs: mount option linger=soon: /m],
  ] as const) {
    t.test(`fails with -o ${options}, and says why`, async (t) => {
      const { code, stdout, stderr } = await inSystem(
        t,
        `code=0; mount -t fuse.diskseqfs diskseqfs "$tree" -o ${options} || code=$?
         show
         exit $code`,
      )
      t.not(code, 0)
      t.equal(stdout, '', 'nothing mounted')
      t.match(stderr, says)
      t.notMatch(stderr, /\n {4}at /)
    })
  }

  t.test('fails if the tree is served already', async (t) => {
    const { stdout, stderr } = await inSystem(
      t,
      `mount -t fuse.diskseqfs diskseqfs "$tree"
       mount -t fuse.diskseqfs diskseqfs "$tree" || echo failed
       show | wc -l
       umount "$tree"`,
    )
    t.equal(stdout, 'failed\n1\n')
    t.match(stderr, /^(diskseqfs: .*already served|mount: .*already mounted)/m)
  })

  t.test('does nothing with --fake', async (t) => {
    const { code, stdout, stderr } = await inSystem(t, 'mount --fake -t fuse.diskseqfs diskseqfs "$tree"; show')
    t.strictSame({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' })
  })

  t.test('mounts for another mount namespace with --namespace', async (t) => {
    const { code, stdout, stderr } = await inSystem(
      t,
      `other=$(mktemp -u); mkfifo "$other"
       unshare --mount sh -c 'read end <"$1"' sh "$other" & child=$!
       until [ "$(readlink /proc/$child/ns/mnt)" != "$(readlink /proc/$$/ns/mnt)" ]; do sleep 0.01; done
       mount --namespace /proc/$child/ns/mnt -t fuse.diskseqfs diskseqfs "$tree"
       show
       awk -v tree="$tree" '$5 == tree { print "there", $(NF - 2) }' /proc/$child/mountinfo
       nsenter --mount=/proc/$child/ns/mnt umount "$tree"
       echo >"$other"; wait $child; rm "$other"`,
    )
    t.strictSame({ code, stdout, stderr }, { code: 0, stdout: 'there fuse.diskseqfs\n', stderr: '' })
  })
})

t.test('a line in fstab', async (t) => {
  for (const [how, options, command] of [
    ['mounts by its directory', 'noauto,nofail,x-systemd.requires=x,linger=7', 'mount -T "$tree.fstab" "$tree"'],
    ['mounts with mount -a, twice', 'defaults,nofail,_netdev', 'mount -a -T "$tree.fstab"; mount -a -T "$tree.fstab"'],
    ['needs no type on the command line if fstab has one', 'defaults', 'mount -T "$tree.fstab" --target "$tree"'],
  ] as const) {
    t.test(how, async (t) => {
      const { code, stdout, stderr } = await inSystem(
        t,
        `echo "diskseqfs $tree fuse.diskseqfs ${options} 0 0" >"$tree.fstab"
         ${command}
         show
         ls "$tree" >/dev/null
         umount "$tree"
         show`,
      )
      t.strictSame({ code, stdout, stderr }, { code: 0, stdout: 'fuse.diskseqfs rw,nosuid,noexec,relatime\n', stderr: '' })
    })
  }

  t.test('may have a directory with blanks in its name', async (t) => {
    const { code, stdout, stderr } = await inSystem(
      t,
      `tree="$tree/a b"; mkdir "$tree"
       printf 'diskseqfs %s\\\\040b fuse.diskseqfs defaults 0 0\\n' "\${tree% b}" >"\${tree%/*}.fstab"
       mount -T "\${tree%/*}.fstab" "$tree"
       ls "$tree" >/dev/null
       umount "$tree"`,
    )
    t.strictSame({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' })
  })
})

t.test('the helper alone', async (t) => {
  const dir = directory(t)
  const helper = join(dir, 'helper')
  writeFileSync(helper, readFileSync(join(installed, 'sbin/mount.fuse.diskseqfs'), 'utf8').replace('/usr/bin/', `${dir}/`))
  writeFileSync(join(dir, 'diskseqfs'), '#!/bin/sh\nfor word; do echo "<$word>"; done\nexit $(cat "$0.code")\n')
  const exits = (code: number) => writeFileSync(join(dir, 'diskseqfs.code'), `${code}`)
  exits(0)
  for (const file of [helper, join(dir, 'diskseqfs')]) chmodSync(file, 0o755)

  for (const [args, words] of [
    [
      ['none', '/a b'],
      ['mount', '/a b'],
    ],
    [
      ['none', '/a', '-o', 'rw,linger=7'],
      ['mount', '/a', '-o', 'rw,linger=7'],
    ],
    [
      ['none', '/a', '-s', '-n', '-v', '-o', 'rw', '-o', 'hold=1', '-t', 'fuse.diskseqfs'],
      ['mount', '/a', '-o', 'rw,hold=1'],
    ],
    [
      ['none', '/a', '-sv', '-o', 'context="a b,c"'],
      ['mount', '/a', '-o', 'context="a b,c"'],
    ],
    [
      ['none', '/a', '-N', '/proc/self/ns/mnt'],
      ['mount', '/a'],
    ],
  ] as const) {
    t.test(`${args.join(' ')}`, async (t) => {
      const { code, stdout, stderr } = await run(helper, [...args])
      t.strictSame({ code, stderr }, { code: 0, stderr: '' })
      t.equal(stdout, words.map((word) => `<${word}>\n`).join(''))
    })
  }

  // The exit codes that mount(8) documents for itself: 1 incorrect invocation, 32 mount failure.
  for (const [own, code] of [
    [1, 32],
    [2, 1],
    [127, 32],
  ] as const) {
    t.test(`the program's exit code ${own} is mount(8)'s ${code}`, async (t) => {
      exits(own)
      t.equal((await run(helper, ['none', '/a'])).code, code)
    })
  }

  t.test('does nothing with -f', async (t) => {
    t.strictSame(await run(helper, ['none', '/a', '-f', '-o', 'rw']), { code: 0, stdout: '', stderr: '' })
  })

  for (const args of [
    [],
    ['none'],
    ['none', ''],
    ['none', '-o'],
    ['-o', 'rw'],
    ['none', '/a', '/b'],
    ['none', '/a', '-x'],
    ['none', '/a', '-o'],
  ]) {
    t.test(`refuses wrong arguments: ${args.join(' ')}`, async (t) => {
      const { code, stdout, stderr } = await run(helper, args)
      t.strictSame({ code, stdout }, { code: 1, stdout: '' })
      t.match(stderr, /^usage: mount\.fuse\.diskseqfs SOURCE TARGET/m)
    })
  }
})
