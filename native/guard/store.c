// SPDX-License-Identifier: MIT
#define _GNU_SOURCE
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define FIRST_FD 3 // SD_LISTEN_FDS_START
#define BATCH 250  // in one message; the kernel's limit is SCM_MAX_FD, 253
#define NAME_SIZE 16
// What the manager stores at most, where it does not say ($FDSTORE, systemd 254 and later): FileDescriptorStoreMax= of the service.
#define STORE_MAX 8192
// Of these pins and leases, of which there may be any number, leave so many to the others: without the sockets of the daemon and
// of the understudy the next guard would have nothing.
#define RESERVED 32

static struct stored {
  char name[NAME_SIZE];
  int fd;
  bool told, sent;
} *stored;
static size_t count, room;

static struct sockaddr_un notify_address;
static socklen_t notify_length;
// What the manager is to be told when it has room: names that were removed, and a text.
static char (*removed)[NAME_SIZE];
static size_t removals, removals_room;
static char waiting[700];
// How many pins and leases the manager is told of at most.
static size_t most = STORE_MAX - RESERVED;

static bool send_fds(int socket, int flags, const struct sockaddr_un *to, socklen_t to_length, const char *text, const int *fds, size_t n) {
  union {
    struct cmsghdr header;
    char room[CMSG_SPACE(BATCH * sizeof(int))];
  } control;
  struct iovec data = {(void *)text, strlen(text)};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_name = (void *)to, .msg_namelen = to_length};
  if (n > BATCH) return errno = EMSGSIZE, false;
  if (n > 0) {
    memset(&control, 0, sizeof control);
    message.msg_control = &control;
    message.msg_controllen = CMSG_SPACE(n * sizeof(int));
    control.header.cmsg_level = SOL_SOCKET;
    control.header.cmsg_type = SCM_RIGHTS;
    control.header.cmsg_len = CMSG_LEN(n * sizeof(int));
    memcpy(CMSG_DATA(&control.header), fds, n * sizeof(int));
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL | flags) >= 0;
}

static bool has_manager(void) { return notify_length > 0; }

// False where it has to be told later. It is never waited for, as it may wait for this process.
static bool tell(int socket, const char *text, const int *fds, size_t n) {
  if (send_fds(socket, MSG_DONTWAIT, &notify_address, notify_length, text, fds, n)) return true;
  if (errno == EAGAIN || errno == ENOBUFS || errno == ENOMEM || errno == ETOOMANYREFS || errno == ECONNREFUSED) return false;
  fprintf(stderr, "diskseqfs-guard: cannot tell the service manager: %s\n", strerror(errno));
  return true;
}

// Of "root", which is in the tree itself, it would ask for the attributes.
static bool is_told(const char *name) { return strcmp(name, "fuse") != 0 && strcmp(name, "root") != 0; }

static bool is_lease(const char *name) { return strncmp(name, "lease-", 6) == 0; }

static bool is_bulk(const char *name) { return is_lease(name) || strcmp(name, "pins") == 0; }

static bool untold(const struct stored *each) { return !each->told && is_told(each->name) && !is_lease(each->name); }
static bool untold_lease(const struct stored *each) { return !each->told && is_lease(each->name); }
static bool unsent(const struct stored *each) { return !each->sent; }
static bool unsent_to_daemon(const struct stored *each) { return !each->sent && each->name[0] != '.'; }

// As what a daemon gets it: leases, of which each has a name of its own, all together.  A message for each would be more
// than a socket holds.
static const char *for_daemon(const char *name) { return is_lease(name) ? "leases" : name; }
static const char *by_name(const char *name) { return name; }

// What is sent with one message.
struct batch {
  size_t count;
  struct stored *of[BATCH];
  int fds[BATCH];
};

// Those from one on that are `wanted` and of its kind, as many as fit; none where that one is not wanted.
static void gather(struct batch *batch, size_t from, bool (*wanted)(const struct stored *), const char *(*kind)(const char *)) {
  batch->count = 0;
  if (!wanted(&stored[from])) return;
  for (size_t i = from; i < count && batch->count < BATCH; i++) {
    if (!wanted(&stored[i]) || strcmp(kind(stored[i].name), kind(stored[from].name)) != 0) continue;
    batch->fds[batch->count] = stored[i].fd;
    batch->of[batch->count++] = &stored[i];
  }
}

// How many more pins and leases the manager may be told of.
static size_t bulk_left(void) {
  size_t told = 0;
  for (size_t i = 0; i < count; i++) told += stored[i].told && is_bulk(stored[i].name);
  return told < most ? most - told : 0;
}

static bool tell_stored(int socket, bool (*wanted)(const struct stored *)) {
  char text[64];
  size_t left = bulk_left();
  for (size_t i = 0; i < count; i++) {
    struct batch batch;
    bool bulk = is_bulk(stored[i].name);
    if (bulk && left == 0) continue;
    gather(&batch, i, wanted, by_name);
    if (batch.count == 0) continue;
    if (bulk && batch.count > left) batch.count = left;
    if (bulk) left -= batch.count;
    // Without FDPOLL=0 it would let go of a socket whose other end is closed.
    snprintf(text, sizeof text, "FDSTORE=1\nFDNAME=%s\nFDPOLL=0", stored[i].name);
    if (!tell(socket, text, batch.fds, batch.count)) return false;
    while (batch.count-- > 0) batch.of[batch.count]->told = true;
  }
  return true;
}

static bool tell_waiting(int socket) {
  if (waiting[0] && !tell(socket, waiting, NULL, 0)) return false;
  waiting[0] = 0;
  return true;
}

static bool tell_removed(int socket, bool leases) {
  char text[64];
  for (size_t i = removals; i-- > 0;) {
    if (is_lease(removed[i]) != leases) continue;
    snprintf(text, sizeof text, "FDSTOREREMOVE=1\nFDNAME=%s", removed[i]);
    if (!tell(socket, text, NULL, 0)) return false;
    memmove(removed[i], removed[--removals], NAME_SIZE);
  }
  return true;
}

static bool tell_all(int socket) {
  // Leases last: of hundreds the manager's socket holds only some at a time, and it waits to hear that there is a daemon.
  return tell_removed(socket, false) && tell_stored(socket, untold) && tell_waiting(socket) && tell_removed(socket, true) &&
         tell_stored(socket, untold_lease);
}

bool store_tell(void) {
  if (!has_manager()) return true;
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return false;
  bool all = tell_all(fd);
  close(fd);
  return all;
}

void tell_manager(const char *text) {
  // That it is alive says less than what it has not been told yet.
  if (!waiting[0] || strncmp(text, "WATCHDOG", 8) != 0) snprintf(waiting, sizeof waiting, "%s", text);
  store_tell();
}

// Without memory for that, the manager keeps it.
static void add_removal(const char *name) {
  if (removals == removals_room) {
    size_t more = removals_room ? 2 * removals_room : 16;
    char(*moved)[NAME_SIZE] = realloc(removed, more * NAME_SIZE);
    if (!moved) return;
    removed = moved;
    removals_room = more;
  }
  snprintf(removed[removals++], NAME_SIZE, "%s", name);
}

static void add(const char *name, int fd, bool told) {
  if (strlen(name) >= NAME_SIZE) {
    close(fd);
    return;
  }
  if (count == room) {
    size_t more = room ? 2 * room : 64;
    struct stored *moved = realloc(stored, more * sizeof *stored);
    if (!moved) {
      close(fd);
      return;
    }
    stored = moved;
    room = more;
  }
  stored[count] = (struct stored){.fd = fd, .told = told};
  snprintf(stored[count++].name, NAME_SIZE, "%s", name);
}

// -1 for what is no number.
static long natural(const char *text) {
  char *end;
  long value = *text >= '0' && *text <= '9' ? strtol(text, &end, 10) : -1;
  return value < 0 || *end ? -1 : value;
}

void store_open(void) {
  const char *path = getenv("NOTIFY_SOCKET"), *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
  const char *names = getenv("LISTEN_FDNAMES"), *max = getenv("FDSTORE");
  if (path && strlen(path) < sizeof notify_address.sun_path) {
    notify_address.sun_family = AF_UNIX;
    strcpy(notify_address.sun_path, path);
    if (path[0] == '@') notify_address.sun_path[0] = 0;
    notify_length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
  }
  if (max && natural(max) >= 0) most = natural(max) > RESERVED ? (size_t)natural(max) - RESERVED : 0;
  if (pid && fds && names && natural(pid) == getpid()) {
    char *words = strdup(names), *rest = words;
    long n = natural(fds);
    for (long i = 0; i < n && rest; i++) {
      const char *name = strsep(&rest, ":");
      if (fcntl(FIRST_FD + (int)i, F_SETFD, FD_CLOEXEC) < 0) continue; // there is none
      // An earlier version had it kept.
      if (!is_told(name)) add_removal(name);
      add(name, FIRST_FD + (int)i, is_told(name));
    }
    free(words);
  }
  static const char *const ours[] = {"NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE", "WATCHDOG_PID", "WATCHDOG_USEC"};
  for (size_t i = 0; i < sizeof ours / sizeof *ours; i++) unsetenv(ours[i]);
}

static int follower = -1;
static bool follows;

void store_follow(int socket) {
  follower = socket;
  follows = socket >= 0;
}

bool store_is_followed(void) { return follows; }

static void tell_follower(const char *verb, const char *name, const int *fds, size_t n) {
  char text[64];
  snprintf(text, sizeof text, "%s %s", verb, name);
  if (follows) follows = send_fds(follower, MSG_DONTWAIT, NULL, 0, text, fds, n);
}

void store_put(const char *name, const int *fds, size_t n) {
  tell_follower("put", name, fds, n);
  for (size_t i = 0; i < n; i++) add(name, fds[i], false);
  store_tell();
}

void store_remove(const char *name) {
  size_t left = 0;
  bool told = false;
  for (size_t i = 0; i < count; i++) {
    if (strcmp(stored[i].name, name) != 0) {
      stored[left++] = stored[i];
      continue;
    }
    told |= stored[i].told;
    close(stored[i].fd);
  }
  if (count == left) return;
  count = left;
  tell_follower("remove", name, NULL, 0);
  if (told) add_removal(name);
  store_tell();
}

bool store_hear(const char *text, const int *fds, size_t n) {
  if (strncmp(text, "put ", 4) == 0) {
    store_put(text + 4, fds, n);
    return true;
  }
  while (n > 0) close(fds[--n]);
  if (strncmp(text, "remove ", 7) != 0) return false;
  store_remove(text + 7);
  return true;
}

void store_clear(const char *but) {
  for (size_t i = 0; i < count;) {
    char name[NAME_SIZE];
    strcpy(name, stored[i].name);
    if (but && strcmp(name, but) == 0) {
      i++;
    } else {
      store_remove(name);
      i = 0;
    }
  }
}

int store_get(const char *name) {
  for (size_t i = count; i-- > 0;)
    if (strcmp(stored[i].name, name) == 0) return stored[i].fd;
  return -1;
}

size_t store_all(const char *name, int *fds, size_t max) {
  size_t n = 0;
  for (size_t i = 0; i < count && n < max; i++)
    if (strcmp(stored[i].name, name) == 0) fds[n++] = stored[i].fd;
  return n;
}

void store_send_anew(void) {
  for (size_t i = 0; i < count; i++) stored[i].sent = false;
}

void store_be_silent(void) { notify_length = 0; }

static bool send_all(int socket, int flags, bool (*wanted)(const struct stored *), const char *(*kind)(const char *)) {
  for (size_t i = 0; i < count; i++) {
    struct batch batch;
    gather(&batch, i, wanted, kind);
    if (batch.count == 0) continue;
    if (!send_fds(socket, flags, NULL, 0, kind(stored[i].name), batch.fds, batch.count)) return false;
    while (batch.count-- > 0) batch.of[batch.count]->sent = true;
  }
  return true;
}

bool store_send(int socket, const char *last) {
  return send_all(socket, MSG_DONTWAIT, unsent_to_daemon, for_daemon) && send_fds(socket, MSG_DONTWAIT, NULL, 0, last, NULL, 0);
}

void store_send_all(int socket) {
  store_send_anew();
  send_all(socket, 0, unsent, by_name);
}
