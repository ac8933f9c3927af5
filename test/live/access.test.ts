// SPDX-License-Identifier: MIT
/**
 * The rules for opening a device node, compared with the kernel's own, for every combination of
 * owner, group, mode and ACL, and for real processes.
 */
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { chmodSync, chownSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { Access, granted, type Permissions } from '../../src/gate/access.js'
import { DeviceNodes } from '../../src/devices/device-node.js'
import { ACL_ACCESS } from '../../src/fuse/wire.js'
import { native } from '../../src/native.js'
import { until } from '../helpers/tree.js'
import { DISK, GROUP, NAMED_GROUP, NAMED_USER, OTHER_GROUP, OWNER, ROOTS, STRANGER, acl, fakeThread, may } from '../helpers/credentials.js'

interface Who {
  readonly uid: number
  readonly gid: number
  readonly groups: readonly number[]
}

const PEOPLE: Record<string, Who> = {
  'the owner': { uid: OWNER, gid: OTHER_GROUP, groups: [] },
  'the owner, in its group': { uid: OWNER, gid: GROUP, groups: [NAMED_GROUP] },
  'in the group': { uid: STRANGER, gid: GROUP, groups: [] },
  'in the group, by supplement': { uid: STRANGER, gid: OTHER_GROUP, groups: [61004, GROUP] },
  'in the named group': { uid: STRANGER, gid: NAMED_GROUP, groups: [] },
  'in both groups': { uid: STRANGER, gid: GROUP, groups: [NAMED_GROUP] },
  'the named user': { uid: NAMED_USER, gid: OTHER_GROUP, groups: [] },
  'the named user, in both groups': { uid: NAMED_USER, gid: GROUP, groups: [NAMED_GROUP] },
  'a stranger': { uid: STRANGER, gid: OTHER_GROUP, groups: [61004] },
}

const as = ({ uid, gid, groups }: Who) => [
  '--reuid',
  String(uid),
  '--regid',
  String(gid),
  ...(groups.length > 0 ? ['--groups', groups.join()] : ['--clear-groups']),
]

/** A directory of files that any user may reach, each named after what is set on it. */
function files(t: Test) {
  const directory = mkdtempSync(join(tmpdir(), 'diskseqfs-access-'))
  chmodSync(directory, 0o755)
  const fd = native.openDirectory(directory)
  t.teardown(() => {
    native.close(fd)
    rmSync(directory, { recursive: true })
  })
  const nodes = new DeviceNodes(native, fd)
  return {
    directory,
    add(name: string, mode: number, uid = OWNER, gid = GROUP) {
      writeFileSync(join(directory, name), '')
      chownSync(join(directory, name), uid, gid)
      chmodSync(join(directory, name), mode)
    },
    permissions(name: string): Permissions {
      const node = native.openNode(fd, name)
      const { mode, uid, gid } = nodes.stat(node)
      const acl = nodes.acl(node)
      native.close(node)
      return { mode, uid, gid, ...(acl !== undefined && { acl }) }
    },
  }
}

/** Names of the files that the kernel lets the caller open, for reading or for writing. */
function openable(directory: string, who: Who): { names: Set<string>; tried: number } {
  const script = `
    exec 2>/dev/null
    for f in *; do
      if command : <"$f" || command : >>"$f"; then echo "$f"; else echo "- $f"; fi
    done`
  const lines = execFileSync('setpriv', [...as(who), 'sh', '-c', script], { cwd: directory, encoding: 'utf8' })
    .trimEnd()
    .split('\n')
  return { names: new Set(lines.filter((line) => !line.startsWith('- '))), tried: lines.length }
}

function compare(t: Test, { directory, permissions }: ReturnType<typeof files>, names: string[]) {
  for (const [what, who] of Object.entries(PEOPLE)) {
    const { names: kernel, tried } = openable(directory, who)
    t.equal(tried, names.length, `${what}: every file was tried`)
    const groups = new Set([who.gid, ...who.groups])
    const decided = new Set(names.filter((name) => granted(permissions(name), who.uid, groups)))
    const only = (a: Set<string>, b: Set<string>) => [...a].filter((name) => !b.has(name))
    t.strictSame(only(kernel, decided), [], `${what}: nothing is refused that the kernel allows`)
    t.strictSame(only(decided, kernel), [], `${what}: nothing is allowed that the kernel refuses`)
    t.ok(kernel.size > 0 && kernel.size < names.length, `${what}: some of each`)
  }
}

const BITS = [0, 1, 2, 4, 6]

t.test('modes: as the kernel decides', async (t) => {
  const made = files(t)
  const names: string[] = []
  for (const user of BITS) {
    for (const group of BITS) {
      for (const other of BITS) {
        const name = `${user}${group}${other}`
        made.add(name, (user << 6) | (group << 3) | other)
        names.push(name)
      }
    }
  }
  compare(t, made, names)
})

t.test('ACLs: as the kernel decides', async (t) => {
  const made = files(t)
  const names: string[] = []
  const rwx = (bits: number) => `${bits & 4 ? 'r' : '-'}${bits & 2 ? 'w' : '-'}${bits & 1 ? 'x' : '-'}`
  let acls = ''
  for (const owner of [0, 6]) {
    for (const namedUser of [undefined, 0, 2, 4]) {
      for (const group of [0, 4]) {
        for (const namedGroup of [undefined, 0, 2, 7]) {
          for (const mask of [0, 1, 2, 4, 7]) {
            for (const other of [0, 4]) {
              if (namedUser === undefined && namedGroup === undefined) continue
              const name = `u${owner}.${namedUser ?? 'x'}-g${group}.${namedGroup ?? 'x'}-m${mask}-o${other}`
              made.add(name, 0)
              names.push(name)
              acls += [
                `# file: ${name}`,
                `user::${rwx(owner)}`,
                ...(namedUser === undefined ? [] : [`user:${NAMED_USER}:${rwx(namedUser)}`]),
                `group::${rwx(group)}`,
                ...(namedGroup === undefined ? [] : [`group:${NAMED_GROUP}:${rwx(namedGroup)}`]),
                `mask::${rwx(mask)}`,
                `other::${rwx(other)}`,
                '',
                '',
              ].join('\n')
            }
          }
        }
      }
    }
  }
  execFileSync('setfacl', ['--restore=-'], { cwd: made.directory, input: acls })
  t.ok(
    names.every((name) => made.permissions(name).acl !== undefined),
    `${names.length} files have an ACL`,
  )
  compare(t, made, names)
})

t.test('a caller that is certain to be allowed is allowed by the kernel', async (t) => {
  const made = files(t)
  const { access } = fakeThread(t)
  const names: string[] = []
  for (const user of BITS) for (const group of BITS) for (const rest of BITS) names.push(`${user}${group}${rest}`)
  for (const name of names) made.add(name, parseInt(name, 8))
  for (const [what, who] of Object.entries(PEOPLE)) {
    const { names: kernel } = openable(made.directory, who)
    const node = (name: string) => made.permissions(name)
    t.strictSame(
      names.filter((name) => access.certain({ tid: 1, ...who }, node(name)) && !kernel.has(name)),
      [],
      `${what}: none too many`,
    )
    t.strictSame(
      names.filter((name) => Access.hopeless({ tid: 1, ...who }, node(name)) && kernel.has(name)),
      [],
      `${what}: a caller without hope is refused`,
    )
  }
})

/** A process that sleeps; its id. */
function sleeper(t: Test, args: string[]): number {
  const child = spawn('setpriv', [...args, 'sleep', '60'], { stdio: 'ignore' })
  t.teardown(() => child.kill('SIGKILL'))
  return child.pid as number
}

const isSleeping = (pid: number) => readFileSync(`/proc/${pid}/status`, 'utf8').startsWith('Name:\tsleep\n')

t.test('a real process: its supplementary groups, however many', async (t) => {
  const access = new Access(native)
  const many = Array.from({ length: 5000 }, (_, i) => 100_000 + i)
  const who = { uid: STRANGER, gid: OTHER_GROUP, groups: [...many, GROUP + 100_000] }
  const tid = sleeper(t, as(who))
  await until(() => isSleeping(tid))
  const of = { tid, uid: STRANGER, gid: OTHER_GROUP }
  t.equal(await may(access, of, DISK), false)
  t.equal(await may(access, of, { ...DISK, gid: GROUP + 100_000 }), true)
  t.equal(await may(access, of, { ...DISK, gid: 102_500 }), true)
})

t.test('a real process: its capabilities', async (t) => {
  const access = new Access(native)
  const cap = ['--inh-caps', '+dac_read_search', '--ambient-caps', '+dac_read_search']
  const who = as({ uid: STRANGER, gid: OTHER_GROUP, groups: [] })
  const tid = sleeper(t, [...who, ...cap])
  await until(() => isSleeping(tid))
  t.equal(await may(access, { tid, uid: STRANGER, gid: OTHER_GROUP }, ROOTS), true)
  const plain = sleeper(t, who)
  await until(() => isSleeping(plain))
  t.equal(await may(access, { tid: plain, uid: STRANGER, gid: OTHER_GROUP }, ROOTS), false, 'it has none')
})

t.test('root of a user namespace of its own: as the kernel decides', async (t) => {
  const who = as({ uid: STRANGER, gid: OTHER_GROUP, groups: [] })
  const probe = spawnSync('setpriv', [...who, 'unshare', '-U', '-r', 'true'], { encoding: 'utf8' })
  if (probe.status !== 0) {
    t.comment(`users may not make user namespaces here (${probe.stderr.trim()}), so none can be tested`)
    return
  }
  const access = new Access(native)
  const tid = sleeper(t, [...who, 'unshare', '-U', '-r'])
  await until(() => isSleeping(tid))
  const { directory, add, permissions } = files(t)
  add('root', 0o600, 0, 0)
  add('own', 0o000, STRANGER, OTHER_GROUP)
  add('group', 0o000, STRANGER, GROUP)
  add('owner', 0o000, OWNER, OTHER_GROUP)
  for (const [name, expected] of [
    ['root', false],
    ['own', true],
    ['group', false],
    ['owner', false],
  ] as const) {
    t.equal(await may(access, { tid, uid: STRANGER, gid: OTHER_GROUP }, permissions(name)), expected, name)
    const { status: code } = spawnSync('setpriv', [...who, 'unshare', '-U', '-r', 'sh', '-c', ': <"$0"', join(directory, name)])
    t.equal(code === 0, expected, `${name}: the kernel says the same`)
  }
})

t.test('the ACL of a file is as the kernel would hand it to a FUSE mount', async (t) => {
  const { directory, add, permissions } = files(t)
  add('file', 0o600)
  t.equal(permissions('file').acl, undefined, 'none')
  execFileSync('setfacl', ['-m', `u:${NAMED_USER}:r`, join(directory, 'file')])
  t.strictSame(permissions('file').acl, new Uint8Array(acl([1, 6], [2, 4, NAMED_USER], [4, 0], [16, 4], [32, 0])), ACL_ACCESS)
})
