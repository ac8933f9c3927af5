// SPDX-License-Identifier: MIT
#include "blk.h"

static const struct {
	const char *name;
	int (*run)(int argc, char **argv);
} commands[] = {
	{ "churn", cmd_churn },
	{ "pingpong", cmd_pingpong },
	{ "openlat", cmd_openlat },
	{ "latency", cmd_latency },
	{ "throughput", cmd_throughput },
	{ "cold-open", cmd_cold_open },
	{ "appear", cmd_appear },
	{ "hold", cmd_hold },
	{ "exclusive-zram", cmd_exclusive_zram },
	{ "exclusive-part", cmd_exclusive_part },
	{ "partition", cmd_partition },
	{ "watch", cmd_watch },
	{ "loops", cmd_loops },
	{ "loop-detach", cmd_loop_detach },
	{ "loop-new", cmd_loop_new },
	{ "loop-remove", cmd_loop_remove },
	{ "loop-stall", cmd_loop_stall },
	{ "nbd-silent", cmd_nbd_silent },
	{ "hungfs", cmd_hungfs },
	{ "uring-open", cmd_uring_open },
	{ "open-stopped", cmd_open_stopped },
	{ "delays", cmd_delays },
	{ "mount", cmd_mount },
	{ "dm-race", cmd_dm_race },
	{ "hotplug", cmd_hotplug },
	{ "abuse", cmd_abuse },
	{ "abuse-directories", cmd_abuse_directories },
	{ "directory", cmd_directory },
	{ "way", cmd_way },
	{ "int80", cmd_int80 },
	{ "x32", cmd_x32 },
	{ "inspect", cmd_inspect },
	{ "change-fd", cmd_change_fd },
	{ "new-disks", cmd_new_disks },
	{ "idlers", cmd_idlers },
	{ "mount-compute", cmd_mount_compute },
	{ "hung-exec", cmd_hung_exec },
	{ "nothing", cmd_nothing },
	{ "pid-namespace", cmd_pid_namespace },
	{ "btrfs-scan", cmd_btrfs_scan },
};

int main(int argc, char **argv)
{
	if (argc < 2)
		die("usage: blk churn|pingpong|openlat|latency|throughput|cold-open|appear|hold|exclusive-zram|exclusive-part|"
		    "partition|watch|loops|loop-detach|loop-new|loop-remove|loop-stall|nbd-silent|hungfs|uring-open|open-stopped|delays|mount|dm-race|hotplug|abuse|abuse-directories|directory|int80|x32|inspect|change-fd|new-disks|idlers|mount-compute|hung-exec|nothing|pid-namespace|btrfs-scan|way --option value ...");
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
		if (strcmp(argv[1], commands[i].name) == 0) {
			catch_signals();
			return commands[i].run(argc - 1, argv + 1);
		}
	}
	die("unknown subcommand %s", argv[1]);
}
