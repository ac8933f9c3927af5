// SPDX-License-Identifier: MIT
/* The kernel opens the disk itself, and no descriptor of it is left. */
#include "churn_ways.h"

#include <linux/capability.h>
#include <linux/mount.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

/* Some versions of libc do not allow sys/mount.h and linux/mount.h together. */
int mount(const char *, const char *, const char *, unsigned long, const void *);
int umount2(const char *, int);

void own_mounts(const struct churn *c)
{
	(void)c;
	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		die("a mount namespace: %s", strerror(errno));
}

/* Keeps nothing but CAP_SYS_ADMIN. */
void may_only_mount(const struct churn *c)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct sets[2] = { { 0 } };

	own_mounts(c);
	prctl(PR_SET_KEEPCAPS, 1);
	become(NOBODY);
	sets[0].effective = sets[0].permitted = 1u << CAP_SYS_ADMIN;
	if (syscall(SYS_capset, &header, sets) < 0)
		die("capset: %s", strerror(errno));
}

int diskseq_of(dev_t number, uint64_t *diskseq)
{
	char path[64], text[32] = "";

	snprintf(path, sizeof path, "/sys/dev/block/%u:%u/diskseq", major(number), minor(number));
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	int err = fd < 0 || read(fd, text, sizeof text - 1) < 0 ? -errno : 0;
	close(fd);
	*diskseq = strtoull(text, NULL, 10);
	return err;
}

int mounted(const char *path, const struct entry *e, uint64_t *diskseq)
{
	struct stat st;
	int err = stat(MOUNTPOINT, &st) < 0 ? -errno : diskseq_of(st.st_dev, diskseq);

	(void)path;
	(void)e;
	while (umount2(MOUNTPOINT, 0) < 0) {
		if (errno != EBUSY && errno != EINTR)
			die("umount: %s", strerror(errno));
		sleep_us(100);
	}
	return err;
}

/* Without PIE these strings, and the path, lie below 4 GiB. */
static char source[PATH_MAX], target[] = MOUNTPOINT, type[] = "ext4", nothing[] = "";

int by_mount(const struct churn *c, const char *path, int flags)
{
	(void)c;
	(void)flags;
	snprintf(source, sizeof source, "%s", path);
	return result(mount(source, target, type, MS_RDONLY, nothing));
}

static long configure(int fs, unsigned command, const char *key, const char *value)
{
	return syscall(SYS_fsconfig, fs, command, key, value, 0);
}

/* FSCONFIG_CMD_CREATE looks the path up, and does not have it among its arguments. */
int by_fsconfig(const struct churn *c, const char *path, int flags)
{
	int fs = (int)syscall(SYS_fsopen, type, FSOPEN_CLOEXEC), err, mnt;

	(void)c;
	(void)flags;
	if (fs < 0 || configure(fs, FSCONFIG_SET_STRING, "source", path) < 0 || configure(fs, FSCONFIG_SET_FLAG, "ro", NULL) < 0)
		die("fsopen, fsconfig: %s", strerror(errno));
	err = result(configure(fs, FSCONFIG_CMD_CREATE, NULL, NULL));
	if (!err) {
		mnt = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
		if (mnt < 0 || syscall(SYS_move_mount, mnt, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH) < 0)
			die("fsmount, move_mount: %s", strerror(errno));
		close(mnt);
	}
	close(fs);
	return err;
}

/* ---- swap ---- */

/* /proc/swaps shows the path of a swap area and its size, but not its device. So each disk
 * gets a size of its own, in pages: from the least that the kernel accepts to the most that an
 * image has room for. (Two disks have the same size in one of a thousand cases.) */
#define SWAP_PAGES_MIN 10
#define SWAP_PAGES_MORE 1000

static uint32_t swap_pages(uint64_t tag)
{
	return SWAP_PAGES_MIN + (uint32_t)(tag % SWAP_PAGES_MORE);
}

/* union swap_header of linux/swap.h: the number of the last page, counted from the header. */
#define SWAP_LAST_PAGE_AT 1028

void mark_swap(int file, uint64_t tag)
{
	uint32_t last = swap_pages(tag);

	if (pwrite(file, &last, sizeof last, SWAP_LAST_PAGE_AT) != sizeof last)
		die("write to a backing file: %s", strerror(errno));
}

int by_swapon(const struct churn *c, const char *path, int flags)
{
	(void)c;
	(void)flags;
	return result(swapon(path, 0));
}

/* The size of the swap area with this path, in pages. */
static uint32_t swap_size(const char *path)
{
	char line[2 * PATH_MAX], name[PATH_MAX];
	unsigned long long kib, found = 0;
	size_t length = strlen(path);
	FILE *f = fopen("/proc/swaps", "re");

	if (!f)
		die("/proc/swaps: %s", strerror(errno));
	/* If the kernel has dropped the name meanwhile, "\040(deleted)" follows it. */
	while (fgets(line, sizeof line, f))
		if (sscanf(line, "%4095s %*s %llu", name, &kib) == 2 && !strncmp(name, path, length) && strchr("\\", name[length]))
			found = kib;
	fclose(f);
	if (!found)
		die("/proc/swaps: no %s", path);
	return (uint32_t)(found * 1024 / (unsigned long)sysconf(_SC_PAGESIZE));
}

static void device_path(char path[32], int nr)
{
	snprintf(path, 32, "/dev/loop%d", nr);
}

/* Turns the right disk off by its name in the tree, which swapoff(2) opens once more. A wrong
 * disk no longer has that name, and neither has one that nothing held (a twin); such a disk is
 * on the device that the right one had. */
int swapped(const char *path, const struct entry *e, uint64_t *diskseq)
{
	char device[32];
	bool right = swap_size(path) == swap_pages(e->tag);

	device_path(device, e->nr);
	*diskseq = right ? e->diskseq : 0;
	const char *name = right ? path : device;
	int err = 0;
	while (swapoff(name) < 0) {
		if ((errno == ENOENT || errno == ENXIO) && name == path) {
			err = -errno;
			name = device;
		} else if (errno != EINTR) {
			die("swapoff %s: %s", name, strerror(errno));
		}
	}
	return err;
}

void release_swap(int nr)
{
	char device[32];

	device_path(device, nr);
	if (swapoff(device) < 0 && errno != EINVAL && errno != ENXIO && errno != ENOENT)
		die("swapoff %s: %s", device, strerror(errno));
}
