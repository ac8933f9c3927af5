// inotify(7). Adding a watch walks the path and may ask the filesystem for
// permission, which for this daemon's own mount means asking itself: so it is
// never done on the event loop's thread.
#include <errno.h>
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

void InitInotify(Napi::Env env, Napi::Object exports) {
  exports.Set("inotifyWatch", Napi::Function::New<InotifyWatch>(env));
}

}  // namespace diskseqfs
