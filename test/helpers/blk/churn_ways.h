/* What the files of ways (churn_ways*.c) share: each has those of one kind, churn_ways.c the table. */
#ifndef CHURN_WAYS_H
#define CHURN_WAYS_H

#include "churn.h"

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

#endif
