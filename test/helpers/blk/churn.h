// SPDX-License-Identifier: MIT
/*
 * churn: loop devices get new disks as fast as the kernel allows, while others
 * open disks by their sequence number and check what they got.
 *
 * The recyclers publish what they configured in a table in shared memory, and
 * the openers pick names from it. Each disk has a stamp with a tag that no
 * other disk of the run has, in its first sector and in the first one of its
 * partition. So a wrong disk shows even if all numbers agree.
 */
#ifndef CHURN_H
#define CHURN_H

#include "blk.h"

#define MAX_RECYCLERS 16
#define MAX_OPENERS 64
#define MAX_SLOTS 256
#define MAX_DEVICES 32 /* of one recycler */

#define SECTOR 512
#define FILE_SIZE (64 * 1024)
#define PART_START 8192
#define PART_SIZE 16384

struct stamp {
	char magic[8];
	uint64_t tag;
	uint64_t where; /* the stamp's offset: a partition is not the disk */
};
#define STAMP_MAGIC "blkchurn"

/* Written by the recycler only, under a seqlock: seq is odd during a write. */
struct slot {
	_Atomic uint32_t seq;
	_Atomic int nr;
	_Atomic uint64_t diskseq; /* 0: never used */
	_Atomic uint64_t tag;
	_Atomic uint64_t retired; /* when, in ns; 0: live */
};

struct entry {
	int nr;
	uint64_t diskseq, tag, retired;
};

struct recycler_shared {
	struct slot ring[MAX_SLOTS];
	/* Statistics, written by the recycler and read after its end. */
	uint64_t configures, recycles, busy, minor_moves;
	uint64_t unlinked; /* disks that had no right link from udev in time */
	struct hist reuse; /* from a disk's retirement to the next one's birth */
	struct errs errors;
};

struct opener_shared {
	bool idle;
	uint64_t opens, ok, ok_part, ok_stale;
	uint64_t wrong_diskseq, wrong_data, wrong_part, read_other_disk;
	uint64_t max_failed_ns;
	struct errs errors, read_errors;
	struct hist hist;
	/* The first wrong open, as a help to explain it. */
	uint64_t first_asked, first_got;
};

/* How an opener comes to a disk (churn_ways*.c). */
struct churn;
struct churn_way {
	const char *name;
	/* For a way that leaves no descriptor (a mount, say): finds out which disk was reached
	 * and releases it. Returns 0 or -errno; a diskseq of 0 means an unknown wrong disk.
	 * Nothing is then read from the device itself. */
	int (*reached)(const char *path, const struct entry *e, uint64_t *diskseq);
	/* Runs once in each opener, before all else. */
	void (*begin)(const struct churn *c);
	/* Returns a descriptor, or 0 if "reached" identifies the disk, or -errno. */
	int (*open)(const struct churn *c, const char *path, int flags);
	/* Makes a disk's copy of the image differ from all others, if "reached" needs that. */
	void (*mark)(int file, uint64_t tag);
	/* Releases a device for an opener that was killed before it could. */
	void (*release)(int nr);
	/* Runs once in churn, when all openers have ended. */
	void (*end)(void);
	/* The disks need an --image. */
	bool image;
};
const struct churn_way *churn_way_named(const char *name);

struct churn {
	const struct churn_way *way;
	/* The contents of the disks, if not only stamps. */
	const char *image;
	/* Owner and group of the device nodes. */
	int node_uid, node_gid;
	/* A process whose children are in another pid namespace than its own. */
	int namespace_of;
	/* links: made by the recyclers. udev: made by udev, and used once they are right. */
	/* paths are DIR/.dm/DISKSEQ/loopN */
	bool kernel_names;
	bool links, udev, parts;
	const char *dir, *workdir;
	int recyclers, openers, slots, devices;
	int live_us, stale_ms, stale_pct;

	_Atomic bool stop;
	char msg[512]; /* of a child that gave up */
	int nrs[MAX_RECYCLERS * MAX_DEVICES];
	/* The loop device that had the partition with this minor last, + 1. */
	_Atomic int minor_owner[4096];
	struct recycler_shared rec[MAX_RECYCLERS];
	struct opener_shared op[MAX_OPENERS];
};

static inline bool churn_stopped(struct churn *c)
{
	return stop_signal || atomic_load_explicit(&c->stop, memory_order_relaxed);
}

_Noreturn void churn_recycler(struct churn *c, int id);
_Noreturn void churn_opener(struct churn *c, int id);

#endif
