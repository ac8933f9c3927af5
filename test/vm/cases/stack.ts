// SPDX-License-Identifier: MIT
/**
 * Things built on device-mapper devices, by their names: file systems with several devices,
 * partitions, arrays, encryption, network block devices, containers. The output of the tools is
 * compared with a stock system, as in same.ts.
 */
import type { Case } from '../case.js'
import { type Answers, askAll, compareAll, type Probe, TRY } from '../probes.js'
import type { Vm } from '../vm.js'

/** A directory in the machine; on its disk, as the images are large. */
const DIRECTORY = '/var/tmp/stack'

const PRELUDE = `
  ${TRY}
  cd ${DIRECTORY}
  srv=/srv/stack
  blank() {
    local lv
    for lv; do wipefs -aq /dev/stack/$lv; done
    udevadm settle
  }
  # Until it is so; the other prints it as well.
  until_done() { local i; for i in {1..50}; do "$@" >/dev/null 2>&1 && return; sleep 0.2; done; return 1; }
  soon() { until_done "$@"; "$@"; }
`

/** Two loop devices whose numbers are always the same, a volume group on them, and volumes of all sizes. */
const PREPARE = `
  mkdir -p ${DIRECTORY} /srv/stack
  cd ${DIRECTORY}
  for i in 0 1; do
    truncate -s 1200M image$i
    [ -b /dev/loop6$i ] || mknod -m 660 /dev/loop6$i b 7 6$i
    losetup /dev/loop6$i image$i
  done
  vgcreate -qq --setautoactivation n stack /dev/loop60 /dev/loop61
  for lv in a b c; do lvcreate -qqy -Wn -L 340M -n $lv stack; done
  for lv in x y; do lvcreate -qqy -Wn -L 64M -n $lv stack; done
  udevadm settle
  cat >prelude <<'PRELUDE'
${PRELUDE}
PRELUDE
`

const TIDY = `
  umount -qR /srv/stack
  vgchange -qqan stack
  vgremove -qqff stack
  losetup -d /dev/loop60
  losetup -d /dev/loop61
  rm -rf --one-file-system ${DIRECTORY}
  rmdir /srv/stack
`

const PROBES: readonly Probe[] = [
  {
    what: 'btrfs on two volumes',
    limit: 'it has the names that mkfs.btrfs was given, where stock has /dev/dm-N',
    limitMayBe: true,
    script: `
      trap 'umount -q $srv; blank a b c' EXIT
      try 'mkfs.btrfs -q -f -L stack -U 5a3e0002-1111-2222-3333-444444444444 /dev/stack/a /dev/mapper/stack-b'
      udevadm settle
      try 'btrfs device scan /dev/mapper/stack-a'
      try 'btrfs device ready /dev/stack/b'
      try 'btrfs filesystem show | tail -n +2 | sort'
      try 'mount /dev/mapper/stack-a $srv'
      try 'btrfs filesystem show $srv | tail -n +2'
      try 'btrfs filesystem show /dev/mapper/stack-b | tail -n +2'
      try 'btrfs filesystem show -m | tail -n +2'
      try 'btrfs device usage $srv | grep -o "^/[^,]*"'
      try 'btrfs device stats $srv | grep write_io'
      try 'findmnt -no SOURCE $srv; df --output=source $srv | tail -n 1'
      try 'umount $srv; mount UUID=5a3e0002-1111-2222-3333-444444444444 $srv; findmnt -no SOURCE $srv'
      try 'findmnt -no TARGET -S /dev/mapper/stack-b'
      try 'umount /dev/mapper/stack-b'
      try 'mountpoint -q $srv && umount $srv'
      try 'mount -o device=/dev/mapper/stack-a,device=/dev/mapper/stack-b /dev/stack/b $srv; findmnt -no SOURCE $srv'
      udevadm trigger --settle --subsystem-match=block
      try 'findmnt -no SOURCE $srv'`,
  },
  {
    what: 'btrfs: devices are added, removed, replaced',
    script: `
      trap 'umount -q $srv; blank a b c' EXIT
      mkfs.btrfs -q -f /dev/stack/a
      udevadm settle
      mount /dev/stack/a $srv
      show() { btrfs filesystem show $srv | grep -o 'path .*'; }
      try 'btrfs device add -f /dev/mapper/stack-b $srv | grep -v discard'
      try show
      try 'btrfs device remove /dev/mapper/stack-b $srv'
      try show
      try 'btrfs replace start -Bf /dev/mapper/stack-a /dev/stack/c $srv'
      try show
      try 'btrfs filesystem resize 300M $srv | sed s/.*://'
      try 'findmnt -no SOURCE $srv'
      try 'btrfs scrub start -B $srv | grep -i error'
      try 'umount $srv'
      try 'btrfs check --readonly /dev/mapper/stack-c 2>&1 | grep -i opening -A1'
      try 'btrfs-convert -l /dev/mapper/stack-c 2>&1 | head -n 1'`,
  },
  {
    what: 'XFS with an external log',
    script: `
      trap 'umount -q $srv; blank a x' EXIT
      try 'mkfs.xfs -q -f -l logdev=/dev/mapper/stack-x -d size=320m /dev/mapper/stack-a'
      udevadm settle
      try 'mount -o logdev=/dev/mapper/stack-x /dev/stack/a $srv'
      try 'grep " $srv " /proc/mounts'
      try 'xfs_info $srv'
      try 'xfs_info /dev/mapper/stack-a | head -n 1'
      try 'xfs_growfs $srv | tail -n 1'
      try 'xfs_growfs /dev/mapper/stack-a | head -n 1'
      try 'xfs_freeze -f $srv; xfs_freeze -u $srv'
      try 'xfs_io -c statfs $srv | grep geom.bsize'
      try 'umount $srv'
      try 'xfs_repair -n -l /dev/mapper/stack-x /dev/stack/a 2>&1 | grep -v agno'
      try 'xfs_admin -l /dev/mapper/stack-a'
      try 'blkid -o value -s TYPE /dev/mapper/stack-x /dev/mapper/stack-a'
      try 'lsblk -nro NAME,FSTYPE /dev/stack/a'`,
  },
  {
    what: 'ext4 with an external journal',
    script: `
      trap 'umount -q $srv; blank a x' EXIT
      try 'mke2fs -q -b 4096 -U 5a3e0003-1111-2222-3333-444444444444 -O journal_dev /dev/mapper/stack-x'
      udevadm settle
      try 'mkfs.ext4 -q -b 4096 -J device=/dev/mapper/stack-x /dev/mapper/stack-a 200M'
      udevadm settle
      try 'dumpe2fs -h /dev/mapper/stack-a 2>&1 | grep -iE "journal (uuid|device)"'
      try 'blkid -o value -s TYPE /dev/stack/x'
      try 'mount /dev/stack/a $srv; findmnt -no SOURCE $srv'
      try 'resize2fs /dev/mapper/stack-a 2>&1 | tail -n +2'
      try 'umount $srv'
      try 'e2fsck -f -n /dev/mapper/stack-a 2>&1 | grep -v "^e2fsck\\|^Pass"'
      try 'e2fsck -f -p /dev/stack/a >/dev/null'
      try 'mount -o journal_path=/dev/mapper/stack-x /dev/mapper/stack-a $srv; grep -c " $srv " /proc/mounts'
      try 'umount $srv'
      e2fsck -fp /dev/stack/a >/dev/null
      try 'resize2fs -M /dev/mapper/stack-a 2>&1 | tail -n +2'
      try 'tune2fs -O ^has_journal /dev/mapper/stack-a'`,
  },
  {
    what: 'quotas',
    script: `
      trap 'umount -q $srv; blank a' EXIT
      mkfs.ext4 -q -O quota /dev/stack/a
      udevadm settle
      try 'mount -o usrquota,grpquota /dev/mapper/stack-a $srv'
      try 'quotaon -p $srv'
      try 'setquota -u nobody 1000 2000 0 0 $srv'
      try 'setquota -u daemon 1000 2000 0 0 /dev/mapper/stack-a'
      try 'repquota -u $srv'
      try 'repquota -ua'
      try 'quota -v -u nobody'`,
  },
  {
    what: 'integrity and verity',
    script: `
      undo() { cryptsetup close v; integritysetup close i; blank x y; }
      trap 'undo >/dev/null 2>&1' EXIT
      try 'integritysetup format -q --no-wipe /dev/mapper/stack-x'
      try 'integritysetup open --integrity-recalculate /dev/mapper/stack-x i'
      udevadm settle
      try 'integritysetup status i'
      try 'integritysetup status /dev/mapper/i'
      try 'test -b /dev/mapper/i'
      try 'dd if=/dev/mapper/i of=/dev/null bs=64k count=1 status=none'
      try 'integritysetup close i'
      try 'veritysetup format --salt=00 --uuid 5a3e0004-1111-2222-3333-444444444444 /dev/stack/y /dev/mapper/stack-x | tee verity | grep -v UUID'
      hash=$(sed -n 's/^Root hash: *\\t*//p' verity)
      try 'veritysetup open /dev/stack/y v /dev/mapper/stack-x $hash'
      udevadm settle
      try 'veritysetup status v'
      try 'veritysetup verify /dev/mapper/stack-y /dev/stack/x $hash'
      try 'dd if=/dev/mapper/v of=/dev/null bs=64k count=1 status=none'
      try 'veritysetup close v'`,
  },
  {
    what: 'swap with a random key, by crypttab',
    script: `
      undo() { swapoff /dev/mapper/stackswap; cp -p crypttab /etc/crypttab; systemctl daemon-reload; systemctl stop systemd-cryptsetup@stackswap; blank x; }
      cp -p /etc/crypttab crypttab
      trap 'undo >/dev/null 2>&1' EXIT
      echo 'stackswap /dev/mapper/stack-x /dev/urandom swap,cipher=aes-xts-plain64,size=256,noauto' >>/etc/crypttab
      systemctl daemon-reload
      try 'systemctl start systemd-cryptsetup@stackswap'
      try 'systemctl is-active systemd-cryptsetup@stackswap'
      try 'cryptsetup status stackswap'
      try 'soon blkid -p -o value -s TYPE /dev/mapper/stackswap'
      try 'swapon /dev/mapper/stackswap'
      try 'swapoff /dev/mapper/stackswap'
      try 'systemctl show -P BindsTo systemd-cryptsetup@stackswap'
      try 'systemctl stop systemd-cryptsetup@stackswap'
      try 'ls /dev/mapper/stackswap'`,
  },
  {
    what: 'services that may use some devices',
    script: `
      read='dd if=/dev/mapper/stack-x of=/dev/null bs=64k count=1 status=none'
      run() { systemd-run -q --collect --pipe --wait -p LogLevelMax=err "$@" 2>&1; }
      try 'run -p DevicePolicy=closed $read'
      try 'run -p DevicePolicy=closed -p DeviceAllow=/dev/mapper/stack-x $read'
      try 'run -p DevicePolicy=closed -p "DeviceAllow=/dev/mapper/stack-y rw" $read'
      try 'run -p DevicePolicy=closed -p "DeviceAllow=block-device-mapper r" $read'
      try 'run -p PrivateDevices=yes $read'
      try 'run -p PrivateDevices=yes ls /dev | grep -c mapper'
      try 'run -p PrivateDevices=yes -p BindPaths=/dev/mapper/stack-x $read'
      try 'run -p ProtectSystem=strict -p PrivateMounts=yes $read'
      try 'run -p RootDirectory=/ -p MountAPIVFS=yes $read'
      try 'run -p User=nobody $read'
      try 'run -p User=nobody -p SupplementaryGroups=disk $read'
      try 'run -p RestrictFileSystems=ext4 true'`,
  },
  {
    what: 'a container that may use a device',
    script: `
      trap 'umount -qR root' EXIT
      mkdir -p root
      mount --bind --make-private / root
      mount -o remount,bind,ro root
      run() { systemd-nspawn -q --register=no --read-only --volatile=no -D root "$@" 2>&1 | tr -d '\\r'; }
      try 'run --bind=/dev/mapper/stack-x --property="DeviceAllow=/dev/mapper/stack-x rw" stat -c %F /dev/mapper/stack-x'
      try 'run --bind=/dev/mapper/stack-x --property="DeviceAllow=/dev/mapper/stack-x rw" dd if=/dev/mapper/stack-x of=/dev/null bs=64k count=1 status=none'
      try 'run --bind=/dev/stack/x:/dev/disk0 --property="DeviceAllow=/dev/mapper/stack-x rw" stat -c %F /dev/disk0'`,
  },
  {
    what: 'partitions in a volume, by kpartx',
    script: `
      undo() { kpartx -d /dev/stack/a; kpartx -d image; blank a; }
      trap 'undo >/dev/null 2>&1' EXIT
      printf '%s\\n' 2048,8M ,8M | sfdisk -q -X gpt --no-reread --no-tell-kernel /dev/mapper/stack-a
      udevadm settle
      try 'kpartx -l /dev/mapper/stack-a'
      try 'kpartx -av /dev/mapper/stack-a'
      try 'ls /dev/mapper | grep stack-a'
      try 'mkfs.ext4 -q /dev/mapper/stack-a1; mount /dev/mapper/stack-a1 $srv; findmnt -no SOURCE $srv; umount $srv'
      try 'lsblk -nro NAME,TYPE /dev/mapper/stack-a'
      try 'kpartx -dv /dev/stack/a'
      try 'ls /dev/mapper | grep stack-a'
      truncate -s 40M image
      printf '%s\\n' 2048,8M ,8M | sfdisk -q -X gpt image
      try 'kpartx -asv image | sed "s/loop[0-9]*/loopN/g"'
      try 'ls /dev/mapper | grep ^loop | sed "s/loop[0-9]*/loopN/g"'
      try 'kpartx -dv image | sed "s/loop[0-9]*/loopN/g"'
      try 'ls /dev/mapper | grep ^loop'`,
  },
  {
    what: 'a disk with two paths',
    script: `
      undo() { multipath -F; rm -f /etc/multipath.conf; rmmod scsi_debug; }
      trap 'undo >/dev/null 2>&1' EXIT
      printf 'defaults {\\n find_multipaths no\\n user_friendly_names yes\\n}\\n' >/etc/multipath.conf
      modprobe dm-multipath
      modprobe scsi_debug dev_size_mb=64 add_host=2 vpd_use_hostno=0
      udevadm settle
      # It would rather have a daemon, and says so.
      try 'multipath -r >/dev/null 2>&1'
      udevadm settle
      try 'ls /dev/mapper | grep ^mpath'
      try 'multipath -ll 2>/dev/null | grep -oE "mpath.|(dm-N|size=[^ ]*)|(active|ready|running)" | sort | uniq -c'
      try 'lsblk -nro TYPE /dev/mapper/mpatha'
      printf '%s\\n' 2048,8M ,8M | sfdisk -q -X gpt /dev/mapper/mpatha
      udevadm settle
      kpartx -a -p -part /dev/mapper/mpatha
      udevadm settle
      try 'ls /dev/mapper | grep ^mpath'
      try 'mkfs.ext4 -q /dev/mapper/mpatha-part1; mount /dev/mapper/mpatha-part1 $srv; findmnt -no SOURCE $srv; umount $srv'
      try 'kpartx -d -p -part /dev/mapper/mpatha'
      try 'multipath -f mpatha 2>/dev/null'
      try 'ls /dev/mapper | grep ^mpath'
      undo >/dev/null 2>&1
      try 'lsmod | grep -c ^scsi_debug'`,
  },
  {
    what: 'arrays of volumes',
    script: `
      undo() { mdadm --stop /dev/md/stack; mdadm --zero-superblock /dev/stack/x /dev/stack/y; systemctl stop mdmonitor; systemctl reset-failed mdmonitor; cp -p mdadm.conf /etc/mdadm/mdadm.conf; blank x y; }
      cp -p /etc/mdadm/mdadm.conf mdadm.conf
      trap 'undo >/dev/null 2>&1' EXIT
      # mdadm says so where this is not there yet.
      modprobe raid1
      detail() { mdadm --detail /dev/md/stack | grep -E 'State :|active|spare|faulty' | sed 's/^ *//'; }
      try 'mdadm --create /dev/md/stack -q --run --metadata 1.2 --level 1 --raid-devices 2 --bitmap none /dev/mapper/stack-x /dev/stack/y 2>&1 | grep -v "^mdadm: "'
      udevadm settle
      mdadm --wait /dev/md/stack
      try detail
      try 'mdadm --examine /dev/mapper/stack-x | grep -E "Raid Level|Raid Devices|Device Role"'
      try 'grep -o "active.*" /proc/mdstat | sed "s/\\[[0-9]\\]//g" | tr " " "\\n" | sort'
      try 'lsblk -nro NAME,TYPE /dev/mapper/stack-x | sed "s/md[0-9]*/mdN/"'
      try 'mdadm /dev/md/stack --fail /dev/mapper/stack-y --remove /dev/mapper/stack-y'
      try detail
      try 'mdadm /dev/md/stack --add /dev/mapper/stack-y'
      mdadm --wait /dev/md/stack
      try detail
      try 'mdadm --stop /dev/md/stack'
      udevadm settle
      mdadm --examine --scan /dev/stack/x | sed 's#^ARRAY [^ ]*#ARRAY /dev/md/stack#' >array
      # By names, at hot plug and by hand.
      { echo 'DEVICE /dev/mapper/stack-*'; cat array; } >/etc/mdadm/mdadm.conf
      assembled() { grep -c 'active.*raid1' /proc/mdstat; }
      try 'mdadm --assemble --scan 2>&1 | sed "s/(.*//"'
      try assembled
      udevadm settle
      mdadm -q --stop /dev/md/stack
      udevadm settle
      udevadm trigger --action=add --settle /dev/stack/x /dev/stack/y
      try 'soon assembled'
      mdadm -q --stop /dev/md/stack
      udevadm settle
      { echo 'DEVICE /dev/sd*'; cat array; } >/etc/mdadm/mdadm.conf
      try 'mdadm --assemble --scan'
      udevadm trigger --action=add --settle /dev/stack/x /dev/stack/y
      sleep 2
      try assembled`,
  },
  {
    what: 'volumes are converted, moved, merged',
    script: `
      undo() { umount $srv; lvremove -qqy stack/snap; lvremove -qqy stack/p; }
      trap 'undo >/dev/null 2>&1' EXIT
      lvcreate -qqy -Wn -L 32M -n p stack /dev/loop60
      mkfs.ext4 -q /dev/stack/p
      udevadm settle
      mount /dev/stack/p $srv
      echo before >$srv/file
      sync
      try 'lvcreate -qy -s -L 16M -n snap stack/p'
      echo after >$srv/file
      try 'pvmove -q -n p /dev/loop60 /dev/loop61 2>&1 | grep -v %'
      try 'umount $srv; lvchange -qan stack/p'
      try 'lvconvert -q --merge stack/snap'
      try 'lvchange -qay stack/p'
      soon bash -c '! lvs stack/snap'
      try 'lvs --noheadings -o lv_name stack | sort'
      try 'mount /dev/mapper/stack-p $srv; cat $srv/file; findmnt -no SOURCE $srv'
      try 'lvconvert -qy --type raid1 -m 1 stack/p'
      soon bash -c '[[ $(lvs --noheadings -o copy_percent stack/p) == *100.00* ]]'
      try 'lvs -a --noheadings -o lv_name,devices stack | grep "p_\\| p "'
      try 'lvconvert -qy -m 0 stack/p /dev/loop60'
      udevadm settle
      try 'test -b /dev/stack/p; ls /dev/mapper | grep stack-p'`,
  },
  {
    what: 'thin pools grow by themselves',
    script: `
      undo() { umount $srv; lvremove -qqy stack/thin; lvremove -qqy stack/pool; cp -p lvm.conf /etc/lvm/lvm.conf; }
      cp -p /etc/lvm/lvm.conf lvm.conf
      trap 'undo >/dev/null 2>&1' EXIT
      echo 'activation { thin_pool_autoextend_threshold = 60 thin_pool_autoextend_percent = 50 }' >>/etc/lvm/lvm.conf
      # It may find what it has just written to still open, say so, and try again: a limit, if a rare one.
      try 'lvcreate -qqy -T -L 32M -V 64M -n thin stack/pool 2>&1 | grep -v "remove ioctl .*busy"'
      udevadm settle
      try 'lvs --noheadings -o seg_monitor stack/pool'
      try 'dd if=/dev/zero of=/dev/mapper/stack-thin bs=1M count=28 oflag=direct status=none'
      grown() { [[ $(lvs --noheadings --units m -o lv_size stack/pool) != *' 32.00m' ]]; }
      try 'soon grown'
      try 'lvs --noheadings --units m -o lv_size stack/pool'
      udevadm settle
      try 'ls /dev/mapper | grep -E "stack-(pool|thin)"'`,
  },
  {
    what: 'a volume served over the network, and by the kernel',
    script: `
      undo() { nbd-client -d /dev/nbd0; kill $server; rmdir $core/iblock_0/stack $core/iblock_0; }
      trap 'undo >/dev/null 2>&1' EXIT
      modprobe nbd
      mkdir -p nbd
      printf '[generic]\\nunixsock = %s/nbd/socket\\n[disk]\\nexportname = /dev/mapper/stack-x\\n' "$PWD" >nbd/config
      nbd-server -d -C $PWD/nbd/config >nbd/log 2>&1 </dev/null &
      server=$!
      try 'soon test -S nbd/socket'
      try 'until_done nbd-client -unix nbd/socket /dev/nbd0 -N disk'
      try 'cmp -n 1048576 /dev/nbd0 /dev/stack/x'
      try 'blockdev --getsize64 /dev/nbd0'
      try 'nbd-client -d /dev/nbd0 >/dev/null'
      core=/sys/kernel/config/target/core
      modprobe target_core_iblock
      mkdir -p $core/iblock_0/stack
      try 'echo udev_path=/dev/mapper/stack-x >$core/iblock_0/stack/control'
      try 'echo 1 >$core/iblock_0/stack/enable'
      try 'cat $core/iblock_0/stack/info | sed "s/ *Major.*//"'`,
  },
  {
    what: 'programs that prepare the next boot',
    limit: 'the hook says what swap was switched on by, where fstab does not name it; what it writes is the same',
    script: `
      undo() { swapoff /dev/mapper/stack-a; umount $srv; blank a b; }
      trap 'undo >/dev/null 2>&1' EXIT
      mkswap -q /dev/stack/a
      mkfs.ext4 -q /dev/stack/b
      udevadm settle
      mount /dev/stack/b $srv
      mkdir -p $srv/etc $srv/lib
      echo 'PRETTY_NAME="Debian of old"' >$srv/etc/os-release
      echo 12 >$srv/etc/debian_version
      touch $srv/lib/ld-linux.so.2
      umount $srv
      try 'os-prober 2>/dev/null'
      # The largest is what the next boot may resume from.
      swapon /dev/mapper/stack-a
      mkdir -p initrd/conf/conf.d
      try 'CONFDIR=/etc/initramfs-tools DESTDIR=initrd verbose=y sh /usr/share/initramfs-tools/hooks/resume'
      try 'sed "s/UUID=.*/UUID/" initrd/conf/conf.d/*'
      rm -r initrd`,
  },
]

async function withVolumes<T>(vm: Vm, use: () => Promise<T>): Promise<T> {
  try {
    await vm.run(PREPARE, 300_000)
    return await use()
  } finally {
    await vm.attempt(TIDY, 300_000)
  }
}

export const stack: Case = {
  name: 'what is built on device-mapper devices looks as it did',
  // Takes many minutes, for tools most of which know a device by its number.
  shortOn: 'none',
  before: (vm) => withVolumes(vm, () => askAll(vm, DIRECTORY, PROBES)),
  async run(t, vm, before) {
    await withVolumes(vm, async () => {
      compareAll(t, vm, PROBES, await askAll(vm, DIRECTORY, PROBES), before as Answers)
      t.equal(await vm.run("systemctl list-units --failed --no-legend '*diskseq*'"), '', 'no unit of ours failed')
      // Except for a lockup, when emulation had no time for a processor.
      const faults = "dmesg | grep -E 'cut here|BUG: |Oops' | grep -v 'soft lockup' || true"
      t.equal(await vm.run(faults), '', 'the kernel has reported no error')
    })
  },
}
