// SPDX-License-Identifier: MIT
/** Each fault that `diskseqfs doctor` knows, made in a directory that stands in for a machine, and seen. */
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, utimesSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'

import t, { type Test } from 'tap'

import {
  beneath,
  type Finding,
  kernel,
  links,
  mounts,
  requestTimeout,
  rules,
  service,
  unit,
  version,
} from '../../../src/commands/findings.js'
import type { MountEntry } from '../../../src/util/mountpoint.js'

type Content = string | { readonly to: string }

/** A machine that has these files and links. */
function machine(t: Test, files: Readonly<Record<string, Content>>): string {
  const root = mkdtempSync(join(tmpdir(), 'diskseqfs-machine-'))
  t.teardown(() => rmSync(root, { recursive: true }))
  for (const [path, content] of Object.entries(files)) {
    mkdirSync(dirname(root + path), { recursive: true })
    if (typeof content === 'string') writeFileSync(root + path, content)
    else symlinkSync(content.to, root + path)
  }
  return root
}

const short = (found: readonly Finding[]) => found.map(({ severity, what }) => `${severity}: ${what}`)

function sees(t: Test, found: readonly Finding[], severity: string, what: RegExp): void {
  t.equal(found.length, 1, short(found).join('; '))
  t.match(found[0], { severity, what, advice: /\S/ })
}

const DISK = { '/sys/block/sda/diskseq': '9\n', '/dev/fuse': '' }

t.test('the kernel', async (t) => {
  t.strictSame(kernel(machine(t, { ...DISK, '/proc/sys/kernel/yama/ptrace_scope': '1\n' })), [])
  sees(t, kernel(machine(t, { '/dev/fuse': '' })), 'broken', /no disk in \/sys\/block/)
  sees(t, kernel(machine(t, { '/dev/fuse': '', '/sys/block/sda/size': '1\n' })), 'broken', /no sequence numbers/)
  sees(t, kernel(machine(t, { '/sys/block/sda/diskseq': '9\n' })), 'broken', /\/dev\/fuse is missing/)
  sees(t, kernel(machine(t, { ...DISK, '/proc/sys/kernel/yama/ptrace_scope': '3\n' })), 'warning', /ptrace_scope is 3/)
})

t.test('the time limit of FUSE requests', async (t) => {
  const limit = (text?: string) => requestTimeout(machine(t, text === undefined ? {} : { '/proc/sys/fs/fuse/max_request_timeout': text }))
  for (const fine of [undefined, '0\n', '60\n']) t.strictSame(limit(fine), [])
  sees(t, limit('15\n'), 'warning', /max_request_timeout is 15 s/)
})

const RULES = Object.fromEntries(
  ['59-diskseqfs', '60-z-diskseqfs', '61-diskseqfs', '99-z-diskseqfs'].map((name) => [`/usr/lib/udev/rules.d/${name}.rules`, 'rules']),
)

t.test('udev rules', async (t) => {
  t.strictSame(rules(machine(t, RULES)), [])
  sees(t, rules(machine(t, {})), 'note', /not installed/)
  const { '/usr/lib/udev/rules.d/61-diskseqfs.rules': _, ...others } = RULES
  sees(t, rules(machine(t, others)), 'warning', /missing: 61-diskseqfs\.rules/)
  const masked = { ...RULES, '/etc/udev/rules.d/61-diskseqfs.rules': { to: '/dev/null' } }
  sees(t, rules(machine(t, masked)), 'warning', /\/etc\/udev\/rules\.d\/61-diskseqfs\.rules masks/)
  sees(t, rules(machine(t, { ...RULES, '/run/udev/rules.d/61-diskseqfs.rules': '' })), 'warning', /\/run\/.* masks/)
  sees(t, rules(machine(t, { ...RULES, '/etc/udev/rules.d/61-diskseqfs.rules': 'mine' })), 'warning', /stands in for/)
})

t.test('the unit', async (t) => {
  const installed = { '/usr/lib/systemd/system/diskseqfs.service': 'unit' }
  const wants = { '/etc/systemd/system/sysinit.target.wants/diskseqfs.service': { to: '/usr/lib/systemd/system/diskseqfs.service' } }
  t.strictSame(unit(machine(t, {})), [], 'not installed')
  t.strictSame(unit(machine(t, { ...installed, ...wants })), [])
  sees(t, unit(machine(t, installed)), 'warning', /does not start at boot/)
  sees(t, unit(machine(t, { ...installed, '/etc/systemd/system/diskseqfs.service': { to: '/dev/null' } })), 'warning', /is masked/)
})

const TREE: MountEntry = {
  id: 1,
  device: '0:50',
  target: '/dev/disk/by-diskseq',
  type: 'fuse.diskseqfs',
  source: 'diskseqfs',
  options: 'rw,nosuid,noexec,relatime,rw,user_id=0,group_id=0,default_permissions,allow_other',
}

t.test('the mount', async (t) => {
  const without = (option: string) => ({ ...TREE, options: TREE.options.replace(option, 'x') })
  t.strictSame(mounts([TREE]), [])
  sees(t, mounts([]), 'broken', /no tree is mounted/)
  sees(t, mounts([{ ...TREE, type: 'tmpfs', source: 'none' }]), 'broken', /no tree is mounted/)
  sees(t, mounts([TREE, { ...TREE, type: 'tmpfs', source: 'no\u001bne' }]), 'broken', /covered by a mount of no\?ne \(tmpfs\)/)
  sees(t, mounts([TREE, TREE]), 'warning', /2 trees are mounted/)
  sees(t, mounts([{ ...TREE, options: `nodev,${TREE.options}` }]), 'broken', /mounted nodev/)
  sees(t, mounts([without('default_permissions')]), 'broken', /without default_permissions/)
  sees(t, mounts([without('allow_other')]), 'broken', /without allow_other/)
})

const DM = { '/sys/block/dm-0/diskseq': '13\n', '/sys/block/dm-0/dm/name': 'vm-root\n', '/sys/block/sda/diskseq': '9\n' }
const into = (path: string) => ({ to: `/dev/disk/by-diskseq/${path}` })

t.test('links into the tree', async (t) => {
  const fine = {
    ...DM,
    '/dev/mapper/vm-root': into('.dm/13/dm-0'),
    '/dev/mapper/control': '',
    '/dev/vm/root': into('.dm/13/dm-0'),
    '/dev/vm/other': { to: '../dm-7' },
    '/dev/disk/by-id/x': into('9'),
  }
  t.strictSame(links(machine(t, fine)), [])
  for (const name of ['a b', 'a\\x20b']) {
    const escaped = { ...DM, '/sys/block/dm-0/dm/name': `${name}\n`, '/dev/mapper/a\\x20b': into('.dm/13/dm-0') }
    t.strictSame(links(machine(t, escaped)), [])
  }
  sees(t, links(machine(t, { ...DM, '/dev/mapper/vm-root': into('.dm/12/dm-0') })), 'broken', /vm-root leads to disk 12, which is gone/)
  sees(t, links(machine(t, { ...DM, '/dev/vg/lv': into('.dm/13/dm-5') })), 'broken', /\/dev\/vg\/lv leads to disk 13, which is gone/)
  sees(t, links(machine(t, { ...DM, '/dev/mapper/other': into('.dm/13/dm-0') })), 'broken', /other leads to dm-0, which is called vm-root/)
  sees(t, links(machine(t, { ...DM, '/dev/mapper/vm-root': into('nonsense') })), 'broken', /no name in the tree/)
})

t.test('links beneath the tree', async (t) => {
  t.strictSame(beneath(['13', '13p1', '13-part1', '.dm/13/dm-0']), [])
  sees(t, beneath(['13', 'mine', '013']), 'note', /not its own: mine, 013$/)
  sees(t, beneath(['a', 'b', 'c', 'd', 'e', 'f']), 'note', /a, b, c, d, e and others$/)
})

t.test('what the guard says', async (t) => {
  for (const fine of [undefined, '', 'serving /dev/disk/by-diskseq (daemon 5)']) t.strictSame(service(fine), [])
  sees(t, service("no daemon has come; names lead to the devices' own nodes"), 'broken', /no daemon has come/)
})

t.test('a daemon of an earlier version', async (t) => {
  const root = machine(t, { '/program': '' })
  utimesSync(`${root}/program`, 1000, 1000)
  t.strictSame(version(`${root}/program`, 1_000_001), [])
  sees(t, version(`${root}/program`, 999_999), 'warning', /started before this version/)
  t.strictSame(version(`${root}/missing`, 0), [])
})
