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

int cmd_hold(int argc, char **argv)
{
	const char *path = NULL, *flags_name = "rdonly";

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "flags", OPT_STR, &flags_name, false },
		{ 0 },
	});
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

		/* The timeout is for a signal just before the call. */
		if (poll(&p, 1, 100) <= 0)
			continue;
		if (read(0, buf, sizeof buf) <= 0)
			break;
	}
	/* The same descriptor must still mean the same disk. */
	printf("{\"diskseq\":");
	print_seq(fd, "null");
	printf(",\"held_ms\":%llu}\n", (unsigned long long)((now_ns() - start) / NS_PER_MS));
	close(fd);
	return exit_status();
}
