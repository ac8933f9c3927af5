/**
 * A removable drive that takes its time for each command, as optical drives and card
 * readers do: only an open can tell whether its medium is another one, so each walk to its
 * name waits for one, and then the answer stands.
 */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../suite.js'
import { TWIN_MOUNTPOINT, withTwin } from '../twin.js'
import type { Vm } from '../vm.js'

/** For each command, ms: of an open, several. */
const DELAYS_MS = [20, 60]
const TREE = '/dev/disk/by-diskseq'

/** Calls `use` with the drive's diskseq; there is a file system on it. */
async function withDrive<T>(vm: Vm, delayMs: number, use: (diskseq: string) => Promise<T>): Promise<T> {
  const diskseq = await vm.run(`
    modprobe scsi_debug removable=1 dev_size_mb=16
    for ((i = 0; i < 600; i++)); do
      disk=$(ls /sys/bus/pseudo/drivers/scsi_debug/adapter*/host*/target*/*:*/block 2>/dev/null) && [ -n "$disk" ] && break
      sleep 0.1
    done
    udevadm settle
    mkfs.ext4 -q -F -O ^has_journal /dev/$disk >/dev/null
    udevadm settle
    # EBUSY while a command is under way, of udev's say.
    until echo ${delayMs * 1_000_000} >/sys/bus/pseudo/drivers/scsi_debug/ndelay; do sleep 0.1; done
    cat /sys/block/$disk/diskseq`)
  try {
    return await use(diskseq.trim().split('\n').at(-1)!)
  } finally {
    await vm.attempt(`
      for ((i = 0; i < 100; i++)); do echo 0 >/sys/bus/pseudo/drivers/scsi_debug/ndelay && break; sleep 0.1; done
      umount -q /mnt
      udevadm settle
      for ((i = 0; i < 100; i++)); do rmmod scsi_debug && break; sleep 0.1; done`)
  }
}

const mount = (tree: string, diskseq: string) => `mount ${tree}/${diskseq} /mnt`

export const removable: Case = {
  name: 'removable drive',
  shortOn: 'trixie',
  async run(t: Test, vm: Vm) {
    for (const delay of DELAYS_MS) {
      await withDrive(vm, delay, async (diskseq) => {
        const { status, output } = await vm.attempt(`
          set -e
          began=$(date +%s%N)
          for i in 1 2 3; do
            ${mount(TREE, diskseq)}
            umount /mnt
            dd if=${TREE}/${diskseq} of=/dev/null bs=4k count=1 status=none
          done
          echo $((($(date +%s%N) - began) / 1000000))`)
        t.equal(status, 0, `with ${delay} ms for a command: ${output}`)
        note(t, `${delay} ms a command: three mounts and opens in ${output.trim().split('\n').at(-1)} ms`)
      })
    }
    await withTwin(vm, 'no-walk-memory', () =>
      withDrive(vm, DELAYS_MS[0]!, async (diskseq) => {
        const { status, output } = await vm.attempt(`timeout 60 ${mount(TWIN_MOUNTPOINT, diskseq)}`)
        t.not(status, 0, `where each answer has the drive asked anew, mount fails: ${output.trim()}`)
      }),
    )
  },
}
