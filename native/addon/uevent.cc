// SPDX-License-Identifier: MIT
// The kernel's uevent multicast: NETLINK_KOBJECT_UEVENT, group 1. See
// lib/kobject_uevent.c. The sender's port and groups are passed on; which
// senders to believe is not decided here.
#include <errno.h>
#include <linux/netlink.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "addon.h"

namespace diskseqfs {

namespace {

constexpr unsigned kKernelGroup = 1;

// ueventOpen(receive buffer in bytes): a non-blocking descriptor.
Napi::Value UeventOpen(const Napi::CallbackInfo& info) {
  int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
  if (fd < 0) return Result(info.Env(), fd);
  int bytes = IntArg(info, 0);
  // Only CAP_NET_ADMIN may exceed net.core.rmem_max; without it, take what is
  // allowed.
  if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) < 0)
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
  struct sockaddr_nl address = {};
  address.nl_family = AF_NETLINK;
  address.nl_groups = kKernelGroup;
  if (bind(fd, reinterpret_cast<struct sockaddr*>(&address), sizeof address) < 0) {
    int saved = errno;
    close(fd);
    errno = saved;
    return Result(info.Env(), -1);
  }
  return Result(info.Env(), fd);
}

// ueventReceive(fd, buffer, Uint32Array [sender's port, groups, truncated]):
// size of the message.
Napi::Value UeventReceive(const Napi::CallbackInfo& info) {
  // Each open asks, and mostly there is no message. Then the other arguments
  // are not looked at, as that takes as long as the call itself.
  if (recv(IntArg(info, 0), nullptr, 0, MSG_PEEK | MSG_DONTWAIT) < 0) return Result(info.Env(), -1);
  Bytes out = BytesArg(info, 1);
  auto from = info[2].As<Napi::Uint32Array>();
  if (from.ElementLength() < 3) {
    errno = EINVAL;
    return Result(info.Env(), -1);
  }
  struct sockaddr_nl sender = {};
  struct iovec iov = {out.data, out.size};
  struct msghdr message = {};
  message.msg_name = &sender;
  message.msg_namelen = sizeof sender;
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  ssize_t n = recvmsg(IntArg(info, 0), &message, MSG_DONTWAIT);
  if (n < 0) return Result(info.Env(), n);
  from[0] = sender.nl_pid;
  from[1] = sender.nl_groups;
  from[2] = (message.msg_flags & MSG_TRUNC) != 0;
  return Result(info.Env(), n);
}

}  // namespace

void InitUevent(Napi::Env env, Napi::Object exports) {
  exports.Set("ueventOpen", Napi::Function::New<UeventOpen>(env));
  exports.Set("ueventReceive", Napi::Function::New<UeventReceive>(env));
}

}  // namespace diskseqfs
