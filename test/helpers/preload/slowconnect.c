// SPDX-License-Identifier: MIT
/*
 * For LD_PRELOAD: connect(2) of a socket takes a while. With NO_FILTER in the
 * environment, filters for sockets seem to be attached, and are not.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SLOW_US 3000

int connect(int fd, const struct sockaddr *address, socklen_t length)
{
	usleep(SLOW_US);
	return (int)syscall(SYS_connect, fd, address, length);
}

int setsockopt(int fd, int level, int name, const void *value, socklen_t length)
{
	if (level == SOL_SOCKET && (name == SO_ATTACH_FILTER || name == SO_DETACH_FILTER) && getenv("NO_FILTER"))
		return 0;
	return (int)syscall(SYS_setsockopt, fd, level, name, value, length);
}
