// SPDX-License-Identifier: MIT
import { makeRun } from './suite.js'

await makeRun('trixie')
