// SPDX-License-Identifier: MIT
/**
 * No daemon can be started for minutes, as after an upgrade that went wrong, while file systems are
 * mounted by names that lead into the tree. The guard is restarted meanwhile. The service manager
 * looks at the tree whenever something is mounted, and only the guard answers it.
 */
import type { Test } from 'tap'

import { type Case, SHORT } from '../case.js'
import { links, LEFT_ALONE } from '../links.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'
import { DAEMON } from './restart.js'

/** How long that lasts; a guard waits a minute for a daemon before it removes the mount. */
const AWAY_S = SHORT ? 70 : 120
/** A service manager that takes longer than this counts as not answering. */
const BLOCKED_S = 20
/** How much longer it may take than it needs by itself. */
const ANSWER_MS = 1000

/**
 * Once a second something is mounted, and the service manager gets a question. Prints how long its
 * slowest answer took, in ms.
 */
const ASK = `
  ask() {
    local longest=0 end=$((SECONDS + $1)) began took
    mkdir -p /run/mounted
    while ((SECONDS < end)); do
      mount -t tmpfs absence /run/mounted
      umount /run/mounted
      began=$(date +%s%N)
      timeout ${BLOCKED_S} systemctl show -P SubState systemd-udevd.service >/dev/null || true
      took=$((($(date +%s%N) - began) / 1000000))
      ((took > longest)) && longest=$took
      sleep 1
    done
    rmdir /run/mounted
    echo $longest
  }
  # Until nothing leads into the tree any more, or something does again.
  leads() {
    local n
    for ((n = 0; n < 1200; n++)); do
      case $1-$(readlink /dev/mapper/vm-srv) in
      there-/dev/disk/by-diskseq/* | elsewhere-../*) return ;;
      esac
      sleep 0.1
    done
    return 1
  }`

/** Until the script ends there is no daemon, and none can start. */
const AWAY = `
    node=$(readlink -f "$(command -v node)")
    mv $node $node.away
    trap 'mv $node.away $node' EXIT
    kill -KILL $(${DAEMON})`

async function away(t: Test, vm: Vm): Promise<void> {
  // What udev does when the names become stock again costs the service manager time as well.
  const usual = Number(await vm.run(`${ASK}; udevadm trigger --subsystem-match=block; ask ${SHORT ? 10 : 20}; udevadm settle`))
  const slowest = vm.start(`${ASK}; until [ -e /run/absent ]; do sleep 0.1; done; ask ${AWAY_S}; touch /run/asked`)
  const outcome = await vm.run(
    `
    ${ASK}
    ${AWAY}
    touch /run/absent
    { dd if=/dev/mapper/vm-srv of=/dev/null count=1 status=none 2>&1 || true; } | sed 's/.*: //' >/run/waiter & waiter=$!
    sleep 10
    guard=$(systemctl show -P MainPID diskseqfs)
    timeout 60 systemctl restart diskseqfs
    [ $(systemctl show -P MainPID diskseqfs) != $guard ] && echo another guard
    : >/srv/written
    wait $waiter
    cat /run/waiter
    leads elsewhere && echo stock names
    findmnt -n /dev/disk/by-diskseq || echo no mount
    dd if=/dev/mapper/vm-srv of=/dev/null count=1 status=none
    systemctl is-active diskseqfs
    until [ -e /run/asked ]; do sleep 0.2; done
    for link in /dev/mapper/*; do case $(readlink $link) in /dev/disk/by-diskseq/*) echo $link leads into no tree ;; esac; done
    rm /run/absent /run/asked /run/waiter /srv/written`,
    (AWAY_S + 300) * 1000,
  )
  const longest = Number((await slowest.ended()).output)
  // The second message is for a name that the kernel has: it asks once more.
  t.match(
    outcome,
    /^another guard\n(Software caused connection abort|Transport endpoint is not connected)\nstock names\nno mount\nactive\n$/,
    'the guard is restarted without a daemon, a caller that waits gets an error in the end, and all names lead to the bare devices',
  )
  t.ok(longest < usual + ANSWER_MS, `the service manager answered in ${longest} ms, otherwise it needs ${usual}`)
  note(t, `no Node.js for ${AWAY_S} s: the service manager answered in ${longest} ms (${usual} with it)`)
  await vm.run(`${ASK}; leads there; udevadm settle --timeout=300`, 300_000)
}

/** The guard makes the service manager wait like any other process. */
async function twin(t: Test, vm: Vm): Promise<void> {
  await vm.run(`
    sed 's|diskseqfs-guard |&-m 4 |' /usr/lib/systemd/system/diskseqfs.service >/run/systemd/system/diskseqfs.service
    systemctl daemon-reload
    systemctl restart diskseqfs
    for ((i = 0; i < 600; i++)); do
      [ "$(ps -o ppid= -p "$(${DAEMON})")" -eq "$(systemctl show -P MainPID diskseqfs)" ] && exit
      sleep 0.1
    done
    exit 1`)
  try {
    const longest = await vm.run(
      `
      ${ASK}
      ${AWAY}
      ask 10
      leads elsewhere`,
      300_000,
    )
    t.ok(
      Number(longest) > 10 * ANSWER_MS,
      `twin: a service manager that waits like any other process has not answered for ${longest.trim()} ms`,
    )
  } finally {
    await vm.run(
      `${ASK}; rm /run/systemd/system/diskseqfs.service; systemctl daemon-reload; systemctl restart diskseqfs; leads there; udevadm settle --timeout=300`,
      300_000,
    )
  }
}

export const absence: Case = {
  name: 'absence: no Node.js for minutes, the guard restarted meanwhile',
  shortOn: 'none',
  async run(t, vm) {
    await away(t, vm)
    if (!SHORT) await twin(t, vm)
    const { tree, stock, left, wrong } = await links(vm)
    t.ok(tree.length > 5, `${tree.length} links into the tree, by themselves`)
    t.strictSame({ stock, left, wrong }, { stock: [], left: LEFT_ALONE, wrong: [] }, 'and no others')
  },
}
