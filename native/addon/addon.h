// SPDX-License-Identifier: MIT
// What the files of this addon share: one Init per kernel interface, and the
// state of one Node environment (never a global: an addon may be loaded by
// several environments of one process).
//
// There is no policy here. Each function is one kernel call or one fixed
// sequence of them, and returns what the kernel said: a non-negative result,
// or -errno. The decisions are in src/.
#pragma once

#include <napi.h>

#include <memory>
#include <vector>

namespace diskseqfs {

class TaskPool;
class Taskstats;

struct Addon {
  std::shared_ptr<TaskPool> tasks;
  std::shared_ptr<TaskPool> file_tasks;
  std::shared_ptr<Taskstats> taskstats;
};

inline TaskPool& Tasks(Napi::Env env) { return *env.GetInstanceData<Addon>()->tasks; }
// For what is done with files of somebody else: however many filesystems hang, no disk waits behind them.
inline TaskPool& FileTasks(Napi::Env env) { return *env.GetInstanceData<Addon>()->file_tasks; }

void InitBlockdev(Napi::Env env, Napi::Object exports);
void InitConstants(Napi::Env env, Napi::Object exports);
void InitDescriptor(Napi::Env env, Napi::Object exports);
void InitDevmapper(Napi::Env env, Napi::Object exports);
void InitLoop(Napi::Env env, Napi::Object exports);
void InitMemory(Napi::Env env, Napi::Object exports);
void InitInotify(Napi::Env env, Napi::Object exports);
void InitLinks(Napi::Env env, Napi::Object exports);
void InitMount(Napi::Env env, Napi::Object exports);
void InitPoll(Napi::Env env, Napi::Object exports);
void InitSockets(Napi::Env env, Napi::Object exports);
void InitTasks(Napi::Env env, Napi::Object exports);
void InitThreads(Napi::Env env, Napi::Object exports);
void InitUevent(Napi::Env env, Napi::Object exports);

inline int IntArg(const Napi::CallbackInfo& info, size_t i) {
  return info[i].As<Napi::Number>().Int32Value();
}

inline std::string StringArg(const Napi::CallbackInfo& info, size_t i) {
  return info[i].As<Napi::String>().Utf8Value();
}

// The bytes of a Buffer or Uint8Array argument. JavaScript still owns them.
struct Bytes {
  char* data;
  size_t size;
};

inline Bytes BytesArg(const Napi::CallbackInfo& info, size_t i) {
  auto array = info[i].As<Napi::Uint8Array>();
  return {reinterpret_cast<char*>(array.Data()), array.ByteLength()};
}

// Whether JavaScript can be called. Not in a worker that is being ended, whose event loop runs once more; what wraps
// Node-API would then end the process.
inline bool CanCall(napi_env env) {
  napi_value undefined, unused;
  return napi_get_undefined(env, &undefined) == napi_ok && napi_coerce_to_bool(env, undefined, &unused) == napi_ok;
}

// Calls a function from the event loop. What it throws is not caught by anybody.
inline void CallBack(napi_env env, napi_value receiver, napi_value function, const std::vector<napi_value>& arguments) {
  if (napi_make_callback(env, nullptr, receiver, function, arguments.size(), arguments.data(), nullptr) == napi_ok) return;
  napi_value error;
  if (!CanCall(env) && napi_get_and_clear_last_exception(env, &error) == napi_ok && CanCall(env)) napi_fatal_exception(env, error);
}

// The result of a system call as JavaScript sees it: >= 0, or -errno.
inline Napi::Value Result(Napi::Env env, long rc) {
  return Napi::Number::New(env, static_cast<double>(rc < 0 ? -errno : rc));
}

}  // namespace diskseqfs
