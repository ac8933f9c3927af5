// SPDX-License-Identifier: MIT
/* Runs a program in a pid namespace of its own. */
#include "blk.h"

#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/wait.h>

/* Mounts a /proc of its own, and so needs a mount namespace of its own. */
static void mount_proc(void)
{
	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || mount("proc", "/proc", "proc", 0, NULL) < 0)
		die("/proc: %s", strerror(errno));
}

/* [--own-proc] COMMAND ...: runs it and passes signals on to it. */
int cmd_pid_namespace(int argc, char **argv)
{
	bool own_proc = argc > 1 && !strcmp(argv[1], "--own-proc");
	int status = 0;

	argv += own_proc;
	if (argc < 2 + own_proc)
		die("pid-namespace: no command");
	if (unshare(CLONE_NEWPID) < 0)
		die("unshare: %s", strerror(errno));
	pid_t pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (own_proc)
			mount_proc();
		execvp(argv[1], argv + 1);
		die("%s: %s", argv[1], strerror(errno));
	}
	while (waitpid(pid, &status, WNOHANG) != pid) {
		if (stop_signal) {
			kill(pid, stop_signal);
			stop_signal = 0;
		}
		sleep_us(10000);
	}
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
