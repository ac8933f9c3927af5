// SPDX-License-Identifier: MIT
/**
 * The kernel says who asks by a thread id of the pid namespace in which the tree was mounted. What is
 * found in /proc under that id is the caller only where /proc is of that namespace, too.
 */
import { readFileSync, statSync } from 'node:fs'

/** The inode of this process's pid namespace: no other one has it. */
export const ownPidNamespace = (): number => statSync('/proc/self/ns/pid').ino

/**
 * Whether /proc is of this process's pid namespace: then it knows it by one id. (It may have the same
 * one in others.)
 *
 * @param status as /proc/self/status, which has no such line on a kernel without namespaces
 */
export const procIsOwn = (status = readFileSync('/proc/self/status', 'latin1')): boolean => !/^NSpid:(\s+\d+){2}/m.test(status)
