// SPDX-License-Identifier: MIT
// Device-mapper by its own library, libdevmapper, which knows what udev's rules must be told of each call. It is
// loaded when it is first needed: the daemon and most commands do without.
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <mutex>

#include "addon.h"
#include "tasks.h"

namespace diskseqfs {

namespace {

// As in libdevmapper.h. Its interface has only grown since 2005; what is declared here is of its version 1.02.89
// (2014) at the latest.
struct dm_task;
struct dm_info {
  int exists, suspended, live_table, inactive_table;
  int32_t open_count;
  uint32_t event_nr, major, minor;
  int read_only;
  int32_t target_count;
  int deferred_remove, internal_suspend;
};
using LogFunction = void (*)(int level, const char* file, int line, int error, const char* format, ...);
constexpr int kLogError = 3;
struct dm_names {
  uint64_t dev;
  // From this one, bytes; 0 in the last.
  uint32_t next;
  char name[];
};

struct Library {
  dm_task* (*task_create)(int type);
  void (*task_destroy)(dm_task*);
  int (*set_name)(dm_task*, const char*);
  int (*set_uuid)(dm_task*, const char*);
  int (*set_newname)(dm_task*, const char*);
  int (*set_major_minor)(dm_task*, int major, int minor, int fallback);
  int (*set_message)(dm_task*, const char*);
  int (*set_sector)(dm_task*, uint64_t);
  int (*set_ro)(dm_task*);
  int (*set_cookie)(dm_task*, uint32_t* cookie, uint16_t flags);
  int (*no_flush)(dm_task*);
  int (*skip_lockfs)(dm_task*);
  int (*query_inactive_table)(dm_task*);
  int (*deferred_remove)(dm_task*);
  int (*add_target)(dm_task*, uint64_t start, uint64_t size, const char* type, const char* params);
  int (*run)(dm_task*);
  int (*get_errno)(dm_task*);
  int (*get_info)(dm_task*, dm_info*);
  const char* (*get_name)(const dm_task*);
  const dm_names* (*get_names)(dm_task*);
  void* (*next_target)(dm_task*, void* next, uint64_t* start, uint64_t* length, char** type, char** params);
  int (*udev_wait)(uint32_t cookie);
  void (*log_init)(LogFunction);
  void (*release)();

  // Why there is none; empty if there is.
  std::string missing;
};

// The library is not for several threads at a time.
std::mutex mutex;
// What it has said of the task under way.
std::string said;

void Log(int level, const char*, int, int, const char* format, ...) {
  if ((level & 7) > kLogError) return;
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  if (!said.empty()) said += "; ";
  said += line;
}

const Library& Load() {
  static const Library library = [] {
    Library found = {};
    void* handle = dlopen("libdevmapper.so.1.02.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      found.missing = dlerror();
      return found;
    }
    auto load = [&](const char* name, auto* function) {
      *reinterpret_cast<void**>(function) = dlsym(handle, name);
      if (*function == nullptr) found.missing = std::string("it has no ") + name;
    };
    load("dm_task_create", &found.task_create);
    load("dm_task_destroy", &found.task_destroy);
    load("dm_task_set_name", &found.set_name);
    load("dm_task_set_uuid", &found.set_uuid);
    load("dm_task_set_newname", &found.set_newname);
    load("dm_task_set_major_minor", &found.set_major_minor);
    load("dm_task_set_message", &found.set_message);
    load("dm_task_set_sector", &found.set_sector);
    load("dm_task_set_ro", &found.set_ro);
    load("dm_task_set_cookie", &found.set_cookie);
    load("dm_task_no_flush", &found.no_flush);
    load("dm_task_skip_lockfs", &found.skip_lockfs);
    load("dm_task_query_inactive_table", &found.query_inactive_table);
    load("dm_task_deferred_remove", &found.deferred_remove);
    load("dm_task_add_target", &found.add_target);
    load("dm_task_run", &found.run);
    load("dm_task_get_errno", &found.get_errno);
    load("dm_task_get_info", &found.get_info);
    load("dm_task_get_name", &found.get_name);
    load("dm_task_get_names", &found.get_names);
    load("dm_get_next_target", &found.next_target);
    load("dm_udev_wait", &found.udev_wait);
    load("dm_log_with_errno_init", &found.log_init);
    load("dm_lib_release", &found.release);
    if (found.missing.empty()) found.log_init(Log);
    return found;
  }();
  return library;
}

struct Target {
  uint64_t start = 0, length = 0;
  std::string type, params;
};

enum Flag : unsigned {
  kReadOnly = 1,
  kDeferred = 2,
  kNoFlush = 4,
  kSkipLockfs = 8,
  kInactive = 16,
  // Returns when udev has handled the event of it.
  kSync = 32,
  // That event is for its name alone: udev does not look at what is on the device.
  kNameOnly = 64,
};
// DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG, ..._DISK_RULES_FLAG, ..._OTHER_RULES_FLAG
constexpr uint16_t kNoOtherRules = 2 | 4 | 8;

struct Task {
  int type;
  unsigned flags;
  int major, minor;
  std::string name, text, uuid;
  uint64_t sector;
  std::vector<Target> targets;
};

// DM_DEVICE_RENAME, DM_DEVICE_LIST, DM_DEVICE_TARGET_MSG: see libdevmapper.h
constexpr int kRename = 8;
constexpr int kList = 13;
constexpr int kMessage = 17;

struct Done {
  int error = 0;
  std::string said, name;
  dm_info info = {};
  std::vector<Target> targets;
  std::vector<std::string> names;
};

bool Prepare(const Library& dm, dm_task* task, const Task& asked, uint32_t* cookie) {
  bool by_number = asked.major >= 0;
  bool ok = true;
  if (by_number) ok = dm.set_major_minor(task, asked.major, asked.minor, 0);
  else if (asked.type != kList) ok = dm.set_name(task, asked.name.c_str());
  // With both the kernel takes the number for the name of a device that is to be.
  if (!asked.uuid.empty()) ok = ok && dm.set_uuid(task, asked.uuid.c_str());
  if (asked.type == kRename) ok = ok && dm.set_newname(task, asked.text.c_str());
  if (asked.type == kMessage) ok = ok && dm.set_message(task, asked.text.c_str()) && dm.set_sector(task, asked.sector);
  if (asked.flags & kReadOnly) ok = ok && dm.set_ro(task);
  if (asked.flags & kDeferred) ok = ok && dm.deferred_remove(task);
  if (asked.flags & kNoFlush) ok = ok && dm.no_flush(task);
  if (asked.flags & kSkipLockfs) ok = ok && dm.skip_lockfs(task);
  if (asked.flags & kInactive) ok = ok && dm.query_inactive_table(task);
  for (const Target& each : asked.targets)
    ok = ok && dm.add_target(task, each.start, each.length, each.type.c_str(), each.params.c_str());
  if (asked.flags & kSync) ok = ok && dm.set_cookie(task, cookie, asked.flags & kNameOnly ? kNoOtherRules : 0);
  return ok;
}

Done Run(const Task& asked) {
  std::lock_guard<std::mutex> lock(mutex);
  Done done;
  const Library& dm = Load();
  if (!dm.missing.empty()) {
    done.error = ENOSYS;
    done.said = dm.missing;
    return done;
  }
  said.clear();
  dm_task* task = dm.task_create(asked.type);
  if (task == nullptr) {
    done.error = ENOMEM;
    done.said = said;
    return done;
  }
  uint32_t cookie = 0;
  if (!Prepare(dm, task, asked, &cookie)) {
    done.error = EINVAL;
  } else if (!dm.run(task)) {
    done.error = dm.get_errno(task) ?: EIO;
  } else if (asked.type == kList) {
    for (const dm_names* each = dm.get_names(task); each != nullptr && each->dev != 0;) {
      done.names.emplace_back(each->name);
      each = each->next == 0 ? nullptr
                             : reinterpret_cast<const dm_names*>(reinterpret_cast<const char*>(each) + each->next);
    }
  } else if (!dm.get_info(task, &done.info)) {
    done.error = EIO;
  } else {
    const char* name = dm.get_name(task);
    done.name = name == nullptr ? "" : name;
    void* next = nullptr;
    do {
      Target found;
      char *type = nullptr, *params = nullptr;
      next = dm.next_target(task, next, &found.start, &found.length, &type, &params);
      if (type == nullptr) break;
      found.type = type;
      found.params = params == nullptr ? "" : params;
      done.targets.push_back(std::move(found));
    } while (next != nullptr);
  }
  // Also after an error: it takes the cookie away.
  if (cookie != 0) dm.udev_wait(cookie);
  dm.task_destroy(task);
  // Closes /dev/mapper/control.
  dm.release();
  done.said = said;
  return done;
}

Napi::Object ToObject(Napi::Env env, const Done& done) {
  auto object = Napi::Object::New(env);
  object.Set("name", done.name);
  object.Set("major", done.info.major);
  object.Set("minor", done.info.minor);
  object.Set("exists", done.info.exists != 0);
  object.Set("openCount", done.info.open_count);
  auto targets = Napi::Array::New(env, done.targets.size());
  for (uint32_t i = 0; i < done.targets.size(); i++) {
    const Target& found = done.targets[i];
    auto target = Napi::Object::New(env);
    target.Set("start", Napi::BigInt::New(env, found.start));
    target.Set("length", Napi::BigInt::New(env, found.length));
    target.Set("type", found.type);
    target.Set("params", found.params);
    targets.Set(i, target);
  }
  object.Set("targets", targets);
  auto names = Napi::Array::New(env, done.names.size());
  for (uint32_t i = 0; i < done.names.size(); i++) names.Set(i, done.names[i]);
  object.Set("names", names);
  return object;
}

uint64_t Wide(Napi::Value value) {
  bool lossless;
  return value.As<Napi::BigInt>().Uint64Value(&lossless);
}

// deviceMapper(type, flags, major, minor, name, text, uuid, sector, targets, callback(error, said, found)): one call of
// libdevmapper, of the device with a number, or with a name if `major` is -1. `text` is a new name, or a message.
// `said` is what the library has to say of an error. DM_DEVICE_LIST is of no device, and finds the names of all.
Napi::Value DeviceMapper(const Napi::CallbackInfo& info) {
  auto asked = std::make_shared<Task>();
  asked->type = IntArg(info, 0);
  asked->flags = static_cast<unsigned>(IntArg(info, 1));
  asked->major = IntArg(info, 2);
  asked->minor = IntArg(info, 3);
  asked->name = StringArg(info, 4);
  asked->text = StringArg(info, 5);
  asked->uuid = StringArg(info, 6);
  asked->sector = Wide(info[7]);
  auto targets = info[8].As<Napi::Array>();
  for (uint32_t i = 0; i < targets.Length(); i++) {
    auto target = targets.Get(i).As<Napi::Object>();
    asked->targets.push_back({Wide(target.Get("start")), Wide(target.Get("length")),
                              target.Get("type").As<Napi::String>().Utf8Value(),
                              target.Get("params").As<Napi::String>().Utf8Value()});
  }
  FileTasks(info.Env()).Submit(info[9].As<Napi::Function>(), [asked]() -> Outcome {
    auto done = std::make_shared<Done>(Run(*asked));
    return [done](Napi::Env env) -> std::vector<napi_value> {
      return {Napi::Number::New(env, done->error), Napi::String::New(env, done->said), ToObject(env, *done)};
    };
  });
  return info.Env().Undefined();
}

}  // namespace

void InitDevmapper(Napi::Env env, Napi::Object exports) {
  exports.Set("deviceMapper", Napi::Function::New<DeviceMapper>(env));
}

}  // namespace diskseqfs
