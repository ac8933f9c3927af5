// SPDX-License-Identifier: MIT
/**
 * Requests that wait for their turn. The kernel hands them over in the order
 * in which they were made, so that a program with a hundred threads would have
 * everybody else stand behind a hundred requests, each time. Here users take
 * turns, however many requests they have.
 */
export class FairQueue<T> {
  /** Users that wait, in the order of their turns; no list is empty. */
  private readonly byUser = new Map<number, T[]>()
  private count = 0

  get size(): number {
    return this.count
  }

  add(uid: number, item: T): void {
    const items = this.byUser.get(uid)
    if (items === undefined) this.byUser.set(uid, [item])
    else items.push(item)
    this.count++
  }

  /** The oldest entry of the user whose turn it is; its next turn comes last. */
  take(): T | undefined {
    for (const [uid, items] of this.byUser) {
      const item = items.shift()
      this.byUser.delete(uid)
      if (items.length > 0) this.byUser.set(uid, items)
      this.count--
      return item
    }
    return undefined
  }

  find(matches: (item: T) => boolean): T | undefined {
    for (const items of this.byUser.values()) {
      const found = items.find(matches)
      if (found !== undefined) return found
    }
    return undefined
  }

  clear(): void {
    this.byUser.clear()
    this.count = 0
  }
}
