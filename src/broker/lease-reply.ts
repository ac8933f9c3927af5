// SPDX-License-Identifier: MIT
/** Types of the interface file, for both sides. */

/** When a lease ends by itself. */
export type Rule = 'grace' | 'keep' | 'connection'

/** What the daemon tells of a lease: `Lease` in io.diskseqfs.varlink. */
export interface LeaseReply {
  readonly lease: string
  readonly name: string
  readonly path: string
  readonly diskseq: string
  readonly partition: number
  readonly kernelName: string
  readonly deviceNumber: string
  readonly rule: Rule
  readonly graceSeconds?: number
  readonly createdUSec: number
  readonly file?: string
  readonly reason?: string
}
