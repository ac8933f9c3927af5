// SPDX-License-Identifier: MIT
/* Device-mapper tables that name their device by path: the kernel looks the path up. */
#include "churn_ways.h"

#include <linux/dm-ioctl.h>
#include <sys/ioctl.h>

#define TABLES "churn-table-"
#define TABLE_SECTORS 8

struct dm_request {
	struct dm_ioctl io;
	union {
		struct {
			struct dm_target_spec target;
			char parameters[PATH_MAX];
		};
		struct dm_target_deps deps;
		struct dm_name_list names;
		char room[16384];
	};
};

static int dm_control = -1;
/* The name of the table on this opener's device. */
static char table_name[DM_NAME_LEN];

static int dm(unsigned long call, const char *name, struct dm_request *q)
{
	q->io.version[0] = DM_VERSION_MAJOR;
	q->io.data_size = sizeof *q;
	q->io.data_start = offsetof(struct dm_request, target);
	snprintf(q->io.name, sizeof q->io.name, "%s", name);
	return ioctl(dm_control, call, q) < 0 ? -errno : 0;
}

static int dm_simple(unsigned long call, const char *name)
{
	struct dm_request q = { 0 };

	return dm(call, name, &q);
}

static void open_dm_control(void)
{
	dm_control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
	if (dm_control < 0)
		die("/dev/mapper/control: %s", strerror(errno));
}

void make_table(const struct churn *c)
{
	(void)c;
	open_dm_control();
	snprintf(table_name, sizeof table_name, TABLES "%d", (int)getpid());
	int err = dm_simple(DM_DEV_CREATE, table_name);
	if (err)
		die("%s: %s", table_name, strerror(-err));
}

int by_table(const struct churn *c, const char *path, int flags)
{
	struct dm_request q = { .io = { .flags = DM_READONLY_FLAG, .target_count = 1 }, .target.length = TABLE_SECTORS };

	(void)c;
	(void)flags;
	snprintf(q.target.target_type, sizeof q.target.target_type, "linear");
	snprintf(q.parameters, sizeof q.parameters, "%s 0", path);
	return dm(DM_TABLE_LOAD, table_name, &q);
}

int table_reached(const char *path, const struct entry *e, uint64_t *diskseq)
{
	struct dm_request q = { .io.flags = DM_QUERY_INACTIVE_TABLE_FLAG };
	int err = dm(DM_TABLE_DEPS, table_name, &q);

	(void)path;
	(void)e;
	if (!err && q.deps.count != 1)
		die("%s: %u devices", table_name, q.deps.count);
	if (!err)
		err = diskseq_of((dev_t)q.deps.dev[0], diskseq);
	int cleared = dm_simple(DM_TABLE_CLEAR, table_name);
	if (cleared)
		die("%s: its table stays: %s", table_name, strerror(-cleared));
	return err;
}

void remove_tables(void)
{
	struct dm_request q = { 0 };

	open_dm_control();
	int err = dm(DM_LIST_DEVICES, "", &q);
	if (err)
		die("DM_LIST_DEVICES: %s", strerror(-err));
	const struct dm_name_list *item = &q.names;
	while (item->dev) {
		if (!strncmp(item->name, TABLES, strlen(TABLES)))
			dm_simple(DM_DEV_REMOVE, item->name);
		if (!item->next)
			break;
		item = (const struct dm_name_list *)((const char *)item + item->next);
	}
}
