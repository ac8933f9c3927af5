// SPDX-License-Identifier: MIT
/**
 * Volumes in an encrypted volume of another group. The system starts with them, restarts its user space,
 * and goes to the state in which an administrator repairs it and back. The result is compared with a
 * stock system.
 */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { type Answers, askAll, compareAll, type Probe, TRY } from '../probes.js'
import type { Release, Vm } from '../vm.js'

const DIRECTORY = '/var/tmp/levels'

/** The agent that runs the scripts goes on in the repair state. */
const PREPARE = `
  mkdir -p ${DIRECTORY} /inner /etc/systemd/system/agent.service.d
  printf '[Unit]\\nIgnoreOnIsolate=yes\\n' >/etc/systemd/system/agent.service.d/levels.conf
  cp -p /etc/fstab /etc/crypttab ${DIRECTORY}
  dd if=/dev/urandom of=/etc/outer.key bs=32 count=1 status=none
  chmod 600 /etc/outer.key
  lvcreate -qqy -Wn -L 64M -n outer vm
  cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/vm/outer /etc/outer.key
  cryptsetup open --key-file /etc/outer.key /dev/vm/outer outer-open
  vgcreate -qq inner /dev/mapper/outer-open
  lvcreate -qqy -Wn -L 16M -n data inner
  lvcreate -qqy -Wn -L 8M -n swap inner
  mkfs.ext4 -q /dev/inner/data
  mkswap /dev/inner/swap >/dev/null
  echo 'outer-open /dev/mapper/vm-outer /etc/outer.key luks' >>/etc/crypttab
  printf '%s\\n' '/dev/inner/data /inner ext4 nofail,x-systemd.device-timeout=120s 0 2' '/dev/mapper/inner-swap none swap nofail,x-systemd.device-timeout=120s 0 0' >>/etc/fstab
  systemctl daemon-reload
  cat >${DIRECTORY}/prelude <<'PRELUDE'
${TRY}
PRELUDE
`

const TIDY = `
  umount -q /inner
  swapoff /dev/mapper/inner-swap
  vgremove -qqff inner
  cryptsetup close outer-open
  lvremove -qqy vm/outer
  cp -p ${DIRECTORY}/fstab ${DIRECTORY}/crypttab /etc
  rm -r ${DIRECTORY} /etc/systemd/system/agent.service.d /etc/outer.key
  rmdir /inner
  systemctl daemon-reload
`

const SHAPE = `
  udevadm settle
  try 'findmnt -rno SOURCE,TARGET /inner; findmnt -rno SOURCE,TARGET /srv; findmnt -rno SOURCE,TARGET /secret'
  try 'swapon --noheadings --show=SIZE | sort'
  try 'lvs --noheadings -o vg_name,lv_name,lv_active inner'
  try 'systemctl is-active inner.mount dev-inner-data.device "dev-mapper-inner\\x2dswap.swap" "systemd-cryptsetup@outer\\x2dopen.service"'
  try 'systemctl list-units --failed --no-legend'
  try 'dd if=/dev/inner/data of=/dev/null count=8 status=none'
  try 'cryptsetup status outer-open | grep device:'
  try 'ls /dev/mapper'
  try 'e2fsck -n /dev/mapper/inner-data 2>&1 | head -n 2'
`

interface Stage {
  readonly what: string
  /** The stage is on that release only. */
  readonly on?: Release
  /** Why the state of the inner group differs each time there, on both systems. */
  readonly varies?: string
  reach(vm: Vm): Promise<unknown>
}

/** The stages, one after another. */
const STAGES: readonly Stage[] = [
  {
    what: 'after a boot',
    async reach(vm) {
      await vm.powerOff()
      await vm.boot()
      await vm.run('systemctl is-system-running --wait || true', 600_000)
    },
  },
  { what: 'in rescue.target', reach: (vm) => vm.run('systemctl isolate rescue.target', 600_000) },
  { what: 'and back', reach: (vm) => vm.run('systemctl isolate default.target; systemctl is-system-running --wait || true', 600_000) },
  {
    what: 'after another start of user space',
    // systemd 252 has no soft reboot.
    on: 'trixie',
    varies:
      'blkdeactivate deactivates the inner group if it comes after swapoff, and LVM does not activate it again, as its files in /run say',
    reach: softReboot,
  },
]

const stagesOn = (vm: Vm) => STAGES.filter(({ on }) => on === undefined || on === vm.release)
const probeOf = ({ what, varies }: Stage): Probe => ({
  what,
  script: SHAPE,
  ...(varies !== undefined && { limit: varies, limitMayBe: true }),
})

async function visitAll(vm: Vm): Promise<Answers> {
  const printed = new Map<string, string>()
  let seconds = 0
  try {
    await vm.run(PREPARE, 300_000)
    for (const stage of stagesOn(vm)) {
      await stage.reach(vm)
      const answers = await askAll(vm, DIRECTORY, [probeOf(stage)])
      for (const [what, text] of answers.printed) printed.set(what, text)
      seconds += answers.seconds
    }
  } finally {
    await vm.attempt(TIDY, 300_000)
  }
  return { printed, seconds }
}

/** Starts user space anew, and leaves when that was: microseconds since boot, as the service manager counts. */
async function softReboot(vm: Vm): Promise<void> {
  await vm.run('awk \'{ printf "%d", $1 * 1e6 }\' /proc/uptime >/run/restarted')
  await vm.softReboot()
  await vm.run('systemctl is-system-running --wait || true', 600_000)
}

/**
 * Whether the service was started in this user space before what mounts file systems. Its unit then stops with
 * the user space before.
 */
const FIRST = `
  began=$(cat /run/restarted)
  service=$(systemctl show -P ActiveEnterTimestampMonotonic diskseqfs.service)
  mounts=$(systemctl show -P ActiveEnterTimestampMonotonic local-fs-pre.target)
  echo $began $service $mounts >&2
  [ $began -lt $service ] && [ $service -le $mounts ] && echo first || echo not first`
const UNIT = '/etc/systemd/system/diskseqfs.service'

/** Whether a start of user space fails, with a unit that does not end with the one before. */
async function failsWithoutConflict(vm: Vm): Promise<boolean> {
  await vm.run(`sed '/soft-reboot/d' /usr/lib/systemd/system/diskseqfs.service >${UNIT}; systemctl daemon-reload`)
  try {
    vm.start('systemctl soft-reboot')
    return await vm.shows(/You are in emergency mode/)
  } finally {
    // Nothing runs scripts in it.
    await vm.kill()
    await vm.boot()
    await vm.run(`rm ${UNIT}; systemctl daemon-reload; systemctl restart diskseqfs`)
  }
}

export const levels: Case = {
  name: 'levels: LVM in LUKS in LVM at boot, at repairs and after a start of user space',
  // Needs several boots of each system.
  shortOn: 'none',
  before: visitAll,
  async run(t: Test, vm: Vm, before: unknown) {
    const ours = await visitAll(vm)
    compareAll(t, vm, stagesOn(vm).map(probeOf), ours, before as Answers)
    for (const { what, varies } of stagesOn(vm)) {
      const text = ours.printed.get(what)
      t.match(text, /: \/dev\/mapper\/secret-open \/secret$/m, `${what}: what is encrypted is mounted`)
      if (varies === undefined) t.match(text, /: \/dev\/mapper\/inner-data \/inner$/m, `${what}: and the inner volume is mounted`)
    }
    if (vm.release === 'trixie') {
      t.match(await vm.run(FIRST), /^first$/m, 'after another start of user space the service came before file systems')
      t.ok(await failsWithoutConflict(vm), 'twin: the system does not come up if its unit does not end with the user space')
    }
    t.equal(await vm.run('findmnt -n -o FSTYPE /dev/disk/by-diskseq'), 'fuse.diskseqfs\n', 'the tree is there')
  },
}
