// SPDX-License-Identifier: MIT
/* A network block device whose other end never answers, until SIGTERM. */
#include "blk.h"

#include <linux/nbd.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#define BLOCK 512
#define BLOCKS 2048

int cmd_nbd_silent(int argc, char **argv)
{
	const char *path = NULL;
	int ends[2];

	parse_opts(argc, argv, (const struct opt[]){
		{ "device", OPT_STR, &path, true },
		{ 0 },
	});
	int fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		die("open %s: %s", path, strerror(errno));
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0 || ioctl(fd, NBD_SET_BLKSIZE, BLOCK) < 0 ||
	    ioctl(fd, NBD_SET_SIZE_BLOCKS, BLOCKS) < 0 || ioctl(fd, NBD_SET_SOCK, ends[0]) < 0)
		die("%s: %s", path, strerror(errno));
	/* Returns when the device is disconnected. */
	pid_t pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0)
		_exit(ioctl(fd, NBD_DO_IT) < 0 ? 1 : 0);
	printf("ready\n");
	fflush(stdout);
	while (!stop_signal)
		sleep_us(50000);
	/* Requests that wait end with an error. */
	close(ends[1]);
	ioctl(fd, NBD_DISCONNECT);
	ioctl(fd, NBD_CLEAR_SOCK);
	waitpid(pid, NULL, 0);
	printf("{}\n");
	return exit_status();
}
