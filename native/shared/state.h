// SPDX-License-Identifier: MIT
// Memory that the outgoing daemon, the incoming one and the guard (guard.c)
// share. The guard stands in while there is no daemon.
// src/handover/shared-state.ts says what the fields mean and in which order they
// are written. All numbers are 32 bits wide and little-endian unless noted
// otherwise.
#ifndef DISKSEQFS_STATE_H
#define DISKSEQFS_STATE_H

// Offsets and sizes in bytes, in an order in which each can be computed from
// those before it.
//
// - The version counts layouts. State of another version cannot be taken over.
// - A request begins with struct fuse_in_header, whose first field is its length.
//   The largest request sets an xattr.
// - Header: magic (64 bits), version, device number of the mount, length of its
//   path, how many of each kind of slot were ever used, path; at the end, the
//   highest number that a disk has had (64 bits), unused, and the pid namespace.
// - A slot for a request: its length (0: free), how often it was tried, whether
//   it was interrupted, unused; then the request.
// - The request being handled, then slots for requests that wait: small ones for
//   names, and big ones for the rest.
// - A pin: 1 (0: free), whether it lingers, number of callers, whether there were
//   more, nodeid (64 bits); for each caller: thread, call, whether the call
//   outlasts the inode.
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
