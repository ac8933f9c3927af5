// SPDX-License-Identifier: MIT
// Threads for system calls that may block for as long as a disk likes.
//
// libuv's own pool is no place for them: it has four threads for the whole
// process, so four hung disks would stop everything that uses it. Here a task
// never queues behind another one while the pool may still grow: it gets an
// idle thread or a new one. Once there are `kMaxThreads`, further tasks wait,
// but not longer than the caller's own time limit.
#pragma once

#include <napi.h>
#include <uv.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace diskseqfs {

// A descriptor that closes itself, so that a result that is never fetched does not leak it.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(other.Release()) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept;
  ~UniqueFd() { Reset(); }
  int Get() const { return fd_; }
  int Release() {
    int fd = fd_;
    fd_ = -1;
    return fd;
  }
  void Reset();

 private:
  int fd_ = -1;
};

// Runs on the event loop's thread: turns what the task found into the
// arguments of the JavaScript callback.
using Outcome = std::function<std::vector<napi_value>(Napi::Env)>;
// Runs on a pool thread.
using Work = std::function<Outcome()>;

class TaskPool : public std::enable_shared_from_this<TaskPool> {
 public:
  static std::shared_ptr<TaskPool> Create(Napi::Env env);

  // Calls `callback` on the event loop once `work` is done. While a task is
  // under way the event loop stays alive.
  void Submit(Napi::Function callback, Work work);

  // Polls `fd` for up to `us` before the event loop sleeps, as being woken takes longer than most
  // waits. Delivers tasks that finish meanwhile, and then returns EINTR. Does not wait unless
  // `wanted`, or a task was submitted since the last time (earlier ones may hang).
  ssize_t ReadSoon(int fd, void* into, size_t size, unsigned us, bool wanted);

 private:
  static constexpr size_t kMaxThreads = 1024;
  static constexpr size_t kStackBytes = 128 * 1024;
  static constexpr int kIdleSeconds = 5;

  struct Task {
    Work work;
    Outcome outcome;
    Napi::FunctionReference callback;
  };

  explicit TaskPool(Napi::Env env) : env_(env) {}
  static void* ThreadMain(void* pool);
  void Serve();
  void Deliver();
  void Shutdown();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task*> waiting_;
  // Size of done_, readable without the lock.
  std::atomic<size_t> finished_{0};
  std::deque<Task*> done_;
  size_t threads_ = 0;
  size_t idle_ = 0;
  bool closed_ = false;
  // Threads that are about to wake the event loop: its handle must exist until they have.
  size_t sending_ = 0;
  std::condition_variable sent_;

  // Touched by the event loop's thread only.
  Napi::Env env_;
  uv_async_t* async_ = nullptr;
  size_t pending_ = 0;
  // Something was submitted since the last ReadSoon().
  bool fresh_ = false;
};

}  // namespace diskseqfs
