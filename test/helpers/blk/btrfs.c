// SPDX-License-Identifier: MIT
/* Has the kernel look up a path in an ioctl(2) for btrfs. */
#include "blk.h"

#include <linux/btrfs.h>
#include <sys/ioctl.h>

/* --path: of a device. Prints the result, 0 or an errno. Nothing is written. */
int cmd_btrfs_scan(int argc, char **argv)
{
	const char *path = NULL;
	static struct btrfs_ioctl_vol_args args;

	parse_opts(argc, argv, (const struct opt[]){
		{ "path", OPT_STR, &path, true },
		{ 0 },
	});
	int control = open("/dev/btrfs-control", O_RDWR | O_CLOEXEC);

	if (control < 0)
		die("/dev/btrfs-control: %s", strerror(errno));
	snprintf(args.name, sizeof args.name, "%s", path);
	printf("%s\n", ioctl(control, BTRFS_IOC_SCAN_DEV, &args) < 0 ? strerrorname_np(errno) : "0");
	return exit_status();
}
