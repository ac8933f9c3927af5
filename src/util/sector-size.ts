// SPDX-License-Identifier: MIT

/**
 * Whether a disk may have sectors of that size.
 *
 * @param bytes of one; the kernel may have a lower limit
 */
export const isSectorSize = (bytes: number): boolean => bytes >= 512 && bytes <= 65536 && (bytes & (bytes - 1)) === 0
