// SPDX-License-Identifier: MIT
/* How soon after its last close a disk is free for a call that needs it
 * alone. A filesystem that kept what it opened for its clients would show
 * here. */
#include "blk.h"

#define RETRY_US 200
#define ALLOWED_NS (20 * NS_PER_MS)

/* A late round in which the machine stood still for so long says nothing
 * about the filesystem, and is run again. */
#define STALL_NS (5 * NS_PER_MS)

static _Atomic uint64_t stall_ns;

void excl_init(void)
{
	watch_for_stalls(&stall_ns);
}

bool excl_more(const struct excl *x, int count)
{
	return x->rounds < (uint64_t)count && x->disturbed < (uint64_t)count && !stop_signal;
}
#define BOUND_NS NS_PER_S

bool excl_use(struct excl *x, const char *path)
{
	char buf[4096];
	uint64_t waited;
	int fd = open_appearing(path, O_RDONLY, &waited);
	ssize_t r;

	x->rounds++;
	if (fd < 0) {
		errs_add(&x->errors, -fd);
		x->failed++;
		return false;
	}
	if (waited > x->max_appear_ns)
		x->max_appear_ns = waited;
	r = pread(fd, buf, sizeof buf, 0);
	if (r != (ssize_t)sizeof buf) {
		errs_add(&x->errors, r < 0 ? errno : ERR_SHORT);
		x->failed++;
	}
	close(fd);
	return r == (ssize_t)sizeof buf;
}

/* asked: when the last attempt began, and so when the disk was free at the
 * latest. The attempt itself may take long for other reasons. */
static int retry(int (*take)(void), uint64_t within_ns, uint64_t *asked, bool *first)
{
	uint64_t start = now_ns();
	int err;

	*first = true;
	for (;;) {
		*asked = now_ns();
		err = take();
		if (err != -EBUSY || *asked - start > within_ns)
			return err;
		*first = false;
		sleep_us(RETRY_US);
	}
}

int excl_retry(int (*take)(void), uint64_t within_ns)
{
	uint64_t asked;
	bool first;

	return retry(take, within_ns, &asked, &first);
}

int excl_try(struct excl *x, int (*take)(void), bool used)
{
	uint64_t closed = now_ns(), asked, done;
	bool first;
	int err;

	atomic_store(&stall_ns, 0);
	err = retry(take, BOUND_NS, &asked, &first);
	done = now_ns();
	if (err) {
		errs_add(&x->errors, -err);
		x->failed += used;
		return err;
	}
	if (used && asked - closed > ALLOWED_NS && atomic_load(&stall_ns) > STALL_NS) {
		x->rounds--;
		x->disturbed++;
	} else if (used) {
		hist_add(&x->free, asked - closed);
		hist_add(&x->done, done - closed);
		x->within_20ms += asked - closed <= ALLOWED_NS;
		x->first_try += first;
	}
	return 0;
}

#define US(ns) ((double)(ns) / 1e3)

void excl_print(const struct excl *x, const char *extra)
{
	printf("{\"n\":%llu,\"within_20ms\":%llu,\"first_try\":%llu,\"failed\":%llu,\"disturbed\":%llu,",
	       (unsigned long long)x->rounds, (unsigned long long)x->within_20ms,
	       (unsigned long long)x->first_try, (unsigned long long)x->failed,
	       (unsigned long long)x->disturbed);
	printf("\"max_us\":%.1f,\"p50_us\":%.1f,\"p99_us\":%.1f,", US(x->free.max), US(hist_pct(&x->free, 50)),
	       US(hist_pct(&x->free, 99)));
	printf("\"max_done_us\":%.1f,\"p50_done_us\":%.1f,\"p99_done_us\":%.1f,", US(x->done.max),
	       US(hist_pct(&x->done, 50)), US(hist_pct(&x->done, 99)));
	printf("\"max_appear_us\":%.1f,", US(x->max_appear_ns));
	errs_print("errors", &x->errors);
	printf("%s}\n", extra);
}
