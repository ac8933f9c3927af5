// SPDX-License-Identifier: MIT
/**
 * A virtual machine with a Debian release in it. Its disk is a copy-on-write layer over the image
 * that `test/vm/image` builds, and is discarded with the machine. Scripts run in it as root; files
 * go in and out through a shared directory.
 */
import { type ChildProcess, execFile, execFileSync, spawn } from 'node:child_process'
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { createConnection, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'

import { ROOT } from '../helpers/root.js'

export type Release = 'bookworm' | 'trixie' | 'forky'

const HERE = join(ROOT, 'test/vm')
/** Where the logs of a failed case go. */
export const LOGS = join(ROOT, 'build/vm/logs')

/** The Debian package that was built. */
export function packagePath(): string {
  const build = join(ROOT, 'build')
  const name = readdirSync(build).find((file) => /^diskseqfs_.*\.deb$/.test(file))
  if (name === undefined) throw new Error('no package in build/: run "make deb" before')
  return join(build, name)
}

/** Emulation is slow, and other work on the host makes it slower. */
const BOOT_TIMEOUT_MS = 600_000
const BOOT_TRIES = 4
const RUN_TIMEOUT_MS = 900_000

/** Of scripts that stop at the first failure. By itself udevadm waits for two minutes, which is not always enough on a busy host. */
const PRELUDE = `set -euo pipefail
udevadm() {
  local tries
  if [ "\${1-}" = settle ]; then
    for tries in 1 2 3 4; do command udevadm "$@" && return; done
  fi
  command udevadm "$@"
}`
const POWEROFF_TIMEOUT_MS = 120_000

export interface Outcome {
  readonly status: number
  /** stdout and stderr, in the order in which they came. */
  readonly output: string
}

/** A script that still runs. */
export interface Running {
  /** @throws after `timeoutMs` */
  ended(timeoutMs?: number): Promise<Outcome>
}

export class Vm {
  private child: ChildProcess | undefined
  private exited: Promise<unknown> = Promise.resolve()
  private agent: Socket | undefined
  private monitor: Monitor | undefined
  private scripts = 0
  private readonly waiting = new Map<number, (outcome: Outcome) => void>()
  private ready: (() => void) | undefined
  /** On the host; `/share` in the machine. */
  readonly share: string
  private readonly directory: string
  private kernel: string
  private initrd: string
  private readonly console: string
  /** Where in the log of its console the present boot begins, in bytes. */
  private consoleFrom = 0

  private constructor(
    readonly release: Release,
    image: string,
    private readonly devices: readonly string[],
  ) {
    this.directory = mkdtempSync(join(tmpdir(), `diskseqfs-vm-${release}-`))
    this.share = join(this.directory, 'share')
    mkdirSync(this.share)
    mkdirSync(LOGS, { recursive: true })
    this.console = join(LOGS, `${release}.console`)
    this.kernel = join(image, 'vmlinuz')
    this.initrd = join(image, 'initrd.img')
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', join(image, 'disk.img'), this.disk])
    rmSync(this.console, { force: true })
  }

  /**
   * Builds the image, if it is not there, and a machine that is still off.
   * @param devices more options for QEMU
   */
  static async create(release: Release, devices: readonly string[] = []): Promise<Vm> {
    const { stdout } = await promisify(execFile)(join(HERE, 'image'), [release], { maxBuffer: 1 << 26 })
    return new Vm(release, stdout.trim(), devices)
  }

  private get disk(): string {
    return join(this.directory, 'disk.qcow2')
  }

  /**
   * Switches it on and waits until it runs scripts. Now and then the emulated processor runs the breakpoint by which
   * the kernel changes its own code (int3), and the kernel panics. Then it is switched on again.
   * @param append more of the kernel's command line
   */
  async boot(append = ''): Promise<void> {
    for (let attempt = 1; ; attempt++) {
      this.consoleFrom = existsSync(this.console) ? statSync(this.console).size : 0
      try {
        return await this.switchOn(append)
      } catch (error) {
        if (attempt === BOOT_TRIES || !/Oops: int3[^]*Kernel panic/.test(this.printed())) throw error
      }
    }
  }

  private async switchOn(append: string): Promise<void> {
    const socket = join(this.directory, 'agent')
    const qmp = join(this.directory, 'qmp')
    for (const path of [socket, qmp]) rmSync(path, { force: true })
    const log = openSync(this.console, 'a')
    const child = spawn(
      join(HERE, 'qemu'),
      [
        this.kernel,
        this.initrd,
        this.share,
        `root=/dev/mapper/vm-root rw ${append}`,
        ...['-drive', `file=${this.disk},format=qcow2,if=virtio,cache=unsafe`],
        ...['-chardev', `socket,id=agent,path=${socket},server=on,wait=off`, '-serial', 'chardev:agent'],
        ...['-qmp', `unix:${qmp},server=on,wait=off`],
        ...this.devices,
      ],
      { stdio: ['ignore', log, log] },
    )
    closeSync(log)
    this.child = child
    this.exited = new Promise((resolve) => child.on('close', resolve))
    const started = this.started()
    for (let i = 0; !existsSync(socket) || !existsSync(qmp); i++) {
      if (i === 100 || child.exitCode !== null) throw new Error(`QEMU does not start: ${this.tail()}`)
      await sleep(100)
    }
    this.agent = createConnection(socket)
    lines(this.agent, (line) => this.heard(line))
    this.monitor = new Monitor(qmp)
    await this.until(started)
  }

  /** Restarts the user space with the kernel that runs, and waits until it runs scripts again. */
  async softReboot(): Promise<void> {
    const started = this.started()
    this.start('systemctl soft-reboot')
    await this.until(started)
  }

  /** Resolves the next time that the agent in the machine says that it is ready. */
  private started(): Promise<void> {
    return new Promise((resolve) => (this.ready = resolve))
  }

  private async until(started: Promise<void>): Promise<void> {
    const outcome = await Promise.race([
      started.then(() => 'ready' as const),
      this.exited.then(() => 'it went off'),
      sleep(BOOT_TIMEOUT_MS, `not ready after ${BOOT_TIMEOUT_MS / 1000} s`, { ref: false }),
    ])
    if (outcome !== 'ready') throw new Error(`${this.release} does not boot, ${outcome}: ${this.tail()}`)
  }

  private heard(line: string): void {
    if (line.endsWith('ready')) return this.ready?.()
    const [number, status] = line.split(' ').map(Number)
    const output = join(this.share, `${number}.out`)
    const done = this.waiting.get(number as number)
    if (done === undefined) return
    this.waiting.delete(number as number)
    done({ status: status as number, output: readFileSync(output, 'utf8') })
    for (const suffix of ['sh', 'out']) rmSync(join(this.share, `${number}.${suffix}`), { force: true })
  }

  /** Starts a bash script. */
  start(script: string): Running {
    const number = ++this.scripts
    writeFileSync(join(this.share, `${number}.sh`), `${script}\n`)
    const outcome = new Promise<Outcome>((resolve) => this.waiting.set(number, resolve))
    this.agent?.write(`${number}\n`)
    return {
      ended: async (timeoutMs = RUN_TIMEOUT_MS) => {
        const late = new AbortController()
        const result = await Promise.race([
          outcome,
          this.exited.then(() => 'the machine went off'),
          sleep(timeoutMs, `not done after ${timeoutMs / 1000} s`, { ref: false, signal: late.signal }).catch(() => ''),
        ])
        late.abort()
        if (typeof result !== 'string') return result
        const output = join(this.share, `${number}.out`)
        const soFar = existsSync(output) ? readFileSync(output, 'utf8') : ''
        throw new Error(`${result}: ${script}\n${soFar.slice(-4000)}`)
      },
    }
  }

  /** Runs a bash script, whatever its status. */
  attempt(script: string, timeoutMs?: number): Promise<Outcome> {
    return this.start(script).ended(timeoutMs)
  }

  /**
   * Runs a bash script that stops at the first command that fails.
   * @returns what it printed
   * @throws with what it printed, if it failed
   */
  async run(script: string, timeoutMs?: number): Promise<string> {
    const { status, output } = await this.attempt(`${PRELUDE}\n${script}`, timeoutMs)
    if (status !== 0) throw new Error(`status ${status} of: ${script}\n${output.slice(-4000)}`)
    return output
  }

  /** Lets the next boot use an initial file system that was made in the machine. */
  useInitrd(fileInShare: string): void {
    const copy = join(this.directory, 'initrd.img')
    copyFileSync(join(this.share, fileInShare), copy)
    this.initrd = copy
  }

  /** A command for QEMU's monitor (QMP). */
  qmp(command: string, args: Record<string, unknown> = {}): Promise<unknown> {
    if (this.monitor === undefined) throw new Error('the machine is off')
    return this.monitor.execute(command, args)
  }

  /** Shuts it down properly: services stop, file systems are unmounted. */
  async powerOff(): Promise<void> {
    this.start('systemctl poweroff')
    const outcome = await Promise.race([this.exited, sleep(POWEROFF_TIMEOUT_MS, 'late', { ref: false })])
    await this.kill()
    if (outcome === 'late') throw new Error(`does not power off: ${this.tail()}`)
  }

  /** Pulls the plug. */
  async kill(): Promise<void> {
    this.child?.kill('SIGKILL')
    await this.exited
    this.agent?.destroy()
    this.monitor?.close()
    this.child = this.monitor = undefined
  }

  async destroy(): Promise<void> {
    await this.kill()
    rmSync(this.directory, { recursive: true, force: true })
  }

  /** Writes the journal of this boot beside the log of the console; returns where both are. */
  async saveLogs(name: string): Promise<string> {
    const file = `${this.release}-${name.replace(/[^a-z0-9]+/gi, '-')}.journal`
    const { output } = await this.attempt('journalctl -b --no-pager -o short-monotonic', 60_000).catch((error: unknown) => ({
      output: String(error),
    }))
    writeFileSync(join(LOGS, file), output)
    return `${join(LOGS, file)}, ${this.console}`
  }

  /** Whether the kernel has panicked. The machine goes off then, whatever was being tested. */
  get panicked(): boolean {
    return /Kernel panic/.test(this.printed())
  }

  /** What its console has shown since it was last switched on. */
  private printed(): string {
    return readFileSync(this.console).subarray(this.consoleFrom).toString('latin1')
  }

  /** Waits until its console shows something, for as long as a boot may take. */
  async shows(pattern: RegExp): Promise<boolean> {
    for (let ms = 0; ms < BOOT_TIMEOUT_MS && !pattern.test(this.printed()); ms += 500) await sleep(500)
    return pattern.test(this.printed())
  }

  /** A copy of the log of its console, beside it. */
  consoleOf(what: string): string {
    const copy = `${this.console}.${what}`
    copyFileSync(this.console, copy)
    return copy
  }

  private tail(): string {
    return readFileSync(this.console, 'utf8').slice(-3000)
  }
}

/** Ignores errors, which only say that the machine is off: code that waits for it notices that in another way. */
function lines(socket: Socket, heard: (line: string) => void): void {
  socket.on('error', () => {})
  createInterface(socket)
    .on('error', () => {})
    .on('line', heard)
}

interface Answer {
  return?: unknown
  error?: { desc: string }
}

/** The QEMU Machine Protocol: one JSON object a line. */
class Monitor {
  private readonly socket: Socket
  private commands = 0
  private readonly answers = new Map<number, (answer: Answer) => void>()
  private readonly greeted: Promise<unknown>

  constructor(path: string) {
    this.socket = createConnection(path)
    lines(this.socket, (line) => {
      const answer = JSON.parse(line) as Answer & { id?: number }
      if (answer.id !== undefined) this.answers.get(answer.id)?.(answer)
    })
    this.greeted = this.send('qmp_capabilities', {})
  }

  async execute(command: string, args: Record<string, unknown>): Promise<unknown> {
    await this.greeted
    return this.send(command, args)
  }

  private send(command: string, args: Record<string, unknown>): Promise<unknown> {
    const id = ++this.commands
    this.socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`)
    return new Promise((resolve, reject) => {
      this.answers.set(id, (answer) => {
        this.answers.delete(id)
        if (answer.error === undefined) resolve(answer.return)
        else reject(new Error(`QEMU: ${command}: ${answer.error.desc}`))
      })
    })
  }

  close(): void {
    this.socket.destroy()
  }
}
