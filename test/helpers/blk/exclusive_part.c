// SPDX-License-Identifier: MIT
#include "blk.h"

static int nr;

/* Closes the descriptor of the whole disk again at once: only the opener of
 * the partition should count. */
static int part_del(void)
{
	int err, fd = loop_open(nr, O_RDONLY);

	if (fd < 0)
		return fd;
	err = blk_part_del(fd, 1);
	close(fd);
	return err;
}

int cmd_exclusive_part(int argc, char **argv)
{
	static struct excl x;
	const char *dir = NULL;
	char path[PATH_MAX];
	int count = 0;

	parse_opts(argc, argv, (const struct opt[]){
		{ "loop", OPT_INT, &nr, true },
		{ "dir", OPT_STR, &dir, true },
		{ "count", OPT_INT, &count, true },
		{ 0 },
	});
	excl_init();
	while (excl_more(&x, count)) {
		uint64_t seq = 0;
		int err, fd = loop_open(nr, O_RDONLY);

		if (fd < 0)
			die("/dev/loop%d: %s", nr, strerror(-fd));
		err = blk_diskseq(fd, &seq);
		if (!err)
			err = blk_part_add(fd, 1, 4096, 4096);
		close(fd);
		if (err)
			die("loop%d: add partition 1: %s", nr, strerror(-err));
		snprintf(path, sizeof path, "%s/%llup1", dir, (unsigned long long)seq);
		err = excl_try(&x, part_del, excl_use(&x, path));
		/* The next round needs the partition gone. */
		if (err && (err = excl_retry(part_del, 5 * NS_PER_S)) && err != -ENXIO)
			die("loop%d: delete partition 1: %s", nr, strerror(-err));
	}
	excl_print(&x, "");
	return exit_status();
}
