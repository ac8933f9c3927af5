// SPDX-License-Identifier: MIT
#include "blk.h"

#include <sys/mman.h>

#define OWN_NR 18500
#define LIVE_US 500

/* Measures the first open of a new disk each time, by a name that was never looked up. */
int cmd_new_disks(int argc, char **argv)
{
	static struct hist h;
	static struct errs errors;
	const char *dir = NULL;
	double seconds = 1;
	int err, nr = own_loop(OWN_NR);

	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "seconds", OPT_DBL, &seconds, false },
		{ 0 },
	});
	int file = memfd_create("disk", MFD_CLOEXEC);
	if (file < 0 || ftruncate(file, 1 << 20) < 0)
		die("memfd: %s", strerror(errno));
	err = loop_ctl_renew(nr);
	if (err)
		die("LOOP_CTL_ADD: %s", strerror(-err));
	for (uint64_t until = now_ns() + (uint64_t)(seconds * NS_PER_S); now_ns() < until && !stop_signal && !err;) {
		char path[PATH_MAX];
		uint64_t seq = 0, got = 0;
		int loop = loop_open(nr, O_RDWR);

		err = loop < 0 ? loop : loop_configure(loop, file, 0);
		if (err == -EBUSY || err == -ENXIO) { /* the one before is just going */
			if (loop >= 0)
				close(loop);
			sleep_us(100);
			err = 0;
			continue;
		}
		if (!err)
			err = blk_diskseq(loop, &seq);
		if (err)
			break;
		sleep_us(LIVE_US);
		snprintf(path, sizeof path, "%s/%llu", dir, (unsigned long long)seq);
		uint64_t t = now_ns();
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		uint64_t took = now_ns() - t;
		if (fd < 0)
			errs_add(&errors, errno);
		else if (blk_diskseq(fd, &got) < 0 || got != seq)
			err = -ESTALE;
		else
			hist_add(&h, took);
		if (fd >= 0)
			close(fd);
		loop_clr_fd(loop);
		close(loop);
	}
	int left = loop_destroy(nr, CLEANUP_NS);
	if (err || left)
		die("new-disks: %s", strerror(-(err ? err : left)));
	hist_report(&h, &errors);
	return exit_status();
}
