// SPDX-License-Identifier: MIT
/* An open(2) that is stopped after it got the attributes and before it opens the device. */
#include "blk.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>

/* The longest possible period is 4.19 s (sched_deadline_period_max_us). */
#define STOPPED_NS (4 * NS_PER_S)
/* The least possible runtime: less than any call takes. */
#define RUNTIME_NS 1024

/* As struct sched_attr in linux/sched/types.h, which some versions of sched.h do not allow beside
 * them. */
struct attributes {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};

static struct opening {
	const char *path;
	char through[32]; /* the name is looked up before: only the attributes are asked for */
	_Atomic pid_t tid;
	_Atomic long sleeps; /* that were over when the call began */
	int fd;
} opening;

static void schedule(pid_t tid, const struct attributes *how)
{
	if (syscall(SYS_sched_setattr, tid, how, 0) < 0 && errno != ESRCH) /* it has gone on by itself */
		die("sched_setattr: %s", strerror(errno));
}

static void *open_path(void *arg)
{
	struct opening *o = arg;
	struct rusage usage;

	schedule(0, &(struct attributes){
		.size = sizeof(struct attributes),
		.policy = SCHED_DEADLINE,
		.runtime = RUNTIME_NS,
		.deadline = STOPPED_NS,
		.period = STOPPED_NS,
	});
	getrusage(RUSAGE_THREAD, &usage);
	o->sleeps = usage.ru_nvcsw;
	o->tid = gettid();
	o->fd = open(o->through, O_RDONLY | O_CLOEXEC);
	if (o->fd < 0)
		o->fd = -errno;
	return NULL;
}

/* Whether the thread went to sleep in its call, and was woken. */
static bool woken(const struct opening *o)
{
	char path[64], line[256], state = 0;
	long sleeps = -1;

	if (!o->tid)
		return false;
	snprintf(path, sizeof path, "/proc/self/task/%d/status", o->tid);
	FILE *f = fopen(path, "r");
	if (!f)
		return false; /* it has ended */
	while (fgets(line, sizeof line, f)) {
		sscanf(line, "State: %c", &state);
		sscanf(line, "voluntary_ctxt_switches: %ld", &sleeps);
	}
	fclose(f);
	return state == 'R' && sleeps > o->sleeps;
}

/* Maps a page and unmaps it again, as the other threads of a program do all the time. */
static void touch_memory(void)
{
	void *page = mmap(NULL, 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (page == MAP_FAILED)
		die("mmap: %s", strerror(errno));
	*(volatile char *)page = 1;
	munmap(page, 1);
}

/* The thread has used up its processor time when it goes to sleep to wait
 * for the answer (update_curr_dl). So it gets none when it is woken
 * (enqueue_dl_entity, 6.18), as if other processes had it all. "ready" says
 * that it is stopped; a line on stdin, or its end, lets it go on.
 *
 * If its time is up before it asks, it asks some seconds later. */
int cmd_open_stopped(int argc, char **argv)
{
	pthread_t thread;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &opening.path, true },
		{ 0 },
	});
	int node = open(opening.path, O_PATH | O_CLOEXEC);
	if (node < 0)
		die("%s: %s", opening.path, strerror(errno));
	snprintf(opening.through, sizeof opening.through, "/proc/self/fd/%d", node);
	int err = pthread_create(&thread, NULL, open_path, &opening);
	if (err)
		die("pthread_create: %s", strerror(err));
	while (!woken(&opening)) {
		if (stop_signal)
			return exit_status();
		if (pthread_tryjoin_np(thread, NULL) == 0)
			die("open-stopped: it has opened %s", opening.path);
		sleep_us(1000);
	}
	printf("ready\n");
	fflush(stdout);
	struct pollfd told = { .fd = 0, .events = POLLIN };
	while (poll(&told, 1, 1) <= 0 && !stop_signal)
		touch_memory();
	bool stopped = woken(&opening);
	schedule(opening.tid, &(struct attributes){ .size = sizeof(struct attributes), .policy = SCHED_OTHER });
	pthread_join(thread, NULL);
	uint64_t seq = 0;
	if (opening.fd >= 0 && blk_diskseq(opening.fd, &seq) < 0)
		die("open-stopped: not a disk");
	printf("{\"stopped\":%s,\"error\":%d,\"diskseq\":%llu}\n", stopped ? "true" : "false",
	       opening.fd < 0 ? -opening.fd : 0, (unsigned long long)seq);
	return exit_status();
}
