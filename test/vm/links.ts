// SPDX-License-Identifier: MIT
/** Where the names of device-mapper devices lead. */
import type { Vm } from './vm.js'

/**
 * Each link of a device-mapper device in /dev/mapper, and LVM's, with the diskseq of the device that it is named
 * for.
 */
const LIST = `
  for dm in /sys/block/dm-*; do
    name=$(cat $dm/dm/name)
    volume=
    case $(cat $dm/dm/uuid) in
    LVM-*)
      eval "$(dmsetup splitname --nameprefixes --noheadings --rows "$name")"
      volume=\${DM_LV_NAME:+/dev/$DM_VG_NAME/$DM_LV_NAME}
    esac
    for link in /dev/mapper/$name $volume; do
      echo "$link $(readlink $link || echo missing) $(cat $dm/diskseq) \${dm##*/}"
    done
  done
  for link in $(find /dev/mapper /dev/disk -xdev -type l); do
    [ -e $link ] || echo "$link $(readlink $link) dangling -"
  done`

/** Names of the root file system's device, and of the swap device in fstab: these stay udev's. */
export const LEFT_ALONE: readonly string[] = ['/dev/mapper/vm-root', '/dev/vm/root', '/dev/mapper/vm-swap', '/dev/vm/swap']

interface Links {
  /** Links that lead into the tree, to the right disk. */
  readonly tree: string[]
  /** Links that lead to the right device node. */
  readonly stock: string[]
  /** The same, for devices that are left alone. */
  readonly left: string[]
  /** All others, with where they lead. */
  readonly wrong: string[]
}

export async function links(vm: Vm): Promise<Links> {
  const found: Links = { tree: [], stock: [], left: [], wrong: [] }
  for (const line of (await vm.run(LIST)).trimEnd().split('\n')) {
    const [link, target, diskseq, kernel] = line.split(' ') as [string, string, string, string]
    if (target === `/dev/disk/by-diskseq/.dm/${diskseq}/${kernel}`) found.tree.push(link)
    else if (target === `../${kernel}`) found[LEFT_ALONE.includes(link) ? 'left' : 'stock'].push(link)
    else found.wrong.push(line)
  }
  found.left.sort((a, b) => LEFT_ALONE.indexOf(a) - LEFT_ALONE.indexOf(b))
  return found
}
