// SPDX-License-Identifier: MIT
#include "blk.h"

#include <sys/mman.h>
#include <sys/wait.h>

#define CLIENTS_MAX 64
#define NOBODY (-1)

struct shared {
	_Atomic int turn; /* whose it is, or NOBODY */
	_Atomic bool over;
	struct {
		uint64_t opens;
		struct errs errors;
	} clients[CLIENTS_MAX][WAYS_MAX];
};

static void client(struct shared *s, int which, const struct way *ways)
{
	while (!s->over && !stop_signal) {
		int turn = s->turn;

		if (turn == NOBODY) {
			sleep_us(100);
			continue;
		}
		const struct way *w = &ways[turn];
		int fd = target_open(&w->targets[which % w->count]);
		if (fd < 0) {
			errs_add(&s->clients[which][turn].errors, -fd);
			continue;
		}
		close(fd);
		s->clients[which][turn].opens++;
	}
}

/* Many processes, each of which opens and closes a path of its own. The ways
 * take turns, so that a disturbance hits all of them. */
int cmd_throughput(int argc, char **argv)
{
	static struct way ways[WAYS_MAX];
	uint64_t ns[WAYS_MAX] = { 0 };
	pid_t pids[CLIENTS_MAX], parent = getpid();
	double seconds = 1;
	int clients = 8, slice_ms = 250, count = ways_of(&argc, argv, ways);

	parse_opts(argc, argv, (const struct opt[]){
		{ "seconds", OPT_DBL, &seconds, false }, /* of each way */
		{ "clients", OPT_INT, &clients, false },
		{ "slice-ms", OPT_INT, &slice_ms, false },
		{ 0 },
	});
	if (count < 1 || clients < 1 || clients > CLIENTS_MAX || slice_ms < 1)
		die("usage: blk throughput [--seconds S] [--clients N] [--slice-ms N] -- NAME=PATH,... ...");
	struct shared *s = mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (s == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	s->turn = NOBODY;
	for (int i = 0; i < clients; i++) {
		pids[i] = fork();
		if (pids[i] < 0)
			die("fork: %s", strerror(errno));
		if (pids[i] == 0) {
			child_follows(parent, SIGKILL);
			client(s, i, ways);
			_exit(0);
		}
	}
	for (double left = seconds; left > 0 && !stop_signal; left -= slice_ms / 1000.0) {
		for (int w = 0; w < count && !stop_signal; w++) {
			uint64_t t = now_ns();

			s->turn = w;
			sleep_us((unsigned)slice_ms * 1000);
			s->turn = NOBODY;
			ns[w] += now_ns() - t;
			sleep_us(10000); /* what was begun ends */
		}
	}
	s->over = true;
	for (int i = 0; i < clients; i++)
		while (waitpid(pids[i], NULL, 0) < 0 && errno == EINTR)
			;
	printf("{\"clients\":%d", clients);
	for (int w = 0; w < count; w++) {
		static struct errs errors;
		uint64_t total = 0, least = UINT64_MAX;

		memset(&errors, 0, sizeof errors);
		for (int i = 0; i < clients; i++) {
			uint64_t n = s->clients[i][w].opens;

			total += n;
			least = n < least ? n : least;
			errs_merge(&errors, &s->clients[i][w].errors);
		}
		printf(",\"%s\":{\"opens_per_s\":%.0f,\"slowest_per_s\":%.0f,\"n\":%llu,", ways[w].name,
		       (double)total * 1e9 / (double)ns[w], (double)least * 1e9 / (double)ns[w],
		       (unsigned long long)total);
		errs_print("errors", &errors);
		printf("}");
	}
	printf("}\n");
	return exit_status();
}
