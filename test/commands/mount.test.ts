// SPDX-License-Identifier: MIT
/**
 * `diskseqfs mount`: how it starts, what it says if it cannot, what it logs, and how it ends.
 * Faults of the machine are made in mount namespaces of their own, so that no other process sees
 * them.
 */
import { execFileSync, spawn, type StdioOptions } from 'node:child_process'
import {
  chmodSync,
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { held } from '../helpers/flock.js'
import { LONG, twoForms } from '../helpers/long.js'
import { cleanup, CLI, lockOf, loopDisk, run, sleep, startTree, type Twin, TWIN_DAEMON, until } from '../helpers/tree.js'

const NOBODY = 65534

/** The flags of `mount`: in the background, and at length in the foreground too, where what is wrong is found by the same code. */
const FORMS = LONG ? [[], ['-f']] : [[]]
/** Long enough for the slowest start. A program that has not ended by then hangs. */
const TIME_LIMIT_MS = 10_000

interface MountLine {
  readonly target: string
  readonly type: string
  readonly flags: readonly string[]
  readonly superFlags: readonly string[]
}

function mountsBelow(directory: string): MountLine[] {
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .trimEnd()
    .split('\n')
    .map((line) => {
      const fields = line.split(' ')
      const [type, , superFlags] = fields.slice(fields.indexOf('-') + 1)
      return {
        target: (fields[4] as string).replaceAll('\\040', ' '),
        flags: (fields[5] as string).split(','),
        type: type as string,
        superFlags: (superFlags as string).split(','),
      }
    })
    .filter(({ target }) => target === directory || target.startsWith(`${directory}/`))
}

/** Process ids of `diskseqfs` commands that were given a path below `directory`. */
function processesOf(directory: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      let args: string[]
      try {
        args = readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0')
      } catch {
        return false // it has ended meanwhile
      }
      return args.includes(CLI) && args.some((arg) => arg === directory || arg.startsWith(`${directory}/`))
    })
}

/** A directory of the test's own. When the test ends, nothing is mounted or served in it, and it is removed. */
function place(t: Test): string {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-mount-'))
  cleanup(t, async () => {
    for (const pid of processesOf(directory)) process.kill(pid, 'SIGKILL')
    await until(() => processesOf(directory).length === 0)
    for (const { target } of mountsBelow(directory).reverse()) await run('umount', ['--lazy', target])
    // Locks that killed daemons have left.
    for (const path of [directory, join(directory, 'tree')]) rmSync(lockOf(path), { force: true })
    rmSync(directory, { recursive: true })
  })
  return directory
}

interface Ended {
  readonly code: number | null
  readonly signal: string | null
  readonly stdout: string
  readonly stderr: string
}

interface ShellOptions {
  /** Run it in a mount namespace of its own. */
  readonly isolated?: boolean
  readonly uid?: number
}

/** Runs a shell script until it has ended and no process holds its output any more. */
async function shell(script: string, { isolated = false, uid }: ShellOptions = {}): Promise<Ended> {
  const command = ['sh', '-euc', script]
  const child = spawn(isolated ? 'unshare' : 'env', isolated ? ['--mount', ...command] : command, {
    stdio: ['ignore', 'pipe', 'pipe'],
    detached: true,
    ...(uid !== undefined && { uid, gid: uid }),
  })
  const timer = setTimeout(() => process.kill(-(child.pid as number), 'SIGKILL'), TIME_LIMIT_MS)
  let stdout = ''
  let stderr = ''
  child.stdout.on('data', (chunk: Buffer) => (stdout += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => (stderr += chunk.toString()))
  const [code, signal] = await new Promise<[number | null, string | null]>((resolve) =>
    child.on('close', (code, signal) => resolve([code, signal])),
  )
  clearTimeout(timer)
  return { code, signal, stdout, stderr }
}

/** The program as users have it. tap loads itself into each node through NODE_OPTIONS, and handles signals there. */
const PROGRAM = ['env', '--unset=NODE_OPTIONS', process.execPath, CLI] as const

/** `diskseqfs mount ...` for {@link shell}. */
function mountCommand(...args: string[]): string {
  return [...PROGRAM, 'mount', ...args].map((arg) => `'${arg}'`).join(' ')
}

/** Starts `diskseqfs mount ...` and does not wait for it. */
function spawnMount(...args: string[]) {
  const child = spawn(PROGRAM[0], [...PROGRAM.slice(1), 'mount', ...args], { stdio: ['ignore', 'ignore', 'pipe'] })
  let text = ''
  child.stderr.on('data', (chunk: Buffer) => (text += chunk.toString()))
  const end = new Promise<void>((resolve) => child.on('close', () => resolve()))
  return { child, end, stderr: () => text }
}

interface Served {
  readonly pid: number
  readonly exitCode: () => number | null
  readonly log: () => string
  readonly kill: (signal: NodeJS.Signals) => void
  /** Code and signal of its end. It throws if the program does not end. */
  readonly ended: () => Promise<[number | null, string | null]>
}

/** `diskseqfs mount -f`, which answers already. {@link place} cleans up after it. */
async function serve(
  mountpoint: string,
  { args = [], redirect = '', stdio = ['ignore', 'ignore', 'pipe'] }: { args?: string[]; redirect?: string; stdio?: StdioOptions } = {},
): Promise<Served> {
  const child = spawn('sh', ['-c', `exec ${mountCommand('-f', mountpoint, ...args)} ${redirect}`], { stdio })
  let text = ''
  child.stderr?.on('data', (chunk: Buffer) => (text += chunk.toString()))
  const end = new Promise<[number | null, string | null]>((resolve) =>
    child.on(stdio[2] === 'pipe' ? 'close' : 'exit', (code, signal) => resolve([code, signal])),
  )
  await until(() => child.exitCode !== null || mountsBelow(mountpoint).length > 0, TIME_LIMIT_MS)
  if (child.exitCode !== null) throw new Error(`the daemon did not start:\n${text}`)
  readdirSync(mountpoint)
  if (stdio[2] === 'pipe' && redirect === '') await until(() => text.includes('mounted'))
  return {
    pid: child.pid as number,
    exitCode: () => child.exitCode,
    log: () => text,
    kill: (signal) => void child.kill(signal),
    ended: async () => {
      const outcome = await Promise.race([end, sleep(TIME_LIMIT_MS, undefined, { ref: false })])
      if (outcome === undefined) throw new Error(`the daemon did not end:\n${text}`)
      return outcome
    },
  }
}

/** Opens and reads a disk through the tree. */
function reads(path: string): boolean {
  const fd = openSync(path, 'r')
  try {
    return readSync(fd, Buffer.alloc(512), 0, 512, 0) === 512
  } finally {
    closeSync(fd)
  }
}

function errnoOf(action: () => unknown): string | undefined {
  try {
    action()
    return undefined
  } catch (error) {
    return (error as NodeJS.ErrnoException).code
  }
}

/** The daemon serving `mountpoint` in the background. */
function daemonOf(mountpoint: string): number {
  const [pid, ...others] = processesOf(mountpoint)
  if (pid === undefined || others.length > 0) throw new Error(`not one daemon at ${mountpoint}: ${pid} ${others}`)
  return pid
}

async function stopBackground(mountpoint: string): Promise<void> {
  process.kill(daemonOf(mountpoint), 'SIGTERM')
  await until(() => processesOf(mountpoint).length === 0)
}

t.test('in the background', async (t) => {
  t.test('it returns once the tree answers, and prints nothing', async (t) => {
    const disk = loopDisk(t)
    const dir = place(t)
    const name = disk.diskseq()
    for (let round = 0; round < 5; round++) {
      const { code, stdout, stderr } = await shell(mountCommand(dir))
      t.ok(reads(join(dir, name)), 'an open at once reads the disk')
      t.ok(readdirSync(dir).includes(name), 'the disk is listed at once')
      t.strictSame({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' })
      await stopBackground(dir)
    }
    t.strictSame(mountsBelow(dir), [], 'SIGTERM removes the tree')
  })

  t.test('the daemon belongs to no terminal and holds no directory', async (t) => {
    const dir = place(t)
    t.equal((await shell(`cd '${dir}'; mkdir tree; ${mountCommand(join(dir, 'tree'))}`)).code, 0)
    const pid = daemonOf(dir)
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
    const [, , , session, terminal] = stat
      .slice(stat.lastIndexOf(')') + 2)
      .split(' ')
      .map(Number)
    t.equal(session, pid, 'it leads a session of its own')
    t.equal(terminal, 0, 'without a terminal')
    t.equal((await shell(`readlink /proc/${pid}/cwd`)).stdout, '/\n')
    await stopBackground(dir)
  })

  t.test('a relative mount point is below the directory that the command was started in', async (t) => {
    const dir = place(t)
    // In a mount namespace of its own, in case it mounts in another place than meant.
    const { code, stderr, stdout } = await shell(
      `mount -t tmpfs none '${dir}'; cd '${dir}'; ${mountCommand('diskseqfs-test-relative/tree')} || true
       grep -c " ${dir}/diskseqfs-test-relative/tree .*fuse.diskseqfs" /proc/self/mountinfo || true
       awk '/fuse.diskseqfs/ && $5 ~ /diskseqfs-test-relative/ { print $5 }' /proc/self/mountinfo |
         while read -r tree; do ${PROGRAM.join(' ')} unmount "$tree"; done
       [ ! -e /diskseqfs-test-relative ] || rmdir -p /diskseqfs-test-relative/tree || true`,
      { isolated: true },
    )
    t.strictSame({ code, stderr, stdout }, { code: 0, stderr: '', stdout: '1\n' })
  })

  t.test('-- ends the options', async (t) => {
    const dir = place(t)
    const { code, stderr } = await shell(`${mountCommand('--', dir)}`)
    t.strictSame({ code, stderr }, { code: 0, stderr: '' })
    t.equal(mountsBelow(dir).length, 1)
  })
})

t.test('-f stays in the foreground until it is told to stop', async (t) => {
  const dir = place(t)
  const daemon = await serve(dir)
  await sleep(500)
  t.equal(daemon.exitCode(), null)
  daemon.kill('SIGTERM')
  t.strictSame(await daemon.ended(), [0, null])
})

t.test('without arguments the tree is at /dev/disk/by-diskseq', async (t) => {
  const dir = place(t)
  const { code, stdout, stderr } = await shell(
    `${privateDev(dir, ['fuse'])}
     ${mountCommand()}
     grep -o ' /dev/disk/by-diskseq .*- fuse.diskseqfs' /proc/self/mountinfo | cut -d' ' -f2
     ls /dev/disk/by-diskseq >/dev/null && echo answers
     ${PROGRAM.join(' ')} unmount && echo unmounted
     grep -c fuse.diskseqfs.*by-diskseq /proc/self/mountinfo || true`,
    { isolated: true },
  )
  t.strictSame({ code, stdout, stderr }, { code: 0, stdout: '/dev/disk/by-diskseq\nanswers\nunmounted\n0\n', stderr: '' })
})

t.test('a missing mount point is made, with its parents', async (t) => {
  const dir = place(t)
  const mountpoint = join(dir, 'a b/ü/tree')
  t.equal((await shell(mountCommand(mountpoint))).code, 0)
  t.equal(mountsBelow(dir)[0]?.target, mountpoint, 'blanks and other letters in its path work')
  t.ok(readdirSync(mountpoint).length >= 0)
  await stopBackground(dir)
  t.strictSame(readdirSync(mountpoint), [], 'an empty directory remains')
})

t.test('the mount has the flags that opens and safety need', async (t) => {
  const { mountpoint } = await startTree(t)
  const [entry, ...others] = mountsBelow(mountpoint)
  t.strictSame(others, [])
  t.equal(entry?.type, 'fuse.diskseqfs')
  for (const flag of ['rw', 'nosuid', 'noexec']) t.ok(entry?.flags.includes(flag), flag)
  t.notOk(entry?.flags.includes('nodev'), 'not nodev')
  for (const flag of ['default_permissions', 'allow_other']) t.ok(entry?.superFlags.includes(flag), flag)
})

t.test(twoForms('-o'), async (t) => {
  t.test('takes the options of the command line, and what else fstab has', async (t) => {
    const dir = place(t)
    const options = 'rw,nofail,_netdev,x-systemd.automount,noatime,linger=7,hold=60,open_timeout=3,log_level=debug,log_format=json'
    const daemon = await serve(dir, { args: ['-o', options] })
    t.ok(mountsBelow(dir)[0]?.flags.includes('noatime'))
    daemon.kill('SIGTERM')
    t.strictSame(await daemon.ended(), [0, null])
  })

  t.test('log_level works in -o, and the command line overrides it', async (t) => {
    const dir = place(t)
    for (const [args, logs] of [
      [['-o', 'log_level=error'], false],
      [['-o', 'log_level=error', '--log-level', 'info'], true],
    ] as const) {
      const daemon = await serve(dir, { args: [...args], redirect: `2>'${dir}.log'` })
      cleanup(t, () => rmSync(`${dir}.log`, { force: true }))
      daemon.kill('SIGTERM')
      t.strictSame(await daemon.ended(), [0, null])
      t.equal(readFileSync(`${dir}.log`, 'utf8').includes('mounted'), logs, args.join(' '))
    }
  })

  for (const [options, says] of [
    ['nodev', /nodev.*remove it/],
    ['suid', /suid.*remove it/],
    ['exec', /exec.*remove it/],
    ['fancy', /fancy: not known; see diskseqfs mount --help/],
    ['rw,fancy=1', /fancy=1: not known/],
    ['constructor', /constructor: not known/],
    ['linger', /linger/],
    ['linger=soon', /linger=soon: .*whole number from 0 to 60000/],
    ['hold=-1', /hold=-1: .*whole number/],
    ['open_timeout=', /open_timeout=: .*whole number/],
    ['log_level=loud', /log_level=loud: .*fatal, error, warn/],
    ['log_format=xml', /log_format=xml: .*pretty, json/],
  ] as const) {
    for (const flags of FORMS) {
      t.test(`${options} is refused (${flags[0] ?? 'background'})`, (t) =>
        refused(t, { script: (dir) => mountCommand(...flags, join(dir, 'tree'), '-o', options), code: 2, says }),
      )
    }
  }
})

interface Refusal extends ShellOptions {
  readonly script: (dir: string) => string
  readonly code?: number
  readonly says: RegExp
}

/** For any fault: one line that says what to do, and nothing is left behind. */
async function refused(t: Test, { script, code = 1, says, ...options }: Refusal): Promise<void> {
  const dir = place(t)
  const before = mountsBelow(dir)
  const outcome = await shell(script(dir), options)
  t.equal(outcome.code, code, 'exit code')
  t.equal(outcome.stdout, '', 'nothing on stdout')
  t.match(outcome.stderr, /^diskseqfs: [^\n]+\n$/, 'one line on stderr')
  t.match(outcome.stderr, says, 'which says what is wrong')
  t.strictSame(mountsBelow(dir), before, 'nothing left mounted')
  t.strictSame(processesOf(dir), [], 'no process left')
  if (existsSync(join(dir, 'lock'))) rmSync(readFileSync(join(dir, 'lock'), 'utf8').trim())
  t.notOk(existsSync(lockOf(join(dir, 'tree'))), 'no lock left')
}

/** A /dev with only what any program needs, and `more`. */
function privateDev(dir: string, more: readonly string[] = []): string {
  return `mkdir '${dir}/dev'; mount -t tmpfs none '${dir}/dev'
    for node in null zero random urandom ${more.join(' ')}; do
      touch "${dir}/dev/$node"; mount --bind "/dev/$node" "${dir}/dev/$node"
    done
    mount --rbind '${dir}/dev' /dev
    `
}

/** Shell commands on the lock of the mount point `tree`; cleanup removes the lock. */
const lockedAs = (dir: string, commands: string) =>
  `lock=/run/diskseqfs/$(stat -c %d:%i '${dir}/tree')@$(stat -Lc %i /proc/self/ns/mnt).lock; echo "$lock" >'${dir}/lock'; ${commands};`

const faults: readonly (Omit<Refusal, 'script'> & {
  readonly name: string
  /** Shell commands that cause the fault. */
  readonly before?: (dir: string) => string
  /** Relative to the test's directory. */
  readonly mountpoint?: string
  readonly wrapper?: string
})[] = [
  { name: 'not root', uid: NOBODY, says: /only root .* run this as root/ },
  {
    name: 'root without CAP_SYS_ADMIN, as in a container',
    wrapper: 'setpriv --bounding-set -sys_admin',
    says: /CAP_SYS_ADMIN|privileged/,
  },
  {
    name: 'no /dev/fuse',
    isolated: true,
    before: privateDev,
    says: /\/dev\/fuse is missing: load the module \(modprobe fuse\)/,
  },
  {
    name: '/dev/fuse is some other device',
    isolated: true,
    before: () => 'mount --bind /dev/null /dev/fuse\n',
    says: /\/dev\/fuse is not/,
  },
  {
    name: 'no sysfs',
    isolated: true,
    before: () => 'mount -t tmpfs none /sys\n',
    says: /cannot read \/sys\/class\/block: ENOENT; is sysfs mounted at \/sys\?/,
  },
  {
    name: 'a kernel without sequence numbers',
    isolated: true,
    before: () => `mount -t tmpfs none /sys; mkdir -p /sys/class/block/sda
      printf 'MAJOR=8\\nMINOR=0\\nDEVNAME=sda\\nDEVTYPE=disk\\n' >/sys/class/block/sda/uevent\n`,
    says: /no sequence numbers; Linux 5\.15 or later is needed/,
  },
  {
    name: 'the mount point is a file',
    before: (dir) => `: >'${dir}/tree'\n`,
    says: /tree: not a directory; choose a directory/,
  },
  {
    name: 'the mount point is below a file',
    before: (dir) => `: >'${dir}/file'\n`,
    mountpoint: 'file/tree',
    says: /file\/tree: not a directory; choose a directory/,
  },
  {
    name: 'the mount point cannot be made',
    isolated: true,
    before: (dir) => `mkdir '${dir}/ro'; mount -t tmpfs -o ro none '${dir}/ro'\n`,
    mountpoint: 'ro/tree',
    says: /ro\/tree: cannot be made .*(read-only|EROFS)/,
  },
  {
    name: 'another one is starting there',
    before: (dir) =>
      `mkdir '${dir}/tree'; ${lockedAs(dir, '(umask 077; mkdir -p "${lock%/*}"; : >"$lock")')} exec 9<>"$lock"; flock --nonblock 9\n`,
    says: /tree: another diskseqfs is starting there; it has locked \/run\/diskseqfs\/\d+:\d+@\d+\.lock/,
  },
  {
    name: 'its lock can be opened by any user',
    before: (dir) => `mkdir '${dir}/tree'; ${lockedAs(dir, 'mkdir -p -m 700 "${lock%/*}"; : >"$lock"; chmod 644 "$lock"')}\n`,
    says: /\.lock: others than root can open it, so it is no lock; remove it/,
  },
  {
    name: 'something else is mounted there',
    isolated: true,
    before: (dir) => `mkdir '${dir}/tree'; mount -t tmpfs mine '${dir}/tree'\n`,
    says: /tree: busy, tmpfs \(mine\) is mounted there; unmount it or choose another directory/,
  },
]

for (const flags of FORMS) {
  const how = flags.length > 0 ? 'in the foreground' : 'in the background'
  t.test(twoForms(`what cannot start ${how} says why and leaves nothing`), async (t) => {
    for (const { name, before = () => '', mountpoint = 'tree', wrapper = '', ...refusal } of faults) {
      t.test(name, (t) =>
        refused(t, {
          ...refusal,
          script: (dir) => `${before(dir)}exec ${wrapper} ${mountCommand(...flags, join(dir, mountpoint))}`,
        }),
      )
    }

    for (const first of ['in the foreground', 'in the background']) {
      t.test(`served already, by a daemon ${first}`, async (t) => {
        const dir = place(t)
        if (first === 'in the foreground') await serve(dir)
        else await shell(mountCommand(dir))
        const pid = daemonOf(dir)
        for (const path of [dir, `${dir}/`]) {
          const { code, stdout, stderr } = await shell(mountCommand(...flags, path))
          t.strictSame({ code, stdout }, { code: 1, stdout: '' })
          t.match(stderr, /^diskseqfs: [^\n]+: already served by another diskseqfs; see diskseqfs unmount --help\n$/)
        }
        t.equal(mountsBelow(dir).length, 1, 'one mount')
        t.equal(daemonOf(dir), pid, 'the first daemon')
        t.ok(readdirSync(dir).length >= 0, 'which answers')
      })
    }

    t.test('the mount of a killed daemon is replaced', async (t) => {
      const parent = place(t)
      const dir = join(parent, 'tree')
      symlinkSync(parent, `${parent}/link`)
      for (const [path, looked] of [
        [dir, false],
        [join(parent, 'link/tree'), false],
        [dir, true],
      ] as const) {
        const dead = await serve(dir)
        if (looked) statSync(dir)
        dead.kill('SIGKILL')
        await dead.ended()
        if (looked) {
          t.ok(statSync(dir).isDirectory(), 'the kernel remembers what it was told')
        } else {
          t.equal(
            errnoOf(() => readdirSync(dir)),
            'ENOTCONN',
            'a dead mount',
          )
        }
        if (flags.length > 0) {
          const { child, stderr } = spawnMount('-f', path)
          await until(() => child.exitCode !== null || stderr().includes('"msg":"mounted"'), TIME_LIMIT_MS)
          t.match(stderr(), /taking away the mount of a daemon that died/, 'the log says so')
        } else {
          const { code, stderr } = await shell(mountCommand(path))
          t.strictSame({ code, stderr }, { code: 0, stderr: '' }, path)
        }
        t.equal(mountsBelow(dir).length, 1, 'one mount')
        t.equal(
          errnoOf(() => readdirSync(dir)),
          undefined,
          'which answers',
        )
        for (const pid of processesOf(parent)) process.kill(pid, 'SIGTERM')
        await until(() => processesOf(parent).length === 0)
        await shell(`umount -l '${dir}' 2>/dev/null || true`)
      }
    })

    t.test('if several start at the same instant, one wins', async (t) => {
      const dir = place(t)
      for (let round = 0; round < 4; round++) {
        const children = Array.from({ length: 3 }, () => spawnMount(...flags, dir))
        const ended = () => children.filter(({ child }) => child.exitCode !== null)
        const expected = flags.length > 0 ? 2 : 3
        await until(() => ended().length === expected && mountsBelow(dir).length > 0, TIME_LIMIT_MS)
        await sleep(50)
        const losers = ended().filter(({ child }) => child.exitCode !== 0)
        t.equal(losers.length, 2, 'two lose')
        for (const { child, stderr } of losers) {
          t.equal(child.exitCode, 1)
          t.match(stderr(), /^diskseqfs: [^\n]+: (already served by another diskseqfs|another diskseqfs is starting there)[^\n]*\n$/)
        }
        t.equal(mountsBelow(dir).length, 1, 'one mount')
        t.ok(readdirSync(dir).length >= 0, 'which answers')
        await stopBackground(dir)
        await until(() => mountsBelow(dir).length === 0)
      }
    })
  })
}

/** Starts a daemon at a mount point that an unprivileged user may open and has locked. */
const whileLocked = (t: Test, twin?: Twin) =>
  startTree(t, {
    ...(twin && { twin }),
    before: async (mountpoint) => {
      chmodSync(mountpoint, 0o755)
      await held(t, mountpoint, NOBODY)
    },
  })

t.test('no user can keep a daemon from a mount point by locking it', async (t) => {
  const tree = await whileLocked(t)
  t.equal(readdirSync(tree.mountpoint).length > 0, true, 'it serves')
})

t.test('twin: if it locks the mount point itself, any user can', async (t) => {
  await t.rejects(whileLocked(t, 'lock-on-mountpoint'), /another diskseqfs is starting there/)
})

t.test("the lock of a mount point is root's alone, and ends with the daemon", async (t) => {
  let lock = ''
  const tree = await startTree(t, { before: async (mountpoint) => void (lock = lockOf(mountpoint)) })
  const { uid, mode } = statSync(lock)
  t.strictSame([uid, mode & 0o7777], [0, 0o600])
  const open = await run('sh', ['-c', `exec 9<'${lock}'`], { uid: NOBODY, gid: NOBODY })
  t.not(open.code, 0, 'no other user can open it')
  t.equal((await run('flock', ['--nonblock', lock, 'true'])).code, 1, 'it is held')
  await tree.stop()
  t.notOk(existsSync(lock), 'it is gone')
})

t.test('the daemon waits for a lock that is about to be released', async (t) => {
  const tree = startTree(t, {
    before: async (mountpoint) => {
      const lock = lockOf(mountpoint)
      execFileSync('sh', ['-c', `umask 077; mkdir -p /run/diskseqfs; : >'${lock}'`])
      const child = spawn('flock', ['--no-fork', lock, 'sh', '-c', 'echo held; exec sleep 0.6'], { stdio: ['ignore', 'pipe', 'ignore'] })
      cleanup(t, () => child.kill())
      await new Promise((resolve) => child.stdout.once('data', resolve))
    },
  })
  t.equal(readdirSync((await tree).mountpoint).length > 0, true)
})

t.test('daemons at the same path, but in different directories, do not affect each other', async (t) => {
  const dir = place(t)
  const there = await serve(join(dir, 'tree'))
  // In that mount namespace the path leads to another directory.
  const { code, stderr } = await shell(
    `umount '${dir}/tree'; mount -t tmpfs none '${dir}'; ${mountCommand(join(dir, 'tree'))}; ls '${dir}/tree' >/dev/null; umount '${dir}/tree'`,
    { isolated: true },
  )
  t.strictSame({ code, stderr }, { code: 0, stderr: '' })
  there.kill('SIGTERM')
  await there.ended()
})

t.test('daemons at the same directory in two mount namespaces do not affect each other', async (t) => {
  const dir = place(t)
  const tree = join(dir, 'tree')
  const there = await serve(tree)
  const { code, stdout, stderr } = await shell(
    `umount '${tree}'; ${mountCommand(tree)} && findmnt --noheadings --output FSTYPE '${tree}'; umount '${tree}'`,
    { isolated: true },
  )
  t.strictSame({ code, stdout, stderr }, { code: 0, stdout: 'fuse.diskseqfs\n', stderr: '' }, 'each serves')
  t.ok(readdirSync(tree).length >= 0, 'the first one still serves')
  there.kill('SIGTERM')
  await there.ended()
})

t.test('two mount namespaces, twin: with one lock for all of them only the first daemon starts', async (t) => {
  const twin = 'one-lock-for-all'
  const { mountpoint } = await startTree(t, { twin })
  const { code, stderr } = await shell(
    `umount '${mountpoint}'; exec env --unset=NODE_OPTIONS '${process.execPath}' '${TWIN_DAEMON}' ${twin} '${mountpoint}'`,
    { isolated: true },
  )
  t.not(code, 0)
  t.match(stderr, /another diskseqfs is starting there/)
})

t.test('stopping', async (t) => {
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    t.test(`${signal} unmounts, though the tree is in use`, async (t) => {
      const disk = loopDisk(t)
      const dir = place(t)
      const daemon = await serve(dir)
      const fd = openSync(join(dir, disk.diskseq()), 'r+')
      cleanup(t, () => closeSync(fd))
      const visitor = spawn('sh', ['-c', 'echo in; read line; cd /; echo out'], {
        cwd: dir,
        stdio: ['pipe', 'pipe', 'ignore'],
      })
      let said = ''
      visitor.stdout.on('data', (chunk: Buffer) => (said += chunk.toString()))
      await until(() => said === 'in\n')
      daemon.kill(signal)
      t.strictSame(await daemon.ended(), [0, null], 'exit code 0')
      t.strictSame(mountsBelow(dir), [], 'the mount is gone')
      t.match(daemon.log(), new RegExp(`"signal":"${signal}"`), 'the log says why')
      t.equal(writeSync(fd, Buffer.alloc(512, 'x'), 0, 512, 0), 512, 'the open file can be written')
      t.equal(readFileSync(disk.path, { encoding: 'latin1' }).slice(0, 3), 'xxx', 'and it is the disk')
      visitor.stdin.end('\n')
      await until(() => said === 'in\nout\n')
    })

    t.test(`${signal} ends the daemon in the background too`, async (t) => {
      const dir = place(t)
      await shell(mountCommand(dir))
      process.kill(daemonOf(dir), signal)
      await until(() => processesOf(dir).length === 0)
      t.strictSame(mountsBelow(dir), [])
    })
  }

  for (const [first, second] of [
    ['SIGTERM', 'SIGTERM'],
    ['SIGINT', 'SIGINT'],
    ['SIGTERM', 'SIGINT'],
  ] as const) {
    t.test(`${second} after ${first} does no harm`, async (t) => {
      const dir = place(t)
      for (const delay of [0, 1, 3, 10]) {
        const daemon = await serve(dir)
        daemon.kill(first)
        await sleep(delay)
        daemon.kill(second)
        t.strictSame(await daemon.ended(), [0, null], `after ${delay} ms`)
        t.strictSame(mountsBelow(dir), [], 'the mount is gone')
        await shell(`umount -l '${dir}' 2>/dev/null || true`)
      }
    })
  }

  t.test('a signal during the start leaves nothing', async (t) => {
    const dir = place(t)
    const tree = join(dir, 'tree')
    for (let delay = 20; delay <= 160; delay += 10) {
      const { child, end, stderr } = spawnMount('-f', tree)
      await sleep(delay)
      child.kill('SIGTERM')
      const outcome = await Promise.race([end, sleep(5000, 'still there', { ref: false })])
      t.not(outcome, 'still there', `it ends (signal after ${delay} ms)`)
      t.notMatch(stderr(), /\n {4}at /, 'without a stack trace')
      t.strictSame(mountsBelow(dir), [], 'nothing mounted')
      child.kill('SIGKILL')
      await end
      await shell(`umount -l '${tree}' 2>/dev/null || true`)
    }
  })

  for (const lazy of [false, true]) {
    t.test(`umount${lazy ? ' --lazy' : ''} by another process ends the daemon`, async (t) => {
      const disk = loopDisk(t)
      const dir = place(t)
      const daemon = await serve(dir)
      const fd = lazy ? openSync(join(dir, disk.diskseq()), 'r') : -1
      cleanup(t, () => (fd < 0 ? undefined : closeSync(fd)))
      const { code, stderr } = await shell(`umount ${lazy ? '--lazy' : ''} '${dir}'`)
      t.strictSame({ code, stderr }, { code: 0, stderr: '' })
      t.strictSame(await daemon.ended(), [0, null])
      t.match(daemon.log(), /"mountpoint":"[^"]+","msg":"the tree was unmounted"/)
      if (lazy) t.equal(readSync(fd, Buffer.alloc(512), 0, 512, 0), 512, 'the open file still reads')
    })
  }
})

t.test(twoForms('whatever happens to its output, the tree answers and the daemon ends well'), async (t) => {
  for (const redirect of ['>&-', '2>&-', '<&- >&- 2>&-', '2>/dev/full']) {
    t.test(`-f ${redirect}`, async (t) => {
      const disk = loopDisk(t)
      const dir = place(t)
      const daemon = await serve(dir, { redirect })
      t.equal(
        errnoOf(() => openSync(join(dir, '999999999'), 'r')),
        'ENOENT',
      )
      t.ok(reads(join(dir, disk.diskseq())))
      daemon.kill('SIGTERM')
      t.strictSame(await daemon.ended(), [0, null])
      t.strictSame(mountsBelow(dir), [])
    })

    t.test(`in the background ${redirect}`, async (t) => {
      const dir = place(t)
      const { code, stdout, stderr } = await shell(`${mountCommand(dir)} ${redirect}`)
      t.strictSame({ code, stdout, stderr }, { code: 0, stdout: '', stderr: '' })
      t.ok(readdirSync(dir).length >= 0)
      await stopBackground(dir)
    })
  }

  for (const format of ['json', 'pretty']) {
    t.test(`the reader of stderr went away (${format})`, async (t) => {
      const disk = loopDisk(t)
      const dir = place(t)
      const fifo = join(dir, 'fifo')
      const tree = join(dir, 'tree')
      execFileSync('mkfifo', [fifo])
      const reader = openSync(fifo, constants.O_RDONLY | constants.O_NONBLOCK)
      const writer = openSync(fifo, constants.O_WRONLY)
      const daemon = await serve(tree, { args: ['--log-format', format], stdio: ['ignore', 'ignore', writer] })
      closeSync(writer)
      closeSync(reader)
      for (let i = 0; i < 20; i++)
        t.equal(
          errnoOf(() => openSync(join(tree, `99999990${i}`), 'r')),
          'ENOENT',
        )
      await sleep(1200) // until the line that counts the lines left out
      t.ok(reads(join(tree, disk.diskseq())))
      t.equal(daemon.exitCode(), null)
      daemon.kill('SIGTERM')
      t.strictSame(await daemon.ended(), [0, null])
      t.strictSame(mountsBelow(tree), [])
    })

    t.test(`a full stderr is not read while opens are refused (${format})`, async (t) => {
      const disk = loopDisk(t)
      const dir = place(t)
      const fifo = join(dir, 'fifo')
      const tree = join(dir, 'tree')
      execFileSync('mkfifo', [fifo])
      const reader = openSync(fifo, constants.O_RDONLY | constants.O_NONBLOCK)
      cleanup(t, () => closeSync(reader))
      const filler = openSync(fifo, constants.O_WRONLY | constants.O_NONBLOCK)
      while (errnoOf(() => writeSync(filler, Buffer.alloc(4096))) === undefined);
      closeSync(filler)
      const writer = openSync(fifo, constants.O_WRONLY)
      const daemon = await serve(tree, { args: ['--log-format', format], stdio: ['ignore', 'ignore', writer] })
      closeSync(writer)
      let slowest = 0
      const end = Date.now() + (LONG ? 3000 : 1000)
      for (let i = 0; Date.now() < end; i++) {
        const began = performance.now()
        if (errnoOf(() => openSync(join(tree, String(900_000_000 + i)), 'r')) !== 'ENOENT') t.fail('not ENOENT')
        if (i % 10 === 0 && !reads(join(tree, disk.diskseq()))) t.fail('no read')
        slowest = Math.max(slowest, performance.now() - began)
      }
      t.comment(`slowest answer: ${slowest.toFixed(1)} ms`)
      t.ok(slowest < 1000, 'no answer took as long as a second')
      daemon.kill('SIGTERM')
      t.strictSame(await daemon.ended(), [0, null], 'SIGTERM still ends it')
      t.strictSame(mountsBelow(tree), [])
    })
  }
})

t.test(twoForms('the log'), async (t) => {
  t.test('as JSON has level, time and message on each line, and nothing else on stderr', async (t) => {
    const dir = place(t)
    const daemon = await serve(dir, { args: ['--log-level', 'debug'] })
    errnoOf(() => openSync(join(dir, '999999999'), 'r'))
    daemon.kill('SIGTERM')
    t.strictSame(await daemon.ended(), [0, null])
    const lines = daemon.log().trimEnd().split('\n')
    const messages = lines.map((text) => {
      const line = JSON.parse(text) as Record<string, unknown>
      t.match(line, { level: /^(error|warn|info|debug)$/, time: /^\d{4}-\d\d-\d\dT[\d:.]+Z$/, msg: /./ })
      return line['msg']
    })
    t.strictSame(messages, ['mounted', 'refused an open', 'stopping', 'unmounted'])
    t.match(JSON.parse(lines[0] as string), { mountpoint: dir, devices: Number })
  })

  t.test('is readable as text, without escape sequences if stderr is no terminal', async (t) => {
    const dir = place(t)
    const daemon = await serve(dir, { args: ['--log-format', 'pretty'] })
    daemon.kill('SIGTERM')
    t.strictSame(await daemon.ended(), [0, null])
    const lines = daemon.log().trimEnd().split('\n')
    t.equal(lines.length, 3)
    for (const line of lines) t.match(line, /^\[\d\d:\d\d:\d\d\.\d{3}\] INFO: \w+ \{"[ -~]+\}$/)
  })

  t.test('is text on a terminal', async (t) => {
    const dir = place(t)
    const child = spawn('script', ['-qec', `exec ${mountCommand('-f', dir)}`, '/dev/null'], {
      stdio: ['pipe', 'pipe', 'ignore'],
    })
    let text = ''
    child.stdout.on('data', (chunk: Buffer) => (text += chunk.toString()))
    const end = new Promise((resolve) => child.on('close', resolve))
    await until(() => text.includes('mounted'), TIME_LIMIT_MS)
    t.match(text, /INFO/)
    t.notMatch(text, /"msg"/)
    child.stdin.write('\x03')
    t.equal(await end, 0, 'Ctrl-C ends it')
    t.match(text, /unmounted/)
    t.strictSame(mountsBelow(dir), [])
  })

  t.test('has no line for an open that succeeds', async (t) => {
    const disk = loopDisk(t)
    const tree = await startTree(t)
    const path = join(tree.mountpoint, disk.diskseq())
    const before = tree.log().length
    for (let i = 0; i < 1000; i++) closeSync(openSync(path, 'r'))
    await sleep(200)
    t.strictSame(tree.log().slice(before), [])
  })

  t.test('names disk, caller, errno and reason of an open that is refused', async (t) => {
    const tree = await startTree(t)
    const outcome = await run('sh', ['-c', `echo $$; exec <'${tree.mountpoint}/987654321p3'`], { uid: NOBODY, gid: NOBODY })
    t.not(outcome.code, 0)
    await until(() => tree.log().some(({ msg }) => msg === 'refused an open'))
    const line = tree.log().find(({ msg }) => msg === 'refused an open')
    t.match(line, {
      level: 'info',
      diskseq: '987654321p3',
      tid: Number(outcome.stdout),
      uid: NOBODY,
      errno: 'ENOENT',
      reason: 'no such disk (any more)',
    })
  })

  t.test('has no line for a disk that is only looked at', async (t) => {
    const tree = await startTree(t)
    for (let i = 0; i < 50; i++) existsSync(join(tree.mountpoint, String(987654000 + i)))
    await sleep(100)
    t.notOk(tree.log().some(({ msg }) => msg === 'refused an open'))
  })

  t.test('counts the refusals of a flood, and writes few of them', async (t) => {
    const FLOOD = LONG ? 300 : 60
    const tree = await startTree(t)
    const began = performance.now()
    for (let i = 0; i < FLOOD; i++) {
      t.equal(
        errnoOf(() => openSync(join(tree.mountpoint, String(987650000 + i)), 'r')),
        'ENOENT',
      )
    }
    const most = 10 * (Math.ceil((performance.now() - began) / 1000) + 1)
    const written = () => tree.log().filter(({ msg }) => msg === 'refused an open').length
    const counted = () => tree.log().reduce((sum, line) => sum + ((line['suppressed'] as number | undefined) ?? 0), 0)
    await until(() => written() + counted() === FLOOD)
    t.comment(`${written()} written, ${counted()} counted`)
    t.ok(written() <= most, 'ten for each second it took')
    t.ok(counted() >= FLOOD - most)
  })
})

t.test('the contents of the directory are covered, and come back', async (t) => {
  const dir = place(t)
  const tree = join(dir, 'tree')
  mkdirSync(tree)
  writeFileSync(join(tree, 'file'), '')
  const daemon = await serve(tree)
  t.notOk(existsSync(join(tree, 'file')))
  daemon.kill('SIGTERM')
  await daemon.ended()
  t.ok(existsSync(join(tree, 'file')))
})
