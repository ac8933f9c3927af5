// SPDX-License-Identifier: MIT
/**
 * Which callers could open a node, by their ids, groups, capabilities and namespace; test/live/access.test.ts compares
 * with the kernel.
 */
import t from 'tap'

import { Access, granted } from '../../../src/gate/access.js'
import { native, type ThreadCredentials } from '../../../src/native.js'
import {
  ALL_CAPS,
  CAP_CHOWN,
  CAP_DAC_OVERRIDE,
  CAP_DAC_READ_SEARCH,
  CAP_FOWNER,
  CAP_SYS_ADMIN,
  DISK,
  GROUP,
  NAMED_GROUP,
  NAMED_USER,
  OTHER_GROUP,
  OWNER,
  ROOTS,
  STRANGER,
  TID,
  acl,
  caller,
  fakeThread,
  may,
} from '../../helpers/credentials.js'

const BITS = [0, 1, 2, 4, 6]

t.test('an ACL that is not understood is a doubt', async (t) => {
  const node = (bytes: Uint8Array) => ({ mode: 0o600, uid: 0, gid: 0, acl: bytes })
  const good = acl([1, 6], [4, 0], [16, 7], [32, 0])
  const stranger = (bytes: Uint8Array) => granted(node(bytes), STRANGER, new Set([GROUP]))
  t.equal(stranger(good), false)
  const later = Buffer.from(good)
  later.writeUInt32LE(3, 0)
  t.equal(stranger(later), true, 'another version')
  t.equal(stranger(good.subarray(0, good.length - 1)), true, 'cut off')
  t.equal(stranger(good.subarray(0, 3)), true, 'not even a version')
  t.equal(stranger(Buffer.alloc(0)), true, 'empty')
  t.equal(granted(node(Buffer.alloc(0)), 0, new Set()), true, 'its owner needs no ACL')
})

t.test('an ACL may lie anywhere in memory', async (t) => {
  const bytes = Buffer.concat([Buffer.from([1, 2, 3]), acl([1, 6], [2, 4, NAMED_USER], [4, 0], [16, 4], [32, 0])])
  const node = { mode: 0o640, uid: 0, gid: 0, acl: bytes.subarray(3) }
  t.equal(granted(node, NAMED_USER, new Set()), true)
  t.equal(granted(node, STRANGER, new Set()), false)
})

t.test('a caller that the mode allows may open, whatever else is known', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  t.equal(await may(access, { ...caller, uid: 0 }, ROOTS), true, 'root')
  t.equal(await may(access, { ...caller, uid: OWNER }, { ...ROOTS, uid: OWNER }), true, 'the owner')
  t.equal(await may(access, caller, { ...ROOTS, mode: 0o060666 }), true, 'any user, whatever its group')
  t.equal(thread.asked, 0, 'no credentials have to be read for that')
  thread.fsgid = GROUP
  t.equal(await may(access, { ...caller, gid: GROUP }, DISK), true, 'the group')
  t.equal(await may(access, { ...caller, gid: GROUP }, { ...ROOTS, mode: 0o060604 }), true, 'a user that is not in the group')
  t.equal(await may(access, { ...caller, gid: GROUP }, { ...DISK, mode: 0o060606 }), false, 'but not a user that is')
})

t.test('certain is what the ids in the request show', async (t) => {
  const { access } = fakeThread(t)
  for (const mode of BITS.flatMap((user) => BITS.flatMap((group) => BITS.map((rest) => (user << 6) | (group << 3) | rest)))) {
    const allows = (bits: number) => (bits & 6) !== 0
    const node = { mode: 0o060000 | mode, uid: OWNER }
    const certain = (uid: number) => access.certain({ ...caller, uid }, node)
    const name = mode.toString(8).padStart(3, '0')
    if (!certain(0)) t.fail(`${name}: root`)
    if (certain(OWNER) !== allows(mode >> 6)) t.fail(`${name}: the owner`)
    if (certain(STRANGER)) t.fail(`${name}: another user, as there may be an ACL`)
  }
  t.pass('for every mode')
})

t.test('an ACL may shut out a user that the mode lets in', async (t) => {
  const { access, task } = fakeThread(t)
  task()
  const shut = { mode: 0o060666, uid: 0, gid: 0, acl: acl([1, 6], [2, 0, STRANGER], [4, 6], [16, 6], [32, 6]) }
  t.equal(granted(shut, STRANGER, new Set([OTHER_GROUP])), false, 'the kernel would refuse it')
  t.equal(await may(access, caller, shut), false)
})

t.test('a caller is without hope if only ownership or a capability would let it in', async (t) => {
  const hopeless = (mode: number, uid: number) => Access.hopeless({ ...caller, uid }, { mode, uid: OWNER })
  t.equal(hopeless(0o060600, STRANGER), true)
  t.equal(hopeless(0o060711, STRANGER), true, 'the right to execute does not count')
  t.equal(hopeless(0o060600, OWNER), false)
  t.equal(hopeless(0o060000, OWNER), false, 'the owner may change the mode')
  for (const mode of [0o060640, 0o060620, 0o060604, 0o060602]) t.equal(hopeless(mode, STRANGER), false, mode.toString(8))
})

t.test('a supplementary group counts', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  t.equal(await may(access, caller, DISK), false, 'none')
  thread.groups = [6100, GROUP * 10 + 1]
  t.equal(await may(access, caller, DISK), false, 'others')
  thread.groups = [4, GROUP, 70000]
  t.equal(await may(access, caller, DISK), true)
  t.equal(await may(access, caller, ROOTS), false, 'but not for a node of another group')
  thread.groups = [...Array.from({ length: 60_000 }, (_, i) => 100_000 + i), GROUP]
  t.equal(await may(access, caller, DISK), true, 'the last of very many groups')
})

t.test('a supplementary group that only the ACL names counts', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  const node = { ...DISK, acl: acl([1, 6], [4, 0], [8, 4, NAMED_GROUP], [8, 4, 61005], [16, 4], [32, 0]) }
  t.equal(await may(access, caller, node), false)
  for (const group of [NAMED_GROUP, 61005]) {
    thread.groups = [group]
    t.equal(await may(access, caller, node), true, `${group}`)
  }
  thread.groups = [GROUP]
  t.equal(await may(access, caller, node), false, "the node's own group has no right")
})

t.test('a capability to override counts', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  for (const [capabilities, expected] of [
    [0n, false],
    [CAP_CHOWN, false],
    [CAP_DAC_OVERRIDE, true],
    [CAP_DAC_READ_SEARCH, true],
    [CAP_FOWNER, false],
    [ALL_CAPS & ~(CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH), false],
    [ALL_CAPS, true],
  ] as const) {
    thread.capabilities = capabilities
    t.equal(await may(access, caller, ROOTS), expected, capabilities.toString(16))
  }
})

t.test('a caller that may mount needs no right on the node, except for an open', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  t.equal(await may(access, caller, ROOTS, 'by number'), false, 'not a caller that may not mount')
  thread.capabilities = CAP_SYS_ADMIN
  t.equal(await may(access, caller, ROOTS, 'by number'), true)
  t.equal(await may(access, caller, ROOTS, 'open'), false, 'not for an open')
  thread.capabilities = ALL_CAPS & ~(CAP_SYS_ADMIN | CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)
  t.equal(await may(access, caller, ROOTS, 'by number'), false, 'other capabilities do not count')
  thread.capabilities = CAP_SYS_ADMIN
  task(2)
  t.equal(await may(access, caller, ROOTS, 'by number'), false, 'no disk is mounted in a user namespace of its own')
})

t.test('a caller that may have other credentials than its thread may open', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  t.equal(await may(access, caller, ROOTS, 'unclear'), true)
  t.equal(thread.asked, 0)
})

t.test('a request with other ids than the thread has is a doubt', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  t.equal(await may(access, caller, ROOTS), false)
  thread.fsuid = STRANGER + 1
  t.equal(await may(access, caller, ROOTS), true, 'its user')
  thread.fsuid = STRANGER
  thread.fsgid = GROUP
  t.equal(await may(access, caller, ROOTS), true, 'its group')
})

t.test('in a user namespace of its own a capability counts only for ids that exist there', async (t) => {
  const { access, task, thread, put, remove } = fakeThread(t)
  task(2)
  thread.capabilities = ALL_CAPS
  const maps = (uid: string, gid: string) => {
    put('uid_map', uid)
    put('gid_map', gid)
    return may(access, caller, DISK)
  }
  const all = '         0          0 4294967295\n'
  t.equal(await maps(all, all), true, 'all are mapped')
  t.equal(await maps('         0      60003          1\n', `         0      61003          1\n`), false, 'its own ids are mapped')
  t.equal(await maps(all, '         0      61003          1\n'), false, 'the group is not')
  t.equal(await maps('         0      60003          1\n', all), false, 'the owner is not')
  t.equal(await maps('', ''), false, 'no id is mapped yet')
  t.equal(await maps('0 60003 1\n1 0 1\n', `0 61003 1\n1 ${GROUP - 1} 2\n`), true, 'both, in a later line')
  t.equal(await maps(all, `0 ${GROUP - 1} 1\n`), false, 'only the group before it')
  t.equal(await maps(all, `0 ${GROUP + 1} 1\n`), false, 'only the group after it')
  t.equal(await maps(all, `${GROUP} 500000 1000\n`), false, 'the id inside does not matter')
  thread.capabilities = 0n
  t.equal(await maps(all, all), false, 'without the capability the map does not count')
  thread.capabilities = ALL_CAPS
  remove(`${TID}/gid_map`)
  t.equal(await may(access, caller, DISK), true, 'a map that cannot be read is a doubt')
})

t.test('in doubt a caller may open', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  t.equal(await may(access, caller, ROOTS), false)
  t.equal(await may(access, { ...caller, tid: 0 }, ROOTS), true, 'a caller out of sight')
  t.equal(thread.asked, 1, 'its credentials are not read')
  thread.there = false
  t.equal(await may(access, caller, ROOTS), true, 'its credentials cannot be read')
})

t.test('a namespace that cannot be seen is a doubt', async (t) => {
  const { access, task, thread } = fakeThread(t)
  task()
  thread.capabilities = ALL_CAPS
  t.equal(native.userNamespace(0x7fffffff), undefined, 'nothing is found for a thread that is gone')
  t.equal(await may(access, caller, ROOTS), true)
})

/** A kernel whose answers come when the test says so. */
function slowKernel(userNamespace: (tid: number) => number | undefined = () => undefined) {
  const asked: { tid: number; answer: (groups?: number) => void }[] = []
  const access = new Access({
    ...native,
    userNamespace,
    credentials(tid, groups, done) {
      const answer = (count = 1) => {
        asked.splice(
          asked.findIndex((one) => one.answer === answer),
          1,
        )
        // Their user ids are made from the thread's id: 1007 is a thread of user 10.
        done([Math.floor(tid / 100), OTHER_GROUP, 0n, count, ...groups.map(() => false)] as ThreadCredentials)
      }
      asked.push({ tid, answer })
    },
  })
  const done: string[] = []
  return {
    access,
    asked,
    done,
    tids: () => asked.map(({ tid }) => tid),
    ask(tid: number) {
      access.mayOpen({ tid, uid: Math.floor(tid / 100), gid: OTHER_GROUP }, DISK, 'open', (may) => done.push(`${tid} ${may}`))
    },
    answer: (tid: number, groups?: number) => asked.find((one) => one.tid === tid)?.answer(groups),
  }
}

t.test('the kernel gets one question at a time, and users take turns', async (t) => {
  const { ask, asked, tids, answer, done } = slowKernel()
  for (const tid of [1001, 1002, 1003, 2001, 2002, 3001]) ask(tid)
  const order: number[] = []
  while (asked.length > 0) {
    t.equal(asked.length, 1, 'one at a time')
    const [tid] = tids() as [number]
    order.push(tid)
    answer(tid)
  }
  t.strictSame(order, [1001, 1002, 2001, 3001, 1003, 2002], 'the first was alone when it came')
  t.strictSame(
    done,
    order.map((tid) => `${tid} false`),
    'each gets its answer',
  )
})

t.test('a user with many groups does not delay others', async (t) => {
  const { ask, tids, answer, done } = slowKernel()
  ask(1001)
  answer(1001, 65_536) // from here on it is known that it has many groups
  for (let tid = 1002; tid < 1050; tid++) ask(tid)
  t.strictSame(tids(), [1002])
  ask(2001)
  t.strictSame(tids(), [1002, 2001], 'asked beside it')
  answer(2001)
  t.equal(done.at(-1), '2001 false', 'it is answered at once')
  ask(3001)
  answer(3001, 65_536)
  ask(3002)
  t.strictSame(tids(), [1002], 'users with many groups wait for each other')
  answer(1002, 65_536)
  answer(1003, 65_536)
  t.strictSame(tids(), [3002], 'they take turns')
})

t.test('all ids that a user has in its own namespaces count as one user', async (t) => {
  const { ask, tids, answer } = slowKernel((tid) => (tid >= 100_000 ? 10 : undefined))
  ask(100_001)
  answer(100_001, 65_536)
  for (let user = 1001; user < 1020; user++) ask(user * 100)
  t.strictSame(tids(), [100_100], 'the next of them is known to have many groups')
  ask(2001)
  answer(2001)
  ask(3001)
  answer(100_100)
  t.strictSame(tids(), [3001, 100_200], 'no other user waits for any of them')
  ask(3002)
  ask(1001)
  t.strictSame(tids(), [3001, 100_200], 'the user that made the namespace waits for them')
  answer(100_200, 1)
  t.ok(tids().includes(100_300))
})

t.test('as many groups as people usually have are not many', async (t) => {
  const { ask, tids, answer } = slowKernel()
  ask(1001)
  answer(1001, 1024)
  ask(1002)
  ask(2001)
  t.strictSame(tids(), [1002], 'it is asked in the same line as all others')
})

t.test('an answer that leads to an error keeps no other caller waiting', async (t) => {
  const { access, ask, tids, answer, done } = slowKernel()
  access.mayOpen({ tid: 1001, uid: 10, gid: OTHER_GROUP }, DISK, 'open', () => {
    throw new Error('boom')
  })
  ask(2001)
  t.throws(() => answer(1001), { message: 'boom' })
  t.strictSame(tids(), [2001])
  answer(2001)
  t.strictSame(done, ['2001 false'])
})

t.test('a caller that asks while an answer is given waits for it', async (t) => {
  const { access, ask, tids, answer } = slowKernel()
  access.mayOpen({ tid: 1001, uid: 10, gid: OTHER_GROUP }, DISK, 'open', () => {
    ask(1002)
    ask(1003)
  })
  answer(1001)
  t.strictSame(tids(), [1002])
})
