// SPDX-License-Identifier: MIT
// The mount that is guarded, as all parts of the guard see it.
#ifndef DISKSEQFS_GUARD_H
#define DISKSEQFS_GUARD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

extern struct served {
  int fuse; // the connection; -1 if there is no mount
  unsigned char *state; // the memory that daemons share, see ../shared/state.h
  char mountpoint[4096];
  bool absent, name_wait_over; // nobody reads requests; and has not for some time
  int64_t died_ms;
  unsigned kills;
  unsigned ticks;   // since the daemon was asked, or answered; or since it died
  unsigned unready; // ticks without a daemon that is ready, since one has served for a while
} served;

// The process that is answered while there is no daemon.
extern uint32_t manager;

// Fields of the shared memory.
static inline uint32_t load(size_t at) { return __atomic_load_n((uint32_t *)(served.state + at), __ATOMIC_ACQUIRE); }
static inline void store(size_t at, uint32_t value) {
  __atomic_store_n((uint32_t *)(served.state + at), value, __ATOMIC_RELEASE);
}

void say(const char *text, const char *detail);
int64_t now_ms(void); // monotonic
// The first line of a file, or as much of the file as there is room for; false if it cannot be read.
bool read_line(const char *path, char *into, size_t size);

#endif
