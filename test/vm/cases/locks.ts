// SPDX-License-Identifier: MIT
/** An unprivileged user holds flock(2) on what it may open. That blocks nothing. */
import { copyFileSync } from 'node:fs'
import { join } from 'node:path'

import type { Test } from 'tap'

import { twinLink } from '../../helpers/guard.js'
import type { Case } from '../case.js'
import { links } from '../links.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

/** How long emulation may need for an event, at most; and the time that counts as waiting for a lock. */
const TIME_LIMIT_S = 60
const WAITS_S = 20

/**
 * Runs a script while the user holds the lock. It first waits for the user to have it, which it checks by
 * taking it for a moment.
 */
const whileHeld = (vm: Vm, directory: string, script: string): Promise<string> =>
  vm.run(`
    setpriv --reuid=65534 --regid=65534 --clear-groups flock --exclusive --no-fork ${directory} sleep 1000 &
    holder=$!
    trap 'kill $holder' EXIT
    for ((i = 0; i < 100; i++)); do flock --nonblock ${directory} true || break; sleep 0.1; done
    if flock --nonblock ${directory} true; then echo 'nobody holds it'; exit 1; fi
    ${script}`)

/**
 * Makes a device as an administrator does, and waits for udev. Prints how long that takes, and where the
 * device's name leads.
 */
const create = (seconds: number) => `
    before=$(date +%s%N)
    timeout ${seconds} dmsetup create locked --table '0 2048 zero' || echo late
    echo $((($(date +%s%N) - before) / 1000000))
    readlink /dev/mapper/locked || echo no link
    dm=dm-$(dmsetup info -c --noheadings -o minor locked)
    echo $(cat /sys/block/$dm/diskseq)/$dm`

/** Removes the device as soon as udev has released it. */
const REMOVE = `
    udevadm settle
    for ((i = 0; i < 60; i++)); do dmsetup remove --retry locked && break; sleep 1; done
    udevadm settle`

async function mapper(t: Test, vm: Vm): Promise<void> {
  const [ms, link, path] = (await whileHeld(vm, '/dev/mapper', create(TIME_LIMIT_S))).trim().split('\n')
  t.equal(link, `/dev/disk/by-diskseq/.dm/${path}`, `its name leads into the tree, after ${ms} ms`)
  note(t, `dmsetup create while user nobody has locked /dev/mapper: ${ms} ms`)
  await vm.run(REMOVE)
}

/** With the lock on the directory, and no time limit. */
async function twin(t: Test, vm: Vm): Promise<void> {
  const program = twinLink(
    t,
    ['open(LOCK, O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600)', 'open("/dev/mapper", O_RDONLY | O_DIRECTORY | O_CLOEXEC)'],
    ['!S_ISREG(file.st_mode) || file.st_uid != 0 || (file.st_mode & 077)', '0'],
    ['setitimer(ITIMER_REAL, &limit, NULL);', ''],
  )
  copyFileSync(program, join(vm.share, 'diskseqfs-link'))
  const installed = '/usr/lib/udev/diskseqfs-link'
  await vm.run(`cp -p ${installed} ${installed}.aside; install -m 755 /share/diskseqfs-link ${installed}`)
  try {
    t.match(
      await whileHeld(vm, '/dev/mapper', create(WAITS_S)),
      /^late\n/,
      'twin: with its lock on the directory, udev waits, and so does dmsetup',
    )
  } finally {
    // The event goes on when the lock is released.
    await vm.run(`mv ${installed}.aside ${installed}; ${REMOVE}`)
  }
}

/** Stops and starts the service while the user holds all locks that it might want. */
async function service(t: Test, vm: Vm): Promise<void> {
  const said = await whileHeld(
    vm,
    '/dev/mapper',
    `timeout ${TIME_LIMIT_S} systemctl stop diskseqfs && systemctl show -P Result diskseqfs
    findmnt -n /dev/disk/by-diskseq || echo no mount`,
  )
  t.equal(said, 'success\nno mount\n', 'the service stops')
  await vm.run('udevadm settle')
  t.strictSame((await links(vm)).tree, [], 'names lead to the device nodes')
  const opens = await vm.attempt("setpriv --reuid=65534 --regid=65534 --clear-groups sh -c 'exec 9</dev/disk/by-diskseq'")
  t.match(opens.output, /Permission denied/, 'the user cannot open the mount point of the tree')
  t.equal(await vm.run('systemctl start diskseqfs; systemctl is-active diskseqfs'), 'active\n', 'the service starts')
  await vm.run('udevadm settle')
  const { tree, stock, wrong } = await links(vm)
  t.ok(tree.length > 5, 'names lead into the tree')
  t.strictSame({ stock, wrong }, { stock: [], wrong: [] })
}

export const locks: Case = {
  name: 'locks held by nobody',
  shortOn: 'bookworm',
  async run(t, vm) {
    await mapper(t, vm)
    await twin(t, vm)
    await service(t, vm)
  },
}
