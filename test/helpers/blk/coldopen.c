// SPDX-License-Identifier: MIT
#include "blk.h"

/* Opens each path once per round. The pause between two rounds lets whatever
 * holds the devices release them. Each way should have devices of its own;
 * otherwise it finds a device open that another way still holds. */
int cmd_cold_open(int argc, char **argv)
{
	static struct way ways[WAYS_MAX];
	static struct hist hists[WAYS_MAX];
	static struct errs errors[WAYS_MAX];
	int rounds = 1, pause_ms = 0, count = ways_of(&argc, argv, ways), most = 0;

	parse_opts(argc, argv, (const struct opt[]){
		{ "rounds", OPT_INT, &rounds, false },
		{ "pause-ms", OPT_INT, &pause_ms, false },
		{ 0 },
	});
	if (count < 1)
		die("usage: blk cold-open [--rounds N] [--pause-ms N] -- NAME=PATH,... ...");
	for (int w = 0; w < count; w++)
		most = ways[w].count > most ? ways[w].count : most;
	for (int round = 0; round < rounds && !stop_signal; round++) {
		for (uint64_t until = now_ns() + (uint64_t)pause_ms * NS_PER_MS; now_ns() < until && !stop_signal;)
			sleep_us(1000);
		for (int i = 0; i < most; i++) {
			for (int k = 0; k < count && !stop_signal; k++) {
				int w = (k + i + round) % count; /* another first one each time */

				if (i >= ways[w].count)
					continue;
				uint64_t t = now_ns();
				int fd = target_open(&ways[w].targets[i]);
				uint64_t took = now_ns() - t;
				if (fd < 0) {
					errs_add(&errors[w], -fd);
					continue;
				}
				hist_add(&hists[w], took);
				close(fd);
			}
		}
	}
	printf("{");
	for (int w = 0; w < count; w++) {
		printf("%s\"%s\":{", w ? "," : "", ways[w].name);
		hist_print_ns(&hists[w]);
		printf(",");
		errs_print("errors", &errors[w]);
		printf("}");
	}
	printf("}\n");
	return exit_status();
}
