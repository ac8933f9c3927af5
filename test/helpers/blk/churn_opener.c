// SPDX-License-Identifier: MIT
#include "churn.h"

#include <sched.h>

static bool slot_read(struct slot *s, struct entry *e)
{
	uint32_t seq = atomic_load_explicit(&s->seq, memory_order_acquire);

	if (seq & 1)
		return false;
	e->nr = atomic_load_explicit(&s->nr, memory_order_relaxed);
	e->diskseq = atomic_load_explicit(&s->diskseq, memory_order_relaxed);
	e->tag = atomic_load_explicit(&s->tag, memory_order_relaxed);
	e->retired = atomic_load_explicit(&s->retired, memory_order_relaxed);
	atomic_thread_fence(memory_order_acquire);
	return atomic_load_explicit(&s->seq, memory_order_relaxed) == seq && e->diskseq;
}

/* Mostly picks a live disk. A retired one is tried for a short time only: if
 * it were opened all the time, its detach would be put off for ever. */
static bool pick(struct churn *c, struct rnd *rnd, struct entry *e)
{
	bool stale = (int)rnd_below(rnd, 100) < c->stale_pct;
	uint64_t now = now_ns();
	unsigned total = (unsigned)(c->recyclers * c->slots);
	unsigned first = rnd_below(rnd, total);

	for (unsigned i = 0; i < total; i++) {
		unsigned at = (first + i) % total;
		struct slot *s = &c->rec[at / (unsigned)c->slots].ring[at % (unsigned)c->slots];

		if (!slot_read(s, e) || !e->retired == stale)
			continue;
		if (!e->retired || now < e->retired + (uint64_t)c->stale_ms * NS_PER_MS)
			return true;
	}
	return false;
}

static int pick_flags(struct rnd *rnd)
{
	switch (rnd_below(rnd, 10)) {
	case 0:
		return O_RDWR | O_NONBLOCK | O_CLOEXEC;
	case 1:
		return O_RDONLY | O_DIRECT | O_CLOEXEC;
	default:
		return O_RDONLY | O_CLOEXEC;
	}
}

static void wrong(struct opener_shared *s, uint64_t asked, uint64_t got, bool part)
{
	s->wrong_part += part;
	if (!s->first_asked) {
		s->first_asked = asked;
		s->first_got = got;
	}
}

static void verify(struct opener_shared *s, int fd, const struct entry *e, bool part)
{
	static _Alignas(4096) char buf[SECTOR]; /* aligned for O_DIRECT */
	struct stamp *st = (struct stamp *)buf;
	uint64_t seq = 0;
	int err = blk_diskseq(fd, &seq);

	if (err) {
		errs_add(&s->read_errors, -err);
		return;
	}
	/* The page cache cannot hold another disk's data: the kernel drops
	 * it at the last close and at the detach. */
	ssize_t r = pread(fd, buf, SECTOR, 0);
	err = r < 0 ? errno : ERR_SHORT;
	bool stamped = r == SECTOR && !memcmp(st->magic, STAMP_MAGIC, sizeof st->magic);

	if (seq != e->diskseq) {
		s->wrong_diskseq++;
		if (stamped && st->tag != e->tag)
			s->read_other_disk++;
		wrong(s, e->diskseq, seq, part);
		return;
	}
	if (r != SECTOR) {
		errs_add(&s->read_errors, err);
		return;
	}
	if (!stamped || st->tag != e->tag || st->where != (part ? PART_START : 0)) {
		s->wrong_data++;
		wrong(s, e->diskseq, seq, part);
		return;
	}
	s->ok++;
	s->ok_part += part;
	s->ok_stale += e->retired != 0;
}

/* Checks that what is mounted, or used for swap, stays the same disk. */
static void verify_reached(struct opener_shared *s, const struct churn_way *way, const char *path, const struct entry *e)
{
	uint64_t seq = 0;
	int err = way->reached(path, e, &seq);

	if (err) {
		errs_add(&s->read_errors, -err);
	} else if (seq != e->diskseq) {
		s->wrong_diskseq++;
		wrong(s, e->diskseq, seq, false);
	} else {
		s->ok++;
		s->ok_stale += e->retired != 0;
	}
}

_Noreturn void churn_opener(struct churn *c, int id)
{
	struct opener_shared *s = &c->op[id];
	struct rnd rnd;

	rnd_seed(&rnd, 1000 + (uint64_t)id);
	/* Every second opener runs only when no other process wants to, and
	 * so is preempted for long in the middle of an open. */
	s->idle = id % 2;
	if (s->idle && sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){ 0 }) < 0)
		die("SCHED_IDLE: %s", strerror(errno));
	if (c->way->begin)
		c->way->begin(c);

	while (!churn_stopped(c)) {
		char path[PATH_MAX];
		struct entry e;

		if (!pick(c, &rnd, &e)) {
			sleep_us(50);
			continue;
		}
		bool part = c->parts && rnd_below(&rnd, 3) > 0;
		if (c->kernel_names)
			snprintf(path, sizeof path, "%s/.dm/%llu/loop%d%s", c->dir, (unsigned long long)e.diskseq, e.nr, part ? "p1" : "");
		else
			snprintf(path, sizeof path, "%s/%llu%s", c->dir, (unsigned long long)e.diskseq,
				 !part ? "" : c->udev ? "-part1" : "p1");

		int flags = pick_flags(&rnd);
		uint64_t t = now_ns();
		int fd = c->way->open(c, path, flags);
		int err = -fd;
		uint64_t took = now_ns() - t;

		if (fd < 0 && err == EINTR && churn_stopped(c))
			break;
		s->opens++;
		if (fd < 0) {
			errs_add(&s->errors, err);
			if (took > s->max_failed_ns)
				s->max_failed_ns = took;
			continue;
		}
		hist_add(&s->hist, took);
		if (c->way->reached) {
			verify_reached(s, c->way, path, &e);
			continue;
		}
		verify(s, fd, &e, part);
		close(fd);
	}
	_exit(0);
}
