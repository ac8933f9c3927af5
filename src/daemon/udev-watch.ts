// SPDX-License-Identifier: MIT
/**
 * udev watches a device's own node for writers that close it, to look at what they
 * wrote. It does not see those that came through the tree: so it is told.
 */
import type { Device } from '../devices/sysfs.js'

export class UdevWatch {
  /** Devices whose nodes are being opened and closed, by name; true where that is to be done once more. */
  private readonly busy = new Map<string, boolean>()

  /**
   * @param find the device that has a name now
   * @param touch opens its own node for writing, and closes it
   */
  constructor(
    private readonly find: (name: string) => Device | undefined,
    private readonly touch: (device: Device, done: () => void) => void,
  ) {}

  /** A writer has closed the device of that name. */
  tell(name: string): void {
    const device = this.find(name)
    if (device === undefined) return
    if (this.busy.has(name)) {
      this.busy.set(name, true)
      return
    }
    this.busy.set(name, false)
    this.touch(device, () => {
      const again = this.busy.get(name)
      this.busy.delete(name)
      if (again) this.tell(name)
    })
  }
}
