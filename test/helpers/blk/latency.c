#include "blk.h"

#include <sys/stat.h>

/* Everything is measured in one process in small batches, in turns, so that
 * what disturbs one series disturbs the others as well and the quotients of
 * their percentiles mean something. */
enum { RTT, OPEN_TREE, OPEN_DEV, STAT_TREE, STAT_DEV, SERIES };
static const char *const names[SERIES] = {
	"rtt", "open_tree", "open_dev", "stat_tree", "stat_dev",
};

static struct hist hists[SERIES];
static struct errs errors[SERIES];

static void sample(int what, const char *path, struct pong *p)
{
	struct stat st;
	uint64_t t, took;
	int r;

	if (what == RTT) {
		pong_round(p, &hists[RTT]);
		return;
	}
	t = now_ns();
	if (what == OPEN_TREE || what == OPEN_DEV)
		r = open(path, O_RDONLY | O_CLOEXEC);
	else
		r = stat(path, &st);
	took = now_ns() - t;
	if (r < 0) {
		if (errno != EINTR || !stop_signal)
			errs_add(&errors[what], errno);
		return;
	}
	if (what == OPEN_TREE || what == OPEN_DEV)
		close(r);
	hist_add(&hists[what], took);
}

int cmd_latency(int argc, char **argv)
{
	const char *tree = NULL, *dev = NULL, *pin = "any";
	double seconds = 1;
	int batch = 200;
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
	pong_start(&p, parse_pin(pin));

	uint64_t until = 0;
	/* The first round only warms up caches. */
	for (unsigned round = 0; !stop_signal; round++) {
		for (int i = 0; i < SERIES; i++) {
			/* another first one every round */
			int what = (int)((unsigned)i + round) % SERIES;
			const char *path = what == OPEN_TREE || what == STAT_TREE ? tree : dev;

			for (int k = 0; k < batch && !stop_signal; k++)
				sample(what, path, &p);
		}
		if (round == 0) {
			memset(hists, 0, sizeof hists);
			memset(errors, 0, sizeof errors);
			until = now_ns() + (uint64_t)(seconds * NS_PER_S);
		} else if (now_ns() >= until) {
			break;
		}
	}
	pong_end(&p);
	printf("{");
	for (int i = 0; i < SERIES; i++) {
		printf("%s\"%s\":{", i ? "," : "", names[i]);
		hist_print_ns(&hists[i]);
		printf(",");
		errs_print("errors", &errors[i]);
		printf("}");
	}
	printf("}\n");
	return exit_status();
}
