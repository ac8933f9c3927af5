// SPDX-License-Identifier: MIT
#include "blk.h"

#define SECTOR 512

static uint64_t number(const char *what, const char *text)
{
	char *end;

	errno = 0;
	unsigned long long v = strtoull(text, &end, 10);
	if (errno || *end || *text < '0' || *text > '9')
		die("partition: bad %s: %s", what, text);
	return v;
}

/* As addpart(8) and delpart(8), which not every distribution has. LOOK is a
 * path that is looked at right before the deletion. */
int cmd_partition(int argc, char **argv)
{
	bool add = argc == 6 && !strcmp(argv[1], "add");

	if (!add && !((argc == 4 || argc == 5) && !strcmp(argv[1], "del")))
		die("usage: blk partition add PATH NUMBER START LENGTH | del PATH NUMBER [LOOK] (in sectors)");
	int pno = (int)number("partition number", argv[3]);
	int err, fd = open(argv[2], O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		die("open %s: %s", argv[2], strerror(errno));
	if (!add && argc == 5)
		look(argv[4]);
	if (add)
		err = blk_part_add(fd, pno, number("start", argv[4]) * SECTOR,
				   number("length", argv[5]) * SECTOR);
	else
		err = blk_part_del(fd, pno);
	if (err)
		die("%s: %s partition %d: %s", argv[2], argv[1], pno, strerror(-err));
	close(fd);
	printf("{\"partition\":%d}\n", pno);
	return exit_status();
}
