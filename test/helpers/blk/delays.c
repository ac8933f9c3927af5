// SPDX-License-Identifier: MIT
/* How long calls wait that have nothing to do with a disk that hangs. */
#include "blk.h"

#include <dirent.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

static char root[PATH_MAX], hung[PATH_MAX], other[PATH_MAX], missing[PATH_MAX], made[PATH_MAX];

static int opened(const char *path, int flags)
{
	int fd = open(path, flags | O_CLOEXEC, 0600);

	if (fd < 0)
		return -errno;
	close(fd);
	return 0;
}

static int looked(const char *path)
{
	struct stat st;

	return stat(path, &st) < 0 ? -errno : 0;
}

static int open_other(void)
{
	return opened(other, O_RDONLY);
}

static int creat_other(void)
{
	return opened(other, O_RDWR | O_CREAT);
}

static int open_missing(void)
{
	return opened(missing, O_RDONLY);
}

static int stat_other(void)
{
	return looked(other);
}

static int stat_hung(void)
{
	return looked(hung);
}

static int make(void)
{
	return mkdir(made, 0700) < 0 ? -errno : 0;
}

static int list(void)
{
	DIR *d = opendir(root);

	if (!d)
		return -errno;
	while (readdir(d))
		;
	closedir(d);
	return 0;
}

static const struct {
	const char *name;
	int (*call)(void);
	int expected;
} kinds[] = {
	{ "open", open_other, 0 },
	{ "open with O_CREAT", creat_other, 0 },
	{ "open of a missing name", open_missing, -ENOENT },
	{ "stat", stat_other, 0 },
	{ "stat of the disk that hangs", stat_hung, 0 },
	{ "mkdir", make, -EPERM },
	{ "listing", list, 0 },
};
#define KINDS (sizeof kinds / sizeof *kinds)

struct delay {
	uint64_t n, max_ns;
	struct errs unexpected;
};

/* Runs each call in a process of its own: one that waits must not hide another. */
static void measure(int kind, struct delay *d, uint64_t until)
{
	while (now_ns() < until && !stop_signal) {
		uint64_t t = now_ns(), took;
		int err = kinds[kind].call();

		took = now_ns() - t;
		d->n++;
		if (took > d->max_ns)
			d->max_ns = took;
		if (err != kinds[kind].expected)
			errs_add(&d->unexpected, -err);
		sleep_us(2000);
	}
}

int cmd_delays(int argc, char **argv)
{
	const char *dir = NULL, *hung_name = NULL, *other_name = NULL;
	double seconds = 1;
	pid_t pids[KINDS];

	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "hung", OPT_STR, &hung_name, true },
		{ "other", OPT_STR, &other_name, true },
		{ "seconds", OPT_DBL, &seconds, false },
		{ 0 },
	});
	snprintf(root, sizeof root, "%s", dir);
	snprintf(hung, sizeof hung, "%s/%s", dir, hung_name);
	snprintf(other, sizeof other, "%s/%s", dir, other_name);
	snprintf(missing, sizeof missing, "%s/4000000000", dir);
	snprintf(made, sizeof made, "%s/made", dir);
	struct delay *d = mmap(NULL, sizeof *d * KINDS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (d == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	uint64_t until = now_ns() + (uint64_t)(seconds * NS_PER_S);
	pid_t parent = getpid();
	for (int i = 0; i < (int)KINDS; i++) {
		pids[i] = fork();
		if (pids[i] == 0) {
			child_follows(parent, SIGKILL);
			measure(i, &d[i], until);
			_exit(0);
		}
	}
	for (size_t i = 0; i < KINDS; i++)
		while (pids[i] > 0 && waitpid(pids[i], NULL, 0) < 0 && errno == EINTR)
			;
	printf("{");
	for (size_t i = 0; i < KINDS; i++) {
		printf("%s\"%s\":{\"max_ms\":%.1f,\"n\":%llu,", i ? "," : "", kinds[i].name, (double)d[i].max_ns / 1e6,
		       (unsigned long long)d[i].n);
		errs_print("unexpected", &d[i].unexpected);
		printf("}");
	}
	printf("}\n");
	return exit_status();
}

/* mount(2) alone: mount(8) opens the disk first, to see what is on it. */
int cmd_mount(int argc, char **argv)
{
	const char *path = NULL, *dir = NULL;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "dir", OPT_STR, &dir, true },
		{ 0 },
	});
	int err = mount(path, dir, "ext4", MS_RDONLY, NULL) < 0 ? errno : 0;
	if (!err)
		umount2(dir, MNT_DETACH);
	printf("{\"error\":%d}\n", err);
	return exit_status();
}
