// SPDX-License-Identifier: MIT
#include "churn.h"

#include <linux/loop.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

struct device {
	int nr;
	/* Two files in turns. A detach may be put off to the last close. But
	 * once the device could be configured again, the file before the
	 * present one is free for sure and can get a new stamp. */
	int files[2];
	unsigned generation;
	enum { DETACHED, UNLINKED, LIVE, RETIRED } state;
	bool part;
	struct slot *slot; /* NULL: no opener knows of the disk */
	uint64_t diskseq, tag, until, retired;
};

/* How long udev may take to make a link. */
#define LINK_WITHIN_NS (5 * NS_PER_S)

/* Links whose disk is gone, to be removed a little too late. */
struct stale_link {
	uint64_t diskseq, due;
};
#define MAX_STALE 256

struct recycler {
	struct churn *c;
	struct recycler_shared *s;
	struct rnd rnd;
	struct device dev[MAX_DEVICES];
	uint64_t next_tag;
	struct stale_link stale[MAX_STALE];
	int stales;
	int next_slot;
};

static void slot_write(struct slot *s, const struct entry *e)
{
	uint32_t seq = atomic_load_explicit(&s->seq, memory_order_relaxed);

	atomic_store_explicit(&s->seq, seq + 1, memory_order_relaxed);
	atomic_thread_fence(memory_order_release);
	atomic_store_explicit(&s->nr, e->nr, memory_order_relaxed);
	atomic_store_explicit(&s->diskseq, e->diskseq, memory_order_relaxed);
	atomic_store_explicit(&s->tag, e->tag, memory_order_relaxed);
	atomic_store_explicit(&s->retired, e->retired, memory_order_relaxed);
	atomic_store_explicit(&s->seq, seq + 2, memory_order_release);
}

/* The slot unused for the longest time, but never a live one. */
static struct slot *free_slot(struct recycler *r)
{
	for (;;) {
		struct slot *s = &r->s->ring[r->next_slot++ % r->c->slots];

		if (!atomic_load(&s->diskseq) || atomic_load(&s->retired))
			return s;
	}
}

/* ---- links, as udev would make them ---- */

static void link_path(struct recycler *r, char *buf, size_t size, uint64_t seq, const char *suffix)
{
	snprintf(buf, size, "%s/%llu%s", r->c->dir, (unsigned long long)seq, suffix);
}

static void link_make(struct recycler *r, const struct device *d, const char *suffix)
{
	char path[PATH_MAX], tmp[PATH_MAX], target[64];

	link_path(r, path, sizeof path, d->diskseq, suffix);
	snprintf(tmp, sizeof tmp, "%s/.new-%d", r->c->dir, (int)getpid());
	snprintf(target, sizeof target, "/dev/loop%d%s", d->nr, suffix);
	if (symlink(target, tmp) < 0 || rename(tmp, path) < 0)
		die("%s: %s", path, strerror(errno));
}

static void link_remove(struct recycler *r, uint64_t seq)
{
	char path[PATH_MAX];

	link_path(r, path, sizeof path, seq, "p1");
	if (r->c->parts)
		unlink(path);
	link_path(r, path, sizeof path, seq, "");
	unlink(path);
}

static void links_expire(struct recycler *r, uint64_t now)
{
	for (int i = 0; i < r->stales;) {
		if (r->stale[i].due > now) {
			i++;
			continue;
		}
		link_remove(r, r->stale[i].diskseq);
		r->stale[i] = r->stale[--r->stales];
	}
}

static void link_expires(struct recycler *r, uint64_t seq)
{
	if (r->stales == MAX_STALE)
		links_expire(r, UINT64_MAX);
	r->stale[r->stales++] = (struct stale_link){
		seq, now_ns() + rnd_below(&r->rnd, 1000) * NS_PER_US,
	};
}

/* ---- the life of a disk ---- */

static void file_stamp(int file, uint64_t tag)
{
	const uint64_t at[] = { 0, PART_START };

	for (size_t i = 0; i < 2; i++) {
		struct stamp s = { STAMP_MAGIC, tag, at[i] };

		if (pwrite(file, &s, sizeof s, (off_t)at[i]) != sizeof s)
			die("write to a backing file: %s", strerror(errno));
	}
}

static int file_make(const struct churn *c)
{
	/* The file has no name, so there is nothing to remove, however this
	 * ends. It is in memory, so that no detach waits for a disk. */
	const char *dir = c->workdir ? c->workdir : "/dev/shm";
	int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	if (fd < 0)
		die("no backing file in %s: %s", dir, strerror(errno));
	if (ftruncate(fd, FILE_SIZE) < 0)
		die("ftruncate: %s", strerror(errno));
	if (c->image) {
		int image = open(c->image, O_RDONLY | O_CLOEXEC);
		char buf[65536];
		ssize_t n = 0;

		while (image >= 0 && (n = read(image, buf, sizeof buf)) > 0)
			if (write(fd, buf, (size_t)n) != n)
				die("write to a backing file: %s", strerror(errno));
		if (image < 0 || n < 0)
			die("%s: %s", c->image, strerror(errno));
		close(image);
	}
	return fd;
}

static void note_minor(struct recycler *r, const struct device *d)
{
	char path[64];
	struct stat st;

	snprintf(path, sizeof path, "/dev/loop%dp1", d->nr);
	if (stat(path, &st) < 0)
		return;
	unsigned m = minor(st.st_rdev) % 4096;
	int was = atomic_exchange(&r->c->minor_owner[m], d->nr + 1);
	if (was && was != d->nr + 1)
		r->s->minor_moves++;
}

/* Tells the openers of the disk. */
static void publish(struct recycler *r, struct device *d)
{
	d->slot = free_slot(r);
	slot_write(d->slot, &(struct entry){ d->nr, d->diskseq, d->tag, 0 });
	d->until = now_ns() + rnd_below(&r->rnd, (unsigned)r->c->live_us) * NS_PER_US;
	d->state = LIVE;
}

/* Whether udev's links lead to the disk, which stays as long as we let it. */
static bool linked(struct recycler *r, const struct device *d)
{
	for (int part = 0; part <= d->part; part++) {
		char path[PATH_MAX], node[64];
		struct stat link, own;

		link_path(r, path, sizeof path, d->diskseq, part ? "-part1" : "");
		snprintf(node, sizeof node, "/dev/loop%d%s", d->nr, part ? "p1" : "");
		if (stat(path, &link) < 0 || stat(node, &own) < 0 || link.st_rdev != own.st_rdev)
			return false;
	}
	return true;
}

/* Returns false if an opener of the previous disk still holds the device; try again later. */
static bool attach(struct recycler *r, struct device *d)
{
	struct churn *c = r->c;
	int fd = loop_open(d->nr, O_RDWR);

	if (fd < 0) {
		/* A close() of another process is just detaching it. */
		if (fd != -ENXIO && fd != -EBUSY && fd != -EINTR)
			errs_add(&r->s->errors, -fd);
		r->s->busy++;
		return false;
	}

	d->tag = mix64(r->next_tag);
	int file = d->files[d->generation & 1];
	if (!c->image)
		file_stamp(file, d->tag);
	if (c->way->mark)
		c->way->mark(file, d->tag);
	/* LO_FLAGS_PARTSCAN: without it a partition survives a detach that
	 * happens before it is deleted, and shows up on the next disk. */
	int err = loop_configure(fd, file, c->parts ? LO_FLAGS_PARTSCAN : 0);
	if (err) {
		if (err != -EBUSY && err != -EINTR)
			errs_add(&r->s->errors, -err);
		r->s->busy++;
		close(fd);
		return false;
	}
	r->next_tag++;
	r->s->configures++;
	if (d->generation++ > 0) {
		r->s->recycles++;
		hist_add(&r->s->reuse, now_ns() - d->retired);
	}
	/* The device is ours until LOOP_CLR_FD, so this number is this disk's. */
	err = blk_diskseq(fd, &d->diskseq);
	if (err)
		die("BLKGETDISKSEQ: %s", strerror(-err));
	if (c->links)
		link_make(r, d, "");
	d->part = false;
	if (c->parts) {
		err = blk_part_add(fd, 1, PART_START, PART_SIZE);
		if (err) {
			errs_add(&r->s->errors, -err);
		} else {
			d->part = true;
			note_minor(r, d);
			if (c->links)
				link_make(r, d, "p1");
		}
	}
	if (c->udev) {
		d->slot = NULL;
		d->until = now_ns() + LINK_WITHIN_NS;
		d->state = UNLINKED;
	} else {
		publish(r, d);
	}
	close(fd);
	return true;
}

static void retire(struct device *d)
{
	/* Names of disks that are gone stay in the table, and are opened
	 * too. It does not matter whether a reader sees this a moment later,
	 * so a single word does not need the seqlock. */
	d->retired = now_ns();
	if (d->slot && atomic_load(&d->slot->diskseq) == d->diskseq)
		atomic_store(&d->slot->retired, d->retired);
	d->state = RETIRED;
}

/* Returns false if the partition is open; try again later. */
static bool detach(struct recycler *r, struct device *d)
{
	int err, fd = loop_open(d->nr, O_RDWR);

	if (fd < 0) {
		if (fd != -EINTR)
			errs_add(&r->s->errors, -fd);
		return false;
	}
	if (d->part) {
		err = blk_part_del(fd, 1);
		if (err) {
			if (err != -EBUSY)
				errs_add(&r->s->errors, -err);
			r->s->busy++;
			close(fd);
			return false;
		}
		d->part = false;
	}
	/* Others may have the disk open. The kernel then detaches it at the
	 * last close, and until then it stays the same disk. */
	err = loop_clr_fd(fd);
	if (err)
		errs_add(&r->s->errors, -err);
	close(fd);
	if (err)
		return false;
	d->state = DETACHED;
	if (r->c->links)
		link_expires(r, d->diskseq);
	return true;
}

/* Returns whether anything happened. */
static bool step(struct recycler *r, struct device *d)
{
	bool did = false;

	if (d->state == UNLINKED && linked(r, d)) {
		publish(r, d);
		did = true;
	}
	if ((d->state == LIVE || d->state == UNLINKED) && now_ns() >= d->until) {
		r->s->unlinked += d->state == UNLINKED;
		retire(d);
		did = true;
	}
	if (d->state == RETIRED)
		did |= detach(r, d);
	/* At once: an opener on its way to the old disk should meet the new
	 * one under the same number. */
	if (d->state == DETACHED)
		did |= attach(r, d);
	return did;
}

_Noreturn void churn_recycler(struct churn *c, int id)
{
	static struct recycler rec;
	struct recycler *r = &rec;

	r->c = c;
	r->s = &c->rec[id];
	rnd_seed(&r->rnd, (uint64_t)id);
	/* The upper bits and counting make it distinct for each disk of the
	 * run; mix64() keeps it so. A stamp of another run does not match. */
	r->next_tag = (uint64_t)id << 56 | (rnd_next(&r->rnd) >> 32) << 24;
	for (int i = 0; i < c->devices; i++) {
		r->dev[i].nr = c->nrs[id * c->devices + i];
		r->dev[i].files[0] = file_make(c);
		r->dev[i].files[1] = file_make(c);
	}

	while (!churn_stopped(c)) {
		/* Begins with another device each time, so that freed
		 * partition minors go to other devices than they came from. */
		unsigned first = rnd_below(&r->rnd, (unsigned)c->devices);
		bool did = false;

		for (int i = 0; i < c->devices && !churn_stopped(c); i++)
			did |= step(r, &r->dev[(first + (unsigned)i) % (unsigned)c->devices]);
		links_expire(r, now_ns());
		if (!did)
			sleep_us(c->udev ? 1000 : 50); /* udev wants to run, too */
	}

	links_expire(r, UINT64_MAX);
	for (int i = 0; i < c->devices; i++) {
		if (c->links && r->dev[i].state != DETACHED)
			link_remove(r, r->dev[i].diskseq);
		loop_destroy(r->dev[i].nr, 3 * NS_PER_S);
	}
	_exit(0);
}
