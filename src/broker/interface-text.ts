// SPDX-License-Identifier: MIT
import { readFileSync } from 'node:fs'

/** The interface file of a name, which is beside this one. */
export const interfaceText = (name: 'io.diskseqfs' | 'io.systemd.StorageProvider') =>
  readFileSync(new URL(`${name}.varlink`, import.meta.url), 'utf8')
