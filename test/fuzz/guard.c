// SPDX-License-Identifier: MIT
// The guard (native/guard/guard.c), fed with garbage. Built with sanitizers, see
// test/helpers/sanitized.ts.
//
//   guard-fuzz run COUNT SEED     its functions, in this process
//   guard-fuzz speak COUNT SEED   what a daemon says that the guard has started
//
// In this process a socket stands for /dev/fuse, and nothing is unmounted.
#define _GNU_SOURCE
#include <sanitizer/asan_interface.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

static int unmount_nothing(const char *path, int flags) {
  (void)flags;
  return path[0] == 'x' ? 0 : -1;
}

static int stat_socket_as_fuse(int fd, struct stat *file) {
  int rc = fstat(fd, file);
  if (rc == 0 && S_ISSOCK(file->st_mode)) {
    file->st_mode = S_IFCHR | 0600;
    file->st_rdev = makedev(10, 229);
  }
  return rc;
}

#define umount2 unmount_nothing
#define fstat stat_socket_as_fuse
#define main guard_main
// The one in the directory given with -I.
#include <guard.c>
#include <names.c>
#include <requests.c>
#include <store.c>
#undef main
#undef fstat

static uint64_t seed;
static uint32_t below(uint32_t n) { // splitmix64
  uint64_t x = (seed += 0x9e3779b97f4a7c15);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return (uint32_t)((x ^ (x >> 31)) >> 32) % n;
}
static uint32_t number(void) {
  static const uint32_t odd[] = {0, 1, 15, 16, 39, 40, 41, 80, 496, 497, 512, 4095, 4096, 4097, 65536, 73728, 73744, 0x7fffffff, 0x80000000, 0xffffffff};
  return below(3) == 0 ? below(0xffffffff) : odd[below(sizeof odd / sizeof *odd)];
}

static void fail(const char *what) {
  dprintf(1, "guard: %s\n", what);
  abort();
}

static int descriptors(void) {
  int count = 0;
  for (int fd = 0; fd < 64; fd++) count += fcntl(fd, F_GETFD) >= 0;
  return count;
}

// Both ends of a "/dev/fuse".
static void fuse_pair(int ends[2], int flags) {
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | flags, 0, ends) < 0) fail("no socket pair");
}

static int memory(off_t size) {
  int fd = memfd_create("fuzz", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, size) < 0) fail("no memory");
  return fd;
}

// Writes wrong numbers, and requests that are none, where the guard looks for them.
static void damage(int fd) {
  static const struct { off_t start, size; } slots[] = {
      {STATE_SMALL_AT, STATE_SMALL_SIZE}, {STATE_BIG_AT, STATE_BIG_SIZE}, {STATE_LANDING_AT, 16}};
  for (int i = (int)below(12); i > 0; i--) {
    int kind = (int)below(4);
    uint32_t value = number();
    off_t at = kind == 3 ? 4 * (off_t)below(12) : slots[kind].start + slots[kind].size * (off_t)below(4) + 4 * (off_t)below(20);
    if (pwrite(fd, &value, sizeof value, at) < 0) fail("cannot write");
  }
}

static size_t request(char *out, uint64_t unique) {
  struct fuse_in_header header = {.unique = unique, .nodeid = number(), .pid = below(3) ? manager : number()};
  static const uint32_t opcodes[] = {FUSE_LOOKUP, FUSE_GETATTR, FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_INTERRUPT, FUSE_SETXATTR};
  header.opcode = below(8) == 0 ? number() : opcodes[below(6)];
  size_t length = sizeof header + (below(16) == 0 ? below(70000) : below(600));
  header.len = below(8) == 0 ? number() : (uint32_t)length;
  memset(out, (int)below(256), length);
  memcpy(out, &header, sizeof header);
  return below(64) == 0 ? below(sizeof header) : length;
}

static const char *const NAMES[] = {"fuse", "state", "lock", "mount", "closes", "pins", "", "a-name-that-is-longer-than-any"};

static int any(int kind, bool in_process, int *held, int *state) {
  int ends[2], fd;
  if (kind == 0 && in_process) {
    if (*held >= 0) close(*held);
    fuse_pair(ends, below(16) ? SOCK_NONBLOCK : 0);
    *held = ends[1];
    return ends[0];
  }
  if (kind == 0) fd = open("/dev/fuse", O_RDWR | O_CLOEXEC | (below(4) ? O_NONBLOCK : 0));
  else if (kind == 1) fd = memory(STATE_SIZE);
  else if (kind == 2) fd = memory(below(2) ? STATE_SIZE - 1 : 0);
  else if (kind == 3) fd = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  else if (kind == 4) fd = open("/dev/zero", O_RDWR | O_CLOEXEC);
  else if (kind == 5) fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  else fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (fd < 0) fail("no descriptor");
  if (kind == 1) {
    uint32_t version = STATE_VERSION, length = below(8) ? 1 + below(200) : number();
    if (below(8) && pwrite(fd, &version, sizeof version, STATE_VERSION_AT) < 0) fail("cannot write");
    if (pwrite(fd, &length, sizeof length, STATE_PATH_LENGTH_AT) < 0 || pwrite(fd, "x", 1, STATE_PATH_AT) < 0) fail("cannot write");
    damage(fd);
    if (*state >= 0) close(*state);
    *state = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  }
  return fd;
}

// Sends a message, mostly as a daemon does. The descriptors that are sent are closed here, but for
// `held`, the other end of the "/dev/fuse", and `state`, a copy.
static void speak(int fd, const char *what, int kind, bool in_process, int *held, int *state) {
  static char text[6000];
  int fds[10], count = kind < 0 ? 0 : below(8) ? 1 : (int)below(10);
  for (int i = 0; i < count; i++) fds[i] = any(i == 0 && below(8) ? kind : (int)below(8), in_process, held, state);
  if (below(32) == 0) {
    memset(text, 'x', sizeof text - 1);
    text[below(4) ? below(sizeof text) : 0] = 0; // also an empty message
    what = text;
  }
  struct iovec data = {(void *)what, strlen(what)};
  union {
    struct cmsghdr header;
    char room[CMSG_SPACE(sizeof fds)];
  } control = {0};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
  if (count > 0) {
    message.msg_control = &control;
    message.msg_controllen = CMSG_SPACE((size_t)count * sizeof *fds);
    control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN((size_t)count * sizeof *fds)};
    memcpy(CMSG_DATA(&control.header), fds, (size_t)count * sizeof *fds);
  }
  if (sendmsg(fd, &message, MSG_NOSIGNAL) < 0 && errno != EPIPE) fail("cannot send");
  for (int i = 0; i < count; i++) close(fds[i]);
}

// What a daemon says, from its start to its end.
static int script(int fd, bool in_process, int step, int *held, int *state) {
  char text[64];
  int name = below(8) ? step : (int)below(sizeof NAMES / sizeof *NAMES);
  switch (step) {
  case 0: case 1: case 2: case 3: case 4: case 5:
    snprintf(text, sizeof text, "put %s", NAMES[name]);
    speak(fd, text, step, in_process, held, state);
    break;
  case 6:
    speak(fd, below(2) ? "ready serving /x" : "ready serving /x, taken over", -1, in_process, held, state);
    break;
  default:
    snprintf(text, sizeof text, "%s%s", (const char *[]){"take", "remove ", "ready ", "ready", "nonsense"}[below(5)], NAMES[below(8)]);
    speak(fd, text, below(4) ? -1 : (int)below(8), in_process, held, state);
  }
  return step + 1;
}

// Checks that what goes out is an answer that the kernel takes.
static void take_answers(int held) {
  struct fuse_out_header answer[2];
  ssize_t n;
  while ((n = recv(held, answer, sizeof answer, MSG_DONTWAIT)) > 0) {
    if (n != sizeof *answer || answer->len != sizeof *answer) fail("an answer has another length than it says");
    if (answer->error != -ENOENT && answer->error != -ETIMEDOUT) fail("an answer says something else than no");
  }
}

static void fuzz(unsigned long times) {
  stderr = fopen("/dev/null", "w"); // the sanitizers write to the descriptor
  signal(SIGPIPE, SIG_IGN); // which /dev/fuse does not send
  hung_ticks = 0xffffffff;
  absent_ticks = 3;
  start_prober();
  int before = descriptors();
  static char buffer[80000];
  unsigned long accepted = 0, requests = 0;
  for (unsigned long i = 0; i < times; i++) {
    int ends[2], held = -1, state = -1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) fail("no socket pair");
    struct daemon *daemon = &next;
    next = (struct daemon){.socket = ends[0], .process = -1};
    store_send_anew();
    store_send(next.socket, "end");
    for (int step = 0; step < 7 + (int)below(4) && daemon->socket >= 0;) {
      step = script(ends[1], true, step, &held, &state);
      heard(daemon);
      if (serving.socket >= 0) daemon = &serving;
    }
    accepted += served.fuse >= 0;
    for (int steps = (int)below(6); steps > 0 && served.fuse >= 0; steps--) {
      for (int sent = (int)below(6); sent > 0 && held >= 0; sent--, requests++)
        if (send(held, buffer, request(buffer, 2 + 2 * i), MSG_DONTWAIT | MSG_NOSIGNAL) < 0) break;
      if (state >= 0) damage(state);
      if (below(3) == 0) tick();
      // As in the guard's loop, it reads only without a daemon.
      if (served.fuse >= 0 && !served.absent && below(2)) stand_in();
      if (served.fuse >= 0 && served.absent) read_requests();
      if (held >= 0) take_answers(held);
    }
    let_go(&next);
    let_go(&serving);
    if (held >= 0) close(held);
    if (state >= 0) close(state);
    close(ends[1]);
    if (below(4) == 0 || count > 30) {
      forget_mount();
      if (descriptors() != before) fail("descriptors are left");
    }
  }
  forget_mount();
  printf("{\"inputs\":%lu,\"accepted\":%lu,\"requests\":%lu}\n", times + requests, accepted, requests);
}

// Talks to the guard that has started this. Nothing of it stays.
static void annoy(int fd, unsigned long count) {
  int held = -1, state = -1;
  char text[64];
  for (unsigned long i = 0; i < count;) {
    for (int step = 0; step < 7 + (int)below(4); i++) step = script(fd, false, step, &held, &state);
    for (size_t name = 0; name < sizeof NAMES / sizeof *NAMES; name++) {
      snprintf(text, sizeof text, "remove %s", NAMES[name]);
      send(fd, text, strlen(text), MSG_NOSIGNAL);
    }
  }
  printf("{\"inputs\":%lu}\n", count);
}

int main(int count, char **arguments) {
  if (count != 4) return 2;
  unsigned long inputs = strtoul(arguments[2], NULL, 10);
  seed = strtoul(arguments[3], NULL, 10);
  const char *fd = getenv("DISKSEQFS_GUARD");
  if (!strcmp(arguments[1], "run")) fuzz(inputs);
  else if (!strcmp(arguments[1], "speak") && fd) annoy(atoi(fd), inputs);
  else return 2;
  return 0;
}
