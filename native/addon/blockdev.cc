// SPDX-License-Identifier: MIT
// Block devices: opening, closing and identifying them. See uapi/linux/fs.h,
// uapi/linux/loop.h and sysfs-block of the kernel's ABI documentation.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/loop.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "addon.h"
#include "descriptor.h"
#include "tasks.h"

#ifndef BLKGETDISKSEQ  // kernel headers before 5.15
#define BLKGETDISKSEQ _IOR(0x12, 128, __u64)
#endif

namespace diskseqfs {

namespace {

constexpr size_t kUeventBytes = 4096;  // sysfs files are one page

struct DeviceFacts {
  int error = 0;
  UniqueFd fd;
  unsigned major = 0;
  unsigned minor = 0;
  uint64_t diskseq = 0;
  std::string uevent;
};

// Returns an empty string and sets errno if the file cannot be read.
std::string ReadUevent(const std::string& path) {
  char text[kUeventBytes];
  errno = 0;
  ssize_t n = ReadSmallFile(AT_FDCWD, path.c_str(), text, sizeof text);
  return n < 0 ? std::string() : std::string(text, n);
}

bool Exhausted(int error) { return error == EMFILE || error == ENFILE || error == ENOMEM; }

// Opens a device by a device node that only this process can reach (makeNodes in mount.cc), and removes that node
// at once. Returns -1 and sets errno on failure: ENOENT if no node can be made.
int OpenByOwnNode(int nodes, dev_t number, int flags) {
  std::string name = std::to_string(major(number)) + ":" + std::to_string(minor(number));
  while (mknodat(nodes, name.c_str(), S_IFBLK | S_IRUSR | S_IWUSR, number) == 0 || errno == EEXIST) {
    int fd = OpenBeneath(nodes, name.c_str(), flags);
    int error = errno;
    unlinkat(nodes, name.c_str(), 0);
    errno = error;
    // Another thread made the same node and has already removed it: try again.
    if (fd < 0 && error == ENOENT) continue;
    return fd;
  }
  errno = ENOENT;
  return -1;
}

// Opens a device by a device node of our own if possible, or else by the one in /dev: fuser(1) and
// lsof(8) compare device nodes, so they do not list this process for the one in /dev. That one must
// exist anyway: for a number without a device, open(2) would load a module that makes one.
int OpenNode(int dir, const std::string& name, int flags, int nodes) {
  if (nodes >= 0) {
    struct stat st;
    if (fstatat(dir, name.c_str(), &st, AT_SYMLINK_NOFOLLOW) < 0) return -1;
    int fd = S_ISBLK(st.st_mode) ? OpenByOwnNode(nodes, st.st_rdev, flags) : -1;
    if (fd >= 0 || (S_ISBLK(st.st_mode) && errno != ENOENT)) return fd;
  }
  return OpenBeneath(dir, name.c_str(), flags);
}

std::string SysfsOf(dev_t number) {
  return "/sys/dev/block/" + std::to_string(major(number)) + ":" + std::to_string(minor(number));
}

// The order matters. An open descriptor keeps the kernel from giving the number to another disk.
// For a loop device that holds only once it is also seen bound: until then a LOOP_CLR_FD under way
// may tear it down under us, and a LOOP_CONFIGURE changes its diskseq. What is read after that does
// not change any more.
// 0, or an errno.
int Identify(int fd, bool loop, DeviceFacts& facts) {
  struct stat st;
  if (fstat(fd, &st) < 0) return errno;
  if (!S_ISBLK(st.st_mode)) return ENOTBLK;
  struct loop_info64 bound;
  if (loop && ioctl(fd, LOOP_GET_STATUS64, &bound) < 0) return errno;
  if (ioctl(fd, BLKGETDISKSEQ, &facts.diskseq) < 0) return errno;
  facts.major = major(st.st_rdev);
  facts.minor = minor(st.st_rdev);
  facts.uevent = ReadUevent(SysfsOf(st.st_rdev) + "/uevent");
  // The device is not gone: it took the last descriptor itself.
  return facts.uevent.empty() && Exhausted(errno) ? errno : 0;
}

DeviceFacts OpenAndIdentify(int dir, const std::string& name, int flags, bool loop, int nodes) {
  DeviceFacts facts;
  facts.fd = UniqueFd(OpenNode(dir, name, flags | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, nodes));
  facts.error = facts.fd.Get() < 0 ? errno : Identify(facts.fd.Get(), loop, facts);
  if (facts.error != 0) facts.fd.Reset();
  return facts;
}

// openDevice(dirfd, name, flags, loop, nodes, callback(error, fd, major, minor,
// diskseq, uevent)): on a pool thread; error is an errno or 0.
Napi::Value OpenDevice(const Napi::CallbackInfo& info) {
  int dir = IntArg(info, 0);
  std::string name = StringArg(info, 1);
  int flags = IntArg(info, 2);
  bool loop = info[3].As<Napi::Boolean>().Value();
  int nodes = IntArg(info, 4);
  Tasks(info.Env()).Submit(info[5].As<Napi::Function>(), [=]() -> Outcome {
    auto facts = std::make_shared<DeviceFacts>(OpenAndIdentify(dir, name, flags, loop, nodes));
    return [facts](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, facts->error),
              Napi::Number::New(env, facts->fd.Release()),
              Napi::Number::New(env, facts->major),
              Napi::Number::New(env, facts->minor),
              Napi::BigInt::New(env, facts->diskseq),
              Napi::String::New(env, facts->uevent)};
    };
  });
  return info.Env().Undefined();
}

// identify(fd, check, callback(error, kname, major, minor, diskseq, uevent)): the same of a descriptor that is open.
// Without `check`, of a loop device that has been seen bound since the descriptor was opened: to ask it again
// might wait for its file.
Napi::Value IdentifyDevice(const Napi::CallbackInfo& info) {
  int fd = IntArg(info, 0);
  bool check = info[1].ToBoolean();
  Tasks(info.Env()).Submit(info[2].As<Napi::Function>(), [fd, check]() -> Outcome {
    DeviceFacts facts;
    char link[PATH_MAX] = "";
    struct stat st = {};
    if (fstat(fd, &st) == 0) {
      ssize_t n = readlink(SysfsOf(st.st_rdev).c_str(), link, sizeof link - 1);
      link[n < 0 ? 0 : n] = '\0';
    }
    std::string kname = basename(link);
    facts.error = Identify(fd, check && kname.compare(0, 4, "loop") == 0, facts);
    return [facts = std::make_shared<DeviceFacts>(std::move(facts)), kname](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, facts->error),    Napi::String::New(env, kname),
              Napi::Number::New(env, facts->major),    Napi::Number::New(env, facts->minor),
              Napi::BigInt::New(env, facts->diskseq), Napi::String::New(env, facts->uevent)};
    };
  });
  return info.Env().Undefined();
}

// statFile(fd, callback(error, mode, size, device, inode)): on a pool thread, as the filesystem of a file that
// somebody else has opened may not answer.
Napi::Value StatFile(const Napi::CallbackInfo& info) {
  int fd = IntArg(info, 0);
  FileTasks(info.Env()).Submit(info[1].As<Napi::Function>(), [fd]() -> Outcome {
    struct stat st = {};
    int error = fstat(fd, &st) < 0 ? errno : 0;
    return [error, st](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, error), Napi::Number::New(env, st.st_mode),
              Napi::BigInt::New(env, static_cast<uint64_t>(st.st_size)),
              Napi::BigInt::New(env, static_cast<uint64_t>(st.st_dev)),
              Napi::BigInt::New(env, static_cast<uint64_t>(st.st_ino))};
    };
  });
  return info.Env().Undefined();
}

// closeDevice(fd, callback()): on a pool thread, since the last close of a
// device may wait for it.
Napi::Value Close(const Napi::CallbackInfo& info, TaskPool& pool) {
  auto fd = std::make_shared<UniqueFd>(IntArg(info, 0));
  pool.Submit(info[1].As<Napi::Function>(), [fd]() -> Outcome {
    fd->Reset();
    return [](Napi::Env) { return std::vector<napi_value>(); };
  });
  return info.Env().Undefined();
}

Napi::Value CloseDevice(const Napi::CallbackInfo& info) { return Close(info, Tasks(info.Env())); }

// closeFile(fd, callback()): the same of anything that somebody else has opened.
Napi::Value CloseFile(const Napi::CallbackInfo& info) { return Close(info, FileTasks(info.Env())); }

// diskseq(fd): a bigint, or -errno. BLKGETDISKSEQ takes no lock.
Napi::Value Diskseq(const Napi::CallbackInfo& info) {
  uint64_t diskseq = 0;
  if (ioctl(IntArg(info, 0), BLKGETDISKSEQ, &diskseq) < 0) return Result(info.Env(), -1);
  return Napi::BigInt::New(info.Env(), diskseq);
}

// How many devices of a scan one call of next() returns.
constexpr size_t kAtOnce = 64;

// What a scan has found. The texts of all devices are in one string: when freed, one large piece of
// memory goes back to the system, but ten thousand small ones stay with the thread's allocator.
struct SysfsList {
  struct Device {
    size_t name;
    size_t uevent;
    bool bound;
  };
  std::string text;
  std::vector<Device> devices;
  // How much next() has returned so far.
  size_t texts_given = 0;
  size_t devices_given = 0;

  Napi::Value Next(Napi::Env env);
};

Napi::Value SysfsList::Next(Napi::Env env) {
  size_t end = std::min(devices.size(), devices_given + kAtOnce);
  Napi::Array list = Napi::Array::New(env, (end - devices_given) * 3);
  for (uint32_t i = 0; devices_given < end; devices_given++) {
    const Device& device = devices[devices_given];
    const char* name = text.data() + texts_given;
    list[i++] = Napi::String::New(env, name, device.name);
    list[i++] = Napi::String::New(env, name + device.name, device.uevent);
    list[i++] = Napi::Boolean::New(env, device.bound);
    texts_given += device.name + device.uevent;
  }
  // Frees the memory now, not when V8 collects next().
  if (end == devices.size()) {
    std::string().swap(text);
    std::vector<Device>().swap(devices);
    texts_given = devices_given = 0;
  }
  return list;
}

double ThreadCpuMs() {
  struct timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

// scanBlock(classDir, callback(error, next, ms)): every entry of /sys/class/block. Each call of
// next() returns some of them, [name, uevent, bound, ...], and an empty list at the end: ten
// thousand texts at once would live so long that V8 would keep room for more. `bound` says whether
// a loop device, or the one that a partition is on, has a backing file; it is true for all others.
// `ms` is the processor time of the scan.
Napi::Value ScanBlock(const Napi::CallbackInfo& info) {
  std::string root = StringArg(info, 0);
  Tasks(info.Env()).Submit(info[1].As<Napi::Function>(), [root]() -> Outcome {
    auto found = std::make_shared<SysfsList>();
    double began = ThreadCpuMs();
    int error = 0;
    DIR* dir = opendir(root.c_str());
    if (dir == nullptr) {
      error = errno;
    } else {
      while (struct dirent* entry = readdir(dir)) {
        if (entry->d_name[0] == '.') continue;
        std::string name = entry->d_name;
        std::string path = root + "/" + name;
        std::string uevent = ReadUevent(path + "/uevent");
        if (uevent.empty() && Exhausted(errno)) {
          // The device is not gone: a list without it would be wrong.
          error = errno;
          break;
        }
        bool loop = name.compare(0, 4, "loop") == 0;
        // loop0p1 -> loop0
        std::string disk = name.substr(0, name.find('p', 4));
        bool bound = !loop || access((root + "/" + disk + "/loop/backing_file").c_str(), F_OK) == 0;
        found->text += name;
        found->text += uevent;
        found->devices.push_back({name.size(), uevent.size(), bound});
      }
      closedir(dir);
    }
    double took = ThreadCpuMs() - began;
    return [found, error, took](Napi::Env env) -> std::vector<napi_value> {
      auto next = [found](const Napi::CallbackInfo& info) -> Napi::Value { return found->Next(info.Env()); };
      return {Napi::Number::New(env, error), Napi::Function::New(env, next), Napi::Number::New(env, took)};
    };
  });
  return info.Env().Undefined();
}

}  // namespace

void InitBlockdev(Napi::Env env, Napi::Object exports) {
  exports.Set("openDevice", Napi::Function::New<OpenDevice>(env));
  exports.Set("identify", Napi::Function::New<IdentifyDevice>(env));
  exports.Set("statFile", Napi::Function::New<StatFile>(env));
  exports.Set("closeFile", Napi::Function::New<CloseFile>(env));
  exports.Set("closeDevice", Napi::Function::New<CloseDevice>(env));
  exports.Set("diskseq", Napi::Function::New<Diskseq>(env));
  exports.Set("scanBlock", Napi::Function::New<ScanBlock>(env));
}

}  // namespace diskseqfs
