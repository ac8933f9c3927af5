// SPDX-License-Identifier: MIT
/*
 * A hostile process: it harms a directory, or the daemon that serves it.
 *
 * lock: has the kernel hold the directory's lock for as long as this runs: one
 * thread reads it into memory that it does not provide, and another one makes a
 * directory in it.
 * list: reads it again and again.
 * wait: each thread asks for a name that could be a disk's, and waits for an answer;
 * at the next line on stdin, each of them is interrupted.
 */
#include "blk.h"

#include <dirent.h>
#include <grp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define STACK_BYTES (32 * 1024)
#define LIST_BYTES 4096

static const char *dir;
static int directory; /* opened while a daemon answers */
static void *absent;
static _Atomic uint64_t calls;

static void *read_into_nothing(void *arg)
{
	syscall(SYS_getdents64, directory, absent, LIST_BYTES);
	return arg;
}

static void *make_behind(void *arg)
{
	char path[PATH_MAX];

	snprintf(path, sizeof path, "%s/x", dir);
	mkdir(path, 0700);
	return arg;
}

static void *list(void *arg)
{
	char into[LIST_BYTES];
	int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (fd < 0)
		die("open %s: %s", dir, strerror(errno));
	calls++;
	for (;; calls++) {
		lseek(fd, 0, SEEK_SET);
		syscall(SYS_getdents64, fd, into, sizeof into);
	}
	return arg;
}

static void *wait_for(void *arg)
{
	char path[PATH_MAX];
	struct stat st;

	snprintf(path, sizeof path, "%s/%llu", dir, (unsigned long long)(1000000000000ull + calls++));
	stat(path, &st);
	return arg;
}

/* Memory that is there only once the process provides it. A user may provide what it likes, for example by
 * a file system of its own. */
static int make_absent(void)
{
	int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	struct uffdio_api api = { .api = UFFD_API };

	absent = mmap(NULL, LIST_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct uffdio_register range = {
		.range = { .start = (uintptr_t)absent, .len = LIST_BYTES },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	if (fd < 0 || absent == MAP_FAILED || ioctl(fd, UFFDIO_API, &api) < 0 || ioctl(fd, UFFDIO_REGISTER, &range) < 0)
		die("userfaultfd: %s", strerror(errno));
	return fd;
}

#define THREADS_MAX 8192
static pthread_t threads[THREADS_MAX];

static void start(void *(*run)(void *), int count)
{
	pthread_attr_t attr;

	if (count < 1 || count > THREADS_MAX)
		die("bad value for --threads");
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	for (int i = 0; i < count; i++) {
		int err = pthread_create(&threads[i], &attr, run, NULL);
		if (err)
			die("pthread_create: %s", strerror(err));
	}
}

static void heard(int sig)
{
	(void)sig;
}

/* Says "ready", begins at a line on stdin (lock: at once), and goes on until stdin ends. */
int cmd_directory(int argc, char **argv)
{
	const char *mode = "lock";
	int uid = 0, count = 1;
	bool on = false;

	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "mode", OPT_STR, &mode, true },
		{ "uid", OPT_INT, &uid, true },
		{ "threads", OPT_INT, &count, false },
		{ 0 },
	});
	void *(*run)(void *) = !strcmp(mode, "list") ? list : !strcmp(mode, "wait") ? wait_for : NULL;
	int fault = strcmp(mode, "lock") ? -1 : make_absent();

	if (!run && fault < 0)
		die("bad value for --mode: %s (lock, list or wait)", mode);
	if (uid && (setgroups(0, NULL) < 0 || setresgid((gid_t)uid, (gid_t)uid, (gid_t)uid) < 0 ||
		    setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) < 0))
		die("setresuid: %s", strerror(errno));
	sigaction(SIGUSR1, &(struct sigaction){ .sa_handler = heard }, NULL);
	/* Only root may read the tree. */
	directory = open(dir, (strcmp(mode, "wait") ? O_RDONLY : O_PATH) | O_DIRECTORY | O_CLOEXEC);
	if (directory < 0)
		die("open %s: %s", dir, strerror(errno));
	if (!run) {
		struct pollfd p = { .fd = fault, .events = POLLIN };

		start(read_into_nothing, 1);
		if (poll(&p, 1, 5000) != 1)
			die("the directory was read without the memory");
		start(make_behind, 1);
		sleep_us(50000);
	}
	printf("ready\n");
	fflush(stdout);
	while (told()) {
		if (run && !on)
			start(run, count);
		else if (run == wait_for)
			for (int i = 0; i < count; i++)
				pthread_kill(threads[i], SIGUSR1);
		on = true;
		printf("on\n");
		fflush(stdout);
	}
	/* The threads may wait for long; they end with the process. */
	printf("{\"calls\":%llu}\n", (unsigned long long)calls);
	fflush(stdout);
	_exit(exit_status());
}
