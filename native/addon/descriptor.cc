// SPDX-License-Identifier: MIT
// Plain calls on descriptors and small files, none of which can block on a
// disk: /dev/fuse (non-blocking), procfs, sysfs, and inodes of devtmpfs.
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "addon.h"
#include "descriptor.h"
#include "tasks.h"

namespace diskseqfs {

int OpenBeneath(int dir, const char* path, uint64_t flags) {
  struct open_how how = {};
  how.flags = flags;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV | RESOLVE_NO_MAGICLINKS;
  return static_cast<int>(syscall(SYS_openat2, dir, path, &how, sizeof how));
}

ssize_t ReadSmallFile(int dir, const char* path, char* out, size_t size) {
  int fd = openat(dir, path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  ssize_t n = read(fd, out, size);
  int saved = errno;
  close(fd);
  errno = saved;
  return n;
}

// read(fd, buffer): bytes read.
static Napi::Value Read(const Napi::CallbackInfo& info) {
  Bytes out = BytesArg(info, 1);
  return Result(info.Env(), read(IntArg(info, 0), out.data, out.size));
}

// write(fd, buffer, length): bytes written.
static Napi::Value Write(const Napi::CallbackInfo& info) {
  Bytes in = BytesArg(info, 1);
  return Result(info.Env(), write(IntArg(info, 0), in.data, std::min<size_t>(in.size, IntArg(info, 2))));
}

static Napi::Value Duplicate(const Napi::CallbackInfo& info) {
  return Result(info.Env(), fcntl(IntArg(info, 0), F_DUPFD_CLOEXEC, 0));
}

static Napi::Value Close(const Napi::CallbackInfo& info) {
  return Result(info.Env(), close(IntArg(info, 0)));
}

// readFile(path, buffer): bytes read; one read, for procfs and sysfs.
static Napi::Value ReadFile(const Napi::CallbackInfo& info) {
  Bytes out = BytesArg(info, 1);
  return Result(info.Env(), ReadSmallFile(AT_FDCWD, StringArg(info, 0).c_str(), out.data, out.size));
}

// openFile(path): for reading.
static Napi::Value OpenFile(const Napi::CallbackInfo& info) {
  return Result(info.Env(), open(StringArg(info, 0).c_str(), O_RDONLY | O_CLOEXEC));
}

// readAgain(fd, buffer): bytes read from the file's beginning.
static Napi::Value ReadAgain(const Napi::CallbackInfo& info) {
  Bytes out = BytesArg(info, 1);
  return Result(info.Env(), pread(IntArg(info, 0), out.data, out.size, 0));
}

// openDirectory(path): an O_PATH descriptor.
static Napi::Value OpenDirectory(const Napi::CallbackInfo& info) {
  return Result(info.Env(), open(StringArg(info, 0).c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
}

// lockFile(path): opens a file, or creates it, and returns a descriptor that holds
// flock(LOCK_EX) on it. Any process that can open a file can hold a lock on it, so
// only this user may be able to open it: else EPERM. EAGAIN if another process has the
// lock, or has just removed the file and with it the lock.
static Napi::Value LockFile(const Napi::CallbackInfo& info) {
  UniqueFd fd(open(StringArg(info, 0).c_str(), O_CREAT | O_RDWR | O_CLOEXEC | O_NOFOLLOW, S_IRUSR | S_IWUSR));
  struct stat st;
  if (fd.Get() < 0 || fstat(fd.Get(), &st) < 0) return Result(info.Env(), -1);
  if (!S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
    errno = EPERM;
    return Result(info.Env(), -1);
  }
  if (flock(fd.Get(), LOCK_EX | LOCK_NB) < 0 || fstat(fd.Get(), &st) < 0) return Result(info.Env(), -1);
  if (st.st_nlink == 0) {
    errno = EAGAIN;
    return Result(info.Env(), -1);
  }
  return Result(info.Env(), fd.Release());
}

// unlock(fd): drops a lock of lockFile, also for processes that share the descriptor.
static Napi::Value Unlock(const Napi::CallbackInfo& info) {
  return Result(info.Env(), flock(IntArg(info, 0), LOCK_UN));
}

// openNode(dirfd, name): an O_PATH descriptor of a device node below dirfd, on the
// same filesystem and without following symlinks. Never opens the device.
static Napi::Value OpenNode(const Napi::CallbackInfo& info) {
  return Result(info.Env(), OpenBeneath(IntArg(info, 0), StringArg(info, 1).c_str(), O_PATH | O_CLOEXEC));
}

// The fields of a struct stat as a Float64Array: mode, uid, gid, nlink, rdev
// major, rdev minor, then seconds and nanoseconds of atime, mtime, ctime.
static Napi::Value StatResult(Napi::Env env, int rc, const struct stat& st, Napi::Float64Array array) {
  if (rc < 0) return Result(env, rc);
  const double fields[] = {
      double(st.st_mode),        double(st.st_uid),          double(st.st_gid),
      double(st.st_nlink),       double(major(st.st_rdev)),  double(minor(st.st_rdev)),
      double(st.st_atim.tv_sec), double(st.st_atim.tv_nsec), double(st.st_mtim.tv_sec),
      double(st.st_mtim.tv_nsec), double(st.st_ctim.tv_sec), double(st.st_ctim.tv_nsec)};
  if (array.ElementLength() < std::size(fields)) {
    errno = EINVAL;
    return Result(env, -1);
  }
  std::copy(std::begin(fields), std::end(fields), array.Data());
  return Result(env, 0);
}

// fstat(fd, Float64Array)
static Napi::Value Fstat(const Napi::CallbackInfo& info) {
  struct stat st;
  int rc = fstat(IntArg(info, 0), &st);
  return StatResult(info.Env(), rc, st, info[1].As<Napi::Float64Array>());
}

// statNode(dirfd, name, Float64Array): stat of what openNode would open.
static Napi::Value StatNode(const Napi::CallbackInfo& info) {
  struct stat st;
  int rc = fstatat(IntArg(info, 0), StringArg(info, 1).c_str(), &st, AT_SYMLINK_NOFOLLOW);
  return StatResult(info.Env(), rc, st, info[2].As<Napi::Float64Array>());
}

// fchmod(2), fgetxattr(2) and the like fail on an O_PATH descriptor. Its /proc link
// takes them all.
static std::string ProcLink(int fd) { return "/proc/self/fd/" + std::to_string(fd); }

static Napi::Value Fchmod(const Napi::CallbackInfo& info) {
  return Result(info.Env(), chmod(ProcLink(IntArg(info, 0)).c_str(), info[1].As<Napi::Number>().Uint32Value()));
}

// fchown(fd, uid, gid): 0xffffffff leaves the uid or gid as it is.
static Napi::Value Fchown(const Napi::CallbackInfo& info) {
  return Result(info.Env(), chown(ProcLink(IntArg(info, 0)).c_str(), info[1].As<Napi::Number>().Uint32Value(),
                                  info[2].As<Napi::Number>().Uint32Value()));
}

// futimens(fd, atime s, ns, mtime s, ns): ns may be UTIME_NOW or UTIME_OMIT.
static Napi::Value Futimens(const Napi::CallbackInfo& info) {
  auto number = [&](size_t i) { return info[i].As<Napi::Number>().Int64Value(); };
  struct timespec times[2];
  times[0].tv_sec = number(1);
  times[0].tv_nsec = number(2);
  times[1].tv_sec = number(3);
  times[1].tv_nsec = number(4);
  return Result(info.Env(), utimensat(AT_FDCWD, ProcLink(IntArg(info, 0)).c_str(), times, 0));
}

// getxattr(fd, name, buffer): size; an empty buffer asks for the size alone.
static Napi::Value GetXattr(const Napi::CallbackInfo& info) {
  Bytes out = BytesArg(info, 2);
  return Result(info.Env(), getxattr(ProcLink(IntArg(info, 0)).c_str(), StringArg(info, 1).c_str(),
                                     out.data, out.size));
}

static Napi::Value ListXattr(const Napi::CallbackInfo& info) {
  Bytes out = BytesArg(info, 1);
  return Result(info.Env(), listxattr(ProcLink(IntArg(info, 0)).c_str(), out.data, out.size));
}

// setxattr(fd, name, buffer, flags)
static Napi::Value SetXattr(const Napi::CallbackInfo& info) {
  Bytes in = BytesArg(info, 2);
  return Result(info.Env(), setxattr(ProcLink(IntArg(info, 0)).c_str(), StringArg(info, 1).c_str(),
                                     in.data, in.size, IntArg(info, 3)));
}

static Napi::Value RemoveXattr(const Napi::CallbackInfo& info) {
  return Result(info.Env(), removexattr(ProcLink(IntArg(info, 0)).c_str(), StringArg(info, 1).c_str()));
}

void InitDescriptor(Napi::Env env, Napi::Object exports) {
  exports.Set("read", Napi::Function::New<Read>(env));
  exports.Set("write", Napi::Function::New<Write>(env));
  exports.Set("duplicate", Napi::Function::New<Duplicate>(env));
  exports.Set("close", Napi::Function::New<Close>(env));
  exports.Set("readFile", Napi::Function::New<ReadFile>(env));
  exports.Set("openFile", Napi::Function::New<OpenFile>(env));
  exports.Set("readAgain", Napi::Function::New<ReadAgain>(env));
  exports.Set("openDirectory", Napi::Function::New<OpenDirectory>(env));
  exports.Set("lockFile", Napi::Function::New<LockFile>(env));
  exports.Set("unlock", Napi::Function::New<Unlock>(env));
  exports.Set("openNode", Napi::Function::New<OpenNode>(env));
  exports.Set("fstat", Napi::Function::New<Fstat>(env));
  exports.Set("statNode", Napi::Function::New<StatNode>(env));
  exports.Set("fchmod", Napi::Function::New<Fchmod>(env));
  exports.Set("fchown", Napi::Function::New<Fchown>(env));
  exports.Set("futimens", Napi::Function::New<Futimens>(env));
  exports.Set("getxattr", Napi::Function::New<GetXattr>(env));
  exports.Set("listxattr", Napi::Function::New<ListXattr>(env));
  exports.Set("setxattr", Napi::Function::New<SetXattr>(env));
  exports.Set("removexattr", Napi::Function::New<RemoveXattr>(env));
}

}  // namespace diskseqfs
