// diskseqfs-link: points the names of device-mapper devices into the tree.
//
// udev can make a symlink to a device's own node only, and would make it anew at
// each event (systemd 252) or at some (257).  So the rules take these names away
// from udev, and run this program to make /dev/mapper/NAME (and LVM's /dev/VG/LV)
// lead to /dev/disk/by-diskseq/.dm/N/dm-K.  It is a program of its own, in C, because udev
// runs it for each event of such a device.
//
//   claim LINK...   of the links udev is about to make, say which are ours, and
//                   which are not; make ours; take those away, or give those back
//                   to udev, that are ours no longer.
//   settle          the same with those that were claimed, after udev has made its own
//                   links: where those were among them, it has just taken them away.
//   removed         the device goes: take its links away.
//   alone           the tree is gone: of the links beneath it keep those that ours lead to.
//   stock           give every link of ours back to udev: the package goes.
//
// One rule for all of them: a name may lead to a disk that is gone (ENOENT), or
// for a moment to nothing, but not to a number that another disk may take.
//
// Where the tree is not mounted, the same paths lead to the devices' own nodes: the daemon
// keeps links in the directory beneath.  They go when nothing leads to them any more.
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <unistd.h>

#define TREE "/dev/disk/by-diskseq"
// A path that ends in the kernel's name is taken for the device's own node by libmount and others: they
// show and remember the name that is in sysfs.
#define DIRECTORIES TREE "/.dm"
#define MAPPER "/dev/mapper"
#define BLOCK "/sys/class/block"
// Of the instances of this program that run at the same time.
#define LOCK "/run/diskseqfs.lock"
#define LOCK_SECONDS 3
// Of a link that is being made; its process follows.
#define TEMPORARY ".diskseqfs-link"
// Of a link below /dev: a device-mapper name has at most 127 bytes, each of
// which udev may write as four.
#define PATH_SIZE 1100
// Lines of 61-diskseqfs.rules for links that are not ours.
#define OTHERS_MAX 16
// For a device that sysfs has and the tree does not: a second in all.
#define WAITS_MAX 100
#define WAIT_US 10000

#ifndef FUSE_SUPER_MAGIC
#define FUSE_SUPER_MAGIC 0x65735546 // linux/magic.h, since 5.16
#endif

// A device-mapper device as sysfs has it now.
struct device {
  char name[256];             // what dmsetup calls it
  unsigned long long diskseq; // 0: there is no such device
  dev_t number;
};

static const char *environment(const char *name) {
  const char *value = getenv(name);
  return value ? value : "";
}

static int fail(const char *what, const char *path) {
  fprintf(stderr, "diskseqfs-link: %s %s: %s\n", what, path, strerror(errno));
  return 1;
}

// Reads BLOCK/KERNEL/ATTRIBUTE without its newline.
static bool attribute(const char *kernel, const char *name, char *into, size_t size) {
  char path[512];
  snprintf(path, sizeof path, BLOCK "/%s/%s", kernel, name);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  ssize_t length = read(fd, into, size - 1);
  close(fd);
  if (length < 0) return false;
  into[length] = 0;
  into[strcspn(into, "\n")] = 0;
  return true;
}

static unsigned long long diskseq_of(const char *kernel) {
  char text[32];
  return attribute(kernel, "diskseq", text, sizeof text) ? strtoull(text, NULL, 10) : 0;
}

// All of it belongs to one disk, as the diskseq is the same before and after.
static struct device look(const char *kernel) {
  for (int attempt = 0; attempt < 10; attempt++) {
    struct device device = {.diskseq = diskseq_of(kernel)};
    char number[32];
    unsigned major, minor;
    if (device.diskseq == 0) break;
    if (attribute(kernel, "dm/name", device.name, sizeof device.name) &&
        attribute(kernel, "dev", number, sizeof number) &&
        sscanf(number, "%u:%u", &major, &minor) == 2) {
      device.number = makedev(major, minor);
      if (diskseq_of(kernel) == device.diskseq) return device;
    }
  }
  return (struct device){0};
}

// "dm-3" of "/dev/dm-3" or "../dm-3"; NULL for anything else.
static const char *kernel_name(const char *node) {
  const char *slash = strrchr(node, '/');
  const char *name = slash ? slash + 1 : node;
  if (strncmp(name, "dm-", 3) != 0 || name[3] == 0) return NULL;
  return name[3 + strspn(name + 3, "0123456789")] == 0 ? name : NULL;
}

static void path_in_tree(unsigned long long diskseq, const char *kernel, char *path, size_t size) {
  snprintf(path, size, DIRECTORIES "/%llu/%s", diskseq, kernel);
}

// The diskseq a link leads to; 0 for a link that leads elsewhere or to nothing.
static unsigned long long linked_diskseq(const char *link) {
  char text[PATH_SIZE];
  ssize_t length = readlink(link, text, sizeof text - 1);
  if (length <= 0) return 0;
  text[length] = 0;
  if (strncmp(text, DIRECTORIES "/", sizeof DIRECTORIES) == 0) return strtoull(text + sizeof DIRECTORIES, NULL, 10);
  // Made by an earlier version.
  if (strncmp(text, TREE "/", sizeof TREE) == 0) return strtoull(text + sizeof TREE, NULL, 10);
  return 0;
}

// Whether the tree is mounted there, also beneath something else: then there is a daemon that keeps the links
// beneath it.
static bool has_daemon(void) {
  FILE *mounts = fopen("/proc/self/mountinfo", "re");
  char line[4096];
  bool found = mounts == NULL;
  while (mounts && !found && fgets(line, sizeof line, mounts))
    found = strstr(line, " " TREE " ") && strstr(line, " - fuse.diskseqfs ");
  if (mounts) fclose(mounts);
  return found;
}

static bool tree_mounted(void) {
  struct statfs fs;
  return statfs(TREE, &fs) == 0 && fs.f_type == FUSE_SUPER_MAGIC;
}

// An errno where it does not lead to the device.
static int ask_tree(const struct device *device, const char *kernel) {
  char path[128];
  struct stat node;
  if (!tree_mounted()) return ENOTCONN;
  path_in_tree(device->diskseq, kernel, path, sizeof path);
  // stat, as for a disk that is slow the tree may answer with a link to itself.
  if (stat(path, &node) < 0) return errno;
  return S_ISBLK(node.st_mode) && node.st_rdev == device->number ? 0 : ENODEV;
}

static int lock_file = -1;

static void wake(int number) { (void)number; }

// Other instances run beside this one, for other devices that had or will have
// the same name.  udev's own links are made outside the lock: whoever makes one
// runs this program afterwards.
//
// It is on a file that only root can open, as whoever can open something can hold
// a lock on it for as long as he likes.  Still it may be held for long: any user
// can have the kernel keep a directory locked, and with it the instance that is
// to change the directory.  So waiting has an end: nobody else's events are to
// wait for that one's.  Without the lock a link may come out as it was a moment
// before, so then none is led to a bare number (see settle(); not so where there is no
// tree any more, see restore()): the worst is a name that leads to a disk that is gone,
// or to nothing, until its next event.
//
// -> whether it is held, until unlock() or the end of the process
static bool lock(void) {
  static bool vain;
  struct stat file;
  if (vain) return false;
  vain = true;
  if (lock_file < 0) lock_file = open(LOCK, O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (lock_file < 0 || fstat(lock_file, &file) < 0) {
    fail("cannot open", LOCK);
    return false;
  }
  if (!S_ISREG(file.st_mode) || file.st_uid != 0 || (file.st_mode & 077)) {
    fputs("diskseqfs-link: " LOCK " is not a file of root's alone; going on without a lock\n", stderr);
    return false;
  }
  // Again and again after that, as the first signal may come right before the wait.
  struct itimerval limit = {.it_value = {.tv_sec = LOCK_SECONDS}, .it_interval = {.tv_usec = 100000}}, none = {0};
  struct sigaction action = {.sa_handler = wake}; // without SA_RESTART
  sigset_t alarms;
  sigemptyset(&alarms);
  sigaddset(&alarms, SIGALRM);
  sigprocmask(SIG_UNBLOCK, &alarms, NULL);
  sigaction(SIGALRM, &action, NULL);
  setitimer(ITIMER_REAL, &limit, NULL);
  vain = flock(lock_file, LOCK_EX) < 0;
  setitimer(ITIMER_REAL, &none, NULL);
  if (vain) fprintf(stderr, "diskseqfs-link: " LOCK " is still held after %d s; going on without a lock\n", LOCK_SECONDS);
  return !vain;
}

static void unlock(void) { flock(lock_file, LOCK_UN); }

static int point(const char *link, const char *target) {
  char now[PATH_SIZE], temporary[PATH_SIZE + 32], directory[PATH_SIZE];
  ssize_t length = readlink(link, now, sizeof now - 1);
  if (length > 0) {
    now[length] = 0;
    if (strcmp(now, target) == 0) return 0;
  } else if (length < 0 && errno == EINVAL) {
    return 0; // no symlink: made by libdm without udev, and not ours to replace
  }
  snprintf(directory, sizeof directory, "%s", link);
  *strrchr(directory, '/') = 0;
  // Of this process alone, as it may have no lock: another's would be renamed to this link.
  snprintf(temporary, sizeof temporary, "%s/" TEMPORARY ".%d", directory, getpid());
  for (int attempt = 0; attempt < 10; attempt++) {
    if (mkdir(directory, 0755) < 0 && errno != EEXIST) return fail("cannot make", directory);
    if (unlink(temporary) < 0 && errno != ENOENT) return fail("cannot remove", temporary);
    if (symlink(target, temporary) == 0 && rename(temporary, link) == 0) return 0;
    // udev takes a directory away with its last link, without a look at our lock.
    if (errno != ENOENT) break;
  }
  return fail("cannot replace", link);
}

static int point_into_tree(const char *link, unsigned long long diskseq, const char *kernel) {
  char target[128];
  path_in_tree(diskseq, kernel, target, sizeof target);
  return point(link, target);
}

static int point_at_node(const char *link, const char *kernel) {
  char target[300];
  snprintf(target, sizeof target, "../%s", kernel);
  return point(link, target);
}

// "mapper/NAME" and "VG/LV" are ours; udev makes many more.  -> an absolute path
static bool ours(const char *link, char *path, size_t size) {
  char volume[PATH_SIZE];
  snprintf(volume, sizeof volume, "%s/%s", environment("DM_VG_NAME"), environment("DM_LV_NAME"));
  if (strncmp(link, "mapper/", 7) != 0 && (volume[0] == '/' || strcmp(link, volume) != 0)) return false;
  const char *slash = strchr(link, '/');
  if (slash != strrchr(link, '/') || strcmp(slash, "/.") == 0 || strcmp(slash, "/..") == 0) return false;
  return snprintf(path, size, "/dev/%s", link) < (int)size;
}

static bool has_word(const char *words, const char *word) {
  size_t length = strlen(word);
  for (const char *at = words; (at = strstr(at, word)); at += length)
    if ((at == words || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0)) return true;
  return false;
}

// Whether this is what udev makes of a name in sysfs: it takes blanks from its end, and
// writes _ for what it does not like in a property.
static bool is_written(const char *property, const char *name) {
  size_t length = strlen(name);
  while (length > 0 && isspace((unsigned char)name[length - 1])) length--;
  if (strlen(property) != length) return false;
  for (size_t i = 0; i < length; i++)
    if (property[i] != name[i] && (property[i] != '_' || isalnum((unsigned char)name[i]))) return false;
  return true;
}

// Whether the event is about the device as it is now.  A late one may find its
// device gone, and another one with its number; the name that the rules read
// from sysfs is the other's then.
static bool current(const struct device *device) {
  return device->diskseq != 0 && device->diskseq == strtoull(environment("DISKSEQ"), NULL, 10) &&
         is_written(environment("DM_NAME"), device->name);
}

// Whether the root file system is on it.  In use for as long as the system runs,
// its number cannot become another disk's, so its name is as good without the
// tree; and grub-mkconfig writes what the name leads to into the next boot's
// kernel command line.
static bool has_root(const struct device *device) {
  struct stat root, source;
  if (stat("/", &root) < 0) return false;
  if (major(root.st_dev) != 0) return root.st_dev == device->number;
  // btrfs and the like have a number of their own.
  FILE *mounts = fopen("/proc/self/mounts", "re");
  char line[4096], path[PATH_SIZE], target[3];
  bool found = false;
  while (mounts && fgets(line, sizeof line, mounts))
    if (sscanf(line, "%1099s %2s", path, target) == 2 && strcmp(target, "/") == 0)
      found = stat(path, &source) == 0 && S_ISBLK(source.st_mode) && source.st_rdev == device->number;
  if (mounts) fclose(mounts);
  return found;
}

// Whether the file of that kind says that one of these links, all of which are the device's, is for swap:
// fstab by its third field, crypttab by an option in its fourth.
static bool says_swap(const char *file, bool (*says)(char *const *fields, char *path, size_t size), char *const *links) {
  FILE *lines = fopen(file, "re");
  char line[4096], path[PATH_SIZE];
  bool found = false;
  while (lines && !found && fgets(line, sizeof line, lines)) {
    char *fields[4] = {"", "", "", ""}, *rest = line, *field;
    for (int i = 0; i < 4 && (field = strtok_r(i ? NULL : line, " \t\n", &rest));) fields[i++] = field;
    if (fields[0][0] == '#' || !says(fields, path, sizeof path) || strncmp(path, "/dev/", 5) != 0) continue;
    for (int i = 0; links[i] && !found; i++) found = strcmp(links[i], path + 5) == 0;
  }
  if (lines) fclose(lines);
  return found;
}

static bool fstab_says(char *const *fields, char *path, size_t size) {
  return strcmp(fields[2], "swap") == 0 && snprintf(path, size, "%s", fields[0]) < (int)size;
}

static bool crypttab_says(char *const *fields, char *path, size_t size) {
  bool swap = false;
  for (char *rest = fields[3], *option; (option = strsep(&rest, ","));) swap |= strcmp(option, "swap") == 0;
  return swap && snprintf(path, size, MAPPER "/%s", fields[0]) < (int)size;
}

// Whether the system is configured to swap to it, by one of its names.  systemd knows a swap's units by
// the links that udev has made, so those of such a device stay udev's.  (What is on the
// disk says nothing: a guest may have written that.)
static bool is_for_swap(char *const *links) {
  return says_swap("/etc/fstab", fstab_says, links) || says_swap("/etc/crypttab", crypttab_says, links);
}

// Looks at the device and asks the tree for it; an errno where the tree does not
// lead to it.  The kernel takes a device's node away before its entry in sysfs,
// which is how a device on its way out may look like one that the tree lacks; it
// is gone for sysfs as well in a moment.
static int look_and_ask(const char *kernel, struct device *device) {
  int error;
  for (int waits = 0; waits < WAITS_MAX; waits++) {
    if (waits) usleep(WAIT_US);
    *device = look(kernel);
    error = current(device) ? ask_tree(device, kernel) : ESTALE;
    if (error != ENOENT && error != ENXIO && error != ENODEV) break;
  }
  if (error) *device = look(kernel); // as it may have gone meanwhile
  return error;
}

// Nothing leads to a device's link beneath the tree any more.  Where there is a daemon, it is that one's.
static void leave_beneath(unsigned long long diskseq, const char *kernel) {
  char path[128];
  if (has_daemon()) return;
  path_in_tree(diskseq, kernel, path, sizeof path);
  unlink(path);
  *strrchr(path, '/') = 0;
  rmdir(path);
  rmdir(DIRECTORIES);
}

// LVM's directory of a volume group goes with its last link, as with udev's own.
static int take_away(const char *link) {
  char directory[PATH_SIZE];
  if (unlink(link) < 0 && errno != ENOENT) return fail("cannot remove", link);
  snprintf(directory, sizeof directory, "%s", link);
  *strrchr(directory, '/') = 0;
  rmdir(directory);
  return 0;
}

static bool leads_to(const char *link, const char *target) {
  char now[PATH_SIZE];
  ssize_t length = readlink(link, now, sizeof now - 1);
  return length == (ssize_t)strlen(target) && memcmp(now, target, strlen(target)) == 0;
}

// Whether there is nothing to be changed, as at most events: then nobody's lock is waited for.
static bool is_done(const char *kernel, unsigned long long diskseq, const char *claimed) {
  char target[128];
  bool done = *claimed != 0;
  path_in_tree(diskseq, kernel, target, sizeof target);
  char *words = strdup(claimed), *rest = words;
  for (char *link; done && (link = strsep(&rest, " "));) done = *link == 0 || leads_to(link, target);
  free(words);
  words = strdup(environment("DISKSEQFS_BEFORE")), rest = words;
  for (char *link; done && (link = strsep(&rest, " "));)
    done = *link == 0 || has_word(claimed, link) || linked_diskseq(link) != diskseq;
  free(words);
  return done;
}

// Makes the links that are claimed, and takes those away that were and are not any more; but leaves those to
// udev that it has made, or will make when it has read the rules.
static int change(const char *kernel, const char *claimed, bool (*is_udevs)(const char *link)) {
  unsigned long long diskseq = strtoull(environment("DISKSEQ"), NULL, 10);
  if (is_done(kernel, diskseq, claimed)) return 0;
  // Looked at only with the lock: who has waited for it may find his name another
  // device's, which has made its link and does not come again.
  bool locked = lock();
  struct device device = look(kernel);
  int result = 0;
  bool left = false;
  char *words = strdup(claimed), *rest = words;
  // A device that is gone, or has another name, leaves them to what has them now.
  for (char *link; current(&device) && (link = strsep(&rest, " "));)
    if (*link) result |= point_into_tree(link, diskseq, kernel);
  free(words);
  words = strdup(environment("DISKSEQFS_BEFORE")), rest = words;
  for (char *link; (link = strsep(&rest, " "));) {
    if (*link == 0 || has_word(claimed, link) || linked_diskseq(link) != diskseq) continue;
    if (!is_udevs(link) || !current(&device)) result |= take_away(link);
    // Else it stays ours until the next event.
    else if (locked) result |= point_at_node(link, kernel);
    if (linked_diskseq(link) == diskseq) left = true;
  }
  free(words);
  if (!*claimed && *environment("DISKSEQFS_BEFORE") && !left) leave_beneath(diskseq, kernel);
  unlock();
  return result;
}

static bool is_devlink(const char *link) { return has_word(environment("DEVLINKS"), link); }

static int settle(const char *kernel) { return change(kernel, environment("DISKSEQFS_LINKS"), is_devlink); }

// The links that udev is about to make.
static char *const *coming;

static bool is_coming(const char *link) {
  for (char *const *each = coming; *each; each++)
    if (strncmp(link, "/dev/", 5) == 0 && strcmp(link + 5, *each) == 0) return true;
  return false;
}

// The links that are ours, as absolute paths, and properties for the rules of all others; false where
// all of them stay udev's, also as there are more others than the rules have lines for.
static bool divide(char *const *links, const char *kernel, char *claimed, size_t claimed_size, char *others, size_t others_size) {
  struct device device;
  char path[PATH_SIZE];
  size_t used = 0, length = 0;
  int count = 0;
  int error = look_and_ask(kernel, &device);
  if (!current(&device)) {
    if (tree_mounted()) printf("DISKSEQFS_LATE=1\n");
    return false;
  }
  const char *wanted = environment("DISKSEQFS_LINK");
  if (error) {
    if (error != ENOTCONN)
      fprintf(stderr, "diskseqfs-link: " TREE "/%llu: %s; the links of %s stay udev's\n", device.diskseq,
              strerror(error), device.name);
    return false;
  }
  if (strcmp(wanted, "0") == 0 || ((has_root(&device) || is_for_swap(links)) && strcmp(wanted, "1") != 0)) return false;
  for (; *links; links++) {
    if (ours(*links, path, sizeof path)) {
      used += snprintf(claimed + used, claimed_size - used, "%s%s", used ? " " : "", path);
      if (used >= claimed_size) return false;
    } else {
      if (++count > OTHERS_MAX) return fputs("diskseqfs-link: too many links\n", stderr), false;
      length += snprintf(others + length, others_size - length, ".DISKSEQFS_%d=%s\n", count, *links);
      if (length >= others_size) return false;
    }
  }
  return used > 0;
}

// Prints properties for the rules, and makes the links: udev need not have made its own before, as long as it
// takes none of ours away for one that it made at an earlier event (see the rules).
static int claim(char *const *links, const char *kernel) {
  char claimed[4 * PATH_SIZE] = "", others[OTHERS_MAX * PATH_SIZE] = "";
  coming = links;
  if (divide(links, kernel, claimed, sizeof claimed, others, sizeof others)) printf("DISKSEQFS_LINKS=%s\n%s", claimed, others);
  else *claimed = 0;
  return change(kernel, claimed, is_coming);
}

static int removed(const char *kernel) {
  unsigned long long diskseq = strtoull(environment("DISKSEQ"), NULL, 10);
  int result = 0;
  lock();
  char *words = strdup(environment("DISKSEQFS_LINKS")), *rest = words;
  for (char *link; (link = strsep(&rest, " "));) {
    // The name may be another device's by now.
    if (*link && linked_diskseq(link) == diskseq) result |= take_away(link);
  }
  free(words);
  leave_beneath(diskseq, kernel);
  return result;
}

// What is found out without the lock is looked at again with it: nobody is to
// wait for more than one link.  Where there is no lock it goes on all the same:
// without the tree, no name can be better than udev's own.
static int restore(const char *link, const char *kernel, unsigned long long diskseq) {
  int result = 0;
  if (linked_diskseq(link) != diskseq) return 0;
  lock();
  if (linked_diskseq(link) == diskseq) {
    if (diskseq_of(kernel) == diskseq) result = point_at_node(link, kernel);
    else result = take_away(link);
  }
  unlock();
  return result;
}

// A link that was being made when its process ended.
static void sweep(const char *path) {
  if (!lock()) return;
  unlink(path);
  unlock();
}

// Calls `use` for the links in a directory.
static int each_link(const char *path, int (*use)(const char *link)) {
  int result = 0;
  DIR *directory = opendir(path);
  if (!directory) return 0;
  for (struct dirent *entry; (entry = readdir(directory));) {
    char link[PATH_SIZE];
    if (entry->d_type != DT_LNK) continue;
    snprintf(link, sizeof link, "%s/%s", path, entry->d_name);
    if (strncmp(entry->d_name, TEMPORARY, strlen(TEMPORARY)) == 0) sweep(link);
    else if (use) result |= use(link);
  }
  closedir(directory);
  return result;
}

// The links that are ours are those that the last event has claimed, which is
// what udev remembers of it (DISKSEQFS_LINKS).  Whatever else leads into the tree
// somebody else has made, and it is his.
#define CLAIMED "E:DISKSEQFS_LINKS="

static FILE *remembered_of(const char *kernel) {
  char number[32], path[64];
  if (!attribute(kernel, "dev", number, sizeof number)) return NULL;
  snprintf(path, sizeof path, "/run/udev/data/b%s", number);
  return fopen(path, "re");
}

static int restore_all_of(const char *kernel) {
  char line[4 * PATH_SIZE + sizeof CLAIMED];
  unsigned long long diskseq = diskseq_of(kernel);
  int result = 0;
  if (diskseq == 0) return 0;
  FILE *remembered = remembered_of(kernel);
  while (remembered && fgets(line, sizeof line, remembered)) {
    if (strncmp(line, CLAIMED, sizeof CLAIMED - 1) != 0) continue;
    line[strcspn(line, "\n")] = 0;
    char *rest = line + sizeof CLAIMED - 1;
    for (char *link; (link = strsep(&rest, " "));)
      if (link[0] == '/') result |= restore(link, kernel, diskseq);
  }
  if (remembered) fclose(remembered);
  return result;
}

static bool has_device(unsigned long long diskseq) {
  DIR *block = opendir(BLOCK);
  bool found = block == NULL; // it cannot be found out
  for (struct dirent *entry; block && !found && (entry = readdir(block));)
    found = diskseq_of(entry->d_name) == diskseq;
  if (block) closedir(block);
  return found;
}

// A name whose device is gone, and whose last event did not come to its end.
static int take_away_dangling(const char *link) {
  unsigned long long diskseq = linked_diskseq(link);
  if (diskseq == 0 || has_device(diskseq) || !lock()) return 0;
  int result = linked_diskseq(link) == diskseq ? take_away(link) : 0;
  unlock();
  return result;
}

// Whether the last event of the device has claimed links, which lead to its link beneath the tree.
static bool has_claimed(const char *kernel) {
  char line[4 * PATH_SIZE + sizeof CLAIMED];
  FILE *remembered = remembered_of(kernel);
  bool found = false;
  while (remembered && !found && fgets(line, sizeof line, remembered))
    found = strncmp(line, CLAIMED "/", sizeof CLAIMED) == 0;
  if (remembered) fclose(remembered);
  return found;
}

static void sweep_disk(const char *disk, bool all) {
  char path[2 * PATH_SIZE];
  snprintf(path, sizeof path, DIRECTORIES "/%s", disk);
  size_t length = strlen(path);
  DIR *directory = opendir(path);
  for (struct dirent *entry; directory && (entry = readdir(directory));) {
    if (entry->d_type != DT_LNK || (!all && kernel_name(entry->d_name) && has_claimed(entry->d_name))) continue;
    snprintf(path + length, sizeof path - length, "/%s", entry->d_name);
    unlink(path);
    path[length] = 0;
  }
  if (directory) closedir(directory);
  rmdir(path);
}

// The daemon has gone for good, and nobody keeps the links beneath the tree from here on: udev makes its own
// when it looks at a device again, and takes only these away.  Left are those that links of ours lead to, until udev
// makes these its own; or none.
//
// By path each time: where there is a tree again, that refuses.
static int leave_all_beneath(bool all) {
  if (has_daemon()) return 0;
  DIR *tree = opendir(TREE), *disks = opendir(DIRECTORIES);
  for (struct dirent *entry; tree && (entry = readdir(tree));) {
    char path[sizeof TREE + sizeof entry->d_name];
    snprintf(path, sizeof path, TREE "/%s", entry->d_name);
    if (entry->d_type == DT_LNK && isdigit((unsigned char)entry->d_name[0])) unlink(path);
  }
  for (struct dirent *entry; disks && (entry = readdir(disks));)
    if (entry->d_name[0] != '.') sweep_disk(entry->d_name, all);
  if (tree) closedir(tree);
  if (disks) closedir(disks);
  rmdir(DIRECTORIES);
  // As it was before there was a daemon.
  if (all && !has_daemon()) chmod(TREE, 0755);
  return 0;
}

static int stock(void) {
  int result = 0;
  DIR *block = opendir(BLOCK);
  if (!block) return fail("cannot read", BLOCK);
  for (struct dirent *entry; (entry = readdir(block));)
    if (kernel_name(entry->d_name)) result |= restore_all_of(entry->d_name);
  closedir(block);
  // Each directory once, however many links of ours it has.
  DIR *dev = opendir("/dev");
  if (!dev) return fail("cannot read", "/dev");
  for (struct dirent *entry; (entry = readdir(dev));) {
    char path[sizeof "/dev/" + sizeof entry->d_name];
    if (entry->d_type != DT_DIR || entry->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "/dev/%s", entry->d_name);
    result |= each_link(path, strcmp(path, MAPPER) == 0 ? take_away_dangling : NULL);
  }
  closedir(dev);
  return result | leave_all_beneath(true);
}

int main(int count, char **arguments) {
  const char *command = count > 1 ? arguments[1] : "";
  if (strcmp(command, "stock") == 0 && count == 2) return stock();
  if (strcmp(command, "alone") == 0 && count == 2) return leave_all_beneath(false);
  const char *kernel = kernel_name(environment("DEVNAME"));
  if (kernel && strcmp(command, "claim") == 0) return claim(arguments + 2, kernel);
  if (kernel && strcmp(command, "settle") == 0 && count == 2) return settle(kernel);
  if (kernel && strcmp(command, "removed") == 0 && count == 2) return removed(kernel);
  fprintf(stderr,
          "usage: diskseqfs-link stock | alone\n"
          "       diskseqfs-link claim LINK... | settle | removed    (run by udev for a dm-N)\n");
  return 2;
}
