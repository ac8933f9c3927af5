// SPDX-License-Identifier: MIT
/*
 * dm-race: device-mapper devices are made and removed, under names and with
 * numbers that are used again and again, while others open them by name.
 *
 * Each name has a sector of its own on one backing disk, and a device of that
 * name maps that sector. So the data that a victim reads shows the name of the
 * device that it got. The kernel shows it too, if asked for the name of the
 * open device.
 */
#include "blk.h"

#include <linux/dm-ioctl.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

#define MAX_NAMES 64
#define MAX_PROCESSES 16
#define MAX_MINORS 256
#define SECTOR 512
#define SECTORS 8 /* of a device */
#define FIRST_LOOP 90
#define WAIT_NS (10 * NS_PER_S)
#define PREFIX "race-"

struct victim_shared {
	uint64_t opens, ok, wrong_name, wrong_data;
	uint64_t bare; /* of the right ones: by a link to the device node */
	struct errs errors, read_errors;
	char first[200]; /* the first wrong one */
};

struct creator_shared {
	uint64_t created, removed, busy;
	struct errs errors;
};

struct race {
	const char *dir;
	int creators, victims, names, live_ms;
	int loop;
	_Atomic bool stop;
	char msg[512];
	_Atomic enum { FREE, TAKEN, LIVE } state[MAX_NAMES];
	_Atomic uint64_t wrong_lives[MAX_NAMES]; /* the last life that was opened wrongly */
	_Atomic uint64_t lives[MAX_NAMES];
	_Atomic uint64_t names_wrong;
	_Atomic int minor_name[MAX_MINORS]; /* + 1 */
	_Atomic uint64_t moves;
	struct victim_shared victim[MAX_PROCESSES];
	struct creator_shared creator[MAX_PROCESSES];
};

static bool stopped(struct race *r)
{
	return stop_signal || atomic_load_explicit(&r->stop, memory_order_relaxed);
}

/* ---- device-mapper ---- */

static int control = -1;

struct request {
	struct dm_ioctl io;
	struct dm_target_spec target;
	char parameters[64];
};

static int dm(unsigned long call, struct request *q)
{
	q->io.version[0] = DM_VERSION_MAJOR;
	q->io.data_size = sizeof *q;
	q->io.data_start = offsetof(struct request, target);
	return ioctl(control, call, q) < 0 ? -errno : 0;
}

static int dm_named(unsigned long call, int name)
{
	struct request q = { 0 };

	snprintf(q.io.name, sizeof q.io.name, PREFIX "%d", name);
	return dm(call, &q);
}

/* Does not wait for udev. */
static int dm_create(struct race *r, int name)
{
	struct request q = { 0 };
	int err;

	snprintf(q.io.name, sizeof q.io.name, PREFIX "%d", name);
	err = dm(DM_DEV_CREATE, &q);
	if (err)
		return err;
	q = (struct request){ .io.target_count = 1, .target.length = SECTORS };
	snprintf(q.io.name, sizeof q.io.name, PREFIX "%d", name);
	snprintf(q.target.target_type, sizeof q.target.target_type, "linear");
	snprintf(q.parameters, sizeof q.parameters, "7:%d %d", r->loop, name * SECTORS);
	err = dm(DM_TABLE_LOAD, &q);
	/* Without DM_SUSPEND_FLAG it resumes. */
	return err ? err : dm_named(DM_DEV_SUSPEND, name);
}

/* ---- those that make and remove ---- */

/* The number of a device by its name; 0 if there is none. */
static dev_t number_of(int name)
{
	struct request q = { 0 };

	snprintf(q.io.name, sizeof q.io.name, PREFIX "%d", name);
	return dm(DM_DEV_STATUS, &q) ? 0 : (dev_t)q.io.dev;
}

/* Waits until the name leads to the device, or for some seconds. */
static void wait_for_name(struct race *r, int name, dev_t number)
{
	uint64_t until = now_ns() + WAIT_NS;
	char path[PATH_MAX];
	struct stat st;

	snprintf(path, sizeof path, "%s/" PREFIX "%d", r->dir, name);
	while ((stat(path, &st) < 0 || st.st_rdev != number) && now_ns() < until && !stopped(r))
		sleep_us(2000);
}

_Noreturn static void creator(struct race *r, int id)
{
	struct creator_shared *s = &r->creator[id];
	struct rnd rnd;
	int err;

	rnd_seed(&rnd, (uint64_t)id);
	while (!stopped(r)) {
		int name = (int)rnd_below(&rnd, (unsigned)r->names), expected = FREE;

		if (!atomic_compare_exchange_strong(&r->state[name], &expected, TAKEN))
			continue;
		err = dm_create(r, name);
		if (err) {
			errs_add(&s->errors, -err);
			dm_named(DM_DEV_REMOVE, name);
			atomic_store(&r->state[name], FREE);
			continue;
		}
		s->created++;
		dev_t number = number_of(name);
		int was = atomic_exchange(&r->minor_name[minor(number) % MAX_MINORS], name + 1);
		if (was && was != name + 1)
			atomic_fetch_add(&r->moves, 1);
		atomic_fetch_add(&r->lives[name], 1);
		atomic_store(&r->state[name], LIVE);
		/* Some devices are used as soon as they can be, others are
		 * gone before udev has heard of them. */
		if (id % 2 == 0)
			wait_for_name(r, name, number);
		uint64_t until = now_ns() + (uint64_t)rnd_below(&rnd, (unsigned)r->live_ms) * NS_PER_MS;
		while (now_ns() < until && !stopped(r))
			sleep_us(1000);
		/* udev or a victim may have it open. */
		while ((err = dm_named(DM_DEV_REMOVE, name)) == -EBUSY && !stopped(r)) {
			s->busy++;
			atomic_store(&r->state[name], TAKEN);
			sleep_us(500);
		}
		if (err && err != -EBUSY && err != -EINTR)
			errs_add(&s->errors, -err);
		s->removed += !err;
		atomic_store(&r->state[name], FREE);
	}
	_exit(0);
}

/* ---- those that open ---- */

static void wrong(struct race *r, struct victim_shared *s, int name, const char *was, const char *got)
{
	char path[PATH_MAX], link[100] = "";
	uint64_t life = atomic_load(&r->lives[name]);

	/* Many opens may hit the same wrong link, so the lives in which that happened
	 * are counted as well. */
	if (atomic_exchange(&r->wrong_lives[name], life + 1) != life + 1)
		atomic_fetch_add(&r->names_wrong, 1);
	snprintf(path, sizeof path, "%s/" PREFIX "%d", r->dir, name);
	if (readlink(path, link, sizeof link - 1) < 0)
		snprintf(link, sizeof link, "%s", strerror(errno));
	if (!s->first[0])
		snprintf(s->first, sizeof s->first, PREFIX "%d, a link to %s, was %.50s; link now: %s", name, was, got, link);
}

static void verify(struct race *r, struct victim_shared *s, int fd, int name, const char *link)
{
	char expected[SECTOR] = "", sector[SECTOR];
	struct request q = { 0 };
	struct stat st;
	int err;

	snprintf(expected, sizeof expected, PREFIX "%d", name);
	if (fstat(fd, &st) < 0)
		die("fstat: %s", strerror(errno));
	/* The device keeps its number as long as it is open. */
	q.io.dev = st.st_rdev;
	err = dm(DM_DEV_STATUS, &q);
	if (err) {
		errs_add(&s->read_errors, -err);
		return;
	}
	if (strcmp(q.io.name, expected) != 0) {
		s->wrong_name++;
		wrong(r, s, name, link, q.io.name);
		return;
	}
	ssize_t n = pread(fd, sector, SECTOR, 0);
	if (n != SECTOR) {
		errs_add(&s->read_errors, n < 0 ? errno : ERR_SHORT);
		return;
	}
	if (memcmp(sector, expected, SECTOR) != 0) {
		s->wrong_data++;
		wrong(r, s, name, link, "another one's data");
		return;
	}
	s->ok++;
	s->bare += link[0] && strncmp(link, "/dev/disk/by-diskseq/", 21) != 0;
}

_Noreturn static void victim(struct race *r, int id)
{
	struct victim_shared *s = &r->victim[id];
	struct rnd rnd;

	rnd_seed(&rnd, 1000 + (uint64_t)id);
	/* Preempted for long in the middle of an open. */
	if (id % 2 && sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){ 0 }) < 0)
		die("SCHED_IDLE: %s", strerror(errno));
	while (!stopped(r)) {
		int name = (int)rnd_below(&rnd, (unsigned)r->names);
		char path[PATH_MAX], link[64] = "";

		/* Mostly picks a name that exists. One that is about to be
		 * removed is left alone, or it never would be. */
		int state = atomic_load(&r->state[name]);
		if (state == TAKEN || (state == FREE && rnd_below(&rnd, 4))) {
			sleep_us(500);
			continue;
		}
		snprintf(path, sizeof path, "%s/" PREFIX "%d", r->dir, name);
		/* If there is no link yet, it is not known what is there a moment later. */
		if (readlink(path, link, sizeof link - 1) < 0 && errno != ENOENT)
			snprintf(link, sizeof link, "no link");
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 && errno == EINTR && stopped(r))
			break;
		s->opens++;
		if (fd < 0) {
			errs_add(&s->errors, errno);
			sleep_us(10000); /* an emulated machine has better things to do */
			continue;
		}
		verify(r, s, fd, name, link);
		close(fd);
		/* Leaves some time to a process that wants to remove it. */
		sleep_us(500);
	}
	_exit(0);
}

/* ---- all of it ---- */

static void backing_make(struct race *r)
{
	char sector[SECTOR] = "";
	int file = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600), fd, err;

	if (file < 0 || ftruncate(file, MAX_NAMES * SECTORS * SECTOR) < 0)
		die("no backing file in /dev/shm: %s", strerror(errno));
	for (int i = 0; i < r->names; i++) {
		memset(sector, 0, sizeof sector);
		snprintf(sector, sizeof sector, PREFIX "%d", i);
		if (pwrite(file, sector, SECTOR, (off_t)i * SECTORS * SECTOR) != SECTOR)
			die("write to the backing file: %s", strerror(errno));
	}
	for (r->loop = FIRST_LOOP; (err = loop_ctl_add(r->loop)) == -EEXIST; r->loop++)
		;
	if (err)
		die("LOOP_CTL_ADD %d: %s", r->loop, strerror(-err));
	fd = loop_open(r->loop, O_RDWR);
	err = fd < 0 ? fd : loop_configure(fd, file, 0);
	if (err) {
		loop_ctl_remove(r->loop);
		die("loop%d: %s", r->loop, strerror(-err));
	}
	close(fd);
	close(file);
}

/* Removes what a creator could not remove itself. */
static int clean_up(struct race *r)
{
	uint64_t until = now_ns() + CLEANUP_NS;
	int left = 0, err;

	for (int i = 0; i < r->names; i++) {
		while ((err = dm_named(DM_DEV_REMOVE, i)) == -EBUSY && now_ns() < until)
			sleep_us(1000);
		left += err && err != -ENXIO;
	}
	if (loop_destroy(r->loop, CLEANUP_NS) < 0)
		left++;
	return left;
}

static pid_t start(struct race *r, int id, void (*run)(struct race *, int))
{
	pid_t parent = getpid(), pid = fork();

	if (pid == 0) {
		die_sink = r->msg;
		die_sink_size = sizeof r->msg;
		child_follows(parent, SIGTERM);
		run(r, id);
	}
	return pid;
}

static int reap(pid_t *pids, int n, uint64_t within_ns)
{
	uint64_t until = now_ns() + within_ns;

	for (;;) {
		int alive = 0;

		for (int i = 0; i < n; i++) {
			if (pids[i] > 0 && waitpid(pids[i], NULL, WNOHANG) == pids[i])
				pids[i] = 0;
			alive += pids[i] > 0;
		}
		if (!alive || now_ns() > until)
			return alive;
		sleep_us(1000);
	}
}

#define LLU(x) ((unsigned long long)(x))

static void report(struct race *r, double seconds)
{
	static struct victim_shared v;
	static struct creator_shared c;

	for (int i = 0; i < r->victims; i++) {
		struct victim_shared *s = &r->victim[i];

		v.opens += s->opens;
		v.ok += s->ok;
		v.wrong_name += s->wrong_name;
		v.wrong_data += s->wrong_data;
		v.bare += s->bare;
		errs_merge(&v.errors, &s->errors);
		errs_merge(&v.read_errors, &s->read_errors);
		if (s->first[0])
			memcpy(v.first, s->first, sizeof v.first);
	}
	for (int i = 0; i < r->creators; i++) {
		c.created += r->creator[i].created;
		c.removed += r->creator[i].removed;
		c.busy += r->creator[i].busy;
		errs_merge(&c.errors, &r->creator[i].errors);
	}
	printf("{\"seconds\":%.2f,\"opens\":%llu,\"opens_ok\":%llu,\"by_bare_link\":%llu,", seconds, LLU(v.opens),
	       LLU(v.ok), LLU(v.bare));
	printf("\"wrong_name\":%llu,\"wrong_data\":%llu,\"lives_wrong\":%llu,\"first_wrong\":\"%s\",", LLU(v.wrong_name),
	       LLU(v.wrong_data), LLU(r->names_wrong), v.first);
	printf("\"created\":%llu,\"removed\":%llu,\"busy\":%llu,\"number_moves\":%llu,", LLU(c.created), LLU(c.removed),
	       LLU(c.busy), LLU(r->moves));
	errs_print("errors", &v.errors);
	printf(",");
	errs_print("read_errors", &v.read_errors);
	printf(",");
	errs_print("creator_errors", &c.errors);
	printf("}\n");
}

int cmd_dm_race(int argc, char **argv)
{
	struct race *r = mmap(NULL, sizeof *r, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t pids[2 * MAX_PROCESSES] = { 0 };
	double seconds = 0;
	int n = 0;

	if (r == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	r->dir = "/dev/mapper";
	r->creators = 3;
	r->victims = 3;
	r->names = 12;
	r->live_ms = 600;
	parse_opts(argc, argv, (const struct opt[]){
		{ "seconds", OPT_DBL, &seconds, true },
		{ "dir", OPT_STR, &r->dir, false },
		{ "creators", OPT_INT, &r->creators, false },
		{ "victims", OPT_INT, &r->victims, false },
		{ "names", OPT_INT, &r->names, false },
		{ "live-ms", OPT_INT, &r->live_ms, false },
		{ 0 },
	});
	if (r->creators < 1 || r->creators > MAX_PROCESSES || r->victims < 1 || r->victims > MAX_PROCESSES ||
	    r->names <= r->creators || r->names > MAX_NAMES)
		die("dm-race: a number is out of range");
	control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
	if (control < 0)
		die("/dev/mapper/control: %s", strerror(errno));
	backing_make(r);

	uint64_t begin = now_ns();
	bool child_ended = false;
	for (int i = 0; i < r->creators; i++)
		pids[n++] = start(r, i, creator);
	for (int i = 0; i < r->victims; i++)
		pids[n++] = start(r, i, victim);
	while (!stop_signal && !child_ended && now_ns() - begin < (uint64_t)(seconds * NS_PER_S)) {
		sleep_us(20000);
		for (int i = 0; i < n; i++)
			child_ended |= pids[i] < 0 || waitpid(pids[i], NULL, WNOHANG) == pids[i];
	}
	atomic_store(&r->stop, true);
	double took = (double)(now_ns() - begin) / 1e9;
	if (reap(pids, n, CLEANUP_NS))
		for (int i = 0; i < n; i++)
			if (pids[i] > 0)
				kill(pids[i], SIGKILL);
	int left = clean_up(r);
	if (child_ended && !stop_signal)
		die("dm-race: %s", r->msg[0] ? r->msg : "a child ended early");
	if (left)
		die("dm-race: %d devices could not be removed", left);
	report(r, took);
	return exit_status();
}
