// SPDX-License-Identifier: MIT
/**
 * Preloaded into an incoming daemon. It makes the daemon fail when it gets its turn, before it
 * serves: with FAILS=killed it is killed, otherwise it finds an error.
 */
const { dlopen } = process
process.dlopen = function (module, ...given) {
  dlopen.call(this, module, ...given)
  const { openDirectory } = module.exports
  if (openDirectory === undefined) return
  module.exports.openDirectory = (path) => {
    if (path !== '/dev') return openDirectory(path)
    if (process.env['FAILS'] === 'killed') process.kill(process.pid, 'SIGKILL')
    return -2
  }
}
