// SPDX-License-Identifier: MIT
/* Counts opens and closes of a node, as a watch of the node sees them; and opens of another node
 * of the device, by its name in a directory. */
#include "blk.h"

#include <poll.h>
#include <sys/inotify.h>

struct seen {
	uint64_t open, close_write, close_nowrite;
};

static const char *name = "";

/* The kernel queues an event before the call that caused it returns. */
static void take(int fd, struct seen *s)
{
	_Alignas(struct inotify_event) char buf[8192];
	ssize_t n;

	while ((n = read(fd, buf, sizeof buf)) > 0) {
		for (ssize_t at = 0; at < n;) {
			const struct inotify_event *e = (const void *)(buf + at);

			if (e->mask & IN_Q_OVERFLOW)
				die("watch: events were lost");
			at += (ssize_t)(sizeof *e + e->len);
			if (e->len && strcmp(e->name, name) != 0)
				continue;
			s->open += !!(e->mask & IN_OPEN);
			s->close_write += !!(e->mask & IN_CLOSE_WRITE);
			s->close_nowrite += !!(e->mask & IN_CLOSE_NOWRITE);
		}
	}
}

static void print(const struct seen *s)
{
	printf("{\"open\":%llu,\"close_write\":%llu,\"close_nowrite\":%llu}\n", (unsigned long long)s->open,
	       (unsigned long long)s->close_write, (unsigned long long)s->close_nowrite);
	fflush(stdout);
}

/* Prints what it has seen so far whenever a line comes in, and at its end. */
int cmd_watch(int argc, char **argv)
{
	const char *path = NULL, *directory = NULL;
	int uid = 0;
	struct seen s = { 0 };

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "directory", OPT_STR, &directory, false },
		{ "name", OPT_STR, &name, false },
		{ "uid", OPT_INT, &uid, false },
		{ 0 },
	});
	become(uid);
	int fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
	if (fd < 0 || inotify_add_watch(fd, path, IN_OPEN | IN_CLOSE) < 0)
		die("watch %s: %s", path, strerror(errno));
	if (directory && inotify_add_watch(fd, directory, IN_OPEN) < 0)
		die("watch %s: %s", directory, strerror(errno));
	printf("ready\n");
	fflush(stdout);
	while (!stop_signal) {
		struct pollfd p[] = { { .fd = 0, .events = POLLIN }, { .fd = fd, .events = POLLIN } };
		char buf[256];

		if (poll(p, 2, 100) <= 0)
			continue;
		if (p[0].revents) {
			ssize_t n = read(0, buf, sizeof buf);

			if (n <= 0)
				break;
			take(fd, &s);
			for (ssize_t i = 0; i < n; i++)
				if (buf[i] == '\n')
					print(&s);
		}
		take(fd, &s);
	}
	take(fd, &s);
	print(&s);
	return exit_status();
}
