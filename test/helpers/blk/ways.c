// SPDX-License-Identifier: MIT
#include "blk.h"

#include <sys/stat.h>

#define CAREFUL "careful:"

static struct target target_of(const char *text)
{
	struct target t = { .path = text, .careful = !strncmp(text, CAREFUL, strlen(CAREFUL)) };
	struct stat st;

	if (!t.careful)
		return t;
	t.path += strlen(CAREFUL);
	int fd = open(t.path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0 || blk_diskseq(fd, &t.diskseq) < 0)
		die("%s: %s", t.path, strerror(errno));
	t.number = st.st_rdev;
	close(fd);
	return t;
}

int ways_of(int *argc, char **argv, struct way *ways)
{
	int n = 0, at = 1;

	while (at < *argc && strcmp(argv[at], "--"))
		at++;
	for (int i = at + 1; i < *argc; i++) {
		struct way *w = &ways[n++];
		char *paths = strdup(argv[i]), *name = strsep(&paths, "=");

		if (n > WAYS_MAX || !paths || !*name)
			die("bad value: %s (NAME=PATH,..., at most %d)", argv[i], WAYS_MAX);
		*w = (struct way){ .name = name };
		for (char *path; (path = strsep(&paths, ","));) {
			w->targets = realloc(w->targets, ((size_t)w->count + 1) * sizeof *w->targets);
			if (!w->targets)
				die("out of memory");
			w->targets[w->count++] = target_of(path);
		}
	}
	*argc = at < *argc ? at : *argc;
	return n;
}

/* As systemd's sd_device_open(): opens nothing before it has seen the right
 * kind of node, and does not walk the node's path twice. */
static int open_carefully(const struct target *t)
{
	char self[32];
	struct stat st;
	uint64_t diskseq;
	int err, node = open(t->path, O_PATH | O_NOFOLLOW | O_CLOEXEC), fd = -1;

	if (node < 0)
		return -errno;
	if (fstat(node, &st) < 0) {
		err = -errno;
	} else if (!S_ISBLK(st.st_mode) || st.st_rdev != t->number) {
		err = -ENXIO;
	} else {
		snprintf(self, sizeof self, "/proc/self/fd/%d", node);
		fd = open(self, O_RDONLY | O_CLOEXEC);
		err = fd < 0 ? -errno : blk_diskseq(fd, &diskseq);
		if (!err && diskseq != t->diskseq)
			err = -ENXIO;
	}
	close(node);
	if (!err)
		return fd;
	if (fd >= 0)
		close(fd);
	return err;
}

int target_open(const struct target *t)
{
	if (t->careful)
		return open_carefully(t);
	int fd = open(t->path, O_RDONLY | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}
