// SPDX-License-Identifier: MIT
// diskseqfs-guard: starts the daemon, and stands in for it while there is none.
//
// It is the service's main process. It stores what an incoming daemon needs (store.h): the FUSE
// connection, the shared memory (../shared/state.h), and the sockets in which pins wait. It hands
// these to each daemon that it starts, and starts the next daemon as soon as one has ended.
//
// When a daemon dies, processes that use the tree wait for the next one. The service
// manager is one of them: it stats the source of each mount whenever something is
// mounted. So while there is no daemon, the guard
//
//   - answers the service manager's requests, with an error,
//   - stores all other requests in the shared memory for the next daemon; after a
//     moment only those for which the kernel holds no lock,
//   - unmounts the tree if no daemon has started for a while: an error is better
//     than waiting for ever. It goes on trying, less and less often.
//
// While a daemon serves, the guard checks that it answers: another process calls statfs(2)
// on the tree. A daemon that does not answer is killed.
//
// A new guard (after an upgrade, or a crash) finds the daemon of the previous guard at
// work. It starts another daemon, which takes over from that one. So there is always
// a process that answers.
//
// Guard and daemon may end at the same time. The service manager would then have to start the next
// guard, but it may be waiting for an answer of the tree itself, or may start nothing for minutes
// while it handles events (of disks, for example). So the service manager never has the
// connection: only processes that can answer have it. The third of these is the
// understudy, a fork of the guard. It receives what the guard stores, and does nothing until
// both have ended. Then it is the guard until the next one starts, and gives everything to that one.
//
// Messages on the socket between guard and daemon, with descriptors:
//   guard:  NAME (stored descriptors), "end"; "taken"; "ok"; "leave"; "give" (asks for the
//           connection, which no guard has any more)
//   daemon: "put NAME" (descriptors to store), "remove NAME"; "take"; "ready TEXT";
//           "over" (no daemon is to follow)
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "guard.h"
#include "requests.h"
#include "store.h"
#include "../shared/state.h"

// Times are counted in ticks of a second, one for each wake-up: a clock that jumps, or a
// machine that stood still, costs one tick.
#define TICK_MS 1000
#define PROBE_TICKS 5              // between two probes of the daemon
// How long LOOKUP and READDIR wait for the next daemon. The kernel holds the directory's lock
// meanwhile; behind a mkdir or O_CREAT that wants the lock every process waits, also the service
// manager, whose request then never arrives here. Most daemons start faster.
static unsigned name_wait_ms = 500;
static unsigned hung_ticks = 20;   // without an answer
static unsigned absent_ticks = 60; // without a daemon
// Shell commands: one to run after the tree was unmounted, one after it was mounted again.
static const char *afterwards, *mounted;
// After this, the service counts as started even without a daemon.
#define START_TICKS 20
static unsigned start_ticks;
// For a daemon to end after "leave", or after it has closed its socket.
#define LEAVE_TICKS 2
// For a daemon to be ready, or to ask for its turn.
#define NEXT_TICKS 60
// For a daemon to say "over" after the tree was unmounted.
#define OVER_TICKS 3
// A daemon that has served for this long does not count as one that ends as soon as it is ready.
#define SERVED_MS 10000
// Between two starts after a daemon has ended by itself: doubled each time, up to the second figure; up to the
// third if the daemon was ready, as the mount then comes and goes each time.
#define RETRY_MS 100
#define RETRY_MAX_MS 10000
#define RETRY_READY_MAX_MS 300000
#define DOUBLINGS_MAX 12
// For the service manager to start the next guard, before the understudy starts a daemon.
#define UNDERSTUDY_MS 1000
// How often waiting for a daemon starts again because somebody has killed one before it was ready.
#define KILLS_MAX 300
// Stored for the next guard, and not sent to daemons.
#define STORED_DAEMON ".daemon" // the socket, and the process
#define STORED_UNDERSTUDY ".understudy"
#define SCM_MAX_FD 253 // of the kernel (net/scm.h)

// How much lower the nice value of a starting daemon is, as callers wait for it. Only until it is ready: from then on
// users decide how much it works.
#define HURRY 10

// The process that asks, see probe().
static int prober = -1;
static pid_t prober_pid;
static bool probing;

struct served served = {.fuse = -1};
uint32_t manager = 1;

// A daemon: the guard's end of the socket pair, and the process (a pidfd).
struct daemon {
  int socket, process;
  pid_t pid;
  bool asks;     // it wants its turn
  bool ready, over, killed;
  unsigned ticks;
  int64_t ready_ms;
};
#define NONE {.socket = -1, .process = -1}
// The daemon that reads requests, and the one that was started after it.
static struct daemon serving = NONE, next = NONE;

void say(const char *text, const char *detail) { fprintf(stderr, "diskseqfs-guard: %s%s\n", text, detail); }

int64_t now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * (int64_t)1000 + now.tv_nsec / 1000000;
}

bool read_line(const char *path, char *into, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  ssize_t n = read(fd, into, size - 1);
  close(fd);
  into[n > 0 ? n : 0] = 0;
  return n > 0;
}

// In a forked process: signals end it as usual.
static void unblock(void) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
}

static bool is_there(const struct daemon *daemon) { return daemon->process >= 0; }

static void close_and_forget(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

static void let_go(struct daemon *daemon) {
  close_and_forget(&daemon->socket);
  close_and_forget(&daemon->process);
  *daemon = (struct daemon)NONE;
}

static bool say_to(const struct daemon *daemon, const char *text) {
  return daemon->socket >= 0 && send(daemon->socket, text, strlen(text), MSG_NOSIGNAL | MSG_DONTWAIT) >= 0;
}

// Receives a message, which gets a terminating zero, and its descriptors (SCM_MAX_FD at most). -> as recvmsg(2)
static ssize_t receive(int socket, char *text, size_t size, int *fds, size_t *count, int flags) {
  union {
    struct cmsghdr header;
    char room[CMSG_SPACE(SCM_MAX_FD * sizeof(int))];
  } control;
  struct iovec data = {text, size - 1};
  struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
  ssize_t n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC | flags);
  struct cmsghdr *header = n >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
  *count = 0;
  if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
    *count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(fds, CMSG_DATA(header), *count * sizeof(int));
  }
  text[n > 0 ? n : 0] = 0;
  return n;
}

// The understudy (-1, 0 if there is none), and a pidfd of this process, for it.
static int understudy_socket = -1;
static pid_t understudy_pid;
static int own_process = -1;
// In the understudy: its end of the socket to the guard, or to the next guard.
static int relief = -1;
static bool is_the_guard;

static void start_understudy(void);
static void kill_daemon(struct daemon *daemon);

// When the next daemon is to be started.
static int64_t start_at_ms;
// The service manager takes the service for started.
static bool told_ready;
// The guard was told to end; the tree is not to be mounted again.
static bool leaves, for_good;
static int signals = -1;

// Ends the understudy before anything changes of what it guards.
static void stop_understudy(void) {
  if (understudy_pid > 0) {
    kill(understudy_pid, SIGKILL);
    waitpid(understudy_pid, NULL, 0);
  }
  understudy_pid = 0;
  store_follow(-1);
  close_and_forget(&understudy_socket);
  store_remove(STORED_UNDERSTUDY);
}

static void stand_in(void) {
  if (served.absent) return;
  served.absent = true;
  served.name_wait_over = false;
  served.ticks = 0;
  served.died_ms = now_ms();
  answer_all_stored();
}

static void detach(void) {
  stop_understudy();
  if (served.state) munmap(served.state, STATE_SIZE);
  served.fuse = -1;
  served.state = NULL;
  served.absent = served.name_wait_over = false;
}

static void start_prober(void);

// Forgets a mount that no daemon can go on with. A process that still has these descriptors is ending, which may
// take as long as a disk hangs.
static void forget_mount(void) {
  int lock = store_get("lock");
  if (lock >= 0) flock(lock, LOCK_UN);
  detach();
  store_clear(NULL);
  // The prober may wait for an answer of that mount.
  if (probing) start_prober();
}

// Reading anything else might block, or end this process by a signal.
static bool is_fuse(int fd) {
  struct stat file;
  return fstat(fd, &file) == 0 && S_ISCHR(file.st_mode) && file.st_rdev == makedev(10, 229) &&
         (fcntl(fd, F_GETFL) & O_NONBLOCK);
}

// Attaches to the mount of the stored descriptors, if this guard can stand in for it.
static void attach(void) {
  int fuse = store_get("fuse"), fd = store_get("state");
  struct stat file;
  uint32_t version, length;
  detach();
  if (fuse < 0 || !is_fuse(fuse) || fstat(fd, &file) < 0 || file.st_size < STATE_SIZE) return;
  void *memory = mmap(NULL, STATE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return;
  served.state = memory;
  version = load(STATE_VERSION_AT);
  length = load(STATE_PATH_LENGTH_AT);
  if (version != STATE_VERSION || length >= sizeof served.mountpoint || STATE_PATH_AT + length > STATE_HEADER_SIZE)
    return detach();
  memcpy(served.mountpoint, served.state + STATE_PATH_AT, length);
  served.mountpoint[length] = 0;
  served.fuse = fuse;
  start_understudy();
}

static void end_name_wait(void) {
  served.name_wait_over = true;
  answer_all_stored();
}

struct question {
  dev_t device; // of the mount
  char mountpoint[sizeof served.mountpoint];
};

enum finding { ANSWERED, HIDDEN, FAILED };

// Whether the daemon answers.
//
// It is asked by fstatfs(2), for which the kernel needs only the mount's root. To look up an
// unknown name it would need the directory's lock, which any user can hold for ever: with a
// read of the directory into memory that is never served, and a mkdir that waits behind it.
//
// If something else is mounted over the tree, the daemon cannot be asked, which is not
// its fault.
static char look(const struct question *question) {
  struct statx root;
  struct statfs figures;
  int fd = open(question->mountpoint, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT || errno == ENOTDIR ? HIDDEN : FAILED;
  char finding = FAILED;
  // The kernel knows the device number by itself.
  if (statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, &root) == 0) {
    if (makedev(root.stx_dev_major, root.stx_dev_minor) != question->device) finding = HIDDEN;
    else if (fstatfs(fd, &figures) == 0) finding = ANSWERED; // not ENOTCONN, of a connection that has ended
  }
  close(fd);
  return finding;
}

// The prober, a process of its own, as it waits in the kernel while there is no
// answer.
static void probe(int guard) {
  struct question question;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  for (;;) {
    if (recv(guard, &question, sizeof question, 0) != sizeof question) _exit(0);
    char finding = look(&question);
    if (send(guard, &finding, 1, MSG_NOSIGNAL) < 0) _exit(0);
  }
}

// Starts a prober in place of the one there is. If that fails, the next probe tries again.
static void start_prober(void) {
  int ends[2];
  if (prober >= 0) kill(prober_pid, SIGKILL);
  close_and_forget(&prober);
  probing = false;
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) return say("cannot look at the tree: ", strerror(errno));
  pid_t pid = fork();
  if (pid == 0) {
    // It must have none of the stored descriptors open, as it may outlive all other processes.
    enum { SOCKET = STDERR_FILENO + 1 };
    unblock();
    dup2(ends[1], SOCKET);
    close_range(SOCKET + 1, ~0U, 0);
    probe(SOCKET);
  }
  close(ends[1]);
  if (pid < 0) {
    say("cannot look at the tree: ", strerror(errno));
    close(ends[0]);
    return;
  }
  prober = ends[0];
  prober_pid = pid;
}

static void take_away(const char *why);
static void resume(void);
static _Noreturn void loop(void);

// A message of the guard, or of the next one.
static void hear_guard(void) {
  char text[64];
  int fds[SCM_MAX_FD];
  size_t count;
  ssize_t n = receive(relief, text, sizeof text, fds, &count, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n > 0 && store_hear(text, fds, count)) return;
  if (n > 0) {
    // The next guard, which owns all of this.
    stop_understudy();
    kill_daemon(&next);
    store_send_all(relief);
  } else if (is_the_guard && served.fuse >= 0) {
    // No process has the other end, and no guard will come.
    take_away("the service has ended; the mount is taken away: ");
  }
  _exit(0);
}

// The understudy, until the guard has ended (`guard` becomes readable), and also the daemon that reads requests
// (`reader`), if there is one.
static void understudy(int guard, int reader) {
  bool alone = false;
  for (;;) {
    struct pollfd fds[] = {
        {.fd = relief, .events = POLLIN},
        {.fd = alone ? -1 : guard, .events = POLLIN},
        {.fd = alone ? reader : -1, .events = POLLIN},
    };
    if (poll(fds, sizeof fds / sizeof *fds, -1) < 0) continue;
    if (fds[0].revents) hear_guard();
    else if (fds[1].revents) alone = true;
    if (alone && (reader < 0 || fds[2].revents)) return;
  }
}

// Guard and daemon have ended: from now on this process is the guard.
static void be_the_guard(void) {
  is_the_guard = true;
  own_process = (int)syscall(SYS_pidfd_open, getpid(), 0);
  start_prober();
  resume();
  start_at_ms = now_ms() + UNDERSTUDY_MS;
  loop();
}

static void start_understudy(void) {
  int ends[2];
  struct daemon *reader = is_there(&serving) ? &serving : &next;
  stop_understudy();
  if (own_process < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0)
    return say("there is no understudy: ", strerror(errno));
  pid_t pid = fork();
  if (pid == 0) {
    unblock();
    int guard = own_process, process = reader->process;
    int *others[] = {&ends[0], &relief, &prober, &signals};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) close_and_forget(others[i]);
    reader->process = -1;
    let_go(&serving);
    let_go(&next);
    relief = ends[1];
    probing = leaves = for_good = false;
    served.absent = served.name_wait_over = false; // other processes may still read requests
    told_ready = true;
    store_be_silent();
    understudy(guard, process);
    close(guard);
    close_and_forget(&process);
    be_the_guard();
  }
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    return say("there is no understudy: ", strerror(errno));
  }
  understudy_pid = pid;
  understudy_socket = ends[0];
  int stored = fcntl(understudy_socket, F_DUPFD_CLOEXEC, 0);
  if (stored >= 0) store_put(STORED_UNDERSTUDY, &stored, 1);
  store_follow(understudy_socket);
}

// Takes everything over from the previous guard's understudy, which then ends.
static void relieve_understudy(void) {
  int socket = store_get(STORED_UNDERSTUDY), fds[SCM_MAX_FD];
  char text[64];
  size_t count;
  bool heard = false;
  if (socket < 0) return;
  send(socket, "relieve", 7, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (receive(socket, text, sizeof text, fds, &count, 0) > 0) { // until it has ended
    // What it says is newer than what the service manager has stored.
    if (!heard) store_clear(STORED_UNDERSTUDY);
    heard = true;
    store_put(text, fds, count);
  }
  store_remove(STORED_UNDERSTUDY);
}

static void ask(void) {
  struct question question;
  uint32_t device = load(STATE_DEVICE_AT);
  question.device = makedev(device >> 20, device & 0xfffff);
  memcpy(question.mountpoint, served.mountpoint, sizeof question.mountpoint);
  if (prober < 0) start_prober();
  if (send(prober, &question, sizeof question, MSG_DONTWAIT | MSG_NOSIGNAL) < 0) return;
  probing = true;
  served.ticks = 0;
}

// The prober has been answered: by the daemon, or by the kernel.
static void answered(void) {
  char finding;
  // The prober was killed, for example. This process must not end by that: it may be the only one that answers.
  if (recv(prober, &finding, 1, MSG_DONTWAIT) != 1) return start_prober();
  probing = false;
  served.ticks = 0;
  if (finding != FAILED) say_to(&serving, "ok");
}

// The command that starts a daemon.
static char **command;
static unsigned failures; // daemons in a row that ended by themselves before they had served for a while

static void tell_state(const char *state) {
  char text[700];
  snprintf(text, sizeof text, "READY=1\nSTATUS=%s", state);
  tell_manager(text);
  told_ready = true;
}

// The processes of the shell commands; 0 if there is none. The next daemon is started after the first has ended, and the
// service counts as started after the second has.
static pid_t afterwards_pid, mounted_pid;
// The message to the service manager for then.
static char announcement[600];

static bool runs(pid_t *pid) {
  if (*pid > 0 && waitpid(*pid, NULL, WNOHANG) == 0) return true;
  *pid = 0;
  return false;
}

static void announce_if_possible(void) {
  if (!*announcement || runs(&mounted_pid)) return;
  tell_state(announcement);
  *announcement = 0;
}

static int nice_value(void) {
  errno = 0;
  int value = getpriority(PRIO_PROCESS, 0);
  return errno ? 0 : value;
}

// Lowers the nice value of each thread back to normal.
static void take_time(const struct daemon *daemon) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/task", (int)daemon->pid);
  DIR *threads = daemon->pid > 0 ? opendir(path) : NULL;
  int value = nice_value();
  for (struct dirent *entry; threads && (entry = readdir(threads));) {
    int thread = atoi(entry->d_name);
    if (thread > 0) setpriority(PRIO_PROCESS, (id_t)thread, value);
  }
  if (threads) closedir(threads);
}

static void start(void) {
  int ends[2];
  char number[16];
  start_at_ms = INT64_MAX;
  if (is_there(&next)) return;
  if (runs(&afterwards_pid) || (served.fuse < 0 && is_there(&serving) && !serving.over)) {
    start_at_ms = now_ms() + RETRY_MS;
    return;
  }
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) {
    say("cannot start the daemon: ", strerror(errno));
    start_at_ms = now_ms() + RETRY_MAX_MS;
    return;
  }
  snprintf(number, sizeof number, "%d", ends[1]);
  pid_t pid = fork();
  if (pid == 0) {
    unblock();
    fcntl(ends[1], F_SETFD, 0);
    setenv("DISKSEQFS_GUARD", number, 1);
    setpriority(PRIO_PROCESS, 0, nice_value() - HURRY);
    execvp(command[0], command);
    say("cannot run the daemon: ", strerror(errno));
    _exit(127);
  }
  close(ends[1]);
  next = (struct daemon){.socket = ends[0], .process = -1, .pid = pid};
  if (pid > 0) next.process = (int)syscall(SYS_pidfd_open, pid, 0);
  if (next.process < 0) {
    say("cannot start the daemon: ", strerror(errno));
    if (pid > 0) kill(pid, SIGKILL);
    start_at_ms = now_ms() + RETRY_MAX_MS;
    return let_go(&next);
  }
  store_send_anew();
  if (!store_send(next.socket, "end")) kill_daemon(&next);
}

static void kill_daemon(struct daemon *daemon) {
  if (!is_there(daemon)) return;
  if (syscall(SYS_pidfd_send_signal, daemon->process, SIGKILL, NULL, 0) < 0) say("cannot kill it: ", strerror(errno));
  else daemon->killed = true;
}

// Stores the daemon, so that the next guard finds it if this one ends.
static void remember(const struct daemon *daemon) {
  int both[] = {fcntl(daemon->socket, F_DUPFD_CLOEXEC, 0), fcntl(daemon->process, F_DUPFD_CLOEXEC, 0)};
  store_remove(STORED_DAEMON);
  if (both[0] >= 0 && both[1] >= 0) return store_put(STORED_DAEMON, both, 2);
  for (int i = 0; i < 2; i++)
    if (both[i] >= 0) close(both[i]);
}

// From now on the next daemon reads requests.
static void take_turn(void) {
  serving = next;
  next = (struct daemon)NONE;
  if (served.fuse >= 0) start_understudy();
  served.absent = served.name_wait_over = false;
  served.ticks = 0;
  remember(&serving);
  if (serving.asks && !store_send(serving.socket, "taken")) kill_daemon(&serving);
  serving.asks = false;
  if (served.fuse < 0) attach();
}

// Whether a daemon was ended by somebody, not by itself (a daemon that is told to end exits with 0). True if
// another guard has started it, as its status is unknown, and guard and daemon may have been killed together.
static bool was_ended(const struct daemon *daemon) {
  int status;
  if (daemon->pid <= 0 || waitpid(daemon->pid, &status, WNOHANG) != daemon->pid) return true;
  if (WIFEXITED(status)) return daemon->killed || (daemon->ready && WEXITSTATUS(status) == 0);
  return daemon->killed || WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGTERM;
}

// Sets the time of the next start; at once for the first failure, as callers wait.
static void schedule(const struct daemon *ended, bool wanted) {
  int64_t most = ended->ready ? RETRY_READY_MAX_MS : RETRY_MAX_MS;
  if (wanted) failures = 0;
  int64_t delay = failures == 0 ? 0 : RETRY_MS << (failures < DOUBLINGS_MAX ? failures : DOUBLINGS_MAX);
  if (!wanted) failures++;
  start_at_ms = now_ms() + (delay < most ? delay : most);
}

static void heard(struct daemon *daemon);

// Reads what a daemon has sent before it ended.
static void drain(struct daemon *daemon) {
  struct pollfd more = {.fd = daemon->socket, .events = POLLIN};
  while (daemon->socket >= 0 && poll(&more, 1, 0) > 0) heard(daemon);
}

// A daemon will not read or answer any more requests.
static void ended(struct daemon *daemon) {
  int process = daemon->process;
  drain(daemon);
  if (serving.process == process) daemon = &serving; // it was ready
  bool wanted = was_ended(daemon);
  struct daemon before = *daemon;
  let_go(daemon);
  if (daemon == &serving) {
    store_remove(STORED_DAEMON);
    if (before.over && !is_there(&next)) {
      forget_mount();
      exit(0);
    }
    if (before.over) detach(); // the next daemon mounts again
    if (wanted) served.unready = 0;
    if (wanted && served.fuse >= 0) {
      reset_tries();
    }
    if (next.asks) return take_turn();
    if (served.fuse >= 0) stand_in();
  } else {
    // It had mounted anew.
    if (!is_there(&serving) && served.fuse >= 0) stand_in();
    if (!told_ready && !wanted) {
      say("the daemon does not start; the system goes on without it", "");
      tell_state("the daemon does not start; names lead to the devices' own nodes");
    }
    // Daemons that somebody kills are no reason to give up sooner.
    if (wanted && served.absent && served.kills < KILLS_MAX) {
      served.kills++;
      served.unready = 0;
    }
  }
  if (!is_there(&next)) schedule(&before, wanted);
}

// Runs a shell command. -> its process; 0 if there is none
static pid_t run(const char *shell_command) {
  pid_t pid = shell_command ? fork() : 0;
  if (!shell_command || pid > 0) return pid;
  if (pid < 0) {
    say("cannot run a shell: ", strerror(errno));
    return 0;
  }
  unblock();
  execl("/bin/sh", "sh", "-c", shell_command, (char *)NULL);
  say("cannot run a shell: ", strerror(errno));
  _exit(1);
}

// Collects processes that have ended and are not waited for elsewhere.
static void reap(void) {
  siginfo_t child;
  for (;;) {
    child.si_pid = 0;
    if (waitid(P_ALL, 0, &child, WEXITED | WNOHANG | WNOWAIT) < 0 || child.si_pid == 0) return;
    if (child.si_pid == understudy_pid) understudy_pid = 0;
    if (child.si_pid == serving.pid || child.si_pid == next.pid ||
        child.si_pid == afterwards_pid || child.si_pid == mounted_pid)
      return;
    waitpid(child.si_pid, NULL, WNOHANG);
  }
}

// Whether no other mount hides the tree.
static bool is_visible(void) {
  struct statx root;
  uint32_t device = load(STATE_DEVICE_AT);
  return statx(AT_FDCWD, served.mountpoint, AT_STATX_DONT_SYNC, 0, &root) == 0 &&
         makedev(root.stx_dev_major, root.stx_dev_minor) == makedev(device >> 20, device & 0xfffff);
}

static void take_away(const char *why) {
  say(why, served.mountpoint);
  if (is_visible() && umount2(served.mountpoint, MNT_FORCE | MNT_DETACH) < 0) say("cannot unmount: ", strerror(errno));
  forget_mount();
  // The descriptors that they were given are of no use.
  kill_daemon(&serving);
  kill_daemon(&next);
  tell_state("no daemon has come; names lead to the devices' own nodes");
  *announcement = 0;
  afterwards_pid = run(afterwards);
}

// Whether the main thread has exited. Other threads may be stuck at a disk: then waitpid(2) does not report the process.
static bool has_exited(const struct daemon *daemon) {
  char path[64], text[512];
  snprintf(path, sizeof path, "/proc/%d/stat", (int)daemon->pid);
  if (daemon->pid <= 0 || !read_line(path, text, sizeof text)) return false;
  const char *name_end = strrchr(text, ')');
  return name_end && name_end[1] == ' ' && (name_end[2] == 'Z' || name_end[2] == 'X');
}

static unsigned leaving_ticks; // since the guard was told to end
#define LEAVING_TICKS 7

// Whether the guard may end now: not while it is the only process that answers, nor during a hand-over, as the service
// manager may be waiting for an answer of the tree itself.
static bool may_leave(void) {
  if (for_good) return !is_there(&serving) || serving.over;
  return served.fuse < 0 || (is_there(&serving) && serving.ready && !next.asks);
}

static void leave_if_possible(void) {
  if (!leaves || (!may_leave() && leaving_ticks < LEAVING_TICKS)) return;
  if (!store_tell() && leaving_ticks < LEAVING_TICKS) return;
  if (is_there(&next)) kill_daemon(&next);
  if (for_good) forget_mount();
  exit(0);
}

static void tick_daemons(void) {
  if (is_there(&next)) {
    next.ticks++;
    if (next.socket < 0 && next.ticks + LEAVE_TICKS < NEXT_TICKS) next.ticks = NEXT_TICKS - LEAVE_TICKS;
    if (next.killed || has_exited(&next)) ended(&next);
    else if (!next.asks && next.ticks >= NEXT_TICKS) {
      say("the daemon that was started is not ready after a minute; it is killed", "");
      kill_daemon(&next);
    }
  }
  if (is_there(&serving)) {
    if (serving.killed || has_exited(&serving)) {
      // Threads of it may still wait for a disk. They never
      // return to user space.
      ended(&serving);
    } else if (serving.socket < 0) {
      if (++serving.ticks >= LEAVE_TICKS) kill_daemon(&serving);
    } else if (for_good && !serving.over) {
      if (++serving.ticks >= OVER_TICKS) kill_daemon(&serving);
    }
  }
}

static void tick(void) {
  tell_manager("WATCHDOG=1");
  served.ticks++;
  if (!serving.ready) served.unready++;
  else if (now_ms() - serving.ready_ms > SERVED_MS) served.unready = failures = 0;
  if (leaves) leaving_ticks++;
  tick_daemons();
  reap();
  if (!told_ready && ++start_ticks >= START_TICKS) {
    say("the daemon is not ready after 20 s; the system goes on without it", "");
    tell_state("waiting for the daemon; names lead to the devices' own nodes");
  }
  if (served.fuse < 0) {
    // It was asked for the connection, see resume().
    if (is_there(&serving) && !serving.over && ++serving.ticks >= hung_ticks) kill_daemon(&serving);
    return;
  }
  if ((understudy_pid == 0 || !store_is_followed()) && !leaves) start_understudy(); // somebody has killed it
  if (!serving.ready && served.unready >= absent_ticks) {
    take_away("no daemon has come; the mount is taken away: ");
  } else if (!is_there(&serving)) {
    return;
  } else if (next.asks) {
    if (served.ticks >= LEAVE_TICKS) kill_daemon(&serving);
  } else if (!probing) {
    if (served.ticks >= PROBE_TICKS && serving.socket >= 0) ask();
  } else if (served.ticks >= hung_ticks) {
    say("the daemon does not answer any more; it is killed", "");
    kill_daemon(&serving);
    served.ticks = 0;
  }
}

static void is_ready(struct daemon *daemon, const char *text) {
  // It has mounted anew; the one before, if it is still there, is at its end.
  if (daemon == &next) {
    let_go(&serving);
    take_turn();
  }
  serving.ready = true;
  serving.ready_ms = now_ms();
  take_time(&serving);
  served.kills = 0;
  if (failures == 0) served.unready = 0;
  if (served.fuse < 0) attach();
  snprintf(announcement, sizeof announcement, "%s (daemon %d)", text, (int)serving.pid);
  if (!strstr(text, "taken over")) mounted_pid = run(mounted);
  announce_if_possible();
}

// After a message of length 0: whether the other end is closed, or the message was empty.
static bool has_hung_up(int socket) {
  struct pollfd end = {.fd = socket};
  return poll(&end, 1, 0) != 0;
}

// A message of a daemon, with the descriptors in it.
static void heard(struct daemon *daemon) {
  char text[512];
  int fds[SCM_MAX_FD];
  size_t count;
  ssize_t n = receive(daemon->socket, text, sizeof text, fds, &count, MSG_DONTWAIT);
  if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (n <= 0) {
    while (count > 0) close(fds[--count]); // an empty message may have some
    if (n == 0 && !has_hung_up(daemon->socket)) return;
    close(daemon->socket);
    daemon->socket = -1;
    return;
  }
  if (strcmp(text, "remove fuse") == 0) detach();
  if (store_hear(text, fds, count)) {
    // Descriptors of a mount that it has made: from now on requests may arrive. Or the connection, after "give".
    if (strncmp(text, "put ", 4) == 0 && served.fuse < 0 && (daemon == &serving || !is_there(&serving))) attach();
  } else if (strncmp(text, "ready ", 6) == 0) {
    is_ready(daemon, text + 6);
  } else if (strcmp(text, "over") == 0) {
    daemon->over = true;
  } else if (strcmp(text, "take") == 0 && daemon == &next) {
    next.asks = true;
    served.ticks = 0;
    if (!is_there(&serving)) take_turn();
    else if (!say_to(&serving, "leave")) kill_daemon(&serving);
  }
}

static pid_t pid_of(int process) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/self/fdinfo/%d", process);
  if (!read_line(path, text, sizeof text)) return 0;
  const char *pid = strstr(text, "\nPid:\t");
  return pid ? (pid_t)strtol(pid + 6, NULL, 10) : 0;
}

// Goes on with what the previous guard has left.
static void resume(void) {
  int both[2], count = (int)store_all(STORED_DAEMON, both, 2);
  for (int i = 0; i < count; i++) {
    struct stat file;
    if (fstat(both[i], &file) < 0) continue;
    *(S_ISSOCK(file.st_mode) ? &serving.socket : &serving.process) = fcntl(both[i], F_DUPFD_CLOEXEC, 0);
  }
  if (serving.socket < 0 || serving.process < 0) {
    // This closes the daemon's socket, so that it does not go on beside the next daemon.
    let_go(&serving);
    store_remove(STORED_DAEMON);
    attach();
    if (served.fuse >= 0) stand_in();
    return;
  }
  attach();
  struct pollfd end = {.fd = serving.process, .events = POLLIN};
  serving.pid = pid_of(serving.process);
  serving.ready = true;
  serving.ready_ms = now_ms();
  if (poll(&end, 1, 0) > 0) return ended(&serving);
  // The understudy has been killed as well.
  if (served.fuse < 0) say_to(&serving, "give");
  char state[64];
  snprintf(state, sizeof state, "serving (daemon %d)", (int)serving.pid);
  tell_state(state);
}

// SIGTERM: the service manager wants this process to end; another guard may follow and go on with what is
// stored. SIGUSR1 comes before that if the tree was unmounted for good, so that the daemon ends,
// too.
static void signalled(void) {
  struct signalfd_siginfo signal;
  if (read(signals, &signal, sizeof signal) != sizeof signal || signal.ssi_signo == SIGCHLD) return;
  if (signal.ssi_signo == SIGUSR1) for_good = true;
  else leaves = true;
}

static void hear_signals(void) {
  sigset_t ends;
  sigemptyset(&ends);
  sigaddset(&ends, SIGTERM);
  sigaddset(&ends, SIGINT);
  sigaddset(&ends, SIGUSR1);
  sigaddset(&ends, SIGCHLD);
  sigprocmask(SIG_BLOCK, &ends, NULL);
  signals = signalfd(-1, &ends, SFD_CLOEXEC);
}

static _Noreturn void loop(void) {
  int64_t next_tick = now_ms();
  for (;;) {
    leave_if_possible();
    announce_if_possible();
    struct pollfd fds[] = {
        {.fd = signals, .events = POLLIN},
        {.fd = next.socket, .events = POLLIN},
        {.fd = next.process, .events = POLLIN},
        {.fd = serving.socket, .events = POLLIN},
        {.fd = serving.process, .events = POLLIN},
        {.fd = prober, .events = POLLIN},
        {.fd = served.absent ? served.fuse : -1, .events = POLLIN},
        {.fd = relief, .events = POLLIN},
    };
    int64_t now = now_ms();
    if (now >= next_tick) {
      next_tick = now + TICK_MS;
      tick();
      continue;
    }
    if (now >= start_at_ms) {
      start();
      continue;
    }
    int64_t until = next_tick < start_at_ms ? next_tick : start_at_ms;
    if (served.absent && !served.name_wait_over) {
      int64_t wait_over = served.died_ms + name_wait_ms;
      if (now >= wait_over) {
        end_name_wait();
        continue;
      }
      if (wait_over < until) until = wait_over;
    }
    if (poll(fds, sizeof fds / sizeof *fds, (int)(until - now)) < 0) continue;
    if (fds[0].revents) signalled();
    else if (fds[7].revents) hear_guard();
    // What it said before it ended counts.
    else if (fds[1].revents) heard(&next);
    else if (fds[3].revents) heard(&serving);
    else if (fds[2].revents) ended(&next);
    else if (fds[4].revents) ended(&serving);
    else if (fds[5].revents) answered();
    else if (fds[6].revents && !read_requests()) forget_mount();
  }
}

int main(int count, char **arguments) {
  int option;
  while ((option = getopt(count, arguments, "+m:p:h:a:x:r:")) != -1) {
    unsigned long value = optarg ? strtoul(optarg, NULL, 10) : 0;
    if (option == 'm') manager = (uint32_t)value;
    else if (option == 'p') name_wait_ms = (unsigned)value;
    else if (option == 'x') afterwards = optarg;
    else if (option == 'r') mounted = optarg;
    else if (option == 'h') hung_ticks = (unsigned)value;
    else if (option == 'a') absent_ticks = (unsigned)value;
    else return 2;
  }
  if (optind >= count) {
    fprintf(stderr, "usage: diskseqfs-guard [-m MANAGER_PID] [-p NAME_WAIT_MS] [-h HUNG_SECONDS] [-a ABSENT_SECONDS]\n"
                    "                       [-r COMMAND] [-x COMMAND] DAEMON [ARGUMENT]...\n");
    return 2;
  }
  command = arguments + optind;
  store_open();
  own_process = (int)syscall(SYS_pidfd_open, getpid(), 0);
  start_prober();
  hear_signals();
  relieve_understudy();
  resume();
  start();
  loop();
}
