// Datagram sockets of the system log and of the service manager. syslog(3) blocks
// when the log daemon does not read; a filesystem daemon must not, so nothing
// here waits.
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "addon.h"

namespace diskseqfs {

// datagramOpen(path): a connected non-blocking descriptor. A path that begins
// with "@" is a name in the abstract namespace.
static Napi::Value DatagramOpen(const Napi::CallbackInfo& info) {
  std::string path = StringArg(info, 0);
  struct sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    errno = ENAMETOOLONG;
    return Result(info.Env(), -1);
  }
  memcpy(address.sun_path, path.data(), path.size());
  socklen_t length = sizeof address;
  if (path[0] == '@') {
    address.sun_path[0] = 0;
    length = offsetof(struct sockaddr_un, sun_path) + path.size();
  }
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return Result(info.Env(), fd);
  if (connect(fd, reinterpret_cast<struct sockaddr*>(&address), length) < 0) {
    int saved = errno;
    close(fd);
    errno = saved;
    return Result(info.Env(), -1);
  }
  return Result(info.Env(), fd);
}

// datagramSend(fd, text)
static Napi::Value DatagramSend(const Napi::CallbackInfo& info) {
  std::string text = StringArg(info, 1);
  return Result(info.Env(), send(IntArg(info, 0), text.data(), text.size(), MSG_DONTWAIT | MSG_NOSIGNAL));
}

void InitDatagram(Napi::Env env, Napi::Object exports) {
  exports.Set("datagramOpen", Napi::Function::New<DatagramOpen>(env));
  exports.Set("datagramSend", Napi::Function::New<DatagramSend>(env));
}

}  // namespace diskseqfs
