// SPDX-License-Identifier: MIT
// Memory that outlives the process that wrote it: memfd_create(2), mmap(2).
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "addon.h"
#include "../shared/state.h"
#include "tasks.h"

namespace diskseqfs {

// sharedMemory(bytes): a descriptor of memory that is all zeros. It is sealed,
// so that it cannot shrink under a process that has mapped it.
static Napi::Value SharedMemory(const Napi::CallbackInfo& info) {
  UniqueFd fd(memfd_create("diskseqfs", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (fd.Get() < 0 || ftruncate(fd.Get(), info[0].As<Napi::Number>().Int64Value()) < 0 ||
      fcntl(fd.Get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
    return Result(info.Env(), -1);
  }
  return Result(info.Env(), fd.Release());
}

// mapMemory(fd, bytes): an ArrayBuffer of it, or -errno. EINVAL if the memory
// is smaller than that: touching an address beyond its end would be fatal.
static Napi::Value MapMemory(const Napi::CallbackInfo& info) {
  int fd = IntArg(info, 0);
  auto size = static_cast<size_t>(info[1].As<Napi::Number>().Int64Value());
  off_t end = lseek(fd, 0, SEEK_END);
  if (end < 0) return Result(info.Env(), -1);
  if (static_cast<size_t>(end) < size) {
    errno = EINVAL;
    return Result(info.Env(), -1);
  }
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return Result(info.Env(), -1);
  return Napi::ArrayBuffer::New(info.Env(), memory, size, [size](Napi::Env, void* data) { munmap(data, size); });
}

void InitMemory(Napi::Env env, Napi::Object exports) {
  // Offsets and sizes of state.h.
  Napi::Object layout = Napi::Object::New(env);
#define FIELD(name, value) layout.Set(#name, Napi::Number::New(env, value));
  STATE_LAYOUT(FIELD)
#undef FIELD
  exports.Set("layout", layout);
  exports.Set("sharedMemory", Napi::Function::New<SharedMemory>(env));
  exports.Set("mapMemory", Napi::Function::New<MapMemory>(env));
}

}  // namespace diskseqfs
