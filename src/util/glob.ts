// SPDX-License-Identifier: MIT
const SPECIAL = /[\\^$.*+?()[\]{}|/-]/g

/**
 * A shell's pattern for a whole name, as of fnmatch(3) without flags: `*`, `?`, `[a-f]`, `[!a]`, and a backslash before what is
 * meant as it is. One that is wrong, such as `[z-a]`, is that of no name.
 */
export function globPattern(glob: string): RegExp {
  let pattern = ''
  for (let i = 0; i < glob.length; i++) {
    const character = glob[i] as string
    const set = character === '[' ? /^\[([!^]?)(\]?[^\]]*)\]/.exec(glob.slice(i)) : null
    if (character === '*') pattern += '.*'
    else if (character === '?') pattern += '.'
    else if (set !== null) {
      const [all, not = '', members = ''] = set
      pattern += `[${not === '' ? '' : '^'}${members.replace(/[\\\]^]/g, '\\$&')}]`
      i += all.length - 1
    } else {
      const literal = character === '\\' ? (glob[++i] ?? character) : character
      pattern += literal.replace(SPECIAL, '\\$&')
    }
  }
  try {
    return new RegExp(`^${pattern}$`, 's')
  } catch {
    return /(?!)/
  }
}
