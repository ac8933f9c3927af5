import { makeRun } from './suite.js'

await makeRun('trixie')
