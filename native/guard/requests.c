// SPDX-License-Identifier: MIT
// Requests while there is no daemon, see requests.h.
#define _GNU_SOURCE
#include "requests.h"

#include <errno.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../shared/state.h"
#include "guard.h"
#include "names.h"

// Requests that are read before other events are handled: a daemon that starts must be heard however many
// requests there are.
#define READS_MAX 64
// One in this many slots for requests is reserved for root.
#define ROOT_PARTS 4

static bool expects_answer(uint32_t opcode) {
  return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT;
}

static void respond(const void *answer, size_t length) {
  if (write(served.fuse, answer, length) < 0 && errno != ENOENT && errno != ENODEV)
    say("cannot answer: ", strerror(errno));
}

static void refuse(const struct fuse_in_header *request, int error) {
  struct fuse_out_header answer = {.len = sizeof answer, .error = -error, .unique = request->unique};
  respond(&answer, sizeof answer);
}

struct slots {
  size_t start, size, count, used_at;
};
static const struct slots small = {STATE_SMALL_AT, STATE_SMALL_SIZE, STATE_SMALL_COUNT, STATE_SMALL_USED_AT};
static const struct slots big = {STATE_BIG_AT, STATE_BIG_SIZE, STATE_BIG_COUNT, STATE_BIG_USED_AT};

static size_t used(const struct slots *slots) {
  size_t count = load(slots->used_at);
  return count < slots->count ? count : slots->count;
}

// As SharedState.store() does. Users with many threads leave room for root.
static bool store_request(const void *request, size_t length) {
  const struct slots *slots = SLOT_HEADER_SIZE + length <= small.size ? &small : &big;
  struct fuse_in_header header;
  memcpy(&header, request, sizeof header);
  size_t count = used(slots), i = count, vacant = slots->count - count;
  for (size_t at = count; at-- > 0;) {
    if (load(slots->start + at * slots->size) != 0) continue;
    vacant++;
    i = at;
  }
  if (vacant <= (header.uid == 0 ? 0 : slots->count / ROOT_PARTS)) return false;
  if (i == count) store(slots->used_at, (uint32_t)i + 1);
  size_t at = slots->start + i * slots->size;
  store(at + SLOT_TRIES_AT, 0);
  store(at + SLOT_INTERRUPTED_AT, 0);
  memcpy(served.state + at + SLOT_HEADER_SIZE, request, length);
  store(at, (uint32_t)length);
  return true;
}

// Whether the kernel has an inode with that id: it says so when its attributes are invalidated, which is all
// that this does.
static bool has_inode(uint64_t id) {
  struct {
    struct fuse_out_header header;
    struct fuse_notify_inval_inode_out notice;
  } message = {
      .header = {.len = sizeof message, .error = FUSE_NOTIFY_INVAL_INODE},
      .notice = {.ino = id, .off = -1},
  };
  return write(served.fuse, &message, sizeof message) >= 0 || errno != ENOENT;
}

// Answers with a symlink that stands for `name` until the next daemon says where it leads: to the
// same name, see linkId() in src/devices/names.ts. The directory .dm needs no daemon.
static void put_off(const struct fuse_in_header *request, const char *text, const struct name *name) {
  bool all = name->directory && name->diskseq == 0;
  uint64_t id = link_id(name, all ? DIRECTORY : name->symlink ? SYMLINK : name->by_kernel_name ? WAITING | BY_KERNEL_NAME : WAITING);
  struct {
    struct fuse_out_header header;
    struct fuse_entry_out entry; // valid for no time at all
  } answer = {.header = {.len = sizeof answer, .unique = request->unique}};
  answer.entry.nodeid = id;
  answer.entry.attr.ino = id;
  answer.entry.attr.mode = all ? S_IFDIR | S_ISVTX | 0711 : S_IFLNK | 0777;
  answer.entry.attr.nlink = all ? 2 : 1;
  answer.entry.attr.size = all ? 0 : strlen(text);
  respond(&answer, sizeof answer);
}

// Answers for a device by the kernel's name whose inode the kernel has already (from its other name, for example): with
// that inode, and attributes that are not valid. Callers then ask for these, and wait for the next daemon there without a
// lock. A cached name stays valid.
static bool give_inode(const struct fuse_in_header *request, const char *text, uint64_t id) {
  char path[512], number[64];
  unsigned major, minor;
  snprintf(path, sizeof path, "/sys/class/block/%s/dev", text);
  if (!read_line(path, number, sizeof number) || sscanf(number, "%u:%u", &major, &minor) != 2) return false;
  struct {
    struct fuse_out_header header;
    struct fuse_entry_out entry;
  } answer = {.header = {.len = sizeof answer, .unique = request->unique}};
  // new_encode_dev(), include/linux/kdev_t.h
  uint32_t device = (minor & 0xff) | major << 8 | (minor & ~0xffU) << 12;
  answer.entry.nodeid = answer.entry.attr.ino = id;
  answer.entry.generation = device;
  answer.entry.attr.rdev = device;
  answer.entry.attr.mode = S_IFBLK;
  answer.entry.attr.nlink = 1;
  respond(&answer, sizeof answer);
  return true;
}

// Answers what must not wait for the next daemon.
static bool answer(const char *request, size_t length) {
  struct fuse_in_header header;
  memcpy(&header, request, sizeof header);
  if (!expects_answer(header.opcode)) return false;
  bool lookup = header.opcode == FUSE_LOOKUP;
  if (lookup && header.pid != manager && !served.name_wait_over) return false;
  const char *text = lookup && memchr(request + sizeof header, 0, length - sizeof header) ? request + sizeof header : "";
  struct name name = {0};
  if (*text) name = parse_in(header.nodeid, text);
  uint64_t id = id_of(&name);
  // The answer must not make the kernel drop a name that is in use: /proc/swaps and the like would
  // show the device as deleted. It can wait, as a LOOKUP of a cached name holds
  // no lock.
  bool in_use = id != 0 && has_inode(id);
  if (header.pid == manager) {
    // Every kernel takes ENOMEM for an error of its own, and keeps the name (fuse_dentry_revalidate).
    refuse(&header, in_use ? ENOMEM : ENOENT);
    return true;
  }
  switch (header.opcode) {
  // The tree's shape never changes, so these need no daemon. (ENOENT, as udev removes
  // links of its own.)
  case FUSE_UNLINK:
    refuse(&header, ENOENT);
    return true;
  case FUSE_MKNOD:
  case FUSE_MKDIR:
  case FUSE_RMDIR:
  case FUSE_SYMLINK:
  case FUSE_LINK:
  case FUSE_RENAME:
  case FUSE_RENAME2:
  case FUSE_CREATE:
    refuse(&header, EPERM);
    return true;
  case FUSE_LOOKUP:
    if (in_use && name.by_kernel_name) return give_inode(&header, text, id);
    if (in_use) return false;
    // A caller that reads the link waits for the next daemon without a lock.
    if (name.diskseq == 0 && !name.directory) refuse(&header, ENOENT);
    else put_off(&header, text, &name);
    return true;
  case FUSE_READDIR:
    if (!served.name_wait_over) return false;
    refuse(&header, ETIMEDOUT);
    return true;
  default:
    return false;
  }
}

// FUSE_INTERRUPT: noted at the stored request for the next daemon, as SharedState.interrupt() does. It has
// no slot of its own, as users could fill them.
static void interrupt(const struct slots *slots, uint64_t unique) {
  for (size_t i = 0; i < used(slots); i++) {
    size_t at = slots->start + i * slots->size;
    struct fuse_in_header header;
    memcpy(&header, served.state + at + SLOT_HEADER_SIZE, sizeof header);
    if (load(at) != 0 && header.unique == unique) store(at + SLOT_INTERRUPTED_AT, 1);
  }
}

// Requests without an answer. FORGETs are dropped: the next daemon does not know how many lookups were answered
// before it, and asks the kernel instead. There may be as many FORGETs as the
// kernel had names.
static void hear(const char *request, size_t length) {
  struct fuse_in_header header;
  struct fuse_interrupt_in what;
  memcpy(&header, request, sizeof header);
  if (header.opcode != FUSE_INTERRUPT || length < sizeof header + sizeof what) return;
  memcpy(&what, request + sizeof header, sizeof what);
  interrupt(&small, what.unique);
  interrupt(&big, what.unique);
}

// Answers requests that the daemon had read and not answered, if they must not wait.
static void answer_stored(const struct slots *slots) {
  for (size_t i = 0; i < used(slots); i++) {
    size_t at = slots->start + i * slots->size;
    uint32_t length = load(at);
    if (length < sizeof(struct fuse_in_header) || length > slots->size - SLOT_HEADER_SIZE) continue;
    if (answer((const char *)served.state + at + SLOT_HEADER_SIZE, length)) store(at, 0);
  }
}

// See TRIES_MAX in src/fuse/session.ts.
void reset_tries(void) {
  const struct slots *all[] = {&small, &big};
  for (size_t i = 0; i < 2; i++)
    for (size_t at = 0; at < used(all[i]); at++) store(all[i]->start + at * all[i]->size + SLOT_TRIES_AT, 0);
}

void answer_all_stored(void) {
  size_t landing = STATE_LANDING_AT + SLOT_HEADER_SIZE;
  uint32_t length = load(landing);
  answer_stored(&small);
  answer_stored(&big);
  if (length >= sizeof(struct fuse_in_header) && length <= STATE_REQUEST_MAX &&
      answer((const char *)served.state + landing, length))
    store(landing, 0);
}

bool read_requests(void) {
  static char buffer[STATE_REQUEST_MAX];
  for (int i = 0; i < READS_MAX; i++) {
    ssize_t n = read(served.fuse, buffer, sizeof buffer);
    if (n < 0 && (errno == EINTR || errno == ENOENT)) continue;
    if (n < 0 && errno == EAGAIN) return true;
    if (n < (ssize_t)sizeof(struct fuse_in_header)) return false; // unmounted, or aborted
    struct fuse_in_header header;
    memcpy(&header, buffer, sizeof header);
    if (!expects_answer(header.opcode)) hear(buffer, (size_t)n);
    else if (!answer(buffer, (size_t)n) && !store_request(buffer, (size_t)n)) refuse(&header, ETIMEDOUT);
  }
  return true;
}
