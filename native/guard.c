// diskseqfs-guard: stands in for the daemon while there is none.
//
// When a daemon dies, whoever looks at the tree waits for the next one. The
// service manager, which has to start it, looks at the tree, too: it stats the
// source of each mount whenever something is mounted. It would wait for itself
// for ever, and the machine with it. So somebody else has to answer it.
//
// A daemon connects to the guard and hands over the FUSE descriptor and the
// memory it shares with its successor (state.h). While it serves, the guard
// sees that it answers: another process asks for the figures of its file system,
// and the daemon is told of each answer. One that does not answer any more is
// killed. Once it is dead, the guard
//
//   - answers what the service manager asks, with an error,
//   - keeps all other requests in that memory, for the daemon that comes next;
//     after a moment only those for which the kernel holds no lock,
//   - takes the mount away when none has come for a while: an error is better
//     than waiting for ever.
//
// A daemon that is leaving for good says so first. The guard has a unit of its
// own, never touches the tree itself, and does nothing that may block.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

// In ticks of a second each, counted by wake-ups: a clock that jumps, or a
// machine that stood still, costs one.
#define TICK_MS 1000
#define PROBE_TICKS 5              // between two looks at the tree
// While somebody waits for a name, or for a list of them, the kernel holds the
// directory's lock; one mkdir or O_CREAT behind them, and everybody waits, the
// service manager as well, whose request then never comes here. Most daemons are
// there again sooner than this.
static unsigned patience_ms = 500;
static unsigned hung_ticks = 20;   // without an answer
static unsigned absent_ticks = 60; // without a daemon
// Who is answered while there is no daemon.
static uint32_t manager = 1;
// A command of the shell, for when the mount has been taken away.
static const char *afterwards;

// Requests that are read before there is a look at what else there is to do: a
// daemon that comes must be heard, whoever asks how often meanwhile.
#define READS_MAX 64
// Of the slots for requests, so many parts, of which one is root's.
#define ROOT_PARTS 4

// The process that asks, see probe().
static int prober = -1;
static bool probing;

static struct daemon {
  // Descriptors, -1 for none. One that has hung up may be alive, and about to
  // call again; one that is dead has no process.
  int connection, fuse, process;
  char mountpoint[4096];
  unsigned char *state;
  bool killed, impatient;
  int64_t died_ms;
  unsigned ticks; // since it was asked, or answered; or since it died
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

// As SharedState.keep() does. Whoever has many threads wait takes no place from root.
static bool keep(const void *request, size_t length) {
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

static int64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * (int64_t)1000 + now.tv_nsec / 1000000;
}

// A number as names have it: decimal, without sign or leading zero. 0 if there is none.
static uint64_t decimal(const char **text, unsigned digits_max) {
  uint64_t value = 0;
  unsigned digits = 0;
  if (**text == '0') return 0;
  for (; **text >= '0' && **text <= '9'; (*text)++, digits++) {
    unsigned digit = (unsigned)(**text - '0');
    if (digits == digits_max || value > (UINT64_MAX - digit) / 10) return 0;
    value = value * 10 + digit;
  }
  return value;
}

// As src/diskseq.ts has it: ids of symlinks and of disks, and ids of partitions.
enum { SYMLINK = 1, PARTITION_SHIFT = 1, PARTITION_MAX = 0x3ff, WAITING = 1 << 11, DISKSEQ_SHIFT = 12 };
enum { DISKSEQ_BITS = 51, NUMBER_BITS = 8, MINOR_BITS = 20, PARTITION_DISKSEQ_BITS = 35 };
static const uint64_t PARTITION_INODE = (uint64_t)1 << 63;

// A name in the tree.
struct name {
  uint64_t diskseq, partition; // diskseq 0: it is none
  bool symlink;
};

static struct name parse_name(const char *text) {
  struct name name = {.diskseq = decimal(&text, 20)};
  bool whole = *text == 0;
  if (strncmp(text, "-part", 5) == 0) {
    text += 5;
    name.symlink = true;
    name.partition = decimal(&text, 5);
  } else if (*text == 'p') {
    text++;
    name.partition = decimal(&text, 5);
  }
  if (*text || name.diskseq >> DISKSEQ_BITS || name.partition > PARTITION_MAX) name.diskseq = 0;
  if (name.partition == 0 && !whole) name.diskseq = 0;
  return name;
}

static bool read_line(const char *path, char *into, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  ssize_t n = read(fd, into, size - 1);
  close(fd);
  into[n > 0 ? n : 0] = 0;
  return n > 0;
}

// Of a partition that sysfs has; -1 for any other.
static int64_t minor_of(const struct name *name) {
  DIR *disks = opendir("/sys/block");
  int64_t found = -1;
  for (struct dirent *disk; disks && found < 0 && (disk = readdir(disks));) {
    char path[1024], text[64];
    unsigned major, minor;
    size_t length = strlen(disk->d_name);
    snprintf(path, sizeof path, "/sys/block/%s/diskseq", disk->d_name);
    if (disk->d_name[0] == '.' || !read_line(path, text, sizeof text)) continue;
    if (strtoull(text, NULL, 10) != name->diskseq) continue;
    bool digit = disk->d_name[length - 1] >= '0' && disk->d_name[length - 1] <= '9';
    snprintf(path, sizeof path, "/sys/block/%s/%s%s%u/dev", disk->d_name, disk->d_name, digit ? "p" : "",
             (unsigned)name->partition);
    if (!read_line(path, text, sizeof text) || sscanf(text, "%u:%u", &major, &minor) != 2) break;
    found = minor;
  }
  if (disks) closedir(disks);
  return found;
}

static uint64_t link_id(const struct name *name, uint64_t kind) {
  return name->diskseq << DISKSEQ_SHIFT | name->partition << PARTITION_SHIFT | kind;
}

// Of what has that name now; 0 for what has none.
static uint64_t id_of(const struct name *name) {
  if (name->symlink) return link_id(name, SYMLINK);
  if (name->partition == 0) return name->diskseq << DISKSEQ_SHIFT;
  int64_t minor = minor_of(name);
  if (minor < 0 || name->partition >> NUMBER_BITS || name->diskseq >> PARTITION_DISKSEQ_BITS) return 0;
  return PARTITION_INODE | (name->diskseq << NUMBER_BITS | name->partition) << MINOR_BITS | (uint64_t)minor;
}

// Whether the kernel has an inode of that id. It answers so when it is asked to
// read its attributes again, which is all that this does to it.
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

// A link that stands for `name` until the next daemon says where it leads: to
// that very name, see linkId() in src/diskseq.ts.
static void put_off(const struct fuse_in_header *request, const char *text, const struct name *name) {
  uint64_t id = link_id(name, name->symlink ? SYMLINK : WAITING);
  struct {
    struct fuse_out_header header;
    struct fuse_entry_out entry; // valid for no time at all
  } answer = {.header = {.len = sizeof answer, .unique = request->unique}};
  answer.entry.nodeid = id;
  answer.entry.attr.ino = id;
  answer.entry.attr.mode = S_IFLNK | 0777;
  answer.entry.attr.nlink = 1;
  answer.entry.attr.size = strlen(text);
  respond(&answer, sizeof answer);
}

// Answers what must not wait for the next daemon.
static bool answer(const char *request, size_t length) {
  struct fuse_in_header header;
  memcpy(&header, request, sizeof header);
  if (!expects_answer(header.opcode)) return false;
  bool lookup = header.opcode == FUSE_LOOKUP;
  if (lookup && header.pid != manager && !served.impatient) return false;
  const char *text = lookup && memchr(request + sizeof header, 0, length - sizeof header) ? request + sizeof header : "";
  struct name name = parse_name(text);
  uint64_t id = name.diskseq == 0 ? 0 : id_of(&name);
  // A name that is in use must not be answered in a way that has the kernel drop
  // it: /proc/swaps and the like would call the device deleted. Nor need it be:
  // whoever asks for one that the kernel has holds no lock.
  bool in_use = id != 0 && has_inode(id);
  if (header.pid == manager) {
    // ENOMEM is what every kernel takes for an error of its own (fuse_dentry_revalidate).
    refuse(&header, in_use ? ENOMEM : ENOENT);
    return true;
  }
  switch (header.opcode) {
  // The tree's shape never changes, so these need no daemon. (udev, which takes
  // links of its own away, wants to hear that there is none.)
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
    if (in_use) return false;
    // Whoever reads the link waits for the next daemon, with no lock held.
    if (name.diskseq == 0) refuse(&header, ENOENT);
    else put_off(&header, text, &name);
    return true;
  case FUSE_READDIR:
    if (!served.impatient) return false;
    refuse(&header, ETIMEDOUT);
    return true;
  default:
    return false;
  }
}

// The caller of a request wants to give up. That is for the next daemon to hear, as
// SharedState.interrupt() has it; it needs no slot, or users could fill them.
static void interrupt(const struct slots *slots, uint64_t unique) {
  for (size_t i = 0; i < used(slots); i++) {
    size_t at = slots->start + i * slots->size;
    struct fuse_in_header header;
    memcpy(&header, served.state + at + SLOT_HEADER_SIZE, sizeof header);
    if (load(at) != 0 && header.unique == unique) store(at + SLOT_INTERRUPTED_AT, 1);
  }
}

// Of FORGET the next daemon needs not hear: it does not know how many lookups were
// answered before it, and asks the kernel instead. There may be as many as names
// that the kernel had.
static void hear(const char *request, size_t length) {
  struct fuse_in_header header;
  struct fuse_interrupt_in what;
  memcpy(&header, request, sizeof header);
  if (header.opcode != FUSE_INTERRUPT || length < sizeof header + sizeof what) return;
  memcpy(&what, request + sizeof header, sizeof what);
  interrupt(&small, what.unique);
  interrupt(&big, what.unique);
}

// What the daemon had read, and did not get to answer.
static void answer_kept(const struct slots *slots) {
  for (size_t i = 0; i < used(slots); i++) {
    size_t at = slots->start + i * slots->size;
    uint32_t length = load(at);
    if (length < sizeof(struct fuse_in_header) || length > slots->size - SLOT_HEADER_SIZE) continue;
    if (answer((const char *)served.state + at + SLOT_HEADER_SIZE, length)) store(at, 0);
  }
}

static void answer_all_kept(void) {
  size_t landing = STATE_LANDING_AT + SLOT_HEADER_SIZE;
  uint32_t length = load(landing);
  answer_kept(&small);
  answer_kept(&big);
  if (length >= sizeof(struct fuse_in_header) && length <= STATE_REQUEST_MAX &&
      answer((const char *)served.state + landing, length))
    store(landing, 0);
}

static void stand_in(void) {
  served.ticks = 0;
  served.died_ms = now_ms();
  answer_all_kept();
}

static void lose_patience(void) {
  served.impatient = true;
  answer_all_kept();
}

// The daemon is dead, and requests are waiting.
static void read_requests(void) {
  static char buffer[STATE_REQUEST_MAX];
  for (int i = 0; i < READS_MAX; i++) {
    ssize_t n = read(served.fuse, buffer, sizeof buffer);
    if (n < 0 && (errno == EINTR || errno == ENOENT)) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n < (ssize_t)sizeof(struct fuse_in_header)) return set_down(&served); // unmounted, or aborted
    struct fuse_in_header header;
    memcpy(&header, buffer, sizeof header);
    if (!expects_answer(header.opcode)) hear(buffer, (size_t)n);
    else if (!answer(buffer, (size_t)n) && !keep(buffer, (size_t)n)) refuse(&header, ETIMEDOUT);
  }
}

struct question {
  dev_t device; // of the mount
  char mountpoint[sizeof served.mountpoint];
};

enum finding { ANSWERED, HIDDEN, FAILED };

// Whether the daemon answers.
//
// It is asked for the figures of its file system, for which the kernel needs no
// more than the mount's root. For a name that it does not have it would need the
// directory's lock, and that any user can hold for as long as he likes: he reads the
// directory into memory that he does not provide, with a mkdir waiting behind that.
//
// If something else is mounted over the tree it cannot be asked, which is not the
// daemon's fault.
static char look(const struct question *question) {
  struct statx root;
  struct statfs figures;
  int fd = open(question->mountpoint, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT || errno == ENOTDIR ? HIDDEN : FAILED;
  char finding = FAILED;
  // Which file system it is the kernel knows by itself.
  if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &root) == 0) {
    if (makedev(root.stx_dev_major, root.stx_dev_minor) != question->device) finding = HIDDEN;
    else if (fstatfs(fd, &figures) == 0) finding = ANSWERED; // not ENOTCONN, of a connection that has ended
  }
  close(fd);
  return finding;
}

// Runs as a process of its own, which may wait in the kernel for as long as
// there is no answer.
static void probe(int guard) {
  struct question question;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (;;) {
    if (recv(guard, &question, sizeof question, 0) != sizeof question) _exit(0);
    char finding = look(&question);
    if (send(guard, &finding, 1, MSG_NOSIGNAL) < 0) _exit(0);
  }
}

static void start_prober(void) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) exit(1);
  pid_t pid = fork();
  if (pid == 0) {
    close(ends[0]);
    probe(ends[1]);
  }
  close(ends[1]);
  if (pid < 0) exit(1);
  prober = ends[0];
}

static void ask(void) {
  struct question question;
  uint32_t device = load(STATE_DEVICE_AT);
  question.device = makedev(device >> 20, device & 0xfffff);
  memcpy(question.mountpoint, served.mountpoint, sizeof question.mountpoint);
  if (send(prober, &question, sizeof question, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) return;
  probing = true;
  served.ticks = 0;
}

// The process that asks has been answered: by the daemon, or by the kernel.
static void answered(void) {
  char finding;
  if (recv(prober, &finding, 1, MSG_DONTWAIT) != 1) {
    say("the process that looks at the tree has ended", "");
    exit(1);
  }
  probing = false;
  served.ticks = 0;
  if (served.connection >= 0 && finding != FAILED) send(served.connection, "ok", 2, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void hung_up(void) {
  close(served.connection);
  served.connection = -1;
}

// It will not read or answer any more requests.
static void died(void) {
  if (served.connection >= 0) hung_up();
  close(served.process);
  served.process = -1;
  stand_in();
}

static void take_away(void) {
  say("no daemon has come; the mount is taken away: ", served.mountpoint);
  if (umount2(served.mountpoint, MNT_FORCE | MNT_DETACH) < 0) say("cannot unmount: ", strerror(errno));
  set_down(&served);
  if (afterwards && fork() == 0) {
    execl("/bin/sh", "sh", "-c", afterwards, (char *)NULL);
    say("cannot run a shell: ", strerror(errno));
    _exit(1);
  }
}

static void tick(void) {
  if (served.fuse < 0) return;
  served.ticks++;
  if (served.process < 0) {
    if (served.ticks >= absent_ticks) take_away();
  } else if (served.killed) {
    // Threads of it may still wait for a disk, and its end with them. They
    // never come back to the program.
    died();
  } else if (!probing) {
    if (served.ticks >= PROBE_TICKS && served.connection >= 0) ask();
  } else if (served.ticks >= hung_ticks) {
    say("the daemon does not answer any more; it is killed", "");
    if (syscall(SYS_pidfd_send_signal, served.process, SIGKILL, NULL, 0) < 0) say("cannot kill it: ", strerror(errno));
    else served.killed = true;
    served.ticks = 0;
  }
}

// Anything else might block, or end this process with a signal.
static bool is_fuse(int fd) {
  struct stat file;
  return fstat(fd, &file) == 0 && S_ISCHR(file.st_mode) && file.st_rdev == makedev(10, 229) &&
         (fcntl(fd, F_GETFL) & O_NONBLOCK);
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
  struct cmsghdr *header = n >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
  int fds[2] = {-1, -1};
  // However few there are: they are this process's now. There is no room for more.
  if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
    memcpy(fds, CMSG_DATA(header), header->cmsg_len - CMSG_LEN(0));
  bool whole = n > 0 && !(message.msg_flags & (MSG_TRUNC | MSG_CTRUNC));
  struct ucred peer;
  socklen_t length = sizeof peer;
  struct stat state;
  void *memory = MAP_FAILED;
  next.fuse = fds[0];
  if (fds[1] >= 0 && fstat(fds[1], &state) == 0 && state.st_size >= STATE_SIZE)
    memory = mmap(NULL, STATE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fds[1], 0);
  if (fds[1] >= 0) close(fds[1]);
  if (memory != MAP_FAILED) next.state = memory;
  uint32_t version = 0;
  if (next.state) memcpy(&version, next.state + STATE_VERSION_AT, sizeof version);
  if (whole && version == STATE_VERSION && is_fuse(next.fuse) &&
      getsockopt(next.connection, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0)
    next.process = (int)syscall(SYS_pidfd_open, peer.pid, 0);
  if (next.process < 0) {
    say("a daemon that cannot be understood was sent away", "");
    return set_down(&next);
  }
  // From here on it is its turn to read requests.
  set_down(&served);
  served = next;
  if (send(served.connection, "ok", 2, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) say("cannot answer: ", strerror(errno));
}

// It waits for nobody to be ready; see sd_notify(3).
static void tell_ready(void) {
  const char *path = getenv("NOTIFY_SOCKET");
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (!path || strlen(path) >= sizeof address.sun_path) return;
  strcpy(address.sun_path, path);
  socklen_t length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
  if (path[0] == '@') address.sun_path[0] = 0;
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || sendto(fd, "READY=1", 7, MSG_NOSIGNAL, (struct sockaddr *)&address, length) < 0)
    say("cannot tell the service manager: ", strerror(errno));
  if (fd >= 0) close(fd);
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
  while ((option = getopt(count, arguments, "m:p:h:a:x:")) != -1) {
    unsigned long value = optarg ? strtoul(optarg, NULL, 10) : 0;
    if (option == 'm') manager = (uint32_t)value;
    else if (option == 'p') patience_ms = (unsigned)value;
    else if (option == 'x') afterwards = optarg;
    else if (option == 'h') hung_ticks = (unsigned)value;
    else if (option == 'a') absent_ticks = (unsigned)value;
    else return 2;
  }
  if (optind != count - 1) {
    fprintf(stderr, "usage: diskseqfs-guard [-m MANAGER_PID] [-p PATIENCE_MS] [-h HUNG_SECONDS] [-a ABSENT_SECONDS] [-x COMMAND] SOCKET\n");
    return 2;
  }
  int listener = listen_at(arguments[optind]);
  if (listener < 0) {
    say("cannot listen: ", strerror(errno));
    return 1;
  }
  signal(SIGCHLD, SIG_IGN);
  start_prober();
  tell_ready();
  int64_t next = now_ms();
  for (;;) {
    bool absent = served.fuse >= 0 && served.process < 0;
    struct pollfd fds[] = {
        {.fd = listener, .events = POLLIN},
        {.fd = served.connection, .events = POLLIN},
        {.fd = served.process, .events = POLLIN},
        {.fd = absent ? served.fuse : -1, .events = POLLIN},
        {.fd = prober, .events = POLLIN},
    };
    int64_t now = now_ms(), wait = next - now;
    if (wait <= 0) {
      next = now + TICK_MS;
      tick();
      continue;
    }
    if (absent && !served.impatient) {
      int64_t left = served.died_ms + patience_ms - now;
      if (left <= 0) {
        lose_patience();
        continue;
      }
      if (left < wait) wait = left;
    }
    if (poll(fds, sizeof fds / sizeof *fds, served.fuse >= 0 ? (int)wait : -1) < 0) continue;
    char farewell[8];
    if (fds[0].revents) welcome(listener);
    else if (fds[2].revents) died();
    else if (fds[1].revents) {
      if (recv(served.connection, farewell, sizeof farewell, MSG_DONTWAIT) > 0) set_down(&served);
      else hung_up();
    } else if (fds[4].revents) answered();
    else if (fds[3].revents) read_requests();
  }
}
