// SPDX-License-Identifier: MIT
/**
 * Everything at once that a user without any rights can do to the tree, with the real service. The
 * service manager answers, the daemon and the guard go on, and root opens disks. What each part
 * does to root's opens, with its twins: test/load/hostile.test.ts.
 */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'
import { DAEMON } from './restart.js'

const TREE = '/dev/disk/by-diskseq'
const ROUNDS = 15
const ANSWERS_MS = 1000
const MORE_MIB = 60

/** Programs that a script starts in the background, and that end with it. */
const attack = (dir: string, names: string) => `
  become() { setpriv --reuid 65534 --regid 65534 --clear-groups "$@"; }
  for kinds in '200 mkdir,creat,symlink,rename' '8 mkdir-part' '32 names,numbers,stat,list'; do
    set -- $kinds
    (echo; sleep 600) | /var/tmp/blk abuse --dir ${dir} --names ${names} --uid 65534 --threads $1 --kinds $2 >/dev/null 2>&1 &
  done
  trap 'kill $(jobs -p) || true; pkill -x blk || true' EXIT`

/** How long the service manager takes to answer, in ms: one line each. */
const ping = `
    before=$(date +%s%N)
    mount -t tmpfs none /run/hostile
    busctl --timeout=60 call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.DBus.Peer Ping
    umount /run/hostile
    echo $((($(date +%s%N) - before) / 1000000))`

async function answers(vm: Vm, dir: string, names: string, more = ''): Promise<{ ms: number[]; output: string }> {
  const output = await vm.run(
    `
    ${attack(dir, names)}
    mkdir -p /run/hostile
    sleep 3
    for ((i = 0; i < ${ROUNDS}; i++)); do ${ping}; done
    ${more}`,
    600_000,
  )
  return { ms: [...output.matchAll(/^\d+$/gm)].map(Number).sort((a, b) => a - b), output }
}

const state = (vm: Vm) =>
  vm.run(`
  systemctl show -P MainPID -P StatusText -P NRestarts -P ActiveState diskseqfs
  findmnt -no FSTYPE ${TREE}`)

export const hostile: Case = {
  name: 'users who mean harm',
  shortOn: 'none',
  async run(t: Test, vm: Vm) {
    const [name = '', other = ''] = (
      await vm.run(`
      cp /share/blk /var/tmp/blk
      for i in 1 2; do
        truncate -s 8M /var/tmp/hostile$i.img
        loop=$(losetup --find --show /var/tmp/hostile$i.img)
        cat /sys/block/\${loop#/dev/}/diskseq
      done`)
    )
      .trim()
      .split('\n')
    try {
      const before = await state(vm)
      const rss = async () => Number(await vm.run("awk '/VmRSS/ { print $2 }' /proc/$(" + DAEMON + ')/status')) / 1024
      const memory = await rss()
      const elsewhere = await answers(vm, '/run', 'x')
      const { ms, output } = await answers(
        vm,
        TREE,
        name,
        `
        become /var/tmp/blk hold --flags path --path ${TREE}/${name} < <(sleep 60) >/dev/null &
        become /var/tmp/blk watch --path ${TREE}/${name} < <(sleep 60) >/dev/null &
        /var/tmp/blk openlat --path ${TREE}/${other} --count 200 --seconds 20 --close-immediately`,
      )
      const [most = Infinity, usual = Infinity] = [ms.at(-2), elsewhere.ms.at(-2)]
      note(t, `a mount and an answer of the service manager: ${most} ms at most but for one, ${usual} ms while they do the same elsewhere`)
      t.ok(most <= Math.max(ANSWERS_MS, 3 * usual), 'the service manager answers')
      const { n, errors } = JSON.parse(/^\{.*"p50_ns".*$/m.exec(output)?.[0] ?? '{}') as { n: number; errors: object }
      t.ok(n > 0, `${n} opens`)
      t.strictSame(errors, {}, 'no open fails')
      t.equal(await state(vm), before, 'daemon and guard are the same as before, and the tree is there')
      t.ok((await rss()) < memory + MORE_MIB, `${memory.toFixed(0)} MiB before`)
    } finally {
      await vm.attempt(`
        pkill -x blk
        for i in 1 2; do losetup --detach $(losetup --noheadings --output NAME --associated /var/tmp/hostile$i.img); done
        rm -f /var/tmp/hostile?.img /var/tmp/blk`)
    }
  },
}
