// SPDX-License-Identifier: MIT
// What threads of other processes are doing, and who they are: files of
// /proc/TID, and taskstats (uapi/linux/taskstats.h).
//
// All of this runs on pool threads.  /proc/TID/syscall and /proc/TID/stack
// take signal->exec_update_lock (lock_trace(), fs/proc/base.c). An execve(2)
// holds that lock while it closes its close-on-exec files, and these may be on
// a filesystem that never answers.
#include <errno.h>
#include <fcntl.h>
#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/nsfs.h>
#include <linux/taskstats.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <vector>

#include "addon.h"
#include "descriptor.h"
#include "tasks.h"

namespace diskseqfs {

namespace {

constexpr size_t kFileBytes = 4096;

// Returns an empty string and sets errno if nothing can be read.
std::string ReadOf(int tid, const char* name, size_t size = kFileBytes) {
  std::string text(size, 0);
  ssize_t n = ReadSmallFile(AT_FDCWD, ("/proc/" + std::to_string(tid) + "/" + name).c_str(), text.data(), size);
  int saved = n < 0 ? errno : 0;
  text.resize(n < 0 ? 0 : n);
  errno = saved;
  return text;
}

// A field of /proc/TID/stat, from the third on, numbered from 1 as in proc_pid_stat(5); the
// fields before may contain blanks. -1 if there is none.
double StatField(const std::string& stat, int wanted) {
  size_t at = stat.rfind(')');
  if (at == std::string::npos) return -1;
  for (int field = 2; field < wanted; field++) {
    at = stat.find(' ', at + 1);
    if (at == std::string::npos) return -1;
  }
  return strtod(stat.c_str() + at + 1, nullptr);
}

constexpr int kFlags = 9;
constexpr int kMinorFaults = 10;
constexpr int kMajorFaults = 12;
constexpr int kStartCode = 26;
constexpr int kStartStack = 28;
constexpr long kKernelThread = 0x00200000;  // PF_KTHREAD: has no memory map, and runs no program

}  // namespace

// Requests over generic netlink. Each is answered at once; one thread uses it at a time.
class Taskstats {
 public:
  Taskstats() : fd_(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC)) {
    struct timeval limit = {1, 0};  // it answers within the call; this is in case something is broken
    if (fd_.Get() < 0 || setsockopt(fd_.Get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) < 0) return;
    const char name[] = TASKSTATS_GENL_NAME;
    size_t length = Ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, name, sizeof name);
    const char* id = Find(kGenericHeader, length, CTRL_ATTR_FAMILY_ID, nullptr);
    if (id != nullptr) memcpy(&family_, id, sizeof family_);
  }

  // Time that a thread has spent in user space, us, as the timer interrupt has
  // seen it. If it grows, the thread was outside of the kernel.  -1 if it is
  // not known.
  double UserTime(int tid) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (family_ == 0) return -1;
    uint32_t pid = tid;
    size_t length = Ask(family_, TASKSTATS_CMD_GET, TASKSTATS_CMD_ATTR_PID, &pid, sizeof pid);
    size_t inner = 0;
    const char* aggregate = Find(kGenericHeader, length, TASKSTATS_TYPE_AGGR_PID, &inner);
    if (aggregate == nullptr) return -1;
    size_t start = aggregate - buffer_, size = 0;
    const char* stats = Find(start, start + inner, TASKSTATS_TYPE_STATS, &size);
    uint64_t time;
    if (stats == nullptr || size < offsetof(struct taskstats, ac_utime) + sizeof time) return -1;
    memcpy(&time, stats + offsetof(struct taskstats, ac_utime), sizeof time);
    return static_cast<double>(time);
  }

 private:
  static constexpr size_t kGenericHeader = NLMSG_HDRLEN + GENL_HDRLEN;

  // Sends one request with one attribute. Returns the length of the answer, 0 if there is none.
  size_t Ask(uint16_t type, uint8_t command, uint16_t attribute, const void* value, size_t size) {
    alignas(struct nlmsghdr) char request[256] = {};
    auto* header = reinterpret_cast<struct nlmsghdr*>(request);
    auto* generic = reinterpret_cast<struct genlmsghdr*>(request + NLMSG_HDRLEN);
    auto* first = reinterpret_cast<struct nlattr*>(request + kGenericHeader);
    header->nlmsg_len = kGenericHeader + NLA_HDRLEN + NLA_ALIGN(size);
    header->nlmsg_type = type;
    header->nlmsg_flags = NLM_F_REQUEST;
    header->nlmsg_seq = ++sequence_;
    generic->cmd = command;
    generic->version = 1;
    first->nla_type = attribute;
    first->nla_len = NLA_HDRLEN + size;
    memcpy(request + kGenericHeader + NLA_HDRLEN, value, size);
    struct sockaddr_nl kernel = {};
    kernel.nl_family = AF_NETLINK;
    if (sendto(fd_.Get(), request, header->nlmsg_len, 0, reinterpret_cast<struct sockaddr*>(&kernel), sizeof kernel) < 0)
      return 0;
    for (;;) {
      ssize_t n = recv(fd_.Get(), buffer_, sizeof buffer_, 0);
      if (n < ssize_t(kGenericHeader)) return 0;
      auto* answer = reinterpret_cast<struct nlmsghdr*>(buffer_);
      if (answer->nlmsg_seq != sequence_) continue;
      return answer->nlmsg_type == NLMSG_ERROR ? 0 : n;
    }
  }

  const char* Find(size_t at, size_t end, int type, size_t* size) {
    while (at + NLA_HDRLEN <= end) {
      auto* attribute = reinterpret_cast<struct nlattr*>(buffer_ + at);
      if (attribute->nla_len < NLA_HDRLEN || at + attribute->nla_len > end) return nullptr;
      if ((attribute->nla_type & NLA_TYPE_MASK) == type) {
        if (size != nullptr) *size = attribute->nla_len - NLA_HDRLEN;
        return buffer_ + at + NLA_HDRLEN;
      }
      at += NLA_ALIGN(attribute->nla_len);
    }
    return nullptr;
  }

  std::mutex mutex_;
  UniqueFd fd_;
  uint16_t family_ = 0;
  uint32_t sequence_ = 0;
  alignas(struct nlmsghdr) char buffer_[4096];
};

namespace {

// The address of a thread's code, or of its stack: a program may be made so that the first is 0.
// Returns 0 for a thread that has no memory: at its end, or in the middle of an execve(2), before
// its new memory is set up.
double MemoryOf(const std::string& stat) {
  double code = StatField(stat, kStartCode);
  return code == 0 ? StatField(stat, kStartStack) : code;
}

struct Seen {
  bool gone = false;
  std::string stat, syscall, stack;
  double user_us = -1;
};

// The third field, one letter, which StatField() cannot return.
std::string StateOf(const std::string& stat) {
  size_t at = stat.rfind(')');
  return at == std::string::npos || at + 2 >= stat.size() ? "" : stat.substr(at + 2, 1);
}

// lookAtThreads([tid, stack wanted, ...], callback([[syscall, stack, state, memory, us, faults] | undefined, ...])):
// undefined for a thread that is gone.  `syscall` is empty if it cannot be read.
// In the middle of an execve(2), when the thread's new memory has no code and no
// stack yet (memory 0), it is not read at all: reading it could block then.
Napi::Value LookAtThreads(const Napi::CallbackInfo& info) {
  auto list = info[0].As<Napi::Array>();
  std::vector<std::pair<int, bool>> threads;
  for (uint32_t i = 0; i + 1 < list.Length(); i += 2)
    threads.push_back({list.Get(i).ToNumber().Int32Value(), list.Get(i + 1).ToBoolean().Value()});
  auto taskstats = info.Env().GetInstanceData<Addon>()->taskstats;
  Tasks(info.Env()).Submit(info[1].As<Napi::Function>(), [threads, taskstats]() -> Outcome {
    auto found = std::make_shared<std::vector<Seen>>(threads.size());
    for (size_t i = 0; i < threads.size(); i++) {
      auto [tid, stack] = threads[i];
      Seen& seen = (*found)[i];
      // By task/TID: /proc/TID/stat has the page faults of all threads of the process.
      seen.stat = ReadOf(tid, ("task/" + std::to_string(tid) + "/stat").c_str());
      // If a descriptor or memory is missing, nothing is known: it may still be there.
      seen.gone = seen.stat.empty() && (errno == ENOENT || errno == ESRCH);
      bool kernel = static_cast<long>(StatField(seen.stat, kFlags)) & kKernelThread;
      if (seen.stat.empty() || (!kernel && MemoryOf(seen.stat) == 0)) continue;
      // Before the call is read: what it was busy with until then.
      seen.syscall = ReadOf(tid, "syscall");
      if (stack) seen.stack = ReadOf(tid, "stack");
      if (seen.syscall.compare(0, 7, "running") != 0) continue;
      seen.user_us = taskstats->UserTime(tid);
    }
    return [found](Napi::Env env) -> std::vector<napi_value> {
      Napi::Array result = Napi::Array::New(env, found->size());
      for (uint32_t i = 0; i < found->size(); i++) {
        const Seen& seen = (*found)[i];
        if (seen.gone) continue;
        Napi::Array one = Napi::Array::New(env, 6);
        one.Set(0u, Napi::String::New(env, seen.syscall));
        one.Set(1u, Napi::String::New(env, seen.stack));
        one.Set(2u, Napi::String::New(env, StateOf(seen.stat)));
        one.Set(3u, Napi::Number::New(env, MemoryOf(seen.stat)));
        one.Set(4u, Napi::Number::New(env, seen.user_us));
        one.Set(5u, Napi::Number::New(env, StatField(seen.stat, kMinorFaults) + StatField(seen.stat, kMajorFaults)));
        result.Set(i, one);
      }
      return {result};
    };
  });
  return info.Env().Undefined();
}

// /proc/TID/status of a thread with 65,536 groups (NGROUPS_MAX).
constexpr size_t kStatusBytes = 1 << 20;

struct Credentials {
  bool known = false;
  uint32_t uid = 0, gid = 0;  // those of the file system (fsuid)
  uint64_t capabilities = 0;  // effective
  std::vector<bool> member;   // for each of the groups that were asked for
  double groups = 0;          // how many it has
};

// The text after "\nNAME:\t". A thread chooses its own name, but line feeds in that are escaped.
const char* After(const std::string& status, const char* name) {
  size_t at = status.find(std::string("\n") + name + ":\t");
  return at == std::string::npos ? nullptr : status.c_str() + at + strlen(name) + 3;
}

Credentials CredentialsOf(const std::string& status, const std::vector<uint32_t>& wanted) {
  Credentials found;
  found.member.resize(wanted.size());
  const char* uids = After(status, "Uid");
  const char* gids = After(status, "Gid");
  const char* groups = After(status, "Groups");
  const char* effective = After(status, "CapEff");
  if (!uids || !gids || !groups || !effective) return found;
  unsigned id[4];
  if (sscanf(uids, "%u %u %u %u", id, id + 1, id + 2, id + 3) != 4) return found;
  found.uid = id[3];
  if (sscanf(gids, "%u %u %u %u", id, id + 1, id + 2, id + 3) != 4) return found;
  found.gid = id[3];
  found.capabilities = strtoull(effective, nullptr, 16);
  for (char* end; *groups >= '0' && *groups <= '9'; groups = *end == ' ' ? end + 1 : end) {
    auto group = static_cast<uint32_t>(strtoul(groups, &end, 10));
    found.groups++;
    for (size_t i = 0; i < wanted.size(); i++)
      if (wanted[i] == group) found.member[i] = true;
  }
  found.known = true;
  return found;
}

// credentials(tid, [gid, ...], callback([fsuid, fsgid, effective capabilities, groups, member, ...] | undefined)):
// `member` tells for each gid whether it is among the thread's supplementary groups.
Napi::Value GetCredentials(const Napi::CallbackInfo& info) {
  int tid = IntArg(info, 0);
  auto list = info[1].As<Napi::Array>();
  std::vector<uint32_t> wanted;
  for (uint32_t i = 0; i < list.Length(); i++) wanted.push_back(list.Get(i).As<Napi::Number>().Uint32Value());
  Tasks(info.Env()).Submit(info[2].As<Napi::Function>(), [=]() -> Outcome {
    auto found = std::make_shared<Credentials>(CredentialsOf(ReadOf(tid, "status", kStatusBytes), wanted));
    return [found](Napi::Env env) -> std::vector<napi_value> {
      if (!found->known) return {env.Undefined()};
      Napi::Array result = Napi::Array::New(env);
      uint32_t length = 0;
      result.Set(length++, Napi::Number::New(env, found->uid));
      result.Set(length++, Napi::Number::New(env, found->gid));
      result.Set(length++, Napi::BigInt::New(env, found->capabilities));
      result.Set(length++, Napi::Number::New(env, found->groups));
      for (bool member : found->member) result.Set(length++, Napi::Boolean::New(env, member));
      return {result};
    };
  });
  return info.Env().Undefined();
}

// userNamespace(tid): undefined if it is this process's own, or cannot be found out.
// Otherwise the user behind it, however deep it is nested (32 at most): the uid that
// created the outermost namespace, or, if that was root, minus that namespace's inode.
//
// Runs on the event loop: neither the files nor the calls wait for anything (fs/nsfs.c).
Napi::Value UserNamespace(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  struct stat own, outer;
  UniqueFd ns(open(("/proc/" + std::to_string(IntArg(info, 0)) + "/ns/user").c_str(), O_RDONLY | O_CLOEXEC));
  if (ns.Get() < 0 || fstat(ns.Get(), &outer) < 0 || stat("/proc/self/ns/user", &own) < 0) return env.Undefined();
  if (outer.st_ino == own.st_ino) return env.Undefined();
  for (;;) {
    UniqueFd parent(ioctl(ns.Get(), NS_GET_PARENT));
    struct stat around;
    if (parent.Get() < 0 || fstat(parent.Get(), &around) < 0 || around.st_ino == own.st_ino) break;
    ns = std::move(parent);
    outer = around;
  }
  uid_t owner = 0;
  ioctl(ns.Get(), NS_GET_OWNER_UID, &owner);
  return Napi::Number::New(env, owner != 0 ? static_cast<double>(owner) : -static_cast<double>(outer.st_ino));
}

}  // namespace

void InitThreads(Napi::Env env, Napi::Object exports) {
  env.GetInstanceData<Addon>()->taskstats = std::make_shared<Taskstats>();
  exports.Set("lookAtThreads", Napi::Function::New<LookAtThreads>(env));
  exports.Set("credentials", Napi::Function::New<GetCredentials>(env));
  exports.Set("userNamespace", Napi::Function::New<UserNamespace>(env));
}

}  // namespace diskseqfs
