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
#ifdef SYS_open
  CALL(open);
  CALL(creat);
  CALL(stat);
  CALL(lstat);
  CALL(readlink);
  CALL(access);
#endif
  CALL(openat);
  CALL(openat2);
  CALL(newfstatat);
  CALL(fstat);
  CALL(statx);
  CALL(readlinkat);
  CALL(faccessat);
#ifdef SYS_faccessat2
  CALL(faccessat2);
#else
  call("faccessat2", 439);
#endif
  CALL(getxattr);
  CALL(lgetxattr);
  CALL(fgetxattr);
  CALL(listxattr);
  CALL(llistxattr);
  CALL(flistxattr);
  // New enough to have one number on every architecture.
  call("getxattrat", 464);
  call("listxattrat", 465);
  CALL(statfs);
  CALL(fstatfs);
  CALL(inotify_add_watch);
  CALL(name_to_handle_at);
  CALL(io_uring_enter);
#undef CALL
  exports.Set("syscalls", calls);
  exports.Set("O_PATH", Napi::Number::New(env, O_PATH));
  exports.Set("UTIME_NOW", Napi::Number::New(env, UTIME_NOW));
  exports.Set("UTIME_OMIT", Napi::Number::New(env, UTIME_OMIT));
}

}  // namespace diskseqfs
