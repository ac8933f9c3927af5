// SPDX-License-Identifier: MIT
/** Names that udev rewrites: they get the same links as on a stock system, and the links lead into the tree. */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import type { Vm } from '../vm.js'

/** As written in the shell. */
const NAMES = ["'a~b'", "'x;y'", "'w '", "'p..q'", "'c(d)'", '"e\'f"', "'g@h'", "'...'"]

/** A device for each name. dmsetup may complain about what udev made of the name. */
const each = (script: string) => NAMES.map((name) => script.replaceAll('NAME', name)).join('\n')
const CREATE = `${each("dmsetup create --manglename none NAME --table '0 2048 zero' 2>/dev/null")}\nudevadm settle`
const REMOVE = `${each('dmsetup remove --retry --manglename none NAME 2>/dev/null')}\nudevadm settle`

interface Entry {
  readonly name: string
  /** `s` for a symlink, or `b` for the node that libdm makes if udev made nothing. */
  readonly type: string
  /** Where the link leads. */
  readonly target: string
  /** The diskseq of the device that is reached, and its kernel name. */
  readonly diskseq: string
  readonly kname: string
}

/** New entries in /dev/mapper. */
async function made(vm: Vm): Promise<Entry[]> {
  const list = `
    cd /dev/mapper
    for entry in * .[!.]* ...; do
      [ -L "$entry" ] || [ -e "$entry" ] || continue
      type=$(stat -c %F "$entry")
      number=$((0x$(stat -Lc %t "$entry"))):$((0x$(stat -Lc %T "$entry")))
      kname=$(basename "$(readlink /sys/dev/block/$number)")
      printf '%s\\t%s\\t%s\\t%s\\t%s\\n' "$entry" "\${type:0:1}" "$(readlink "$entry")" "$(cat /sys/block/$kname/diskseq)" "$kname"
    done 2>/dev/null | sort -u`
  const before = new Set((await vm.run(list)).trimEnd().split('\n'))
  try {
    await vm.run(CREATE)
    return (await vm.run(list))
      .trimEnd()
      .split('\n')
      .filter((line) => !before.has(line))
      .map((line) => {
        const [name = '', type = '', target = '', diskseq = '', kname = ''] = line.split('\t')
        return { name, type, target, diskseq, kname }
      })
  } finally {
    await vm.run(REMOVE)
  }
}

const kinds = (entries: readonly Entry[]) => entries.map(({ name, type }) => `${type} ${name}`)

export const names: Case = {
  name: 'names that udev rewrites',
  shortOn: 'bookworm',
  before: made,
  async run(t: Test, vm: Vm, before) {
    const stock = kinds(before as Entry[])
    const found = await made(vm)
    t.ok(stock.length >= NAMES.length, stock.join(', '))
    t.strictSame(kinds(found), stock, 'the same names as on a stock system')
    const links = found.filter(({ type }) => type === 's')
    t.ok(links.length >= 2, `${links.length} of them are links`)
    t.strictSame(
      links.map(({ target }) => target),
      links.map(({ diskseq, kname }) => `/dev/disk/by-diskseq/.dm/${diskseq}/${kname}`),
      'the links lead into the tree, each to its own device',
    )
    t.strictSame(kinds(await made(vm)), stock, 'the same once more')
  },
}
