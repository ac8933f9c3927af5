// SPDX-License-Identifier: MIT
/*
 * A disk that hangs: a filesystem of one file, `disk`, to put a loop device on.
 * A process that asks the loop device for its status makes the kernel ask for
 * the attributes of that file, and waits for as long as this program likes.
 *
 * SIGUSR1: take requests, answer none. SIGUSR2: answer again, first the
 * requests that wait. The end of stdin, or SIGTERM: give up the filesystem even
 * if it is in use; requests that wait fail then.
 */
#include "blk.h"

#include <linux/fuse.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/stat.h>

#define FILE_NAME "disk"
#define FILE_ID 2
#define FILE_BYTES (1 << 20)
#define MAX_READ (1 << 17)
#define BUFFER (MAX_READ + 8192)

static volatile sig_atomic_t hung;

static void on_usr(int sig)
{
	hung = sig == SIGUSR1;
}

/* Requests taken while the filesystem hangs. */
struct parked {
	struct parked *next;
	char request[];
};
static struct parked *first, **last = &first;

static int dev;

static void reply(const struct fuse_in_header *in, int err, const void *data, size_t size)
{
	static char out[sizeof(struct fuse_out_header) + MAX_READ];
	struct fuse_out_header *h = (void *)out;

	h->len = (uint32_t)(sizeof *h + size);
	h->error = -err;
	h->unique = in->unique;
	if (size)
		memcpy(out + sizeof *h, data, size);
	/* ENOENT: the caller has gone. */
	if (write(dev, out, h->len) < 0 && errno != ENOENT && errno != ENODEV)
		die("hungfs: answer to %u: %s", in->opcode, strerror(errno));
}

static void attr(struct fuse_attr *a, uint64_t id)
{
	*a = (struct fuse_attr){
		.ino = id,
		.size = id == FILE_ID ? FILE_BYTES : 0,
		.mode = id == FILE_ID ? S_IFREG | 0600 : S_IFDIR | 0700,
		.nlink = 1,
		.blksize = 4096,
	};
}

static void answer(const char *request)
{
	static const char zeros[MAX_READ];
	const struct fuse_in_header *in = (const void *)request;
	const void *body = in + 1;

	switch (in->opcode) {
	case FUSE_INIT: {
		struct fuse_init_out out = {
			.major = FUSE_KERNEL_VERSION,
			.minor = FUSE_KERNEL_MINOR_VERSION,
			.max_write = MAX_READ,
			.max_background = 16,
			.congestion_threshold = 12,
			.time_gran = 1,
		};
		return reply(in, 0, &out, sizeof out);
	}
	case FUSE_LOOKUP: {
		/* Valid for 0 seconds, so each look at it comes here. */
		struct fuse_entry_out out = { .nodeid = FILE_ID };

		if (strcmp(body, FILE_NAME))
			return reply(in, ENOENT, NULL, 0);
		attr(&out.attr, FILE_ID);
		return reply(in, 0, &out, sizeof out);
	}
	case FUSE_GETATTR:
	case FUSE_SETATTR: {
		struct fuse_attr_out out = { 0 };

		attr(&out.attr, in->nodeid);
		return reply(in, 0, &out, sizeof out);
	}
	case FUSE_OPEN: {
		struct fuse_open_out out = { 0 };

		return reply(in, 0, &out, sizeof out);
	}
	case FUSE_READ: {
		const struct fuse_read_in *r = body;
		uint64_t rest = r->offset < FILE_BYTES ? FILE_BYTES - r->offset : 0;

		return reply(in, 0, zeros, r->size < rest ? r->size : rest);
	}
	case FUSE_WRITE: {
		struct fuse_write_out out = { .size = ((const struct fuse_write_in *)body)->size };

		return reply(in, 0, &out, sizeof out);
	}
	case FUSE_FORGET:
	case FUSE_BATCH_FORGET:
	case FUSE_INTERRUPT:
		return;
	case FUSE_FLUSH:
	case FUSE_RELEASE:
	case FUSE_FSYNC:
	case FUSE_DESTROY:
		return reply(in, 0, NULL, 0);
	default:
		return reply(in, ENOSYS, NULL, 0);
	}
}

static void take(const char *request, size_t size)
{
	struct parked *p;

	if (!hung)
		return answer(request);
	p = malloc(sizeof *p + size);
	if (!p)
		die("hungfs: out of memory");
	p->next = NULL;
	memcpy(p->request, request, size);
	*last = p;
	last = &p->next;
}

static void answer_parked(void)
{
	while (first && !hung) {
		struct parked *p = first;

		first = p->next;
		if (!first)
			last = &first;
		answer(p->request);
		free(p);
	}
}

static void serve(void)
{
	static _Alignas(8) char request[BUFFER];

	while (!stop_signal) {
		struct pollfd p[] = { { .fd = 0, .events = POLLIN }, { .fd = dev, .events = POLLIN } };

		answer_parked();
		if (poll(p, 2, 20) <= 0)
			continue;
		if (p[0].revents)
			return; /* nothing is ever written to it */
		ssize_t n = read(dev, request, sizeof request);
		if (n >= (ssize_t)sizeof(struct fuse_in_header))
			take(request, (size_t)n);
		else if (n < 0 && errno == ENODEV)
			return; /* unmounted */
	}
}

int cmd_hungfs(int argc, char **argv)
{
	struct sigaction sa = { .sa_handler = on_usr };
	char data[128];

	if (argc != 2)
		die("usage: blk hungfs MOUNTPOINT");
	sigaction(SIGUSR1, &sa, NULL);
	sigaction(SIGUSR2, &sa, NULL);
	dev = open("/dev/fuse", O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (dev < 0)
		die("/dev/fuse: %s", strerror(errno));
	snprintf(data, sizeof data, "fd=%d,rootmode=40000,user_id=0,group_id=0,max_read=%d", dev, MAX_READ);
	if (mount("hungfs", argv[1], "fuse.hungfs", MS_NOSUID | MS_NODEV, data) < 0)
		die("mount at %s: %s", argv[1], strerror(errno));
	printf("ready\n");
	fflush(stdout);
	serve();
	umount2(argv[1], MNT_FORCE); /* fails, as it is in use, but ends all that waits */
	close(dev);
	umount2(argv[1], MNT_DETACH);
	printf("{\"hungfs\":\"ended\"}\n");
	return exit_status();
}
