// SPDX-License-Identifier: MIT
/* One process opens the disk, and another one uses the descriptor. */
#include "churn_ways.h"

#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>

#define STACK_SIZE 65536

static struct proxy *proxy_make(void)
{
	struct proxy *p = mmap(NULL, sizeof *p, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED || sem_init(&p->asked, 1, 0) < 0 || sem_init(&p->done, 1, 0) < 0)
		die("shared memory: %s", strerror(errno));
	p->parent = (int)syscall(SYS_pidfd_open, getpid(), 0);
	if (p->parent < 0)
		die("pidfd_open: %s", strerror(errno));
	return p;
}

/* child_follows() for a proxy: in a new pid namespace getppid() is 0. One that stays would hold
 * standard output open, for whose end the test waits. */
static void proxy_follows(const struct proxy *p)
{
	struct pollfd parent = { .fd = p->parent, .events = POLLIN };

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (poll(&parent, 1, 0) != 0)
		_exit(2);
}

static void proxy_fork(struct proxy *p, void (*run)(struct proxy *p), int flags)
{
	/* Without a stack argument the child has a copy of this one's, as in fork(2). */
	pid_t pid = (pid_t)syscall(SYS_clone, CLONE_FILES | SIGCHLD | flags, NULL, NULL, NULL, NULL);
	if (pid < 0)
		die("clone: %s", strerror(errno));
	if (pid == 0) {
		proxy_follows(p);
		run(p);
		_exit(2);
	}
	p->pid = pid;
}

struct proxy *proxy_start(void (*run)(struct proxy *p), int flags)
{
	struct proxy *p = proxy_make();

	proxy_fork(p, run, flags);
	return p;
}

int wait_for_child(pid_t pid, int *status)
{
	while (waitpid(pid, status, 0) < 0) {
		if (errno != EINTR)
			die("waitpid: %s", strerror(errno));
		if (stop_signal)
			return -EINTR;
	}
	return pid;
}

/* If the proxy has ended, it has left a message. */
int proxy_wait(struct proxy *p, sem_t *sem)
{
	for (;;) {
		struct timespec until;

		clock_gettime(CLOCK_REALTIME, &until);
		until.tv_sec++;
		if (sem_timedwait(sem, &until) == 0)
			return 0;
		if (errno != EINTR && errno != ETIMEDOUT)
			die("sem_timedwait: %s", strerror(errno));
		if (stop_signal)
			return -EINTR;
		if (p->pid > 0 && waitpid(p->pid, NULL, WNOHANG) == p->pid)
			_exit(2);
	}
}

void proxy_tell(struct proxy *p, const char *path, int flags)
{
	snprintf(p->path, sizeof p->path, "%s", path);
	p->flags = flags;
}

void proxy_opens(struct proxy *p)
{
	for (;;) {
		while (sem_wait(&p->asked) < 0)
			;
		p->fd = result(open(p->path, p->flags));
		sem_post(&p->done);
	}
}

static struct proxy *proxy;

int by_proxy(const struct churn *c, const char *path, int flags)
{
	(void)c;
	proxy_tell(proxy, path, flags);
	sem_post(&proxy->asked);
	int err = proxy_wait(proxy, &proxy->done);
	return err ? err : proxy->fd;
}

void start_sharing(const struct churn *c)
{
	(void)c;
	proxy = proxy_start(proxy_opens, 0);
}

/* The daemon sees the process, but under another id than it has inside. */
void start_in_pid_namespace(const struct churn *c)
{
	(void)c;
	proxy = proxy_start(proxy_opens, CLONE_NEWPID);
}

/* The process is in the daemon's pid namespace. */
void start_in_namespace_of(const struct churn *c)
{
	char path[64];

	snprintf(path, sizeof path, "/proc/%d/ns/pid_for_children", c->namespace_of);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || setns(fd, CLONE_NEWPID) < 0)
		die("%s: %s", path, strerror(errno));
	close(fd);
	proxy = proxy_start(proxy_opens, 0);
}

static void become_root_there(struct proxy *p)
{
	while (sem_wait(&p->asked) < 0)
		;
	if (setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
		die("a user namespace: %s", strerror(errno));
	proxy_follows(p); /* again, as the change of ids clears it */
	proxy_opens(p);
}

static void write_map(pid_t pid, const char *file, int id)
{
	char path[64], line[32];
	int n = snprintf(line, sizeof line, "0 %d 1\n", id);

	snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, line, (size_t)n) != n)
		die("%s: %s", path, strerror(errno));
	close(fd);
}

/* Root in the namespace; outside it the process has no capabilities. */
static void start_as(int id)
{
	proxy = proxy_start(become_root_there, CLONE_NEWUSER);
	write_map(proxy->pid, "uid_map", id);
	write_map(proxy->pid, "gid_map", id);
	sem_post(&proxy->asked);
}

void start_in_user_namespace(const struct churn *c)
{
	(void)c;
	start_as(0);
}

void start_in_user_namespace_of_nobody(const struct churn *c)
{
	(void)c;
	start_as(NOBODY);
}

/* ---- one process for each open ---- */

struct wanted {
	const char *path;
	int flags, fd;
};

static int open_wanted(void *arg)
{
	struct wanted *w = arg;

	w->fd = result(open(w->path, w->flags));
	return 0;
}

/* The parent is suspended until the child ends; they share all memory. */
int by_vfork(const struct churn *c, const char *path, int flags)
{
	static _Alignas(16) char stack[STACK_SIZE];
	struct wanted w = { path, flags, -ECHILD };
	int status;

	(void)c;
	pid_t pid = clone(open_wanted, stack + sizeof stack, CLONE_VFORK | CLONE_VM | CLONE_FILES | SIGCHLD, &w);
	if (pid < 0)
		die("clone: %s", strerror(errno));
	if (wait_for_child(pid, &status) < 0) {
		if (w.fd >= 0)
			close(w.fd);
		return -EINTR;
	}
	return w.fd;
}

/* Adapts to how long opens take, so that about half of them are interrupted. */
#define EXEC_WITHIN_MIN_US 100
#define EXEC_WITHIN_MAX_US 100000
static unsigned exec_within_us = 1000;

static void opened_before_exec(bool did)
{
	unsigned us = did ? exec_within_us * 9 / 10 : exec_within_us * 11 / 10;

	exec_within_us = us < EXEC_WITHIN_MIN_US ? EXEC_WITHIN_MIN_US : us > EXEC_WITHIN_MAX_US ? EXEC_WITHIN_MAX_US : us;
}

static int exec_meanwhile(void *arg)
{
	struct rnd rnd;

	(void)arg;
	rnd_seed(&rnd, (uint64_t)getpid());
	sleep_us(rnd_below(&rnd, exec_within_us));
	execl("/proc/self/exe", "blk", "nothing", NULL);
	_exit(2);
}

/* The main thread opens while another thread calls execve(2): the kernel kills the main
 * thread, wherever it is, and the other one takes over its id. */
static void open_and_exec(struct proxy *p)
{
	static _Alignas(16) char stack[STACK_SIZE];

	if (clone(exec_meanwhile, stack + sizeof stack, CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD, NULL) < 0)
		_exit(2);
	p->fd = result(open(p->path, p->flags));
	for (;;)
		pause();
}

int by_exec(const struct churn *c, const char *path, int flags)
{
	static struct proxy *p;
	int status;

	(void)c;
	if (!p)
		p = proxy_make();
	int free_fd = dup(0);
	close(free_fd);
	proxy_tell(p, path, flags);
	p->fd = -EINTR;
	proxy_fork(p, open_and_exec, 0);
	if (wait_for_child(p->pid, &status) == p->pid && status)
		die("exec: status %d", status);
	/* The opener may have been killed after the open and before it stored the result. */
	int fd = p->fd < 0 && fcntl(free_fd, F_GETFD) >= 0 ? free_fd : p->fd;
	opened_before_exec(fd != -EINTR);
	return fd;
}

/* The program that replaces the opener. */
int cmd_nothing(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	return 0;
}
