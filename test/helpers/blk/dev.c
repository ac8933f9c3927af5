// SPDX-License-Identifier: MIT
#include "blk.h"

#include <linux/blkpg.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <sys/ioctl.h>

#ifndef BLKGETDISKSEQ
#define BLKGETDISKSEQ _IOR(0x12, 128, __u64)
#endif

int blk_diskseq(int fd, uint64_t *seq)
{
	__u64 v;

	if (ioctl(fd, BLKGETDISKSEQ, &v) < 0)
		return -errno;
	*seq = v;
	return 0;
}

static int blkpg(int fd, int op, int pno, uint64_t start, uint64_t len)
{
	struct blkpg_partition part = {
		.start = (long long)start,
		.length = (long long)len,
		.pno = pno,
	};
	struct blkpg_ioctl_arg arg = {
		.op = op,
		.datalen = sizeof part,
		.data = &part,
	};

	return ioctl(fd, BLKPG, &arg) < 0 ? -errno : 0;
}

int blk_part_add(int fd, int pno, uint64_t start, uint64_t len)
{
	return blkpg(fd, BLKPG_ADD_PARTITION, pno, start, len);
}

int blk_part_del(int fd, int pno)
{
	return blkpg(fd, BLKPG_DEL_PARTITION, pno, 0, 0);
}

int own_loop(int nr)
{
	const char *job = getenv("TAP_JOB_ID");

	return nr + (job ? atoi(job) : 0) * 32768;
}

static int loop_ctl(unsigned long op, int nr)
{
	int fd = open("/dev/loop-control", O_RDWR | O_CLOEXEC);
	int err = 0;

	if (fd < 0)
		return -errno;
	if (ioctl(fd, op, (long)nr) < 0)
		err = -errno;
	close(fd);
	return err;
}

int loop_ctl_add(int nr)
{
	return loop_ctl(LOOP_CTL_ADD, nr);
}

int loop_ctl_remove(int nr)
{
	return loop_ctl(LOOP_CTL_REMOVE, nr);
}

int loop_ctl_renew(int nr)
{
	int err = loop_ctl_add(nr);

	if (err == -EEXIST && !loop_ctl_remove(nr))
		err = loop_ctl_add(nr);
	return err;
}

int loop_open(int nr, int flags)
{
	char path[32];
	int fd;

	snprintf(path, sizeof path, "/dev/loop%d", nr);
	fd = open(path, flags | O_CLOEXEC);
	return fd < 0 ? -errno : fd;
}

int loop_configure(int fd, int file, uint32_t lo_flags)
{
	struct loop_config c = {
		.fd = (__u32)file,
		.block_size = 512,
		.info.lo_flags = lo_flags,
	};

	return ioctl(fd, LOOP_CONFIGURE, &c) < 0 ? -errno : 0;
}

int loop_clr_fd(int fd)
{
	return ioctl(fd, LOOP_CLR_FD, 0) < 0 ? -errno : 0;
}

int loop_destroy(int nr, uint64_t within_ns)
{
	uint64_t until = now_ns() + within_ns;

	for (;;) {
		int err, fd = loop_open(nr, O_RDWR);

		if (fd == -ENOENT)
			return 0;
		if (fd >= 0) {
			/* A partition that is open elsewhere stays, and so
			 * does the disk below it: both are tried again. */
			if (blk_part_del(fd, 1) != -EBUSY)
				loop_clr_fd(fd);
			close(fd); /* the detach itself happens here */
		}
		err = loop_ctl_remove(nr);
		if (err == 0 || err == -ENODEV)
			return 0;
		if (now_ns() > until)
			return err;
		sleep_us(1000);
	}
}

int open_appearing(const char *path, int flags, uint64_t *waited_ns)
{
	uint64_t start = now_ns();

	for (;;) {
		int fd = open(path, flags | O_CLOEXEC);
		int err = errno;

		*waited_ns = now_ns() - start;
		if (fd >= 0)
			return fd;
		if (err != ENOENT || *waited_ns > NS_PER_S || stop_signal)
			return -err;
		sleep_us(200);
	}
}

int parse_open_flags(const char *s)
{
	if (!strcmp(s, "rdonly"))
		return O_RDONLY | O_CLOEXEC;
	if (!strcmp(s, "rdwr"))
		return O_RDWR | O_CLOEXEC;
	if (!strcmp(s, "excl"))
		return O_RDONLY | O_EXCL | O_CLOEXEC;
	if (!strcmp(s, "path"))
		return O_PATH | O_CLOEXEC;
	die("bad value for --flags: %s (rdonly, rdwr, excl or path)", s);
}
