// SPDX-License-Identifier: MIT
/* open(2) by io_uring: the system call does not show that it opens. */
#include "blk.h"

#include <linux/io_uring.h>
#include <linux/time_types.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define ENTRIES 2 /* and so many workers, at most */

static void *map(int ring, size_t size, off_t what)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, what);

	if (p == MAP_FAILED)
		die("uring: mmap: %s", strerror(errno));
	return p;
}

void uring_start(struct uring *r)
{
	struct io_uring_params p = { 0 };

	r->fd = (int)syscall(SYS_io_uring_setup, ENTRIES, &p);
	if (r->fd < 0)
		die("io_uring_setup: %s", strerror(errno));
	char *sq = map(r->fd, p.sq_off.array + p.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
	char *cq = map(r->fd, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	r->sqe = map(r->fd, p.sq_entries * sizeof *r->sqe, IORING_OFF_SQES);
	r->sq_tail = (unsigned *)(sq + p.sq_off.tail);
	r->cq_head = (unsigned *)(cq + p.cq_off.head);
	r->cq_tail = (unsigned *)(cq + p.cq_off.tail);
	r->cqes = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
	r->cq_mask = p.cq_entries - 1;
	for (unsigned i = 0; i < ENTRIES; i++)
		((unsigned *)(sq + p.sq_off.array))[i] = i;
}

static void push(struct uring *r, const char *path, int flags, int personality, bool worker)
{
	r->sqe[*r->sq_tail % ENTRIES] = (struct io_uring_sqe){
		.opcode = IORING_OP_OPENAT,
		.flags = worker ? IOSQE_ASYNC : 0,
		.fd = AT_FDCWD,
		.addr = (uint64_t)(uintptr_t)path,
		.open_flags = (unsigned)flags,
		.personality = (uint16_t)personality,
	};
	__atomic_store_n(r->sq_tail, *r->sq_tail + 1, __ATOMIC_RELEASE);
}

/* Waits for the request, after "submit" of them were added just now. Returns the
 * descriptor, or an error. */
static int pop(struct uring *r, unsigned submit)
{
	while (submit || __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE) == *r->cq_head) {
		long n = syscall(SYS_io_uring_enter, r->fd, submit, 1, IORING_ENTER_GETEVENTS, NULL, 0);

		if (n < 0 && errno != EINTR)
			die("io_uring_enter: %s", strerror(errno));
		if (n > 0)
			submit = 0;
		if (stop_signal)
			return -EINTR;
	}
	int res = r->cqes[*r->cq_head & r->cq_mask].res;
	__atomic_store_n(r->cq_head, *r->cq_head + 1, __ATOMIC_RELEASE);
	return res;
}

int uring_open(struct uring *r, const char *path, int flags, int personality, bool worker)
{
	push(r, path, flags, personality, worker);
	return pop(r, 1);
}

/* The kernel makes a worker at the end of the call that its program is in when the
 * worker is needed. The worker shows the registers of that call. Here that is mostly
 * stat(2): a worker is made for the open that comes after a while, and does the opens
 * that follow, too. */
void uring_start_in_stat(struct uring *r)
{
	struct __kernel_timespec after = { .tv_nsec = 20000000 };
	struct stat st;

	uring_start(r);
	r->sqe[*r->sq_tail % ENTRIES] = (struct io_uring_sqe){
		.opcode = IORING_OP_TIMEOUT,
		.flags = IOSQE_IO_HARDLINK,
		.addr = (uint64_t)(uintptr_t)&after,
		.len = 1,
	};
	__atomic_store_n(r->sq_tail, *r->sq_tail + 1, __ATOMIC_RELEASE);
	push(r, "/dev/null", O_RDONLY, 0, true);
	if (syscall(SYS_io_uring_enter, r->fd, 2, 0, 0, NULL, 0) != 2)
		die("io_uring_enter: %s", strerror(errno));
	while (__atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE) != *r->cq_head + 2 && !stop_signal)
		fstatat(AT_FDCWD, "/", &st, 0);
	pop(r, 0);
	close(pop(r, 0));
}

/* --worker: by a kernel thread, not by the caller. */
int cmd_uring_open(int argc, char **argv)
{
	const char *path = NULL;
	bool worker = false;
	struct uring ring;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "worker", OPT_FLAG, &worker, false },
		{ 0 },
	});
	uring_start(&ring);
	int fd = uring_open(&ring, path, O_RDONLY, 0, worker);
	uint64_t seq = 0;
	if (fd >= 0 && blk_diskseq(fd, &seq) < 0)
		die("uring: not a disk");
	printf("{\"error\":%d,\"diskseq\":%llu}\n", fd < 0 ? -fd : 0, (unsigned long long)seq);
	return exit_status();
}
