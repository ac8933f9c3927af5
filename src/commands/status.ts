// SPDX-License-Identifier: MIT
/** `diskseqfs status`: what the daemon has done since its start, and has to do now. */
import { printable, toJson } from '../util/text.js'
import { ask } from './ask.js'
import type { StatusArguments } from './options.js'

type Counts = Readonly<Record<string, number>>

/** As in the interface file. */
interface Status {
  readonly version: string
  readonly pid: number
  readonly mountpoint: string
  readonly uptimeUSec: number
  readonly tookOver: boolean
  readonly now: Counts
  readonly requests: Counts
  readonly answers: Counts
  readonly refusals: Counts
  readonly times: {
    readonly count: number
    readonly sumUSec: number
    readonly p50USec?: number
    readonly p99USec?: number
    readonly buckets: readonly number[]
  }
  readonly uevents: Counts
  readonly pins: readonly { readonly name: string; readonly callers: number; readonly idleUSec?: number; readonly why: string }[]
}

export async function status({ tree, json, prometheus }: StatusArguments): Promise<void> {
  const found = (await ask(tree, 'Status')) as unknown as Status
  process.stdout.write(json === true ? toJson(found) : prometheus === true ? metrics(found) : summary(found))
}

function summary({
  version,
  pid,
  mountpoint,
  uptimeUSec,
  tookOver,
  now,
  requests,
  answers,
  refusals,
  times,
  uevents,
  pins,
}: Status): string {
  const list = (counts: Counts) =>
    Object.entries(counts)
      .map(([what, count]) => `${printable(what)} ${count}`)
      .join(', ') || 'none'
  const reasons: Readonly<Record<string, string>> = {
    request: 'a request is under way',
    caller: 'a program may be about to open it',
    goes_on: 'a program goes on by another name of it',
    unseen: 'a program cannot be seen',
    linger: 'for a moment',
    ending: 'it ends',
  }
  return [
    `${printable(mountpoint)}: version ${version}, process ${pid}, for ${Math.round(uptimeUSec / 1e6)} s${tookOver ? ', taken over from another daemon' : ''}`,
    `now: ${list(now)}`,
    `requests: ${list(requests)}`,
    `answers: ${list(answers)}`,
    `refused opens: ${list(refusals)}`,
    `answered within: ${times.count === 0 ? 'nothing was asked' : `${times.p50USec} us (half), ${times.p99USec} us (99 %)`}`,
    `uevents: ${list(uevents)}`,
    ...pins.map(({ name, callers, why }) => `pin ${name}: ${reasons[why] ?? why}${callers > 0 ? ` (${callers})` : ''}`),
    '',
  ].join('\n')
}

/** The text format of Prometheus, for node_exporter's textfile collector. */
function metrics({ version, mountpoint, uptimeUSec, now, requests, answers, refusals, times, uevents }: Status): string {
  const lines: string[] = []
  const tree = { mountpoint }
  const metric = (
    name: string,
    type: 'counter' | 'gauge' | 'histogram',
    help: string,
    values: Iterable<readonly [object, number, string?]>,
  ) => {
    lines.push(`# HELP diskseqfs_${name} ${help}`, `# TYPE diskseqfs_${name} ${type}`)
    for (const [labels, value, suffix = ''] of values) lines.push(`diskseqfs_${name}${suffix}${labelled({ ...tree, ...labels })} ${value}`)
  }
  const by = (label: string, counts: Counts) => Object.entries(counts).map(([key, count]) => [{ [label]: key }, count] as const)
  metric('info', 'gauge', 'Version of the daemon.', [[{ version }, 1]])
  metric('uptime_seconds', 'gauge', 'Time since the daemon started.', [[{}, uptimeUSec / 1e6]])
  for (const [what, count] of Object.entries(now)) metric(what, 'gauge', `Number of ${what} now.`, [[{}, count]])
  metric('requests_total', 'counter', 'Requests of the kernel.', by('request', requests))
  metric('answers_total', 'counter', 'Answers to requests, by errno.', by('errno', answers))
  metric('refused_opens_total', 'counter', 'Opens that were refused, by the reason.', by('reason', refusals))
  metric('uevents_total', 'counter', 'Uevents of block devices.', [[{}, uevents['received'] ?? 0]])
  metric('uevent_losses_total', 'counter', 'How often uevents were lost, and all devices read again.', [[{}, uevents['losses'] ?? 0]])
  let sum = 0
  metric('answer_seconds', 'histogram', 'Time until a program that looks at a name or opens it has its answer.', [
    ...times.buckets.map(
      (count, i) => [{ le: i === times.buckets.length - 1 ? '+Inf' : 2 ** i / 1e6 }, (sum += count), '_bucket'] as const,
    ),
    [{}, times.sumUSec / 1e6, '_sum'],
    [{}, times.count, '_count'],
  ])
  return `${lines.join('\n')}\n`
}

function labelled(labels: object): string {
  const escaped = (value: unknown) => String(value).replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n')
  return `{${Object.entries(labels)
    .map(([name, value]) => `${name}="${escaped(value)}"`)
    .join(',')}}`
}
