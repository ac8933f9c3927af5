// SPDX-License-Identifier: MIT
// mount(2), umount2(2), open_tree(2), fsopen(2) with fsmount(2), and fspick(2) with fsconfig(2).
#include <errno.h>
#include <fcntl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "addon.h"
#include "tasks.h"

namespace diskseqfs {

namespace {

// uapi/linux/mount.h; not included, since it collides with sys/mount.h in
// some releases of glibc.
constexpr unsigned kFspickCloexec = 0x00000001;
constexpr unsigned kFspickNoAutomount = 0x00000004;
constexpr unsigned kFsconfigCmdReconfigure = 7;
constexpr unsigned kOpenTreeClone = 1;
constexpr unsigned kFsopenCloexec = 1;
constexpr unsigned kFsmountCloexec = 1;
constexpr unsigned kFsconfigCmdCreate = 6;

// mount(source, target, type, flags, data): 0 or -errno.
Napi::Value Mount(const Napi::CallbackInfo& info) {
  return Result(info.Env(),
                mount(StringArg(info, 0).c_str(), StringArg(info, 1).c_str(), StringArg(info, 2).c_str(),
                      info[3].As<Napi::Number>().Uint32Value(), StringArg(info, 4).c_str()));
}

// unmount(target, flags, callback(error)): on a pool thread.
Napi::Value Unmount(const Napi::CallbackInfo& info) {
  std::string target = StringArg(info, 0);
  int flags = IntArg(info, 1);
  Tasks(info.Env()).Submit(info[2].As<Napi::Function>(), [target, flags]() -> Outcome {
    int error = umount2(target.c_str(), flags) < 0 ? errno : 0;
    return [error](Napi::Env env) -> std::vector<napi_value> { return {Napi::Number::New(env, error)}; };
  });
  return info.Env().Undefined();
}

// look(path, callback(error)): stat(2) on a pool thread, as the daemon of that mount
// may hang.
Napi::Value Look(const Napi::CallbackInfo& info) {
  std::string path = StringArg(info, 0);
  Tasks(info.Env()).Submit(info[1].As<Napi::Function>(), [path]() -> Outcome {
    struct stat found;
    int error = stat(path.c_str(), &found) < 0 ? errno : 0;
    return [error](Napi::Env env) -> std::vector<napi_value> { return {Napi::Number::New(env, error)}; };
  });
  return info.Env().Undefined();
}

// pickMount(target, callback(error, fd)): a descriptor to reconfigure the
// filesystem mounted there.
Napi::Value PickMount(const Napi::CallbackInfo& info) {
  std::string target = StringArg(info, 0);
  Tasks(info.Env()).Submit(info[1].As<Napi::Function>(), [target]() -> Outcome {
    auto fd = std::make_shared<UniqueFd>(static_cast<int>(
        syscall(SYS_fspick, AT_FDCWD, target.c_str(), kFspickCloexec | kFspickNoAutomount)));
    int error = fd->Get() < 0 ? errno : 0;
    return [fd, error](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, error), Napi::Number::New(env, fd->Release())};
    };
  });
  return info.Env().Undefined();
}

// cloneMount(target, directory, callback(error, fd)): opens a directory of the filesystem mounted at `target`,
// in a detached clone of that mount. The clone has no mounts below it, and does not keep the original busy.
Napi::Value CloneMount(const Napi::CallbackInfo& info) {
  std::string target = StringArg(info, 0);
  std::string directory = StringArg(info, 1);
  Tasks(info.Env()).Submit(info[2].As<Napi::Function>(), [target, directory]() -> Outcome {
    UniqueFd tree(static_cast<int>(syscall(SYS_open_tree, AT_FDCWD, target.c_str(), kOpenTreeClone | O_CLOEXEC)));
    auto fd = std::make_shared<UniqueFd>(
        tree.Get() < 0 ? -1 : openat(tree.Get(), directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    int error = fd->Get() < 0 ? errno : 0;
    return [fd, error](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, error), Napi::Number::New(env, fd->Release())};
    };
  });
  return info.Env().Undefined();
}

// makeNodes(): a directory for making and opening device nodes, on a tmpfs that is mounted nowhere; or -errno.
Napi::Value MakeNodes(const Napi::CallbackInfo& info) {
  UniqueFd made(static_cast<int>(syscall(SYS_fsopen, "tmpfs", kFsopenCloexec)));
  if (made.Get() < 0 || syscall(SYS_fsconfig, made.Get(), kFsconfigCmdCreate, nullptr, nullptr, 0) < 0) return Result(info.Env(), -1);
  return Result(info.Env(), static_cast<int>(syscall(SYS_fsmount, made.Get(), kFsmountCloexec, 0)));
}

// prune(fd, callback(error)): drops the unused dentries of that filesystem
// (reconfigure_super -> shrink_dcache_sb). On a pool thread: it takes s_umount
// for writing, and ustat(2) holds that while it waits for our FUSE_STATFS answer.
Napi::Value Prune(const Napi::CallbackInfo& info) {
  int fd = IntArg(info, 0);
  Tasks(info.Env()).Submit(info[1].As<Napi::Function>(), [fd]() -> Outcome {
    long rc = syscall(SYS_fsconfig, fd, kFsconfigCmdReconfigure, nullptr, nullptr, 0);
    int error = rc < 0 ? errno : 0;
    return [error](Napi::Env env) -> std::vector<napi_value> { return {Napi::Number::New(env, error)}; };
  });
  return info.Env().Undefined();
}

}  // namespace

void InitMount(Napi::Env env, Napi::Object exports) {
  exports.Set("mount", Napi::Function::New<Mount>(env));
  exports.Set("unmount", Napi::Function::New<Unmount>(env));
  exports.Set("look", Napi::Function::New<Look>(env));
  exports.Set("pickMount", Napi::Function::New<PickMount>(env));
  exports.Set("cloneMount", Napi::Function::New<CloneMount>(env));
  exports.Set("makeNodes", Napi::Function::New<MakeNodes>(env));
  exports.Set("prune", Napi::Function::New<Prune>(env));
}

}  // namespace diskseqfs
