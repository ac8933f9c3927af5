// SPDX-License-Identifier: MIT
/**
 * Devices are made, renamed, written to, and removed while udev is still busy with earlier events,
 * and is slow at any place of what our rules have it run. Each name must lead to the device that
 * has it, and no link may stay without an owner.
 */
import type { Test } from 'tap'

import type { Change } from '../../helpers/guard.js'
import { type Case, SHORT } from '../case.js'
import { links, LEFT_ALONE } from '../links.js'
import { note } from '../findings.js'
import { withLink } from '../twin.js'
import type { Vm } from '../vm.js'

const ROUNDS = SHORT ? 24 : 500
/** Run at the same time, so that the number of one becomes another's. */
const LANES = 3
const TWIN_TRIES = 5

/** A program that takes a while now and then before it does anything that others may see, or sees what they do. */
const SLOW: Change = [
  '#define MAPPER "/dev/mapper"\n',
  `#define MAPPER "/dev/mapper"
static void dawdle(int one_of, long ms) {
  static bool seeded;
  if (!seeded) srandom((unsigned)getpid() * 7919u);
  seeded = true;
  if (random() % one_of == 0) usleep((useconds_t)(random() % ms * 1000));
}
#define flock(fd, how) (dawdle(4, 2500), flock(fd, how))
#define readlink(path, into, size) (dawdle(3, 400), readlink(path, into, size))
#define symlink(target, path) (dawdle(3, 400), symlink(target, path))
#define rename(from, to) (dawdle(3, 400), rename(from, to))
#define unlink(path) (dawdle(3, 400), unlink(path))
#define read(fd, into, size) (dawdle(20, 400), read(fd, into, size))
`,
]

const LOOKS_FIRST: readonly Change[] = [
  [
    '  bool locked = lock();\n  struct device device = look(kernel);\n',
    '  struct device device = look(kernel);\n  bool locked = lock();\n',
  ],
]

/** The earlier error: the link points at a node, whether or not the device is still there, or has the name. */
const ASKS_NOT: readonly Change[] = [
  ['if (!event->is_udevs(link) || !current(&device)) result |= give_up(link, event->diskseq, kernel);', 'if (0) ;'],
]

/**
 * One lane, in the shell. A process that has made a device and waited for udev must find it by its
 * name, now and for as long as it has that name.
 */
const LANE = `
  # NAME: a complaint where it does not lead to the device that has it
  leads() {
    local entry name
    for entry in /sys/block/dm-*/dm/name; do
      name=
      { name=$(<$entry); } 2>/dev/null
      [ "$name" = "$1" ] || continue
      entry=\${entry%/dm/name}
      [ "$(readlink /dev/mapper/$1)" = "/dev/disk/by-diskseq/.dm/$(<$entry/diskseq)/\${entry##*/}" ] ||
        echo "$1 -> $(readlink /dev/mapper/$1), and it is $entry with $(<$entry/diskseq)"
      return
    done
    echo "$1 is not there"
  }
  # As soon as udev has let go of it.
  take_away() {
    local n
    for ((n = 0; n < 30; n++)); do dmsetup remove --retry $1 2>/dev/null && return; done
    echo "$1 stays busy"
  }
  lane() {
    local a=t-$1-a b=t-$1-b c=t-$1-c n i
    for ((n = 0; n < $2; n++)); do
      case $((RANDOM % 3)) in
      0)
        dmsetup create $a --table "0 4096 linear $3 0"
        leads $a
        mkswap -q /dev/mapper/$a
        swapon /dev/mapper/$a && swapoff /dev/mapper/$a
        take_away $a
        ;;
      1)
        # What udev does for its second name comes when it has its third.
        dmsetup create $a --table '0 2048 zero'
        dmsetup rename --noudevsync $a $b
        sleep 0.$((RANDOM % 6))
        dmsetup rename --noudevsync $b $c
        dmsetup create $b --table '0 4096 zero'
        leads $b
        for ((i = 0; i < 300; i++)); do [ -n "$(leads $c)" ] || break; sleep 0.1; done
        leads $c
        leads $b
        take_away $b
        take_away $c
        ;;
      2)
        dmsetup create $a --table '0 2048 zero'
        leads $a
        # udev looks at what was written, while the name becomes another device's.
        : >>/dev/mapper/$a
        dmsetup rename --noudevsync $a $b
        dmsetup create $a --table '0 4096 zero'
        leads $a
        for ((i = 0; i < 300; i++)); do [ -n "$(leads $b)" ] || break; sleep 0.1; done
        leads $b
        sleep 0.$((RANDOM % 6))
        leads $a
        leads $b
        take_away $a
        take_away $b
        ;;
      esac
    done
  }`

/** All errors. */
async function rounds(vm: Vm, count: number): Promise<string[]> {
  const output = await vm.run(
    `
    ${LANE}
    set +e
    for ((i = 0; i < ${LANES}; i++)); do
      truncate -s 4M /run/links-$i
      (disk=$(losetup --find --show /run/links-$i); lane $i ${Math.ceil(count / LANES)} $disk; losetup -d $disk) &
    done
    wait
    udevadm settle --timeout=300
    for link in /dev/mapper/t-*; do [ ! -L $link ] || echo "left: $link -> $(readlink $link)"; done
    rm -f /run/links-* /dev/mapper/t-*`,
    120_000 + count * 15_000,
  )
  return output.split('\n').filter((line) => line !== '')
}

async function twin(t: Test, vm: Vm, what: string, changes: readonly Change[]): Promise<void> {
  let wrong: string[] = []
  await withLink(t, vm, [SLOW, ...changes], async () => {
    for (let i = 0; i < TWIN_TRIES && wrong.length === 0; i++) wrong = await rounds(vm, 24)
  })
  t.not(wrong.length, 0, `${what} ${wrong[0]}`)
}

export const linksCase: Case = {
  name: 'links of devices that change while udev is slow',
  // Takes five minutes; race.ts shows some of it.
  shortOn: 'none',
  async run(t, vm) {
    const wrong = await withLink(t, vm, [SLOW], () => rounds(vm, ROUNDS))
    t.strictSame(wrong, [], `${ROUNDS} rounds`)
    note(t, `${ROUNDS} rounds of mkswap, swapon, swapoff, rename, create: ${wrong.length} wrong`)
    await twin(t, vm, 'twin: a program that looks before it has the lock leaves a name wrong:', LOOKS_FIRST)
    await twin(t, vm, 'twin: a program that makes a link without a check leaves a link:', ASKS_NOT)
    const { tree, stock, left, wrong: others } = await links(vm)
    t.ok(tree.length > 5, 'everything else is as before')
    t.strictSame({ stock, left, others }, { stock: [], left: LEFT_ALONE, others: [] })
  },
}
