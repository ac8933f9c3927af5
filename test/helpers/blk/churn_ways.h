// SPDX-License-Identifier: MIT
/* Shared by churn_ways*.c. Each file has the ways of one kind; churn_ways.c has the table. */
#ifndef CHURN_WAYS_H
#define CHURN_WAYS_H

#include "churn.h"

#include <semaphore.h>

#define NOBODY 65534

static inline int result(long r)
{
	return r < 0 ? -errno : (int)r;
}

/* Sleeps for a random time, or not at all. */
void pause_sometimes(void);

/* ---- the kernel opens the disk itself (churn_ways_mounts.c) ---- */

/* In a mount namespace of its own, a directory that exists everywhere may be covered. */
#define MOUNTPOINT "/dev/shm"

int mounted(const char *path, const struct entry *e, uint64_t *diskseq);
void own_mounts(const struct churn *c);
void may_only_mount(const struct churn *c);
int by_mount(const struct churn *c, const char *path, int flags);
int by_fsconfig(const struct churn *c, const char *path, int flags);

int swapped(const char *path, const struct entry *e, uint64_t *diskseq);
int by_swapon(const struct churn *c, const char *path, int flags);
void mark_swap(int file, uint64_t tag);
void release_swap(int nr);

/* The diskseq of a device that is open; 0 or -errno. */
int diskseq_of(dev_t number, uint64_t *diskseq);

/* ---- the same, for a device-mapper table (churn_ways_tables.c) ---- */

void make_table(const struct churn *c);
int by_table(const struct churn *c, const char *path, int flags);
int table_reached(const char *path, const struct entry *e, uint64_t *diskseq);
void remove_tables(void);

/* ---- another process opens the disk (churn_ways_proxies.c) ---- */

/* A process that opens disks for an opener. It shares the opener's descriptor table, so that
 * the opener can use what it opens, and this structure, but no other memory. */
struct proxy {
	char path[PATH_MAX];
	int flags;
	int fd; /* the result: a descriptor or -errno */
	int listener; /* receives its seccomp notifications (churn_ways_traced.c) */
	sem_t asked, done;
	int parent; /* pidfd */
	pid_t pid;
};

/* Calls "run" in such a process. "flags": additional flags for clone(2). */
struct proxy *proxy_start(void (*run)(struct proxy *p), int flags);
/* Sets what the proxy is to open next. */
void proxy_tell(struct proxy *p, const char *path, int flags);
/* 0, or -EINTR if this process is to end. */
int proxy_wait(struct proxy *p, sem_t *sem);
/* Waits until the child stops or ends: its pid, or -EINTR as above. */
int wait_for_child(pid_t pid, int *status);
/* Opens each path that it is told to, one after another. */
void proxy_opens(struct proxy *p);

void start_sharing(const struct churn *c);
void start_in_pid_namespace(const struct churn *c);
void start_in_namespace_of(const struct churn *c);
void start_in_user_namespace(const struct churn *c);
void start_in_user_namespace_of_nobody(const struct churn *c);
int by_proxy(const struct churn *c, const char *path, int flags);
int by_vfork(const struct churn *c, const char *path, int flags);
int by_exec(const struct churn *c, const char *path, int flags);

/* ---- another process controls the call (churn_ways_traced.c) ---- */

void start_traced(const struct churn *c);
int by_traced(const struct churn *c, const char *path, int flags);
#ifdef __x86_64__
void start_replaced(const struct churn *c);
int by_replaced(const struct churn *c, const char *path, int flags);
#endif
void start_notifying(const struct churn *c);
int by_supervisor(const struct churn *c, const char *path, int flags);
int by_notified(const struct churn *c, const char *path, int flags);

#endif
