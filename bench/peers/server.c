// SPDX-License-Identifier: MIT
// The tree in C, on libfuse's low-level interface: what the benchmark compares
// the daemon with.
//
//   server MOUNTPOINT      stays in the foreground; SIGTERM unmounts and ends it
//
// One thread reads a request and writes its answer; another one takes uevents and
// closes what was held for long enough.  For each request the same is verified as
// by the daemon (src/gate/gate.ts, src/gate/pin.ts): the names come from sysfs and uevents; a
// caller that opens is answered while the device is open here and has the right
// diskseq, and what it is was read after it had been opened; a caller that only
// looks (/proc/TID/syscall tells) is answered from sysfs and /dev.
//
// What it does not do: a pin is held for a second after its last use, and neither
// for as long as a caller needs it nor for no longer than that; a disk that hangs
// has everybody wait; nothing outlives the process; there are no ACLs, xattrs or
// changes of owner and mode; and users who cannot open a disk have it opened.
#define FUSE_USE_VERSION 31
#define _GNU_SOURCE
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <linux/netlink.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#ifndef BLKGETDISKSEQ // kernel headers before 5.15
#define BLKGETDISKSEQ _IOR(0x12, 128, __u64)
#endif

#define MOUNT_OPTIONS "allow_other,default_permissions,dev,nosuid,noexec,fsname=diskseqfs-c,subtype=diskseqfs-c"
#define HOLD_NS 1000000000ull
#define EXPIRE_NS 250000000ull
// sysfs is read again for an unknown name no sooner than this after the last time.
#define SCAN_INTERVAL_NS 100000000ull
// A name may be given to another number while it is being opened; not for ever.
#define ATTEMPTS_MAX 4
#define BUCKETS 16384
#define KERNEL_GROUP 1
#define RECEIVE_BYTES (32 * 1024 * 1024)

// Valid until the next jiffy: the open(2) that a LOOKUP was part of need not ask
// for the attributes again.  Only on answers that a pin stands behind.
#define ONE_JIFFY 1e-6
#define LONG_S 3600.0

// ---- names and inode numbers: diskseq 52 bits, waiting 1, partition 10, link 1

#define PARTITION_MAX 0x3ff
#define KERNEL_PARTITION_MAX 255 // DISK_MAX_PARTS, block/blk.h

struct name {
  unsigned long long diskseq;
  unsigned partition;
  bool link;
};

static fuse_ino_t ino_of(struct name name) {
  return name.diskseq << 12 | (fuse_ino_t)name.partition << 1 | name.link;
}

static struct name name_of(fuse_ino_t ino) {
  return (struct name){.diskseq = ino >> 12, .partition = ino >> 1 & PARTITION_MAX, .link = ino & 1};
}

// Decimal, without sign or leading zero; 0 for anything else.
static unsigned long long parse_number(const char **at, unsigned long long max) {
  unsigned long long value = 0;
  if (**at == '0') return 0;
  for (; isdigit((unsigned char)**at); ++*at) {
    if (value > (max - (unsigned)(**at - '0')) / 10) return 0;
    value = value * 10 + (unsigned)(**at - '0');
  }
  return value;
}

static bool parse_name(const char *text, struct name *name) {
  *name = (struct name){.diskseq = parse_number(&text, (1ull << 52) - 1)};
  if (name->diskseq == 0 || *text == 0) return name->diskseq != 0;
  name->link = strncmp(text, "-part", 5) == 0;
  if (!name->link && *text != 'p') return false;
  text += name->link ? 5 : 1;
  name->partition = (unsigned)parse_number(&text, PARTITION_MAX);
  return name->partition != 0 && *text == 0;
}

// ---- devices as sysfs has them; known by diskseq and by kernel name

struct device {
  struct device *next_diskseq, *next_kernel; // of the same bucket
  unsigned long long diskseq;
  unsigned partition; // 0: the disk
  dev_t number;
  bool loop;
  unsigned seen;   // by which scan
  char kernel[64]; // its directory in /sys/class/block
  char node[64];   // its node below /dev
};

static struct device *by_diskseq[BUCKETS], *by_kernel[BUCKETS];
static size_t devices;
static unsigned long long version; // of all that is known of devices
static int uevents = -1, dev_directory = -1;
static unsigned long long scanned_at;
static unsigned scans;

static unsigned long long now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (unsigned long long)now.tv_sec * 1000000000 + (unsigned long long)now.tv_nsec;
}

static struct device **diskseq_bucket(unsigned long long diskseq) { return &by_diskseq[diskseq % BUCKETS]; }

static struct device **kernel_bucket(const char *kernel) {
  unsigned hash = 2166136261u; // FNV-1a
  while (*kernel) hash = (hash ^ (unsigned char)*kernel++) * 16777619u;
  return &by_kernel[hash % BUCKETS];
}

static ssize_t read_file(const char *path, char *into, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  ssize_t length = read(fd, into, size - 1);
  close(fd);
  into[length < 0 ? 0 : length] = 0;
  return length;
}

// All that a `uevent` file of sysfs tells; false where it is no device of the tree.
static bool parse_device(const char *kernel, char *text, struct device *device) {
  unsigned major = 0, minor = 0;
  bool disk = false;
  *device = (struct device){.loop = strncmp(kernel, "loop", 4) == 0};
  for (char *line; (line = strsep(&text, "\n"));) {
    if (strncmp(line, "MAJOR=", 6) == 0) major = (unsigned)strtoul(line + 6, NULL, 10);
    else if (strncmp(line, "MINOR=", 6) == 0) minor = (unsigned)strtoul(line + 6, NULL, 10);
    else if (strncmp(line, "DEVNAME=", 8) == 0) snprintf(device->node, sizeof device->node, "%s", line + 8);
    else if (strncmp(line, "DISKSEQ=", 8) == 0) device->diskseq = strtoull(line + 8, NULL, 10);
    else if (strncmp(line, "PARTN=", 6) == 0) device->partition = (unsigned)strtoul(line + 6, NULL, 10);
    else if (strcmp(line, "DEVTYPE=disk") == 0) disk = true;
  }
  device->number = makedev(major, minor);
  snprintf(device->kernel, sizeof device->kernel, "%s", kernel);
  return device->node[0] && device->diskseq && disk == (device->partition == 0) &&
         device->partition <= PARTITION_MAX;
}

static bool same_device(const struct device *a, const struct device *b) {
  return a->diskseq == b->diskseq && a->partition == b->partition && a->number == b->number &&
         strcmp(a->kernel, b->kernel) == 0;
}

// A loop device without a file, or a partition of one, is nobody's.
static bool bound(const char *kernel) {
  char path[128];
  if (strncmp(kernel, "loop", 4) != 0) return true;
  snprintf(path, sizeof path, "/sys/class/block/loop%.*s/loop/backing_file",
           (int)strspn(kernel + 4, "0123456789"), kernel + 4);
  return access(path, F_OK) == 0;
}

static bool read_device(const char *kernel, struct device *device) {
  char path[128], text[4096];
  if (snprintf(path, sizeof path, "/sys/class/block/%s/uevent", kernel) >= (int)sizeof path) return false;
  return read_file(path, text, sizeof text) > 0 && parse_device(kernel, text, device) && bound(kernel);
}

static struct device *find_kernel(const char *kernel) {
  struct device *device = *kernel_bucket(kernel);
  while (device && strcmp(device->kernel, kernel) != 0) device = device->next_kernel;
  return device;
}

static struct device *find_known(struct name name) {
  struct device *device = *diskseq_bucket(name.diskseq);
  while (device && (device->diskseq != name.diskseq || device->partition != name.partition))
    device = device->next_diskseq;
  return device;
}

static void drop_device(struct device *device) {
  struct device **at = diskseq_bucket(device->diskseq);
  while (*at != device) at = &(*at)->next_diskseq;
  *at = device->next_diskseq;
  at = kernel_bucket(device->kernel);
  while (*at != device) at = &(*at)->next_kernel;
  *at = device->next_kernel;
  free(device);
  devices--, version++;
}

static void add_device(const struct device *seen) {
  struct device *device = malloc(sizeof *device);
  if (!device) abort();
  *device = *seen;
  device->seen = scans;
  struct device **bucket = diskseq_bucket(device->diskseq);
  device->next_diskseq = *bucket, *bucket = device;
  bucket = kernel_bucket(device->kernel);
  device->next_kernel = *bucket, *bucket = device;
  devices++, version++;
}

// Looks at a device again; and at its partitions, where the disk is another one now.
static void refresh(const char *kernel) {
  struct device now, *before = find_kernel(kernel), *part;
  bool there = read_device(kernel, &now);
  if (there && before && same_device(before, &now)) {
    before->seen = scans;
    return;
  }
  unsigned long long disk = before && before->partition == 0 ? before->diskseq : 0;
  if (before) drop_device(before);
  if (there) add_device(&now);
  for (unsigned i = 1; disk && i <= KERNEL_PARTITION_MAX; i++) {
    part = find_known((struct name){.diskseq = disk, .partition = i});
    if (!part) continue;
    char name[sizeof part->kernel];
    snprintf(name, sizeof name, "%s", part->kernel);
    refresh(name);
  }
}

static void scan(void) {
  DIR *block = opendir("/sys/class/block");
  if (!block) return;
  scans++;
  for (struct dirent *entry; (entry = readdir(block));)
    if (entry->d_name[0] != '.') refresh(entry->d_name);
  closedir(block);
  for (size_t i = 0; i < BUCKETS; i++)
    for (struct device *next, *device = by_kernel[i]; device; device = next) {
      next = device->next_kernel;
      if (device->seen != scans) drop_device(device);
    }
  scanned_at = now_ns();
}

static void listen_to_uevents(void) {
  struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = KERNEL_GROUP};
  uevents = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
  setsockopt(uevents, SOL_SOCKET, SO_RCVBUFFORCE, &(int){RECEIVE_BYTES}, sizeof(int));
  if (uevents < 0 || bind(uevents, (struct sockaddr *)&address, sizeof address) < 0) {
    perror("server: uevents");
    exit(1);
  }
}

// Takes what is waiting: the kernel queues a device's event before the call that
// caused it returns, so nothing that happened before this call is missed.
static void drain(void) {
  char message[8192];
  struct sockaddr_nl from;
  for (;;) {
    socklen_t size = sizeof from;
    ssize_t length =
        recvfrom(uevents, message, sizeof message - 1, MSG_TRUNC, (struct sockaddr *)&from, &size);
    if (length < 0 && errno == EINTR) continue;
    if (length < 0 && errno != ENOBUFS) return;
    if (length < 0 || length >= (ssize_t)sizeof message) {
      scan(); // some were lost
      continue;
    }
    if (from.nl_pid != 0) continue; // not the kernel's
    message[length] = 0;
    bool block = false;
    const char *name = strrchr(message, '/'); // "add@/devices/virtual/block/loop0"
    for (char *field = message; field < message + length; field += strlen(field) + 1)
      block |= strcmp(field, "SUBSYSTEM=block") == 0;
    if (block && name) refresh(name + 1);
  }
}

static struct device *find(struct name name) {
  drain();
  struct device *device = find_known(name);
  if (device || now_ns() - scanned_at < SCAN_INTERVAL_NS) return device;
  scan(); // a diskseq may change without an event
  return find_known(name);
}

// ---- nodes: what the kernel knows of, and the device it is held by

struct node {
  struct node *next;
  fuse_ino_t ino;
  dev_t number; // of the kernel's inode, which never gets another one
  uint64_t nlookup;
  int fd; // the pin, or -1
  bool removable;
  unsigned long long used_at;
};

// Held for all that is known of devices and nodes.
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct node *nodes[BUCKETS];
static size_t pins;

static struct node **node_at(fuse_ino_t ino) {
  struct node **at = &nodes[(ino >> 1 ^ ino >> 12) % BUCKETS];
  while (*at && (*at)->ino != ino) at = &(*at)->next;
  return at;
}

static struct node *get_node(fuse_ino_t ino) {
  struct node **at = node_at(ino);
  if (!*at && (*at = calloc(1, sizeof **at))) **at = (struct node){.ino = ino, .fd = -1};
  return *at;
}

static void release_node(struct node **at) {
  struct node *node = *at;
  if (node->nlookup > 0 || node->fd >= 0) return;
  *at = node->next;
  free(node);
}

static void unpin(struct node *node) {
  close(node->fd);
  node->fd = -1;
  pins--;
}

// A close may wait for its disk, so it is nothing for those who answer.
static void expire(void) {
  int fds[256];
  size_t count = 0;
  pthread_mutex_lock(&lock);
  unsigned long long now = now_ns();
  for (size_t i = 0; i < BUCKETS && pins > 0 && count < 256; i++)
    for (struct node **at = &nodes[i], *node; (node = *at) && count < 256;) {
      if (node->fd >= 0 && now - node->used_at >= HOLD_NS) {
        fds[count++] = node->fd;
        node->fd = -1;
        pins--;
      }
      release_node(at);
      if (*at == node) at = &node->next;
    }
  pthread_mutex_unlock(&lock);
  while (count > 0) close(fds[--count]);
}

// Takes uevents as they come, and pins that nobody has used for a while.
static void *keep(void *unused) {
  (void)unused;
  for (;;) {
    unsigned long long began = now_ns();
    while (now_ns() - began < EXPIRE_NS) {
      poll(&(struct pollfd){.fd = uevents, .events = POLLIN}, 1, EXPIRE_NS / 1000000);
      pthread_mutex_lock(&lock);
      drain();
      pthread_mutex_unlock(&lock);
    }
    expire();
  }
  return NULL;
}

// An O_PATH descriptor of the device's node, and what stat says of it.
static int open_node(const struct device *device, struct stat *st) {
  int fd = openat(dev_directory, device->node, O_PATH | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) return -errno;
  if (fstat(fd, st) == 0 && S_ISBLK(st->st_mode) && st->st_rdev == device->number) return fd;
  close(fd);
  return -ESTALE;
}

// What is read once the device is open (for a loop device: and seen bound) stays
// true for as long as it is.  -ESTALE: it is another device.
static int open_verified(const struct device *device) {
  struct stat st;
  struct loop_info64 info;
  struct device found;
  unsigned long long diskseq;
  char path[64], text[4096];
  int node = open_node(device, &st);
  if (node < 0) return node == -ENOENT ? -ESTALE : node;
  snprintf(path, sizeof path, "/proc/self/fd/%d", node);
  int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC), error = errno;
  close(node);
  if (fd < 0) return device->loop && error == ENXIO ? -ESTALE : -error;
  snprintf(path, sizeof path, "/sys/dev/block/%u:%u/uevent", major(device->number), minor(device->number));
  if ((!device->loop || ioctl(fd, LOOP_GET_STATUS64, &info) == 0) && ioctl(fd, BLKGETDISKSEQ, &diskseq) == 0 &&
      diskseq == device->diskseq && read_file(path, text, sizeof text) > 0 &&
      parse_device(device->kernel, text, &found) && same_device(&found, device))
    return fd;
  close(fd);
  return -ESTALE;
}

// Its medium may be another one the next time it is opened.
static bool is_removable(const struct device *device) {
  char path[128], text[8];
  snprintf(path, sizeof path, "/sys/class/block/%s/%sremovable", device->kernel, device->partition ? "../" : "");
  return read_file(path, text, sizeof text) > 0 && text[0] == '1';
}

// ---- what the caller is doing

// Calls that cannot open what a node stands for.
static const int inspecting[] = {
#ifdef SYS_stat
    SYS_stat, SYS_lstat, SYS_readlink, SYS_access, SYS_chmod, SYS_chown, SYS_lchown, SYS_utimes, SYS_unlink,
#endif
    SYS_newfstatat, SYS_fstat, SYS_statx, SYS_readlinkat, SYS_faccessat, SYS_faccessat2, SYS_getxattr,
    SYS_lgetxattr, SYS_fgetxattr, SYS_listxattr, SYS_llistxattr, SYS_flistxattr, SYS_statfs, SYS_fstatfs,
    SYS_inotify_add_watch, SYS_name_to_handle_at, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat,
    SYS_utimensat, SYS_unlinkat,
};

#define THREADS 64
static struct {
  pid_t tid;
  int fd;
} threads[THREADS]; // looking up the path in /proc costs as much as reading the file

static ssize_t read_syscall(pid_t tid, char *into, size_t size) {
  unsigned at = (unsigned)tid % THREADS;
  ssize_t length = threads[at].tid == tid ? pread(threads[at].fd, into, size - 1, 0) : -1;
  if (length <= 0) {
    char path[64];
    if (threads[at].tid) close(threads[at].fd);
    snprintf(path, sizeof path, "/proc/%d/syscall", tid);
    threads[at].fd = open(path, O_RDONLY | O_CLOEXEC);
    threads[at].tid = threads[at].fd < 0 ? 0 : tid;
    if (threads[at].fd < 0) return -1;
    length = pread(threads[at].fd, into, size - 1, 0);
  }
  into[length < 0 ? 0 : length] = 0;
  return length;
}

// Whether whatever is answered opens no device; false in doubt.
static bool inspects(pid_t tid) {
  char line[256], *at = line;
  unsigned long long words[8];
  if (tid == 0) return false;
  // "running": it has sent its request and has not gone to sleep yet
  for (int i = 0; i < 9; i++)
    if (read_syscall(tid, line, sizeof line) <= 0) return false;
    else if (line[0] != 'r') break;
  if (!isdigit((unsigned char)line[0])) return false;
  long number = strtol(line, &at, 10);
  for (int i = 0; i < 8; i++) words[i] = strtoull(at, &at, 16); // six arguments, stack, program counter
  if (words[7] < 1ull << 32) return false; // a 32-bit program: its numbers mean other calls
  int flags = -1;
  if (number == SYS_openat) flags = (int)words[2];
#ifdef SYS_open
  if (number == SYS_open) flags = (int)words[1];
#endif
  if (flags >= 0) return (flags & (O_PATH | O_DIRECTORY)) != 0;
  for (size_t i = 0; i < sizeof inspecting / sizeof *inspecting; i++)
    if (number == inspecting[i]) return true;
  return false;
}

// ---- answers

static void node_attr(fuse_ino_t ino, dev_t number, struct stat *st) {
  st->st_ino = ino;
  st->st_nlink = 1;
  st->st_rdev = number;
  st->st_size = st->st_blocks = 0;
}

static int inspect(const struct device *device, struct stat *st) {
  struct device now;
  if (!read_device(device->kernel, &now) || !same_device(&now, device)) return ESTALE;
  int fd = open_node(device, st);
  if (fd < 0) return ESTALE;
  close(fd);
  return 0;
}

static int pin(struct node *node, const struct device *device, struct stat *st) {
  unsigned long long diskseq;
  if (node->fd >= 0) {
    bool current = ioctl(node->fd, BLKGETDISKSEQ, &diskseq) == 0 && diskseq == device->diskseq;
    if (!current || node->removable) unpin(node);
    if (!current) return ESTALE;
  }
  if (node->fd < 0) {
    int fd = open_verified(device);
    if (fd < 0) return -fd;
    node->fd = fd;
    node->removable = is_removable(device);
    pins++;
  }
  node->used_at = now_ns();
  return fstat(node->fd, st) < 0 ? errno : 0;
}

// An errno, or 0 with the attributes and how long they are valid, s.
// known: it is an inode that is asked for, not a name.
static int admit(struct node *node, pid_t tid, bool known, struct stat *st, double *valid) {
  bool opens = !inspects(tid);
  for (int i = 0; i < ATTEMPTS_MAX; i++) {
    struct device *device = find(name_of(node->ino));
    if (!device) break;
    dev_t number = device->number;
    if (node->number != number) {
      if (known && opens) return ESTALE; // the kernel looks the name up again
      if (node->fd >= 0) unpin(node);
      if (!known) node->number = number;
    }
    int error = opens ? pin(node, device, st) : inspect(device, st);
    if (error == 0) {
      node_attr(node->ino, number, st);
      *valid = opens ? ONE_JIFFY : 0;
    }
    if (error != ESTALE) return error;
    char kernel[sizeof device->kernel];
    snprintf(kernel, sizeof kernel, "%s", device->kernel);
    refresh(kernel);
  }
  return known && opens ? ENXIO : ENOENT;
}

static void link_attr(fuse_ino_t ino, struct stat *st) {
  struct name name = name_of(ino);
  *st = (struct stat){.st_ino = ino, .st_mode = S_IFLNK | 0777, .st_nlink = 1};
  st->st_size = snprintf(NULL, 0, "%llup%u", name.diskseq, name.partition);
}

static void lookup(fuse_req_t req, fuse_ino_t parent, const char *text) {
  struct fuse_entry_param entry = {0};
  struct name name;
  if (parent != FUSE_ROOT_ID || !parse_name(text, &name)) {
    fuse_reply_err(req, ENOENT);
    return;
  }
  entry.ino = ino_of(name);
  pthread_mutex_lock(&lock);
  if (name.link) {
    int error = find(name) ? 0 : ENOENT;
    link_attr(entry.ino, &entry.attr);
    if (error) fuse_reply_err(req, error);
    else fuse_reply_entry(req, &entry);
  } else {
    struct node *node = get_node(entry.ino);
    int error = node ? admit(node, fuse_req_ctx(req)->pid, false, &entry.attr, &entry.attr_timeout) : ENOMEM;
    // The kernel never updates the number of an inode that it has.
    entry.generation = entry.attr.st_rdev;
    if (error) fuse_reply_err(req, error);
    else if (fuse_reply_entry(req, &entry) == 0) node->nlookup++;
    if (node) release_node(node_at(entry.ino));
  }
  pthread_mutex_unlock(&lock);
}

static void getattr(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file) {
  (void)file;
  struct stat st = {.st_ino = ino, .st_mode = S_IFDIR | S_ISVTX | 0755, .st_nlink = 2};
  double valid = LONG_S;
  int error = 0;
  if (ino != FUSE_ROOT_ID && name_of(ino).link) {
    link_attr(ino, &st);
    valid = 0;
  } else if (ino != FUSE_ROOT_ID) {
    pthread_mutex_lock(&lock);
    struct node *node = *node_at(ino);
    error = node ? admit(node, fuse_req_ctx(req)->pid, true, &st, &valid) : ESTALE;
    pthread_mutex_unlock(&lock);
  }
  if (error) fuse_reply_err(req, error);
  else fuse_reply_attr(req, &st, valid);
}

static void forget_one(fuse_ino_t ino, uint64_t count) {
  struct node **at = node_at(ino);
  if (!*at) return; // a link
  (*at)->nlookup -= count < (*at)->nlookup ? count : (*at)->nlookup;
  release_node(at);
}

static void forget(fuse_req_t req, fuse_ino_t ino, uint64_t count) {
  pthread_mutex_lock(&lock);
  forget_one(ino, count);
  pthread_mutex_unlock(&lock);
  fuse_reply_none(req);
}

static void forget_multi(fuse_req_t req, size_t count, struct fuse_forget_data *all) {
  pthread_mutex_lock(&lock);
  for (size_t i = 0; i < count; i++) forget_one(all[i].ino, all[i].nlookup);
  pthread_mutex_unlock(&lock);
  fuse_reply_none(req);
}

static void readlink_of(fuse_req_t req, fuse_ino_t ino) {
  struct name name = name_of(ino);
  char target[40];
  snprintf(target, sizeof target, "%llup%u", name.diskseq, name.partition);
  if (ino != FUSE_ROOT_ID && name.link) fuse_reply_readlink(req, target);
  else fuse_reply_err(req, EINVAL);
}

static void statfs_of(fuse_req_t req, fuse_ino_t ino) {
  (void)ino;
  pthread_mutex_lock(&lock);
  drain();
  size_t files = devices;
  pthread_mutex_unlock(&lock);
  fuse_reply_statfs(req, &(struct statvfs){.f_files = files, .f_namemax = 255, .f_bsize = 4096, .f_frsize = 4096});
}

// ---- the directory: encoded once, for all who open it until something changes

struct listing {
  size_t users, count, size, room;
  size_t *ends; // where entry i ends
  char *bytes;
  unsigned long long version;
};

static struct listing *listed;

static void unuse(struct listing *listing) {
  if (--listing->users > 0) return;
  free(listing->bytes);
  free(listing->ends);
  free(listing);
}

static void append(fuse_req_t req, struct listing *listing, fuse_ino_t ino, mode_t mode, const char *name) {
  struct stat st = {.st_ino = ino, .st_mode = mode};
  size_t size = fuse_add_direntry(req, NULL, 0, name, NULL, 0);
  while (listing->size + size > listing->room) {
    listing->room = listing->room ? 2 * listing->room : 4096;
    listing->bytes = realloc(listing->bytes, listing->room);
    if (!listing->bytes) abort();
  }
  fuse_add_direntry(req, listing->bytes + listing->size, size, name, &st, (off_t)listing->count + 1);
  listing->size += size;
  listing->ends[listing->count++] = listing->size;
}

static int by_name(const void *a, const void *b) {
  const struct device *x = *(struct device *const *)a, *y = *(struct device *const *)b;
  if (x->diskseq != y->diskseq) return x->diskseq < y->diskseq ? -1 : 1;
  return (int)x->partition - (int)y->partition;
}

static struct listing *list(fuse_req_t req) {
  struct listing *listing = calloc(1, sizeof *listing);
  struct device **sorted = calloc(devices + 1, sizeof *sorted);
  size_t count = 0;
  if (!listing || !sorted || !(listing->ends = calloc(2 * devices + 2, sizeof *listing->ends))) abort();
  *listing = (struct listing){.users = 1, .version = version, .ends = listing->ends};
  for (size_t i = 0; i < BUCKETS; i++)
    for (struct device *device = by_kernel[i]; device; device = device->next_kernel) sorted[count++] = device;
  qsort(sorted, count, sizeof *sorted, by_name);
  append(req, listing, FUSE_ROOT_ID, S_IFDIR, ".");
  append(req, listing, FUSE_ROOT_ID, S_IFDIR, "..");
  for (size_t i = 0; i < count; i++) {
    struct name name = {.diskseq = sorted[i]->diskseq, .partition = sorted[i]->partition};
    char text[48];
    snprintf(text, sizeof text, name.partition ? "%llup%u" : "%llu", name.diskseq, name.partition);
    append(req, listing, ino_of(name), S_IFBLK, text);
    if (name.partition == 0) continue;
    snprintf(text, sizeof text, "%llu-part%u", name.diskseq, name.partition);
    name.link = true;
    append(req, listing, ino_of(name), S_IFLNK, text);
  }
  free(sorted);
  return listing;
}

static void open_directory(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file) {
  if (ino != FUSE_ROOT_ID) {
    fuse_reply_err(req, ENOTDIR);
    return;
  }
  pthread_mutex_lock(&lock);
  drain();
  if (!listed || listed->version != version) {
    if (listed) unuse(listed);
    listed = list(req);
  }
  pthread_mutex_unlock(&lock);
  listed->users++;
  file->fh = (uintptr_t)listed;
  if (fuse_reply_open(req, file) < 0) unuse((struct listing *)(uintptr_t)file->fh);
}

static void read_directory(fuse_req_t req, fuse_ino_t ino, size_t size, off_t after, struct fuse_file_info *file) {
  (void)ino;
  struct listing *listing = (struct listing *)(uintptr_t)file->fh;
  size_t first = after < 0 || (size_t)after > listing->count ? listing->count : (size_t)after, last = first;
  size_t start = first ? listing->ends[first - 1] : 0;
  while (last < listing->count && listing->ends[last] - start <= size) last++;
  fuse_reply_buf(req, listing->bytes + start, (last ? listing->ends[last - 1] : 0) - start);
}

static void release_directory(fuse_req_t req, fuse_ino_t ino, struct fuse_file_info *file) {
  (void)ino;
  unuse((struct listing *)(uintptr_t)file->fh);
  fuse_reply_err(req, 0);
}

static void started(void *mountpoint, struct fuse_conn_info *connection) {
  (void)connection;
  fprintf(stderr, "{\"msg\":\"mounted\",\"mountpoint\":\"%s\",\"devices\":%zu}\n", (char *)mountpoint, devices);
}

static const struct fuse_lowlevel_ops operations = {
    .init = started,
    .lookup = lookup,
    .getattr = getattr,
    .forget = forget,
    .forget_multi = forget_multi,
    .readlink = readlink_of,
    .statfs = statfs_of,
    .opendir = open_directory,
    .readdir = read_directory,
    .releasedir = release_directory,
};

// Signals are for the thread that waits for requests.
static void start_keeping(void) {
  pthread_t thread;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  if (pthread_create(&thread, NULL, keep, NULL) != 0) abort();
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

int main(int count, char **arguments) {
  char *options[] = {arguments[0], "-o", MOUNT_OPTIONS};
  struct fuse_args args = FUSE_ARGS_INIT(3, options);
  if (count != 2) return fputs("usage: server MOUNTPOINT\n", stderr), 2;
  dev_directory = open("/dev", O_PATH | O_DIRECTORY | O_CLOEXEC);
  listen_to_uevents(); // first: what changes during the scan is then not missed
  scan();
  struct fuse_session *session = fuse_session_new(&args, &operations, sizeof operations, arguments[1]);
  if (!session || fuse_set_signal_handlers(session) != 0 || fuse_session_mount(session, arguments[1]) != 0) return 1;
  start_keeping();
  int result = fuse_session_loop(session);
  fuse_session_unmount(session);
  fuse_opt_free_args(&args);
  return result < 0;
}
