// SPDX-License-Identifier: MIT
/** Disks that do not answer, which only a whole machine has; and a machine whose clock jumps, and that stands still. */
import { setTimeout as sleep } from 'node:timers/promises'

import type { Test } from 'tap'

import type { Case } from '../case.js'
import { OPEN_TIMEOUT_S, opener, SLACK_S } from '../opener.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'
import { DAEMON } from './restart.js'

const PAUSE_S = 30

/**
 * A network block device whose other end says nothing. A caller that opens it waits for the first sector, and cannot be
 * killed.
 */
async function nbd(t: Test, vm: Vm): Promise<void> {
  const others = opener(vm)
  const silent = vm.start(`
    modprobe nbd max_part=16
    /share/blk nbd-silent --device /dev/nbd0 &
    touch /run/silent
    until [ ! -e /run/silent ]; do sleep 0.2; done
    kill -TERM $!
    wait $! || true`)
  const name = (
    await vm.run(
      'for ((i = 0; i < 100; i++)); do [ "$(cat /sys/block/nbd0/size 2>/dev/null)" = 2048 ] && break; sleep 0.1; done; sleep 1; cat /sys/block/nbd0/diskseq',
    )
  ).trim()
  const stock = vm.start('dd if=/dev/nbd0 of=/dev/null count=1 status=none')
  const began = Date.now()
  const { output } = await vm.attempt(
    `dd if=/dev/disk/by-diskseq/${name} of=/dev/null count=1 status=none 2>&1 | sed 's/.*: //'; stat -c %F /dev/disk/by-diskseq/${name}`,
  )
  const seconds = (Date.now() - began) / 1000
  t.equal(output, 'Connection timed out\nblock special file\n', 'a caller of the silent disk gets an error, and may look at the disk')
  t.ok(seconds < OPEN_TIMEOUT_S + SLACK_S, `after ${seconds.toFixed(0)} s`)
  const waits = await Promise.race([
    stock.ended().then(
      () => 'ended',
      () => 'ended',
    ),
    sleep(100, 'waits'),
  ])
  t.equal(waits, 'waits', 'twin: a caller that opened the device node still waits')
  await vm.run('rm /run/silent')
  await Promise.all([silent.ended(), stock.ended()])
  const { errors, n, max_ns } = await others()
  t.strictSame(errors, {}, `meanwhile another disk was opened ${n} times`)
  note(t, `a silent nbd: ETIMEDOUT after ${seconds.toFixed(0)} s; others waited ${Math.round(max_ns / 1e6)} ms at most`)
  await vm.run('udevadm settle')
}

/** A suspended device can be opened, as its device node can; reads wait. */
async function suspended(t: Test, vm: Vm): Promise<void> {
  const opened = await vm.run(`
    dmsetup create frozen --table '0 2048 zero'
    udevadm settle
    trap 'dmsetup resume frozen; dmsetup remove frozen' EXIT
    dmsetup suspend --noflush --nolockfs frozen
    /share/blk openlat --path /dev/mapper/frozen --count 3 --close-immediately`)
  t.strictSame(JSON.parse(opened)['errors'], {}, 'a suspended device is opened')
  t.equal(await vm.run('dmsetup info frozen >/dev/null 2>&1 || echo gone'), 'gone\n', 'it can be removed')
}

async function clocks(t: Test, vm: Vm): Promise<void> {
  const others = opener(vm)
  const daemon = await vm.run(DAEMON)
  await vm.run("date -s '+2 days' >/dev/null; sleep 3; date -s '-4 days' >/dev/null; sleep 3; date -s '+2 days' >/dev/null; sleep 1")
  await vm.qmp('stop')
  await sleep(PAUSE_S * 1000)
  await vm.qmp('cont')
  await sleep(5000)
  t.strictSame((await others())['errors'], {}, 'no open fails when the clock jumps and the machine stands still')
  t.equal(await vm.run(DAEMON), daemon, 'and no daemon is taken for dead')
}

export const faults: Case = {
  name: 'faults: silent nbd, suspended device, clock, pause',
  shortOn: 'trixie',
  async run(t, vm) {
    await nbd(t, vm)
    await suspended(t, vm)
    await clocks(t, vm)
    t.equal(await vm.run('systemctl is-active diskseqfs'), 'active\n')
  },
}
