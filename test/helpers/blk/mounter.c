// SPDX-License-Identifier: MIT
#include "blk.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mount.h>

/* In a mount namespace of its own, a directory that exists everywhere may be covered. */
#define MOUNTPOINT "/dev/shm"
#define WITHIN_NS (2 * NS_PER_S)

/* Without PIE this lies below 4 GiB. */
static char source[PATH_MAX];
static _Atomic bool over;
static _Atomic uint64_t unmounted;
static int failed;

static void *mount_and_compute(void *arg)
{
	(void)arg;
	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
	    mount(source, MOUNTPOINT, "ext4", MS_RDONLY, NULL) < 0)
		failed = errno;
	else
		while (umount2(MOUNTPOINT, 0) < 0 && errno == EBUSY)
			sleep_us(100);
	unmounted = now_ns();
	while (!over)
		;
	return NULL;
}

/* One thread mounts a zram disk, unmounts it, and makes no more system
 * calls. Measures how long after that the disk cannot be reset. The other
 * thread stays in its namespace, as unshare(2) is for one thread. */
int cmd_mount_compute(int argc, char **argv)
{
	const char *path = NULL;
	char attr[64];
	int nr = 0, err = 0;
	pthread_t thread;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "nr", OPT_INT, &nr, true },
		{ 0 },
	});
	snprintf(source, sizeof source, "%s", path);
	snprintf(attr, sizeof attr, "/sys/block/zram%d/reset", nr);
	int reset = open(attr, O_WRONLY | O_CLOEXEC);
	if (reset < 0)
		die("%s: %s", attr, strerror(errno));
	pthread_create(&thread, NULL, mount_and_compute, NULL);
	while (!unmounted)
		sleep_us(200);
	uint64_t asked;
	do {
		asked = now_ns();
		err = write(reset, "1", 1) < 0 ? errno : 0;
		if (err == EBUSY)
			sleep_us(200);
	} while (err == EBUSY && asked - unmounted < WITHIN_NS && !stop_signal);
	over = true;
	pthread_join(thread, NULL);
	printf("{\"mount_error\":%d,\"error\":%d,\"busy_ms\":%.3f}\n", failed, err, (double)(asked - unmounted) / 1e6);
	return exit_status();
}
