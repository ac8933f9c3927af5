// SPDX-License-Identifier: MIT
/** A uevent in the format of lib/kobject_uevent.c. */
export function uevent(kname: string, fields: Record<string, string | undefined> = {}, action = 'change'): Buffer {
  const path = `/devices/virtual/block/${kname}`
  const values = {
    ACTION: action,
    DEVPATH: path,
    SUBSYSTEM: 'block',
    MAJOR: '7',
    MINOR: '0',
    DEVNAME: kname,
    DEVTYPE: 'disk',
    DISKSEQ: '13',
    SEQNUM: '4711',
    ...fields,
  }
  const lines = Object.entries(values).filter(([, value]) => value !== undefined)
  return Buffer.from(`${action}@${path}\0${lines.map(([key, value]) => `${key}=${value}\0`).join('')}`, 'latin1')
}
