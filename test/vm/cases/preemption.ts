// SPDX-License-Identifier: MIT
/**
 * On a kernel that preempts itself, a thread may have to give its processor away between its
 * request and its sleep, and get none for long. A process that reads what the thread is doing has
 * to wait for that sleep (wait_task_inactive()). So the daemon's event loop does not read it then.
 */
import type { Test } from 'tap'

import type { Case } from '../case.js'
import { note } from '../findings.js'
import { TWIN_MOUNTPOINT, TWIN_PID, withTwin } from '../twin.js'
import type { Vm } from '../vm.js'
import { DAEMON } from './restart.js'

const TREE = '/dev/disk/by-diskseq'
const MODE = '/sys/kernel/debug/sched/preempt'
const SECONDS = 10

/**
 * How often the daemon's event loop has to wait like that, while a user without rights asks for
 * names with threads that have next to no processor time.
 */
async function waits(vm: Vm, tree: string, pid: string): Promise<number> {
  const output = await vm.run(`
    cd /sys/kernel/tracing
    # Gives the processor away for a moment, and takes it at some point of whatever they do.
    taskset --cpu-list 1 setpriv --reuid 65534 --clear-groups node -e '
      const nobody = new Int32Array(new SharedArrayBuffer(4))
      for (;;) {
        Atomics.wait(nobody, 0, 0, Math.random() * 2)
        for (const end = performance.now() + 3; performance.now() < end; );
      }' &
    busy=$!
    cp /share/blk /var/tmp/blk
    mkfifo /run/asks
    taskset --cpu-list 1 chrt --idle 0 /var/tmp/blk abuse --dir ${tree} --names 1 --uid 65534 --threads 8 --kinds names </run/asks >/run/asks.out &
    asks=$!
    exec 3>/run/asks
    until grep -q ready /run/asks.out; do sleep 0.1; done
    # The way to sleep takes longer then: so it is there that they are likely to be.
    echo schedule >set_ftrace_filter
    ls /proc/$asks/task >set_ftrace_pid
    echo 1 >options/func_stack_trace
    echo function >current_tracer
    mkdir instances/waits
    echo schedule_hrtimeout >instances/waits/set_ftrace_filter
    echo ${pid} >instances/waits/set_ftrace_pid
    echo function >instances/waits/current_tracer
    echo >&3
    sleep ${SECONDS}
    echo waits $(grep -c 'schedule_hrtimeout <-wait_task_inactive' instances/waits/trace)
    rmdir instances/waits
    echo nop >current_tracer
    echo 0 >options/func_stack_trace
    echo >set_ftrace_pid
    echo >set_ftrace_filter
    exec 3>&-
    kill $busy
    wait $asks
    cat /run/asks.out
    rm /run/asks /run/asks.out /var/tmp/blk`)
  if (!/"names":{"n":[1-9]/.test(output)) throw new Error(`nothing was asked for: ${output}`)
  return Number(/waits (\d+)/.exec(output)?.[1])
}

export const preemption: Case = {
  name: 'a kernel that preempts itself',
  shortOn: 'none',
  async run(t: Test, vm: Vm) {
    const mode = (await vm.run(`cat ${MODE}`)).replace(/.*\((\w+)\).*/s, '$1')
    // The daemon reads the mode at its start.
    const set = (to: string) => vm.run(`echo ${to} >${MODE} && systemctl restart diskseqfs`)
    await set('full')
    try {
      const pid = (await vm.run(DAEMON)).trim()
      t.equal(await waits(vm, TREE, pid), 0, 'the event loop waits for none of them')
      const twin = await withTwin(vm, 'unwary', async () => waits(vm, TWIN_MOUNTPOINT, (await vm.run(`cat ${TWIN_PID}`)).trim()))
      t.ok(twin > 0, 'twin: if what each thread is doing is read at once, it does')
      note(t, `the event loop had to wait: 0 times in ${SECONDS} s; twin: ${twin}`)
    } finally {
      await set(mode)
    }
  },
}
