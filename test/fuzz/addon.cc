// SPDX-License-Identifier: MIT
// The addon in one piece, to be built with sanitizers: see test/helpers/sanitized.ts. It has six
// additional functions. Four are wrong, each in a way that the sanitizers must notice. Two parse
// text that otherwise comes from the kernel.
#include <napi.h>

// Registered below instead.
#undef NODE_API_MODULE
#define NODE_API_MODULE(name, init)

#include "../../native/addon/addon.cc"
#include "../../native/addon/blockdev.cc"
#include "../../native/addon/constants.cc"
#include "../../native/addon/descriptor.cc"
#include "../../native/addon/devmapper.cc"
#include "../../native/addon/inotify.cc"
#include "../../native/addon/links.cc"
#include "../../native/addon/loop.cc"
#include "../../native/addon/memory.cc"
#include "../../native/addon/mount.cc"
#include "../../native/addon/poll.cc"
#include "../../native/addon/sockets.cc"
#include "../../native/addon/tasks.cc"
#include "../../native/addon/threads.cc"
#include "../../native/addon/uevent.cc"

namespace {

// Writes one byte behind a buffer of JavaScript's.
Napi::Value Overrun(const Napi::CallbackInfo& info) {
  diskseqfs::Bytes bytes = diskseqfs::BytesArg(info, 0);
  static_cast<volatile char*>(bytes.data)[bytes.size] = 1;
  return info.Env().Undefined();
}

Napi::Value UseAfterFree(const Napi::CallbackInfo& info) {
  auto number = std::make_unique<int>(1);
  volatile int* stale = number.get();
  number.reset();
  return Napi::Number::New(info.Env(), *stale);
}

Napi::Value Overflow(const Napi::CallbackInfo& info) {
  volatile int most = 0x7fffffff;
  return Napi::Number::New(info.Env(), most + diskseqfs::IntArg(info, 0));
}

Napi::Value Leak(const Napi::CallbackInfo& info) {
  for (int i = 0; i < 100; i++) static_cast<volatile char*>(new char[4711])[0] = 1;
  return info.Env().Undefined();
}

// parseStatus(text, [gid, ...]): as credentials(), but of a text.
Napi::Value ParseStatus(const Napi::CallbackInfo& info) {
  auto list = info[1].As<Napi::Array>();
  std::vector<uint32_t> wanted;
  for (uint32_t i = 0; i < list.Length(); i++) wanted.push_back(list.Get(i).As<Napi::Number>().Uint32Value());
  diskseqfs::Bytes bytes = diskseqfs::BytesArg(info, 0);
  auto found = diskseqfs::CredentialsOf(std::string(static_cast<const char*>(bytes.data), bytes.size), wanted);
  if (!found.known) return info.Env().Undefined();
  Napi::Array result = Napi::Array::New(info.Env());
  uint32_t length = 0;
  result.Set(length++, Napi::Number::New(info.Env(), found.uid));
  result.Set(length++, Napi::Number::New(info.Env(), found.gid));
  result.Set(length++, Napi::BigInt::New(info.Env(), found.capabilities));
  for (bool member : found.member) result.Set(length++, Napi::Boolean::New(info.Env(), member));
  return result;
}

// parseStat(text): its start code and state.
Napi::Value ParseStat(const Napi::CallbackInfo& info) {
  diskseqfs::Bytes bytes = diskseqfs::BytesArg(info, 0);
  std::string text(static_cast<const char*>(bytes.data), bytes.size);
  Napi::Array result = Napi::Array::New(info.Env());
  result.Set(0u, Napi::Number::New(info.Env(), diskseqfs::StatField(text, diskseqfs::kStartCode)));
  result.Set(1u, Napi::String::New(info.Env(), diskseqfs::StateOf(text).empty() ? "" : "x"));
  return result;
}

Napi::Object InitWithTwins(Napi::Env env, Napi::Object exports) {
  diskseqfs::Init(env, exports);
  exports.Set("overrun", Napi::Function::New<Overrun>(env));
  exports.Set("useAfterFree", Napi::Function::New<UseAfterFree>(env));
  exports.Set("overflow", Napi::Function::New<Overflow>(env));
  exports.Set("parseStatus", Napi::Function::New<ParseStatus>(env));
  exports.Set("parseStat", Napi::Function::New<ParseStat>(env));
  exports.Set("leak", Napi::Function::New<Leak>(env));
  return exports;
}

napi_value Register(napi_env env, napi_value exports) { return Napi::RegisterModule(env, exports, InitWithTwins); }

}  // namespace

NAPI_MODULE(diskseqfs_native, Register)
