// SPDX-License-Identifier: MIT
/* Calls that take a path and open nothing. */
#include "blk.h"

#include <linux/mount.h>
#include <linux/openat2.h>
#include <sys/fanotify.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#ifndef OPEN_TREE_CLOEXEC
#define OPEN_TREE_CLOEXEC O_CLOEXEC
#endif
#ifndef SYS_file_getattr
#define SYS_file_getattr 468 /* 6.17; the same on all architectures */
#endif
int umount2(const char *target, int flags); /* sys/mount.h does not go with linux/mount.h */

/* Without PIE it lies below 4 GiB. */
static char path[PATH_MAX];

static int openat2_path(void)
{
	struct open_how how = { .flags = O_PATH | O_CLOEXEC };

	return (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
}

static int openat2_directory(void)
{
	struct open_how how = { .flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC };

	return (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
}

static int open_directory(void)
{
	return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static int open_tree_(void)
{
	return (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLOEXEC);
}

static int chdir_(void)
{
	return chdir(path);
}

static int umount2_(void)
{
	return umount2(path, 0);
}

static int truncate_(void)
{
	return truncate(path, 0);
}

static int fanotify_mark_(void)
{
	int fd = fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC, O_RDONLY | O_CLOEXEC);

	return fd < 0 ? fd : fanotify_mark(fd, FAN_MARK_ADD, FAN_OPEN, AT_FDCWD, path);
}

static int file_getattr_(void)
{
	uint64_t attributes[8] = { 0 };

	return (int)syscall(SYS_file_getattr, AT_FDCWD, path, attributes, sizeof attributes, 0);
}

static int name_to_handle_at_(void)
{
	union {
		struct file_handle handle;
		char room[sizeof(struct file_handle) + MAX_HANDLE_SZ];
	} h = { .handle.handle_bytes = MAX_HANDLE_SZ };
	int mount;

	return name_to_handle_at(AT_FDCWD, path, &h.handle, &mount, 0);
}

static int statx_(void)
{
	struct statx st;

	return statx(AT_FDCWD, path, 0, STATX_BASIC_STATS, &st);
}

static int lstat_(void)
{
	struct stat st;

	return lstat(path, &st);
}

static const struct {
	const char *name;
	int (*run)(void);
} calls[] = {
	{ "openat2", openat2_path },
	{ "openat2-directory", openat2_directory },
	{ "open", open_directory },
	{ "open_tree", open_tree_ },
	{ "chdir", chdir_ },
	{ "umount2", umount2_ },
	{ "truncate", truncate_ },
	{ "fanotify_mark", fanotify_mark_ },
	{ "file_getattr", file_getattr_ },
	{ "name_to_handle_at", name_to_handle_at_ },
	{ "statx", statx_ },
	{ "lstat", lstat_ },
};

/* Makes one call. Returns what it failed with, or 0. */
int cmd_inspect(int argc, char **argv)
{
	const char *given = NULL, *name = NULL;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &given, true },
		{ "call", OPT_STR, &name, true },
		{ 0 },
	});
	snprintf(path, sizeof path, "%s", given);
	for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
		if (strcmp(calls[i].name, name))
			continue;
		int r = calls[i].run(), err = r < 0 ? errno : 0;

		printf("{\"error\":\"%s\"}\n", err ? strerrorname_np(err) : "");
		return exit_status();
	}
	die("bad value for --call: %s", name);
}
