/* Somebody who asks all day long: for names there are and names there are not, with many threads at once. */
#include "blk.h"

#include <dirent.h>
#include <grp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/stat.h>

#define THREADS_MAX 1024
/* Nobody needs a deep stack here. */
#define STACK_BYTES (256 * 1024)

static const char *dir;
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

/* A string that is the name of nothing. */
static int random_name(struct rnd *r, unsigned turn)
{
	char path[PATH_MAX];
	struct stat st;

	snprintf(path, sizeof path, "%s/x%016llx", dir, (unsigned long long)rnd_next(r));
	return turn % 2 ? opened(path) : stat(path, &st) < 0 ? errno : 0;
}

/* What could be the name of a disk, or of a partition, and is not. */
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

/* Refused; but the kernel looks the name up first, and keeps everybody else out of the directory meanwhile. */
static int making(struct rnd *r, unsigned turn)
{
	char path[PATH_MAX];

	(void)turn;
	snprintf(path, sizeof path, "%s/x%016llx", dir, (unsigned long long)rnd_next(r));
	return mkdir(path, 0700) < 0 ? errno : 0;
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

static void *ask(void *arg)
{
	struct asker *a = arg;
	struct rnd r;

	rnd_seed(&r, (uint64_t)(a - askers));
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

/* Off: returns when the last call is over. */
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
	die("bad value for --kinds: %s (names, numbers, stat, open, list or mkdir)", name);
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

static void become(int uid)
{
	if (uid && (setgroups(0, NULL) < 0 || setresgid((gid_t)uid, (gid_t)uid, (gid_t)uid) < 0 ||
		    setresuid((uid_t)uid, (uid_t)uid, (uid_t)uid) < 0))
		die("setresuid: %s", strerror(errno));
}

/* A line on stdin has them begin, and the next one has them stop; the end of
 * stdin ends it.  --names: which disks are asked for, "1,2,3"; by default all. */
int cmd_abuse(int argc, char **argv)
{
	const char *kind_names = "names,numbers,stat,open,list", *names = NULL;
	int threads = 100, uid = 0, used[KINDS], uses = 0;
	pthread_attr_t attr;

	parse_opts(argc, argv, (const struct opt[]){
		{ "dir", OPT_STR, &dir, true },
		{ "uid", OPT_INT, &uid, false },
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
	become(uid);
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_BYTES);
	for (int i = 0; i < threads; i++) {
		askers[i].kind = used[i % uses];
		/* Each begins with a name of its own. */
		askers[i].turn = (unsigned)(i / uses);
		int err = pthread_create(&askers[i].thread, &attr, ask, &askers[i]);
		if (err)
			die("pthread_create: %s", strerror(err));
	}
	printf("ready\n");
	fflush(stdout);
	while (!stop_signal) {
		struct pollfd p = { .fd = 0, .events = POLLIN };
		char buf[256];

		/* The timeout is for a signal just before the call. */
		if (poll(&p, 1, 100) <= 0)
			continue;
		ssize_t n = read(0, buf, sizeof buf);
		if (n <= 0)
			break;
		for (ssize_t i = 0; i < n; i++) {
			if (buf[i] != '\n')
				continue;
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

/* Opens the directory many times over, says "ready", and closes nothing before stdin does. */
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
	while (!stop_signal) {
		struct pollfd p = { .fd = 0, .events = POLLIN };
		char buf[256];

		if (poll(&p, 1, 100) > 0 && read(0, buf, sizeof buf) <= 0)
			break;
	}
	printf("{\"directories\":%d}\n", count);
	return exit_status();
}
