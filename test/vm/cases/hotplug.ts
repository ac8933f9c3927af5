// SPDX-License-Identifier: MIT
/**
 * Disks are plugged in and pulled out through QEMU's monitor, and media are changed, while they are
 * opened by their sequence numbers. An open must reach the disk in its name, and the name must be
 * gone soon after the kernel said that the disk is. The times are taken in the machine
 * (test/helpers/blk/hotplug.c).
 */
import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'

import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../findings.js'
import { TWIN_MOUNTPOINT, withTwin } from '../twin.js'
import type { Vm } from '../vm.js'

/** The machine needs these for {@link hotplug}: a slot for a disk to be plugged into, and a SCSI controller. */
export const hotplugDevices: readonly string[] = [
  ...['-device', 'pcie-root-port,id=plug0,chassis=1,slot=1'],
  ...['-device', 'virtio-scsi-pci,id=scsi'],
]

const ROUNDS = 8
/** How long a disk stays: an emulated machine takes its time to find it. */
const STAY_MS = 2500
const WITHIN_MS = 60_000

/** Tries again as long as QEMU says that it cannot be done yet. */
async function eventually(action: () => Promise<unknown>): Promise<void> {
  const until = Date.now() + WITHIN_MS
  for (;;) {
    try {
      await action()
      return
    } catch (error) {
      if (Date.now() > until) throw error
      await sleep(200)
    }
  }
}

/** A new disk, whose first sector differs from that of all others. */
function makeDisk(vm: Vm, name: string): string {
  const file = join(vm.share, name)
  const content = Buffer.alloc(1 << 20)
  content.write(`diskseqfs ${name}`)
  writeFileSync(file, content)
  return file
}

async function plugAndPull(vm: Vm, kind: string, device: Record<string, unknown>): Promise<void> {
  for (let i = 0; i < ROUNDS; i++) {
    const name = `${kind}-${i}`
    const file = makeDisk(vm, name)
    await vm.qmp('blockdev-add', { 'node-name': name, driver: 'file', filename: file })
    await eventually(() => vm.qmp('device_add', { ...device, id: name, drive: name }))
    await sleep(STAY_MS)
    let asked = 0
    await eventually(async () => {
      // The machine may have been too busy to see the request.
      if (Date.now() - asked > WITHIN_MS / 4) {
        asked = Date.now()
        await vm.qmp('device_del', { id: name }).catch(() => {})
      }
      await vm.qmp('blockdev-del', { 'node-name': name })
    })
    rmSync(file)
  }
}

async function changeMedia(vm: Vm): Promise<void> {
  await vm.qmp('device_add', { driver: 'scsi-cd', id: 'cd', bus: 'scsi.0' })
  const files: string[] = []
  for (let i = 0; i < ROUNDS; i++) {
    const file = makeDisk(vm, `medium-${i}`)
    files.push(file)
    await eventually(() => vm.qmp('blockdev-change-medium', { id: 'cd', filename: file, format: 'raw', force: true }))
    await sleep(STAY_MS)
    if (i % 3 === 2) {
      await eventually(() => vm.qmp('eject', { id: 'cd', force: true }))
      await sleep(STAY_MS / 2)
    }
  }
  await vm.qmp('device_del', { id: 'cd' })
  await sleep(STAY_MS)
  for (const file of files) rmSync(file)
}

/**
 * A process has a disc open through the tree in `directory`, the disc is swapped, and another
 * process opens it by the old number. No other process asks the drive.
 */
async function swapUnderHolder(vm: Vm, directory: string): Promise<'opened' | 'refused'> {
  const files = ['held-a', 'held-b'].map((name) => makeDisk(vm, name))
  const insert = (file?: string) =>
    eventually(() => vm.qmp('blockdev-change-medium', { id: 'held', filename: file, format: 'raw', force: true }))
  const drives = async () => (await vm.run('ls -d /sys/block/sr* || true')).trim().split('\n')
  const before = await drives()
  await vm.qmp('device_add', { driver: 'scsi-cd', id: 'held', bus: 'scsi.0' })
  try {
    await insert(files[0])
    let drive: string | undefined
    await eventually(async () => {
      drive = (await drives()).find((name) => !before.includes(name))
      if (drive === undefined) throw new Error('the machine has not found the drive')
    })
    const holder = vm.start(`
      set -euo pipefail
      udevadm settle
      echo 0 >${drive}/events_poll_msecs
      dd if=/dev/$(basename ${drive}) of=/dev/null count=1 status=none
      name=${directory}/$(cat ${drive}/diskseq)
      exec 5<$name
      touch /run/held
      until [ -e /run/swapped ]; do sleep 0.1; done
      if (exec 6<$name); then echo opened; else echo refused; fi
      [ $(cat ${drive}/diskseq) != $(basename $name) ]`)
    await vm.run('for ((i = 0; i < 300; i++)); do [ ! -e /run/held ] || exit 0; sleep 0.1; done; exit 1')
    await insert(files[1])
    await vm.run('touch /run/swapped')
    const { status, output } = await holder.ended()
    if (status !== 0) throw new Error(`the disc was not swapped: ${output}`)
    return /^opened$/m.test(output) ? 'opened' : 'refused'
  } finally {
    await vm.attempt('rm -f /run/held /run/swapped')
    await vm.qmp('device_del', { id: 'held' })
    for (const file of files) rmSync(file)
  }
}

interface Opens {
  readonly names: number
  readonly used: number
  readonly opens_ok: number
  readonly wrong_diskseq: number
  readonly wrong_data: number
}

interface Result {
  readonly disks: Opens
  readonly media: Opens
  readonly removed: number
  readonly late: number
  readonly stayed: number
  readonly disturbed: number
  readonly media_changes: number
  readonly p50_gone_ms: number
  readonly max_gone_ms: number
}

export const hotplug: Case = {
  name: 'hot-plug',
  shortOn: 'bookworm',
  async run(t: Test, vm: Vm) {
    const seconds = 600
    const running = vm.start(`
      echo $$ >/run/hotplug.pid
      exec /share/blk hotplug --dir /dev/disk/by-diskseq --seconds ${seconds} 2>/run/hotplug.log
    `)
    await vm.run('for ((i = 0; i < 100; i++)); do grep -q ready /run/hotplug.log && break; sleep 0.1; done')
    try {
      await Promise.all([
        plugAndPull(vm, 'virtio', { driver: 'virtio-blk-pci', bus: 'plug0' }),
        plugAndPull(vm, 'scsi', { driver: 'scsi-hd', bus: 'scsi.0' }),
        changeMedia(vm),
      ])
    } finally {
      await vm.attempt('kill -TERM "$(cat /run/hotplug.pid)"')
    }
    const { output } = await running.ended()
    const result = JSON.parse(output.trim().split('\n').at(-1) as string) as Result
    const { disks, media, removed, media_changes, disturbed, p50_gone_ms, max_gone_ms } = result
    note(
      t,
      `${removed} disks pulled out: ${disks.wrong_diskseq + disks.wrong_data} wrong, ${disks.opens_ok} right; ` +
        `gone after ${p50_gone_ms} ms (median), ${max_gone_ms} ms at most` +
        (disturbed > 0 ? `, not counted: ${disturbed} while the machine stood still` : ''),
    )
    note(t, `${media_changes} changes of medium: ${media.wrong_diskseq} wrong, ${media.opens_ok} right`)
    t.comment(JSON.stringify(result))
    t.equal(disks.wrong_diskseq, 0, 'no open reached another disk')
    t.equal(disks.wrong_data, 0, "no open read another disk's data")
    // Not checked: what was read, as the kernel does not always know yet that the medium is another
    // one. An open that was under way during the change gets the new medium.
    t.ok(media.wrong_diskseq <= media_changes, 'hardly an open reached another medium')
    t.ok(removed >= 2 * ROUNDS, `all ${2 * ROUNDS} disks were pulled out`)
    t.equal(result.late, 0, 'each was gone within 100 ms')
    t.equal(result.stayed, 0, 'none stayed')
    t.ok(disturbed <= removed / 2, 'the machine was quick enough to measure')
    t.ok(media_changes >= ROUNDS, `the medium was changed ${ROUNDS} times`)
    t.ok(disks.used >= ROUNDS && disks.opens_ok > 100, 'disks were opened while they were there')
    t.ok(media.used >= ROUNDS / 2, 'media were opened while they were there')
    t.equal(await swapUnderHolder(vm, '/dev/disk/by-diskseq'), 'refused', 'a disc swapped under another user of it is refused')
    t.equal(
      await withTwin(vm, 'no-media-check', () => swapUnderHolder(vm, TWIN_MOUNTPOINT)),
      'opened',
      'twin: if the drive is not asked, the next disc is opened by the number of the previous one',
    )
    t.match(await vm.run('systemctl is-active diskseqfs'), /^active/, 'the daemon still runs')
  },
}
