// SPDX-License-Identifier: MIT
import { endsEarly, makeRun } from './suite.js'

await makeRun('bookworm')
await endsEarly('bookworm')
