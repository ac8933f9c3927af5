/**
 * Who could open a node: the rules here against the kernel's own, for every
 * combination of owner, group, mode and ACL, and for real processes.
 */
import { execFileSync, spawn, spawnSync } from 'node:child_process'
import { chmodSync, chownSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import t, { type Test } from 'tap'

import { Access, granted, type Permissions } from '../src/access.js'
import { ACL_ACCESS, DeviceNodes } from '../src/devnode.js'
import { native } from '../src/native.js'
import { until } from './helpers/tree.js'

/** Ids that no account needs to have. */
const OWNER = 60001
const NAMED_USER = 60002
const STRANGER = 60003
const GROUP = 61001
const NAMED_GROUP = 61002
const OTHER_GROUP = 61003

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
  '--reuid', String(uid), '--regid', String(gid),
  ...(groups.length > 0 ? ['--groups', groups.join()] : ['--clear-groups']),
]

/** A directory of files that anybody may reach, by the name of what is set on them. */
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

/** Names of the files that the kernel lets somebody open, for reading or for writing. */
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
  t.ok(names.every((name) => made.permissions(name).acl !== undefined), `${names.length} files have an ACL`)
  compare(t, made, names)
})

/** An ACL as the kernel gives it out, made by hand. */
function acl(...entries: [tag: number, permissions: number, id?: number][]): Buffer {
  const bytes = Buffer.alloc(4 + 8 * entries.length)
  bytes.writeUInt32LE(2, 0)
  entries.forEach(([tag, permissions, id = 0xffffffff], i) => {
    bytes.writeUInt16LE(tag, 4 + 8 * i)
    bytes.writeUInt16LE(permissions, 6 + 8 * i)
    bytes.writeUInt32LE(id, 8 + 8 * i)
  })
  return bytes
}

t.test('an ACL that is not understood is a doubt', async (t) => {
  const node = (bytes: Uint8Array) => ({ mode: 0o600, uid: 0, gid: 0, acl: bytes })
  const good = acl([1, 6], [4, 0], [16, 7], [32, 0])
  const stranger = (bytes: Uint8Array) => granted(node(bytes), STRANGER, new Set([GROUP]))
  t.equal(stranger(good), false)
  const later = Buffer.from(good)
  later.writeUInt32LE(3, 0)
  t.equal(stranger(later), true, 'another version')
  t.equal(stranger(good.subarray(0, good.length - 1)), true, 'cut off')
  t.equal(stranger(good.subarray(0, 3)), true, 'not even a version')
  t.equal(stranger(Buffer.alloc(0)), true, 'empty')
  t.equal(granted(node(Buffer.alloc(0)), 0, new Set()), true, 'its owner needs none')
})

t.test('an ACL may lie anywhere in memory', async (t) => {
  const bytes = Buffer.concat([Buffer.from([1, 2, 3]), acl([1, 6], [2, 4, NAMED_USER], [4, 0], [16, 4], [32, 0])])
  const node = { mode: 0o640, uid: 0, gid: 0, acl: bytes.subarray(3) }
  t.equal(granted(node, NAMED_USER, new Set()), true)
  t.equal(granted(node, STRANGER, new Set()), false)
})

const ROOTS: Permissions = { mode: 0o060600, uid: 0, gid: 0 }
const DISK: Permissions = { mode: 0o060660, uid: 0, gid: GROUP }
const TID = 4711

/** A /proc of files. */
function fakeProc(t: Test) {
  const proc = mkdtempSync(join(tmpdir(), 'diskseqfs-proc-'))
  t.teardown(() => rmSync(proc, { recursive: true }))
  const task = (name: string, namespace: number) => {
    mkdirSync(join(proc, name, 'ns'), { recursive: true })
    symlinkSync(`user:[${namespace}]`, join(proc, name, 'ns/user'))
  }
  task('self', 1)
  return {
    access: new Access(native, proc),
    put(file: string, text: string | Buffer) {
      writeFileSync(join(proc, `${TID}`, file), text)
    },
    task: (namespace = 1) => task(`${TID}`, namespace),
    remove: (path: string) => rmSync(join(proc, path), { recursive: true }),
  }
}

const status = ({ groups = '', effective = '0000000000000000' } = {}) =>
  `Name:\tqemu Groups: 61001 CapEff: ffff\nState:\tS (sleeping)\nUid:\t60003\t60003\t60003\t60003\nGid:\t61003\t61003\t61003\t61003\n` +
  `FDSize:\t64\nGroups:\t${groups} \nNStgid:\t4711\nCapInh:\tffffffffffffffff\nCapPrm:\tffffffffffffffff\n` +
  `CapEff:\t${effective}\nCapBnd:\t000001ffffffffff\n`

const caller = { tid: TID, uid: STRANGER, gid: OTHER_GROUP }

t.test('whom the mode allows may open, whatever else is known', async (t) => {
  const { access } = fakeProc(t)
  t.equal(access.mayOpen({ ...caller, uid: 0 }, ROOTS), true, 'root')
  t.equal(access.mayOpen({ ...caller, uid: OWNER }, { ...ROOTS, uid: OWNER }), true, 'the owner')
  t.equal(access.mayOpen({ ...caller, gid: GROUP }, DISK), true, 'the group')
  t.equal(access.mayOpen(caller, { ...ROOTS, mode: 0o060604 }), true, 'anybody')
})

t.test('a supplementary group counts', async (t) => {
  const { access, task, put } = fakeProc(t)
  task()
  put('status', status())
  t.equal(access.mayOpen(caller, DISK), false, 'none')
  put('status', status({ groups: `6100 ${GROUP}1` }))
  t.equal(access.mayOpen(caller, DISK), false, 'others')
  put('status', status({ groups: `4 ${GROUP} 70000` }))
  t.equal(access.mayOpen(caller, DISK), true)
  t.equal(access.mayOpen(caller, ROOTS), false, 'but not for what is not its own')
  const many = Array.from({ length: 60_000 }, (_, i) => 100_000 + i).join(' ')
  put('status', status({ groups: `${many} ${GROUP}` }))
  t.equal(access.mayOpen(caller, DISK), true, 'the last of very many')
})

t.test('a capability to override counts', async (t) => {
  const { access, task, put } = fakeProc(t)
  task()
  for (const [effective, expected] of [
    ['0000000000000000', false],
    ['0000000000000001', false], // CAP_CHOWN
    ['0000000000000002', true], // CAP_DAC_OVERRIDE
    ['0000000000000004', true], // CAP_DAC_READ_SEARCH
    ['0000000000000008', false], // CAP_FOWNER
    ['000001fffffffff9', false],
    ['000001ffffffffff', true],
  ] as const) {
    put('status', status({ effective }))
    t.equal(access.mayOpen(caller, ROOTS), expected, effective)
  }
})

t.test('what a thread calls itself is neither a group nor a capability', async (t) => {
  const { access, task, put } = fakeProc(t)
  task()
  // Of a name the kernel escapes "\n" and "\\" only (proc_task_name, fs/proc/array.c, 6.18).
  for (const comm of [`\rGroups:\t${GROUP}\r`, '\rCapEff:\t2\r', `\\nGroups:\t${GROUP}`]) {
    put('status', status().replace(/(?<=^Name:\t)[^\n]*/, comm))
    t.equal(access.mayOpen(caller, DISK), false, JSON.stringify(comm))
  }
})

t.test("in a user namespace of one's own only over ids that exist there", async (t) => {
  const { access, task, put, remove } = fakeProc(t)
  task(2)
  put('status', status({ effective: '000001ffffffffff' }))
  const maps = (uid: string, gid: string) => {
    put('uid_map', uid)
    put('gid_map', gid)
    return access.mayOpen(caller, DISK)
  }
  const all = '         0          0 4294967295\n'
  t.equal(maps(all, all), true, 'all are mapped')
  t.equal(maps('         0      60003          1\n', `         0      61003          1\n`), false, "one's own are mapped")
  t.equal(maps(all, '         0      61003          1\n'), false, 'the group is not')
  t.equal(maps('         0      60003          1\n', all), false, 'the owner is not')
  t.equal(maps('', ''), false, 'nothing is, yet')
  t.equal(maps('0 60003 1\n1 0 1\n', `0 61003 1\n1 ${GROUP - 1} 2\n`), true, 'both, in a later line')
  t.equal(maps(all, `0 ${GROUP - 1} 1\n`), false, 'only the group before it')
  t.equal(maps(all, `0 ${GROUP + 1} 1\n`), false, 'only the group after it')
  t.equal(maps(all, `${GROUP} 500000 1000\n`), false, 'what it is called inside does not matter')
  put('status', status())
  t.equal(maps(all, all), false, 'without the capability the map is nothing')
  put('status', status({ effective: '000001ffffffffff' }))
  remove(`${TID}/gid_map`)
  t.equal(access.mayOpen(caller, DISK), true, 'a map that cannot be read is a doubt')
})

t.test('in doubt a caller may open', async (t) => {
  const { access, task, put } = fakeProc(t)
  t.equal(access.mayOpen(caller, ROOTS), true, 'no such thread')
  t.equal(access.mayOpen({ ...caller, tid: 0 }, ROOTS), true, 'a caller out of sight')
  task()
  for (const text of ['', 'garbage', status().replace('\nGroups', '\nGrps'), status().replace('\nCapEff', '\nCapX')]) {
    put('status', text)
    t.equal(access.mayOpen(caller, ROOTS), true, JSON.stringify(text.slice(0, 20)))
  }
  put('status', Buffer.from(Array.from({ length: 4096 }, (_, i) => (i * 73 + 11) & 0xff)))
  t.equal(access.mayOpen(caller, ROOTS), true, 'bytes')
})

t.test('a namespace that cannot be seen is a doubt', async (t) => {
  const { access, task, put, remove } = fakeProc(t)
  task(2)
  put('status', status({ effective: '000001ffffffffff' }))
  remove(`${TID}/ns/user`)
  t.equal(access.mayOpen(caller, ROOTS), true)
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
  t.equal(access.mayOpen(of, DISK), false)
  t.equal(access.mayOpen(of, { ...DISK, gid: GROUP + 100_000 }), true)
  t.equal(access.mayOpen(of, { ...DISK, gid: 102_500 }), true)
})

t.test('a real process: its capabilities', async (t) => {
  const access = new Access(native)
  const cap = ['--inh-caps', '+dac_read_search', '--ambient-caps', '+dac_read_search']
  const who = as({ uid: STRANGER, gid: OTHER_GROUP, groups: [] })
  const tid = sleeper(t, [...who, ...cap])
  await until(() => isSleeping(tid))
  t.equal(access.mayOpen({ tid, uid: STRANGER, gid: OTHER_GROUP }, ROOTS), true)
  const plain = sleeper(t, who)
  await until(() => isSleeping(plain))
  t.equal(access.mayOpen({ tid: plain, uid: STRANGER, gid: OTHER_GROUP }, ROOTS), false, 'it has none')
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
  for (const [name, expected] of [['root', false], ['own', true], ['group', false], ['owner', false]] as const) {
    t.equal(access.mayOpen({ tid, uid: STRANGER, gid: OTHER_GROUP }, permissions(name)), expected, name)
    const { status: code } = spawnSync('setpriv', [...who, 'unshare', '-U', '-r', 'sh', '-c', ': <"$0"', join(directory, name)])
    t.equal(code === 0, expected, `${name}: the kernel says the same`)
  }
})

t.test('the ACL of a file is the one that the kernel would hand to a FUSE mount', async (t) => {
  const { directory, add, permissions } = files(t)
  add('file', 0o600)
  t.equal(permissions('file').acl, undefined, 'none')
  execFileSync('setfacl', ['-m', `u:${NAMED_USER}:r`, join(directory, 'file')])
  t.strictSame(
    permissions('file').acl,
    new Uint8Array(acl([1, 6], [2, 4, NAMED_USER], [4, 0], [16, 4], [32, 0])),
    ACL_ACCESS,
  )
})
