// SPDX-License-Identifier: MIT
/**
 * The race itself. Device-mapper devices are removed and made again under other names, so that the
 * number of one is another's a moment later, while processes open them by /dev/mapper/NAME. udev is
 * slow, in turn at each point where that makes a difference. Each open must reach a device of that
 * name; the same run on the stock system must show that it sometimes does not.
 */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

const SECONDS = 10
/** How long a device lives at most, from when the name leads to it, or at once for devices of every second creator. */
const LIVE_MS = 600
const SLOW = '/bin/sleep 0.3'

interface Variant {
  readonly name: string
  /** Whether it also runs on the stock system, to compare with. */
  readonly compared?: true
  /** A rule that slows udev down, and the file whose place in the order decides where. */
  readonly rule?: readonly [file: string, action: string]
}

const variants: readonly Variant[] = [
  { name: 'udev as it is', compared: true },
  // dmsetup does not wait for this, as 95-dm-notify.rules comes before.
  { name: 'udev slow at the end', compared: true, rule: ['96-slow', `RUN+="${SLOW}"`] },
  // The name has been read (55-dm.rules), and the links have not been made.
  { name: 'udev slow at the beginning', rule: ['57-slow', `PROGRAM="${SLOW}"`] },
  // Between our rules and the links.
  { name: 'udev slow before its links', rule: ['62-slow', `PROGRAM="${SLOW}"`] },
  // Between the links and the program that our rules run then.
  { name: 'udev slow after its links', compared: true, rule: ['57-slow', `RUN+="${SLOW}"`] },
]

interface Result {
  readonly opens: number
  readonly opens_ok: number
  readonly by_bare_link: number
  readonly wrong_name: number
  readonly wrong_data: number
  readonly lives_wrong: number
  readonly first_wrong: string
  readonly created: number
  readonly number_moves: number
  readonly errors: Record<string, number>
  readonly read_errors: Record<string, number>
  readonly creator_errors: Record<string, number>
}

async function race(vm: Vm, { rule }: Variant): Promise<Result> {
  const match = 'ACTION!="remove", KERNEL=="dm-[0-9]*", ATTR{dm/name}=="race-*"'
  const rules = '/run/udev/rules.d'
  const output = await vm.run(
    `
    trap 'rm -f ${rules}/*-slow.rules; udevadm control --reload; udevadm settle --timeout=120' EXIT
    mkdir -p ${rules}
    ${rule === undefined ? '' : `echo '${match}, ${rule[1]}' >${rules}/${rule[0]}.rules`}
    udevadm control --reload
    /share/blk dm-race --seconds ${SECONDS} --live-ms ${LIVE_MS}
    `,
  )
  return JSON.parse(output.trim().split('\n').at(-1) as string) as Result
}

async function compared(vm: Vm): Promise<Map<Variant, Result>> {
  const results = new Map<Variant, Result>()
  for (const variant of variants) if (variant.compared) results.set(variant, await race(vm, variant))
  return results
}

const wrong = (result: Result): number => result.wrong_name + result.wrong_data
const sum = (numbers: readonly number[]): number => numbers.reduce((a, b) => a + b, 0)
const figures = (result: Result): string =>
  `${wrong(result)} wrong (in ${result.lives_wrong} lives of ${result.created}), ${result.opens_ok} right`

export const mapperRace: Case = {
  name: 'race for /dev/mapper names',
  shortOn: 'bookworm',
  before: compared,
  async run(t: Test, vm: Vm, before: unknown) {
    const stock = before as Map<Variant, Result>
    const ours: Result[] = []
    for (const variant of variants) {
      const result = await race(vm, variant)
      ours.push(result)
      const other = stock.get(variant)
      note(t, `${variant.name}: ${figures(result)}${other === undefined ? '' : `; stock: ${figures(other)}`}`)
      t.comment(JSON.stringify(result))
      t.equal(result.wrong_name, 0, `${variant.name}: no open got another name's device ${result.first_wrong}`)
      t.equal(result.wrong_data, 0, `${variant.name}: no open read another device's data`)
      t.equal(result.by_bare_link, 0, `${variant.name}: no name led to a bare device number`)
      t.ok(result.number_moves > 5, `${variant.name}: numbers went to other names`)
      t.strictSame(result.creator_errors, {}, `${variant.name}: devices could be made and removed`)
      t.strictSame(result.read_errors, {}, `${variant.name}: each opened device could be read`)
      t.strictSame(
        Object.keys(result.errors).filter((errno) => errno !== 'ENOENT' && errno !== 'ENXIO'),
        [],
        `${variant.name}: no errno but those for a device that is gone`,
      )
    }
    // If no open succeeds, none can be wrong.
    t.ok(sum(ours.map(({ opens_ok }) => opens_ok)) > 100, 'names led to their devices')
    t.ok(sum([...stock.values()].map(wrong)) > 0, 'the stock system gave wrong devices')
    t.equal(await vm.run('ls /dev/mapper | grep -c ^race- || true'), '0\n', 'no link is left behind')
  },
}
