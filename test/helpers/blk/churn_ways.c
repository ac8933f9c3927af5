// SPDX-License-Identifier: MIT
/* The ways other than libc's open(2) in which programs come to a disk. */
#include "churn_ways.h"

#include <grp.h>
#include <linux/capability.h>
#include <linux/io_uring.h>
#include <linux/openat2.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>

/* How long a descriptor or a name is kept before it is opened, at most. */
#define PAUSE_US 300

static int by_open(const struct churn *c, const char *path, int flags)
{
	(void)c;
	return result(open(path, flags));
}

static int by_openat2(const struct churn *c, const char *path, int flags)
{
	struct open_how how = { .flags = (unsigned)flags, .resolve = RESOLVE_NO_SYMLINKS };

	(void)c;
	return result(syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how));
}

void pause_sometimes(void)
{
	static struct rnd rnd;

	if (!rnd.s)
		rnd_seed(&rnd, (uint64_t)getpid());
	if (rnd_below(&rnd, 2))
		sleep_us(rnd_below(&rnd, PAUSE_US));
}

static int by_opath(const struct churn *c, const char *path, int flags)
{
	char self[32];
	int node = open(path, O_PATH | O_CLOEXEC), fd;

	(void)c;
	if (node < 0)
		return -errno;
	pause_sometimes();
	snprintf(self, sizeof self, "/proc/self/fd/%d", node);
	fd = result(open(self, flags));
	close(node);
	return fd;
}

static int by_handle(const struct churn *c, const char *path, int flags)
{
	union {
		struct file_handle handle;
		char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
	} h = { .handle.handle_bytes = MAX_HANDLE_SZ };
	int mount, dir, fd;

	if (name_to_handle_at(AT_FDCWD, path, &h.handle, &mount, 0) < 0)
		return -errno;
	pause_sometimes();
	dir = open(c->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0)
		die("%s: %s", c->dir, strerror(errno));
	fd = result(open_by_handle_at(dir, &h.handle, flags));
	close(dir);
	return fd;
}

static struct uring ring;
static int personality;

static void start_ring(const struct churn *c)
{
	(void)c;
	uring_start(&ring);
}

static void start_ring_in_stat(const struct churn *c)
{
	(void)c;
	uring_start_in_stat(&ring);
}

static int by_uring(const struct churn *c, const char *path, int flags)
{
	(void)c;
	return uring_open(&ring, path, flags, personality, true);
}

/* The ring has the rights of a user in the group of the disks; the process
 * that uses it is not in that group. */
static void start_ring_of_others(const struct churn *c)
{
	int status = 0;

	uring_start(&ring);
	pid_t pid = fork();
	if (pid == 0) {
		gid_t group = (gid_t)c->node_gid;

		if (setgroups(1, &group) < 0 || setresgid(NOBODY, NOBODY, NOBODY) < 0 || setresuid(NOBODY, NOBODY, NOBODY) < 0)
			_exit(255);
		_exit((int)syscall(SYS_io_uring_register, ring.fd, IORING_REGISTER_PERSONALITY, NULL, 0));
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status) || WEXITSTATUS(status) == 255)
		die("no personality");
	personality = WEXITSTATUS(status);
	become(NOBODY);
}

#ifdef __x86_64__
#define I386_OPEN 5
#define I386_MOUNT 21

/* A call as 32-bit programs make it. The kernel takes the lower halves of its arguments. */
static int int80(long number, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e)
{
	long r;

	__asm__ volatile("int $0x80"
			 : "=a"(r)
			 : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
			 : "memory", "r8", "r9", "r10", "r11");
	return (int)r;
}

/* A copy of the text below 4 GiB. */
static uint64_t low(const char *text)
{
	static char *page;
	static size_t used;

	if (!page)
		page = mmap(NULL, 2 * PATH_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	if (page == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	used = used > PATH_MAX ? 0 : used;
	char *at = strcpy(page + used, text);
	used += strlen(text) + 1;
	return (uint64_t)(uintptr_t)at;
}

static int by_int80(const struct churn *c, const char *path, int flags)
{
	(void)c;
	return int80(I386_OPEN, low(path), (uint64_t)flags, 0, 0, 0);
}

/* Looks like a pointer above 4 GiB. */
#define GARBAGE (0x7ffcull << 32)

static int by_int80_garbage(const struct churn *c, const char *path, int flags)
{
	(void)c;
	return int80(I386_OPEN, low(path) | GARBAGE, (uint64_t)flags | GARBAGE, GARBAGE, GARBAGE, GARBAGE);
}

/* asm/unistd.h: a call of a program with 64-bit registers and 32-bit pointers, whatever kind this
 * program is. */
#define X32 0x40000000

static int by_x32(const struct churn *c, const char *path, int flags)
{
	(void)c;
	return result(syscall(X32 | SYS_open, path, flags));
}
#endif

static void become_nobody(const struct churn *c)
{
	(void)c;
	become(NOBODY);
}

#ifdef __x86_64__
static int by_int80_mount(const struct churn *c, const char *path, int flags)
{
	(void)c;
	(void)flags;
	return int80(I386_MOUNT, low(path), low(MOUNTPOINT), low("ext4"), MS_RDONLY, low(""));
}
#endif

static const struct churn_way ways[] = {
	{ .name = "open", .open = by_open },
	{ .name = "openat2", .open = by_openat2 },
	{ .name = "opath", .open = by_opath },
	{ .name = "handle", .open = by_handle },
	{ .name = "uring", .begin = start_ring, .open = by_uring },
	{ .name = "uring-in-stat", .begin = start_ring_in_stat, .open = by_uring },
	{ .name = "uring-others", .begin = start_ring_of_others, .open = by_uring },
	{ .name = "mount", .image = true, .reached = mounted, .begin = own_mounts, .open = by_mount },
	{ .name = "mount-nobody", .image = true, .reached = mounted, .begin = may_only_mount, .open = by_mount },
	{ .name = "fsconfig", .image = true, .reached = mounted, .begin = own_mounts, .open = by_fsconfig },
	{ .name = "dm-table", .reached = table_reached, .begin = make_table, .open = by_table, .end = remove_tables },
	{ .name = "swapon", .image = true, .reached = swapped, .open = by_swapon, .mark = mark_swap, .release = release_swap },
	{ .name = "shared-files", .begin = start_sharing, .open = by_proxy },
	{ .name = "vfork", .open = by_vfork },
	{ .name = "exec", .open = by_exec },
	{ .name = "pid-namespace", .begin = start_in_pid_namespace, .open = by_proxy },
	{ .name = "namespace-of", .begin = start_in_namespace_of, .open = by_proxy },
	{ .name = "user-namespace", .begin = start_in_user_namespace, .open = by_proxy },
	{ .name = "user-namespace-nobody", .begin = start_in_user_namespace_of_nobody, .open = by_proxy },
	{ .name = "traced", .begin = start_traced, .open = by_traced },
	{ .name = "notified-addfd", .begin = start_notifying, .open = by_supervisor },
	{ .name = "notified-continue", .begin = start_notifying, .open = by_notified },
#ifdef __x86_64__
	{ .name = "traced-replaced", .begin = start_replaced, .open = by_replaced },
	{ .name = "int80", .open = by_int80 },
	{ .name = "int80-garbage", .begin = become_nobody, .open = by_int80_garbage },
	{ .name = "int80-mount", .image = true, .reached = mounted, .begin = own_mounts, .open = by_int80_mount },
	{ .name = "x32", .open = by_x32 },
#endif
};

const struct churn_way *churn_way_named(const char *name)
{
	for (size_t i = 0; i < sizeof ways / sizeof *ways; i++)
		if (!strcmp(ways[i].name, name))
			return &ways[i];
	die("bad value for --way: %s", name);
}

/* Makes one open in that way. Returns what it failed with, or 0. */
int cmd_way(int argc, char **argv)
{
	const char *path = NULL, *name = NULL;
	static struct churn c;
	int uid = 0;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "way", OPT_STR, &name, true },
		{ "node-gid", OPT_INT, &c.node_gid, false },
		{ "uid", OPT_INT, &uid, false },
		{ 0 },
	});
	become(uid);
	c.way = churn_way_named(name);
	if (c.way->begin)
		c.way->begin(&c);
	int r = c.way->open(&c, path, O_RDONLY | O_CLOEXEC);
	if (r >= 0 && c.way->reached)
		c.way->reached(path, &(struct entry){ .nr = -1 }, &(uint64_t){ 0 });
	if (c.way->end)
		c.way->end();
	printf("{\"error\":%d}\n", r < 0 ? -r : 0);
	return exit_status();
}

/* Reports whether this kernel lets a 64-bit program make such calls at all. */
static int report_works(bool (*works)(void))
{
	int status = -1;
	pid_t pid = fork();

	if (pid == 0)
		_exit(!works());
	bool does = pid > 0 && waitpid(pid, &status, 0) == pid && status == 0;
	printf("{\"works\":%s}\n", does ? "true" : "false");
	return exit_status();
}

static bool int80_works(void)
{
#ifdef __x86_64__
	return int80(20, 0, 0, 0, 0, 0) == getpid(); /* getpid */
#else
	return false;
#endif
}

static bool x32_works(void)
{
#ifdef __x86_64__
	return syscall(X32 | SYS_getpid) == getpid();
#else
	return false;
#endif
}

int cmd_int80(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	return report_works(int80_works);
}

int cmd_x32(int argc, char **argv)
{
	(void)argc;
	(void)argv;
	return report_works(x32_works);
}
