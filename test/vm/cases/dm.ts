// SPDX-License-Identifier: MIT
/** `diskseqfs dm`: devices that are made, changed and removed by what they are, while their names go elsewhere. */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

const CYCLES = 500
const SWAPS = SHORT ? 4 : 100
const NAMES_MAX = 40
const LATE = SHORT ? 6 : 40
/** As often as it takes for the path in /dev. */
const LATE_MAX = 60
const SECTORS = 2048
/** As dmsetup(8) says it. */
const DEFERRED = 'ACTIVE (DEFERRED REMOVE)'

/** Two disks, and what the steps use. What they print is compared. */
const SETUP = `
  cd /root
  disks=() paths=()
  for i in 0 1; do
    truncate -s 4M dm$i.img
    disks+=($(losetup --find --show dm$i.img))
    paths+=(/dev/disk/by-diskseq/$(blockdev --getdiskseq \${disks[i]}))
  done
  undo() {
    for name in $(dmsetup ls | cut -f1 | grep -E '^(dm-test|diskseqfs-new)'); do dmsetup remove --retry $name; done
    losetup --detach "\${disks[@]}"
    rm -f dm0.img dm1.img
  } >/dev/null 2>&1
  trap undo EXIT
  table() { echo "0 ${SECTORS} linear $1 $2"; }
  deferred() { dmsetup info $1 | sed -n 's/^State: *//p'; }
  seq_of() { blockdev --getdiskseq /dev/mapper/$1; }
  # Gone, though not at once: the kernel removes it after the last close.
  gone() { local i; for i in $(seq 200); do dmsetup info $1 >/dev/null 2>&1 || return 0; sleep 0.1; done; echo "$1 is still there"; }`

async function life(t: Test, vm: Vm): Promise<void> {
  const output = await vm.run(`${SETUP}
    path=$(diskseqfs dm create --uuid DM-TEST dm-test-a "$(table \${paths[0]} 0)")
    [ $path = /dev/disk/by-diskseq/$(seq_of dm-test-a) ] && echo path
    [ "$(diskseqfs dm table dm-test-a)" = "$(table $(cat /sys/block/\${disks[0]##*/}/dev) 0)" ] && echo table
    dmsetup info -c --noheadings -o uuid,open dm-test-a
    readlink /dev/mapper/dm-test-a | grep -o by-diskseq
    # The program sees the same device, though it was just made.
    echo found >found; dd if=found of=\${disks[1]} conv=notrunc status=none; rm found
    diskseqfs dm reload \${path##*/} - <<<"$(table \${paths[1]} 0)"
    [ "$(diskseqfs dm table --inactive $path)" = "$(table $(cat /sys/block/\${disks[1]##*/}/dev) 0)" ] && echo inactive
    diskseqfs dm suspend $path && dmsetup info -c --noheadings -o suspended dm-test-a
    diskseqfs dm resume \${path##*/} && dmsetup info -c --noheadings -o suspended dm-test-a
    head -n 1 $path
    diskseqfs dm status $path
    diskseqfs dm rename $path 'dm-test b' && ls /dev/mapper | grep dm-test
    [ $(seq_of 'dm-test\\x20b') = \${path##*/} ] && echo the same
    for name in '/dev/mapper/dm-test\\x20b' 'dm-test b' 'dm-test\\x20b'; do
      [ "$(diskseqfs resolve "$name")" = $path ] && [ $(diskseqfs list -no PATH "$name") = $path ] || echo not by $name
    done
    exec 3<$path
    diskseqfs dm remove --deferred $path && deferred 'dm-test\\x20b'
    exec 3<&-
    gone 'dm-test\\x20b'
    # Held open by somebody else.
    path=$(diskseqfs dm create dm-test-a "$(table \${paths[0]} 0)")
    exec 3<$path
    diskseqfs dm remove $path 2>&1 || true
    diskseqfs dm remove --deferred $path
    diskseqfs dm message $path 0 @cancel_deferred_remove
    exec 3<&-
    diskseqfs dm remove dm-test-a && dmsetup ls | grep dm-test || echo removed`)
  const lines = output.trimEnd().split('\n')
  const open = lines.findIndex((line) => line.includes('in use'))
  t.match(lines[open], /diskseqfs: \/dev\/disk\/by-diskseq\/\d+: it is in use: open 1 time; --deferred/)
  t.strictSame(
    lines.filter((line, i) => i !== open && !/vm-/.test(line)),
    [
      ...['path', 'table', 'DM-TEST:0', 'by-diskseq', 'inactive', 'Suspended', 'Active', 'found', `0 ${SECTORS} linear`],
      ...['dm-test\\x20b', 'the same', DEFERRED, 'removed'],
    ],
  )
}

async function refused(t: Test, vm: Vm): Promise<void> {
  const output = await vm.run(`${SETUP}
    no() { echo "$1: $(diskseqfs dm "\${@:2}" 2>&1 >/dev/null)"; }
    diskseqfs dm create --uuid DM-TEST dm-test-a "$(table \${paths[0]} 0)" >/dev/null
    no 'a name that is taken' create dm-test-a "$(table \${paths[0]} 0)"
    no 'a UUID that is taken' create --uuid DM-TEST dm-test-b "$(table \${paths[0]} 0)"
    no 'a target that there is not' create dm-test-b '0 8 nosuch'
    no 'beyond the end' create dm-test-b '0 80000000 linear '\${paths[0]}' 0'
    no 'a disk that is gone' create dm-test-b '0 8 linear /dev/disk/by-diskseq/99999999 0'
    no 'no device-mapper device' remove \${disks[0]}
    no 'a name that another one has' rename $(seq_of dm-test-a) vm-root
    no 'a message that it does not know' message dm-test-a 0 nosuch
    echo "$(dmsetup ls | grep -c -E 'dm-test|diskseqfs-new') left"`)
  t.match(output, /^a name that is taken: .*dm-test-a: a device-mapper device of this name exists$/m)
  t.match(output, /^a UUID that is taken: .*dm-test-b: there is a device with this UUID already$/m)
  t.match(output, /^a target that there is not: .*dm-test-b: the kernel does not take the table: E[A-Z]+; .*journalctl -k/m)
  t.match(output, /^beyond the end: .*dm-test-b: the kernel does not take the table: EINVAL; .*journalctl -k/m)
  t.match(output, /^a disk that is gone: .*in the table, \/dev\/disk\/by-diskseq\/99999999: no such file$/m)
  t.match(output, /^no device-mapper device: .*loop\d+ is no device-mapper device$/m)
  t.match(output, /^a name that another one has: .*a device-mapper device of this name exists$/m)
  t.match(output, /^a message that it does not know: .*its target does not take the message: EINVAL$/m)
  t.match(output, /^1 left$/m, 'and nothing is left behind')
}

async function untilUnused(t: Test, vm: Vm): Promise<void> {
  const output = await vm.run(`${SETUP}
    diskseqfs dm create --until-unused dm-test-a "$(table \${paths[0]} 0)" -- sh -c 'head -c0 {} && dmsetup info dm-test-a | sed -n "s/^State: *//p"'
    gone dm-test-a
    path=$(diskseqfs dm create --until-unused --keep dm-test-a "$(table \${paths[0]} 0)")
    exec 3<$path
    diskseqfs detach \${path##*/}
    deferred dm-test-a
    exec 3<&-
    gone dm-test-a; echo gone`)
  t.equal(output, `${DEFERRED}\n${DEFERRED}\ngone\n`)
}

/** Whoever makes devices is killed at any moment; whoever makes the next one leaves nothing of that. */
async function killed(t: Test, vm: Vm): Promise<void> {
  const output = await vm.run(
    `${SETUP}
    for ((i = 0; i < ${CYCLES}; i++)); do
      (exec diskseqfs dm create --until-unused --grace 1 dm-test-$i "$(table \${paths[i % 2]} 0)" >/root/dm.out 2>&1) & pid=$!
      # Most of that time Node.js takes to start.
      for ((n = 0; n < 600; n++)); do [ -n "$(dmsetup ls | grep -E 'diskseqfs-new|dm-test')" ] && break; kill -0 $pid 2>/dev/null || break; done
      sleep 0.$((RANDOM % 4))$((RANDOM % 10))
      kill -KILL $pid 2>/dev/null || true
      wait $pid 2>/dev/null || true
      path=$(cat dm.out); [ -z "$path" ] || [ ! -e $path ] || [ $path = /dev/disk/by-diskseq/$(seq_of dm-test-$i) ] || echo wrong $path
    done
    diskseqfs dm create dm-test-last "$(table \${paths[0]} 0)" >/dev/null
    diskseqfs dm remove dm-test-last
    for ((i = 0; i < 100; i++)); do left=$(dmsetup ls | grep -c -E 'diskseqfs-new|dm-test') || break; sleep 0.3; done
    dmsetup ls | grep -E 'diskseqfs-new|dm-test' || true
    rm dm.out`,
    60 * 60_000,
  )
  t.equal(output, '', `${CYCLES} times: no device is left, and none was another one`)
}

/**
 * Another process gives two devices each other's names all the time. They are suspended, as that is no call that Linux measures for its
 * integrity log (dm-ima): where one of those coincides with a rename by another process, the kernel frees memory twice (Linux 6.12).
 */
async function swapped(t: Test, vm: Vm): Promise<void> {
  const output = await vm.run(
    `${SETUP}
    for i in 0 1; do diskseqfs dm create dm-test-$i "$(table \${paths[i]} 0)" >/dev/null; done
    ours=$(seq_of dm-test-0)
    number=$(lsblk -dno MAJ:MIN /dev/mapper/dm-test-0 | tr -d ' ')
    by_number() { "\${@:2}" -j \${1%:*} -m \${1#*:}; }
    swap() { dmsetup rename dm-test-0 dm-test-x; dmsetup rename dm-test-1 dm-test-0; dmsetup rename dm-test-x dm-test-1; }
    start() { rm -f stop; while [ ! -e stop ]; do swap; done & swapping=$!; }
    stop() { touch stop; wait $swapping; rm stop; }
    trap 'stop; undo' EXIT
    # Which device is suspended; it is resumed again, before anybody waits for udev, which may be reading it.
    check() {
      local found=$(grep -lx 1 /sys/block/dm-*/dm/suspended | sed 's,suspended$,../dev,' | xargs -r cat)
      case $found in "$number") echo $1 right ;; '') echo $1 none ;; *) echo $1 wrong ;; esac
      for found in $found; do by_number $found dmsetup resume; done
    }
    for ((i = 0; i < ${SWAPS}; i++)); do
      start
      diskseqfs dm suspend $ours
      check ours
      stop
    done
    # As often as it takes.
    for ((i = 0; i < ${NAMES_MAX}; i++)); do
      name=$(by_number $number dmsetup info -c --noheadings -o name)
      start
      sleep 0.$((RANDOM % 10))
      dmsetup suspend "$name" || true
      verdict=$(check name)
      stop
      echo "$verdict"
      [ "$verdict" != 'name wrong' ] || break
    done
    start`,
    60 * 60_000,
  )
  const count = (what: string) => output.split('\n').filter((line) => line === what).length
  note(t, `names swapped: by diskseq ${count('ours right')} right, ${count('ours wrong')} wrong; by name ${count('name wrong')} wrong`)
  t.equal(count('ours right'), SWAPS, `each call reached its device: ${output}`)
  t.ok(count('name wrong') > 0, 'twin: by the name that it had, some reached the other one')
}

/**
 * A program that names a disk in a table some time after it was started; at a random moment of that its loop device gets
 * another file.
 */
async function late(t: Test, vm: Vm): Promise<void> {
  const output = await vm.run(
    `${SETUP}
    for i in 0 1; do echo "disk $i" | dd of=\${disks[i]} conv=notrunc status=none; done
    file() { losetup --noheadings --output BACK-FILE $1 | tr -d ' '; }
    # It is free, or is so as soon as whoever has it open is done; or it has the other file meanwhile.
    recycle() { losetup --detach $1 2>/dev/null; losetup $1 /root/dm1.img 2>/dev/null; }
    # Within how many seconds: Node.js takes some of them to start.
    round() {
      local what=$1 seconds=$2 loop=$(losetup --find --show dm0.img)
      local path=$loop; [ $what = path ] || path=$(blockdev --getdiskseq $loop)
      (sleep $((RANDOM % seconds)).$((RANDOM % 10)); recycle $loop || true) & local recycling=$!
      local later='sleep 0.5; dmsetup create dm-test-late --table "0 8 linear $0 0"'
      case $what in
      exec) diskseqfs exec $path -- sh -c "$later" {} ;;
      path) sh -c "$later" $path ;;
      esac 2>/dev/null || true
      wait $recycling
      if [ ! -e /dev/mapper/dm-test-late ]; then echo $what none
      else case $(head -n 1 /dev/mapper/dm-test-late) in 'disk 0') echo $what right ;; *) echo $what wrong ;; esac; dmsetup remove --retry dm-test-late; fi
      [ -z "$(file $loop)" ] || losetup --detach $loop
    }
    for ((i = 0; i < ${LATE}; i++)); do round exec 6; done
    for ((i = 0; i < ${LATE_MAX}; i++)); do verdict=$(round path 1); echo "$verdict"; [ "$verdict" != 'path wrong' ] || break; done`,
    60 * 60_000,
  )
  const count = (what: string) => output.split('\n').filter((line) => line === what).length
  const verdicts = (what: string) => ['right', 'wrong', 'none'].map((verdict) => `${count(`${what} ${verdict}`)} ${verdict}`).join(', ')
  note(t, `tables made late: with exec ${verdicts('exec')}; by path ${verdicts('path')}`)
  t.equal(count('exec wrong'), 0, 'none has another disk')
  t.ok(count('exec right') > 0, 'tables were made')
  t.ok(count('path wrong') > 0, 'twin: by the path in /dev, one has another disk')
}

export const dm: Case = {
  name: 'dm: devices by what they are',
  shortOn: 'trixie',
  async run(t, vm) {
    await t.test('made, changed, removed', (t) => life(t, vm))
    if (!SHORT) await t.test('what cannot be done is said, and leaves nothing', (t) => refused(t, vm))
    await t.test('a device goes with its last user', (t) => untilUnused(t, vm))
    if (!SHORT) await t.test('killed at any moment', (t) => killed(t, vm))
    await t.test('while names are swapped', (t) => swapped(t, vm))
    await t.test('a table that is made late', (t) => late(t, vm))
  },
}
