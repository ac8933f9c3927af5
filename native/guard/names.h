// SPDX-License-Identifier: MIT
// Names in the tree and their nodeids, as src/devices/names.ts has them.
#ifndef DISKSEQFS_GUARD_NAMES_H
#define DISKSEQFS_GUARD_NAMES_H

#include <stdbool.h>
#include <stdint.h>

// As src/devices/names.ts has it: ids of symlinks, directories and disks, and ids of partitions.
enum { SYMLINK = 1, PARTITION_SHIFT = 1, PARTITION_MAX = 0xff, BY_KERNEL_NAME = 1 << 9, DIRECTORY = 1 << 10, WAITING = 1 << 11 };

// A name in the tree.
struct name {
  uint64_t diskseq, partition; // diskseq 0: it is none, or .dm
  // Of what it is: a symlink N-partM; .dm or .dm/N; or a device by the kernel's name.
  bool symlink, directory, by_kernel_name;
};

// The name that `text` is in a directory of the tree.
struct name parse_in(uint64_t directory, const char *text);
// The nodeid of a link, directory or waiting link.
uint64_t link_id(const struct name *name, uint64_t kind);
// The nodeid of what has that name now; 0 if nothing has it.
uint64_t id_of(const struct name *name);

#endif
