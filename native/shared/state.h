// SPDX-License-Identifier: MIT
// The memory that a daemon shares with the one that takes over, and with the
// guard (guard.c), which stands in while there is none. What the fields mean and
// in which order they are written: src/handover/shared-state.ts. All numbers are 32 bits wide
// and little-endian unless it says otherwise.
#ifndef DISKSEQFS_STATE_H
#define DISKSEQFS_STATE_H

// Offsets and sizes, bytes; in an order that lets each be computed from those
// before it.
//
// - The version counts layouts: state of another one cannot be taken over.
// - struct fuse_in_header begins a request with its length; the largest one is a
//   change of an xattr.
// - Header: magic (64 bits), version, device number of the mount, length of its
//   path, how many of each kind of slot were ever used, path; last, the highest number that
//   a disk has had (64 bits), unused, and the pid namespace.
// - A slot for a request: its length (0: free), how often it was tried, whether
//   it was interrupted, unused; the request.
// - The request being handled, then those that wait: names, and the rest.
// - A pin: 1 (0: free), whether it lingers, number of callers, whether there were
//   more, node id (64 bits); of each caller thread, call, whether that outlasts
//   the inode.
#define STATE_LAYOUT(FIELD) \
  FIELD(STATE_VERSION, 2) \
  FIELD(STATE_REQUEST_MAX, (65536 + 8192)) \
  FIELD(STATE_HEADER_SIZE, 8192) \
  FIELD(STATE_VERSION_AT, 8) \
  FIELD(STATE_DEVICE_AT, 12) \
  FIELD(STATE_PATH_LENGTH_AT, 16) \
  FIELD(STATE_SMALL_USED_AT, 20) \
  FIELD(STATE_BIG_USED_AT, 24) \
  FIELD(STATE_PINS_USED_AT, 28) \
  FIELD(STATE_PATH_AT, 32) \
  FIELD(STATE_HIGHEST_AT, (STATE_HEADER_SIZE - 16)) \
  FIELD(STATE_PID_NAMESPACE_AT, (STATE_HEADER_SIZE - 4)) \
  FIELD(SLOT_TRIES_AT, 4) \
  FIELD(SLOT_INTERRUPTED_AT, 8) \
  FIELD(SLOT_HEADER_SIZE, 16) \
  FIELD(STATE_LANDING_AT, STATE_HEADER_SIZE) \
  FIELD(STATE_SMALL_AT, (STATE_LANDING_AT + SLOT_HEADER_SIZE + STATE_REQUEST_MAX)) \
  FIELD(STATE_SMALL_SIZE, 512) \
  FIELD(STATE_SMALL_COUNT, 4096) \
  FIELD(STATE_BIG_AT, (STATE_SMALL_AT + STATE_SMALL_SIZE * STATE_SMALL_COUNT)) \
  FIELD(STATE_BIG_SIZE, (SLOT_HEADER_SIZE + STATE_REQUEST_MAX)) \
  FIELD(STATE_BIG_COUNT, 16) \
  FIELD(STATE_PINS_AT, (STATE_BIG_AT + STATE_BIG_SIZE * STATE_BIG_COUNT)) \
  FIELD(STATE_PIN_SIZE, 192) \
  FIELD(STATE_PINS_COUNT, 4096) \
  FIELD(STATE_SIZE, (STATE_PINS_AT + STATE_PIN_SIZE * STATE_PINS_COUNT))

enum {
#define FIELD(name, value) name = value,
  STATE_LAYOUT(FIELD)
#undef FIELD
};

#endif
