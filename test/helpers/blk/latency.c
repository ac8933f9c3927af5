// SPDX-License-Identifier: MIT
#include "blk.h"

#include <sys/stat.h>

/* All series are measured in one process in small batches, in turns. So a
 * disturbance hits all of them, and the quotients of their percentiles mean
 * something. */
#define SERIES_MAX (6 + 2 * WAYS_MAX)
static struct series {
	enum { RTT, OPEN, STAT } what;
	const char *prefix, *name;
	struct target target;
	struct hist hist;
	struct errs errors;
} series[SERIES_MAX];
static int count;

static void add(int what, const char *prefix, const char *name, struct target target)
{
	series[count++] = (struct series){ .what = what, .prefix = prefix, .name = name, .target = target };
}

/* The first calls of a turn are not counted: they wake what slept meanwhile,
 * and open what was closed. */
#define WARM_UP 5

static void sample(struct series *s, struct pong *p, bool counted)
{
	static struct hist ignored;
	struct hist *hist = counted ? &s->hist : &ignored;
	struct stat st;
	uint64_t t, took;
	int r;

	if (s->what == RTT) {
		pong_round(p, hist);
		return;
	}
	t = now_ns();
	if (s->what == OPEN)
		r = target_open(&s->target);
	else
		r = stat(s->target.path, &st) < 0 ? -errno : 0;
	took = now_ns() - t;
	if (r < 0) {
		if (r != -EINTR || !stop_signal)
			errs_add(&s->errors, -r);
		return;
	}
	if (s->what == OPEN)
		close(r);
	hist_add(hist, took);
}

/* The arguments after "--", NAME=PATH, are other trees: "open_NAME" and
 * "stat_NAME". A path that begins with "careful:" gives only "open_NAME". */
int cmd_latency(int argc, char **argv)
{
	static struct way ways[WAYS_MAX];
	const char *tree = NULL, *dev = NULL, *pin = "any";
	double seconds = 1;
	int batch = 200, others = ways_of(&argc, argv, ways);
	struct pong p;

	parse_opts(argc, argv, (const struct opt[]){
		{ "tree", OPT_STR, &tree, true },
		{ "dev", OPT_STR, &dev, true },
		{ "seconds", OPT_DBL, &seconds, false },
		{ "pin", OPT_STR, &pin, false },
		{ "batch", OPT_INT, &batch, false },
		{ 0 },
	});
	if (batch < 1)
		die("bad value for --batch");
	add(RTT, "", "rtt", (struct target){ 0 });
	add(OPEN, "open_", "tree", (struct target){ .path = tree });
	add(OPEN, "open_", "dev", (struct target){ .path = dev });
	add(STAT, "stat_", "tree", (struct target){ .path = tree });
	add(STAT, "stat_", "dev", (struct target){ .path = dev });
	for (int i = 0; i < others; i++) {
		add(OPEN, "open_", ways[i].name, ways[i].targets[0]);
		if (!ways[i].targets[0].careful)
			add(STAT, "stat_", ways[i].name, ways[i].targets[0]);
	}
	pong_start(&p, parse_pin(pin));

	uint64_t until = 0;
	/* The first round only warms up caches. */
	for (unsigned round = 0; !stop_signal; round++) {
		for (int i = 0; i < count; i++) {
			/* another first one every round */
			struct series *s = &series[((unsigned)i + round) % (unsigned)count];

			for (int k = -WARM_UP; k < batch && !stop_signal; k++)
				sample(s, &p, k >= 0);
		}
		if (round == 0) {
			for (int i = 0; i < count; i++) {
				memset(&series[i].hist, 0, sizeof series[i].hist);
				memset(&series[i].errors, 0, sizeof series[i].errors);
			}
			until = now_ns() + (uint64_t)(seconds * NS_PER_S);
		} else if (now_ns() >= until) {
			break;
		}
	}
	pong_end(&p);
	printf("{");
	for (int i = 0; i < count; i++) {
		const struct series *s = &series[i];

		printf("%s\"%s%s\":{", i ? "," : "", s->prefix, s->name);
		hist_print_ns(&s->hist);
		printf(",");
		errs_print("errors", &s->errors);
		printf("}");
	}
	printf("}\n");
	return exit_status();
}
