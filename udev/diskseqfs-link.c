// SPDX-License-Identifier: MIT
// diskseqfs-link: points names of devices into the tree: /dev/mapper/NAME and LVM's /dev/VG/LV of
// device-mapper devices, and all links of devices that ask for it (DISKSEQFS_LINK=all).
//
// udev can only make symlinks to a device's node in /dev, and makes them again at
// each event (systemd 252) or at some events (257).  So the rules take these names away
// from udev, and run this program to make them lead to /dev/disk/by-diskseq/.dm/N/K.
// It is in C because udev runs it for each event of such a device.
//
//   claim LINK...   divides the links that udev is about to make into ours and others;
//                   makes those of ours that no other device can have; removes
//                   links that are no longer ours, or gives them back to udev.
//   apply           does the same with the claimed links, after udev has made its own links:
//                   if it has made ours at an earlier event, it has just removed them.
//                   A link that several devices have leads to the one with the highest priority.
//   removed         the device goes: removes its links, or points them to another device that has them.
//
//   alone           there is no tree: removes the links beneath it whose devices are gone.
//   stock           the package goes: gives all links back to udev; mounted devices keep their names.
//
// One rule for all of them: a name may lead to a disk that is gone (ENOENT), or
// for a moment to nothing, but never to a number that another disk may take.
//
// While the tree is not mounted, the same paths lead to the device nodes in /dev, by links in the
// directory beneath, which the daemon makes.  Each stays until its device goes: a process that has
// read a name may not have followed it yet.
#define _GNU_SOURCE // renameat2
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
#include <linux/membarrier.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <sys/time.h>
#include <unistd.h>

#define TREE "/dev/disk/by-diskseq"
// libmount and others take a path that ends in the kernel's name for the device node itself: they
// show and remember the device's name from sysfs.
#define DIRECTORIES TREE "/.dm"
#define MAPPER "/dev/mapper"
#define RULES "/run/udev/rules.d"
#define KEPT RULES "/61-diskseqfs-removed.rules"
#define BLOCK "/sys/class/block"
// Serializes the instances of this program that run at the same time.
#define LOCK "/run/diskseqfs.lock"
#define LOCK_SECONDS 3
// How long a process may take from reading a link to following it: after this, `stock` removes links beneath
// whose devices are still there.
#define WALK_SECONDS 1
// Exists if any device has had all its links claimed: other devices may have the same links.
#define ALL "/run/diskseqfs.all"
// Prefix of links that are being made; a process id follows.
#define TEMPORARY ".diskseqfs-link"
// The longest link below /dev: a device-mapper name has up to 127 bytes, and udev may write each as
// four.
#define PATH_SIZE 1100
#define KERNEL_SIZE 256
#define TARGET_SIZE (sizeof DIRECTORIES + 32 + KERNEL_SIZE)
// All links of a device: udev's UDEV_LINE_SIZE.
#define LINE_SIZE 16384
// Lines of 99-z-diskseqfs.rules for links that are not ours.
#define OTHERS_MAX 16

#ifndef FUSE_SUPER_MAGIC
#define FUSE_SUPER_MAGIC 0x65735546 // linux/magic.h, since 5.16
#endif

// A device as sysfs has it now.
struct device {
  char name[256];             // what dmsetup calls it; "" for devices of other kinds
  unsigned long long diskseq; // 0: there is no such device
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

// The diskseq of a disk, or of a partition's disk; 0 if there is none.
static unsigned long long diskseq_of(const char *kernel) {
  char text[32];
  if (!attribute(kernel, "diskseq", text, sizeof text) && !attribute(kernel, "../diskseq", text, sizeof text)) return 0;
  return strtoull(text, NULL, 10);
}

static bool is_dm(const char *kernel) { return strncmp(kernel, "dm-", 3) == 0; }

// Reads name and diskseq of one and the same disk: the diskseq must be the same before and after.
static struct device look(const char *kernel) {
  for (int attempt = 0; attempt < 10; attempt++) {
    struct device device = {.diskseq = diskseq_of(kernel)};
    if (device.diskseq == 0) break;
    if (is_dm(kernel) && !attribute(kernel, "dm/name", device.name, sizeof device.name)) continue;
    if (diskseq_of(kernel) == device.diskseq) return device;
  }
  return (struct device){0};
}

// The kernel's name as in sysfs: "sda1" for "/dev/sda1" or "../../sda1", "cciss!c0d0" for "/dev/cciss/c0d0"; "" for
// anything else.
static void kernel_name(const char *node, char *kernel, size_t size) {
  if (strncmp(node, "/dev/", 5) == 0) node += 5;
  else if (strncmp(node, "../", 3) != 0) node = "";
  while (strncmp(node, "../", 3) == 0) node += 3;
  if (snprintf(kernel, size, "%s", node) >= (int)size || strcmp(kernel, "..") == 0) *kernel = 0;
  for (char *slash; (slash = strchr(kernel, '/'));) *slash = '!';
}

static void path_in_tree(unsigned long long diskseq, const char *kernel, char *path, size_t size) {
  snprintf(path, size, DIRECTORIES "/%llu/%s", diskseq, kernel);
}

// What a link leads to.
struct owner {
  char kernel[KERNEL_SIZE];   // "" if a link of an earlier version does not say
  unsigned long long diskseq; // 0: nothing
  bool in_tree;
};

static struct owner owner_of(const char *link) {
  struct owner owner = {0};
  char text[PATH_SIZE];
  ssize_t length = readlink(link, text, sizeof text - 1);
  if (length <= 0) return owner;
  text[length] = 0;
  if (strncmp(text, TREE "/", sizeof TREE) == 0) {
    char *name = text + sizeof TREE, *kernel = "";
    if (strncmp(text, DIRECTORIES "/", sizeof DIRECTORIES) == 0) {
      name = text + sizeof DIRECTORIES;
      kernel = strchr(name, '/');
    }
    owner.in_tree = true;
    owner.diskseq = strtoull(name, NULL, 10);
    if (kernel && *kernel) snprintf(owner.kernel, sizeof owner.kernel, "%s", kernel + 1);
  } else {
    kernel_name(text, owner.kernel, sizeof owner.kernel);
    if (*owner.kernel) owner.diskseq = diskseq_of(owner.kernel);
  }
  return owner;
}

static bool is_there(const struct owner *owner) {
  return owner->diskseq != 0 && diskseq_of(owner->kernel) == owner->diskseq;
}

// Whether a link leads into the tree, to this device or to one that had its number before and is gone (another
// medium, for example).
static bool leads_to(const char *link, unsigned long long diskseq, const char *kernel) {
  struct owner owner = owner_of(link);
  if (!owner.in_tree) return false;
  if (*owner.kernel == 0) return owner.diskseq == diskseq;
  return strcmp(owner.kernel, kernel) == 0 && (owner.diskseq == diskseq || !is_there(&owner));
}

// The part below /dev of a link's absolute path.
static const char *below_dev(const char *link) { return link + strlen("/dev/"); }

// Whether the tree is mounted, also beneath another mount: then a daemon manages the links
// beneath.
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

static int lock_file = -1;

static void wake(int number) { (void)number; }

// Other instances run at the same time, for other devices that had or will have
// the same name.  udev makes its own links without the lock, and runs this program
// afterwards.
//
// The lock is on a file that only root can open, as any process that can open a file can hold a
// lock on it for ever.  It may still be held for long: any user can make the kernel keep a
// directory locked, which blocks the instance that changes that directory.  So waiting has an end:
// events of other devices must not wait for that one.  Without the lock a link may end up as it was
// a moment before.  So no link is then made to lead to a device node in /dev (see change();
// restore() does it, as there is no tree).  The worst result is a name that leads to a disk that is
// gone, or to nothing, until its next event.
//
// Returns whether the lock is held, until unlock() or the end of the process.
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
  // The timer repeats, as its first signal may come right before the wait.
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

// A temporary name that no other process uses, as this one may not have the lock.
static void temporary_beside(const char *link, char *path, size_t size) {
  snprintf(path, size, "%.*s/" TEMPORARY ".%d", (int)(strrchr(link, '/') - link), link, getpid());
}

// Makes the directories of a link.
static bool make_directories(const char *link) {
  char path[PATH_SIZE];
  snprintf(path, sizeof path, "%s", link);
  for (char *slash = path; (slash = strchr(slash + 1, '/')); *slash = '/') {
    *slash = 0;
    if (mkdir(path, 0755) < 0 && errno != EEXIST) return false;
  }
  return true;
}

static int point(const char *link, const char *target) {
  char now[PATH_SIZE], temporary[PATH_SIZE + 32];
  ssize_t length = readlink(link, now, sizeof now - 1);
  if (length > 0) {
    now[length] = 0;
    if (strcmp(now, target) == 0) return 0;
  } else if (length < 0 && errno == EINVAL) {
    return 0; // no symlink: made by libdm without udev, and not ours to replace
  }
  temporary_beside(link, temporary, sizeof temporary);
  for (int attempt = 0; attempt < 10; attempt++) {
    if (!make_directories(link)) return fail("cannot make the directory of", link);
    if (unlink(temporary) < 0 && errno != ENOENT) return fail("cannot remove", temporary);
    if (symlink(target, temporary) == 0 && rename(temporary, link) == 0) return 0;
    // udev removes a directory with its last link, without our lock.
    if (errno != ENOENT) break;
  }
  return fail("cannot replace", link);
}

static int point_into_tree(const char *link, unsigned long long diskseq, const char *kernel) {
  char target[TARGET_SIZE];
  path_in_tree(diskseq, kernel, target, sizeof target);
  return point(link, target);
}

static int point_at_node(const char *link, const char *kernel) {
  char target[PATH_SIZE] = "";
  size_t length = 0;
  for (const char *slash = link + 4; (slash = strchr(slash + 1, '/')) && length < sizeof target - KERNEL_SIZE;)
    length += snprintf(target + length, sizeof target - length, "../");
  snprintf(target + length, sizeof target - length, "%s", kernel);
  for (char *mark; (mark = strchr(target, '!'));) *mark = '/';
  return point(link, target);
}

// Whether a link is "mapper/NAME" or "VG/LV": only the device itself can have these.
static bool is_own(const char *link) {
  char volume[PATH_SIZE];
  snprintf(volume, sizeof volume, "%s/%s", environment("DM_VG_NAME"), environment("DM_LV_NAME"));
  if (strncmp(link, "mapper/", 7) != 0 && (volume[0] == '/' || strcmp(link, volume) != 0)) return false;
  const char *slash = strchr(link, '/');
  return slash == strrchr(link, '/');
}

// Whether a link is below /dev, without ".." and the like, and not in the tree.
static bool is_clean(const char *link) {
  for (const char *part = link; part; part = strchr(part, '/') ? strchr(part, '/') + 1 : NULL)
    if (*part == 0 || *part == '/' || strncmp(part, "./", 2) == 0 || strncmp(part, "../", 3) == 0 || strcmp(part, ".") == 0 || strcmp(part, "..") == 0)
      return false;
  return strncmp("/dev/", TREE, 5) == 0 && strncmp(link, TREE + 5, strlen(TREE + 5)) != 0;
}

static bool has_word(const char *words, const char *word) {
  size_t length = strlen(word);
  for (const char *at = words; (at = strstr(at, word)); at += length)
    if ((at == words || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0)) return true;
  return false;
}

// Whether a property is udev's form of a name in sysfs: without blanks at its end, and
// with _ for some characters.
static bool is_written(const char *property, const char *name) {
  size_t length = strlen(name);
  while (length > 0 && isspace((unsigned char)name[length - 1])) length--;
  if (strlen(property) != length) return false;
  for (size_t i = 0; i < length; i++)
    if (property[i] != name[i] && (property[i] != '_' || isalnum((unsigned char)name[i]))) return false;
  return true;
}

// Whether the event is about the device as it is now.  When an event is late, its device may be
// gone and its number another device's.  Then the name that the rules have read is the other's,
// too.
static bool current(const struct device *device) {
  return device->diskseq != 0 && device->diskseq == strtoull(environment("DISKSEQ"), NULL, 10) &&
         (*device->name == 0 || is_written(environment("DM_NAME"), device->name));
}

static bool is_at(const struct device *device, dev_t number) {
  char disk[64];
  snprintf(disk, sizeof disk, "../../dev/block/%u:%u", major(number), minor(number));
  return diskseq_of(disk) == device->diskseq;
}

// Whether the root file system is on this device, or on another partition of its disk.  The disk is then in use for
// as long as the system runs, so its number cannot become another disk's, and it does not need the tree.  And
// grub-mkconfig writes the target of its name into the kernel command line of the next boot.
static bool has_root(const struct device *device) {
  struct stat root, source;
  if (stat("/", &root) < 0) return false;
  if (major(root.st_dev) != 0) return is_at(device, root.st_dev);
  // btrfs and the like have a device number of their own.
  FILE *mounts = fopen("/proc/self/mounts", "re");
  char line[4096], path[PATH_SIZE], target[3];
  bool found = false;
  while (mounts && fgets(line, sizeof line, mounts))
    if (sscanf(line, "%1099s %2s", path, target) == 2 && strcmp(target, "/") == 0)
      found = stat(path, &source) == 0 && S_ISBLK(source.st_mode) && is_at(device, source.st_rdev);
  if (mounts) fclose(mounts);
  return found;
}

// Links that are named by the disk's content, which a guest may have written, and their form in
// fstab.
static const struct {
  const char *tag, *directory;
} contents[] = {
    {"UUID=", "disk/by-uuid/"},
    {"LABEL=", "disk/by-label/"},
    {"PARTUUID=", "disk/by-partuuid/"},
    {"PARTLABEL=", "disk/by-partlabel/"},
};

static bool is_of_content(const char *link) {
  for (size_t i = 0; i < sizeof contents / sizeof *contents; i++)
    if (strncmp(link, contents[i].directory, strlen(contents[i].directory)) == 0) return true;
  return false;
}

// Whether `file` uses one of these links for swap. `says` reads a line of it: fstab has that in the third field,
// crypttab as an option in the fourth.
static bool says_swap(const char *file, bool (*says)(char *const *fields, char *path, size_t size), char *const *links, bool content) {
  FILE *lines = fopen(file, "re");
  char line[4096], path[PATH_SIZE];
  bool found = false;
  while (lines && !found && fgets(line, sizeof line, lines)) {
    char *fields[4] = {"", "", "", ""}, *rest = line, *field;
    for (int i = 0; i < 4 && (field = strtok_r(i ? NULL : line, " \t\n", &rest));) fields[i++] = field;
    if (fields[0][0] == '#' || !says(fields, path, sizeof path) || strncmp(path, "/dev/", 5) != 0) continue;
    for (int i = 0; links[i] && !found; i++) found = (content || !is_of_content(links[i])) && strcmp(links[i], path + 5) == 0;
  }
  if (lines) fclose(lines);
  return found;
}

static bool fstab_says(char *const *fields, char *path, size_t size) {
  if (strcmp(fields[2], "swap") != 0) return false;
  for (size_t i = 0; i < sizeof contents / sizeof *contents; i++) {
    if (strncmp(fields[0], contents[i].tag, strlen(contents[i].tag)) != 0) continue;
    const char *value = fields[0] + strlen(contents[i].tag);
    if (*value == '"') value++;
    return snprintf(path, size, "/dev/%s%.*s", contents[i].directory, (int)strcspn(value, "\""), value) < (int)size;
  }
  return snprintf(path, size, "%s", fields[0]) < (int)size;
}

static bool crypttab_says(char *const *fields, char *path, size_t size) {
  bool swap = false;
  for (char *rest = fields[3], *option; (option = strsep(&rest, ","));) swap |= strcmp(option, "swap") == 0;
  return swap && snprintf(path, size, MAPPER "/%s", fields[0]) < (int)size;
}

// Whether the system is configured to swap to one of these names (to those of content only if `content`).
// systemd knows swap units by udev's links, so such links stay udev's.
static bool is_for_swap(char *const *links, bool content) {
  return says_swap("/etc/fstab", fstab_says, links, content) || says_swap("/etc/crypttab", crypttab_says, links, content);
}

// Whether udev has made this link in disk/by-diskseq: it has a file for each of its links.
static bool is_udevs(const char *name) {
  char path[2 * PATH_SIZE];
  snprintf(path, sizeof path, "/run/udev/links/\\x2fdisk\\x2fby-diskseq\\x2f%s", name);
  return access(path, F_OK) == 0;
}

// Removes one link beneath the tree, if it leads to this device.
static void leave_name(const char *path, const char *kernel) {
  struct owner owner = owner_of(path);
  if (!owner.in_tree && strcmp(owner.kernel, kernel) == 0 && !is_udevs(strrchr(path, '/') + 1)) unlink(path);
}

// Removes from beneath the tree all links of a device that goes. If there is a daemon, the daemon
// does that.
static void leave_beneath(unsigned long long diskseq, const char *kernel) {
  const char *partition = environment("PARTN");
  char path[TARGET_SIZE];
  if (has_daemon()) return;
  snprintf(path, sizeof path, *partition ? TREE "/%llup%s" : TREE "/%llu", diskseq, partition);
  leave_name(path, kernel);
  snprintf(path, sizeof path, TREE "/%llu-part%s", diskseq, partition);
  leave_name(path, kernel);
  path_in_tree(diskseq, kernel, path, sizeof path);
  unlink(path);
  *strrchr(path, '/') = 0;
  rmdir(path);
  rmdir(DIRECTORIES);
}

// Removes a link if it leads to this device. The link is renamed first and then read, as the lock
// may be missing.  A directory goes with its last link, as with udev's links.
static int take_away(const char *link, unsigned long long diskseq, const char *kernel) {
  char directory[PATH_SIZE], temporary[PATH_SIZE + 32];
  temporary_beside(link, temporary, sizeof temporary);
  if (rename(link, temporary) < 0) return errno == ENOENT ? 0 : fail("cannot remove", link);
  if (!leads_to(temporary, diskseq, kernel)) {
    if (renameat2(AT_FDCWD, temporary, AT_FDCWD, link, RENAME_NOREPLACE) == 0) return 0;
    if (errno != EEXIST) return fail("cannot put back", link);
  }
  if (unlink(temporary) < 0) return fail("cannot remove", temporary);
  snprintf(directory, sizeof directory, "%s", link);
  do *strrchr(directory, '/') = 0;
  while (strlen(directory) > strlen("/dev") && rmdir(directory) == 0);
  return 0;
}

// What udev's database has of the device's last event: the links that it claimed, and its priority for them.
// Nothing if that event was another device's.
#define CLAIMED "E:DISKSEQFS_LINKS="
#define REMEMBERED_DISKSEQ "E:DISKSEQ="
#define REMEMBERED_ALL "E:DISKSEQFS_LINK=all"

struct memory {
  char claimed[LINE_SIZE]; // absolute paths, separated by blanks
  int priority;
  bool all; // whether all its links are to be claimed
  unsigned long long diskseq;
};

static bool remember(const char *kernel, struct memory *memory) {
  char number[32], path[64], line[LINE_SIZE];
  *memory = (struct memory){0};
  if (!attribute(kernel, "dev", number, sizeof number)) return false;
  snprintf(path, sizeof path, "/run/udev/data/b%s", number);
  FILE *remembered = fopen(path, "re");
  while (remembered && fgets(line, sizeof line, remembered)) {
    line[strcspn(line, "\n")] = 0;
    if (strncmp(line, CLAIMED, strlen(CLAIMED)) == 0) strcpy(memory->claimed, line + strlen(CLAIMED));
    if (strncmp(line, REMEMBERED_DISKSEQ, strlen(REMEMBERED_DISKSEQ)) == 0) memory->diskseq = strtoull(line + strlen(REMEMBERED_DISKSEQ), NULL, 10);
    if (strncmp(line, "L:", 2) == 0) memory->priority = atoi(line + 2);
    if (strcmp(line, REMEMBERED_ALL) == 0) memory->all = true;
  }
  if (remembered) fclose(remembered);
  return memory->diskseq != 0 && memory->diskseq == diskseq_of(kernel);
}

static int priority_of(const char *kernel) {
  struct memory memory;
  return remember(kernel, &memory) ? memory.priority : 0;
}

// Of all devices but one that have claimed a link, the one with the highest priority. With `all`, only devices that
// have claimed all their links count.
static struct owner next_owner(const char *link, const char *but, bool all) {
  struct owner next = {.in_tree = true};
  int priority = 0;
  DIR *block = access(ALL, F_OK) == 0 ? opendir(BLOCK) : NULL;
  for (struct dirent *entry; block && (entry = readdir(block));) {
    struct memory memory;
    if (strcmp(entry->d_name, but) == 0 || !remember(entry->d_name, &memory)) continue;
    if (!has_word(memory.claimed, link) || (all && !memory.all) || (next.diskseq != 0 && memory.priority <= priority)) continue;
    next.diskseq = memory.diskseq;
    snprintf(next.kernel, sizeof next.kernel, "%s", entry->d_name);
    priority = memory.priority;
  }
  if (block) closedir(block);
  return next;
}

// Gives up a link of a device: points it to the next owner, or removes it.
static int give_up(const char *link, unsigned long long diskseq, const char *kernel) {
  struct owner next = is_own(below_dev(link)) ? (struct owner){0} : next_owner(link, kernel, false);
  return next.diskseq ? point_into_tree(link, next.diskseq, next.kernel) : take_away(link, diskseq, kernel);
}

// Whether a link leads into the tree, to another device with at least this device's priority.
static bool is_others(const char *link, const char *kernel) {
  struct owner owner = owner_of(link);
  return owner.in_tree && is_there(&owner) && priority_of(owner.kernel) >= priority_of(kernel);
}

// Points a link that several devices have into the tree, to the one with the highest priority.
static int share(const char *link, unsigned long long diskseq, const char *kernel) {
  if (is_others(link, kernel)) return 0;
  struct owner owner = owner_of(link);
  // With equal priorities the link stays where it is. If it leads to none, udev may just have
  // removed it from this device, so another device needs a higher priority.
  int least = priority_of(kernel);
  if (!is_there(&owner)) {
    owner = next_owner(link, kernel, false);
    least++;
  }
  if (owner.diskseq && priority_of(owner.kernel) >= least) return point_into_tree(link, owner.diskseq, owner.kernel);
  return point_into_tree(link, diskseq, kernel);
}

// An event: the links that it claims, the links that the event before had claimed, and whether udev has made its own.
struct event {
  const char *kernel, *claimed, *before;
  unsigned long long diskseq;
  bool (*is_udevs)(const char *link);
  bool applies;
};

// Whether a link can be made now.  A device's priority for links that others may have is only
// known after udev has written its database.
static bool is_due(const struct event *event, const char *link) {
  return event->applies || is_own(below_dev(link));
}

static bool is_made(const struct event *event, const char *link) {
  struct owner owner = owner_of(link);
  if (owner.in_tree && owner.diskseq == event->diskseq && strcmp(owner.kernel, event->kernel) == 0) return true;
  return !is_own(below_dev(link)) && is_others(link, event->kernel);
}

// Whether there is nothing to change, as at most events: then the lock is not needed.
static bool is_done(const struct event *event) {
  if (!*event->claimed && !*event->before) return true;
  bool done = *event->claimed != 0;
  char *words = strdup(event->claimed), *rest = words;
  for (char *link; done && (link = strsep(&rest, " "));) done = *link == 0 || !is_due(event, link) || is_made(event, link);
  free(words);
  words = strdup(event->before), rest = words;
  for (char *link; done && (link = strsep(&rest, " "));)
    done = *link == 0 || has_word(event->claimed, link) || !leads_to(link, event->diskseq, event->kernel);
  free(words);
  return done;
}

// Makes the claimed links, and removes those that are not claimed any more, except those that udev has made or will
// make after the rules.
static int change(const struct event *event) {
  const char *kernel = event->kernel;
  if (is_done(event)) return 0;
  // The device is read with the lock: while this instance waited, another device may have got the
  // name and made its link, and that one's event does not come again.
  bool locked = lock();
  struct device device = look(kernel);
  int result = 0;
  char *words = strdup(event->claimed), *rest = words;
  // If the device is gone or has another name, the links belong to another device now.
  for (char *link; current(&device) && (link = strsep(&rest, " "));) {
    if (*link == 0 || !is_due(event, link)) continue;
    result |= is_own(below_dev(link)) ? point_into_tree(link, event->diskseq, kernel) : share(link, event->diskseq, kernel);
    if (locked) continue;
    device = look(kernel);
    if (!current(&device)) result |= give_up(link, event->diskseq, kernel);
  }
  free(words);
  words = strdup(event->before), rest = words;
  for (char *link; (link = strsep(&rest, " "));) {
    if (*link == 0 || has_word(event->claimed, link) || !leads_to(link, event->diskseq, kernel)) continue;
    if (!event->is_udevs(link) || !current(&device)) result |= give_up(link, event->diskseq, kernel);
    // Without the lock it stays ours until the next event.
    else if (locked) result |= point_at_node(link, kernel);
  }
  free(words);
  unlock();
  return result;
}

static unsigned long long event_diskseq(void) { return strtoull(environment("DISKSEQ"), NULL, 10); }

static bool is_devlink(const char *link) { return has_word(environment("DEVLINKS"), link); }

static int apply(const char *kernel) {
  return change(&(struct event){kernel, environment("DISKSEQFS_LINKS"), environment("DISKSEQFS_BEFORE"), event_diskseq(), is_devlink, true});
}

// The links that udev is about to make.
static char *const *coming;

static bool is_coming(const char *link) {
  for (char *const *each = coming; *each; each++)
    if (strncmp(link, "/dev/", 5) == 0 && strcmp(link + 5, *each) == 0) return true;
  return false;
}

// Whether udev is to make all of a device's links.
static bool is_left_alone(const struct device *device, char *const *links) {
  const char *wanted = environment("DISKSEQFS_LINK");
  if (strcmp(wanted, "0") == 0 || strcmp(wanted, "1") == 0) return *wanted == '0';
  return has_root(device) || is_for_swap(links, false);
}

// Whether a link is claimed because the device asks for all its links, or because another such device has it.
static bool is_asked_for(const char *link, const char *kernel, bool all) {
  char path[PATH_SIZE];
  if (!is_clean(link) || snprintf(path, sizeof path, "/dev/%s", link) >= (int)sizeof path) return false;
  if (is_for_swap((char *const[]){(char *)link, NULL}, true)) return false;
  return all || (owner_of(path).in_tree && next_owner(path, kernel, true).diskseq != 0);
}

// Divides links into ours, as absolute paths, and others, as properties for the rules; false if
// all stay udev's, also if there are more others than the rules have lines for.
static bool divide(char *const *links, const char *kernel, char *claimed, size_t claimed_size, char *others, size_t others_size) {
  struct device device = look(kernel);
  size_t used = 0, length = 0;
  int count = 0;
  // The tree has every device that sysfs has.
  if (!tree_mounted()) return false;
  if (!current(&device)) {
    printf("DISKSEQFS_LATE=1\n");
    return false;
  }
  if (is_left_alone(&device, links)) return false;
  bool all = strcmp(environment("DISKSEQFS_LINK"), "all") == 0, shared = all || access(ALL, F_OK) == 0;
  if (all) close(open(ALL, O_CREAT | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0600));
  for (; *links; links++) {
    if ((is_own(*links) && is_clean(*links)) || (shared && is_asked_for(*links, kernel, all))) {
      used += snprintf(claimed + used, claimed_size - used, "%s/dev/%s", used ? " " : "", *links);
      if (used >= claimed_size) return false;
    } else {
      if (++count > OTHERS_MAX) return fputs("diskseqfs-link: too many links\n", stderr), false;
      length += snprintf(others + length, others_size - length, ".DISKSEQFS_%d=%s\n", count, *links);
      if (length >= others_size) return false;
    }
  }
  return used > 0;
}

// Prints properties for the rules, and makes the links. It makes them before udev makes its own: udev then removes
// ours only if it had made them itself at an earlier event (see the rules).
//
// A value that the rules put together can have 511 bytes at most, so this program prints them.
static int claim(char *const *links, const char *kernel) {
  char claimed[LINE_SIZE / 2] = "", others[OTHERS_MAX * PATH_SIZE] = "";
  const char *before = environment("DISKSEQFS_LINKS"), *alias = environment("SYSTEMD_ALIAS");
  coming = links;
  if (*before) printf("DISKSEQFS_BEFORE=%s\n", before);
  if (divide(links, kernel, claimed, sizeof claimed, others, sizeof others)) {
    printf(".DISKSEQFS_NONE=0\nDISKSEQFS_LINKS=%s\n%s", claimed, others);
    printf("SYSTEMD_ALIAS=%s%s%s\n", alias, *alias ? " " : "", claimed);
  } else {
    *claimed = 0;
  }
  return change(&(struct event){kernel, claimed, before, event_diskseq(), is_coming, false});
}

static int removed(const char *kernel) {
  unsigned long long diskseq = event_diskseq();
  char *words[] = {strdup(environment("DISKSEQFS_LINKS")), strdup(environment("DEVLINKS"))};
  int result = 0;
  lock();
  // udev has removed the links of this device that were udev's. Other devices may have claimed some
  // of them.
  for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
    char *rest = words[i];
    for (char *link; (link = strsep(&rest, " "));) {
      struct stat found;
      // The name may be another device's by now.
      if (*link == 0 || !(leads_to(link, diskseq, kernel) || (i == 1 && lstat(link, &found) < 0 && next_owner(link, kernel, false).diskseq))) continue;
      result |= give_up(link, diskseq, kernel);
    }
    free(words[i]);
  }
  leave_beneath(diskseq, kernel);
  return result;
}

// Checks first without the lock and then with it, so that other instances wait for one link at
// most.  It goes on without the lock if need be: without the tree, no name can be
// better than udev's.
static int restore(const char *link, const char *kernel, unsigned long long diskseq) {
  int result = 0;
  if (!leads_to(link, diskseq, kernel)) return 0;
  lock();
  if (leads_to(link, diskseq, kernel)) {
    if (diskseq_of(kernel) == diskseq) result = point_at_node(link, kernel);
    else result = take_away(link, diskseq, kernel);
  }
  unlock();
  return result;
}

// Removes a temporary link whose process has ended.
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
    if (entry->d_type != DT_LNK || snprintf(link, sizeof link, "%s/%s", path, entry->d_name) >= (int)sizeof link) continue;
    if (strncmp(entry->d_name, TEMPORARY, strlen(TEMPORARY)) == 0) sweep(link);
    else if (use) result |= use(link);
  }
  closedir(directory);
  return result;
}

// Our links are those that the device's last event has claimed, by udev's
// database.  Other links into the tree were made by somebody
// else, and stay.
static int restore_all_of(const char *kernel) {
  struct memory memory;
  unsigned long long diskseq = diskseq_of(kernel);
  int result = 0;
  if (diskseq == 0 || !remember(kernel, &memory)) return 0;
  char *rest = memory.claimed;
  for (char *link; (link = strsep(&rest, " "));)
    if (link[0] == '/') result |= restore(link, kernel, diskseq);
  return result;
}

static bool has_device(unsigned long long diskseq) {
  DIR *block = opendir(BLOCK);
  bool found = block == NULL; // unknown: as if there were one
  for (struct dirent *entry; block && !found && (entry = readdir(block));)
    found = diskseq_of(entry->d_name) == diskseq;
  if (block) closedir(block);
  return found;
}

// Removes a name whose device is gone, which is left if that device's last event was not handled to
// the end.
static int take_away_dangling(const char *link) {
  struct owner owner = owner_of(link);
  if (!owner.in_tree || has_device(owner.diskseq) || !lock()) return 0;
  int result = take_away(link, owner.diskseq, owner.kernel);
  unlock();
  return result;
}

static void sweep_disk(const char *disk, bool all) {
  char path[2 * PATH_SIZE];
  snprintf(path, sizeof path, DIRECTORIES "/%s", disk);
  size_t length = strlen(path);
  DIR *directory = opendir(path);
  for (struct dirent *entry; directory && (entry = readdir(directory));) {
    if (entry->d_type != DT_LNK || (!all && diskseq_of(entry->d_name) == strtoull(disk, NULL, 10))) continue;
    snprintf(path + length, sizeof path - length, "/%s", entry->d_name);
    unlink(path);
    path[length] = 0;
  }
  if (directory) closedir(directory);
  rmdir(path);
}

// The daemon has gone for good. Removes its links beneath the tree whose device is gone; with `all`, all of
// them. The others stay until their device goes or gets another diskseq (see 59-diskseqfs.rules).
//
// Each change is by path: if the tree is mounted again, it refuses the change.
static int leave_all_beneath(bool all) {
  if (has_daemon()) return 0;
  DIR *tree = opendir(TREE), *disks = opendir(DIRECTORIES);
  for (struct dirent *entry; tree && (entry = readdir(tree));) {
    char path[sizeof TREE + sizeof entry->d_name];
    snprintf(path, sizeof path, TREE "/%s", entry->d_name);
    if (entry->d_type != DT_LNK || !isdigit((unsigned char)entry->d_name[0])) continue;
    if (!is_udevs(entry->d_name) && (all || owner_of(path).diskseq != strtoull(entry->d_name, NULL, 10))) unlink(path);
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

static int each_directory(const char *parent) {
  int result = 0;
  DIR *directory = opendir(parent);
  if (!directory) return fail("cannot read", parent);
  for (struct dirent *entry; (entry = readdir(directory));) {
    char path[PATH_SIZE];
    if (entry->d_type != DT_DIR || entry->d_name[0] == '.') continue;
    snprintf(path, sizeof path, "%s/%s", parent, entry->d_name);
    bool udevs = strcmp(path, MAPPER) == 0 || strcmp(parent, "/dev") != 0;
    result |= each_link(path, udevs ? take_away_dangling : NULL);
  }
  closedir(directory);
  return result;
}

// systemd binds a mount to the device of its source, and may unmount it if the device loses that name.  So what is
// mounted by a path in the tree keeps that name until the next boot.  (A user may mount something with any source:
// only a path of this form is used.)
static int keep_sources(void) {
  FILE *mounts = fopen("/proc/self/mounts", "re"), *rules = NULL;
  char line[4096], kernel[KERNEL_SIZE], end;
  unsigned long long diskseq;
  while (mounts && fgets(line, sizeof line, mounts)) {
    if (sscanf(line, DIRECTORIES "/%llu/%255[A-Za-z0-9!_-]%c", &diskseq, kernel, &end) != 3 || end != ' ') continue;
    if (!rules) {
      mkdir(RULES, 0755);
      rules = fopen(KEPT, "we");
    }
    if (!rules) break;
    fprintf(rules, "SUBSYSTEM==\"block\", ENV{DISKSEQ}==\"%llu\", KERNEL==\"%s\", ENV{SYSTEMD_ALIAS}+=\"" DIRECTORIES "/%llu/%s\"\n",
            diskseq, kernel, diskseq, kernel);
  }
  bool written = mounts && feof(mounts) && (!rules || fclose(rules) == 0);
  if (mounts) fclose(mounts);
  return written ? 0 : fail("cannot write", KEPT);
}

static int stock(void) {
  int result = keep_sources();
  DIR *block = opendir(BLOCK);
  if (!block) return fail("cannot read", BLOCK);
  for (struct dirent *entry; (entry = readdir(block));)
    if (entry->d_name[0] != '.') result |= restore_all_of(entry->d_name);
  closedir(block);
  // Each directory once, however many links of ours it has.
  result |= each_directory("/dev") | each_directory("/dev/disk");
  unlink(ALL);
  sleep(WALK_SECONDS);
  // One that a starved processor is in the middle of has ended by then: the kernel walks paths in an RCU section.
  syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0);
  return result | leave_all_beneath(true);
}

int main(int count, char **arguments) {
  const char *command = count > 1 ? arguments[1] : "";
  if (strcmp(command, "stock") == 0 && count == 2) return stock();
  if (strcmp(command, "alone") == 0 && count == 2) return leave_all_beneath(false);
  char kernel[KERNEL_SIZE];
  kernel_name(environment("DEVNAME"), kernel, sizeof kernel);
  if (*kernel && strcmp(command, "claim") == 0) return claim(arguments + 2, kernel);
  // During an upgrade, udev may still have the rules of an earlier version, which say "settle".
  if (*kernel && (strcmp(command, "apply") == 0 || strcmp(command, "settle") == 0) && count == 2) return apply(kernel);
  if (*kernel && strcmp(command, "removed") == 0 && count == 2) return removed(kernel);
  fprintf(stderr,
          "usage: diskseqfs-link stock | alone\n"
          "       diskseqfs-link claim LINK... | apply | removed    (run by udev)\n");
  return 2;
}
