// The guard (native/guard.c), fed with garbage. Built with sanitizers, see
// test/helpers/sanitized.ts.
//
//   guard-fuzz run COUNT SEED          its functions, in this process
//   guard-fuzz connect SOCKET COUNT SEED   connections to one that runs
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
#ifndef GUARD
#define GUARD "../../native/guard.c"
#endif
#include GUARD
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

// Of the listening socket, while there is one.
static char path[64];
static void clean_up(void) {
  if (path[0]) unlink(path);
}

static void fail(const char *what) {
  dprintf(1, "guard: %s\n", what);
  clean_up();
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

// Numbers that are wrong, and requests that are none, where the guard looks for them.
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

// A connection that says something: mostly what a daemon says. The descriptors
// that are sent are closed here, but for `held`, the other end of the "/dev/fuse".
static int call(const char *socket_path, bool in_process, int *held, int *state) {
  int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strcpy(address.sun_path, socket_path);
  // It may have its socket, and not listen yet.
  int tries = 1000;
  while (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
    if (errno != ECONNREFUSED || tries-- == 0 || usleep(10000) < 0) fail("cannot connect");
  struct timeval patience = {.tv_sec = 5};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  int fds[10], count = below(4) ? 2 : (int)below(10), ends[2];
  *held = *state = -1;
  for (int i = 0; i < count; i++) {
    int kind = below(6) ? i : (int)below(8);
    if (kind == 0 && in_process) {
      if (*held >= 0) close(*held);
      fuse_pair(ends, below(16) ? SOCK_NONBLOCK : 0);
      fds[i] = ends[0];
      *held = ends[1];
    } else if (kind == 0) fds[i] = open("/dev/fuse", O_RDWR | O_CLOEXEC | (below(4) ? O_NONBLOCK : 0));
    else if (kind == 1) fds[i] = memory(STATE_SIZE);
    else if (kind == 2) fds[i] = memory(below(2) ? STATE_SIZE - 1 : 0);
    else if (kind == 3) fds[i] = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    else if (kind == 4) fds[i] = open("/dev/zero", O_RDWR | O_CLOEXEC);
    else if (kind == 5) fds[i] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    else fds[i] = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (fds[i] < 0) fail("no descriptor");
    if (kind == 1) {
      uint32_t version = STATE_VERSION;
      if (below(8) && pwrite(fds[i], &version, sizeof version, STATE_VERSION_AT) < 0) fail("cannot write");
      damage(fds[i]);
      if (i == 1) *state = fcntl(fds[i], F_DUPFD_CLOEXEC, 0);
    }
  }
  static char text[6000];
  memset(text, 'x', sizeof text);
  struct iovec data = {text, below(8) ? 1 + below(200) : below(2) ? 0 : 4000 + below(2000)};
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
  if (sendmsg(fd, &message, MSG_NOSIGNAL) < 0) fail("cannot send");
  for (int i = 0; i < count; i++) close(fds[i]);
  return fd;
}

// What goes out must be an answer that the kernel takes.
static void take_answers(int held) {
  struct fuse_out_header answer[2];
  ssize_t n;
  while ((n = recv(held, answer, sizeof answer, MSG_DONTWAIT)) > 0) {
    if (n != sizeof *answer || answer->len != sizeof *answer) fail("an answer has another length than it says");
    if (answer->error != -ENOENT && answer->error != -ETIMEDOUT) fail("an answer says something else than no");
  }
}

static void run(unsigned long count) {
  __asan_set_death_callback(clean_up);
  snprintf(path, sizeof path, "/tmp/guard-fuzz-%d", getpid());
  int listener = listen_at(path);
  if (listener < 0) fail("cannot listen");
  stderr = fopen("/dev/null", "w"); // the sanitizers write to the descriptor
  signal(SIGPIPE, SIG_IGN); // which /dev/fuse does not send
  hung_ticks = 0xffffffff;
  absent_ticks = 3;
  int before = descriptors();
  static char buffer[80000];
  unsigned long accepted = 0, requests = 0;
  for (unsigned long i = 0; i < count; i++) {
    int held, state;
    int connection = call(path, true, &held, &state);
    welcome(listener);
    accepted += served.fuse >= 0 && served.ticks == 0;
    for (int steps = (int)below(6); steps > 0 && served.fuse >= 0; steps--) {
      for (int sent = (int)below(6); sent > 0 && held >= 0; sent--, requests++)
        if (send(held, buffer, request(buffer, 2 + 2 * i), MSG_DONTWAIT | MSG_NOSIGNAL) < 0) break;
      if (state >= 0) damage(state);
      if (below(3) == 0) tick();
      // As in the guard's loop: only without a daemon does it read.
      if (served.connection >= 0 && below(2)) {
        close(served.connection);
        served.connection = -1;
        stand_in();
      }
      if (served.fuse >= 0 && served.connection < 0) read_requests();
      if (held >= 0) take_answers(held);
    }
    if (held >= 0) close(held);
    if (state >= 0) close(state);
    close(connection);
    if (below(4) == 0) {
      set_down(&served);
      if (descriptors() != before) fail("descriptors are left");
    }
  }
  set_down(&served);
  clean_up();
  printf("{\"inputs\":%lu,\"accepted\":%lu,\"requests\":%lu}\n", count + requests, accepted, requests);
  close(listener);
}

static void annoy(const char *socket_path, unsigned long count) {
  unsigned long accepted = 0;
  for (unsigned long i = 0; i < count; i++) {
    int held, state;
    int connection = call(socket_path, false, &held, &state);
    char answer[8];
    ssize_t n = recv(connection, answer, sizeof answer, 0);
    if (n < 0 && errno != ECONNRESET) fail("no answer");
    accepted += n > 0;
    if (state >= 0) close(state);
    close(connection);
  }
  printf("{\"inputs\":%lu,\"accepted\":%lu}\n", count, accepted);
}

int main(int count, char **arguments) {
  if (count == 4 && !strcmp(arguments[1], "run")) {
    seed = strtoul(arguments[3], NULL, 10);
    run(strtoul(arguments[2], NULL, 10));
  } else if (count == 5 && !strcmp(arguments[1], "connect")) {
    seed = strtoul(arguments[4], NULL, 10);
    annoy(arguments[2], strtoul(arguments[3], NULL, 10));
  } else return 2;
  return 0;
}
