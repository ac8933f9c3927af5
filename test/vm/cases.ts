/** All cases, in the order in which they run. */
import type { Case } from './case.js'
import { boot } from './cases/boot.js'
import { dmsetup } from './cases/dmsetup.js'
import { removal, service } from './cases/service.js'

export const cases: readonly Case[] = [dmsetup, service, boot, removal]
