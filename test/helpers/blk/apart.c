/* Runs a program in a pid namespace of its own, with the /proc of the outer one. */
#include "blk.h"

#include <sched.h>
#include <sys/prctl.h>
#include <sys/wait.h>

/* COMMAND ...: signals are passed on to it. */
int cmd_pid_namespace(int argc, char **argv)
{
	int status = 0;

	if (argc < 2)
		die("pid-namespace: no command");
	if (unshare(CLONE_NEWPID) < 0)
		die("unshare: %s", strerror(errno));
	pid_t pid = fork();
	if (pid < 0)
		die("fork: %s", strerror(errno));
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
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
