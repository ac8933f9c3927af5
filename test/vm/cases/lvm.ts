// SPDX-License-Identifier: MIT
/** LVM: volumes of all kinds come and go, their names lead into the tree at once, and the reports stay the same. */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

const CYCLES = SHORT ? 2 : 50
const STOCK_CYCLES = SHORT ? 1 : 10
/** As often with more kinds of volumes. */
const KINDS_CYCLES = SHORT ? 1 : 4

interface Findings {
  /** The steps, and the output of pvs, vgs and lvs. */
  readonly reports: string
  readonly failures: string
  readonly seconds: number
}

/**
 * The volume group "t-1" is on two loop devices whose numbers are always the same, so that the
 * reports can be compared. A dash in a name is doubled in its device-mapper name.
 */
function machine(withTree: boolean, script: string): string {
  return `
    cd /tmp
    undo() {
      vgchange -qqan t-1
      for group in on-lv on-luks t-1; do vgremove $scan -qqff $group; done
      dmsetup remove --retry luks
      lvremove -qqy vm/pv
      losetup -d /dev/loop40 /dev/loop41
      rm -f key image0 image1
      rmdir /dev/t-1
    }
    trap 'undo >/dev/null 2>&1' EXIT
    scan='--config devices/scan_lvs=1'
    # Or udev has lvm activate the same volumes at the same time, and one of the two fails.
    manual='--setautoactivation n'
    for i in 0 1; do
      truncate -s 160M image$i
      [ -b /dev/loop4$i ] || mknod -m 660 /dev/loop4$i b 7 4$i
      losetup /dev/loop4$i image$i
    done
    step() {
      local message
      if message=$("$@" 2>&1); then echo "$*: done"; else echo "$*: FAILED: $message"; fi
    }

    # Every device of the group, hidden ones too, has its name in /dev/mapper, and
    # those that are for use have theirs in the group's directory.
    links_right() {
      local device name diskseq number link found=0 links=() targets=() numbers=()
      for device in /sys/class/block/dm-*; do
        read -r name 2>/dev/null <$device/dm/name || continue
        read -r diskseq <$device/diskseq
        read -r number <$device/dev
        case $name in t--1-*) ;; *) continue ;; esac
        found=$((found + 1))
        for link in /dev/mapper/$name /dev/t-1/\${name#t--1-}; do
          case $link in /dev/t-1/*_* | /dev/t-1/*-* | /dev/t-1/pool) continue ;; esac
          links+=($link) numbers+=($number)
          if ${withTree}; then targets+=(/dev/disk/by-diskseq/.dm/$diskseq/\${device##*/}); else targets+=(../\${device##*/}); fi
        done
      done
      [ $found = $1 ] || { echo "$found devices, not $1"; return 1; }
      diff <(printf '%s\\n' "\${targets[@]}") <(readlink "\${links[@]}") || { echo "of \${links[*]}"; return 1; }
      # And from the tree to the device.
      diff <(printf '%s\\n' "\${numbers[@]}") <(stat -Lc %Hr:%Lr "\${links[@]}") || { echo "of \${links[*]}"; return 1; }
    }
    # The directory too: vgcreate refuses a name that is there already.
    links_gone() {
      [ ! -e /dev/t-1 ] && [ -z "$(shopt -s nullglob; echo /dev/mapper/t--1-*)" ] ||
        { ls -ld /dev/t-1 /dev/t-1/* /dev/mapper/t--1-*; return 1; } 2>/dev/null
    }
    ${script}
  `
}

const REPORTS = `
  reports() {
    pvs $scan
    vgs $scan
    lvs $scan -a -o +devices
    # Where lvm looks for devices by itself, it comes across the tree.
    pvs --config 'devices { scan_lvs=1 obtain_device_list_from_udev=0 }' -o pv_name,vg_name
  } 2>&1
  step vgcreate $manual -q t-1 /dev/loop40 /dev/loop41
  step lvcreate -qy -L 24M -n plain t-1
  step lvcreate -qy -i 2 -L 24M -n striped t-1
  step lvcreate -qs -L 8M -n snap t-1/plain
  step lvcreate -qy -T -L 32M t-1/pool
  step lvcreate -qy -T -V 64M -n thin t-1/pool
  step lvcreate -qs -kn -n thinsnap t-1/thin
  step links_right 11
  step lvcreate -qqy -L 24M -n pv vm
  head -c 32 /dev/urandom >key
  step cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/t-1/thin key
  step cryptsetup open --key-file key /dev/t-1/thin luks
  step vgcreate $scan $manual -q on-luks /dev/mapper/luks
  step vgcreate $scan $manual -q on-lv /dev/vm/pv
  step lvcreate $scan -qy -L 8M -n top on-lv
  reports
  step lvchange $scan -an on-lv/top
  step lvchange $scan -ay on-lv/top
  step lvremove $scan -qy on-lv/top
  step vgremove $scan -qy on-lv
  step vgremove $scan -qy on-luks
  step cryptsetup close luks
  step lvremove -qy t-1/snap
  step mkfs.ext4 -q /dev/t-1/plain
  step lvextend -qr -L +8M t-1/plain
  step e2fsck -fn /dev/t-1/plain
  step lvrename -q t-1/striped t-1/renamed
  step links_right 8
  step lvremove -qy t-1/renamed
  step lvremove -qy t-1/thinsnap
  step lvremove -qy t-1/thin
  step lvremove -qy t-1/pool
  step links_right 1
  step vgchange -qan t-1
  step links_gone
  step vgremove -qy t-1
  step links_gone
  step pvremove -q /dev/loop40 /dev/loop41
`

const CYCLE = `
  declare -A failed
  try() {
    local message
    message=$("\${@:2}" 2>&1) || failed["$1: $message"]=$((\${failed["$1: $message"]:-0} + 1))
  }
  cycle() { # how often, number of devices
    for ((i = 0; i < $1; i++)); do
      # Somebody has just used it, in every other cycle.
      if ((i % 2)); then try read dd if=/dev/t-1/first of=/dev/null bs=4k count=1 status=none; fi
      try 'vgchange -an' vgchange -qq -an t-1
      try 'links after -an' links_gone
      try 'vgchange -ay' vgchange -qq -ay t-1
      try 'links after -ay' links_right $2
    done
  }
  try setup vgcreate $manual -qq t-1 /dev/loop40 /dev/loop41
  try setup lvcreate -qqy -L 24M -n first t-1
  try setup lvcreate -qqy -L 24M -n second t-1
  start=$SECONDS
  cycle $cycles 2
  seconds=$((SECONDS - start))
  try setup lvcreate -qqs -L 8M -n snap t-1/first
  try setup lvcreate -qqy -T -L 32M -V 64M -n thin t-1/pool
  cycle ${KINDS_CYCLES} 10
  echo $seconds
  for message in "\${!failed[@]}"; do echo "\${failed[$message]} x $message"; done
`

/** How full a thin pool's metadata is depends on when LVM writes them. */
const META = /^(.* twi-\S+ +\S+ +\d+\.\d\d +)\d+\.\d\d /gm

async function findings(vm: Vm, withTree: boolean, cycles: number): Promise<Findings> {
  const reports = (await vm.run(machine(withTree, `set +e\n${REPORTS}`), 10 * 60_000)).replace(META, '$1M.MM ')
  const output = await vm.run(machine(withTree, `set +e\ncycles=${cycles}\n${CYCLE}`), 20 * 60_000)
  const [seconds, ...failures] = output.trimEnd().split('\n') as [string, ...string[]]
  return { reports, failures: failures.join('\n'), seconds: Number(seconds) }
}

export const lvm: Case = {
  name: 'LVM',
  shortOn: 'bookworm',
  before: (vm) => findings(vm, false, STOCK_CYCLES),
  async run(t: Test, vm: Vm, before: unknown) {
    const stock = before as Findings
    t.notMatch(stock.reports, /FAILED/, 'stock: every step works')
    t.match(stock.reports, /^ +\/dev\/mapper\/luks +on-luks/m, 'stock: a volume on an encrypted one is there')
    const ours = await findings(vm, true, CYCLES)
    t.equal(ours.reports, stock.reports, 'every step works, and pvs, vgs and lvs print the same as on a stock system')
    t.equal(ours.failures, '', `${CYCLES} times vgchange -an and -ay, and some more with a snapshot and a thin pool`)
    note(
      t,
      `vgchange -an and -ay ${CYCLES} times in ${ours.seconds} s, failures: ${ours.failures || 'none'}` +
        `; stock: ${STOCK_CYCLES} times in ${stock.seconds} s, failures: ${stock.failures || 'none'}`,
    )
  },
}
