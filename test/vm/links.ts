/** Where the names of device-mapper devices lead. */
import type { Vm } from './vm.js'

/** Each link of a device-mapper device in /dev/mapper, and LVM's, with the diskseq of the device it is named for. */
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

export const ROOT_LINKS: readonly string[] = ['/dev/mapper/vm-root', '/dev/vm/root']

interface Links {
  /** Those that lead into the tree, to the right disk. */
  readonly tree: string[]
  /** Those that lead to the right device's own node. */
  readonly stock: string[]
  /** The same, of the root file system's device, which is left alone. */
  readonly root: string[]
  /** All others, with where they lead. */
  readonly wrong: string[]
}

export async function links(vm: Vm): Promise<Links> {
  const found: Links = { tree: [], stock: [], root: [], wrong: [] }
  for (const line of (await vm.run(LIST)).trimEnd().split('\n')) {
    const [link, target, diskseq, kernel] = line.split(' ') as [string, string, string, string]
    if (target === `/dev/disk/by-diskseq/${diskseq}`) found.tree.push(link)
    else if (target === `../${kernel}`) found[ROOT_LINKS.includes(link) ? 'root' : 'stock'].push(link)
    else found.wrong.push(line)
  }
  return found
}
