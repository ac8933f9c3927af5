// SPDX-License-Identifier: MIT
#include "blk.h"

#include <pthread.h>

/* These threads need no deep stack. */
#define STACK_BYTES (64 * 1024)

static const char *path;
static _Atomic int opened, failed;

static void *open_once(void *arg)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	(void)arg;
	if (fd >= 0)
		close(fd);
	*(fd < 0 ? &failed : &opened) += 1;
	for (;;)
		pause();
	return NULL;
}

/* Many threads. Each opens a path, closes it, and sleeps from then on. */
int cmd_idlers(int argc, char **argv)
{
	int uid = 0, threads = 1;
	pthread_attr_t attr;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "threads", OPT_INT, &threads, true },
		{ "uid", OPT_INT, &uid, false },
		{ 0 },
	});
	become(uid);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	for (int i = 0; i < threads; i++) {
		pthread_t thread;
		int err = pthread_create(&thread, &attr, open_once, NULL);

		if (err)
			die("pthread_create: %s", strerror(err));
	}
	while (opened + failed < threads && !stop_signal)
		sleep_us(1000);
	if (failed)
		die("%d opens of %s failed", failed, path);
	printf("ready\n");
	fflush(stdout);
	wait_for_end();
	printf("{\"threads\":%d}\n", threads);
	return exit_status();
}
