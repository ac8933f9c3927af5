// SPDX-License-Identifier: MIT
/**
 * Small files of procfs and sysfs that are read again and again: they are kept
 * open, as looking up the path costs more than reading.
 */
import { LRUCache } from 'lru-cache'

import { E } from '../util/errno.js'
import type { Native } from '../native.js'

type Calls = Pick<Native, 'openFile' | 'readAgain' | 'close'>

export class CachedFiles<Key extends {}> {
  /** What {@link read} has read. */
  readonly buffer = Buffer.alloc(4096)
  private readonly files: LRUCache<Key, number>

  /**
   * @param path the file of a key. It belongs to one thread or device for ever: when
   *   that is gone it cannot be read, whatever has the path by then
   * @param max files kept open
   */
  constructor(
    private readonly native: Calls,
    private readonly path: (key: Key) => string,
    max: number,
  ) {
    this.files = new LRUCache({ max, dispose: (fd) => native.close(fd) })
  }

  /** Reads the file as it is now; the number of bytes, or a negated errno. */
  read(key: Key): number {
    let fd = this.files.get(key)
    if (fd !== undefined) {
      const n = this.native.readAgain(fd, this.buffer)
      if (n > 0) return n
      this.files.delete(key) // another thread or device has the path now, if any
    }
    fd = this.native.openFile(this.path(key))
    if (fd === -E.EMFILE && this.files.size > 0) {
      this.files.clear() // whoever is short of descriptors keeps none
      fd = this.native.openFile(this.path(key))
    }
    if (fd < 0) return fd
    this.files.set(key, fd)
    return this.native.readAgain(fd, this.buffer)
  }

  close(): void {
    this.files.clear()
  }
}
