// SPDX-License-Identifier: MIT
/*
 * hotplug: other programs make disks come and go. Here they are opened by their
 * sequence numbers. Once the kernel reports that one was removed, its node is
 * checked until it is gone.
 *
 * Each disk's first sector must differ from that of all others and stay the
 * same. So a disk with another one's data shows.
 */
#include "blk.h"

#include <linux/netlink.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define MAX_DISKS 1024
#define OPENERS 3
#define SECTOR 512
#define ALLOWED_NS (100 * NS_PER_MS)
#define GIVE_UP_NS (10 * NS_PER_S)
/* A late disk says nothing if the machine ran nothing for so long (see exclusive.c). */
#define STALL_NS (30 * NS_PER_MS)
/* How long names of disks that are gone are still opened. */
#define STALE_NS NS_PER_S

struct disk {
	uint64_t seq;
	char devname[64];
	_Atomic uint64_t retired; /* 0: there */
	_Atomic bool known; /* what is in its first sector */
	char sector[SECTOR];
};

struct opens {
	uint64_t n, ok, wrong_diskseq, wrong_data;
	struct errs errors, read_errors;
};

enum kind { DISKS, MEDIA, KINDS };
struct opener {
	pthread_t thread;
	struct opens opens[KINDS];
};

static const char *dir, *only;
static struct disk disks[MAX_DISKS];
static _Atomic int count;
static struct opener openers[OPENERS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct hist gone;
static uint64_t removed, late, disturbed, stayed, changed;
static _Atomic uint64_t stall_ns;
static _Atomic int watchers;

static void path_of(const struct disk *d, char *path, size_t size)
{
	snprintf(path, size, "%s/%llu", dir, (unsigned long long)d->seq);
}

/* ---- those that open ---- */

/* Two disks with the same data, or one with other data than before. */
static bool other_data(struct disk *d, const char *sector)
{
	bool wrong = false;

	pthread_mutex_lock(&mutex);
	if (d->known) {
		wrong = memcmp(d->sector, sector, SECTOR) != 0;
	} else {
		for (int i = 0; i < count; i++)
			wrong |= disks[i].known && memcmp(disks[i].sector, sector, SECTOR) == 0;
		memcpy(d->sector, sector, SECTOR);
		d->known = true;
	}
	pthread_mutex_unlock(&mutex);
	return wrong;
}

static enum kind kind_of(const struct disk *d)
{
	return strncmp(d->devname, "sr", 2) == 0 ? MEDIA : DISKS;
}

static void use(struct opens *o, struct disk *d)
{
	char path[PATH_MAX], sector[SECTOR];
	uint64_t seq = 0;

	path_of(d, path, sizeof path);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	o->n++;
	if (fd < 0) {
		errs_add(&o->errors, errno);
		return;
	}
	int err = blk_diskseq(fd, &seq);
	ssize_t n = err ? 0 : pread(fd, sector, SECTOR, 0);
	if (err || (seq == d->seq && n != SECTOR))
		errs_add(&o->read_errors, err ? -err : n < 0 ? errno : ERR_SHORT);
	else if (seq != d->seq)
		o->wrong_diskseq++;
	else if (other_data(d, sector))
		o->wrong_data++;
	else
		o->ok++;
	close(fd);
}

static void *open_all(void *arg)
{
	struct opener *o = arg;
	struct rnd rnd;

	rnd_seed(&rnd, (uint64_t)(o - openers));
	while (!stop_signal) {
		int n = count, first = (int)rnd_below(&rnd, (unsigned)n);

		for (int i = 0; i < n && !stop_signal; i++) {
			struct disk *d = &disks[(first + i) % n];

			if (d->retired && now_ns() > d->retired + STALE_NS)
				continue;
			use(&o->opens[kind_of(d)], d);
			break;
		}
		sleep_us(3000);
	}
	return NULL;
}

/* ---- what the kernel says ---- */

static void *watch_go(void *arg)
{
	struct disk *d = arg;
	char path[PATH_MAX];
	struct stat st;
	uint64_t asked;
	bool there;

	path_of(d, path, sizeof path);
	do {
		/* The time when the last look began: the disk was gone by then. */
		asked = now_ns();
		there = stat(path, &st) == 0;
		if (there)
			sleep_us(1000);
	} while (there && asked - d->retired < GIVE_UP_NS);
	pthread_mutex_lock(&mutex);
	removed++;
	if (there) {
		stayed++;
	} else if (asked - d->retired > ALLOWED_NS && stall_ns > STALL_NS) {
		disturbed++;
	} else {
		late += asked - d->retired > ALLOWED_NS;
		hist_add(&gone, asked - d->retired);
	}
	pthread_mutex_unlock(&mutex);
	watchers--;
	return NULL;
}

static void add(const char *devname, uint64_t seq)
{
	if (count == MAX_DISKS)
		die("hotplug: too many disks");
	disks[count].seq = seq;
	snprintf(disks[count].devname, sizeof disks[count].devname, "%s", devname);
	count++;
}

/* The present disk of that name. */
static struct disk *find(const char *devname)
{
	for (int i = 0; i < count; i++)
		if (!disks[i].retired && strcmp(disks[i].devname, devname) == 0)
			return &disks[i];
	return NULL;
}

static void take(const char *message, size_t size)
{
	const char *action = NULL, *subsystem = NULL, *devtype = NULL, *devname = NULL;
	uint64_t seq = 0, now = now_ns();

	for (const char *at = message; at < message + size; at += strlen(at) + 1) {
		if (!strncmp(at, "ACTION=", 7))
			action = at + 7;
		else if (!strncmp(at, "SUBSYSTEM=", 10))
			subsystem = at + 10;
		else if (!strncmp(at, "DEVTYPE=", 8))
			devtype = at + 8;
		else if (!strncmp(at, "DEVNAME=", 8))
			devname = at + 8;
		else if (!strncmp(at, "DISKSEQ=", 8))
			seq = strtoull(at + 8, NULL, 10);
	}
	if (!action || !subsystem || !devtype || !devname || strcmp(subsystem, "block") || strcmp(devtype, "disk") ||
	    strspn(devname, only) == 0)
		return;
	if (!strcmp(action, "add")) {
		add(devname, seq);
	} else if (!strcmp(action, "remove")) {
		struct disk *d = find(devname);
		pthread_t thread;

		if (!d)
			return;
		if (watchers == 0)
			stall_ns = 0;
		d->retired = now;
		watchers++;
		if (pthread_create(&thread, NULL, watch_go, d))
			die("pthread_create");
		pthread_detach(thread);
	}
}

/* After a change of medium, the kernel sends no event with the new number. */
static void look_for_media(void)
{
	int n = count;

	for (int i = 0; i < n; i++) {
		char path[128], text[32] = "";
		struct disk *d = &disks[i];

		if (d->retired)
			continue;
		snprintf(path, sizeof path, "/sys/class/block/%s/diskseq", d->devname);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		uint64_t seq = read(fd, text, sizeof text - 1) > 0 ? strtoull(text, NULL, 10) : 0;
		close(fd);
		if (seq == 0 || seq == d->seq)
			continue;
		d->retired = now_ns();
		changed++;
		add(d->devname, seq);
	}
}

#define LLU(x) ((unsigned long long)(x))

int cmd_hotplug(int argc, char **argv)
{
	struct sockaddr_nl address = { .nl_family = AF_NETLINK, .nl_groups = 1 };
	static struct opens all[KINDS];
	double seconds = 0;
	int size = 1 << 20;

	only = "vs"; /* virtio, SCSI */
	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "seconds", OPT_DBL, &seconds, true },
		{ 0 },
	});
	int events = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
	if (events < 0 || bind(events, (struct sockaddr *)&address, sizeof address) < 0 ||
	    setsockopt(events, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size) < 0)
		die("uevents: %s", strerror(errno));
	watch_for_stalls(&stall_ns);
	for (int i = 0; i < OPENERS; i++)
		if (pthread_create(&openers[i].thread, NULL, open_all, &openers[i]))
			die("pthread_create");
	/* Runs before all other processes, as the time is taken here. So do
	 * the watchers that it starts. */
	if (sched_setscheduler(0, SCHED_RR, &(struct sched_param){ .sched_priority = 1 }) < 0)
		die("SCHED_RR: %s", strerror(errno));
	fprintf(stderr, "ready\n");

	uint64_t until = now_ns() + (uint64_t)(seconds * NS_PER_S);
	while (!stop_signal && now_ns() < until) {
		struct pollfd p = { .fd = events, .events = POLLIN };
		char message[8192];
		ssize_t n;

		poll(&p, 1, 20);
		while ((n = recv(events, message, sizeof message - 1, 0)) > 0) {
			message[n] = 0;
			take(message, (size_t)n);
		}
		if (n < 0 && errno == ENOBUFS)
			die("hotplug: events were lost");
		look_for_media();
	}
	int signal = stop_signal;
	while (watchers)
		sleep_us(1000);
	stop_signal = SIGTERM; /* the openers end */
	for (int i = 0; i < OPENERS; i++) {
		struct opener *o = &openers[i];

		pthread_join(o->thread, NULL);
		for (int k = 0; k < KINDS; k++) {
			const struct opens *from = &o->opens[k];

			all[k].n += from->n;
			all[k].ok += from->ok;
			all[k].wrong_diskseq += from->wrong_diskseq;
			all[k].wrong_data += from->wrong_data;
			errs_merge(&all[k].errors, &from->errors);
			errs_merge(&all[k].read_errors, &from->read_errors);
		}
	}
	stop_signal = signal;
	printf("{");
	for (int k = 0; k < KINDS; k++) {
		int names = 0, used = 0;

		for (int i = 0; i < count; i++) {
			names += kind_of(&disks[i]) == (enum kind)k;
			used += kind_of(&disks[i]) == (enum kind)k && disks[i].known;
		}
		printf("\"%s\":{\"names\":%d,\"used\":%d,\"opens\":%llu,\"opens_ok\":%llu,", k == DISKS ? "disks" : "media",
		       names, used, LLU(all[k].n), LLU(all[k].ok));
		printf("\"wrong_diskseq\":%llu,\"wrong_data\":%llu,", LLU(all[k].wrong_diskseq), LLU(all[k].wrong_data));
		errs_print("errors", &all[k].errors);
		printf(",");
		errs_print("read_errors", &all[k].read_errors);
		printf("},");
	}
	printf("\"removed\":%llu,\"late\":%llu,\"stayed\":%llu,\"disturbed\":%llu,\"media_changes\":%llu,", LLU(removed),
	       LLU(late), LLU(stayed), LLU(disturbed), LLU(changed));
	printf("\"p50_gone_ms\":%.1f,\"max_gone_ms\":%.1f}\n", (double)hist_pct(&gone, 50) / 1e6, (double)gone.max / 1e6);
	return exit_status();
}
