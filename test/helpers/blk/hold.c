// SPDX-License-Identifier: MIT
#include "blk.h"

#include <poll.h>

static void print_seq(int fd, const char *none)
{
	uint64_t seq;

	if (blk_diskseq(fd, &seq) == 0)
		printf("%llu", (unsigned long long)seq);
	else
		printf("%s", none); /* O_PATH, or no block device */
}

/* Opens again what the descriptor stands for, without its name. */
static void reopen(int fd)
{
	char path[32];

	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	int again = open(path, O_RDONLY | O_CLOEXEC);
	if (again < 0) {
		printf("{\"error\":%d}\n", errno);
	} else {
		printf("{\"diskseq\":");
		print_seq(again, "null");
		printf("}\n");
		close(again);
	}
	fflush(stdout);
}

/* A line on stdin opens it again; the end of stdin ends it. */
int cmd_hold(int argc, char **argv)
{
	const char *path = NULL, *flags_name = "rdonly";
	int uid = 0;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "flags", OPT_STR, &flags_name, false },
		{ "uid", OPT_INT, &uid, false },
		{ 0 },
	});
	become(uid);
	int fd = open(path, parse_open_flags(flags_name));
	if (fd < 0)
		die("open %s: %s", path, strerror(errno));
	printf("ready ");
	print_seq(fd, "-");
	printf("\n");
	fflush(stdout);

	uint64_t start = now_ns();
	while (!stop_signal) {
		struct pollfd p = { .fd = 0, .events = POLLIN };
		char buf[256];

		/* The timeout covers a signal just before the call. */
		if (poll(&p, 1, 100) <= 0)
			continue;
		ssize_t n = read(0, buf, sizeof buf);
		if (n <= 0)
			break;
		for (ssize_t i = 0; i < n; i++)
			if (buf[i] == '\n')
				reopen(fd);
	}
	/* The same descriptor must still mean the same disk. */
	printf("{\"diskseq\":");
	print_seq(fd, "null");
	printf(",\"held_ms\":%llu}\n", (unsigned long long)((now_ns() - start) / NS_PER_MS));
	close(fd);
	return exit_status();
}
