// SPDX-License-Identifier: MIT
/*
 * diskseq DEVICE...
 * diskseq --open DEVICE [--write] -- COMMAND [ARGUMENT...]
 *
 * The first prints the path in the tree of each device, as "diskseqfs resolve" does; the second
 * runs a program with the open device, {} in its arguments being /proc/self/fd/N. Both verify what
 * they say on an open descriptor, and need no daemon. For scripts that do this once for each disk,
 * where the start of Node.js would be most of the work.
 *
 * Exit status: 0; 1 where a device has no answer; 2 for a wrong command line. With --open those of
 * env(1): 125 for what this program cannot do, 126, 127, or the program's own.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#ifndef BLKGETDISKSEQ /* kernel headers before 5.15 */
#define BLKGETDISKSEQ _IOR(0x12, 128, __u64)
#endif

#define TREE "/dev/disk/by-diskseq/"
#define CLASS "/sys/class/block/"
/* How often a disk that turned out to be another one is looked for again. */
#define TRIES_MAX 4
#define EXIT_FAILED 125

/* What a sysfs uevent file says of a device. */
struct device {
	uint64_t diskseq;
	unsigned major, minor, partition;
	char devname[NAME_MAX + 1];
};

static const char *argument;

/* One line on stderr about the current argument; -1. Control characters, of which UTF-8 has some of two
 * bytes, must not reach a terminal. */
__attribute__((format(printf, 1, 2))) static int fail(const char *format, ...)
{
	char line[2 * PATH_MAX];
	int n = snprintf(line, sizeof line, "diskseq: %.*s: ", PATH_MAX, argument);
	va_list list;

	va_start(list, format);
	vsnprintf(line + n, sizeof line - (size_t)n, format, list);
	va_end(list);
	for (unsigned char *c = (unsigned char *)line; *c; c++)
		if (*c < ' ' || *c == 127 || (*c == 0xc2 && c[1] >= 0x80 && c[1] <= 0x9f))
			*c = '?';
	fprintf(stderr, "%s\n", line);
	return -1;
}

static int fail_open(int error)
{
	if (error == EMFILE || error == ENFILE || error == ENOMEM)
		return fail("out of resources: %s", strerror(error));
	if (error == EACCES || error == EPERM)
		return fail(geteuid() ? "permission denied; run this as root"
				      : "permission denied, to root: a device cgroup or a security module forbids it");
	return error == ENOENT ? fail("no such file") : fail("cannot be opened: %s", strerror(error));
}

/* The first line of a sysfs file, or all of it; false if there is none. */
static bool read_file(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	text[n < 0 ? 0 : n] = '\0';
	return n >= 0;
}

/* The value of KEY= in a uevent file. */
static const char *value_of(const char *uevent, const char *key, char *value, size_t size)
{
	size_t length = strlen(key);

	value[0] = '\0';
	for (const char *line = uevent; line; line = strchr(line, '\n'), line = line ? line + 1 : NULL) {
		if (strncmp(line, key, length) || line[length] != '=')
			continue;
		snprintf(value, size, "%.*s", (int)strcspn(line + length + 1, "\n"), line + length + 1);
		break;
	}
	return value;
}

static uint64_t number_of(const char *uevent, const char *key)
{
	char value[32];

	return strtoull(value_of(uevent, key, value, sizeof value), NULL, 10);
}

/* Of a directory in sysfs; false for what has no node of its own, or no diskseq. */
static bool read_device(const char *directory, struct device *d)
{
	char path[PATH_MAX], uevent[4096];

	if (snprintf(path, sizeof path, "%s/uevent", directory) >= (int)sizeof path || !read_file(path, uevent, sizeof uevent))
		return false;
	d->major = (unsigned)number_of(uevent, "MAJOR");
	d->minor = (unsigned)number_of(uevent, "MINOR");
	d->partition = (unsigned)number_of(uevent, "PARTN");
	d->diskseq = number_of(uevent, "DISKSEQ");
	return *value_of(uevent, "DEVNAME", d->devname, sizeof d->devname) && d->diskseq;
}

/* What an open device is; NULL, or what is wrong with it.  For a loop device the order is the point:
 * until it is seen bound, its diskseq may still change; what is read after that, stays. */
static const char *identify(int fd, struct device *d, char *kname, size_t size)
{
	char path[64], link[PATH_MAX];
	struct loop_info64 bound;
	struct stat st;
	uint64_t diskseq;
	ssize_t n;

	if (fstat(fd, &st) < 0)
		return strerror(errno);
	snprintf(path, sizeof path, "/sys/dev/block/%u:%u", major(st.st_rdev), minor(st.st_rdev));
	n = readlink(path, link, sizeof link - 1);
	link[n < 0 ? 0 : n] = '\0';
	snprintf(kname, size, "%.*s", (int)size - 1, strrchr(link, '/') ? strrchr(link, '/') + 1 : link);
	if (!strncmp(kname, "loop", 4) && ioctl(fd, LOOP_GET_STATUS64, &bound) < 0)
		return "not bound to any file; it has no identity to name";
	if (ioctl(fd, BLKGETDISKSEQ, &diskseq) < 0)
		return errno == ENOTTY ? "this kernel gives disks no sequence numbers; Linux 5.15 or later is needed" : strerror(errno);
	if (!read_device(path, d))
		return "the device is gone";
	if (d->diskseq != diskseq || d->major != major(st.st_rdev) || d->minor != minor(st.st_rdev))
		return "the device changed while it was being looked at; try again";
	return NULL;
}

/* A node is looked at before it is opened: to open what is none might do something, or wait. */
static int open_node(const char *path, int *error)
{
	int node = open(path, O_PATH | O_CLOEXEC), fd = -1;
	char self[64];
	struct stat st;

	*error = errno;
	if (node < 0)
		return -1;
	snprintf(self, sizeof self, "/proc/self/fd/%d", node);
	if (fstat(node, &st) < 0 || !S_ISBLK(st.st_mode))
		*error = ENOTBLK;
	else if ((fd = open(self, O_RDONLY | O_NONBLOCK | O_CLOEXEC)) < 0)
		*error = errno;
	close(node);
	return fd;
}

/* A number as names have it: decimal, no sign, no leading zero; where it ends, or NULL. */
static const char *parse_number(const char *text, uint64_t *number)
{
	char *end;

	if (*text < '1' || *text > '9')
		return NULL;
	errno = 0;
	*number = strtoull(text, &end, 10);
	return errno ? NULL : end;
}

/* N, NpM or N-partM. */
static bool parse_name(const char *name, struct device *wanted)
{
	const char *rest = parse_number(name, &wanted->diskseq);
	uint64_t partition = 0;

	wanted->partition = 0;
	if (!rest)
		return false;
	if (*rest == '\0')
		return true;
	rest += !strncmp(rest, "-part", 5) ? 5 : *rest == 'p' ? 1 : strlen(rest);
	rest = parse_number(rest, &partition);
	wanted->partition = (unsigned)partition;
	return rest && *rest == '\0' && partition < 100000;
}

/* The device that has that name now; sysfs may be behind, so what is opened is verified. */
static bool find(const struct device *wanted, struct device *found)
{
	DIR *class = opendir(CLASS);
	bool there = false;

	for (struct dirent *e; !there && class && (e = readdir(class));) {
		char path[PATH_MAX];

		snprintf(path, sizeof path, CLASS "%s", e->d_name);
		there = e->d_name[0] != '.' && read_device(path, found) && found->diskseq == wanted->diskseq &&
			found->partition == wanted->partition;
	}
	if (class)
		closedir(class);
	return there;
}

static int open_named(const struct device *wanted, struct device *d)
{
	for (int tries = 0; tries < TRIES_MAX && find(wanted, d); tries++) {
		char path[PATH_MAX], kname[NAME_MAX + 1];
		int error, fd;

		snprintf(path, sizeof path, "/dev/%s", d->devname);
		fd = open_node(path, &error);
		if (fd < 0 && error != ENOENT && error != ENXIO && error != ENODEV)
			return fail_open(error);
		if (fd < 0 && error == ENOENT && access("/proc/self/fd", F_OK) < 0)
			return fail("/proc is not mounted");
		if (fd < 0)
			continue;
		if (!identify(fd, d, kname, sizeof kname) && d->diskseq == wanted->diskseq && d->partition == wanted->partition)
			return fd;
		close(fd); /* another disk by now, or none */
	}
	return fail(wanted->partition ? "no partition has this name now" : "no disk has this number now");
}

/* Device-mapper names may hold what a path cannot; libdevmapper writes it as \\xNN. */
static void unescape(char *name)
{
	char *to = name;

	for (const char *from = name; *from; to++) {
		if (from[0] == '\\' && from[1] == 'x' && isxdigit((unsigned char)from[2]) && isxdigit((unsigned char)from[3])) {
			*to = (char)strtoul((const char[]){ from[2], from[3], '\0' }, NULL, 16);
			from += 4;
		} else {
			*to = *from++;
		}
	}
	*to = '\0';
}

/* MAJOR:MINOR, and nothing else. */
static bool parse_majmin(const char *text, unsigned *major, unsigned *minor)
{
	size_t a = strspn(text, "0123456789"), b = text[a] == ':' ? strspn(text + a + 1, "0123456789") : 0;

	if (!a || !b || a > 9 || b > 9 || text[a + 1 + b])
		return false;
	*major = (unsigned)strtoul(text, NULL, 10);
	*minor = (unsigned)strtoul(text + a + 1, NULL, 10);
	return true;
}

/* Whether the last component of a path is a name in /dev/mapper, however it is written. */
static bool is_in_mapper(const char *path)
{
	char directory[PATH_MAX], real[PATH_MAX];
	const char *slash = strrchr(path, '/');

	snprintf(directory, sizeof directory, "%.*s", (int)(slash - path), path);
	return slash[1] && realpath(slash == path ? "/" : directory, real) && !strcmp(real, "/dev/mapper") && strcmp(slash, "/control");
}

/* A link in /dev/mapper promises a device-mapper name. */
static int check_dm_name(const char *path, const char *kname)
{
	char attribute[PATH_MAX], name[256], wanted[NAME_MAX + 1];

	snprintf(attribute, sizeof attribute, CLASS "%s/dm/name", kname);
	if (!read_file(attribute, name, sizeof name))
		snprintf(name, sizeof name, "%s", kname);
	name[strcspn(name, "\n")] = '\0';
	snprintf(wanted, sizeof wanted, "%s", strrchr(path, '/') + 1);
	unescape(wanted);
	return strcmp(name, wanted) ? fail("it leads to %s", name) : 0;
}

/* Opens what the argument names, for reading, and says what it is; -1 after it has said why not. */
static int open_device(struct device *d)
{
	char path[PATH_MAX], directory[PATH_MAX], kname[NAME_MAX + 1];
	const char *wrong, *by_number = NULL, *by_kname = NULL;
	struct device wanted;
	unsigned major, minor;
	int error, fd;

	if (parse_name(argument, &wanted))
		return open_named(&wanted, d);
	if (!*argument)
		return fail("an empty argument names no device");
	if (strlen(argument) > PATH_MAX - sizeof CLASS - sizeof "/uevent")
		return fail_open(ENAMETOOLONG);
	snprintf(path, sizeof path, "%s", argument);
	snprintf(directory, sizeof directory, CLASS "%s", argument);
	if (strchr(argument, '/')) {
		/* a path */
	} else if (parse_majmin(argument, &major, &minor)) {
		by_number = argument;
		snprintf(directory, sizeof directory, "/sys/dev/block/%u:%u", major, minor);
		if (!read_device(directory, d))
			return fail("no block device has this number now");
		snprintf(path, sizeof path, "/dev/%s", d->devname);
	} else if (*argument != '.' && read_device(directory, d)) {
		by_kname = argument;
		snprintf(path, sizeof path, "/dev/%s", d->devname);
	} else {
		snprintf(path, sizeof path, "/dev/mapper/%s", argument);
	}
	fd = open_node(path, &error);
	if (fd < 0)
		return error == ENOTBLK ? fail("not a block device")
		     : error == ENOENT && path[0] != argument[0] ? fail("no such path, kernel name or device-mapper name")
								  : fail_open(error);
	wrong = identify(fd, d, kname, sizeof kname);
	if (!wrong && ((by_kname && strcmp(by_kname, kname)) || (by_number && (d->major != major || d->minor != minor))))
		wrong = "its node in /dev is another device's; the device changed, try again";
	if (wrong)
		fail("%s", wrong);
	if (!wrong && (!is_in_mapper(path) || !check_dm_name(path, kname)))
		return fd;
	close(fd);
	return -1;
}

static int resolve(int count, char **arguments)
{
	int status = 0;

	for (int i = 0; i < count; i++) {
		struct device d;
		int fd;

		argument = arguments[i];
		fd = open_device(&d);
		if (fd < 0) {
			status = 1;
			continue;
		}
		close(fd);
		printf(TREE "%llu", (unsigned long long)d.diskseq);
		if (d.partition)
			printf("p%u", d.partition);
		putchar('\n');
	}
	if (fflush(stdout) == EOF) {
		argument = "standard output";
		fail("%s", strerror(errno));
		return 1;
	}
	return status;
}

/* A copy of the argument with the path in place of each {}. */
static char *insert(const char *in, const char *path)
{
	char *out = calloc(1, strlen(in) / 2 * strlen(path) + strlen(in) + 1), *at = out;

	while (out && *in) {
		if (!strncmp(in, "{}", 2)) {
			at = stpcpy(at, path);
			in += 2;
		} else {
			*at++ = *in++;
		}
	}
	return out;
}

static int run(bool write, char **command)
{
	struct device d;
	char path[64];
	int held = open_device(&d), fd;

	if (held < 0)
		return EXIT_FAILED;
	/* It keeps its number, and what it is, as long as one descriptor of it is open. */
	snprintf(path, sizeof path, "/proc/self/fd/%d", held);
	fd = open(path, write ? O_RDWR : O_RDONLY);
	if (fd < 0)
		return fail_open(errno), EXIT_FAILED;
	close(held);
	snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
	for (char **a = command; *a; a++)
		if (!(*a = insert(*a, path)))
			return fprintf(stderr, "diskseq: out of memory\n"), EXIT_FAILED;
	execvp(command[0], command);
	int error = errno;

	argument = command[0];
	fail("%s", strerror(error));
	return error == ENOENT ? 127 : 126;
}

int main(int argc, char **argv)
{
	static const char usage[] = "usage: diskseq DEVICE...\n"
				    "       diskseq --open DEVICE [--write] -- COMMAND [ARGUMENT...]\n";
	/* A disk must not become what a program reads, or writes its messages to. */
	for (int fd = open("/dev/null", O_RDWR); fd >= 0; fd = open("/dev/null", O_RDWR)) {
		if (fd <= 2)
			continue;
		close(fd);
		break;
	}
	bool write = argc > 3 && !strcmp(argv[3], "--write");
	int dashes = write ? 4 : 3;

	if (argc == 2 && !strcmp(argv[1], "--help"))
		return fputs(usage, stdout), 0;
	if (argc > 1 && !strcmp(argv[1], "--open")) {
		if (argc < dashes + 2 || strcmp(argv[dashes], "--"))
			return fputs(usage, stderr), EXIT_FAILED;
		argument = argv[2];
		return run(write, argv + dashes + 1);
	}
	bool dashed = argc > 1 && !strcmp(argv[1], "--");

	if (argc < 2 + dashed || (!dashed && argv[1][0] == '-'))
		return fputs(usage, stderr), 2;
	return resolve(argc - 1 - dashed, argv + 1 + dashed);
}
