import { runSuite } from './suite.js'

await runSuite('bookworm')
