// SPDX-License-Identifier: MIT
// Unix sockets: to the system log, the service manager, the guard and other
// daemons, and the sockets that stored pins wait in. A filesystem daemon must
// not wait for any of them, so no function here waits, except awaitMessage().
#include <errno.h>
#include <linux/filter.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "addon.h"
#include "tasks.h"

namespace diskseqfs {

namespace {

// SCM_MAX_FD, net/scm.h
constexpr size_t kMaxDescriptors = 253;
// Connections that wait to be accepted.
constexpr int kFew = 4;
constexpr int kMany = 128;

struct Address {
  struct sockaddr_un un = {};
  socklen_t length = 0;
};

// A path that begins with "@" is a name in the abstract namespace.
bool ToAddress(const std::string& path, Address* address) {
  if (path.empty() || path.size() >= sizeof address->un.sun_path) {
    errno = path.empty() ? EINVAL : ENAMETOOLONG;
    return false;
  }
  address->un.sun_family = AF_UNIX;
  memcpy(address->un.sun_path, path.data(), path.size());
  address->length = sizeof address->un;
  if (path[0] == '@') {
    address->un.sun_path[0] = 0;
    address->length = static_cast<socklen_t>(offsetof(struct sockaddr_un, sun_path) + path.size());
  }
  return true;
}

UniqueFd Socket(int type) { return UniqueFd(socket(AF_UNIX, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)); }

struct sockaddr* Generic(Address& address) { return reinterpret_cast<struct sockaddr*>(&address.un); }

Napi::Value Connected(const Napi::CallbackInfo& info, int type) {
  Address address;
  if (!ToAddress(StringArg(info, 0), &address)) return Result(info.Env(), -1);
  UniqueFd fd = Socket(type);
  if (fd.Get() < 0 || connect(fd.Get(), Generic(address), address.length) < 0) return Result(info.Env(), -1);
  return Result(info.Env(), fd.Release());
}

// datagramOpen(path)
Napi::Value DatagramOpen(const Napi::CallbackInfo& info) { return Connected(info, SOCK_DGRAM); }

// datagramSend(fd, text)
Napi::Value DatagramSend(const Napi::CallbackInfo& info) {
  std::string text = StringArg(info, 1);
  return Result(info.Env(), send(IntArg(info, 0), text.data(), text.size(), MSG_DONTWAIT | MSG_NOSIGNAL));
}

// packetConnect(path)
Napi::Value PacketConnect(const Napi::CallbackInfo& info) { return Connected(info, SOCK_SEQPACKET); }

// streamConnect(path)
Napi::Value StreamConnect(const Napi::CallbackInfo& info) { return Connected(info, SOCK_STREAM); }

// A socket that only this user can connect to.
Napi::Value Listening(const Napi::CallbackInfo& info, int type, int backlog) {
  Address address;
  if (!ToAddress(StringArg(info, 0), &address)) return Result(info.Env(), -1);
  UniqueFd fd = Socket(type);
  // bind(2) creates the socket file with the mode of the descriptor.
  if (fd.Get() < 0 || fchmod(fd.Get(), S_IRUSR | S_IWUSR) < 0) return Result(info.Env(), -1);
  if (bind(fd.Get(), Generic(address), address.length) < 0 || listen(fd.Get(), backlog) < 0) {
    return Result(info.Env(), -1);
  }
  return Result(info.Env(), fd.Release());
}

// packetListen(path)
Napi::Value PacketListen(const Napi::CallbackInfo& info) { return Listening(info, SOCK_SEQPACKET, kFew); }

// streamListen(path)
Napi::Value StreamListen(const Napi::CallbackInfo& info) { return Listening(info, SOCK_STREAM, kMany); }

// acceptConnection(fd)
Napi::Value AcceptConnection(const Napi::CallbackInfo& info) {
  return Result(info.Env(), accept4(IntArg(info, 0), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
}

// sendBuffer(fd, bytes): for how much is kept for the other end to read; beyond net.core.wmem_max where this process
// may do that.
Napi::Value SendBuffer(const Napi::CallbackInfo& info) {
  int fd = IntArg(info, 0), bytes = IntArg(info, 1);
  int rc = setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes);
  if (rc < 0 && errno == EPERM) rc = setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
  return Result(info.Env(), rc);
}

// peerUser(fd): the uid of who has connected.
Napi::Value PeerUser(const Napi::CallbackInfo& info) {
  struct ucred peer = {};
  socklen_t size = sizeof peer;
  if (getsockopt(IntArg(info, 0), SOL_SOCKET, SO_PEERCRED, &peer, &size) < 0) return Result(info.Env(), -1);
  return Napi::Number::New(info.Env(), double(peer.uid));
}

// selfSocket(): a datagram socket that receives what it sends. A descriptor sent through
// it stays open while the message waits, for as long as any process has the socket.
//
// Its name is in the abstract namespace, where any process may send to a socket that is
// not connected. Such a message would be taken for a pin. So a filter drops everything
// until the socket is connected to itself; from then on the kernel accepts only its own
// messages. (The kernel checks the filter before the connection, so at least one of the
// two always applies.)
Napi::Value SelfSocket(const Napi::CallbackInfo& info) {
  UniqueFd fd = Socket(SOCK_DGRAM);
  Address address;
  address.un.sun_family = AF_UNIX;
  address.length = sizeof address.un;
  struct sock_filter drop = BPF_STMT(BPF_RET | BPF_K, 0);
  struct sock_fprog filter = {1, &drop};
  int unused = 0;
  // No path: the kernel picks a free name (autobind, unix(7)).
  if (fd.Get() < 0 || setsockopt(fd.Get(), SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter) < 0 || bind(fd.Get(), Generic(address), sizeof(sa_family_t)) < 0 ||
      getsockname(fd.Get(), Generic(address), &address.length) < 0 ||
      connect(fd.Get(), Generic(address), address.length) < 0 ||
      setsockopt(fd.Get(), SOL_SOCKET, SO_DETACH_FILTER, &unused, sizeof unused) < 0) {
    return Result(info.Env(), -1);
  }
  return Result(info.Env(), fd.Release());
}

// sendDescriptors(socket, text, [fd, ...])
Napi::Value SendDescriptors(const Napi::CallbackInfo& info) {
  std::string text = StringArg(info, 1);
  auto list = info[2].As<Napi::Array>();
  size_t count = list.Length();
  if (count > kMaxDescriptors) {
    errno = EINVAL;
    return Result(info.Env(), -1);
  }
  struct iovec data = {text.data(), text.size()};
  struct msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  alignas(struct cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))] = {};
  if (count > 0) {
    int fds[kMaxDescriptors];
    for (size_t i = 0; i < count; i++) fds[i] = list.Get(i).As<Napi::Number>().Int32Value();
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(count * sizeof(int));
    struct cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof(int));
    memcpy(CMSG_DATA(header), fds, count * sizeof(int));
  }
  return Result(info.Env(), sendmsg(IntArg(info, 0), &message, MSG_DONTWAIT | MSG_NOSIGNAL));
}

// receiveDescriptors(socket, buffer, peek): [bytes, fd, ...], or -errno. With `peek` the
// message stays in the socket, and the descriptors are copies.
Napi::Value ReceiveDescriptors(const Napi::CallbackInfo& info) {
  Bytes out = BytesArg(info, 1);
  alignas(struct cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
  struct iovec data = {out.data, out.size};
  struct msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  ssize_t n = recvmsg(IntArg(info, 0), &message,
                      MSG_DONTWAIT | MSG_CMSG_CLOEXEC | (info[2].ToBoolean() ? MSG_PEEK : 0));
  if (n < 0) return Result(info.Env(), -1);
  Napi::Array result = Napi::Array::New(info.Env());
  uint32_t length = 0;
  result.Set(length++, Napi::Number::New(info.Env(), double(n)));
  for (struct cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    int fds[kMaxDescriptors];
    memcpy(fds, CMSG_DATA(header), count * sizeof(int));
    for (size_t i = 0; i < count; i++) result.Set(length++, Napi::Number::New(info.Env(), fds[i]));
  }
  return result;
}

// awaitMessage(socket): waits until there is a message, or the other end is closed. It
// blocks the event loop: no other JavaScript of this process runs meanwhile.
Napi::Value AwaitMessage(const Napi::CallbackInfo& info) {
  struct pollfd message = {IntArg(info, 0), POLLIN, 0};
  int n;
  do n = poll(&message, 1, -1);
  while (n < 0 && errno == EINTR);
  return Result(info.Env(), n);
}

}  // namespace

void InitSockets(Napi::Env env, Napi::Object exports) {
  exports.Set("datagramOpen", Napi::Function::New<DatagramOpen>(env));
  exports.Set("datagramSend", Napi::Function::New<DatagramSend>(env));
  exports.Set("packetConnect", Napi::Function::New<PacketConnect>(env));
  exports.Set("packetListen", Napi::Function::New<PacketListen>(env));
  exports.Set("streamConnect", Napi::Function::New<StreamConnect>(env));
  exports.Set("streamListen", Napi::Function::New<StreamListen>(env));
  exports.Set("acceptConnection", Napi::Function::New<AcceptConnection>(env));
  exports.Set("sendBuffer", Napi::Function::New<SendBuffer>(env));
  exports.Set("peerUser", Napi::Function::New<PeerUser>(env));
  exports.Set("selfSocket", Napi::Function::New<SelfSocket>(env));
  exports.Set("sendDescriptors", Napi::Function::New<SendDescriptors>(env));
  exports.Set("receiveDescriptors", Napi::Function::New<ReceiveDescriptors>(env));
  exports.Set("awaitMessage", Napi::Function::New<AwaitMessage>(env));
}

}  // namespace diskseqfs
