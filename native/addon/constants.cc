// SPDX-License-Identifier: MIT
// Numbers that differ between architectures, from the C headers.
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "addon.h"

namespace diskseqfs {

void InitConstants(Napi::Env env, Napi::Object exports) {
  Napi::Object calls = Napi::Object::New(env);
  auto call = [&](const char* name, long number) { calls.Set(name, Napi::Number::New(env, double(number))); };
#define CALL(name) call(#name, SYS_##name)
#ifdef SYS_open  // architectures that are older than the *at calls
  CALL(open);
  CALL(creat);
  CALL(stat);
  CALL(lstat);
  CALL(readlink);
  CALL(access);
  CALL(chmod);
  CALL(chown);
  CALL(lchown);
  CALL(utime);
  CALL(utimes);
  CALL(futimesat);
  CALL(mkdir);
  CALL(mknod);
  CALL(symlink);
  CALL(link);
  CALL(rename);
  CALL(unlink);
  CALL(rmdir);
#endif
#ifdef SYS_renameat
  CALL(renameat);
#endif
  CALL(openat);
  CALL(openat2);
  CALL(newfstatat);
  CALL(fstat);
  CALL(statx);
  CALL(readlinkat);
  CALL(faccessat);
  CALL(getxattr);
  CALL(lgetxattr);
  CALL(fgetxattr);
  CALL(listxattr);
  CALL(llistxattr);
  CALL(flistxattr);
  CALL(setxattr);
  CALL(lsetxattr);
  CALL(fsetxattr);
  CALL(removexattr);
  CALL(lremovexattr);
  CALL(fremovexattr);
  CALL(fchmod);
  CALL(fchmodat);
  CALL(fchown);
  CALL(fchownat);
  CALL(utimensat);
  CALL(mkdirat);
  CALL(mknodat);
  CALL(symlinkat);
  CALL(linkat);
  CALL(renameat2);
  CALL(unlinkat);
  CALL(statfs);
  CALL(fstatfs);
  CALL(inotify_add_watch);
  CALL(name_to_handle_at);
  CALL(open_by_handle_at);
  CALL(io_uring_enter);
  CALL(ioctl);
  CALL(chdir);
  CALL(chroot);
  CALL(truncate);
  CALL(umount2);
  CALL(fanotify_mark);
  CALL(execve);
  CALL(execveat);
  // These are so new that they have one number on every architecture, and
  // that some releases' headers lack them.
  call("open_tree", 428);
  call("faccessat2", 439);
  call("fchmodat2", 452);
  call("setxattrat", 463);
  call("getxattrat", 464);
  call("listxattrat", 465);
  call("removexattrat", 466);
  call("file_getattr", 468);
  call("file_setattr", 469);
#undef CALL
  exports.Set("syscalls", calls);
  exports.Set("O_PATH", Napi::Number::New(env, O_PATH));
  exports.Set("UTIME_NOW", Napi::Number::New(env, UTIME_NOW));
  exports.Set("UTIME_OMIT", Napi::Number::New(env, UTIME_OMIT));
}

}  // namespace diskseqfs
