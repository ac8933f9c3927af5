// The system log's datagram socket. syslog(3) blocks when the log daemon does
// not read; a filesystem daemon must not, so this one drops the line instead.
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "addon.h"

namespace diskseqfs {

// syslogOpen(path): a connected non-blocking descriptor.
static Napi::Value SyslogOpen(const Napi::CallbackInfo& info) {
  struct sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  strncpy(address.sun_path, StringArg(info, 0).c_str(), sizeof address.sun_path - 1);
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return Result(info.Env(), fd);
  if (connect(fd, reinterpret_cast<struct sockaddr*>(&address), sizeof address) < 0) {
    int saved = errno;
    close(fd);
    errno = saved;
    return Result(info.Env(), -1);
  }
  return Result(info.Env(), fd);
}

// syslogSend(fd, line)
static Napi::Value SyslogSend(const Napi::CallbackInfo& info) {
  std::string line = StringArg(info, 1);
  return Result(info.Env(), send(IntArg(info, 0), line.data(), line.size(), MSG_DONTWAIT | MSG_NOSIGNAL));
}

void InitSyslog(Napi::Env env, Napi::Object exports) {
  exports.Set("syslogOpen", Napi::Function::New<SyslogOpen>(env));
  exports.Set("syslogSend", Napi::Function::New<SyslogSend>(env));
}

}  // namespace diskseqfs
