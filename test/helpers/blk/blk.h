// SPDX-License-Identifier: MIT
/*
 * blk: what the tests of diskseqfs need from the kernel and Node.js cannot
 * provide: ioctls on block devices, races by the thousand, and times in
 * nanoseconds.
 *
 * Built, in this directory, by
 *
 *   cc -O2 -Wall -Wextra -pthread -o blk *.c
 *
 * Each subcommand prints one line of JSON at its end. An error is one line on
 * stderr and exit status 2. On SIGINT or SIGTERM it cleans up, prints what was
 * counted so far, and exits with 128 + the signal's number.
 */
#ifndef BLK_H
#define BLK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define NS_PER_US 1000ull
#define NS_PER_MS 1000000ull
#define NS_PER_S 1000000000ull

/* How long a device that is to go away may stay in use. Pins do not end while there is
 * no daemon, and on a busy machine the next one takes its time. */
#define CLEANUP_NS (60 * NS_PER_S)

/* ---- errors, options, signals, time (util.c) ---- */

/* A forked child writes no line to stderr: with a sink set, die() leaves its
 * message there for the parent to print. */
extern char *die_sink;
extern size_t die_sink_size;
_Noreturn void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));

struct opt {
	const char *name; /* without the dashes */
	enum { OPT_STR, OPT_INT, OPT_DBL, OPT_FLAG } type;
	void *to; /* const char **, int *, double *, bool * */
	bool required;
};
/* argv[0] is the subcommand's name.  The list ends with a NULL name. */
void parse_opts(int argc, char **argv, const struct opt *opts);

/* The signal that asked for the end, or 0. Handlers are installed without
 * SA_RESTART, so that blocking calls return and the loops see this. */
extern volatile sig_atomic_t stop_signal;
void catch_signals(void);
int exit_status(void);

uint64_t now_ns(void);
void sleep_us(unsigned us);
/* Keeps the longest time that the machine stood still since it was last set to 0, in ns. */
void watch_for_stalls(_Atomic uint64_t *longest_ns);
void look(const char *path); /* stat(2) that has to work */
/* Drops all rights and becomes that user; 0 is root, which keeps its rights. */
void become(int uid);
/* Waits for lines on stdin. Returns how many there were, 0 if stdin has ended or a signal
 * has come. */
int told(void);
/* The same until stdin ends. */
void wait_for_end(void);

/* The first call in a forked child: ends the child when its parent ends. */
void child_follows(pid_t parent, int sig);

struct rnd {
	uint64_t s;
};
void rnd_seed(struct rnd *r, uint64_t salt);
uint64_t rnd_next(struct rnd *r);
unsigned rnd_below(struct rnd *r, unsigned n);
uint64_t mix64(uint64_t x); /* a bijection: distinct in, distinct out */

/* ---- counts of errors by errno (util.c) ---- */

#define ERRNOS 256
#define ERR_SHORT 0 /* no errno: a read which ended early */
struct errs {
	uint64_t n[ERRNOS];
};
void errs_add(struct errs *e, int err);
void errs_merge(struct errs *to, const struct errs *from);
void errs_print(const char *key, const struct errs *e); /* "key":{...} */

/* ---- distributions of times (util.c) ---- */

/* Log-linear: 256 buckets for each power of two, so a percentile is off by
 * less than 0.4 %, in a fixed size that fits shared memory. max is exact. */
#define HIST_SUB 256
#define HIST_EXP 33
struct hist {
	uint64_t n, max;
	uint32_t b[HIST_SUB * HIST_EXP];
};
void hist_add(struct hist *h, uint64_t ns);
void hist_merge(struct hist *to, const struct hist *from);
uint64_t hist_pct(const struct hist *h, double pct);
void hist_print_ns(const struct hist *h); /* "p50_ns":..,"p99_ns":..,"n":.. */
/* A line of JSON: these, "max_ns" and "errors". */
void hist_report(const struct hist *h, const struct errs *errors);

/* ---- block devices (dev.c) ---- */

int blk_diskseq(int fd, uint64_t *seq); /* 0 or -errno, as all below */
int blk_part_add(int fd, int pno, uint64_t start, uint64_t len);
int blk_part_del(int fd, int pno);
/* Turns the number of a loop device, below 32768, into one of this test's own: each test
 * that runs at the same time (TAP_JOB_ID) has other numbers, and may recycle them as it
 * likes. */
int own_loop(int nr);
int loop_ctl_add(int nr);
int loop_ctl_remove(int nr);
/* Adds the device. It replaces an unused one, which a killed run has left. */
int loop_ctl_renew(int nr);
int loop_open(int nr, int flags); /* fd or -errno */
int loop_configure(int fd, int file, uint32_t lo_flags);
int loop_clr_fd(int fd);
/* Detaches the loop device and removes it. It tries again for a while as
 * long as the device is open elsewhere. */
int loop_destroy(int nr, uint64_t within_ns);

/* Waits, for up to a second, for a name that a mount may show a little later. */
int open_appearing(const char *path, int flags, uint64_t *waited_ns);

int parse_open_flags(const char *s);

/* ---- io_uring, one request at a time (uring.c) ---- */

struct uring {
	int fd;
	struct io_uring_sqe *sqe;
	struct io_uring_cqe *cqes;
	unsigned *sq_tail, *cq_head, *cq_tail, cq_mask;
};
void uring_start(struct uring *r);
/* The same, with a worker for opens that shows another call than io_uring's. */
void uring_start_in_stat(struct uring *r);
int uring_open(struct uring *r, const char *path, int flags, int personality, bool worker); /* fd or -errno */

/* ---- several ways to the same disks, measured in turns (ways.c) ---- */

/* A path to open. "careful:/dev/NAME" opens the device node, and makes sure
 * that it is the same device as at the start. */
struct target {
	const char *path;
	bool careful;
	dev_t number;
	uint64_t diskseq;
};
int target_open(const struct target *t); /* fd or -errno */

#define WAYS_MAX 8
struct way {
	const char *name;
	struct target *targets;
	int count;
};
/* The arguments after "--", each NAME=PATH,...; argc is cut there. Returns how many there are. */
int ways_of(int *argc, char **argv, struct way *ways);

/* Where the partner of a ping-pong runs matters more than all else: to wake
 * it on an idle processor costs ten times as much as on the same one. */
enum pin { PIN_ANY, PIN_SAME, PIN_SPLIT };
enum pin parse_pin(const char *s);

/* One byte to a forked partner and back (pingpong.c). */
struct pong {
	pid_t pid;
	int to, from;
};
void pong_start(struct pong *p, enum pin pin);
bool pong_round(struct pong *p, struct hist *h); /* false: interrupted */
void pong_end(struct pong *p);

/* Shared by the exclusive-* subcommands (exclusive.c). */
struct excl {
	struct hist free; /* from the close to when the disk was found free */
	struct hist done; /* from the close to the end of what needed it free */
	struct errs errors;
	uint64_t rounds, within_20ms, first_try, failed, max_appear_ns;
	uint64_t disturbed; /* not among the rounds: the machine stood still */
};
void excl_init(void);
bool excl_more(const struct excl *x, int count);
/* Uses the path as any client would: open, read, close. */
bool excl_use(struct excl *x, const char *path);
/* Then tries what needs the disk alone, again and again as long as it
 * returns -EBUSY. Counts only if the round is used. */
int excl_try(struct excl *x, int (*take)(void), bool used);
int excl_retry(int (*take)(void), uint64_t within_ns);
void excl_print(const struct excl *x, const char *extra);

int cmd_churn(int argc, char **argv);
int cmd_pingpong(int argc, char **argv);
int cmd_openlat(int argc, char **argv);
int cmd_latency(int argc, char **argv);
int cmd_throughput(int argc, char **argv);
int cmd_cold_open(int argc, char **argv);
int cmd_appear(int argc, char **argv);
int cmd_hold(int argc, char **argv);
int cmd_exclusive_zram(int argc, char **argv);
int cmd_exclusive_part(int argc, char **argv);
int cmd_partition(int argc, char **argv);
int cmd_watch(int argc, char **argv);
int cmd_loops(int argc, char **argv);
int cmd_loop_detach(int argc, char **argv);
int cmd_loop_new(int argc, char **argv);
int cmd_loop_remove(int argc, char **argv);
int cmd_hungfs(int argc, char **argv);
int cmd_uring_open(int argc, char **argv);
int cmd_open_stopped(int argc, char **argv);
int cmd_delays(int argc, char **argv);
int cmd_mount(int argc, char **argv);
int cmd_dm_race(int argc, char **argv);
int cmd_hotplug(int argc, char **argv);
int cmd_loop_stall(int argc, char **argv);
int cmd_nbd_silent(int argc, char **argv);
int cmd_abuse(int argc, char **argv);
int cmd_abuse_directories(int argc, char **argv);
int cmd_directory(int argc, char **argv);
int cmd_way(int argc, char **argv);
int cmd_int80(int argc, char **argv);
int cmd_x32(int argc, char **argv);
int cmd_inspect(int argc, char **argv);
int cmd_change_fd(int argc, char **argv);
int cmd_new_disks(int argc, char **argv);
int cmd_idlers(int argc, char **argv);
int cmd_mount_compute(int argc, char **argv);
int cmd_hung_exec(int argc, char **argv);
int cmd_nothing(int argc, char **argv);
int cmd_pid_namespace(int argc, char **argv);
int cmd_btrfs_scan(int argc, char **argv);

#endif
