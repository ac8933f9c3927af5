// SPDX-License-Identifier: MIT
/* A disk whose data is exchanged while it is open (LOOP_CHANGE_FD). */
#include "blk.h"

#include <linux/loop.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define OWN_NR 18000
#define SIZE (1 << 20)
#define BEFORE_US 5000
#define AFTER_US 10000

static char path[PATH_MAX], self[32];
static _Atomic bool ending, changed;
static _Atomic uint64_t right, wrong, early, refused;
static int loop;
static uint64_t diskseq;

/* Asks for the name's attributes again and again. */
static void *by_name(void *arg)
{
	(void)arg;
	while (!ending) {
		int fd = open(path, O_RDONLY | O_CLOEXEC);

		if (fd >= 0)
			close(fd);
	}
	return NULL;
}

static void *by_descriptor(void *arg)
{
	(void)arg;
	while (!ending) {
		/* In this order, as the change may end in between. */
		bool late = changed;
		uint64_t seq = 0;
		blk_diskseq(loop, &seq);
		int fd = open(self, O_RDONLY | O_CLOEXEC);

		if (fd < 0)
			refused += late;
		else
			*(late ? &wrong : seq != diskseq ? &early : &right) += 1;
		if (fd >= 0)
			close(fd);
	}
	return NULL;
}

static int file_of(char fill)
{
	static char data[SIZE];
	int fd = memfd_create("disk", MFD_CLOEXEC);

	memset(data, fill, sizeof data);
	if (fd < 0 || write(fd, data, sizeof data) != sizeof data)
		die("memfd: %s", strerror(errno));
	return fd;
}

/* Counts the opens through a descriptor's node that reached the disk though
 * they began after the change. "early" counts those in the middle of the
 * change, when the disk had its new number already. --flags: those of the
 * descriptor. */
int cmd_change_fd(int argc, char **argv)
{
	const char *dir = NULL, *flags_name = "path";
	int nr = own_loop(OWN_NR), rounds = 1, files[2] = { file_of('a'), file_of('b') }, err;

	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "flags", OPT_STR, &flags_name, false },
		{ "rounds", OPT_INT, &rounds, false },
		{ 0 },
	});
	err = loop_ctl_renew(nr);
	if (err)
		die("LOOP_CTL_ADD: %s", strerror(-err));
	loop = loop_open(nr, O_RDONLY);
	err = loop < 0 ? loop : loop_configure(loop, files[0], LO_FLAGS_READ_ONLY);
	for (int round = 0; round < rounds && !err && !stop_signal; round++) {
		pthread_t threads[2];

		err = blk_diskseq(loop, &diskseq);
		snprintf(path, sizeof path, "%s/%llu", dir, (unsigned long long)diskseq);
		int fd = open_appearing(path, parse_open_flags(flags_name), &(uint64_t){ 0 });
		if (err || fd < 0) {
			err = err ? err : fd;
			break;
		}
		snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
		ending = changed = false;
		pthread_create(&threads[0], NULL, by_name, NULL);
		pthread_create(&threads[1], NULL, by_descriptor, NULL);
		sleep_us(BEFORE_US);
		if (ioctl(loop, LOOP_CHANGE_FD, files[(round + 1) % 2]) < 0)
			err = -errno;
		changed = true;
		sleep_us(AFTER_US);
		ending = true;
		pthread_join(threads[0], NULL);
		pthread_join(threads[1], NULL);
		close(fd);
	}
	if (loop >= 0)
		close(loop);
	int left = loop_destroy(nr, CLEANUP_NS);
	if (err || left)
		die("change-fd: %s", strerror(-(err ? err : left)));
	printf("{\"right\":%llu,\"early\":%llu,\"wrong\":%llu,\"refused\":%llu}\n", (unsigned long long)right,
	       (unsigned long long)early, (unsigned long long)wrong, (unsigned long long)refused);
	return exit_status();
}
