// SPDX-License-Identifier: MIT
/** What the control socket costs: many files attached at once, and a look at the daemon's status. */
import { closeSync, openSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { Client, findControlSocket } from '../src/broker/client.js'
import { helper, median, QUICK, temporary } from './common.js'

export const AT_ONCE = 64
const ROUNDS = QUICK ? 3 : 9

export interface AtOnce {
  /** Each by a connection of its own, of one client, ms. */
  readonly ours: number
  /** One after another, by one thread of a program in C, ms. */
  readonly bare: number
}

/** Files that become disks at the same time. */
export async function attachMany(mountpoint: string): Promise<AtOnce> {
  const directory = temporary('attach')
  const files = Array.from({ length: AT_ONCE }, (_, i) => {
    const file = join(directory, `disk${i}.img`)
    writeFileSync(file, '')
    truncateSync(file, 1 << 20)
    return file
  })
  const socket = findControlSocket(mountpoint)
  const ours: number[] = []
  const bare: number[] = []
  for (let i = 0; i < ROUNDS; i++) {
    const fds = files.map((file) => openSync(file, 'r+'))
    let began = performance.now()
    const clients = await Promise.all(fds.map(() => Client.connect(socket)))
    await Promise.all(clients.map((client, n) => client.call('io.diskseqfs.Attach', { fileDescriptor: 0, rule: 'connection' }, [fds[n]!])))
    ours.push(performance.now() - began)
    for (const client of clients) client.close()
    for (const fd of fds) closeSync(fd)
    began = performance.now()
    const { end } = await helper('loops', String(AT_ONCE), files[0]!, 'writable')
    bare.push(performance.now() - began)
    await end()
  }
  return { ours: median(ours), bare: median(bare) }
}

const CALLS = 300
/** Of /proc/PID/stat, a second. */
const TICKS = 100

/** Processor time of the daemon for a reply to Status, us. */
export async function statusCost(pid: number, mountpoint: string): Promise<number> {
  const client = await Client.connect(findControlSocket(mountpoint))
  const spent = () => {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1')
    const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
    return ((Number(fields[11]) + Number(fields[12])) * 1e6) / TICKS
  }
  try {
    await client.call('io.diskseqfs.Status')
    const before = spent()
    for (let i = 0; i < CALLS; i++) await client.call('io.diskseqfs.Status')
    return (spent() - before) / CALLS
  } finally {
    client.close()
  }
}
