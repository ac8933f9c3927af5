// SPDX-License-Identifier: MIT
/* Disks by the thousand: loop devices, all on one file. */
#include "blk.h"

#include <linux/loop.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>

/* Numbers that losetup and the churn do not use. */
#define FIRST_NR 20000
/* Numbers of devices that are made one at a time. */
#define FIRST_ALONE 1000
/* To remove one is mostly waiting, and many can wait at once. */
#define WORKERS 16

/* Has only devices that this run added. */
static int *nrs;
static int got, left;
static bool writable;

static int attach(int nr, int file)
{
	int fd = loop_open(nr, writable ? O_RDWR : O_RDONLY), err;

	if (fd < 0)
		return fd;
	err = loop_configure(fd, file, writable ? 0 : LO_FLAGS_READ_ONLY);
	close(fd);
	return err;
}

static void *remove_some(void *arg)
{
	for (int i = (int)(intptr_t)arg; i < got; i += WORKERS)
		if (loop_destroy(nrs[i], CLEANUP_NS) < 0)
			__atomic_add_fetch(&left, 1, __ATOMIC_RELAXED);
	return NULL;
}

static void remove_all(void)
{
	pthread_t threads[WORKERS];
	bool started[WORKERS];

	for (intptr_t i = 0; i < WORKERS; i++)
		started[i] = pthread_create(&threads[i], NULL, remove_some, (void *)i) == 0;
	for (intptr_t i = 0; i < WORKERS; i++) {
		if (started[i])
			pthread_join(threads[i], NULL);
		else
			remove_some((void *)i);
	}
	if (left)
		die("loops: %d loop devices could not be removed", left);
}

/* Attaches the devices, says "ready", and detaches them when stdin closes. */
int cmd_loops(int argc, char **argv)
{
	int err = 0, count = argc >= 3 ? atoi(argv[1]) : 0;

	writable = argc == 4 && !strcmp(argv[3], "writable");
	if (count < 1 || argc > 3 + writable)
		die("usage: blk loops COUNT FILE [writable]");
	int file = open(argv[2], (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
	if (file < 0)
		die("%s: %s", argv[2], strerror(errno));
	nrs = calloc((size_t)count, sizeof *nrs);
	if (!nrs)
		die("loops: out of memory");
	for (int nr = own_loop(FIRST_NR); got < count && !err && !stop_signal; nr++) {
		err = loop_ctl_add(nr);
		if (err == 0) {
			nrs[got++] = nr;
			err = attach(nr, file);
		} else if (err == -EEXIST) {
			err = 0;
		}
	}
	if (err) {
		remove_all();
		die("loops: %s", strerror(-err));
	}
	printf("ready\n");
	fflush(stdout);
	while (!stop_signal) {
		struct pollfd p = { .fd = 0, .events = POLLIN };
		char buf[256];

		if (poll(&p, 1, 100) > 0 && read(0, buf, sizeof buf) <= 0)
			break;
	}
	remove_all();
	printf("{\"loops\":%d}\n", got);
	return exit_status();
}

/* As losetup -d. LOOK is a path that is looked at right before. */
int cmd_loop_detach(int argc, char **argv)
{
	if (argc != 2 && argc != 3)
		die("usage: blk loop-detach PATH [LOOK]");
	int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		die("open %s: %s", argv[1], strerror(errno));
	if (argc == 3)
		look(argv[2]);
	int err = loop_clr_fd(fd);
	if (err)
		die("%s: detach: %s", argv[1], strerror(-err));
	close(fd);
	printf("{\"detached\":true}\n");
	return exit_status();
}

/* Makes a loop device without a file, and prints its path. */
int cmd_loop_new(int argc, char **argv)
{
	int err, nr = own_loop(FIRST_ALONE);

	if (argc != 1)
		die("usage: %s", argv[0]);
	/* One that is detached is given away, as losetup --find does. */
	while ((err = loop_ctl_renew(nr)) == -EEXIST)
		nr++;
	if (err)
		die("loop%d: %s", nr, strerror(-err));
	printf("/dev/loop%d\n", nr);
	return exit_status();
}

/* Detaches the device if it has a file, and removes it. */
int cmd_loop_remove(int argc, char **argv)
{
	int nr, err;

	if (argc != 2 || sscanf(argv[1], "/dev/loop%d", &nr) != 1)
		die("usage: blk loop-remove PATH");
	err = loop_destroy(nr, CLEANUP_NS);
	if (err)
		die("%s: remove: %s", argv[1], strerror(-err));
	printf("{\"removed\":true}\n");
	return exit_status();
}

struct stall {
	const char *path;
	pthread_t reads, sets;
};

static int stall_open(const struct stall *s)
{
	int fd = open(s->path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		die("open %s: %s", s->path, strerror(errno));
	return fd;
}

static void *stall_read(void *arg)
{
	char byte;
	int fd = stall_open(arg);

	if (read(fd, &byte, 1) < 0)
		fprintf(stderr, "%s\n", strerror(errno));
	close(fd);
	return NULL;
}

static void *stall_set(void *arg)
{
	struct loop_info64 info = { .lo_flags = LO_FLAGS_READ_ONLY };
	struct stall *s = arg;
	int fd = stall_open(s);

	if (pthread_create(&s->reads, NULL, stall_read, s))
		die("pthread_create");
	sleep_us(100000);
	/* Waits for the read, and holds lo_mutex meanwhile, which lo_open()
	 * needs (drivers/block/loop.c, 6.18). */
	if (ioctl(fd, LOOP_SET_STATUS64, &info) < 0)
		die("%s: %s", s->path, strerror(errno));
	close(fd);
	pthread_join(s->reads, NULL);
	return NULL;
}

/* For disks on a file that hangs: makes even open(2) of them hang. Says "ready" when it does. */
int cmd_loop_stall(int argc, char **argv)
{
	struct stall *all = calloc((size_t)argc, sizeof *all);

	if (argc < 2 || !all)
		die("usage: blk loop-stall PATH ...");
	for (int i = 1; i < argc; i++) {
		all[i].path = argv[i];
		if (pthread_create(&all[i].sets, NULL, stall_set, &all[i]))
			die("pthread_create");
	}
	sleep_us(500000);
	printf("ready\n");
	fflush(stdout);
	for (int i = 1; i < argc; i++)
		pthread_join(all[i].sets, NULL);
	printf("{\"stalled\":%d}\n", argc - 1);
	return exit_status();
}
