// SPDX-License-Identifier: MIT
// uv_poll_t as a JavaScript object. new Poll(fd, callback, priority) calls back
// while the descriptor is readable (level-triggered); with `priority`, when it
// has an exceptional condition (POLLPRI). pause() stops the calls until
// resume(); close() ends them.
#include <uv.h>

#include "addon.h"

namespace diskseqfs {

class Poll : public Napi::ObjectWrap<Poll> {
 public:
  explicit Poll(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Poll>(info) {
    Napi::Env env = info.Env();
    callback_ = Napi::Persistent(info[1].As<Napi::Function>());
    uv_loop_t* loop = nullptr;
    napi_get_uv_event_loop(env, &loop);
    poll_ = new uv_poll_t;
    int rc = uv_poll_init(loop, poll_, IntArg(info, 0));
    if (rc < 0) {
      delete poll_;
      poll_ = nullptr;
      Napi::Error::New(env, std::string("cannot poll the descriptor: ") + uv_strerror(rc))
          .ThrowAsJavaScriptException();
      return;
    }
    poll_->data = this;
    events_ = info[2].IsBoolean() && info[2].As<Napi::Boolean>().Value() ? UV_PRIORITIZED : UV_READABLE;
    Start();
    Ref();
  }

  ~Poll() override { Stop(); }

  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("Poll", DefineClass(env, "Poll",
                                    {InstanceMethod<&Poll::Pause>("pause"), InstanceMethod<&Poll::Resume>("resume"),
                                     InstanceMethod<&Poll::Close>("close")}));
  }

 private:
  void Ready() {
    Napi::Env env = Env();
    Napi::HandleScope scope(env);
    if (CanCall(env)) CallBack(env, Value(), callback_.Value(), {});
  }

  void Start() {
    uv_poll_start(poll_, events_, [](uv_poll_t* poll, int, int) { static_cast<Poll*>(poll->data)->Ready(); });
  }

  void Stop() {
    if (poll_ == nullptr) return;
    uv_poll_stop(poll_);
    uv_close(reinterpret_cast<uv_handle_t*>(poll_),
             [](uv_handle_t* handle) { delete reinterpret_cast<uv_poll_t*>(handle); });
    poll_ = nullptr;
  }

  Napi::Value Pause(const Napi::CallbackInfo& info) {
    if (poll_ != nullptr) uv_poll_stop(poll_);
    return info.Env().Undefined();
  }

  Napi::Value Resume(const Napi::CallbackInfo& info) {
    if (poll_ != nullptr) Start();
    return info.Env().Undefined();
  }

  Napi::Value Close(const Napi::CallbackInfo& info) {
    if (poll_ != nullptr) {
      Stop();
      Unref();
    }
    return info.Env().Undefined();
  }

  Napi::FunctionReference callback_;
  uv_poll_t* poll_ = nullptr;
  int events_ = UV_READABLE;
};

void InitPoll(Napi::Env env, Napi::Object exports) { Poll::Init(env, exports); }

}  // namespace diskseqfs
