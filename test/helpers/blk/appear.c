// SPDX-License-Identifier: MIT
#include "blk.h"

#include <stdlib.h>
#include <sys/mman.h>

#define OWN_NR 19000
#define WITHIN_NS (60 * NS_PER_S)

/* Measures how long after LOOP_CONFIGURE a new disk can be opened by its
 * sequence number, and checks that it is that disk. "--first" is a command
 * to run before the first try, in that time; "--between" is one to run
 * between two rounds. */
int cmd_appear(int argc, char **argv)
{
	static struct hist hist;
	const char *dir = NULL, *first = NULL, *between = NULL;
	int nr = own_loop(OWN_NR), rounds = 1, err = 0;

	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "rounds", OPT_INT, &rounds, false },
		{ "first", OPT_STR, &first, false },
		{ "between", OPT_STR, &between, false },
		{ 0 },
	});
	int file = memfd_create("disk", MFD_CLOEXEC);
	if (file < 0 || ftruncate(file, 1 << 20) < 0)
		die("memfd: %s", strerror(errno));
	for (int round = 0; round < rounds && !err && !stop_signal; round++) {
		uint64_t seq = 0, opened = 0;
		char path[PATH_MAX];

		err = loop_ctl_renew(nr);
		if (err < 0)
			break;
		int fd = loop_open(nr, O_RDWR);
		err = fd < 0 ? fd : loop_configure(fd, file, 0);
		uint64_t began = now_ns();
		if (!err)
			err = blk_diskseq(fd, &seq);
		snprintf(path, sizeof path, "%s/%llu", dir, (unsigned long long)seq);
		if (!err && first && system(first) != 0)
			err = -ECANCELED;
		while (!err && !stop_signal) {
			int tried = open(path, O_RDONLY | O_CLOEXEC);

			if (tried >= 0) {
				err = blk_diskseq(tried, &opened);
				close(tried);
				if (!err && opened == seq)
					break;
			}
			if (now_ns() - began > WITHIN_NS)
				err = -ETIMEDOUT;
			sleep_us(100);
		}
		if (!err && !stop_signal)
			hist_add(&hist, now_ns() - began);
		if (fd >= 0)
			close(fd);
		int left = loop_destroy(nr, CLEANUP_NS);
		err = err ? err : left;
		if (!err && between && system(between) != 0)
			err = -ECANCELED;
	}
	if (err)
		die("appear: %s", strerror(-err));
	printf("{");
	hist_print_ns(&hist);
	printf("}\n");
	return exit_status();
}
