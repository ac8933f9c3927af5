/* open(2) as io_uring does it: by a call that says nothing of opening. */
#include "blk.h"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>

static void *map(int ring, size_t size, off_t what)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, what);

	if (p == MAP_FAILED)
		die("uring: mmap: %s", strerror(errno));
	return p;
}

/* --worker: by a thread of the kernel's, not by the caller. */
int cmd_uring_open(int argc, char **argv)
{
	struct io_uring_params p = { 0 };
	const char *path = NULL;
	bool worker = false;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ "worker", OPT_FLAG, &worker, false },
		{ 0 },
	});
	int ring = (int)syscall(SYS_io_uring_setup, 1, &p);
	if (ring < 0)
		die("io_uring_setup: %s", strerror(errno));
	char *sq = map(ring, p.sq_off.array + p.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
	char *cq = map(ring, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	struct io_uring_sqe *sqe = map(ring, p.sq_entries * sizeof *sqe, IORING_OFF_SQES);

	*sqe = (struct io_uring_sqe){
		.opcode = IORING_OP_OPENAT,
		.flags = worker ? IOSQE_ASYNC : 0,
		.fd = AT_FDCWD,
		.addr = (uint64_t)(uintptr_t)path,
		.open_flags = O_RDONLY,
	};
	*(unsigned *)(sq + p.sq_off.array) = 0;
	__atomic_store_n((unsigned *)(sq + p.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
		die("io_uring_enter: %s", strerror(errno));
	if (__atomic_load_n((unsigned *)(cq + p.cq_off.tail), __ATOMIC_ACQUIRE) != 1)
		die("uring: no completion");
	int fd = ((struct io_uring_cqe *)(cq + p.cq_off.cqes))->res;
	uint64_t seq = 0;
	if (fd >= 0 && blk_diskseq(fd, &seq) < 0)
		die("uring: not a disk");
	printf("{\"error\":%d,\"diskseq\":%llu}\n", fd < 0 ? -fd : 0, (unsigned long long)seq);
	return exit_status();
}
