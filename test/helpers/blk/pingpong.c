// SPDX-License-Identifier: MIT
#include "blk.h"

#include <sched.h>
#include <sys/wait.h>

enum pin parse_pin(const char *s)
{
	if (!strcmp(s, "any"))
		return PIN_ANY;
	if (!strcmp(s, "same"))
		return PIN_SAME;
	if (!strcmp(s, "split"))
		return PIN_SPLIT;
	die("bad value for --pin: %s (any, same or split)", s);
}

/* Pins the process to the nth of the processors that it may use. */
static void pin_to(int n)
{
	cpu_set_t may, one;

	if (sched_getaffinity(0, sizeof may, &may) < 0)
		die("sched_getaffinity: %s", strerror(errno));
	if (n >= CPU_COUNT(&may))
		die("--pin split needs two processors");
	CPU_ZERO(&one);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &may) && n-- == 0)
			CPU_SET(cpu, &one);
	if (sched_setaffinity(0, sizeof one, &one) < 0)
		die("sched_setaffinity: %s", strerror(errno));
}

void pong_start(struct pong *p, enum pin pin)
{
	int there[2], back[2];
	pid_t parent = getpid();

	if (pipe2(there, O_CLOEXEC) < 0 || pipe2(back, O_CLOEXEC) < 0)
		die("pipe: %s", strerror(errno));
	p->pid = fork();
	if (p->pid < 0)
		die("fork: %s", strerror(errno));
	if (p->pid == 0) {
		char c;

		child_follows(parent, SIGKILL);
		if (pin != PIN_ANY)
			pin_to(pin == PIN_SPLIT);
		close(there[1]);
		close(back[0]);
		/* A signal to the whole group leaves the end to the parent,
		 * which closes the pipe. */
		for (;;) {
			ssize_t r = read(there[0], &c, 1);
			if (r < 0 && errno == EINTR)
				continue;
			if (r != 1 || write(back[1], &c, 1) != 1)
				_exit(0);
		}
	}
	if (pin != PIN_ANY)
		pin_to(0);
	close(there[0]);
	close(back[1]);
	p->to = there[1];
	p->from = back[0];
}

bool pong_round(struct pong *p, struct hist *h)
{
	char c = 0;
	uint64_t t = now_ns();

	if (write(p->to, &c, 1) != 1 || read(p->from, &c, 1) != 1) {
		if (stop_signal)
			return false;
		die("pipe to the partner: %s", strerror(errno));
	}
	hist_add(h, now_ns() - t);
	return true;
}

void pong_end(struct pong *p)
{
	close(p->to);
	close(p->from);
	while (waitpid(p->pid, NULL, 0) < 0 && errno == EINTR)
		;
}

int cmd_pingpong(int argc, char **argv)
{
	static struct hist h, warmup;
	const char *pin = "any";
	double seconds = 1;
	struct pong p;

	parse_opts(argc, argv, (const struct opt[]){
		{ "seconds", OPT_DBL, &seconds, false },
		{ "pin", OPT_STR, &pin, false },
		{ 0 },
	});
	pong_start(&p, parse_pin(pin));
	for (int i = 0; i < 200 && !stop_signal; i++)
		pong_round(&p, &warmup);
	for (uint64_t until = now_ns() + (uint64_t)(seconds * NS_PER_S); now_ns() < until && !stop_signal;)
		pong_round(&p, &h);
	pong_end(&p);
	printf("{");
	hist_print_ns(&h);
	printf("}\n");
	return exit_status();
}
