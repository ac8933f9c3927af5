// SPDX-License-Identifier: MIT
#pragma once

#include <stdint.h>
#include <sys/types.h>

namespace diskseqfs {

// openat2(2) that never leaves the filesystem of `dir` and follows no
// symlink: so a path below /dev cannot lead into this daemon's own tree.
int OpenBeneath(int dir, const char* path, uint64_t flags);

// Reads the first `size` bytes of a procfs or sysfs file. Returns how many
// bytes there were, or -1 and sets errno.
ssize_t ReadSmallFile(int dir, const char* path, char* out, size_t size);

}  // namespace diskseqfs
