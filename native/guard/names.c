// SPDX-License-Identifier: MIT
// Names in the tree, without a daemon: what they stand for is looked up in sysfs.
#include "names.h"

#include <dirent.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "guard.h"

// Parses a number: decimal, without sign or leading zero; 0 if there is none.
static uint64_t decimal(const char **text, unsigned digits_max) {
  uint64_t value = 0;
  unsigned digits = 0;
  if (**text == '0') return 0;
  for (; **text >= '0' && **text <= '9'; (*text)++, digits++) {
    unsigned digit = (unsigned)(**text - '0');
    if (digits == digits_max || value > (UINT64_MAX - digit) / 10) return 0;
    value = value * 10 + digit;
  }
  return value;
}

enum { DISKSEQ_SHIFT = 12 };
enum { DISKSEQ_BITS = 51, NUMBER_BITS = 8, MINOR_BITS = 20, PARTITION_DISKSEQ_BITS = 35 };
static const uint64_t PARTITION_INODE = (uint64_t)1 << 63;

static const char DIRECTORIES[] = ".dm";

static struct name parse_name(const char *text) {
  struct name name = {.diskseq = decimal(&text, 20)};
  bool whole = *text == 0;
  if (strncmp(text, "-part", 5) == 0) {
    text += 5;
    name.symlink = true;
    name.partition = decimal(&text, 5);
  } else if (*text == 'p') {
    text++;
    name.partition = decimal(&text, 5);
  }
  if (*text || name.diskseq >> DISKSEQ_BITS || name.partition > PARTITION_MAX) name.diskseq = 0;
  if (name.partition == 0 && !whole) name.diskseq = 0;
  return name;
}

// The disks that existed when the daemon had ended. Names of later ones are not in use, as nobody was
// told of them.
static struct disk {
  uint64_t diskseq;
  char kernel[32];
} *disks;
static size_t disk_count, disk_room;
static int64_t disks_ms = -1;

static void read_disks(void) {
  DIR *block = opendir("/sys/block");
  disk_count = 0;
  for (struct dirent *entry; block && (entry = readdir(block));) {
    char path[sizeof "/sys/block//diskseq" + sizeof entry->d_name], text[64];
    snprintf(path, sizeof path, "/sys/block/%s/diskseq", entry->d_name);
    if (entry->d_name[0] == '.' || strlen(entry->d_name) >= sizeof disks->kernel || !read_line(path, text, sizeof text)) continue;
    if (disk_count == disk_room) {
      size_t more = disk_room ? 2 * disk_room : 64;
      struct disk *moved = realloc(disks, more * sizeof *disks);
      if (!moved) break;
      disks = moved;
      disk_room = more;
    }
    disks[disk_count].diskseq = strtoull(text, NULL, 10);
    strcpy(disks[disk_count++].kernel, entry->d_name);
  }
  if (block) closedir(block);
  disks_ms = served.died_ms;
}

// The number in the line of a uevent file that begins with `key`; 0 if there is none.
static uint64_t number_of(const char *uevent, const char *key) {
  const char *at = strstr(uevent, key);
  return at ? strtoull(at + strlen(key), NULL, 10) : 0;
}

// The name of the device that the kernel calls `text`, if it is that disk or a partition of it.
static struct name parse_kernel_name(uint64_t diskseq, const char *text) {
  struct name name = {.by_kernel_name = true};
  char path[512], uevent[1024];
  if (snprintf(path, sizeof path, "/sys/class/block/%s/uevent", text) >= (int)sizeof path || text[0] == '.') return name;
  if (!read_line(path, uevent, sizeof uevent) || number_of(uevent, "\nDISKSEQ=") != diskseq) return name;
  name.partition = number_of(uevent, "\nPARTN=");
  if (name.partition <= PARTITION_MAX) name.diskseq = diskseq;
  return name;
}

struct name parse_in(uint64_t directory, const char *text) {
  if (directory == FUSE_ROOT_ID) {
    if (strcmp(text, DIRECTORIES) == 0) return (struct name){.directory = true};
    return parse_name(text);
  }
  if (directory != DIRECTORY) return parse_kernel_name(directory >> DISKSEQ_SHIFT, text);
  struct name name = parse_name(text);
  if (name.partition) name.diskseq = 0;
  name.directory = name.diskseq != 0;
  return name;
}

// The minor number of a partition; -1 if sysfs does not have it.
static int64_t minor_of(const struct name *name) {
  if (disks_ms != served.died_ms) read_disks();
  for (size_t i = 0; i < disk_count; i++) {
    if (disks[i].diskseq != name->diskseq) continue;
    const char *kernel = disks[i].kernel;
    char path[128], text[64];
    unsigned major, minor;
    char last = kernel[strlen(kernel) - 1];
    snprintf(path, sizeof path, "/sys/block/%s/%s%s%u/dev", kernel, kernel, last >= '0' && last <= '9' ? "p" : "",
             (unsigned)name->partition);
    return read_line(path, text, sizeof text) && sscanf(text, "%u:%u", &major, &minor) == 2 ? (int64_t)minor : -1;
  }
  return -1;
}

uint64_t link_id(const struct name *name, uint64_t kind) {
  return name->diskseq << DISKSEQ_SHIFT | name->partition << PARTITION_SHIFT | kind;
}

uint64_t id_of(const struct name *name) {
  if (name->directory) return link_id(name, DIRECTORY);
  if (name->diskseq == 0) return 0;
  if (name->symlink) return link_id(name, SYMLINK);
  if (name->partition == 0) return name->diskseq << DISKSEQ_SHIFT;
  int64_t minor = minor_of(name);
  if (minor < 0 || name->partition >> NUMBER_BITS || name->diskseq >> PARTITION_DISKSEQ_BITS) return 0;
  return PARTITION_INODE | (name->diskseq << NUMBER_BITS | name->partition) << MINOR_BITS | (uint64_t)minor;
}
