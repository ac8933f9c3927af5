// SPDX-License-Identifier: MIT
#include "churn.h"

#include <dirent.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define FIRST_NR 100

static void own_node(struct churn *c, int nr)
{
	char path[32];

	snprintf(path, sizeof path, "/dev/loop%d", nr);
	if ((c->node_uid || c->node_gid) &&
	    (chown(path, (uid_t)c->node_uid, (gid_t)c->node_gid) < 0 || chmod(path, c->node_gid ? 0660 : 0600) < 0))
		snprintf(c->msg, sizeof c->msg, "%s: %s", path, strerror(errno));
}

/* Uses only devices that this run made by LOOP_CTL_ADD. Any device that
 * existed before, free or not, belongs to another program. */
static int add_devices(struct churn *c, int want)
{
	int nr = own_loop(FIRST_NR), got = 0;

	while (got < want && !stop_signal) {
		int err = loop_ctl_add(nr);

		if (err == 0) {
			c->nrs[got++] = nr;
			own_node(c, nr);
		} else if (err != -EEXIST) {
			snprintf(c->msg, sizeof c->msg, "LOOP_CTL_ADD %d: %s", nr, strerror(-err));
			break;
		}
		nr++;
	}
	return got;
}

static int remove_devices(const struct churn *c, int n)
{
	uint64_t until = now_ns() + CLEANUP_NS, now;
	int left = 0;

	for (int i = 0; i < n; i++) {
		now = now_ns();
		if (loop_destroy(c->nrs[i], now < until ? until - now : 0) < 0)
			left++;
	}
	return left;
}

/* Removes the links that a recycler left because it was killed or gave up. */
static void remove_links(const struct churn *c, int n)
{
	DIR *d = opendir(c->dir);
	struct dirent *e;

	while (d && (e = readdir(d))) {
		char target[64] = "";
		int nr;

		if (readlinkat(dirfd(d), e->d_name, target, sizeof target - 1) < 0 ||
		    sscanf(target, "/dev/loop%d", &nr) != 1)
			continue;
		for (int i = 0; i < n; i++)
			if (c->nrs[i] == nr)
				unlinkat(dirfd(d), e->d_name, 0);
	}
	if (d)
		closedir(d);
}

static pid_t start(struct churn *c, int id, void (*run)(struct churn *, int))
{
	pid_t parent = getpid(), pid = fork();

	if (pid == 0) {
		die_sink = c->msg;
		die_sink_size = sizeof c->msg;
		/* Not SIGKILL: even without its parent a recycler detaches
		 * and removes its devices. */
		child_follows(parent, SIGTERM);
		/* Makes sleeps last some microseconds, not some plus 50. */
		prctl(PR_SET_TIMERSLACK, 1000ul);
		run(c, id);
	}
	return pid;
}

/* Waits for the children. Returns the number of those that did not end. */
static int reap(pid_t *pids, int n, uint64_t within_ns)
{
	uint64_t until = now_ns() + within_ns;
	int alive;

	for (;;) {
		alive = 0;
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

static void signal_all(const pid_t *pids, int n, int sig)
{
	for (int i = 0; i < n; i++)
		if (pids[i] > 0)
			kill(pids[i], sig);
}

#define LLU(x) ((unsigned long long)(x))

static void report(struct churn *c, double seconds, int killed)
{
	/* Separate counts for the openers with idle priority: their times
	 * say nothing about the filesystem. */
	static struct hist hist, hist_idle, reuse;
	static struct errs errors, read_errors, recycle_errors;
	struct opener_shared t = { 0 };
	uint64_t ok_idle = 0, configures = 0, recycles = 0, busy = 0, moves = 0, unlinked = 0;

	for (int i = 0; i < c->openers; i++) {
		struct opener_shared *o = &c->op[i];

		t.opens += o->opens;
		t.ok += o->ok;
		t.ok_part += o->ok_part;
		t.ok_stale += o->ok_stale;
		t.wrong_diskseq += o->wrong_diskseq;
		t.wrong_data += o->wrong_data;
		t.wrong_part += o->wrong_part;
		t.read_other_disk += o->read_other_disk;
		if (o->max_failed_ns > t.max_failed_ns)
			t.max_failed_ns = o->max_failed_ns;
		if (!t.first_asked) {
			t.first_asked = o->first_asked;
			t.first_got = o->first_got;
		}
		errs_merge(&errors, &o->errors);
		errs_merge(&read_errors, &o->read_errors);
		hist_merge(o->idle ? &hist_idle : &hist, &o->hist);
		if (o->idle)
			ok_idle += o->ok;
	}
	for (int i = 0; i < c->recyclers; i++) {
		struct recycler_shared *r = &c->rec[i];

		configures += r->configures;
		recycles += r->recycles;
		busy += r->busy;
		moves += r->minor_moves;
		unlinked += r->unlinked;
		hist_merge(&reuse, &r->reuse);
		errs_merge(&recycle_errors, &r->errors);
	}
	printf("{\"mode\":\"%s\",\"parts\":%s,\"seconds\":%.2f,", c->links ? "links" : c->udev ? "udev" : "tree",
	       c->parts ? "true" : "false", seconds);
	printf("\"opens\":%llu,\"opens_ok\":%llu,\"opens_ok_idle\":%llu,\"opens_ok_part\":%llu,\"opens_ok_retired\":%llu,",
	       LLU(t.opens), LLU(t.ok), LLU(ok_idle), LLU(t.ok_part), LLU(t.ok_stale));
	printf("\"wrong_diskseq\":%llu,\"wrong_data\":%llu,\"wrong_part\":%llu,\"read_other_disk\":%llu,",
	       LLU(t.wrong_diskseq), LLU(t.wrong_data), LLU(t.wrong_part), LLU(t.read_other_disk));
	if (t.first_asked)
		printf("\"first_wrong\":{\"asked\":%llu,\"got\":%llu},", LLU(t.first_asked), LLU(t.first_got));
	printf("\"devices\":%d,\"configures\":%llu,\"recycles\":%llu,\"recycle_waits\":%llu,\"minor_moves\":%llu,",
	       c->recyclers * c->devices, LLU(configures), LLU(recycles), LLU(busy), LLU(moves));
	if (c->udev)
		printf("\"unlinked\":%llu,", LLU(unlinked));
	printf("\"p50_reuse_us\":%.1f,\"p99_reuse_us\":%.1f,\"max_reuse_us\":%.1f,", (double)hist_pct(&reuse, 50) / 1e3,
	       (double)hist_pct(&reuse, 99) / 1e3, (double)reuse.max / 1e3);
	errs_print("errors", &errors);
	printf(",");
	errs_print("read_errors", &read_errors);
	printf(",");
	errs_print("recycle_errors", &recycle_errors);
	printf(",\"max_open_us\":%.1f,\"p50_open_us\":%.1f,\"p99_open_us\":%.1f,", (double)hist.max / 1e3,
	       (double)hist_pct(&hist, 50) / 1e3, (double)hist_pct(&hist, 99) / 1e3);
	printf("\"max_open_us_idle\":%.1f,\"p50_open_us_idle\":%.1f,\"p99_open_us_idle\":%.1f,", (double)hist_idle.max / 1e3,
	       (double)hist_pct(&hist_idle, 50) / 1e3, (double)hist_pct(&hist_idle, 99) / 1e3);
	printf("\"max_failed_open_us\":%.1f,\"killed\":%d,\"interrupted\":%s}\n", (double)t.max_failed_ns / 1e3,
	       killed, stop_signal ? "true" : "false");
}

int cmd_churn(int argc, char **argv)
{
	const char *mode = NULL, *dir = NULL, *workdir = NULL;
	int recyclers = 2, openers = 6, slots = 16, devices = 4;
	const char *way = "open";
	int live_us = 2000, stale_ms = 5, stale_pct = 20;
	double seconds = 0;
	bool parts = false, kernel_names = false;
	pid_t pids[MAX_RECYCLERS + MAX_OPENERS] = { 0 };
	int n = 0, killed = 0;

	struct churn *c = mmap(NULL, sizeof *c, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (c == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	parse_opts(argc, argv, (const struct opt[]){
		{ "mode", OPT_STR, &mode, true },
		{ "dir", OPT_STR, &dir, true },
		{ "seconds", OPT_DBL, &seconds, true },
		{ "parts", OPT_FLAG, &parts, false },
		{ "kernel-names", OPT_FLAG, &kernel_names, false },
		{ "recyclers", OPT_INT, &recyclers, false },
		{ "openers", OPT_INT, &openers, false },
		{ "slots", OPT_INT, &slots, false },
		{ "devices", OPT_INT, &devices, false },
		{ "workdir", OPT_STR, &workdir, false },
		{ "way", OPT_STR, &way, false },
		{ "image", OPT_STR, &c->image, false },
		{ "node-uid", OPT_INT, &c->node_uid, false },
		{ "node-gid", OPT_INT, &c->node_gid, false },
		{ "namespace-of", OPT_INT, &c->namespace_of, false },
		{ "live-us", OPT_INT, &live_us, false },
		{ "stale-ms", OPT_INT, &stale_ms, false },
		{ "stale-pct", OPT_INT, &stale_pct, false },
		{ 0 },
	});
	if (strcmp(mode, "tree") && strcmp(mode, "links") && strcmp(mode, "udev"))
		die("bad value for --mode: %s (tree, links or udev)", mode);
	if (recyclers < 1 || recyclers > MAX_RECYCLERS || openers < 1 || openers > MAX_OPENERS ||
	    devices < 1 || devices > MAX_DEVICES || stale_pct > 100)
		die("churn: a number is out of range");
	if (slots <= devices || slots > MAX_SLOTS)
		die("churn: --slots has to be more than --devices (%d), at most %d", devices, MAX_SLOTS);
	if (access(dir, X_OK) < 0)
		die("%s: %s", dir, strerror(errno));

	c->way = churn_way_named(way);
	if (c->way->image && !c->image)
		die("churn: --way %s needs an --image", way);
	c->links = !strcmp(mode, "links");
	c->udev = !strcmp(mode, "udev");
	c->parts = parts;
	c->kernel_names = kernel_names;
	c->dir = dir;
	c->workdir = workdir;
	c->recyclers = recyclers;
	c->openers = openers;
	c->slots = slots;
	c->devices = devices;
	c->live_us = live_us;
	c->stale_ms = stale_ms;
	c->stale_pct = stale_pct;

	int want = recyclers * devices;
	int got = add_devices(c, want);
	if (got < want) {
		remove_devices(c, got);
		if (stop_signal)
			return exit_status();
		die("%s", c->msg);
	}

	uint64_t begin = now_ns();
	bool child_ended = false;
	for (int i = 0; i < recyclers; i++)
		pids[n++] = start(c, i, churn_recycler);
	for (int i = 0; i < openers; i++)
		pids[n++] = start(c, i, churn_opener);
	for (int i = 0; i < n; i++)
		child_ended |= pids[i] < 0;
	while (!stop_signal && !child_ended && now_ns() - begin < (uint64_t)(seconds * NS_PER_S)) {
		sleep_us(20000);
		/* No child ends by itself, unless something is wrong. */
		for (int i = 0; i < n; i++) {
			if (waitpid(pids[i], NULL, WNOHANG) == pids[i]) {
				pids[i] = 0;
				child_ended = true;
			}
		}
	}
	atomic_store(&c->stop, true);
	double took = (double)(now_ns() - begin) / 1e9;

	/* Interrupts an open that hangs first. The openers must release the
	 * devices before these can be removed. */
	if (reap(pids, n, 3 * NS_PER_S)) {
		signal_all(pids, n, SIGTERM);
		if (reap(pids, n, CLEANUP_NS)) {
			signal_all(pids, n, SIGKILL);
			killed = reap(pids, n, 0);
			reap(pids, n, 5 * NS_PER_S);
		}
	}
	for (int i = 0; c->way->release && i < got; i++)
		c->way->release(c->nrs[i]);
	if (c->way->end)
		c->way->end();
	/* Removes what a recycler could not remove itself. */
	int left = remove_devices(c, got);
	if (c->links)
		remove_links(c, got);
	if (child_ended && !stop_signal)
		die("churn: %s", c->msg[0] ? c->msg : "a child ended early");
	if (left)
		die("churn: %d loop devices are still in use and could not be removed", left);
	report(c, took, killed);
	return exit_status();
}
