// SPDX-License-Identifier: MIT
// diskseqfs-guard: starts the daemon, and stands in for it while there is none.
//
// It is the service's main process. What a daemon needs to go on with the mount of
// another one it keeps (store.h): the FUSE connection, the memory they share
// (../shared/state.h), the sockets in which pins wait. It hands them to each daemon that it
// starts, and starts the next one as soon as one has ended.
//
// When a daemon dies, whoever looks at the tree waits for the next one. The service
// manager looks at the tree, too: it stats the source of each mount whenever
// something is mounted. So while there is no daemon, the guard
//
//   - answers what the service manager asks, with an error,
//   - keeps all other requests in that memory, for the daemon that comes next;
//     after a moment only those for which the kernel holds no lock,
//   - takes the mount away when none has come for a while: an error is better
//     than waiting for ever. It goes on trying, ever more rarely.
//
// While a daemon serves, the guard sees that it answers: another process asks for the
// figures of its file system. One that does not answer any more is killed.
//
// A guard that is started anew (an upgrade, or a crash) finds the daemon of the one
// before at work. It starts another one, which takes over from that. So the tree has
// somebody who answers at every instant.
//
// Both may end at once. Then the service manager would have to start the next guard,
// and cannot if it is waiting for an answer of the tree itself; or does not for minutes, as it
// starts nothing while there are events to be handled, of disks, say. So it is never given the
// connection: only processes have that who can answer what comes through it. The third of
// them is the understudy, a fork of the guard that is told what the guard keeps and does nothing
// until both have ended. Then it is the guard until the next one comes, to which it gives everything.
//
// What is said on the socket between the two, a message each, with descriptors:
//   guard:  NAME (descriptors that are kept), "end"; "taken"; "ok"; "leave"; "give" (the
//           connection, which no guard has any more)
//   daemon: "put NAME" (descriptors to keep), "remove NAME"; "take"; "ready TEXT";
//           "over" (the tree is to be gone with it)
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

// In ticks of a second each, counted by wake-ups: a clock that jumps, or a
// machine that stood still, costs one.
#define TICK_MS 1000
#define PROBE_TICKS 5              // between two looks at the tree
// While somebody waits for a name, or for a list of them, the kernel holds the
// directory's lock; one mkdir or O_CREAT behind them, and everybody waits, the
// service manager as well, whose request then never comes here. Most daemons are
// there again sooner than this.
static unsigned name_wait_ms = 500;
static unsigned hung_ticks = 20;   // without an answer
static unsigned absent_ticks = 60; // without a daemon
// Commands of the shell: for when the mount has been taken away, and for when the tree
// was mounted anew.
static const char *afterwards, *mounted;
// Until the service counts as started, whatever the daemon does.
#define START_TICKS 20
static unsigned start_ticks;
// A daemon that is to leave; and one that has closed its socket, and has not ended.
#define LEAVE_TICKS 2
// For a daemon to be ready, or to ask for its turn.
#define NEXT_TICKS 60
// For one to say that it ends with the tree, when that has been taken away.
#define OVER_TICKS 3
// Served for so long, it is none that ends as soon as it is ready.
#define SERVED_MS 10000
// Between two starts of a daemon that has ended by itself: twice as long each time, up to
// this; or up to that where it was ready before, as each time the mount comes and goes with it.
#define RETRY_MS 100
#define RETRY_MAX_MS 10000
#define RETRY_READY_MAX_MS 300000
#define DOUBLINGS_MAX 12
// For the service manager to start the next guard, before the understudy starts a daemon.
#define UNDERSTUDY_MS 1000
// Daemons killed before they were ready, for each of which others are waited for as long again.
#define KILLS_MAX 300
// What is kept for the next guard, and not sent to daemons.
#define STORED_DAEMON ".daemon" // the socket, and the process
#define STORED_UNDERSTUDY ".understudy"
#define SCM_MAX_FD 253 // of the kernel (net/scm.h)

// Who waits for a daemon that starts, waits for a processor for it: so much lower is its nice value, until it is ready.
// (Not any longer, as what it does then others may ask of it.)
#define HURRY 10

// The process that asks, see probe().
static int prober = -1;
static pid_t prober_pid;
static bool probing;

struct served served = {.fuse = -1};
uint32_t manager = 1;

// Of a daemon: its end of the socket pair, and the process (a pidfd).
struct daemon {
  int socket, process;
  pid_t pid;
  bool asks;     // it is ready to go on, when the one before has left
  bool ready, over, killed;
  unsigned ticks;
  int64_t ready_ms;
};
#define NONE {.socket = -1, .process = -1}
// The one that reads requests; and the one that was started after it.
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

// In a process that has been forked: it ends when it is told to.
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

// A message, ended with a zero, and the descriptors in it, SCM_MAX_FD at most. -> as recvmsg(2)
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

// The understudy; -1, 0 where there is none. And a pidfd of this process, for it.
static int understudy_socket = -1;
static pid_t understudy_pid;
static int own_process = -1;
// In the understudy: its end of the socket at the other end of which is the guard, or will be the next one.
static int relief = -1;
static bool is_the_guard;

static void start_understudy(void);
static void kill_daemon(struct daemon *daemon);

// When the next daemon is started.
static int64_t start_at_ms;
// The service manager takes the service for started.
static bool told_ready;
// The guard was told to end; and whether the tree is taken away for good.
static bool leaves, for_good;
static int signals = -1;

// Nothing of what it guards may change before it has ended.
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

// Nobody can go on with it. Whoever else still has these descriptors is at its end, and
// may be there for as long as a disk hangs.
static void forget_mount(void) {
  int lock = store_get("lock");
  if (lock >= 0) flock(lock, LOCK_UN);
  detach();
  store_clear(NULL);
  // It may wait for an answer of that mount.
  if (probing) start_prober();
}

// Anything else might block, or end this process with a signal.
static bool is_fuse(int fd) {
  struct stat file;
  return fstat(fd, &file) == 0 && S_ISCHR(file.st_mode) && file.st_rdev == makedev(10, 229) &&
         (fcntl(fd, F_GETFL) & O_NONBLOCK);
}

// What is kept is of a mount that this guard can stand in for.
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

// Anew, in place of the one there is. Where there can be none now, a later look at the tree tries again.
static void start_prober(void) {
  int ends[2];
  if (prober >= 0) kill(prober_pid, SIGKILL);
  close_and_forget(&prober);
  probing = false;
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) return say("cannot look at the tree: ", strerror(errno));
  pid_t pid = fork();
  if (pid == 0) {
    // Nothing of what is kept may be open in it: it may outlive all else.
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
    // The next one, to which all of this belongs.
    stop_understudy();
    kill_daemon(&next);
    store_send_all(relief);
  } else if (is_the_guard && served.fuse >= 0) {
    // Nobody has the other end any more, and none will come.
    take_away("the service has ended; the mount is taken away: ");
  }
  _exit(0);
}

// What it does until the guard has ended (`guard` becomes readable), and with it the daemon that reads requests
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

// The guard and its daemon are gone.
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
    served.absent = served.name_wait_over = false; // until it is alone, others read requests
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

// The guard before this one has left it: it gives back all that was kept, and ends.
static void relieve_understudy(void) {
  int socket = store_get(STORED_UNDERSTUDY), fds[SCM_MAX_FD];
  char text[64];
  size_t count;
  bool heard = false;
  if (socket < 0) return;
  send(socket, "relieve", 7, MSG_NOSIGNAL | MSG_DONTWAIT);
  while (receive(socket, text, sizeof text, fds, &count, 0) > 0) { // until it has ended
    // It knows better than the service manager.
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

// The process that asks has been answered: by the daemon, or by the kernel.
static void answered(void) {
  char finding;
  // Killed by somebody, say. That is no reason to end: this process may be the only one that answers.
  if (recv(prober, &finding, 1, MSG_DONTWAIT) != 1) return start_prober();
  probing = false;
  served.ticks = 0;
  if (finding != FAILED) say_to(&serving, "ok");
}

// The command that starts a daemon.
static char **command;
static unsigned failures; // daemons that have ended by themselves, none having served for a while

static void tell_state(const char *state) {
  char text[700];
  snprintf(text, sizeof text, "READY=1\nSTATUS=%s", state);
  tell_manager(text);
  told_ready = true;
}

// The processes of commands: one that the next daemon waits for, and one that whoever waits
// for the service does. 0 if there is none.
static pid_t afterwards_pid, mounted_pid;
// What is told when that one has ended.
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

// Each thread has its own.
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

// The guard that comes after this one, should this one end, finds it.
static void remember(const struct daemon *daemon) {
  int both[] = {fcntl(daemon->socket, F_DUPFD_CLOEXEC, 0), fcntl(daemon->process, F_DUPFD_CLOEXEC, 0)};
  store_remove(STORED_DAEMON);
  if (both[0] >= 0 && both[1] >= 0) return store_put(STORED_DAEMON, both, 2);
  for (int i = 0; i < 2; i++)
    if (both[i] >= 0) close(both[i]);
}

// It is its turn to read requests.
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

// How it ended: because somebody wanted it to, or by itself. (One that serves and is told to end exits with 0.)
// Of one that another guard had started that is not known; whoever has ended that guard may have ended both.
static bool was_ended(const struct daemon *daemon) {
  int status;
  if (daemon->pid <= 0 || waitpid(daemon->pid, &status, WNOHANG) != daemon->pid) return true;
  if (WIFEXITED(status)) return daemon->killed || (daemon->ready && WEXITSTATUS(status) == 0);
  return daemon->killed || WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGTERM;
}

// The first that ends by itself is followed at once, as whoever asks waits.
static void schedule(const struct daemon *ended, bool wanted) {
  int64_t most = ended->ready ? RETRY_READY_MAX_MS : RETRY_MAX_MS;
  if (wanted) failures = 0;
  int64_t delay = failures == 0 ? 0 : RETRY_MS << (failures < DOUBLINGS_MAX ? failures : DOUBLINGS_MAX);
  if (!wanted) failures++;
  start_at_ms = now_ms() + (delay < most ? delay : most);
}

static void heard(struct daemon *daemon);

// What it said before it ended counts.
static void drain(struct daemon *daemon) {
  struct pollfd more = {.fd = daemon->socket, .events = POLLIN};
  while (daemon->socket >= 0 && poll(&more, 1, 0) > 0) heard(daemon);
}

// It will not read or answer any more requests.
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
    if (before.over) detach(); // the next one mounts anew
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
    // Somebody ends each that is started: that is no reason to give up sooner.
    if (wanted && served.absent && served.kills < KILLS_MAX) {
      served.kills++;
      served.unready = 0;
    }
  }
  if (!is_there(&next)) schedule(&before, wanted);
}

// The process; 0 if there is none.
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

// Of the processes that have ended, those that nobody asks for.
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

// Whether the mount is the one on top: another may lie over it.
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
  // What they were given is of no use.
  kill_daemon(&serving);
  kill_daemon(&next);
  tell_state("no daemon has come; names lead to the devices' own nodes");
  *announcement = 0;
  afterwards_pid = run(afterwards);
}

// Its other threads may be held up by a disk: then it has not ended for whoever waits for that.
static bool has_exited(const struct daemon *daemon) {
  char path[64], text[512];
  snprintf(path, sizeof path, "/proc/%d/stat", (int)daemon->pid);
  if (daemon->pid <= 0 || !read_line(path, text, sizeof text)) return false;
  const char *name_end = strrchr(text, ')');
  return name_end && name_end[1] == ' ' && (name_end[2] == 'Z' || name_end[2] == 'X');
}

static unsigned leaving_ticks; // since the guard was told to end
#define LEAVING_TICKS 7

// While this process is the only one that answers, or one daemon follows another, it stays:
// the service manager may be waiting for an answer of the tree itself.
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
      // Threads of it may still wait for a disk, and its end with them. They
      // never come back to the program.
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

// Nothing was received: the other end is closed, or the message was empty.
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
    // Of a mount that it has made: from here on somebody may ask. Or what it was asked for.
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

// What a guard before this one has left.
static void resume(void) {
  int both[2], count = (int)store_all(STORED_DAEMON, both, 2);
  for (int i = 0; i < count; i++) {
    struct stat file;
    if (fstat(both[i], &file) < 0) continue;
    *(S_ISSOCK(file.st_mode) ? &serving.socket : &serving.process) = fcntl(both[i], F_DUPFD_CLOEXEC, 0);
  }
  if (serving.socket < 0 || serving.process < 0) {
    // Its end of the socket closes with this: it does not go on beside the next one.
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

// The service manager wants this process to end (SIGTERM): it is the one to say whether
// another follows, which goes on with what is kept. Before that it may have taken the tree
// away for good (SIGUSR1), so that the daemon is to end as well.
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
