/* What the files of ways (churn_ways*.c) share: each has those of one kind, churn_ways.c the table. */
#ifndef CHURN_WAYS_H
#define CHURN_WAYS_H

#include "churn.h"

#include <semaphore.h>

#define NOBODY 65534

static inline int result(long r)
{
	return r < 0 ? -errno : (int)r;
}

/* Between two steps: often there is nothing, as where a program does them. */
void pause_sometimes(void);

/* ---- what is not opened by its user (churn_ways_mounts.c) ---- */

/* In a namespace of its own a directory that everybody has may be covered. */
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

/* ---- opened by another process than the one that uses it (churn_ways_proxies.c) ---- */

/* A process that opens disks for an opener. It shares the opener's table of descriptors, so
 * that what it has opened the opener has, and this structure; no other memory. */
struct proxy {
	char path[PATH_MAX];
	int flags;
	int fd; /* that it has opened, or -errno */
	int listener; /* for its notifications, if it has any (churn_ways_traced.c) */
	sem_t asked, done;
	pid_t pid;
};

/* Has "run" called in such a process. "flags": further ones of clone(2). */
struct proxy *proxy_start(void (*run)(struct proxy *p), int flags);
/* Tells the proxy what is wanted next. */
void proxy_tell(struct proxy *p, const char *path, int flags);
/* Waits for the other side; -EINTR when this one is to end. */
int proxy_wait(struct proxy *p, sem_t *sem);
/* Its pid, once it has stopped or ended; -EINTR as above. */
int wait_for_child(pid_t pid, int *status);
/* What is wanted is opened, again and again. */
void proxy_opens(struct proxy *p);

void start_sharing(const struct churn *c);
void start_in_pid_namespace(const struct churn *c);
void start_in_namespace_of(const struct churn *c);
void start_in_user_namespace(const struct churn *c);
void start_in_user_namespace_of_nobody(const struct churn *c);
int by_proxy(const struct churn *c, const char *path, int flags);
int by_vfork(const struct churn *c, const char *path, int flags);
int by_exec(const struct churn *c, const char *path, int flags);

/* ---- others have a say in the call (churn_ways_traced.c) ---- */

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
