// SPDX-License-Identifier: MIT
/** Leases under systemd: the control socket as varlinkctl(1) sees it, and disks that outlive the daemon, its guard, and the package. */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../findings.js'
import type { Vm } from '../vm.js'

const SOCKET = '/run/diskseqfs/io.diskseqfs'

interface Lease {
  readonly lease: string
  readonly name: string
  readonly kernelName: string
}

const leases = async (vm: Vm): Promise<Lease[]> => (JSON.parse(await vm.run('diskseqfs leases --json')) as { leases: Lease[] }).leases

/** Whether loop devices are bound to the file, as the kernel has it. */
const bound = (vm: Vm) => vm.run('udevadm settle; losetup --noheadings --output NAME --associated /root/lent.img')

async function varlinkctl(t: Test, vm: Vm, lease: Lease): Promise<void> {
  const { output } = await vm.attempt('command -v varlinkctl')
  if (!output.includes('varlinkctl')) return note(t, 'varlinkctl: not in this release')
  t.match(await vm.run(`varlinkctl info ${SOCKET}`), /Vendor: diskseqfs\n.*Interfaces: io\.diskseqfs\n/s)
  const shown = await vm.run(`varlinkctl introspect ${SOCKET} io.diskseqfs`)
  for (const method of ['Attach', 'Release', 'ListLeases', 'Status', 'ListPins']) t.match(shown, new RegExp(`^method ${method}\\(`, 'm'))
  const reply = JSON.parse(await vm.run(`varlinkctl call --json=short ${SOCKET} io.diskseqfs.ListLeases '{}'`)) as { leases: Lease[] }
  t.match(reply.leases, [lease])
  const refused = await vm.attempt(`varlinkctl call ${SOCKET} io.diskseqfs.Release '{"what":"lease-00000000"}'`)
  t.match(refused.output, /io\.diskseqfs\.NoSuchLease/)
}

/** How many descriptors the service manager stores under names of leases. */
const stored = async (vm: Vm): Promise<number> => {
  const { output } = await vm.attempt("systemd-analyze fdstore diskseqfs.service --no-legend 2>/dev/null | grep -c '^lease-'")
  return Number(output.trim())
}

export const leasesCase: Case = {
  name: 'leases',
  shortOn: 'trixie',
  async run(t, vm) {
    await vm.run('truncate -s 8M /root/lent.img; echo lent >/tmp/lent; dd if=/tmp/lent of=/root/lent.img conv=notrunc status=none')
    const path = (await vm.run('diskseqfs attach --keep --reason "a guest" /root/lent.img')).trim()
    t.equal(await vm.run(`head -c5 ${path}`), 'lent\n')
    const [lease] = (await leases(vm)) as [Lease]
    t.equal(path, `/dev/disk/by-diskseq/${lease.name}`)
    await varlinkctl(t, vm, lease)
    // Anything that comes between, and what the next daemon must have.
    const daemon = 'systemctl show -P StatusText diskseqfs | grep -o "daemon [0-9]*" | cut -d" " -f2'
    for (const [what, command] of [
      ['systemctl restart', 'systemctl restart diskseqfs'],
      ['SIGKILL of the daemon', `kill -KILL $(${daemon})`],
      ['SIGKILL of the guard', 'kill -KILL $(systemctl show -P MainPID diskseqfs)'],
      ['SIGKILL of both', `kill -KILL $(${daemon}) $(systemctl show -P MainPID diskseqfs)`],
      ['an upgrade of the package', 'dpkg -i /share/diskseqfs.deb'],
    ] as const) {
      await vm.run(`${command}; for i in $(seq 100); do diskseqfs status >/dev/null 2>&1 && break; sleep 0.3; done`)
      t.match(await leases(vm), [lease], what)
      t.equal(await vm.run(`head -c5 ${path}`), 'lent\n')
    }
    t.equal(await bound(vm), `/dev/${lease.kernelName}\n`)
    t.equal(await vm.run(`diskseqfs detach ${lease.name} && diskseqfs leases`), '')
    t.equal(await bound(vm), '', 'nothing holds it any more')
    t.equal(await stored(vm), 0, 'nor does the service manager')
    const until = 'for i in $(seq 100); do losetup --noheadings --associated /root/lent.img | grep -q . || break; sleep 0.3; done'
    await vm.run('diskseqfs attach --keep /root/lent.img')
    await vm.run(`systemctl stop diskseqfs; ${until}`)
    t.equal(await bound(vm), '', 'it ends with the service')
    await vm.run('systemctl start diskseqfs; udevadm settle; rm /root/lent.img /tmp/lent')
  },
}
