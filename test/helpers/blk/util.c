// SPDX-License-Identifier: MIT
#include "blk.h"

#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>

char *die_sink;
size_t die_sink_size;

_Noreturn void die(const char *fmt, ...)
{
	char msg[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(msg, sizeof msg, fmt, ap);
	va_end(ap);
	if (die_sink) {
		snprintf(die_sink, die_sink_size, "%s", msg);
		_exit(2); /* stdio buffers belong to the parent */
	}
	fprintf(stderr, "blk: %s\n", msg);
	exit(2);
}

void parse_opts(int argc, char **argv, const struct opt *opts)
{
	uint64_t seen = 0;

	for (int i = 1; i < argc; i++) {
		const struct opt *o = opts;

		while (o->name && (strncmp(argv[i], "--", 2) != 0 || strcmp(argv[i] + 2, o->name) != 0))
			o++;
		if (!o->name)
			die("%s: unknown option %s", argv[0], argv[i]);
		seen |= 1ull << (o - opts);
		if (o->type == OPT_FLAG) {
			*(bool *)o->to = true;
			continue;
		}
		if (++i == argc)
			die("%s: --%s needs a value", argv[0], o->name);
		char *end = "";
		errno = 0;
		if (o->type == OPT_STR) {
			*(const char **)o->to = argv[i];
		} else if (o->type == OPT_INT) {
			long v = strtol(argv[i], &end, 10);
			if (v < 0 || v > INT_MAX)
				errno = ERANGE;
			*(int *)o->to = (int)v;
		} else {
			double v = strtod(argv[i], &end);
			if (!(v >= 0 && v < 1e6))
				errno = ERANGE;
			*(double *)o->to = v;
		}
		if (*end || errno || !*argv[i])
			die("%s: bad value for --%s: %s", argv[0], o->name, argv[i]);
	}
	for (const struct opt *o = opts; o->name; o++)
		if (o->required && !(seen & 1ull << (o - opts)))
			die("%s: --%s is required", argv[0], o->name);
}

volatile sig_atomic_t stop_signal;

static void on_signal(int sig)
{
	stop_signal = sig;
}

void catch_signals(void)
{
	struct sigaction sa = { .sa_handler = on_signal };

	sigaction(SIGINT, &sa, NULL);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGHUP, &sa, NULL);
	/* A reader that went away must not keep the cleanup from running. */
	signal(SIGPIPE, SIG_IGN);
}

int exit_status(void)
{
	return stop_signal ? 128 + stop_signal : 0;
}

uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

void sleep_us(unsigned us)
{
	struct timespec ts = { us / 1000000, (long)(us % 1000000) * 1000 };

	nanosleep(&ts, NULL); /* a signal may cut it short: the callers loop */
}

/* A thread that only sleeps notices if the machine runs nothing for longer
 * than what is measured. */
static void *canary(void *arg)
{
	_Atomic uint64_t *longest_ns = arg;

	for (;;) {
		uint64_t before = now_ns(), over;

		sleep_us(1000);
		over = now_ns() - before - NS_PER_MS;
		if (over > *longest_ns)
			*longest_ns = over;
	}
	return NULL;
}

void watch_for_stalls(_Atomic uint64_t *longest_ns)
{
	pthread_t thread;
	int err = pthread_create(&thread, NULL, canary, longest_ns);

	if (err)
		die("pthread_create: %s", strerror(err));
}

void look(const char *path)
{
	struct stat st;

	if (stat(path, &st) < 0)
		die("%s: %s", path, strerror(errno));
}

void become(int uid)
{
	if (uid && (setgroups(0, NULL) < 0 || setresgid((gid_t)uid, (gid_t)uid, (gid_t)uid) < 0 ||
		    setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) < 0))
		die("setresuid: %s", strerror(errno));
}

int told(void)
{
	struct pollfd p = { .fd = 0, .events = POLLIN };
	char buf[256];
	int lines = 0;

	/* The timeout covers a signal just before the call. */
	while (!stop_signal && !lines) {
		if (poll(&p, 1, 100) <= 0)
			continue;
		ssize_t n = read(0, buf, sizeof buf);
		if (n <= 0)
			break;
		for (ssize_t i = 0; i < n; i++)
			lines += buf[i] == '\n';
	}
	return stop_signal ? 0 : lines;
}

void wait_for_end(void)
{
	while (told())
		;
}

void child_follows(pid_t parent, int sig)
{
	prctl(PR_SET_PDEATHSIG, sig);
	if (getppid() != parent) /* it ended before the line above */
		_exit(2);
}

uint64_t mix64(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

void rnd_seed(struct rnd *r, uint64_t salt)
{
	r->s = mix64(now_ns() + (salt << 40)) ^ (uint64_t)getpid();
}

uint64_t rnd_next(struct rnd *r)
{
	return mix64(r->s += 0x9e3779b97f4a7c15ull);
}

unsigned rnd_below(struct rnd *r, unsigned n)
{
	return n ? (unsigned)((rnd_next(r) >> 32) % n) : 0;
}

void errs_add(struct errs *e, int err)
{
	e->n[err > 0 && err < ERRNOS ? err : ERR_SHORT]++;
}

void errs_merge(struct errs *to, const struct errs *from)
{
	for (int i = 0; i < ERRNOS; i++)
		to->n[i] += from->n[i];
}

void errs_print(const char *key, const struct errs *e)
{
	const char *sep = "";

	printf("\"%s\":{", key);
	for (int i = 0; i < ERRNOS; i++) {
		char num[16];
		const char *name = NULL;

		if (!e->n[i])
			continue;
		if (i == ERR_SHORT)
			name = "SHORT";
#ifdef __GLIBC__
		else
			name = strerrorname_np(i);
#endif
		if (!name) {
			snprintf(num, sizeof num, "E%d", i);
			name = num;
		}
		printf("%s\"%s\":%llu", sep, name, (unsigned long long)e->n[i]);
		sep = ",";
	}
	printf("}");
}

static unsigned hist_bucket(uint64_t v)
{
	if (v < HIST_SUB)
		return (unsigned)v;
	unsigned e = 63 - 8 - (unsigned)__builtin_clzll(v);
	if (e > HIST_EXP - 2)
		return HIST_SUB * HIST_EXP - 1;
	return HIST_SUB * (e + 1) + (unsigned)((v >> e) - HIST_SUB);
}

void hist_add(struct hist *h, uint64_t ns)
{
	h->b[hist_bucket(ns)]++;
	h->n++;
	if (ns > h->max)
		h->max = ns;
}

void hist_merge(struct hist *to, const struct hist *from)
{
	for (size_t i = 0; i < HIST_SUB * HIST_EXP; i++)
		to->b[i] += from->b[i];
	to->n += from->n;
	if (from->max > to->max)
		to->max = from->max;
}

uint64_t hist_pct(const struct hist *h, double pct)
{
	double want = (double)h->n * pct / 100;
	uint64_t seen = 0;

	for (unsigned i = 0; i < HIST_SUB * HIST_EXP; i++) {
		if (!h->b[i])
			continue;
		seen += h->b[i];
		if ((double)seen < want)
			continue;
		uint64_t v = i;
		if (i >= HIST_SUB) {
			unsigned e = i / HIST_SUB - 1;
			v = (uint64_t)(i % HIST_SUB + HIST_SUB) << e;
			v += (1ull << e) / 2;
		}
		return v < h->max ? v : h->max;
	}
	return h->max;
}

void hist_print_ns(const struct hist *h)
{
	printf("\"p50_ns\":%llu,\"p99_ns\":%llu,\"n\":%llu",
	       (unsigned long long)hist_pct(h, 50),
	       (unsigned long long)hist_pct(h, 99), (unsigned long long)h->n);
}

void hist_report(const struct hist *h, const struct errs *errors)
{
	printf("{");
	hist_print_ns(h);
	printf(",\"max_ns\":%llu,", (unsigned long long)h->max);
	errs_print("errors", errors);
	printf("}\n");
}
