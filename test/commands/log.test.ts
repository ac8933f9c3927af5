// SPDX-License-Identifier: MIT
/** Logging: what a line says, and that no reader of the log can hold up or end the program. */
import { spawn } from 'node:child_process'
import { closeSync, openSync } from 'node:fs'
import { join } from 'node:path'

import t from 'tap'

import { createLogger, type LogFormat, LogLimit } from '../../src/util/log.js'
import { ROOT } from '../helpers/root.js'
import { sleep, until } from '../helpers/tree.js'

/** For a program that ends by itself. */
const TIME_LIMIT_MS = 8000

/** Runs a program that has `logger` and `flush`, with the given stderr. */
function child(format: LogFormat, body: string, stderr: 'pipe' | 'ignore' | number) {
  const url = JSON.stringify(join(ROOT, 'build/src/util/log.js'))
  const script = `
    const { createLogger } = await import(${url})
    const { logger, flush } = await createLogger('info', { kind: 'stderr', format: '${format}' })
    const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
    ${body}`
  const process_ = spawn(process.execPath, ['--input-type=module', '-e', script], { stdio: ['ignore', 'pipe', stderr] })
  let stdout = ''
  process_.stdout?.on('data', (chunk: Buffer) => (stdout += chunk.toString()))
  t.teardown(() => process_.kill('SIGKILL'))
  const closed = new Promise<number | string | null>((resolve) => process_.on('close', (code, signal) => resolve(code ?? signal)))
  const late = new AbortController()
  const ended = Promise.race([
    closed.finally(() => late.abort()),
    sleep(TIME_LIMIT_MS, 'it did not end', { signal: late.signal }).catch(() => closed),
  ])
  return { process: process_, stdout: () => stdout, ended }
}

const LOG_AND_GO_ON = `
  for (let i = 0; i < 100; i++) {
    logger.error({ i }, 'a line')
    await sleep(1)
  }
  await flush()
  console.log('still here')`

for (const format of ['json', 'pretty', 'journal'] as const) {
  t.test(`${format}: lines arrive, one for each event`, async (t) => {
    const { process, stdout, ended } = child(
      format,
      `logger.debug('not this'); logger.warn({ diskseq: '13p1', tid: 7 }, 'refused an open'); logger.info('next'); await flush(); console.log('x')`,
      'pipe',
    )
    let text = ''
    process.stderr?.on('data', (chunk: Buffer) => (text += chunk.toString()))
    t.equal(await ended, 0)
    t.equal(stdout(), 'x\n')
    const lines = text.trimEnd().split('\n')
    t.equal(lines.length, 2, text)
    if (format === 'json') {
      const [first, second] = lines.map((line) => JSON.parse(line) as Record<string, unknown>)
      t.match(first, { level: 'warn', diskseq: '13p1', tid: 7, msg: 'refused an open', time: /^\d{4}-\d\d-\d\dT/ })
      t.strictSame(Object.keys(first as object).sort(), ['diskseq', 'level', 'msg', 'tid', 'time'])
      t.match(second, { level: 'info', msg: 'next' })
    } else if (format === 'journal') {
      t.strictSame(lines, ['<4>refused an open diskseq=13p1 tid=7', '<6>next'], 'with the priority in front')
    } else {
      t.match(lines[0], /WARN.*refused an open.*13p1/)
      t.match(lines[1], /INFO.*next/)
      t.notMatch(text, '\u001b', 'without colours, as stderr is no terminal')
    }
  })

  t.test(`${format}: a reader that is gone does not end the program`, async (t) => {
    const { process, stdout, ended } = child(format, LOG_AND_GO_ON, 'pipe')
    process.stderr?.destroy()
    t.equal(await ended, 0)
    t.equal(stdout(), 'still here\n')
  })

  t.test(`${format}: a full disk does not end the program`, async (t) => {
    const full = openSync('/dev/full', 'w')
    const { stdout, ended } = child(format, LOG_AND_GO_ON, full)
    closeSync(full)
    t.equal(await ended, 0)
    t.equal(stdout(), 'still here\n')
  })

  t.test(`${format}: a stderr that may not be written to does not end the program`, async (t) => {
    const readable = openSync('/dev/null', 'r')
    const { stdout, ended } = child(format, LOG_AND_GO_ON, readable)
    closeSync(readable)
    t.equal(await ended, 0)
    t.equal(stdout(), 'still here\n')
  })

  t.test(`${format}: a reader that is stuck delays neither the program nor its end, and costs little memory`, async (t) => {
    const { process, stdout, ended } = child(
      format,
      `
      const before = globalThis.process.memoryUsage.rss()
      let late = 0
      for (let i = 0; i < 300; i++) {
        const start = performance.now()
        for (let j = 0; j < 20; j++) logger.error({ i }, 'x'.repeat(5000))
        await sleep(0)
        late = Math.max(late, performance.now() - start)
      }
      console.log(JSON.stringify({ late, mib: (globalThis.process.memoryUsage.rss() - before) / 1048576 }))
      const start = performance.now()
      await flush()
      console.log(JSON.stringify({ flush: performance.now() - start }))
      globalThis.process.exit(0)`,
      'pipe',
    )
    process.stderr?.pause()
    const outcome = await ended
    const [work, flush] = stdout()
      .split('\n')
      .filter(Boolean)
      .map((line) => JSON.parse(line) as Record<string, number>)
    t.ok((work?.['late'] as number) < 1000, `a turn took ${Math.round(work?.['late'] as number)} ms at most`)
    t.ok((work?.['mib'] as number) < 30, `${Math.round(work?.['mib'] as number)} MiB for 30 MB of lines`)
    t.ok((flush?.['flush'] as number) < 2000, `flush ended after ${Math.round(flush?.['flush'] as number)} ms`)
    t.equal(outcome, 0)
  })
}

t.test('after a flush all lines have been written', async (t) => {
  const { process, ended } = child(
    'json',
    `for (let i = 0; i < 2000; i++) logger.info({ i }, 'x'.repeat(100)); await flush(); globalThis.process.kill(globalThis.process.pid, 'SIGKILL')`,
    'pipe',
  )
  let text = ''
  process.stderr?.on('data', (chunk: Buffer) => (text += chunk.toString()))
  t.equal(await ended, 'SIGKILL')
  t.equal(text.split('\n').length - 1, 2000)
})

/** A syslog for the test. A negative result stands for a daemon that does not run. */
function fakeSyslog() {
  const lines: string[] = []
  const state = { open: 9, send: [] as number[], opened: [] as string[], closed: [] as number[] }
  const native = {
    datagramOpen(path: string) {
      state.opened.push(path)
      return state.open
    },
    datagramSend(_: number, line: string) {
      const result = state.send.shift() ?? line.length
      if (result >= 0) lines.push(line)
      return result
    },
    close: (fd: number) => (state.closed.push(fd), 0),
  }
  return { lines, state, native }
}

t.test('syslog: priority, tag, message, and fields', async (t) => {
  const { lines, state, native } = fakeSyslog()
  const { logger, flush } = await createLogger('trace', { kind: 'syslog', native })
  logger.fatal('fatal')
  logger.error({ errno: 'EIO' }, 'error')
  logger.warn({ diskseq: '13p1', tid: 7, uid: 0 }, 'warn')
  logger.info('info')
  logger.debug({ list: ['a', 1], flag: true, nothing: null }, 'debug')
  logger.trace('trace')
  await flush()
  const tag = `diskseqfs[${process.pid}]:`
  t.strictSame(lines, [
    `<26>${tag} fatal`,
    `<27>${tag} error errno=EIO`,
    `<28>${tag} warn diskseq=13p1 tid=7 uid=0`,
    `<30>${tag} info`,
    `<31>${tag} debug list=["a",1] flag=true nothing=null`,
    `<31>${tag} trace`,
  ])
  t.strictSame(state.opened, ['/dev/log'], 'through one socket')
})

t.test('syslog: only lines that the level lets through', async (t) => {
  const { lines, native } = fakeSyslog()
  const { logger } = await createLogger('warn', { kind: 'syslog', native })
  logger.info('info')
  logger.warn('warn')
  t.equal(lines.length, 1)
})

t.test('syslog: a daemon that was restarted gets the line', async (t) => {
  const { lines, state, native } = fakeSyslog()
  const { logger } = await createLogger('info', { kind: 'syslog', native })
  logger.info('first')
  state.send.push(-111)
  logger.info('second')
  t.match(lines, [/first$/, /second$/])
  t.equal(state.opened.length, 2)
  t.strictSame(state.closed, [9])
})

t.test('syslog: without a daemon the line is lost, and no descriptor leaks', async (t) => {
  const { lines, state, native } = fakeSyslog()
  const { logger } = await createLogger('info', { kind: 'syslog', native })
  state.open = -2
  logger.info('lost')
  t.strictSame(lines, [])
  t.strictSame(state.closed, [])
  state.open = 9
  state.send.push(-11, -11)
  logger.info('lost, too')
  t.strictSame(lines, [])
  t.equal(state.closed.length, 2)
  logger.info('back')
  t.match(lines, [/back$/])
})

t.test('a limit lets a burst through, and says how many it left out', async (t) => {
  const reports: number[] = []
  const limit = new LogLimit((suppressed) => reports.push(suppressed), 3)
  const taken = Array.from({ length: 10 }, () => limit.take())
  t.strictSame(taken, [true, true, true, false, false, false, false, false, false, false])
  t.strictSame(reports, [])
  const start = performance.now()
  // The limit's own timer does not keep the process alive, so that of until() must.
  await until(() => reports.length > 0, 3000)
  t.ok(performance.now() - start > 800, 'after a second')
  t.strictSame(reports, [7])
  t.equal(limit.take(), true, 'the next burst is let through')
  await sleep(1100)
  t.strictSame(reports, [7], 'nothing of the next burst was left out')
})

t.test('a limit that left out nothing reports nothing', async (t) => {
  const reports: number[] = []
  const limit = new LogLimit((suppressed) => reports.push(suppressed), 2)
  limit.take()
  limit.take()
  await sleep(1100)
  t.strictSame(reports, [])
  t.strictSame([limit.take(), limit.take(), limit.take()], [true, true, false])
})

t.test('a limit keeps no process alive', async (t) => {
  const timers = () => process.getActiveResourcesInfo().filter((kind) => kind === 'Timeout').length
  const before = timers()
  new LogLimit(() => {}).take()
  t.equal(timers(), before)
})
