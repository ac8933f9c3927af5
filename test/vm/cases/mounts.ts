// SPDX-License-Identifier: MIT
/**
 * mount(8) by a device-mapper name, while the name's device goes and another gets its number. libmount looks at the path,
 * and then looks up in sysfs what the device is called (slowly, one time in three), and mounts the device that has that
 * name by then.
 */
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'

import type { Test } from 'tap'

import { ROOT } from '../../helpers/root.js'
import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import { TWIN_MOUNTPOINT, withTwin } from '../twin.js'
import type { Vm } from '../vm.js'

const MOUNTS = SHORT ? 200 : 2000
/** Enough to see wrong mounts, on the stock system and with the twin. */
const SOME = 200
const MOUNTERS = 6
const SECONDS_MAX = 2700

/**
 * `mounts COUNT [DIRECTORY]`: that many mounts in all, by /dev/mapper/NAME, or by the path that it leads to in another
 * tree.
 */
const MOUNTING = `
  mounter() {
    local n=0 end=$((SECONDS + ${SECONDS_MAX})) right=0 wrong=0 i path slow got
    mkdir -p /run/mounts/$1
    while ((n < $2 && SECONDS < end)); do
      i=$((RANDOM % 4)) path=/dev/mapper/m-$i slow=
      if [ -n "$3" ]; then
        path=$(readlink $path) && path=$3/\${path#/dev/disk/by-diskseq/} || { sleep 0.05; continue; }
      fi
      ((RANDOM % 3)) || slow=LD_PRELOAD=/share/slowname.so
      env $slow mount -t ext2 -o ro $path /run/mounts/$1 2>/dev/null || { sleep 0.02; continue; }
      got=$(</run/mounts/$1/name)
      umount /run/mounts/$1
      n=$((n + 1))
      [ "$got" = m-$i ] && right=$((right + 1)) || wrong=$((wrong + 1))
    done
    echo $right $wrong >/run/mounts/$1.result
  }
  # Two of four names are there, and each number is another name's next.
  recycle() {
    local names=(0 1) next=2 i
    for i in 0 1; do dmsetup create m-$i --table "0 2048 linear \${disks[$i]} 0"; done
    until [ -e /run/mounts/enough ]; do
      i=$((RANDOM % 2))
      dmsetup remove --noudevsync m-\${names[$i]} 2>/dev/null || { sleep 0.05; continue; }
      dmsetup create --noudevsync m-$next --table "0 2048 linear \${disks[$next]} 0"
      names[$i]=$next
      next=$(((next + 1) % 4))
      while [ $next = \${names[0]} ] || [ $next = \${names[1]} ]; do next=$(((next + 1) % 4)); done
      sleep 0.$((RANDOM % 3 + 1))
    done
    udevadm settle --timeout=120
    for i in 0 1; do dmsetup remove --retry m-\${names[$i]}; done
  }
  mounts() {
    local i k disks=() running=()
    set +e
    mkdir -p /run/mounts/content
    for i in 0 1 2 3; do
      echo m-$i >/run/mounts/content/name
      truncate -s 1M /run/mounts/disk-$i
      mke2fs -q -t ext2 -d /run/mounts/content /run/mounts/disk-$i
      disks+=($(losetup --find --show /run/mounts/disk-$i))
    done
    recycle & recycler=$!
    for ((k = 0; k < ${MOUNTERS}; k++)); do mounter $k $(($1 / ${MOUNTERS} + 1)) "\${2:-}" & running+=($!); done
    wait \${running[@]}
    touch /run/mounts/enough
    wait $recycler
    losetup --detach \${disks[@]}
    cat /run/mounts/*.result | awk '{ right += $1; wrong += $2 } END { print right, wrong }'
    rm -r /run/mounts
  }`

interface Counts {
  readonly right: number
  readonly wrong: number
}

async function mounts(vm: Vm, count: number, directory = ''): Promise<Counts> {
  execFileSync('cc', ['-O2', '-shared', '-fPIC', '-o', join(vm.share, 'slowname.so'), join(ROOT, 'test/helpers/preload/slowname.c')])
  const output = await vm.run(`${MOUNTING}; mounts ${count} ${directory}`, (SECONDS_MAX + 300) * 1000)
  const counts = /^(\d+) (\d+)$/m.exec(output)
  if (counts === null) throw new Error(output)
  return { right: Number(counts[1]), wrong: Number(counts[2]) }
}

export const mountsCase: Case = {
  name: "mount(8) by names whose numbers become other names'",
  // May take long. test/live/second-path.test.ts shows what keeps the disk meanwhile.
  shortOn: 'none',
  before: (vm) => mounts(vm, SOME),
  async run(t: Test, vm: Vm, before: unknown) {
    const stock = before as Counts
    const { right, wrong } = await mounts(vm, MOUNTS)
    note(t, `${wrong} of ${right + wrong} mounts wrong; stock: ${stock.wrong} of ${stock.right + stock.wrong}`)
    t.equal(wrong, 0, 'each name mounts its own file system')
    t.ok(right >= MOUNTS, `${right} mounts`)
    t.ok(stock.wrong > 0, 'on the stock system some names mount another')
    let twin: Counts = { right: 0, wrong: 0 }
    await withTwin(vm, 'done-when-seen', async () => {
      for (let i = 0; i < 5 && twin.wrong === 0; i++) twin = await mounts(vm, SOME, TWIN_MOUNTPOINT)
    })
    t.ok(twin.wrong > 0, `twin: if a look is all that mount(8) is taken to need, ${twin.wrong} of ${twin.right + twin.wrong} are wrong`)
  },
}
