// SPDX-License-Identifier: MIT
/* A user without rights whose execve(2) does not end: a file that it closes
 * belongs to a filesystem of the user's own, which does not answer FLUSH.
 * Meanwhile the kernel lets no process look at the program. */
#include "blk.h"

#include <linux/fuse.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define PROGRAMS 8
#define BUFFER (1 << 17)
#define VALID_S 3600

static _Atomic int *flushes;

static void reply(int dev, const struct fuse_in_header *in, int err, const void *body, size_t size)
{
	char buf[512];
	struct fuse_out_header out = { .len = (uint32_t)(sizeof out + size), .error = -err, .unique = in->unique };

	memcpy(buf, &out, sizeof out);
	memcpy(buf + sizeof out, body, size);
	if (write(dev, buf, out.len) < 0 && errno == ENODEV)
		_exit(0);
}

static void answer(int dev, const struct fuse_in_header *in)
{
	bool root = in->nodeid == 1;
	struct fuse_attr attr = { .ino = root ? 1 : 2, .mode = root ? S_IFDIR | 0755 : S_IFREG | 0666, .nlink = 1 };

	switch (in->opcode) {
	case FUSE_INIT:
		return reply(dev, in, 0, &(struct fuse_init_out){ .major = 7, .minor = 31, .max_write = 4096, .time_gran = 1 },
			     sizeof(struct fuse_init_out));
	case FUSE_LOOKUP:
		attr.ino = 2;
		attr.mode = S_IFREG | 0666;
		return reply(dev, in, 0, &(struct fuse_entry_out){ .nodeid = 2, .attr = attr, .attr_valid = VALID_S, .entry_valid = VALID_S },
			     sizeof(struct fuse_entry_out));
	case FUSE_GETATTR:
		return reply(dev, in, 0, &(struct fuse_attr_out){ .attr = attr, .attr_valid = VALID_S }, sizeof(struct fuse_attr_out));
	case FUSE_OPEN:
		return reply(dev, in, 0, &(struct fuse_open_out){ .fh = 1 }, sizeof(struct fuse_open_out));
	case FUSE_FLUSH:
		(*flushes)++;
		return;
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		return;
	default:
		return reply(dev, in, ENOSYS, NULL, 0);
	}
}

static void serve(int dev)
{
	static _Alignas(8) char request[BUFFER];

	for (;;) {
		ssize_t n = read(dev, request, sizeof request);

		if (n >= (ssize_t)sizeof(struct fuse_in_header))
			answer(dev, (const void *)request);
		else if (errno != EINTR && errno != ENOENT)
			_exit(0);
	}
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die("%s: %s", path, strerror(errno));
	close(fd);
}

static int mount_own(const char *fuse, const char *dir, int uid)
{
	char text[128];

	prctl(PR_SET_DUMPABLE, 1);
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
		die("unshare: %s", strerror(errno));
	put("/proc/self/setgroups", "deny");
	snprintf(text, sizeof text, "0 %d 1", uid);
	put("/proc/self/uid_map", text);
	put("/proc/self/gid_map", text);
	int dev = open(fuse, O_RDWR | O_CLOEXEC);
	if (dev < 0)
		die("%s: %s", fuse, strerror(errno));
	snprintf(text, sizeof text, "fd=%d,rootmode=40000,user_id=0,group_id=0", dev);
	if (mount("own", dir, "fuse", MS_NOSUID | MS_NODEV, text) < 0)
		die("mount at %s: %s", dir, strerror(errno));
	return dev;
}

static void run(const char *path, const char *file)
{
	char *const argv[] = { "true", NULL };
	int own = open(file, O_RDONLY | O_CLOEXEC), fd;

	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (own < 0 || fd < 0)
		_exit(1);
	close(fd);
	execv("/bin/true", argv);
	_exit(1);
}

/* --fuse: a node that any user may open; --dir: an empty directory of the
 * user's. "ready" says that all programs hang; they do until stdin ends. */
int cmd_hung_exec(int argc, char **argv)
{
	const char *path = NULL, *fuse = NULL, *dir = NULL;
	char file[PATH_MAX];
	pid_t pids[PROGRAMS + 1];
	int uid = 0, n = 0, hung = 0;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "fuse", OPT_STR, &fuse, true },
		{ "dir", OPT_STR, &dir, true },
		{ "uid", OPT_INT, &uid, true },
		{ 0 },
	});
	flushes = mmap(NULL, sizeof *flushes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (flushes == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	snprintf(file, sizeof file, "%s/file", dir);
	become(uid);
	int dev = mount_own(fuse, dir, uid);
	pid_t parent = getpid();
	pids[n] = fork();
	if (pids[n++] == 0) {
		child_follows(parent, SIGKILL);
		serve(dev);
	}
	close(dev);
	for (int i = 0; i < PROGRAMS; i++) {
		pids[n] = fork();
		if (pids[n++] == 0) {
			child_follows(parent, SIGKILL);
			run(path, file);
		}
	}
	for (int i = 0; i < 5000 && (hung = *flushes) < PROGRAMS && !stop_signal; i++)
		sleep_us(1000);
	printf("ready %d\n", hung);
	fflush(stdout);
	wait_for_end();
	/* When the server ends, all of them go on. */
	for (int i = 0; i < n; i++)
		kill(pids[i], SIGKILL);
	for (int i = 0; i < n; i++)
		waitpid(pids[i], NULL, 0);
	printf("{\"hung\":%d}\n", hung);
	return exit_status();
}
