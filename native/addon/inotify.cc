// SPDX-License-Identifier: MIT
// inotify(7). Adding a watch walks the path and may ask the filesystem for
// permission. For this daemon's own mount that is a request to the daemon
// itself, so the event loop's thread never adds a watch.
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/inotify.h>

#include "addon.h"
#include "tasks.h"

namespace diskseqfs {

// inotifyWatch(path, mask, callback(error, fd)): the descriptor is
// non-blocking; read it with read().
static Napi::Value InotifyWatch(const Napi::CallbackInfo& info) {
  std::string path = StringArg(info, 0);
  uint32_t mask = info[1].As<Napi::Number>().Uint32Value();
  Tasks(info.Env()).Submit(info[2].As<Napi::Function>(), [path, mask]() -> Outcome {
    int error = 0;
    auto fd = std::make_shared<UniqueFd>(inotify_init1(IN_NONBLOCK | IN_CLOEXEC));
    if (fd->Get() < 0 || inotify_add_watch(fd->Get(), path.c_str(), mask) < 0) {
      error = errno;
      fd->Reset();
    }
    return [fd, error](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, error), Napi::Number::New(env, fd->Release())};
    };
  });
  return info.Env().Undefined();
}

// The handle of a directory in a FUSE filesystem: fuse_encode_fh(), FILEID_INO64_GEN.
struct FuseHandle {
  struct file_handle header;
  uint32_t words[3];
};
constexpr int kFuseHandleType = 0x81;

// inotifyAdd(fd, root, nodeid, mask, callback(error, watch descriptor)): watches a
// directory that the kernel has cached, with valid attributes. So it sends the filesystem
// no request: a thread of this process that waits for the daemon's answer could not end
// with the daemon. root: any directory of the filesystem.
static Napi::Value InotifyAdd(const Napi::CallbackInfo& info) {
  int fd = IntArg(info, 0);
  int root = IntArg(info, 1);
  bool lossless;
  uint64_t id = info[2].As<Napi::BigInt>().Uint64Value(&lossless);
  uint32_t mask = info[3].As<Napi::Number>().Uint32Value();
  Tasks(info.Env()).Submit(info[4].As<Napi::Function>(), [fd, root, id, mask]() -> Outcome {
    union {
      FuseHandle handle;
      struct file_handle header;
    } name = {};
    name.header.handle_bytes = sizeof name.handle.words;
    name.header.handle_type = kFuseHandleType;
    uint32_t words[3] = {static_cast<uint32_t>(id >> 32), static_cast<uint32_t>(id), 0};
    memcpy(name.header.f_handle, words, sizeof words);
    UniqueFd directory(open_by_handle_at(root, &name.header, O_PATH | O_CLOEXEC));
    std::string path = "/proc/self/fd/" + std::to_string(directory.Get());
    int wd = directory.Get() < 0 ? -1 : inotify_add_watch(fd, path.c_str(), mask);
    int error = wd < 0 ? errno : 0;
    return [wd, error](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, error), Napi::Number::New(env, wd)};
    };
  });
  return info.Env().Undefined();
}

// inotifyRemove(fd, watch descriptor)
static Napi::Value InotifyRemove(const Napi::CallbackInfo& info) {
  return Result(info.Env(), inotify_rm_watch(IntArg(info, 0), IntArg(info, 1)));
}

void InitInotify(Napi::Env env, Napi::Object exports) {
  exports.Set("inotifyAdd", Napi::Function::New<InotifyAdd>(env));
  exports.Set("inotifyRemove", Napi::Function::New<InotifyRemove>(env));
  exports.Set("inotifyWatch", Napi::Function::New<InotifyWatch>(env));
}

}  // namespace diskseqfs
