// SPDX-License-Identifier: MIT
/** Disks as storage volumes of systemd, by its own clients. Its provider "block", which takes paths, is the twin. */
import type { Case } from '../case.js'

const SOCKET = '/run/systemd/io.systemd.StorageProvider/diskseq'

/** Two disks with a file that tells them apart. */
const DISKS = `
  mkdir -p /run/volumes/mnt; cd /run/volumes
  for name in one two; do
    truncate -s 16M $name.img; mkdir $name; echo $name >$name/name; mke2fs -q -t ext4 -O ^has_journal -d $name $name.img
  done
  loop=$(losetup --find --show one.img); echo $loop >loop; diskseq $loop >number; udevadm settle`
const MOUNTED = `cat /run/volumes/mnt/name; umount /run/volumes/mnt`
const mount = (volume: string) =>
  `mount -t storage.ext4 ${volume} /run/volumes/mnt 2>/run/volumes/said && { ${MOUNTED}; } || cat /run/volumes/said`
const NUMBER = '$(basename $(cat /run/volumes/number))'
const LOOP = '$(cat /run/volumes/loop)'
const TIDY = `
  umount -q /run/volumes/mnt; dmsetup remove --retry 'a volume'; losetup --detach ${LOOP}; cd /; rm -r /run/volumes`

export const storage: Case = {
  name: 'storage volumes',
  on: ['forky'],
  async run(t, vm) {
    try {
      await vm.run(DISKS)
      t.match(await vm.run('storagectl --no-pager providers'), /^diskseq +yes$/m, 'systemd knows the provider')
      const listed = (await vm.run('storagectl --no-pager --no-legend volumes | awk \'$1 == "diskseq" { print $2 }\' | sort')).trim()
      const there = (await vm.run("diskseqfs list -bnro NAME,SIZE | awk '$2 > 0 { print $1 }' | sort")).trim()
      t.equal(listed, there, 'its volumes are the disks and partitions that are not empty')
      t.equal(await vm.run(mount(`diskseq:${NUMBER}`)), 'one\n', 'mount(8) gets the disk')
      await vm.run(`echo "0 $(blockdev --getsz ${LOOP}) linear ${LOOP} 0" | dmsetup create 'a volume'; udevadm settle`)
      t.equal(await vm.run(mount("'diskseq:dm:a volume'")), 'one\n', 'also by a device-mapper name')
      await vm.run("dmsetup remove --retry 'a volume'; systemctl stop diskseqfs")
      t.equal(await vm.run(mount(`diskseq:${NUMBER}`)), 'one\n', 'and without a daemon')
      await vm.run('systemctl start diskseqfs')

      await vm.run(`
        losetup --detach ${LOOP}; for ((i = 0; i < 50; i++)); do losetup ${LOOP} /run/volumes/two.img 2>/dev/null && break; sleep 0.2; done
        udevadm settle`)
      t.match(await vm.run(mount(`diskseq:${NUMBER}`)), /^Volume '\d+' not known\.$/m, 'a disk that is gone is not to be had')
      t.equal(await vm.run(mount(`block:${LOOP}`)), 'two\n', "twin: systemd's own provider opens the disk that has its number now")

      t.equal(await vm.run(`stat -c %a:%U ${SOCKET}`), '600:root\n')
      t.match(await vm.run(`varlinkctl introspect ${SOCKET} io.systemd.StorageProvider`), /method Acquire/)
      t.match(await vm.run('systemd-analyze security --no-pager diskseqfs-storage@0.service | tail -n 1'), /OK/)
      const units = "systemctl list-units --all --no-legend 'diskseqfs-storage@*'"
      t.equal(
        await vm.run(`for ((i = 0; i < 50; i++)); do [ -z "$(${units})" ] && exit; sleep 0.2; done; ${units}`),
        '',
        'no process is left',
      )
      t.equal(await vm.run('systemctl --failed --no-legend'), '', 'no unit has failed')
    } finally {
      await vm.attempt(TIDY)
    }
  },
}
