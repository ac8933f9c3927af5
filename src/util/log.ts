// SPDX-License-Identifier: MIT
/**
 * Logging: one line for each event an admin needs, by pino. Nothing here may
 * hold up the tree: lines are written without waiting, and when the reader is
 * stuck or the disk is full they are dropped.
 */
import { fstatSync } from 'node:fs'

import pino from 'pino'

import type { Native } from '../native.js'

export type LogLevel = 'fatal' | 'error' | 'warn' | 'info' | 'debug' | 'trace' | 'silent'
export const LOG_LEVELS: readonly LogLevel[] = ['fatal', 'error', 'warn', 'info', 'debug', 'trace', 'silent']
/** `journal` is text with the `<N>` in front from which systemd takes the priority, sd-daemon(3). */
export type LogFormat = 'pretty' | 'json' | 'journal'
export const LOG_FORMATS: readonly LogFormat[] = ['pretty', 'json', 'journal']

export type Logger = Pick<pino.Logger, 'error' | 'warn' | 'info' | 'debug'> & Partial<Pick<pino.Logger, 'trace' | 'isLevelEnabled'>>

/** Bytes of log that may wait for a slow reader. */
const BACKLOG_MAX = 1024 * 1024
/** How long the end of the program waits for the reader of the log, ms. */
const FLUSH_MS = 500

/** Where log lines go. */
export type LogTarget =
  | { readonly kind: 'stderr'; readonly format: LogFormat }
  | { readonly kind: 'syslog'; readonly native: Pick<Native, 'datagramOpen' | 'datagramSend' | 'close'> }

const SYSLOG_SOCKET = '/dev/log'
/** LOG_DAEMON, syslog.h */
const FACILITY = 3 << 3
/** Severities of syslog.h for pino's levels. */
function severity(level: number): number {
  if (level >= 60) return 2
  if (level >= 50) return 3
  if (level >= 40) return 4
  return level >= 30 ? 6 : 7
}

/** The format for a stderr that nothing was said about. */
export function defaultFormat(): LogFormat {
  if (process.stderr.isTTY) return 'pretty'
  const { dev, ino } = fstatSync(2)
  return process.env['JOURNAL_STREAM'] === `${dev}:${ino}` ? 'journal' : 'json'
}

export interface Log {
  readonly logger: pino.Logger
  /** Resolves when everything is written, or the reader does not take it. */
  flush(): Promise<void>
}

export async function createLogger(level: LogLevel, target: LogTarget): Promise<Log> {
  const options: pino.LoggerOptions = { level, base: null }
  if (target.kind === 'syslog') {
    const stream = syslogStream(target.native)
    return { logger: pino({ ...options, timestamp: false }, stream), flush: async () => {} }
  }
  const stderr = pino.destination({ dest: 2, sync: false, minLength: 1, maxLength: BACKLOG_MAX })
  // A closed or full stderr costs the log, not the tree.
  stderr.on('error', () => {})
  // pino's hook at exit would try for ever if the reader takes nothing.
  stderr.flushSync = () => {}
  const flush = () =>
    new Promise<void>((resolve) => {
      const done = () => {
        clearTimeout(late)
        resolve()
      }
      const late = setTimeout(done, FLUSH_MS)
      stderr.flush(done)
    })
  if (target.format === 'json') {
    const json: pino.LoggerOptions = {
      ...options,
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
    }
    return { logger: pino(json, stderr), flush }
  }
  if (target.format === 'journal') {
    const write = (json: string) => {
      const { level, text } = plain(json)
      stderr.write(`<${severity(level)}>${text}\n`)
    }
    return { logger: pino({ ...options, timestamp: false }, { write }), flush }
  }
  const pretty = (await import('pino-pretty')).default.prettyFactory({
    colorize: process.stderr.isTTY === true,
    translateTime: 'SYS:HH:MM:ss.l',
    singleLine: true,
  })
  return { logger: pino(options, { write: (line: string) => stderr.write(pretty(line)) }), flush }
}

/** A line as pino writes it, in the words of a system log. */
function plain(json: string): { level: number; text: string } {
  const { level, msg, ...fields } = JSON.parse(json) as Record<string, unknown>
  const details = Object.entries(fields)
    .map(([key, value]) => ` ${key}=${typeof value === 'string' ? value : JSON.stringify(value)}`)
    .join('')
  return { level: Number(level), text: String(msg) + details }
}

function syslogStream(native: Pick<Native, 'datagramOpen' | 'datagramSend' | 'close'>): pino.DestinationStream {
  let fd = -1
  return {
    write(line: string) {
      const { level, text: words } = plain(line)
      const text = `<${FACILITY | severity(level)}>diskseqfs[${process.pid}]: ${words}`
      for (let attempt = 0; attempt < 2; attempt++) {
        if (fd < 0) fd = native.datagramOpen(SYSLOG_SOCKET)
        if (fd < 0 || native.datagramSend(fd, text) >= 0) return
        // The log daemon was restarted: its old socket is dead.
        native.close(fd)
        fd = -1
      }
    },
  }
}

/**
 * Keeps one kind of line from flooding the log: `burst` lines a second, then
 * one line that says how many were left out.
 */
export class LogLimit {
  private left: number
  private suppressed = 0
  private timer: NodeJS.Timeout | undefined

  constructor(
    private readonly report: (suppressed: number) => void,
    private readonly burst = 10,
  ) {
    this.left = burst
  }

  /** Whether a line may be written now. */
  take(): boolean {
    this.timer ??= setTimeout(() => {
      this.timer = undefined
      this.left = this.burst
      if (this.suppressed > 0) this.report(this.suppressed)
      this.suppressed = 0
    }, 1000).unref()
    if (this.left > 0) {
      this.left--
      return true
    }
    this.suppressed++
    return false
  }
}
