// SPDX-License-Identifier: MIT
#include "blk.h"

#include <sys/stat.h>

int cmd_openlat(int argc, char **argv)
{
	static struct hist h;
	static struct errs errors;
	const char *path = NULL, *flags_name = "rdonly";
	int count = 0, warmup = 0, pause_ms = 0;
	double seconds = 0;
	bool use_stat = false, immediately = false;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "count", OPT_INT, &count, true },
		{ "flags", OPT_STR, &flags_name, false },
		{ "warmup", OPT_INT, &warmup, false },
		{ "pause-ms", OPT_INT, &pause_ms, false },
		{ "seconds", OPT_DBL, &seconds, false }, /* no longer than this */
		{ "stat", OPT_FLAG, &use_stat, false },
		{ "close-immediately", OPT_FLAG, &immediately, false },
		{ 0 },
	});
	int flags = parse_open_flags(flags_name);
	/* By default the last descriptor is closed only after the next open,
	 * so that the device stays open, and only the way to it is timed.
	 * With --close-immediately, each open is also the device's first
	 * one. */
	int last = -1;
	uint64_t until = seconds > 0 ? now_ns() + (uint64_t)(seconds * NS_PER_S) : UINT64_MAX;

	for (int i = -warmup; i < count && !stop_signal && now_ns() < until; i++) {
		struct stat st;
		if (pause_ms > 0)
			usleep(pause_ms * 1000);
		uint64_t t = now_ns();
		int r = use_stat ? stat(path, &st) : open(path, flags);
		uint64_t took = now_ns() - t;

		if (r < 0) {
			if (errno == EINTR && stop_signal)
				break;
			if (i >= 0)
				errs_add(&errors, errno);
			continue;
		}
		if (i >= 0)
			hist_add(&h, took);
		if (use_stat)
			continue;
		if (immediately) {
			close(r);
			continue;
		}
		if (last >= 0)
			close(last);
		last = r;
	}
	if (last >= 0)
		close(last);
	hist_report(&h, &errors);
	return exit_status();
}
