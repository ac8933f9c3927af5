// SPDX-License-Identifier: MIT
/**
 * Booting with the root file system, swap and others on logical volumes, one of them encrypted:
 * when the tree is there, that everything comes up, what it costs, and that it also comes up
 * without the daemon.
 */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { links, LEFT_ALONE } from '../links.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'
import { UDEV_WARNINGS } from './service.js'

const BOOTS = SHORT ? 1 : 5

/** Times of a boot as systemd has them, in s after the kernel's start. */
interface Times {
  /** From the first process of the real root to the end of start-up. */
  readonly userspace: number
  readonly localFs: number
}

async function times(vm: Vm): Promise<Times> {
  await vm.run('systemctl is-system-running --wait || true')
  const output = await vm.run(`
    systemctl show -P UserspaceTimestampMonotonic -P FinishTimestampMonotonic
    systemctl show -P ActiveEnterTimestampMonotonic local-fs.target`)
  const [userspace, finish, localFs] = output
    .trim()
    .split('\n')
    .map((us) => Number(us) / 1e6) as [number, number, number]
  return { userspace: finish - userspace, localFs: localFs - userspace }
}

/** Pulls the plug, as under emulation a shutdown takes as long as a boot. */
async function reboot(vm: Vm): Promise<void> {
  await vm.run('sync')
  await vm.kill()
  await vm.boot()
}

const median = (values: readonly number[]) => [...values].sort((a, b) => a - b)[values.length >> 1] as number

function spread(values: readonly number[]): string {
  return `${median(values).toFixed(1)} s (${Math.min(...values).toFixed(1)}-${Math.max(...values).toFixed(1)})`
}

const PROBES =
  'for target in fs device abstraction fs_uuid; do grub-probe --target=$target /; done; for path in /home /srv; do grub-probe $path; done'

async function booted(t: Test, vm: Vm): Promise<void> {
  t.equal((await vm.attempt('systemctl is-system-running --wait')).output, 'running\n')
  t.equal(await vm.run('systemctl --failed --no-legend'), '', 'no unit has failed')
  const { tree, stock, left, wrong } = await links(vm)
  t.ok(tree.length > 5, `${tree.length} links into the tree`)
  t.strictSame({ stock, left, wrong }, { stock: [], left: LEFT_ALONE, wrong: [] }, 'and no others, except for devices that are left alone')
  t.equal(await vm.run('for m in / /home /srv /secret; do findmnt -n -o TARGET $m; done'), '/\n/home\n/srv\n/secret\n')
  t.match(await vm.run('swapon --noheadings --bytes --show=SIZE'), /^1342\d+\n$/, 'swap is on')
  t.equal(await vm.run(UDEV_WARNINGS), '', 'udev gave no warning')
  // Monotonic times, to check the order that the unit asks for.
  const order = await vm.run(`
    systemctl show -P ActiveEnterTimestampMonotonic diskseqfs
    systemctl show -P InactiveExitTimestampMonotonic systemd-udev-trigger
    systemctl show -P ActiveEnterTimestampMonotonic local-fs-pre.target
    systemctl show -P InactiveExitTimestampMonotonic 'systemd-cryptsetup@secret\\x2dopen.service'
    systemctl show -P InactiveExitTimestampMonotonic 'dev-mapper-vm\\x2dswap.swap'`)
  const [served, ...others] = order.trim().split('\n').map(Number) as [number, number, number, number, number]
  t.ok(served > 0, 'the daemon reported that the tree answers')
  for (const [i, what] of ['coldplug', 'local file systems', 'cryptsetup', 'swap'].entries()) {
    t.ok((others[i] as number) > served, `before ${what}`)
  }
}

/** Made with the package, which takes an emulated processor many minutes: the short form leaves it out. */
async function newInitrd(vm: Vm): Promise<void> {
  await vm.run(
    `
    # At the level that is usual, compressing it takes minutes more.
    echo COMPRESSLEVEL=1 >/etc/initramfs-tools/conf.d/quick
    update-initramfs -u
    cp /boot/initrd.img-* /share/initrd.img
    lsinitramfs /boot/initrd.img-* | grep -q sbin/lvm`,
    30 * 60_000,
  )
  vm.useInitrd('initrd.img')
}

export const boot: Case = {
  name: 'boot',
  shortOn: 'trixie',
  async before(vm) {
    const stock = [await times(vm)]
    const probes = await vm.run(PROBES)
    while (stock.length < BOOTS) {
      await reboot(vm)
      stock.push(await times(vm))
    }
    return { stock, probes }
  },
  async run(t, vm, before) {
    const { stock, probes } = before as { stock: Times[]; probes: string }
    // One file system is already mounted by a name in /dev/mapper; this one is by its sequence
    // number.
    const diskseq = (await vm.run('cat /sys/block/$(basename $(readlink -f /sys/dev/block/$(mountpoint -d /srv)))/diskseq')).trim()
    await vm.run(
      `sed -i 's|^UUID.* /srv ext4 defaults|/dev/disk/by-diskseq/${diskseq} /srv ext4 nofail,x-systemd.device-timeout=60s|' /etc/fstab`,
    )
    if (!SHORT) await newInitrd(vm)

    const ours: Times[] = []
    for (let i = 0; i < BOOTS; i++) {
      // Shut down properly once, with everything on the tree in use.
      let cursor = ''
      if (i === 0) {
        cursor = (await vm.run('journalctl -q -n 1 --show-cursor -o cat --no-pager | sed -n "s/^-- cursor: //p"')).trim()
        await vm.powerOff()
        await vm.boot()
      } else {
        await reboot(vm)
      }
      ours.push(await times(vm))
      if (i === 0) {
        await t.test('the first one', (t) => booted(t, vm))
        // An open of a device that is being taken down is refused; that is no complaint of the daemon's.
        t.equal(
          await vm.run(
            `journalctl -b -1 -q -u diskseqfs -o cat --no-pager -p warning --after-cursor='${cursor}' | grep -v '^refused an open' || true`,
          ),
          '',
          'before that, the daemon ended without complaint',
        )
        t.equal(await vm.run(PROBES), probes, 'grub-probe prints the same as on a stock system')
        t.match(
          await vm.run(`
            echo 'ENV{DM_NAME}=="vm-root", ENV{DISKSEQFS_LINK}="1"' >/etc/udev/rules.d/60-root.rules
            again() { udevadm control --reload; udevadm trigger --settle /dev/dm-$(dmsetup info -c --noheadings -o minor vm-root); }
            again
            grub-probe --target=device /
            rm /etc/udev/rules.d/60-root.rules
            again`),
          /^\/dev\/disk\/by-diskseq\/\S*\d+\n$/,
          'twin: with the links of the root in the tree it prints a number that differs at the next boot',
        )
        note(
          t,
          `findmnt /srv: ${(await vm.run('findmnt -n -o SOURCE /srv')).trim()}, swap: ${(await vm.run('swapon --noheadings --show=NAME')).trim()}`,
        )
        note(t, (await vm.run('systemd-analyze blame --no-pager | grep diskseqfs')).trim())
      }
    }
    note(t, `userspace with ${spread(ours.map((x) => x.userspace))}, without ${spread(stock.map((x) => x.userspace))}`)
    note(t, `local-fs with ${spread(ours.map((x) => x.localFs))}, without ${spread(stock.map((x) => x.localFs))}`)

    // The daemon cannot start, as there is no Node.js; or it starts, but the tree never answers.
    const broken = [
      ['without Node.js', 'mv /usr/bin/node /usr/bin/node.away', 'mv /usr/bin/node.away /usr/bin/node'],
      [
        'with a daemon that hangs',
        `mv /usr/bin/diskseqfs /usr/bin/diskseqfs.away; printf '#!/bin/sh\\nexec sleep 1000\\n' >/usr/bin/diskseqfs; chmod +x /usr/bin/diskseqfs`,
        'mv /usr/bin/diskseqfs.away /usr/bin/diskseqfs',
      ],
    ] as const
    for (const [what, breaks, mends] of SHORT ? [broken[vm.release === 'trixie' ? 1 : 0]] : broken) {
      await vm.run(breaks)
      await vm.run(`sed -i '/ \\/srv /s|^[^ ]*|/dev/mapper/vm-srv|' /etc/fstab`)
      await reboot(vm)
      const { localFs } = await times(vm)
      note(t, `${what}: local-fs after ${localFs.toFixed(1)} s`)
      const { tree, wrong, stock: own } = await links(vm)
      t.strictSame({ tree, wrong }, { tree: [], wrong: [] }, `${what}: stock links`)
      t.ok(own.length > 5)
      t.equal(await vm.run('for m in / /home /srv /secret; do findmnt -n -o TARGET $m; done'), '/\n/home\n/srv\n/secret\n')
      t.match(
        await vm.run('journalctl -b -q -u diskseqfs -o cat --no-pager'),
        what === 'without Node.js' ? /diskseqfs: .*[Nn]ode/ : /not ready/,
        `${what}: the journal says why`,
      )
      await vm.run(mends)
    }
    // Repaired, the daemon takes over on the running system.
    await vm.run('systemctl restart diskseqfs; udevadm settle')
    const { stock: bare, wrong } = await links(vm)
    t.strictSame({ bare, wrong }, { bare: [], wrong: [] }, 'mended')
  },
}
