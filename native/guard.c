// diskseqfs-guard: stands in for the daemon while there is none.
//
// When a daemon dies, whoever looks at the tree waits for the next one. The
// service manager, which has to start it, looks at the tree, too: it stats the
// source of each mount whenever something is mounted. It would wait for itself
// for ever, and the machine with it. So somebody else has to answer it.
//
// A daemon connects to the guard and hands over the FUSE descriptor and the
// memory it shares with its successor (state.h). While it serves, the guard
// does nothing but see that it is alive. Once it is dead, the guard
//
//   - answers what the service manager asks (there is nothing of that name),
//   - keeps all other requests in that memory, for the daemon that comes next,
//   - takes the mount away when none has come for a while: an error is better
//     than waiting for ever.
//
// A daemon whose heartbeat has stopped is killed. The guard has a unit of its
// own, never touches the tree, and does nothing that may block.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

// In ticks of a second each, counted by wake-ups: a clock that jumps, or a
// machine that stood still, costs one.
#define TICK_MS 1000
static unsigned hung_ticks = 10;   // without a heartbeat
static unsigned absent_ticks = 30; // without a daemon
// Who is answered while there is no daemon.
static uint32_t manager = 1;

static struct daemon {
  int connection, fuse, process; // descriptors, -1 for none
  char mountpoint[4096];
  unsigned char *state;
  uint32_t heartbeat;
  unsigned ticks; // since it changed; or since the daemon died
} served = {.connection = -1, .fuse = -1, .process = -1};

static void say(const char *text, const char *detail) { fprintf(stderr, "diskseqfs-guard: %s%s\n", text, detail); }

static uint32_t load(size_t at) { return __atomic_load_n((uint32_t *)(served.state + at), __ATOMIC_ACQUIRE); }
static void store(size_t at, uint32_t value) {
  __atomic_store_n((uint32_t *)(served.state + at), value, __ATOMIC_RELEASE);
}

static void set_down(struct daemon *daemon) {
  if (daemon->connection >= 0) close(daemon->connection);
  if (daemon->fuse >= 0) close(daemon->fuse);
  if (daemon->process >= 0) close(daemon->process);
  if (daemon->state) munmap(daemon->state, STATE_SIZE);
  *daemon = (struct daemon){.connection = -1, .fuse = -1, .process = -1};
}

static bool expects_answer(uint32_t opcode) {
  return opcode != FUSE_FORGET && opcode != FUSE_BATCH_FORGET && opcode != FUSE_INTERRUPT;
}

static void refuse(const struct fuse_in_header *request, int error) {
  struct fuse_out_header answer = {.len = sizeof answer, .error = -error, .unique = request->unique};
  if (write(served.fuse, &answer, sizeof answer) < 0 && errno != ENOENT && errno != ENODEV)
    say("cannot answer: ", strerror(errno));
}

static struct fuse_in_header header_at(size_t at) {
  struct fuse_in_header header;
  memcpy(&header, served.state + at, sizeof header);
  return header;
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

// As SharedState.keep() does.
static bool keep(const void *request, size_t length) {
  const struct slots *slots = SLOT_HEADER_SIZE + length <= small.size ? &small : &big;
  size_t i = 0, count = used(slots);
  while (i < count && load(slots->start + i * slots->size) != 0) i++;
  if (i == slots->count) return false;
  if (i == count) store(slots->used_at, (uint32_t)i + 1);
  size_t at = slots->start + i * slots->size;
  store(at + SLOT_TRIES_AT, 0);
  store(at + SLOT_INTERRUPTED_AT, 0);
  memcpy(served.state + at + SLOT_HEADER_SIZE, request, length);
  store(at, (uint32_t)length);
  return true;
}

// What the daemon had read of the manager's, and did not get to answer.
static void answer_kept(const struct slots *slots) {
  for (size_t i = 0; i < used(slots); i++) {
    size_t at = slots->start + i * slots->size;
    uint32_t length = load(at);
    if (length < sizeof(struct fuse_in_header) || length > slots->size - SLOT_HEADER_SIZE) continue;
    struct fuse_in_header header = header_at(at + SLOT_HEADER_SIZE);
    if (header.pid != manager || !expects_answer(header.opcode)) continue;
    refuse(&header, ENOENT);
    store(at, 0);
  }
}

static void stand_in(void) {
  served.ticks = 0;
  answer_kept(&small);
  answer_kept(&big);
  struct fuse_in_header header = header_at(STATE_LANDING_AT + SLOT_HEADER_SIZE);
  if (header.len >= sizeof header && header.pid == manager && expects_answer(header.opcode)) {
    refuse(&header, ENOENT);
    store(STATE_LANDING_AT + SLOT_HEADER_SIZE, 0);
  }
}

// The daemon is dead, and requests are waiting.
static void read_requests(void) {
  static char buffer[STATE_REQUEST_MAX];
  for (;;) {
    ssize_t n = read(served.fuse, buffer, sizeof buffer);
    if (n < 0 && (errno == EINTR || errno == ENOENT)) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n < (ssize_t)sizeof(struct fuse_in_header)) return set_down(&served); // unmounted, or aborted
    struct fuse_in_header header;
    memcpy(&header, buffer, sizeof header);
    if (header.pid == manager && expects_answer(header.opcode)) refuse(&header, ENOENT);
    else if (!keep(buffer, (size_t)n) && expects_answer(header.opcode)) refuse(&header, ETIMEDOUT);
  }
}

static void tick(void) {
  if (served.fuse < 0) return;
  served.ticks++;
  if (served.connection >= 0) {
    uint32_t now = load(STATE_HEARTBEAT_AT);
    if (now != served.heartbeat) {
      served.heartbeat = now;
      served.ticks = 0;
    } else if (served.ticks >= hung_ticks) {
      say("the daemon does not answer any more; it is killed", "");
      served.ticks = 0;
      if (syscall(SYS_pidfd_send_signal, served.process, SIGKILL, NULL, 0) < 0) say("cannot kill it: ", strerror(errno));
    }
  } else if (served.ticks >= absent_ticks) {
    say("no daemon has come; the mount is taken away: ", served.mountpoint);
    if (umount2(served.mountpoint, MNT_FORCE | MNT_DETACH) < 0) say("cannot unmount: ", strerror(errno));
    set_down(&served);
  }
}

// A daemon says which mount it serves, and hands over two descriptors.
static void welcome(int listener) {
  struct daemon next = {.fuse = -1, .process = -1};
  next.connection = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
  if (next.connection < 0) return;
  struct timeval patience = {.tv_sec = 1};
  setsockopt(next.connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  union {
    struct cmsghdr header;
    char room[CMSG_SPACE(2 * sizeof(int))];
  } control;
  struct iovec data = {next.mountpoint, sizeof next.mountpoint - 1};
  struct msghdr message = {
      .msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  ssize_t n = recvmsg(next.connection, &message, MSG_CMSG_CLOEXEC);
  struct cmsghdr *header = n > 0 ? CMSG_FIRSTHDR(&message) : NULL;
  int fds[2] = {-1, -1};
  if (header && header->cmsg_type == SCM_RIGHTS && header->cmsg_len == CMSG_LEN(sizeof fds))
    memcpy(fds, CMSG_DATA(header), sizeof fds);
  struct ucred peer;
  socklen_t length = sizeof peer;
  struct stat state;
  void *memory = MAP_FAILED;
  next.fuse = fds[0];
  if (fds[1] >= 0 && fstat(fds[1], &state) == 0 && state.st_size >= STATE_SIZE)
    memory = mmap(NULL, STATE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fds[1], 0);
  if (fds[1] >= 0) close(fds[1]);
  if (memory != MAP_FAILED) next.state = memory;
  if (next.state && getsockopt(next.connection, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0)
    next.process = (int)syscall(SYS_pidfd_open, peer.pid, 0);
  if (next.process < 0) {
    say("a daemon that cannot be understood was sent away", "");
    return set_down(&next);
  }
  // From here on it is its turn to read requests.
  set_down(&served);
  served = next;
  served.heartbeat = load(STATE_HEARTBEAT_AT);
  if (send(served.connection, "ok", 2, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) say("cannot answer: ", strerror(errno));
}

static int listen_at(const char *path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (fd < 0 || strlen(path) >= sizeof address.sun_path) return -1;
  strcpy(address.sun_path, path);
  unlink(path); // of a guard before this one
  umask(0077);
  if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 4) < 0) return -1;
  return fd;
}

int main(int count, char **arguments) {
  int option;
  while ((option = getopt(count, arguments, "m:h:a:")) != -1) {
    unsigned long value = optarg ? strtoul(optarg, NULL, 10) : 0;
    if (option == 'm') manager = (uint32_t)value;
    else if (option == 'h') hung_ticks = (unsigned)value;
    else if (option == 'a') absent_ticks = (unsigned)value;
    else return 2;
  }
  if (optind != count - 1) {
    fprintf(stderr, "usage: diskseqfs-guard [-m MANAGER_PID] [-h HUNG_SECONDS] [-a ABSENT_SECONDS] SOCKET\n");
    return 2;
  }
  int listener = listen_at(arguments[optind]);
  if (listener < 0) {
    say("cannot listen: ", strerror(errno));
    return 1;
  }
  struct timespec next;
  clock_gettime(CLOCK_MONOTONIC, &next);
  for (;;) {
    bool absent = served.fuse >= 0 && served.connection < 0;
    struct pollfd fds[] = {
        {.fd = listener, .events = POLLIN},
        {.fd = served.connection, .events = POLLIN},
        {.fd = absent ? served.fuse : -1, .events = POLLIN},
    };
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long wait = (next.tv_sec - now.tv_sec) * 1000 + (next.tv_nsec - now.tv_nsec) / 1000000;
    if (wait <= 0) {
      next = now;
      next.tv_sec += TICK_MS / 1000;
      tick();
      continue;
    }
    if (poll(fds, 3, served.fuse >= 0 ? (int)wait : -1) < 0) continue;
    if (fds[0].revents) welcome(listener);
    else if (fds[1].revents) {
      // It says nothing any more: it is dead.
      close(served.connection);
      served.connection = -1;
      stand_in();
    } else if (fds[2].revents) read_requests();
  }
}
