// SPDX-License-Identifier: MIT
/* For LD_PRELOAD: it takes a while to look up the name of a device-mapper device in sysfs. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define SLOW_US 600000

static FILE *open_slowly(const char *function, const char *path, const char *mode)
{
	FILE *(*next)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, function);
	size_t length = strlen(path);

	if (length > 8 && strcmp(path + length - 8, "/dm/name") == 0)
		usleep(SLOW_US);
	return next(path, mode);
}

FILE *fopen(const char *path, const char *mode)
{
	return open_slowly("fopen", path, mode);
}

FILE *fopen64(const char *path, const char *mode)
{
	return open_slowly("fopen64", path, mode);
}
