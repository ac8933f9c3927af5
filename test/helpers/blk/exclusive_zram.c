// SPDX-License-Identifier: MIT
#include "blk.h"

static int nr;

static int attr_write(const char *attr, const char *val)
{
	char path[64];
	int err = 0;

	snprintf(path, sizeof path, "/sys/block/zram%d/%s", nr, attr);
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	if (write(fd, val, strlen(val)) < 0)
		err = -errno;
	close(fd);
	return err;
}

static uint64_t attr_read(const char *attr)
{
	char path[64], buf[32] = "";

	snprintf(path, sizeof path, "/sys/block/zram%d/%s", nr, attr);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, buf, sizeof buf - 1) <= 0)
		die("%s: %s", path, strerror(errno));
	close(fd);
	return strtoull(buf, NULL, 10);
}

/* The kernel refuses a reset with EBUSY as long as the device is open
 * anywhere. Once accepted it takes some 16 ms by itself. */
static int reset(void)
{
	return attr_write("reset", "1");
}

int cmd_exclusive_zram(int argc, char **argv)
{
	static struct excl x;
	const char *fixed = NULL, *dir = NULL;
	static char path[PATH_MAX]; /* without PIE it lies below 4 GiB */
	char size[32], extra[64];
	int count = 0;
	uint64_t changes = 0;

	parse_opts(argc, argv, (const struct opt[]){
		{ "nr", OPT_INT, &nr, true },
		{ "count", OPT_INT, &count, true },
		{ "path", OPT_STR, &fixed, false },
		{ "dir", OPT_STR, &dir, false },
		{ 0 },
	});
	if (!fixed == !dir)
		die("exclusive-zram: one of --path and --dir is required");

	uint64_t was = attr_read("disksize"), seq = attr_read("diskseq");
	excl_init();
	while (excl_more(&x, count)) {
		int err;

		if (attr_read("disksize") == 0 && (err = attr_write("disksize", "1M")) < 0)
			die("zram%d: disksize: %s", nr, strerror(-err));
		uint64_t now = attr_read("diskseq");
		if (now != seq)
			changes++;
		seq = now;
		if (dir)
			snprintf(path, sizeof path, "%s/%llu", dir, (unsigned long long)seq);
		else
			snprintf(path, sizeof path, "%s", fixed);
		excl_try(&x, reset, excl_use(&x, path));
	}
	/* Leaves the device as it was found, though empty. */
	excl_retry(reset, 5 * NS_PER_S);
	if (was) {
		snprintf(size, sizeof size, "%llu", (unsigned long long)was);
		attr_write("disksize", size);
	}
	snprintf(extra, sizeof extra, ",\"diskseq_changes\":%llu", (unsigned long long)changes);
	excl_print(&x, extra);
	return exit_status();
}
