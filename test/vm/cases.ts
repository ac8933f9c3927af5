// SPDX-License-Identifier: MIT
/** All cases, in the order in which they run. */
import type { Case } from './case.js'
import { absence } from './cases/absence.js'
import { all } from './cases/all.js'
import { boot } from './cases/boot.js'
import { churnCase } from './cases/churn.js'
import { cryptsetup } from './cases/cryptsetup.js'
import { dm } from './cases/dm.js'
import { dmsetup } from './cases/dmsetup.js'
import { faults } from './cases/faults.js'
import { hostile } from './cases/hostile.js'
import { hotplug } from './cases/hotplug.js'
import { kills } from './cases/kills.js'
import { leasesCase } from './cases/leases.js'
import { levels } from './cases/levels.js'
import { libvirt } from './cases/libvirt.js'
import { linksCase } from './cases/links.js'
import { locks } from './cases/locks.js'
import { lvm } from './cases/lvm.js'
import { mountsCase } from './cases/mounts.js'
import { names } from './cases/names.js'
import { preemption } from './cases/preemption.js'
import { many } from './cases/many.js'
import { mapperRace } from './cases/race.js'
import { removable } from './cases/removable.js'
import { restart } from './cases/restart.js'
import { same } from './cases/same.js'
import { removal, service } from './cases/service.js'
import { stack } from './cases/stack.js'
import { storage } from './cases/storage.js'
import { suspend } from './cases/suspend.js'
import { tables } from './cases/tables.js'
import { tools } from './cases/tools.js'

export const cases: readonly Case[] = [
  dmsetup,
  dm,
  names,
  cryptsetup,
  lvm,
  tools,
  same,
  stack,
  libvirt,
  mapperRace,
  mountsCase,
  all,
  churnCase,
  tables,
  hotplug,
  removable,
  hostile,
  preemption,
  faults,
  locks,
  leasesCase,
  storage,
  service,
  linksCase,
  restart,
  absence,
  suspend,
  many,
  levels,
  ...kills,
  boot,
  removal,
]
