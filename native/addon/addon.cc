// SPDX-License-Identifier: MIT
#include "addon.h"

#include "tasks.h"

namespace diskseqfs {

static Napi::Object Init(Napi::Env env, Napi::Object exports) {
  auto* addon = new Addon;
  env.SetInstanceData(addon);
  InitTasks(env, exports);
  InitBlockdev(env, exports);
  InitConstants(env, exports);
  InitDescriptor(env, exports);
  InitDevmapper(env, exports);
  InitLoop(env, exports);
  InitMemory(env, exports);
  InitInotify(env, exports);
  InitLinks(env, exports);
  InitMount(env, exports);
  InitPoll(env, exports);
  InitSockets(env, exports);
  InitThreads(env, exports);
  InitUevent(env, exports);
  return exports;
}

NODE_API_MODULE(diskseqfs_native, Init)

}  // namespace diskseqfs
