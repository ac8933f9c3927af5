// SPDX-License-Identifier: MIT
/* Another process stops the call at its entry and decides how it goes on. */
#include "churn_ways.h"

#include <linux/filter.h>
#include <linux/ptrace.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#ifdef __x86_64__
#include <sys/user.h>
#endif

/* Some versions of libc do not allow sys/ptrace.h and linux/ptrace.h together. */
long ptrace(int request, ...);

static struct proxy *proxy;

/* ---- ptrace(2) ---- */

static long trace(int request, void *address, void *data)
{
	long r = ptrace(request, proxy->pid, address, data);

	if (r < 0)
		die("ptrace %#x: %s", request, strerror(errno));
	return r;
}

/* Runs the tracee until it enters or leaves a call. 0 or -EINTR. */
static int step(void)
{
	int status;
	long sig = 0;

	do {
		trace(PTRACE_SYSCALL, NULL, (void *)sig);
		int r = wait_for_child(proxy->pid, &status);
		if (r < 0)
			return r;
		if (!WIFSTOPPED(status))
			_exit(2); /* it has left a message */
		sig = WSTOPSIG(status);
	} while (sig != (SIGTRAP | 0x80));
	return 0;
}

/* The number of the call that the tracee is about to make, or -1. */
static long call_entered(void)
{
	struct ptrace_syscall_info info;

	trace(PTRACE_GET_SYSCALL_INFO, (void *)sizeof info, &info);
	return info.op == PTRACE_SYSCALL_INFO_ENTRY ? (long)info.entry.nr : -1;
}

static int call_returned(void)
{
	struct ptrace_syscall_info info;

	trace(PTRACE_GET_SYSCALL_INFO, (void *)sizeof info, &info);
	if (info.op != PTRACE_SYSCALL_INFO_EXIT)
		die("ptrace: not at the end of a call");
	return (int)info.exit.rval;
}

/* The tracee waits for its next open in this call. At the end of open(2) it would still look as if it were
 * in open(2). */
#define BETWEEN SYS_gettid

static void be_traced(void)
{
	if (ptrace(PTRACE_TRACEME, 0, NULL, NULL) < 0)
		die("PTRACE_TRACEME: %s", strerror(errno));
	raise(SIGSTOP);
}

static void open_traced(struct proxy *p)
{
	be_traced();
	for (;;) {
		syscall(BETWEEN);
		open(p->path, p->flags);
	}
}

static void start(void (*run)(struct proxy *p))
{
	int status;

	proxy = proxy_start(run, 0);
	if (wait_for_child(proxy->pid, &status) < 0)
		_exit(0);
	if (!WIFSTOPPED(status))
		_exit(2);
	trace(PTRACE_SETOPTIONS, NULL, (void *)(PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL));
	while (call_entered() != BETWEEN)
		if (step() < 0)
			_exit(0);
}

void start_traced(const struct churn *c)
{
	(void)c;
	start(open_traced);
}

/* Runs the tracee from one stop in BETWEEN to the next. Calls "enter" at the entry of the
 * call that opens. */
static int open_in_steps(const char *path, int flags, void (*enter)(void))
{
	int fd;

	proxy_tell(proxy, path, flags);
	if (step() < 0 || step() < 0)
		return -EINTR;
	enter();
	if (step() < 0)
		return -EINTR;
	fd = call_returned();
	return step() < 0 ? -EINTR : fd;
}

int by_traced(const struct churn *c, const char *path, int flags)
{
	(void)c;
	return open_in_steps(path, flags, pause_sometimes);
}

#ifdef __x86_64__
/* This tracee makes no call that opens; the tracer replaces one. */
static void call_traced(struct proxy *p)
{
	(void)p;
	be_traced();
	for (;;) {
		syscall(BETWEEN);
		syscall(SYS_getppid);
	}
}

void start_replaced(const struct churn *c)
{
	(void)c;
	start(call_traced);
}

static void replace_call(void)
{
	struct user_regs_struct regs;

	trace(PTRACE_GETREGS, NULL, &regs);
	regs.orig_rax = SYS_open;
	regs.rdi = (uintptr_t)proxy->path; /* the same address there */
	regs.rsi = (unsigned)proxy->flags;
	trace(PTRACE_SETREGS, NULL, &regs);
	pause_sometimes();
}

int by_replaced(const struct churn *c, const char *path, int flags)
{
	(void)c;
	return open_in_steps(path, flags, replace_call);
}
#endif

/* ---- seccomp(2) notifications; the opener is the supervisor ---- */

static void open_supervised(struct proxy *p)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof filter / sizeof *filter, filter };

	p->listener = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	if (p->listener < 0)
		die("seccomp: %s", strerror(errno));
	sem_post(&p->done);
	proxy_opens(p);
}

void start_notifying(const struct churn *c)
{
	(void)c;
	proxy = proxy_start(open_supervised, 0);
	if (proxy_wait(proxy, &proxy->done) < 0)
		_exit(0);
}

/* Has the supervised process call open(2), and gets the id of that call. */
static int open_notified(const char *path, int flags, uint64_t *id)
{
	/* Newer kernels may write more. */
	static union {
		struct seccomp_notif notif;
		char room[1024];
	} said;

	proxy_tell(proxy, path, flags);
	sem_post(&proxy->asked);
	for (;;) {
		memset(&said, 0, sizeof said);
		if (ioctl(proxy->listener, SECCOMP_IOCTL_NOTIF_RECV, &said) == 0)
			break;
		if (errno != EINTR)
			die("SECCOMP_IOCTL_NOTIF_RECV: %s", strerror(errno));
		if (stop_signal)
			return -EINTR;
	}
	*id = said.notif.id;
	return 0;
}

static void respond(struct seccomp_notif_resp response)
{
	if (ioctl(proxy->listener, SECCOMP_IOCTL_NOTIF_SEND, &response) < 0)
		die("SECCOMP_IOCTL_NOTIF_SEND: %s", strerror(errno));
}

static int opened(void)
{
	int err = proxy_wait(proxy, &proxy->done);

	return err ? err : proxy->fd;
}

/* The supervisor opens the disk, and gives the descriptor to the process that waits in open(2). */
int by_supervisor(const struct churn *c, const char *path, int flags)
{
	uint64_t id;
	int err = open_notified(path, flags, &id), fd;

	(void)c;
	if (err)
		return err;
	pause_sometimes();
	fd = result(open(path, flags));
	if (fd < 0) {
		respond((struct seccomp_notif_resp){ .id = id, .error = fd });
		return opened();
	}
	pause_sometimes();
	struct seccomp_notif_addfd give = {
		.id = id,
		.flags = SECCOMP_ADDFD_FLAG_SEND,
		.srcfd = (uint32_t)fd,
		.newfd_flags = O_CLOEXEC,
	};
	if (ioctl(proxy->listener, SECCOMP_IOCTL_NOTIF_ADDFD, &give) < 0)
		die("SECCOMP_IOCTL_NOTIF_ADDFD: %s", strerror(errno));
	close(fd);
	return opened();
}

/* The supervisor lets the call go on. */
int by_notified(const struct churn *c, const char *path, int flags)
{
	uint64_t id;
	int err = open_notified(path, flags, &id);

	(void)c;
	if (err)
		return err;
	pause_sometimes();
	respond((struct seccomp_notif_resp){ .id = id, .flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE });
	return opened();
}
