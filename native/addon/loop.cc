// SPDX-License-Identifier: MIT
// Loop devices: see uapi/linux/loop.h and loop(4).
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "addon.h"
#include "tasks.h"

namespace diskseqfs {

namespace {

// How often another device is tried. Each EBUSY means that another process has got one, so this ends by itself; the
// limit is for a kernel that always says so.
constexpr int kTriesMax = 10000;

struct Attached {
  int error = 0;
  const char* step = "";
  UniqueFd fd;
};

void Pause() {
  struct timespec ms = {0, 1000000};
  nanosleep(&ms, nullptr);
}

// One try with an unbound loop device, which another process may bind, or remove, meanwhile.
Attached TryAttach(int control, const struct loop_config& config) {
  int number = ioctl(control, LOOP_CTL_GET_FREE);
  if (number < 0) return {errno, "control", {}};
  std::string path = "/dev/loop" + std::to_string(number);
  int access = config.info.lo_flags & LO_FLAGS_READ_ONLY ? O_RDONLY : O_RDWR;
  UniqueFd fd(open(path.c_str(), access | O_CLOEXEC | O_NOCTTY));
  if (fd.Get() < 0) return {errno, "open", {}};
  if (ioctl(fd.Get(), LOOP_CONFIGURE, &config) < 0) return {errno, "configure", {}};
  return {0, "", std::move(fd)};
}

Attached Attach(const struct loop_config& config) {
  UniqueFd control(open("/dev/loop-control", O_RDWR | O_CLOEXEC));
  if (control.Get() < 0) return {errno, "control", {}};
  for (int i = 0;; i++) {
    Attached result = TryAttach(control.Get(), config);
    // Its node may come a moment after the device, and the device may be gone by now.
    bool gone = result.error == ENXIO || result.error == ENODEV || (result.error == ENOENT && *result.step == 'o');
    if ((result.error != EBUSY && !gone) || i == kTriesMax) return result;
    if (gone) Pause();
  }
}

// attachLoop(file, flags, offset, sizeLimit, sectorSize, callback(error, step, fd)): binds a free loop device to a
// file. `step` says what failed: control, open, configure.
Napi::Value AttachLoop(const Napi::CallbackInfo& info) {
  bool lossless;
  struct loop_config config = {};
  config.fd = static_cast<uint32_t>(IntArg(info, 0));
  config.info.lo_flags = static_cast<uint32_t>(IntArg(info, 1));
  config.info.lo_offset = info[2].As<Napi::BigInt>().Uint64Value(&lossless);
  config.info.lo_sizelimit = info[3].As<Napi::BigInt>().Uint64Value(&lossless);
  config.block_size = static_cast<uint32_t>(IntArg(info, 4));
  FileTasks(info.Env()).Submit(info[5].As<Napi::Function>(), [config]() -> Outcome {
    auto attached = std::make_shared<Attached>(Attach(config));
    return [attached](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, attached->error), Napi::String::New(env, attached->step),
              Napi::Number::New(env, attached->fd.Release())};
    };
  });
  return info.Env().Undefined();
}

}  // namespace

void InitLoop(Napi::Env env, Napi::Object exports) {
  exports.Set("attachLoop", Napi::Function::New<AttachLoop>(env));
  exports.Set("LO_FLAGS_AUTOCLEAR", Napi::Number::New(env, LO_FLAGS_AUTOCLEAR));
  exports.Set("LO_FLAGS_READ_ONLY", Napi::Number::New(env, LO_FLAGS_READ_ONLY));
  exports.Set("LO_FLAGS_PARTSCAN", Napi::Number::New(env, LO_FLAGS_PARTSCAN));
  exports.Set("LO_FLAGS_DIRECT_IO", Napi::Number::New(env, LO_FLAGS_DIRECT_IO));
}

}  // namespace diskseqfs
