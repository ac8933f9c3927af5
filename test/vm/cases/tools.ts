// SPDX-License-Identifier: MIT
/**
 * Commands that people type: file systems, swap, partitions, loop devices, udisks, by /dev/mapper
 * name and by path in the tree. Their output is compared with a stock system; the differences are
 * written down here, and in the README.
 */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

/** What a command printed, and its status if that is not 0, by a name for the command. */
type Answers = Map<string, string>

interface Stock {
  readonly answers: [string, string][]
  readonly warnings: string[]
}

/** The kernel shows the path by which the device was opened. */
const OPENED: [string, string] = ['/dev/dm-N', '/dev/disk/by-diskseq/.dm/N/dm-N']
/**
 * udisksctl asks its daemon for the device of a name, or of what the name leads to. The daemon knows udev's names
 * only.
 */
const UNKNOWN_TO_UDISKS = 'Error looking up object for device /dev/mapper/tools (status 1)'

/** The differences from a stock system, if a device is called by its /dev/mapper name: [stock, with the package]. */
const EXPECTED: Record<string, [string, string]> = {
  '/proc/swaps': OPENED,
  'swapon --show': OPENED,
  losetup: OPENED,
  'udisksctl unmount of what mount mounted': ['Unmounted /dev/dm-N.', UNKNOWN_TO_UDISKS],
  'udisksctl info': [
    ' Device: /dev/dm-N IdUUID: 11111111-1111-1111-1111-111111111111 PreferredDevice: /dev/mapper/tools',
    UNKNOWN_TO_UDISKS,
  ],
  'udisksctl mount': ['Mounted /dev/dm-N at /media/root/tools', UNKNOWN_TO_UDISKS],
  'udisksctl unmount': ['Unmounted /dev/dm-N.', UNKNOWN_TO_UDISKS],
}

/** Commands that fail by the first path, whose last component is not a kernel name. */
const FAILS_BY_NUMBER = ['findmnt UUID:  (status 1)', 'umount /dev/dm-N: umount: /dev/dm-N: not mounted. (status 32)']

/**
 * parted opens the partition exclusively, closes it, and removes it at once. If the daemon, or
 * udev, has not released it yet, parted says so and tries again.
 */
const MAY_DIFFER: Record<string, RegExp> = {
  'parted rm': /^((^| )device-mapper: remove ioctl on tools1 failed: Device or resource busy)*$/,
}

const PRELUDE = `
  cd /tmp
  export LC_ALL=C
  mkdir -p /mnt/tools
  undo() {
    umount -q /mnt/tools /media/root/*
    swapoff /dev/mapper/tools
    swapoff /dev/$dm
    losetup -d $upper
    for name in tools1 tools 'a b' 'c d' 'a+b#:=@~' x; do dmsetup remove --retry "$name"; done
    losetup -d /dev/loop50 /dev/loop51
    rm -rf /mnt/tools tools0 tools1 /etc/udev/rules.d/60-zz-optout.rules
    udevadm control --reload
  }
  trap 'undo >/dev/null 2>&1' EXIT
  tree= upper=
  for i in 0 1; do
    truncate -s 64M tools$i
    [ -b /dev/loop5$i ] || mknod -m 660 /dev/loop5$i b 7 5$i
    losetup -P /dev/loop5$i tools$i
  done
  dmsetup create tools --table '0 131072 linear 7:50 0'
  dm=dm-$(dmsetup info -c --noheadings -o minor tools)
  tree=/dev/disk/by-diskseq/$(cat /sys/class/block/$dm/diskseq)

  # What to call it, and the command. Numbers that are not the same every time are hidden.
  say() {
    local output status
    output=$("\${@:2}" 2>&1)
    status=$?
    output=$(tr -s ' \\t\\n' ' ' <<<"$output" | sed -E 's#by-diskseq/(\\.dm/)?[0-9]+#by-diskseq/\\1N#g; s#dm-[0-9]+#dm-N#g; s# $##')
    [ $status = 0 ] || output+=" (status $status)"
    echo "$1|$output"
  }
  # Until it is so, for some seconds; then it prints what the command does.
  soon() {
    local i
    for ((i = 0; i < 50; i++)); do "$@" >/dev/null 2>&1 && break; sleep 0.2; done
    "$@"
  }
  uuid_leads_to() { [ "$(readlink -e /dev/disk/by-uuid/$1)" = $2 ] && echo right; }
  unit() { soon systemctl is-active "$(systemd-escape -p --suffix=device "$1")"; }
  # udev itself misses a writer that closes the device while it looks at it.
  quiet() { udevadm settle; "$@"; }
  gone() { [ ! -e "$1" ] && [ ! -L "$1" ] && echo gone; }
`

/** All that is done to the device-mapper device "tools" by `path`. */
function useOf(path: string): string {
  return `
    p=${path}
    ext4=11111111-1111-1111-1111-111111111111 swap=22222222-2222-2222-2222-222222222222
    say 'mkfs.ext4' quiet mkfs.ext4 -q -U $ext4 $p
    say 'by-uuid link of ext4' soon uuid_leads_to $ext4 /dev/$dm
    say 'blkid' blkid -o value -s UUID $p
    say 'blkid -p' blkid -p -o value -s TYPE $p
    say 'blkid -U' blkid -U $ext4
    say 'findfs' findfs UUID=$ext4
    say 'wipefs' wipefs -n -O TYPE,UUID --noheadings $p
    say 'fsck' bash -c "fsck -T -n $p 2>/dev/null | sed 's/:.*//'"
    say 'tune2fs' tune2fs -L tools $p
    say 'e2fsck' e2fsck -fp $p

    say 'mount' mount $p /mnt/tools
    say 'findmnt' findmnt -no SOURCE /mnt/tools
    say 'findmnt DEVICE' findmnt -no TARGET $p
    say 'findmnt UUID' findmnt -no TARGET UUID=$ext4
    say 'df' bash -c 'df --output=source /mnt/tools | tail -n 1'
    say 'df DEVICE' bash -c "df --output=target $p | tail -n 1"
    say '/proc/mounts' awk '$2 == "/mnt/tools" { print $1 }' /proc/mounts
    say 'lsblk' lsblk -nro NAME,TYPE,FSTYPE,UUID,MOUNTPOINTS $p
    say 'lsblk -p' lsblk -nrpo NAME,PATH,KNAME,PKNAME $p
    say 'lsblk of all' bash -c 'lsblk -nro NAME,TYPE,MOUNTPOINTS | grep -v swap | sort -u'
    say 'mount unit' soon systemctl show -P What mnt-tools.mount
    say 'unit of the path' unit $p
    say 'mkfs.ext4 on what is mounted' mkfs.ext4 -q $p
    say 'mkfs.vfat on what is mounted' bash -c "mkfs.vfat $p 2>&1 >/dev/null"
    say 'mkswap on what is mounted' mkswap $p
    say 'wipefs on what is mounted' wipefs -a $p
    say 'fsck on what is mounted' fsck -M -n $p
    udevadm trigger --settle /dev/$dm
    systemctl daemon-reload
    say 'still mounted' mountpoint -q /mnt/tools
    say 'umount DEVICE' umount $p
    say 'umounted' soon bash -c '! mountpoint -q /mnt/tools'
    say 'mount UUID' mount UUID=$ext4 /mnt/tools
    say 'findmnt, mounted by UUID' findmnt -no SOURCE /mnt/tools
    say 'umount' umount /mnt/tools
    say 'mount, for /dev/dm-N' mount $p /mnt/tools
    say 'umount /dev/dm-N' umount /dev/$dm
    mountpoint -q /mnt/tools || mount $p /mnt/tools
    say 'udisksctl unmount of what mount mounted' udisksctl unmount -b /dev/mapper/tools
    umount -q /mnt/tools

    say 'udisksctl info' bash -c "udisksctl info -b $p | grep -E ' (Device|IdUUID|PreferredDevice):'"
    say 'udisksctl mount' udisksctl mount -b $p
    say 'udisksctl unmount' udisksctl unmount -b $p

    say 'mkfs.vfat' quiet mkfs.vfat -i cafe0001 $p
    say 'by-uuid link of vfat' soon uuid_leads_to CAFE-0001 /dev/$dm
    say 'fsck.vfat' bash -c "fsck.vfat -n $p | tail -n 1"
    say 'mount vfat' mount $p /mnt/tools
    say 'umount vfat' umount $p

    say 'mkswap' quiet mkswap -q -U $swap $p
    say 'by-uuid link of swap' soon uuid_leads_to $swap /dev/$dm
    say 'swapon' swapon $p
    say '/proc/swaps' bash -c "tail -n 1 /proc/swaps | cut -d ' ' -f 1"
    say 'swapon --show' bash -c 'swapon --show=NAME --noheadings | tail -n 1'
    say 'lsblk of swap' lsblk -nro NAME,MOUNTPOINTS $p
    say 'swapoff' swapoff $p
    say 'swapon, for /dev/dm-N' swapon $p
    say 'swapoff /dev/dm-N' swapoff /dev/$dm
    say 'swapon by UUID' swapon -U $swap
    say 'swapoff by UUID' swapoff -U $swap
    say 'wipefs -a' quiet wipefs -aq $p
    say 'by-uuid link after wipefs' soon gone /dev/disk/by-uuid/$swap

    upper=$(losetup -f --show $p)
    say 'losetup' bash -c "losetup -nO BACK-FILE $upper"
    say 'losetup -j' bash -c "losetup -j $p | wc -l"
    say 'read through it' dd if=$upper of=/dev/null bs=64k count=1 status=none
    say 'losetup -d' losetup -d $upper

    say 'parted' parted -s $p mklabel gpt mkpart one 1MiB 20MiB
    say 'parted print' bash -c "parted -sm $p print | tail -n 1"
    say 'partition' soon test -b /dev/mapper/tools1
    say 'use of the partition' quiet mkfs.ext4 -q -U $ext4 /dev/mapper/tools1
    say 'lsblk of the partition' lsblk -nro NAME,TYPE $p
    udevadm settle
    say 'parted rm' parted -s $p rm 1
    say 'partition is gone' soon gone /dev/mapper/tools1
    say 'sfdisk' bash -c "echo 2048,8M | sfdisk -q --no-reread --no-tell-kernel $p"
    say 'sfdisk -l' sfdisk -lqo Start,Sectors $p
    say 'wipefs -a, partitions' wipefs -aq $p
  `
}

/** Partitions of a loop device, by the path of the whole device; only the tree has these on all releases. */
const PARTITIONS = `
  loop=/dev/disk/by-diskseq/$(cat /sys/class/block/loop51/diskseq)
  uuid=33333333-3333-3333-3333-333333333333
  is() { [ "$(stat -Lc %Hr:%Lr $1)" = "$(cat /sys/class/block/$2/dev)" ] && echo $2; }
  say 'sfdisk' bash -c "printf '%s\\n' 2048,8M ,8M | sfdisk -q -X gpt $loop"
  say 'p1' soon is \${loop}p1 loop51p1
  say 'p2' soon is \${loop}p2 loop51p2
  say 'part2' is $loop-part2 loop51p2
  say 'mkfs of a partition' quiet mkfs.ext4 -q -U $uuid \${loop}p1
  say 'by-uuid link of a partition' soon uuid_leads_to $uuid /dev/loop51p1
  say 'fsck of a partition' bash -c "fsck -T -n \${loop}p1 2>/dev/null | sed 's/:.*//'"
  say 'mount of a partition' mount $loop-part1 /mnt/tools
  say 'source' findmnt -no SOURCE /mnt/tools
  say 'lsblk' lsblk -nro NAME,TYPE,MOUNTPOINTS \${loop}
  for suffix in '' p1 -part1; do say "unit of N$suffix" unit $loop$suffix; done
  say 'umount of a partition' umount \${loop}p1
  say 'sfdisk --delete' sfdisk -q --delete $loop 2
  say 'p2 is gone' soon gone \${loop}p2
  say 'parted mkpart' parted -s $loop mkpart two 20MiB 30MiB
  say 'p2 again' soon is \${loop}p2 loop51p2
  say 'partprobe' partprobe $loop
  say 'p2 after partprobe' soon is \${loop}p2 loop51p2
  say 'swap on a partition' bash -c "mkswap -q \${loop}p2 && swapon \${loop}p2 && swapoff \${loop}p2"
  say 'parted rm' parted -s $loop rm 1
  say 'p1 is gone' soon gone \${loop}p1
  for path in /dev/mapper/tools /dev/mapper/vm-root; do say "unit of $path" unit $path; done
  say 'unit of a device-mapper device' unit $tree
`

const PARTITIONS_ANSWERS: Record<string, string> = {
  p1: 'loop51p1',
  p2: 'loop51p2',
  part2: 'loop51p2',
  'by-uuid link of a partition': 'right',
  'fsck of a partition': '/dev/disk/by-diskseq/Np1',
  source: '/dev/disk/by-diskseq/Np1',
  lsblk: 'loop51 loop loop51p1 part /mnt/tools loop51p2 part',
  'unit of N': 'active',
  'unit of Np1': 'active',
  'unit of N-part1': 'active',
  'p2 is gone': 'gone',
  'p2 again': 'loop51p2',
  'p2 after partprobe': 'loop51p2',
  'p1 is gone': 'gone',
  'unit of /dev/mapper/tools': 'active',
  'unit of /dev/mapper/vm-root': 'active',
  'unit of a device-mapper device': 'active',
}

/** Names that udev and dmsetup write in another way: which links there are, and whether they lead to the device. */
const NAMES = `
  shown() {
    local name minor link
    # As in /dev: dmsetup's own output is made readable.
    for name in /sys/class/block/dm-*/dm/name; do
      minor=\${name%/dm/name} minor=\${minor##*/}
      read -r name <$name
      link="/dev/mapper/$name"
      case $name in vm-* | tools | secret-open) continue ;; esac
      echo "$name $([ "$(readlink -e "$link")" = /dev/$minor ] || [ "$(readlink "$link")" = /dev/disk/by-diskseq/.dm/$(cat /sys/class/block/$minor/diskseq)/$minor ] && [ -b "$link" ] && echo right)"
    done | sort
    ls /dev/mapper | grep -vE '^(control|tools|vm-.*|secret-open)$' || true
  }
  for name in 'a b' 'a+b#:=@~' x; do say "create $name" dmsetup create "$name" --table '0 8 zero'; done
  say 'odd names' shown
  say 'rename' dmsetup rename 'a b' 'c d'
  say 'rename to an odd name' dmsetup rename x 'a b'
  say 'renamed' shown
  for name in 'a b' 'c d' 'a+b#:=@~'; do say "remove $name" dmsetup remove "$name"; done
  say 'removed' shown
`

const OPT_OUT = `
  say 'link' readlink /dev/mapper/tools
  echo 'ENV{DM_NAME}=="tools", ENV{DISKSEQFS_LINK}="0"' >/etc/udev/rules.d/60-zz-optout.rules
  again() { udevadm control --reload; udevadm trigger /dev/$dm; udevadm settle; }
  again
  say 'opted out' readlink /dev/mapper/tools
  say 'others' bash -c 'readlink /dev/mapper/vm-home'
  again
  say 'still' readlink /dev/mapper/tools
  rm /etc/udev/rules.d/60-zz-optout.rules
  again
  say 'back' readlink /dev/mapper/tools
`

async function ask(vm: Vm, script: string): Promise<Answers> {
  const output = await vm.run(`set +e\n${PRELUDE}\n${script}`, 15 * 60_000)
  return new Map(
    output
      .trimEnd()
      .split('\n')
      .map((line) => {
        const [key, ...value] = line.split('|')
        return [key as string, value.join('|')]
      }),
  )
}

/** Complaints of udev since then; numbers differ from one time to the next. */
async function warnings(vm: Vm, since: string): Promise<string[]> {
  const output = await vm.run(
    `journalctl -b -p warning -u systemd-udevd --since "@${since}" --no-pager -q -o json --output-fields=MESSAGE,_COMM |
      grep -E '"_COMM":"(systemd-udevd|\\(udev-worker\\))"' | sed -E 's/.*"MESSAGE":"([^"]*)".*/\\1/; s/[0-9]+/N/g' | sort -u || true`,
  )
  return output.split('\n').filter((line) => line !== '')
}

const failed = ([, answer]: [string, string]) => / ?\(status \d+\)$/.test(answer)

export const tools: Case = {
  name: 'tools',
  // same.ts compares most of this as well.
  shortOn: 'none',
  async before(vm: Vm): Promise<Stock> {
    const answers = await ask(vm, `${useOf('/dev/mapper/tools')}\n${NAMES}`)
    return { answers: [...answers], warnings: await warnings(vm, '0') }
  },
  async run(t: Test, vm: Vm, before: unknown) {
    const stock = before as Stock
    const since = (await vm.run('date +%s')).trim()
    const refused = stock.answers.filter(failed).map(([key]) => key)

    const named = await ask(vm, `${useOf('/dev/mapper/tools')}\n${NAMES}`)
    const differences: Record<string, [string, string]> = {}
    for (const [key, answer] of stock.answers) {
      if (named.get(key) !== answer) differences[key] = [answer, named.get(key) ?? 'not asked']
    }
    for (const [key, [was, is]] of Object.entries(differences)) note(t, `${key}: ${is || '""'} (stock: ${was || '""'})`)
    for (const [key, pattern] of Object.entries(MAY_DIFFER)) {
      if (differences[key]?.every((answer) => pattern.test(answer))) delete differences[key]
    }
    t.strictSame(differences, EXPECTED, 'by name: only the known differences from stock')
    t.equal(named.get('removed'), '', 'no odd name is left behind')

    const numbered = await ask(vm, useOf('$tree'))
    const different = new Set(refused)
    for (const [key, [, answer]] of Object.entries(differences)) if (failed([key, answer])) different.add(key)
    t.strictSame(
      [...numbered]
        .filter(failed)
        .map(([key, answer]) => (different.has(key) ? key : `${key}: ${answer}`))
        .sort(),
      [...different, ...FAILS_BY_NUMBER].sort(),
      'by path in the tree: works and fails where the name does',
    )
    for (const key of numbered.keys()) if (key.startsWith('by-uuid link of')) t.equal(numbered.get(key), 'right', key)

    const partitions = await ask(vm, PARTITIONS)
    t.strictSame([...partitions].filter(failed), [], 'partitions: every command works')
    for (const [key, answer] of Object.entries(PARTITIONS_ANSWERS)) t.equal(partitions.get(key), answer, key)

    const links = await ask(vm, OPT_OUT)
    t.strictSame(
      Object.fromEntries(links),
      {
        link: '/dev/disk/by-diskseq/.dm/N/dm-N',
        'opted out': '../dm-N',
        others: '/dev/disk/by-diskseq/.dm/N/dm-N',
        still: '../dm-N',
        back: '/dev/disk/by-diskseq/.dm/N/dm-N',
      },
      'a device can be left alone',
    )

    await vm.run('udevadm trigger --settle --subsystem-match=block')
    t.strictSame(
      (await warnings(vm, since)).filter((line) => !stock.warnings.includes(line)),
      [],
      'no warning from udev that a stock system does not have',
    )
    t.equal(await vm.run('systemctl --failed --no-legend'), '', 'no unit failed')
  },
}
