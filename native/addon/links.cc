// SPDX-License-Identifier: MIT
// Symlinks in a directory, made and removed on a pool thread: another process that reads the
// directory may keep it locked.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "addon.h"
#include "tasks.h"

namespace diskseqfs {

namespace {

// Temporary name of a link that is being made.
const char kTemporary[] = ".diskseqfs-link";

bool LeadsTo(int dir, const std::string& path, const std::string& target) {
  std::string now(target.size() + 1, 0);
  ssize_t n = readlinkat(dir, path.c_str(), &now[0], now.size());
  return n == static_cast<ssize_t>(target.size()) && now.compare(0, target.size(), target) == 0;
}

void MakeDirectories(int dir, const std::string& path) {
  for (size_t at = path.find('/'); at != std::string::npos; at = path.find('/', at + 1)) {
    std::string directory = path.substr(0, at);
    // Sets the mode once more, as the service's umask may have reduced it.
    if (mkdirat(dir, directory.c_str(), 0711) == 0) fchmodat(dir, directory.c_str(), 0711, 0);
  }
}

void RemoveDirectories(int dir, std::string path) {
  for (size_t at = path.rfind('/'); at != std::string::npos; at = path.rfind('/')) {
    path.resize(at);
    if (unlinkat(dir, path.c_str(), AT_REMOVEDIR) < 0) return;
  }
}

// Returns 0 or an errno. A link that leads elsewhere is replaced atomically.
int MakeLink(int dir, const std::string& path, const std::string& target) {
  if (LeadsTo(dir, path, target)) return 0;
  MakeDirectories(dir, path);
  if (symlinkat(target.c_str(), dir, path.c_str()) == 0) return 0;
  if (errno != EEXIST) return errno;
  if (unlinkat(dir, kTemporary, 0) < 0 && errno != ENOENT) return errno;
  if (symlinkat(target.c_str(), dir, kTemporary) < 0) return errno;
  return renameat(dir, kTemporary, dir, path.c_str()) < 0 ? errno : 0;
}

int RemoveLink(int dir, const std::string& path) {
  if (unlinkat(dir, path.c_str(), 0) < 0 && errno != ENOENT) return errno;
  RemoveDirectories(dir, path);
  return 0;
}

void Collect(int dir, const std::string& path, int depth, std::vector<std::string>* found) {
  int fd = openat(dir, path.empty() ? "." : path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  DIR* directory = fd < 0 ? nullptr : fdopendir(fd);
  if (directory == nullptr) {
    if (fd >= 0) close(fd);
    return;
  }
  for (struct dirent* entry; (entry = readdir(directory)) != nullptr;) {
    std::string name = entry->d_name;
    if (name == "." || name == "..") continue;
    if (!path.empty()) name = path + "/" + name;
    if (entry->d_type == DT_LNK) found->push_back(name);
    if (entry->d_type == DT_DIR && depth > 0) Collect(dir, name, depth - 1, found);
  }
  closedir(directory);
}

// changeLinks(dir, mode, [path, target, path, target, ...], callback(error)): sets the directory's mode, then
// makes each link and the directories above it. If the target is "", removes the link, and the directories
// above it that are then empty.
Napi::Value ChangeLinks(const Napi::CallbackInfo& info) {
  int dir = IntArg(info, 0);
  mode_t mode = info[1].As<Napi::Number>().Uint32Value();
  Napi::Array list = info[2].As<Napi::Array>();
  std::vector<std::pair<std::string, std::string>> changes;
  for (uint32_t i = 0; i + 1 < list.Length(); i += 2) {
    changes.emplace_back(list.Get(i).ToString().Utf8Value(), list.Get(i + 1).ToString().Utf8Value());
  }
  Tasks(info.Env()).Submit(info[3].As<Napi::Function>(), [dir, mode, changes]() -> Outcome {
    int error = fchmod(dir, mode) < 0 ? errno : 0;
    for (const auto& [path, target] : changes) {
      int failed = target.empty() ? RemoveLink(dir, path) : MakeLink(dir, path, target);
      if (failed != 0) error = failed;
    }
    return [error](Napi::Env env) -> std::vector<napi_value> { return {Napi::Number::New(env, error)}; };
  });
  return info.Env().Undefined();
}

// listLinks(dir, depth, callback([path, ...])): the links in `dir`, and in directories up to `depth` levels
// below it.
Napi::Value ListLinks(const Napi::CallbackInfo& info) {
  int dir = IntArg(info, 0);
  int depth = IntArg(info, 1);
  Tasks(info.Env()).Submit(info[2].As<Napi::Function>(), [dir, depth]() -> Outcome {
    std::vector<std::string> found;
    Collect(dir, "", depth, &found);
    return [found](Napi::Env env) -> std::vector<napi_value> {
      Napi::Array list = Napi::Array::New(env, found.size());
      for (uint32_t i = 0; i < found.size(); i++) list.Set(i, Napi::String::New(env, found[i]));
      return {list};
    };
  });
  return info.Env().Undefined();
}

}  // namespace

void InitLinks(Napi::Env env, Napi::Object exports) {
  exports.Set("changeLinks", Napi::Function::New<ChangeLinks>(env));
  exports.Set("listLinks", Napi::Function::New<ListLinks>(env));
}

}  // namespace diskseqfs
