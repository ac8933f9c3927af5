// SPDX-License-Identifier: MIT
#include "tasks.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

#include "addon.h"

namespace diskseqfs {

UniqueFd& UniqueFd::operator=(UniqueFd&& other) noexcept {
  if (this != &other) {
    Reset();
    fd_ = other.Release();
  }
  return *this;
}

void UniqueFd::Reset() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

std::shared_ptr<TaskPool> TaskPool::Create(Napi::Env env) {
  std::shared_ptr<TaskPool> pool(new TaskPool(env));
  uv_loop_t* loop = nullptr;
  napi_get_uv_event_loop(env, &loop);
  pool->async_ = new uv_async_t;
  pool->async_->data = pool.get();
  uv_async_init(loop, pool->async_, [](uv_async_t* async) {
    // Keep the pool alive through callbacks that may end the environment.
    auto self = static_cast<TaskPool*>(async->data)->shared_from_this();
    self->Deliver();
  });
  uv_unref(reinterpret_cast<uv_handle_t*>(pool->async_));
  env.AddCleanupHook([pool]() { pool->Shutdown(); });
  return pool;
}

void TaskPool::Submit(Napi::Function callback, Work work) {
  auto* task = new Task{std::move(work), nullptr, Napi::Persistent(callback)};
  fresh_ = true;
  if (pending_++ == 0) uv_ref(reinterpret_cast<uv_handle_t*>(async_));
  bool spawn = false;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(task);
    // Each waiting task gets a thread of its own, or it might wait behind
    // one that never ends.
    if (waiting_.size() > idle_ && threads_ < kMaxThreads) {
      threads_++;
      spawn = true;
    }
  }
  if (!spawn) {
    wake_.notify_one();
    return;
  }
  pthread_attr_t attr;
  pthread_attr_init(&attr);
  pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
  pthread_attr_setstacksize(&attr, kStackBytes);
  auto* self = new std::shared_ptr<TaskPool>(shared_from_this());
  pthread_t thread;
  if (pthread_create(&thread, &attr, ThreadMain, self) != 0) {
    // No thread can be started: the task waits for one that is busy now.
    delete self;
    std::lock_guard<std::mutex> lock(mutex_);
    threads_--;
  }
  pthread_attr_destroy(&attr);
}

void* TaskPool::ThreadMain(void* arg) {
  std::unique_ptr<std::shared_ptr<TaskPool>> self(static_cast<std::shared_ptr<TaskPool>*>(arg));
  (*self)->Serve();
  return nullptr;
}

void TaskPool::Serve() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    if (waiting_.empty()) {
      if (closed_) break;
      idle_++;
      bool woken = wake_.wait_for(lock, std::chrono::seconds(kIdleSeconds),
                                  [this] { return closed_ || !waiting_.empty(); });
      idle_--;
      if (!woken) break;
      continue;
    }
    Task* task = waiting_.front();
    waiting_.pop_front();
    lock.unlock();
    task->outcome = task->work();
    lock.lock();
    if (closed_) {
      // The environment is gone, and with it the only thread that may touch the
      // callback's reference: that is left to the end of the process. What the
      // work opened is closed here.
      task->outcome = nullptr;
      continue;
    }
    done_.push_back(task);
    finished_.store(done_.size(), std::memory_order_release);
    // Sent without the lock, as the event loop takes the lock when it wakes.
    sending_++;
    lock.unlock();
    uv_async_send(async_);
    lock.lock();
    if (--sending_ == 0) sent_.notify_one();
  }
  threads_--;
}

void TaskPool::Deliver() {
  std::deque<Task*> done;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    done.swap(done_);
    finished_.store(0, std::memory_order_relaxed);
  }
  for (Task* raw : done) {
    std::unique_ptr<Task> task(raw);
    if (--pending_ == 0) uv_unref(reinterpret_cast<uv_handle_t*>(async_));
    Napi::HandleScope scope(env_);
    if (CanCall(env_)) CallBack(env_, env_.Global(), task->callback.Value(), task->outcome(env_));
  }
}

ssize_t TaskPool::ReadSoon(int fd, void* into, size_t size, unsigned us, bool wanted) {
  auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(us);
  bool wait = wanted || fresh_;
  fresh_ = false;
  while (wait && std::chrono::steady_clock::now() < until) {
    // Yields the processor: the thread that is waited for may have none.
    sched_yield();
    if (finished_.load(std::memory_order_acquire) > 0) {
      Deliver();
      errno = EINTR;
      return -1;
    }
    struct pollfd ready = {fd, POLLIN, 0};
    if (poll(&ready, 1, 0) > 0) return read(fd, into, size);
  }
  errno = EAGAIN;
  return -1;
}

// readSoon(fd, buffer, us, wanted)
static Napi::Value ReadSoon(const Napi::CallbackInfo& info) {
  Bytes out = BytesArg(info, 1);
  unsigned us = info[2].As<Napi::Number>().Uint32Value();
  return Result(info.Env(), Tasks(info.Env()).ReadSoon(IntArg(info, 0), out.data, out.size, us, info[3].As<Napi::Boolean>()));
}

// struct sched_attr of uapi/linux/sched/types.h; not included, as it collides with the <sched.h>
// of some libcs.
struct SchedAttr {
  uint32_t size, policy;
  uint64_t flags;
  int32_t nice;
  uint32_t priority;
  uint64_t runtime, deadline, period;
};

// setSlice(ns): sets the scheduler's slice of the calling thread, and of all threads and programs
// that it starts from now on. Their share of the processor stays the same. No effect before Linux
// 6.12.
static Napi::Value SetSlice(const Napi::CallbackInfo& info) {
  SchedAttr attr = {};
  if (syscall(SYS_sched_getattr, 0, &attr, sizeof attr, 0) < 0) return Result(info.Env(), -1);
  uint64_t slice = info[0].As<Napi::Number>().Int64Value();
  // Leaves it alone if another policy, or a shorter slice, has been set for it.
  if (attr.policy != SCHED_OTHER || (attr.runtime != 0 && attr.runtime <= slice)) return Result(info.Env(), 0);
  attr.size = sizeof attr;
  attr.runtime = slice;
  return Result(info.Env(), syscall(SYS_sched_setattr, 0, &attr, 0));
}

void TaskPool::Shutdown() {
  std::unique_lock<std::mutex> lock(mutex_);
  closed_ = true;
  wake_.notify_all();
  sent_.wait(lock, [this] { return sending_ == 0; });
  for (Task* task : done_) delete task;
  done_.clear();
  uv_close(reinterpret_cast<uv_handle_t*>(async_),
           [](uv_handle_t* handle) { delete reinterpret_cast<uv_async_t*>(handle); });
}

void InitTasks(Napi::Env env, Napi::Object exports) {
  env.GetInstanceData<Addon>()->tasks = TaskPool::Create(env);
  env.GetInstanceData<Addon>()->file_tasks = TaskPool::Create(env);
  exports.Set("readSoon", Napi::Function::New<ReadSoon>(env));
  exports.Set("setSlice", Napi::Function::New<SetSlice>(env));
}

}  // namespace diskseqfs
