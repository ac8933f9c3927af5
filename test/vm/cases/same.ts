// SPDX-License-Identifier: MIT
/**
 * An administrator sees the same on a system with the package as on a stock system: the same
 * commands are run before it is installed and after, and their output is compared line by line.
 */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { type Answers, askAll, compareAll, type Probe, TRY } from '../probes.js'
import { note } from '../findings.js'
import { withLink } from '../twin.js'
import type { Vm } from '../vm.js'
import { inWords, watched } from '../watch.js'

/** A directory in the machine. */
const DIRECTORY = '/run/same'
/**
 * How long a name may lead nowhere while the service starts, in ms, on a busy emulated machine. While it stops or restarts, a name never
 * does.
 */
const START_GAP_MS = 3000
/** How often all names must be looked at, at least, while the service stops or starts. */
const SAMPLES_MIN = 5

const UUID = '5a3e0000-1111-2222-3333-444444444444'
const LUKS_UUID = '5a3e0001-1111-2222-3333-444444444444'

/** What each probe starts with. */
const PRELUDE = `
  ${TRY}
  cd /run/same
  uuid=${UUID}
  swap='dev-mapper-vm\\x2dsameswap.swap'
  mounted() { mountpoint -q /srv/same || mount /srv/same; }
  swapped() { swapon -a 2>/dev/null; }
`

/**
 * One volume of each kind: a logical volume with a file system and one with swap, both in fstab; a
 * plain device-mapper device and an encrypted one, on loop devices whose numbers are always the
 * same.
 */
const PREPARE = `
  mkdir -p /run/same /srv/same
  cd /run/same
  cp -p /etc/fstab fstab
  lvcreate -qqy -L 64M -n same vm
  lvcreate -qqy -L 32M -n sameswap vm
  mkfs.ext4 -q -L same -U ${UUID} /dev/vm/same
  mkswap -q -L sameswap /dev/vm/sameswap
  truncate -s 64M disk.img
  truncate -s 32M luks.img
  for i in 60 61; do [ -b /dev/loop$i ] || mknod -m 660 /dev/loop$i b 7 $i; done
  losetup /dev/loop60 disk.img
  losetup /dev/loop61 luks.img
  # Not from the start, or what is in it were in the loop device as well.
  dmsetup create same-dm --table '0 32768 linear 7:60 2048'
  mkswap -q -L same-dm /dev/mapper/same-dm
  head -c 32 /dev/urandom >key
  # A key derivation that emulation can do.
  cryptsetup luksFormat -q --type luks2 --uuid ${LUKS_UUID} --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/loop61 key
  cryptsetup open --key-file key /dev/loop61 same-luks
  mkswap -q -L same-luks /dev/mapper/same-luks
  cat >>/etc/fstab <<'TAB'
/dev/mapper/vm-same /srv/same ext4 user,noauto 0 0
/dev/mapper/vm-sameswap none swap defaults,nofail 0 0
TAB
  systemctl daemon-reload
  # udev misses a writer that closes the device while udev looks at it.
  udevadm settle
  udevadm trigger --settle --subsystem-match=block --sysname-match='dm-*'
  mount /srv/same
  swapon -a
  udevadm settle
  cat >prelude <<'PRELUDE'
${PRELUDE}
PRELUDE
  echo "dm=dm-$(dmsetup info -c --noheadings -o minor vm-same)" >>prelude
`

const TIDY = `
  umount -qR /run/same/root
  umount -q /srv/same
  swapoff /dev/mapper/vm-sameswap
  [ ! -e /run/same/fstab ] || cp -p /run/same/fstab /etc/fstab
  systemctl daemon-reload
  for name in same-luks same-dm; do dmsetup remove --retry $name; done
  losetup -d /dev/loop60
  losetup -d /dev/loop61
  lvremove -qqy vm/same
  lvremove -qqy vm/sameswap
  systemctl reset-failed srv-same.mount '*sameswap.swap'
  # Where something is still mounted in it: not that.
  rm -rf --one-file-system /run/same
  rmdir /srv/same
`

const SWAP_UNIT = 'swap and its unit'
const FILTERS = 'names in the filters of lvm.conf'

const PROBES: readonly Probe[] = [
  {
    // Apart from the tree's own mount there is no difference.
    what: 'all that is mounted and swapped on',
    script: `
      try 'grep -v " fuse.diskseqfs " /proc/mounts | sort'
      try 'findmnt -rno TARGET,SOURCE,FSTYPE -t nofuse.diskseqfs | sort'
      try 'df -x fuse.diskseqfs --output=source,fstype,target | sort'
      try 'swapon --show=NAME,TYPE,SIZE'
      try 'lsblk -o NAME,TYPE,FSTYPE,LABEL,MOUNTPOINTS'`,
  },
  {
    what: 'where a file system is mounted from',
    script: `
      try 'grep " /srv/same " /proc/mounts'
      try 'sed -n "s|.* /srv/same .* - ||p" /proc/self/mountinfo'
      try 'mount | grep /srv/same'
      try 'findmnt -no SOURCE /srv/same'
      try 'df --output=source /srv/same'
      try 'df --output=source /dev/mapper/vm-same'
      try 'df --output=target | grep -v ^/run | sort'`,
  },
  {
    // Before much is mounted, as the service manager then looks at mounts only once a second.
    what: 'the units of a mount',
    script: `
      trap mounted EXIT
      try "systemctl list-units --type=mount,device --no-legend --plain | awk '\\$1 ~ /same/ { print \\$1, \\$3, \\$4 }' | sort"
      try 'systemctl is-active srv-same.mount "dev-mapper-vm\\x2dsame.device"'
      try 'systemctl show -P What srv-same.mount'
      for property in BindsTo Requires After; do try "systemctl show -P $property srv-same.mount | tr ' ' '\\n' | sort"; done
      try 'systemctl stop srv-same.mount'
      try 'mountpoint -q /srv/same'
      try 'systemctl start srv-same.mount'
      try 'findmnt -no SOURCE /srv/same'`,
  },
  {
    what: 'a file system is found, unmounted and mounted by each of its names',
    script: `
      trap mounted EXIT
      for spec in /dev/$dm /dev/mapper/vm-same /dev/vm/same UUID=$uuid LABEL=same; do
        try "findmnt -no TARGET -S $spec"
        try "umount $spec"
        try "mount $spec"
        try 'findmnt -no SOURCE /srv/same'
      done
      umount /srv/same
      try 'mount /dev/vm/same /srv/same; findmnt -no SOURCE /srv/same; umount /srv/same'`,
  },
  {
    what: 'mount -a',
    script: `
      sed s/,noauto// /etc/fstab >fstab.auto
      try 'mount -avT fstab.auto'
      try 'grep -c " /srv/same " /proc/mounts'`,
  },
  {
    what: 'a user unmounts what it may mount',
    script: `
      trap 'umount -q /srv/same; mounted' EXIT
      umount /srv/same
      try 'runuser -u nobody -- mount /srv/same'
      try 'runuser -u nobody -- umount UUID=$uuid'
      try 'runuser -u nobody -- mount /dev/mapper/vm-same'
      try 'findmnt -no SOURCE /srv/same'
      try 'runuser -u nobody -- umount /srv/same'
      try 'mountpoint -q /srv/same'`,
  },
  {
    // The second time it uses its cache.
    what: 'blkid, twice, and findfs',
    script: `
      blkid >/dev/null
      try 'blkid | sed s/:.*// | grep -E "mapper|dm-|diskseq" | sort'
      try 'blkid /dev/mapper/vm-same'
      try 'blkid -L same'
      try 'blkid -o device -t LABEL=same-luks'
      try 'findfs LABEL=same'
      try 'findfs UUID=$uuid'`,
  },
  {
    what: 'swap, as it is shown',
    script: `
      try 'swapon --show=NAME --noheadings'
      try 'cut -d " " -f 1 /proc/swaps'`,
  },
  {
    what: SWAP_UNIT,
    script: `
      trap swapped EXIT
      try 'systemctl is-active "$swap"'
      try 'systemctl stop "$swap"'
      try 'wc -l </proc/swaps'
      try 'systemctl start "$swap"'
      try 'wc -l </proc/swaps'
      try 'systemctl is-active "$swap"'
      # systemd hears of what others do.
      becomes() {
        for ((i = 0; i < 50; i++)); do [ "$(systemctl is-active "$swap")" = $1 ] && break; sleep 0.1; done
        systemctl is-active "$swap"
      }
      try 'swapoff /dev/mapper/vm-sameswap'
      try 'becomes inactive'
      try 'swapon -a'
      try 'becomes active'
      # It is on already.
      try 'swapon -a'
      try 'wc -l </proc/swaps'`,
  },
  {
    what: 'lsblk',
    script: `
      try 'lsblk -nro NAME,TYPE,MOUNTPOINT | grep -E "same|vm-|secret" | sort -u'
      try 'lsblk -nro NAME,MOUNTPOINT /dev/mapper/vm-same'
      try 'lsblk -nrpo NAME,KNAME,PKNAME,FSTYPE /dev/mapper/same-luks'`,
  },
  {
    what: 'dmsetup, and the names in /dev',
    script: `
      udevadm settle
      try 'dmsetup ls | sort'
      try 'dmsetup info -c -o name,attr,open,segments,events,uuid | sort'
      try 'dmsetup table same-dm'
      try 'find /dev/mapper /dev/vm -printf "%p %y %m %u\\n" | sort'
      try 'stat -Lc "%n %t %F:%U:%G:%a" /dev/mapper/* /dev/vm/*'
      # Each name has its own device's number: nothing is printed.
      numbers() { dmsetup info -c --noheadings --separator : -o name,major,minor | sed s:^:/dev/mapper/: | sort; }
      try 'diff <(stat -Lc %n:%Hr:%Lr /dev/mapper/[!c]* | sort) <(numbers)'`,
  },
  {
    what: 'the kernel name that a name leads to',
    script: `
      for name in mapper/vm-same vm/same mapper/vm-sameswap mapper/same-dm mapper/same-luks; do
        try "test -e /sys/class/block/\\$(basename \\$(readlink -f /dev/$name))"
        try "udevadm info -q name /dev/$name"
      done`,
  },
  {
    what: 'udevadm info',
    limit: "the names are not udev's; DISKSEQFS_LINKS= has them",
    script: `
      try 'udevadm info -q symlink /dev/$dm | tr " " "\\n" | grep -E "^(mapper|vm)/" | sort'`,
  },
  {
    what: 'udisksctl',
    limit: "it knows the names that udev's database has, no others",
    script: `
      try 'udisksctl info -b /dev/mapper/vm-same | grep IdLabel:'
      try 'udisksctl info -b /dev/$dm | grep -E "^ *(Symlinks: *|PreferredDevice: *)?/dev/(mapper|vm)/"'
      # With the entry of fstab.
      try 'udisksctl info -b /dev/$dm | grep Configuration:'`,
  },
  {
    // As in a rescue or installer system: only /dev itself, not the mounts in it.
    what: 'a chroot with a bind mount of /dev',
    script: `
      trap 'umount -q root/dev; umount -q root; mounted' EXIT
      umount /srv/same
      mkdir -p root
      mount --bind --make-private / root
      mount -o remount,bind,ro root
      mount --bind /dev root/dev
      for name in /dev/mapper/vm-same /dev/vm/same; do
        try "chroot root readlink -e $name"
        try "chroot root test -b $name"
      done
      try 'chroot root blkid /dev/mapper/vm-same'
      try 'chroot root e2fsck -n /dev/mapper/vm-same'
      try 'chroot root dumpe2fs -h /dev/vm/same 2>&1 | grep -E "^(Filesystem (volume name|UUID|state)|Block count):"'`,
  },
  {
    what: 'tools for file systems',
    script: `
      try 'tune2fs -l /dev/mapper/vm-same | grep -E "^(Filesystem (volume name|UUID|state)|Last mounted on|Block count):"'
      try 'e2label /dev/vm/same'
      try 'e2scrub_all -n'
      # As fstrim.service has it; how much there is to discard is not the question.
      try 'fstrim --listed-in /etc/fstab:/proc/self/mountinfo -nv --quiet-unsupported | sed "s/: .* trimmed/: trimmed/"'
      try 'grub-probe -t fs_uuid /srv/same'`,
  },
  {
    what: 'grub-probe, asked for the device',
    limit: 'it shows where the name leads',
    script: "try 'grub-probe -t device /srv/same'",
  },
  {
    what: 'encrypted volumes',
    script: `
      udevadm settle
      try 'cryptsetup status same-luks'
      try 'cryptsetup status /dev/mapper/same-luks'
      try 'cryptsetup status secret-open'
      try 'dmsetup deps -o devname same-luks'
      try 'systemctl is-active "dev-mapper-same\\x2dluks.device" "systemd-cryptsetup@secret\\x2dopen.service"'
      try 'systemctl show -P BindsTo "systemd-cryptsetup@secret\\x2dopen.service"'`,
  },
  {
    what: 'loop devices',
    script: `
      try 'losetup -nlO NAME,BACK-FILE | grep /run/same | sort'
      try 'losetup -j luks.img | cut -d : -f 1'
      try 'lsblk -nro NAME /dev/loop60 | sort'`,
  },
  {
    what: 'who uses a file system',
    script: `
      env -C /srv/same sleep 60 >/dev/null 2>&1 &
      trap 'kill $!' EXIT
      until [ "$(</proc/$!/comm)" = sleep ]; do sleep 0.1; done
      try 'fuser -m /srv/same 2>/dev/null | wc -w'
      try 'fuser -m /dev/mapper/vm-same 2>/dev/null | wc -w'
      try 'fuser -vm /srv/same 2>&1 | sed -E "s/[0-9]+/PID/"'
      try 'lsof -t /srv/same | wc -l'
      try 'lsof -t /dev/mapper/vm-same | wc -l'
      try 'umount /srv/same'`,
  },
  {
    what: 'LVM takes the source of a mount for a volume',
    script: `
      trap 'lvremove -qqy vm/samesnap 2>/dev/null' EXIT
      try 'lvs --noheadings -o lv_name $(findmnt -no SOURCE /srv/same)'
      try 'lvcreate -qs -n samesnap -L 8M $(findmnt -no SOURCE /srv/same)'
      try 'lvs --noheadings -o lv_name,origin vm/samesnap'
      try 'lvremove -qy vm/samesnap'`,
  },
  {
    what: 'a file system grows and shrinks with its volume',
    limit: 'lvm2 before 2.03.31 shows where the name leads',
    limitOn: 'bookworm',
    script: `
      trap 'umount -q /srv/same; mounted' EXIT
      try 'lvextend -r -L +8M /dev/vm/same'
      try 'df --output=source,size /srv/same'
      try 'lvreduce -ry -L -8M /dev/mapper/vm-same'
      try 'findmnt -no SOURCE /srv/same'
      try 'lvs --noheadings -o lv_size vm/same'`,
  },
  {
    // pvscan has them from udev, which runs it while it looks at the device.
    what: FILTERS,
    script: `
      config=/etc/lvm/lvm.conf
      undo() {
        cp -p lvm.conf $config
        systemctl stop 'lvm-activate-same*'
        systemctl reset-failed 'lvm-activate-same*'
        vgchange -qqan samein sameout
        vgremove -qqff samein
        vgremove -qqff sameout
        for name in same-in same-out; do dmsetup remove --retry $name; done
      }
      trap 'undo >/dev/null 2>&1' EXIT
      cp -p $config lvm.conf
      dmsetup create same-in --table '0 32768 linear 7:60 34816'
      dmsetup create same-out --table '0 32768 linear 7:60 67584'
      for i in in out; do
        vgcreate -qq --setautoactivation n same$i /dev/mapper/same-$i
        lvcreate -qqy -an -Zn -l 1 -n lv same$i
        vgchange -qq --setautoactivation y same$i
      done
      # Both devices come as they do at boot: their groups are not up, and were not seen yet.
      come() {
        cp -p lvm.conf $config
        udevadm settle
        systemctl -q stop 'lvm-activate-same*'
        vgchange -qqan samein sameout
        rm -f /run/lvm/vgs_online/same{in,out} $(grep -ls vg:same /run/lvm/pvs_online/*)
        echo "devices { global_filter = [ $1 ] }" >>$config
        udevadm trigger --action=add --settle /dev/mapper/same-in /dev/mapper/same-out
        for ((i = 0; i < 50; i++)); do [ -b /dev/mapper/samein-lv ] && break; sleep 0.2; done
        # The other one has had its time as well.
        sleep 2
        pvs --noheadings -o pv_name
        dmsetup ls | grep -oE '^same(in|out)-lv'
      }
      rejects='"r|^/dev/mapper/same-out$|"'
      accepts='"a|^/dev/vda|", "a|^/dev/mapper/same-in$|", "r|.*|"'
      try 'come "$rejects"'
      try 'come "$accepts"'`,
  },
]

async function withVolumes<T>(vm: Vm, use: () => Promise<T>): Promise<T> {
  try {
    await vm.run(PREPARE)
    return await use()
  } finally {
    await vm.attempt(TIDY)
  }
}

/** With the file system mounted and idle, and swap on, the service stops, starts and restarts. */
async function inUse(t: Test, vm: Vm): Promise<void> {
  t.notMatch(await vm.run('df --output=pcent,ipcent /dev/disk/by-diskseq'), /100%/, 'the tree is not full, not even by its count of inodes')
  const deeds = ['stop', 'start', 'restart'].map((what) => ({ what, script: `systemctl ${what} diskseqfs` }))
  try {
    for (const result of await watched(vm, deeds, '/dev/mapper/* /dev/vm/*', "srv-same.mount 'dev-mapper-vm\\x2dsame.device'")) {
      note(t, `while in use: ${inWords(result)}`)
      t.strictSame(result.troubles, [], `${result.what}: nothing is unmounted or switched off`)
      // When the tree comes to a running system, udev removes its own links before ours are made.
      const gaps = result.gaps.filter(({ ms }) => result.what !== 'start' || ms > START_GAP_MS)
      t.strictSame(gaps, [], `${result.what}: all names lead to their devices all the time`)
      t.ok(result.looks >= SAMPLES_MIN, `${result.what}: the names were looked at`)
    }
  } finally {
    await vm.run('systemctl start diskseqfs')
  }
}

const RULES = '/usr/lib/udev/rules.d'

/** The mechanisms that two of the answers depend on, switched off. */
async function twins(t: Test, vm: Vm, stock: Answers): Promise<void> {
  const again = 'udevadm control --reload; udevadm trigger --subsystem-match=block; udevadm settle --timeout=300'
  const differs = async (what: string, says: string) => {
    const { printed } = await askAll(
      vm,
      DIRECTORY,
      PROBES.filter((probe) => probe.what === what),
    )
    t.not(printed.get(what), stock.printed.get(what), `twin: ${says}`)
  }
  await withLink(t, vm, [['return says_swap("/etc/fstab", fstab_says, links, content) ||', 'return false &&']], async () => {
    await vm.run(again)
    await differs(SWAP_UNIT, 'if names for swap are ours as well, its unit does not know it')
  })
  // LVM 2.03.16 gives the same answers without them.
  if (vm.release === 'bookworm') return
  await vm.run(`mv ${RULES}/99-z-diskseqfs.rules ${RULES}/62-diskseqfs.rules; ${again}`)
  await differs(FILTERS, 'if names leave udev before other rules have seen them, the filters of lvm do not know them')
  await vm.run(`mv ${RULES}/62-diskseqfs.rules ${RULES}/99-z-diskseqfs.rules; ${again}`)
}

export const same: Case = {
  name: 'a system with the package looks as it did',
  shortOn: 'bookworm',
  before: (vm) => withVolumes(vm, () => askAll(vm, DIRECTORY, PROBES)),
  async run(t, vm, before) {
    const stock = before as Answers
    await withVolumes(vm, async () => {
      compareAll(t, vm, PROBES, await askAll(vm, DIRECTORY, PROBES), stock)
      await inUse(t, vm)
      if (!SHORT) await twins(t, vm, stock)
    })
  },
}
