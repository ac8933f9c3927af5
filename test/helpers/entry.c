// SPDX-License-Identifier: MIT
/*
 * Opens PATH, which lies below 4 GiB, by one kind of system call:
 *   syscall  a 64-bit openat
 *   int80    a 32-bit open
 *   dressed  the same, with registers that make it look like a 64-bit fstat
 * A FIFO without a writer keeps it in the call.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define HIGH 0x7f00000000000000ul

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  char *path = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
  if (path == MAP_FAILED) return 2;
  snprintf(path, 4096, "%s", argv[2]);
  unsigned long high = strcmp(argv[1], "dressed") == 0 ? HIGH : 0;
  long result;
  if (strcmp(argv[1], "syscall") == 0)
    __asm__ volatile("xor %%r10d, %%r10d; syscall"
                     : "=a"(result)
                     : "0"((long)SYS_openat), "D"((long)AT_FDCWD), "S"(path), "d"((long)O_RDONLY)
                     : "rcx", "r10", "r11", "memory");
  else
    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "0"(5L), "b"((unsigned long)path | high), "c"((unsigned long)O_RDONLY | high), "d"(high)
                     : "r8", "r9", "r10", "r11", "memory");
  return result < 0;
}
