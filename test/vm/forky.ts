// SPDX-License-Identifier: MIT
import { runSuite } from './suite.js'

await runSuite('forky')
