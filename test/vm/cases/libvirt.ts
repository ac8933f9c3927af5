// SPDX-License-Identifier: MIT
/**
 * libvirt: a domain with disks by /dev/mapper name and by diskseq, with and without a /dev of its
 * own, unprivileged and confined by AppArmor. It is started, disks are plugged in and out, and it
 * is stopped. QEMU's own descriptors show what it has open.
 */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

const TIMEOUT_MS = 10 * 60_000

const DISKS = ['a', 'b', 'c', 'd']
/** Owners of each of {@link DISKS}: when not the domain's, and when the domain's. */
const FREE = 'root:disk:660'
const USED = 'libvirt-qemu:libvirt-qemu:660'

interface Setup {
  /** 'mount' is libvirt's default: QEMU has a private /dev. */
  readonly namespaces: 'mount' | 'none'
  /** The disks b and d are given by their path in the tree; otherwise all are by name. */
  readonly tree: boolean
}

/**
 * The domain needs no system: it is created paused, and SCSI disks come and go without its help.
 * Disks a and b are there from the start, c and d are plugged in and out. Prints lines "KEY: VALUE"
 * for {@link lifecycle}.
 */
const script = ({ namespaces, tree }: Setup): string => `
tree=/dev/disk/by-diskseq
scratch=$(mktemp -d)
cp -p /etc/libvirt/qemu.conf $scratch/qemu.conf
watcher=
cleanup() {
  exec >/dev/null 2>&1
  set +e
  [ -z "$watcher" ] || kill $watcher
  timeout 60 virsh destroy case
  cp -p $scratch/qemu.conf /etc/libvirt/qemu.conf
  rm -r /run/systemd/system/libvirtd.service.d
  systemctl daemon-reload
  timeout 120 systemctl restart libvirtd
  for name in case-gone case-new; do dmsetup info $name && dmsetup remove --retry $name; done
  for disk in ${DISKS.join(' ')}; do lvremove -q -y vm/case_$disk; done
  rm -r $scratch
}
trap cleanup EXIT

node() { echo dm-$(dmsetup info -c --noheadings -o minor $1); }
diskseq() { cat /sys/class/block/$(node $1)/diskseq; }

declare -A node seq path
for disk in ${DISKS.join(' ')}; do
  lvcreate -q -y -L 8M -n case_$disk vm >/dev/null
  node[$disk]=$(node vm-case_$disk)
  seq[$disk]=$(diskseq vm-case_$disk)
  path[$disk]=/dev/mapper/vm-case_$disk
  echo "diskseq of $disk: \${seq[$disk]}"
done
if ${tree}; then path[b]=$tree/\${seq[b]} path[d]=$tree/\${seq[d]}; fi

# The disks QEMU has open: for each the diskseq that QEMU's very descriptor has,
# as the disk's letter, and the path it was opened by.
descriptors() {
  perl -e '
    use strict;
    my ($pid, %letter) = @ARGV;
    my $process = syscall 434, $pid + 0, 0; # pidfd_open
    die "pidfd_open: $!\\n" if $process < 0;
    my @found;
    for my $link (glob "/proc/$pid/fd/*") {
      next unless -b $link;
      my ($number) = $link =~ /([0-9]+)$/;
      my $copy = syscall 438, $process, $number + 0, 0; # pidfd_getfd
      die "pidfd_getfd: $!\\n" if $copy < 0;
      open my $disk, "<&=", $copy or die "open: $!\\n";
      my $diskseq = pack "Q", 0;
      ioctl $disk, 0x80081280, $diskseq or die "BLKGETDISKSEQ: $!\\n";
      $diskseq = unpack "Q", $diskseq;
      push @found, ($letter{$diskseq} // $diskseq) . "=" . readlink $link;
    }
    print join " ", sort @found' \\
    $pid \${seq[a]} a \${seq[b]} b \${seq[c]} c \${seq[d]} d
}
owners() {
  (cd "$1" && shift && stat -c %U:%G:%a "$@") | tr '\\n' ' '
}
# How many attributes each node has in which libvirt remembers whose it was.
attributes() {
  perl -e '
    for (@ARGV) {
      my $names = "\\0" x 4096;
      my $length = syscall 194, $_, $names, 4096; # listxattr
      die "listxattr $_: $!\\n" if $length < 0;
      print scalar(grep /libvirt/, split /\\0/, substr $names, 0, $length), " ";
    }' /dev/\${node[a]} /dev/\${node[b]} /dev/\${node[c]} /dev/\${node[d]}
}
state() {
  if [ -n "$pid" ]; then echo "$1, descriptors: $(descriptors)"; fi
  echo "$1, owners: $(owners /dev \${node[a]} \${node[b]} \${node[c]} \${node[d]})"
  if ${tree}; then echo "$1, owners in the tree: $(owners $tree \${seq[a]} \${seq[b]} \${seq[c]} \${seq[d]})"; fi
  echo "$1, attributes: $(attributes)"
}
disk_xml() {
  echo "<disk type='block' device='disk'><driver name='qemu' type='raw' cache='none'/>
    <source dev='$1'/><target dev='$2' bus='scsi'/></disk>"
}

# Debian's libvirtd ends when it has been idle for two minutes; not now.
mkdir /run/systemd/system/libvirtd.service.d
printf '[Service]\\nEnvironment=LIBVIRTD_ARGS=\\n' >/run/systemd/system/libvirtd.service.d/case.conf
systemctl daemon-reload
if [ ${namespaces} = none ]; then echo 'namespaces = []' >>/etc/libvirt/qemu.conf; fi
systemctl restart libvirtd

cat >$scratch/domain.xml <<XML
<domain type='qemu'>
  <name>case</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <controller type='scsi' model='virtio-scsi'/>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    $(disk_xml \${path[a]} sda)
    $(disk_xml \${path[b]} sdb)
  </devices>
</domain>
XML
disk_xml \${path[c]} sdc >$scratch/c.xml
disk_xml \${path[d]} sdd >$scratch/d.xml

pid=
state before
# For a private /dev libvirt moves what is mounted below /dev: nothing of that
# may be seen outside.
if ${tree}; then
  while true; do
    [ -b $tree/\${seq[a]} ] || echo missing
    sleep 0.1
  done >$scratch/missing &
  watcher=$!
fi
virsh -q create --paused $scratch/domain.xml >/dev/null
pid=$(cat /run/libvirt/qemu/case.pid)
echo "user: $(stat -c %U /proc/$pid)"
profile=$(tr -d '\\0' </proc/$pid/attr/current)
echo "profile: $profile"
echo "private: $([ "$(readlink /proc/$pid/ns/mnt)" = "$(readlink /proc/1/ns/mnt)" ] && echo no || echo yes)"
state started
if ${tree}; then
  names=$(ls $tree | tr '\\n' ' ')
  echo "names: $names"
  echo "names in the domain: $(nsenter -t $pid -m ls $tree | tr '\\n' ' ')"
  echo "mounts: $(grep -c ' - fuse.diskseqfs ' /proc/1/mountinfo || true)"
  echo "mounts in the domain: $(grep -c ' - fuse.diskseqfs ' /proc/$pid/mountinfo || true)"
  echo "readable: $(dd if=$tree/\${seq[a]} bs=4096 count=1 iflag=direct status=none | wc -c)"
fi

virsh -q attach-device case $scratch/c.xml
virsh -q attach-device case $scratch/d.xml
state plugged

# By the number of a disk that is gone, when its device number is another's.
if ${tree}; then
  dmsetup create case-gone --table '0 2048 zero'
  node=$(node case-gone) gone=$(diskseq case-gone)
  dmsetup remove --retry case-gone
  dmsetup create case-new --table '0 2048 zero'
  echo "number reused: $([ $node = $(node case-new) ] && echo yes || echo no)"
  disk_xml $tree/$gone sde >$scratch/e.xml
  if message=$(virsh -q attach-device case $scratch/e.xml 2>&1); then
    echo 'gone: attached'
  else
    echo "gone: refused" $message
  fi
  state refused
  dmsetup remove --retry case-new
fi

virsh -q detach-device case $scratch/c.xml
virsh -q detach-device case $scratch/d.xml
# QEMU tells that a disk has been unplugged, and libvirt may hear of it later.
for ((i = 0; i < 100; i++)); do
  [ "$(virsh -q domblklist case | wc -l)" -gt 2 ] || break
  sleep 0.3
done
for ((i = 0; i < 100; i++)); do
  case "$(attributes)" in *'0 0 ') break ;; esac
  sleep 0.3
done
state unplugged

virsh -q destroy case
pid=
state stopped
if ${tree}; then
  kill $watcher
  echo "missing: $(wc -l <$scratch/missing)"
  echo "mounts after: $(grep -c ' - fuse.diskseqfs ' /proc/1/mountinfo || true)"
fi
echo "denied to QEMU: $(dmesg | grep 'apparmor="DENIED"' | grep -F "profile=\\"\${profile% (*}\\"" |
  sed -n 's,.* name="\\(/dev/[^"]*\\)".*,\\1,p' | sort -u | tr '\\n' ' ')"
echo "denied to its helper: $(dmesg | grep 'apparmor="DENIED"' | grep 'profile="virt-aa-helper"' |
  grep -cE 'name="/dev/disk/by-diskseq/(\\.dm/)?('$(IFS="|"; echo "\${seq[*]}")')["/]' || true)"
`

interface Facts {
  readonly [key: string]: string
}

/** The output of {@link script}; lines of other programs do no harm. */
async function lifecycle(vm: Vm, setup: Setup): Promise<Facts> {
  const output = await vm.run(script(setup), TIMEOUT_MS)
  return Object.fromEntries(
    output
      .split('\n')
      .map((line) => /^([^:]+): ?(.*)$/.exec(line))
      .filter((match) => match !== null)
      .map(([, key, value]) => [key, value?.trim()]),
  )
}

/** A word for each disk: the first if its letter is among `letters`, otherwise the second. */
const each = (letters: string, yes: string, no: string): string => DISKS.map((disk) => (letters.includes(disk) ? yes : no)).join(' ')

async function check(t: Test, vm: Vm, namespaces: 'mount' | 'none'): Promise<Facts> {
  const found = await lifecycle(vm, { namespaces, tree: true })
  t.comment(JSON.stringify(found, null, 1))
  t.equal(found['user'], 'libvirt-qemu', 'QEMU is unprivileged')
  t.match(found['profile'], /^libvirt-[-0-9a-f]+ \(enforce\)$/, 'and confined')
  t.equal(found['private'], namespaces === 'mount' ? 'yes' : 'no', 'whether its mounts are private')

  for (const [moment, letters] of Object.entries({
    before: '',
    started: 'ab',
    plugged: 'abcd',
    refused: 'abcd',
    unplugged: 'ab',
    stopped: '',
  })) {
    if (letters !== '') {
      const open = [...letters].map((letter) => `${letter}=/dev/disk/by-diskseq/${found[`diskseq of ${letter}`]}`)
      const opened = found[`${moment}, descriptors`]?.replaceAll(/\.dm\/(\d+)\/dm-\d+/g, '$1')
      t.equal(opened, open.join(' '), `${moment}: QEMU has the right disks open`)
    }
    const owners = each(letters, USED, FREE)
    t.equal(found[`${moment}, owners`], owners, `${moment}: owners`)
    t.equal(found[`${moment}, owners in the tree`], owners, `${moment}: owners in the tree`)
    t.equal(
      found[`${moment}, attributes`]?.replaceAll(/[1-9]\d*/g, 'some'),
      each(letters, 'some', '0'),
      `${moment}: libvirt remembers the owners of the disks in use`,
    )
  }

  t.equal(found['number reused'], 'yes', "the disk's number has become another's")
  t.match(found['gone'], /^refused .*No such file or directory/, 'its path does not lead to that disk')

  t.equal(found['names in the domain'], found['names'], 'the domain sees the tree')
  t.equal(found['mounts in the domain'], '1', 'the domain has the mount once')
  t.equal(found['mounts'], '1', 'the host has the mount once')
  t.equal(found['mounts after'], '1', 'the host has the mount at the end')
  t.equal(found['readable'], '4096', 'a disk can be read')
  t.equal(found['missing'], '0', 'the tree was never away')
  t.equal(found['denied to QEMU'], '', 'AppArmor denied QEMU no device')
  return found
}

/** A stock system that fails is not our failure; the test reports what it does. */
async function stock(vm: Vm): Promise<Facts | Error> {
  try {
    return await lifecycle(vm, { namespaces: 'mount', tree: false })
  } catch (error) {
    return error as Error
  }
}

/** The owners of the disks in the end. */
const ownersAfter = (found: Facts): string => [...new Set(found['stopped, owners']?.split(' '))].join(', ')

export const libvirt: Case = {
  name: 'libvirt',
  shortOn: 'trixie',
  before: stock,
  async run(t: Test, vm: Vm, before: unknown) {
    for (const namespaces of ['mount', 'none'] as const) {
      await t.test(`namespaces: ${namespaces}`, { timeout: TIMEOUT_MS }, async (t) => {
        const found = await check(t, vm, namespaces)
        const what = namespaces === 'mount' ? 'private /dev' : "the host's /dev"
        note(t, `${what}: owners afterwards ${ownersAfter(found)}`)
        note(t, `denials to virt-aa-helper that are logged: ${found['denied to its helper']}`)
      })
    }
    note(t, `stock, private /dev: ${before instanceof Error ? before.message : `owners afterwards ${ownersAfter(before as Facts)}`}`)
  },
}
