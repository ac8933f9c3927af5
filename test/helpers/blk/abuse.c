// SPDX-License-Identifier: MIT
/* A process that makes requests all the time: for names that exist and names that do not, with many
 * threads. */
#include "blk.h"

#include <dirent.h>
#include <grp.h>
#include <pthread.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#define THREADS_MAX 1024
/* These threads need no deep stack. */
#define STACK_BYTES (256 * 1024)
#define FIRST_GROUP 200000

static const char *dir;
/* Each thread has the rights of another user, from this uid on. */
static int first_uid;
static char **real;
static int reals;

/* Returns an errno, or 0. */
static int opened(const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	close(fd);
	return 0;
}

/* A string that is no name in the tree. */
static int random_name(struct rnd *r, unsigned turn)
{
	char path[PATH_MAX];
	struct stat st;

	snprintf(path, sizeof path, "%s/x%016llx", dir, (unsigned long long)rnd_next(r));
	return turn % 2 ? opened(path) : stat(path, &st) < 0 ? errno : 0;
}

/* A string that could be the name of a disk, or of a partition, but is none. */
static int random_number(struct rnd *r, unsigned turn)
{
	char path[PATH_MAX];
	struct stat st;

	snprintf(path, sizeof path, "%s/%llu%s", dir, 1000000000000ull + rnd_next(r) % 1000000000000ull,
		 turn % 4 < 2 ? "" : "p1");
	return turn % 2 ? opened(path) : stat(path, &st) < 0 ? errno : 0;
}

static int real_stat(struct rnd *r, unsigned turn)
{
	struct stat st;

	(void)turn;
	return stat(real[rnd_below(r, (unsigned)reals)], &st) < 0 ? errno : 0;
}

static int real_open(struct rnd *r, unsigned turn)
{
	(void)r;
	return opened(real[turn % (unsigned)reals]);
}

static int listing(struct rnd *r, unsigned turn)
{
	DIR *d = opendir(dir);

	(void)r;
	(void)turn;
	if (!d)
		return errno;
	while (readdir(d))
		;
	closedir(d);
	return 0;
}

/* All of these are refused. But the kernel looks the name up first, and
 * keeps all others out of the directory meanwhile. */
static int made(struct rnd *r, bool number, int (*make)(const char *path))
{
	char path[PATH_MAX];

	if (number)
		snprintf(path, sizeof path, "%s/%llu", dir, 1000000000000ull + rnd_next(r) % 1000000000000ull);
	else
		snprintf(path, sizeof path, "%s/x%016llx", dir, (unsigned long long)rnd_next(r));
	return make(path) < 0 ? errno : 0;
}

static int make_directory(const char *path)
{
	return mkdir(path, 0700);
}

static int make_file(const char *path)
{
	return open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
}

static int make_symlink(const char *path)
{
	return symlink("x", path);
}

static int make_by_rename(const char *path)
{
	char from[PATH_MAX];

	snprintf(from, sizeof from, "%s0", path);
	return rename(from, path);
}

/* Half of the names are numbers of no disk, half are no numbers. */
static int making(struct rnd *r, unsigned turn)
{
	return made(r, turn % 2, make_directory);
}

static int creating(struct rnd *r, unsigned turn)
{
	return made(r, turn % 2, make_file);
}

static int linking(struct rnd *r, unsigned turn)
{
	return made(r, turn % 2, make_symlink);
}

static int renaming(struct rnd *r, unsigned turn)
{
	return made(r, turn % 2, make_by_rename);
}

/* A partition that a disk does not have. */
static int making_partition(struct rnd *r, unsigned turn)
{
	char path[PATH_MAX];

	snprintf(path, sizeof path, "%sp%u", real[turn % (unsigned)reals], 10 + rnd_below(r, 100));
	return mkdir(path, 0700) < 0 ? errno : 0;
}

/* Has the kernel write out all groups of the caller, as others may do that want to know them. */
static int own_status(struct rnd *r, unsigned turn)
{
	static _Thread_local char buf[4096];
	int fd = open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
	ssize_t n;

	(void)r;
	(void)turn;
	while ((n = read(fd, buf, sizeof buf)) > 0)
		;
	close(fd);
	return n < 0 ? errno : 0;
}

static const struct kind {
	const char *name;
	int (*call)(struct rnd *r, unsigned turn);
} kinds[] = {
	{ "names", random_name },
	{ "numbers", random_number },
	{ "stat", real_stat },
	{ "open", real_open },
	{ "list", listing },
	{ "mkdir", making },
	{ "creat", creating },
	{ "symlink", linking },
	{ "rename", renaming },
	{ "mkdir-part", making_partition },
	{ "status", own_status },
};
#define KINDS (sizeof kinds / sizeof *kinds)

static struct asker {
	pthread_t thread;
	int kind;
	unsigned turn; /* the first one, then the next one */
	uint64_t n, max_ns;
	struct errs errors;
} askers[THREADS_MAX];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool on, ending;
static int busy;

/* Changes the ids of one thread only; the library's call would change those of all threads. */
static void become_alone(int uid)
{
	if (syscall(SYS_setresgid, uid, uid, uid) < 0 || syscall(SYS_setresuid, uid, uid, uid) < 0)
		die("setresuid: %s", strerror(errno));
}

static void have_groups(int count)
{
	gid_t *groups = calloc((size_t)count, sizeof *groups);

	if (!groups)
		die("abuse: out of memory");
	for (int i = 0; i < count; i++)
		groups[i] = (gid_t)(FIRST_GROUP + i);
	if (setgroups((size_t)count, groups) < 0)
		die("setgroups: %s", strerror(errno));
	free(groups);
}

static void *ask(void *arg)
{
	struct asker *a = arg;
	struct rnd r;

	rnd_seed(&r, (uint64_t)(a - askers));
	if (first_uid)
		become_alone(first_uid + (int)(a - askers));
	pthread_mutex_lock(&lock);
	for (;;) {
		while (!on && !ending)
			pthread_cond_wait(&changed, &lock);
		if (ending)
			break;
		busy++;
		while (on && !ending) {
			pthread_mutex_unlock(&lock);
			uint64_t t = now_ns(), took;
			int err = kinds[a->kind].call(&r, a->turn++);
			took = now_ns() - t;
			a->n++;
			if (took > a->max_ns)
				a->max_ns = took;
			if (err)
				errs_add(&a->errors, err);
			pthread_mutex_lock(&lock);
		}
		busy--;
		pthread_cond_broadcast(&changed);
	}
	pthread_mutex_unlock(&lock);
	return NULL;
}

/* Starts or stops the threads. When it stops them, it returns after the last call has ended. */
static void set(bool to, bool end)
{
	pthread_mutex_lock(&lock);
	on = to;
	ending = end;
	pthread_cond_broadcast(&changed);
	while (!on && busy > 0)
		pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
}

static void learn_name(const char *name)
{
	real = realloc(real, ((size_t)reals + 1) * sizeof *real);
	if (!real || asprintf(&real[reals++], "%s/%s", dir, name) < 0)
		die("abuse: out of memory");
}

static void learn_names(char *given)
{
	if (given) {
		for (char *name = strtok(given, ","); name; name = strtok(NULL, ","))
			learn_name(name);
	} else {
		DIR *d = opendir(dir);

		if (!d)
			die("%s: %s", dir, strerror(errno));
		for (struct dirent *e; (e = readdir(d));)
			if (e->d_name[0] != '.')
				learn_name(e->d_name);
		closedir(d);
	}
	if (!reals)
		die("abuse: %s is empty", dir);
}

static int kind_named(const char *name)
{
	for (size_t i = 0; i < KINDS; i++)
		if (!strcmp(kinds[i].name, name))
			return (int)i;
	die("bad value for --kinds: %s (names, numbers, stat, open, list, mkdir, creat, symlink, rename, mkdir-part or status)", name);
}

static void print(int threads)
{
	printf("{");
	for (size_t k = 0; k < KINDS; k++) {
		static struct errs errors;
		uint64_t n = 0, max = 0;

		memset(&errors, 0, sizeof errors);
		for (int i = 0; i < threads; i++) {
			if (askers[i].kind != (int)k)
				continue;
			n += askers[i].n;
			if (askers[i].max_ns > max)
				max = askers[i].max_ns;
			errs_merge(&errors, &askers[i].errors);
		}
		printf("%s\"%s\":{\"n\":%llu,\"max_ms\":%.1f,", k ? "," : "", kinds[k].name, (unsigned long long)n,
		       (double)max / 1e6);
		errs_print("errors", &errors);
		printf("}");
	}
	printf("}\n");
}

/* A line on stdin starts the threads, and the next one stops them; the end
 * of stdin ends the program. --names: the disks to ask for, "1,2,3"; by
 * default all. --groups: how many groups each thread is in, if the threads
 * are of different users. */
int cmd_abuse(int argc, char **argv)
{
	const char *kind_names = "names,numbers,stat,open,list", *names = NULL;
	int threads = 100, uid = 0, groups = 0, used[KINDS], uses = 0;
	pthread_attr_t attr;

	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "uid", OPT_INT, &uid, false },
		{ "first-uid", OPT_INT, &first_uid, false },
		{ "groups", OPT_INT, &groups, false },
		{ "threads", OPT_INT, &threads, false },
		{ "kinds", OPT_STR, &kind_names, false },
		{ "names", OPT_STR, &names, false },
		{ 0 },
	});
	if (threads < 1 || threads > THREADS_MAX)
		die("bad value for --threads");
	char *list = strdup(kind_names);
	for (char *k = strtok(list, ","); k && uses < (int)KINDS; k = strtok(NULL, ","))
		used[uses++] = kind_named(k);
	learn_names(names ? strdup(names) : NULL);
	if (groups)
		have_groups(groups);
	else
		become(uid);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	for (int i = 0; i < threads; i++) {
		askers[i].kind = used[i % uses];
		/* Each thread begins with a name of its own. */
		askers[i].turn = (unsigned)(i / uses);
		int err = pthread_create(&askers[i].thread, &attr, ask, &askers[i]);
		if (err)
			die("pthread_create: %s", strerror(err));
	}
	printf("ready\n");
	fflush(stdout);
	for (int lines; (lines = told()) > 0;) {
		while (lines-- > 0) {
			set(!on, false);
			printf("%s\n", on ? "on" : "off");
			fflush(stdout);
		}
	}
	set(false, true);
	for (int i = 0; i < threads; i++)
		pthread_join(askers[i].thread, NULL);
	print(threads);
	return exit_status();
}

/* Opens the directory many times, says "ready", and closes nothing before stdin ends. */
int cmd_abuse_directories(int argc, char **argv)
{
	int count = 0, uid = 0;

	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "uid", OPT_INT, &uid, true },
		{ "count", OPT_INT, &count, true },
		{ 0 },
	});
	become(uid);
	for (int i = 0; i < count; i++)
		if (open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC) < 0)
			die("open %s: %s", dir, strerror(errno));
	printf("ready\n");
	fflush(stdout);
	wait_for_end();
	printf("{\"directories\":%d}\n", count);
	return exit_status();
}
