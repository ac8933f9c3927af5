// SPDX-License-Identifier: MIT
/**
 * All links of a device in the tree, if that is asked for (README, "All links"). Each leads to the
 * device that it led to on the stock system, also if several devices claim it, and to no other while
 * disks come and go.
 */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

const SECONDS = SHORT ? 8 : 15
/** Enough opens to be meaningful; and how often it is tried again to get that many. */
const RIGHT_MIN = 11
const AGAIN_MAX = 3
const RULES = '/etc/udev/rules.d/60-diskseqfs-all.rules'
const ASK = `echo 'SUBSYSTEM=="block", ENV{DISKSEQFS_LINK}="all"' >${RULES}; udevadm control --reload; udevadm trigger --subsystem-match=block; udevadm settle --timeout=120`
const ASK_NO_MORE = `rm -f ${RULES}; udevadm control --reload; udevadm trigger --subsystem-match=block; udevadm settle --timeout=120`

/** Each link in /dev/disk, and the number of the device that it leads to. */
const LINKS = `find /dev/disk -path /dev/disk/by-diskseq -prune -o -type l -printf '%p ' -exec stat -L -c %t:%T {} \\; | sort`
const IN_TREE = 'find /dev/disk -path /dev/disk/by-diskseq -prune -o -type l -lname "/dev/disk/by-diskseq/.dm/*" -print'

/**
 * Images that contain their own names come and go as loop devices. A number is one image's now and another's
 * later. Other processes open the images by their labels and read; udev is slow before or after it makes
 * links.
 */
const RACE = `
  mkdir -p /run/udev/rules.d /run/all
  for ((i = 0; i < 6; i++)); do
    truncate -s 1M /run/all/$i
    mkswap -q -L race-$i /run/all/$i
    printf "race-$i" | dd of=/run/all/$i conv=notrunc status=none
  done
  recycle() {
    local n disk
    for ((n = $1; SECONDS < $2; n += 2)); do
      disk=$(losetup --find --show /run/all/$((n % 6)))
      sleep 1.$((RANDOM % 6))
      losetup --detach $disk
    done
  }
  look() {
    local i got right=0 wrong=0
    while ((SECONDS < $1)); do
      i=$((RANDOM % 6)) got=
      { read -r -N 6 got </dev/disk/by-label/race-$i; } 2>/dev/null
      case $got in
      '') sleep 0.002 ;;
      race-$i) ((++right)) ;;
      *) ((++wrong)) ;;
      esac
    done
    echo $right $wrong
  }
  race() {
    local end=$((SECONDS + ${SECONDS}))
    recycle 0 $end & recycle 1 $end &
    look $end >/run/all/a & look $end >/run/all/b &
    wait
    udevadm settle --timeout=120
  }
  set +e
  echo "ACTION!=\\"remove\\", KERNEL==\\"loop*\\", $1" >/run/udev/rules.d/57-slow.rules
  udevadm control --reload
  race
  rm /run/udev/rules.d/57-slow.rules
  udevadm control --reload
  cat /run/all/a /run/all/b | awk '{ right += $1; wrong += $2 } END { print right, wrong }'
  ls /dev/disk/by-label 2>/dev/null | grep race-
  rm -r /run/all`

interface Raced {
  readonly right: number
  readonly wrong: number
  /** Names that lead somewhere when all is over. */
  readonly left: string
}

async function race(vm: Vm): Promise<Raced> {
  const total = { right: 0, wrong: 0, left: '' }
  for (const slow of ['PROGRAM="/bin/sleep 0.3"', 'RUN+="/bin/sleep 0.3"']) {
    const [counts, ...left] = (await vm.run(`set -- '${slow}'; ${RACE}`, 300_000)).trim().split('\n')
    const [right, wrong] = (counts as string).split(' ').map(Number) as [number, number]
    total.right += right
    total.wrong += wrong
    total.left += left.join(' ')
  }
  return total
}

interface Stock {
  readonly links: string
  readonly raced: Raced
}

/** Two disks have the same label; which one does it lead to? Then one of them goes. */
async function shared(t: Test, vm: Vm): Promise<void> {
  const twins = `
    for n in a b; do truncate -s 1M /run/twin-$n; mkswap -q -L twins /run/twin-$n; done
    led() { udevadm settle; local real=$(readlink -f /dev/disk/by-label/twins); echo "$1: $(cat /sys/class/block/\${real##*/}/loop/backing_file) $(readlink /dev/disk/by-label/twins | grep -c /by-diskseq/.dm/)"; }
    gone() { udevadm settle; [ ! -L /dev/disk/by-label/twins ] && echo gone; }`
  const prefer = (file: string) =>
    `echo 'ATTR{loop/backing_file}=="/run/twin-${file}", OPTIONS+="link_priority=10"' >/run/udev/rules.d/62-twin.rules; udevadm control --reload`
  t.equal(
    await vm.run(`
      ${twins}
      a=$(losetup -f --show /run/twin-a); led one
      b=$(losetup -f --show /run/twin-b); led 'the first has it'
      losetup -d $a; led 'the other'
      a=$(losetup -f --show /run/twin-a); udevadm settle
      losetup -d $a; led 'still'
      losetup -d $b; gone`),
    'one: /run/twin-a 1\nthe first has it: /run/twin-a 1\nthe other: /run/twin-b 1\nstill: /run/twin-b 1\ngone\n',
    'of two disks with the same label one has it, then the other',
  )
  t.equal(
    await vm.run(`
      ${twins}
      ${prefer('b')}
      a=$(losetup -f --show /run/twin-a); led one
      b=$(losetup -f --show /run/twin-b); led preferred
      echo change >/sys/block/\${a##*/}/uevent; led 'still'
      losetup -d $b; led 'what is left'
      losetup -d $a; gone
      rm /run/udev/rules.d/62-twin.rules; udevadm control --reload`),
    'one: /run/twin-a 1\npreferred: /run/twin-b 1\nstill: /run/twin-b 1\nwhat is left: /run/twin-a 1\ngone\n',
    'the one of the higher priority has it',
  )
  // Only one of the two disks has it asked for: the name is in the tree, whichever disk has it.
  t.equal(
    await vm.run(`
      ${twins}
      echo 'SUBSYSTEM=="block", ATTR{loop/backing_file}!="/run/twin-a", ENV{DISKSEQFS_LINK}="all"' >${RULES}; udevadm control --reload
      a=$(losetup -f --show /run/twin-a); led 'not asked for'
      b=$(losetup -f --show /run/twin-b); led 'shared'
      echo change >/sys/block/\${a##*/}/uevent; led 'still'
      losetup -d $a; led 'the other'
      losetup -d $b; gone
      rm /run/twin-?; ${ASK}`),
    'not asked for: /run/twin-a 0\nshared: /run/twin-a 1\nstill: /run/twin-a 1\nthe other: /run/twin-b 1\ngone\n',
    'a name that only one of them has in the tree',
  )
}

/** As a volume plugin does: follow the link, mount the device, find it again in the mounts. */
async function plugin(t: Test, vm: Vm): Promise<void> {
  t.equal(
    await vm.run(`
      truncate -s 8M /run/volume; mke2fs -q -t ext4 -L volume /run/volume
      disk=$(losetup -f --show /run/volume); udevadm settle
      real=$(readlink -f /dev/disk/by-label/volume)
      [ $real = /dev/disk/by-diskseq/.dm/$(cat /sys/block/\${disk##*/}/diskseq)/\${disk##*/} ] && echo in the tree
      mkdir -p /run/volume.d
      # Such a mount systemd may undo when its device has another name.
      echo 'LABEL=volume /run/volume.d ext4 noauto 0 0' >>/etc/fstab; systemctl daemon-reload
      mount $real /run/volume.d
      [ "$(awk '$2 == "/run/volume.d" { print $1 }' /proc/mounts)" = $real ] && echo found in mounts
      [ "$(lsblk -no NAME,MOUNTPOINT $real)" = "\${disk##*/} /run/volume.d" ] && echo lsblk
      [ "$(findmnt -no TARGET $real)" = /run/volume.d ] && echo findmnt
      blkid -o value -s LABEL $real
      [ /sys/class/block/$(basename $real) -ef /sys/class/block/\${disk##*/} ] && echo sysfs
      systemctl is-active "$(systemd-escape -p --suffix=device /dev/disk/by-label/volume)" "$(systemd-escape -p --suffix=device $real)"
      systemctl stop diskseqfs; udevadm settle; sleep 3
      mountpoint -q /run/volume.d && echo still mounted
      [ "$(readlink -f /dev/disk/by-label/volume)" = $disk ] && echo stock
      systemctl start diskseqfs; udevadm settle
      mountpoint -q /run/volume.d && [ "$(readlink -f /dev/disk/by-label/volume)" = $real ] && echo as before
      umount /dev/disk/by-label/volume && echo unmounted
      sed -i '/^LABEL=volume /d' /etc/fstab; systemctl daemon-reload
      losetup -d $disk; rm /run/volume; rmdir /run/volume.d; udevadm settle`),
    'in the tree\nfound in mounts\nlsblk\nfindmnt\nvolume\nsysfs\nactive\nactive\nstill mounted\nstock\nas before\nunmounted\n',
    'a volume is mounted by its label, and found again',
  )
}

/** A guest can write anything to its disk: the contents must not make the disk count as the host's swap. */
async function notByContent(t: Test, vm: Vm): Promise<void> {
  const uuid = '5b1d4a3c-1111-4222-8333-123456789abc'
  t.match(
    await vm.run(`
      cp -p /etc/fstab /run/fstab
      trap 'cp -p /run/fstab /etc/fstab; rm /run/fstab; dmsetup remove guest; losetup -d $disk; rm /run/guest; udevadm settle' EXIT
      echo '/dev/disk/by-uuid/${uuid} none swap noauto 0 0' >>/etc/fstab
      truncate -s 1M /run/guest; mkswap -q -U ${uuid} /run/guest
      disk=$(losetup -f --show /run/guest)
      dmsetup create guest --table "0 2048 linear $disk 0"
      udevadm settle
      readlink /dev/mapper/guest /dev/disk/by-uuid/${uuid}`),
    /^\/dev\/disk\/by-diskseq\/.*\n\.\.\/\.\.\/\S+\n$/,
    'a name in fstab is left to udev, but no other name of the disk that claims it',
  )
}

export const all: Case = {
  name: 'all links of all devices',
  shortOn: 'none',
  async before(vm): Promise<Stock> {
    return { links: await vm.run(LINKS), raced: await race(vm) }
  },
  async run(t, vm, before) {
    const stock = before as Stock
    await vm.run(ASK)
    try {
      t.equal(await vm.run(LINKS), stock.links, 'each link leads to the device that it led to before')
      t.ok((await vm.run(IN_TREE)).split('\n').length > 4, 'links lead through the tree')
      t.equal(await vm.run('for link in $(find /dev/disk -lname "*/by-diskseq/*"); do [ -e $link ] || echo $link; done'), '', 'all of them')
      await shared(t, vm)
      await plugin(t, vm)
      await notByContent(t, vm)
      let { right, wrong, left } = await race(vm)
      // A machine that is busy with other work needs more time for enough opens.
      for (let again = 0; again < AGAIN_MAX && right < RIGHT_MIN && wrong === 0; again++) {
        const more = await race(vm)
        right += more.right
        wrong += more.wrong
        left += more.left
      }
      note(t, `by label: ${wrong} wrong, ${right} right; stock: ${stock.raced.wrong} wrong, ${stock.raced.right} right`)
      t.strictSame({ wrong, left }, { wrong: 0, left: '' }, 'no label led to another disk, and none leads to a disk that is gone')
      t.ok(right >= RIGHT_MIN && stock.raced.wrong > 0, 'labels led to their own disks; on the stock system also to others')
    } finally {
      await vm.run(ASK_NO_MORE)
    }
    t.equal(await vm.run(LINKS), stock.links, 'given back')
    t.equal(await vm.run(IN_TREE), '', 'no link leads into the tree any more')
    t.equal(
      await vm.run('journalctl -b -q --no-pager -p warning -u systemd-udevd -o cat | grep diskseqfs || true'),
      '',
      'there was no warning',
    )
  },
}
