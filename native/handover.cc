// What lets another process take over: descriptors passed over sockets, and
// memory that outlives the process that wrote it.
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "addon.h"
#include "state.h"

namespace diskseqfs {

namespace {

// SCM_MAX_FD, net/scm.h
constexpr size_t kMaxDescriptors = 253;

// sharedMemory(bytes): a descriptor of memory that is all zeros.
Napi::Value SharedMemory(const Napi::CallbackInfo& info) {
  int fd = memfd_create("diskseqfs", MFD_CLOEXEC);
  if (fd < 0) return Result(info.Env(), fd);
  if (ftruncate(fd, info[0].As<Napi::Number>().Int64Value()) == 0) return Result(info.Env(), fd);
  int saved = errno;
  close(fd);
  errno = saved;
  return Result(info.Env(), -1);
}

// mapMemory(fd, bytes): an ArrayBuffer of it, or -errno. EINVAL where the memory
// is smaller than that: touching what is beyond its end would be fatal.
Napi::Value MapMemory(const Napi::CallbackInfo& info) {
  int fd = IntArg(info, 0);
  auto size = static_cast<size_t>(info[1].As<Napi::Number>().Int64Value());
  off_t end = lseek(fd, 0, SEEK_END);
  if (end < 0) return Result(info.Env(), -1);
  if (static_cast<size_t>(end) < size) {
    errno = EINVAL;
    return Result(info.Env(), -1);
  }
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) return Result(info.Env(), -1);
  return Napi::ArrayBuffer::New(info.Env(), memory, size, [size](Napi::Env, void* data) { munmap(data, size); });
}

// selfSocket(): a datagram socket that receives what it sends. A descriptor
// sent through it stays open for as long as the message waits, whoever has
// the socket.
Napi::Value SelfSocket(const Napi::CallbackInfo& info) {
  int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return Result(info.Env(), fd);
  struct sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  socklen_t length = sizeof address;
  // No path: the kernel picks a free name (autobind, unix(7)).
  if (bind(fd, reinterpret_cast<struct sockaddr*>(&address), sizeof(sa_family_t)) == 0 &&
      getsockname(fd, reinterpret_cast<struct sockaddr*>(&address), &length) == 0 &&
      connect(fd, reinterpret_cast<struct sockaddr*>(&address), length) == 0) {
    return Result(info.Env(), fd);
  }
  int saved = errno;
  close(fd);
  errno = saved;
  return Result(info.Env(), -1);
}

// A message that carries descriptors; `control` must have CMSG_SPACE for them.
// What it points to is the caller's.
struct msghdr WithDescriptors(std::string& text, const int* fds, size_t count, char* control) {
  static thread_local struct iovec data;
  data = {text.data(), text.size()};
  struct msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (count == 0) return message;
  size_t bytes = count * sizeof(int);
  memset(control, 0, CMSG_SPACE(bytes));
  message.msg_control = control;
  message.msg_controllen = CMSG_SPACE(bytes);
  struct cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(bytes);
  memcpy(CMSG_DATA(header), fds, bytes);
  return message;
}

// sendDescriptors(socket, text, [fd, ...]): does not wait.
Napi::Value SendDescriptors(const Napi::CallbackInfo& info) {
  std::string text = StringArg(info, 1);
  auto list = info[2].As<Napi::Array>();
  size_t count = list.Length();
  if (count > kMaxDescriptors) {
    errno = EINVAL;
    return Result(info.Env(), -1);
  }
  int fds[kMaxDescriptors];
  for (size_t i = 0; i < count; i++) fds[i] = list.Get(i).As<Napi::Number>().Int32Value();
  alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fds)];
  struct msghdr message = WithDescriptors(text, fds, count, control);
  return Result(info.Env(), sendmsg(IntArg(info, 0), &message, MSG_DONTWAIT | MSG_NOSIGNAL));
}

// receiveDescriptors(socket, buffer, peek): [bytes, fd, ...], or -errno. With
// `peek` the message stays where it is, and the descriptors are copies.
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

// callGuard(path, mountpoint, fuse, state): a connection to the guard, which has
// agreed (guard.c). It answers at once or not at all, so a second is waited.
Napi::Value CallGuard(const Napi::CallbackInfo& info) {
  std::string path = StringArg(info, 0), mountpoint = StringArg(info, 1);
  struct sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    errno = ENAMETOOLONG;
    return Result(info.Env(), -1);
  }
  memcpy(address.sun_path, path.data(), path.size());
  int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (fd < 0) return Result(info.Env(), fd);
  struct timeval patience = {1, 0};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  int fds[2] = {IntArg(info, 2), IntArg(info, 3)};
  char answer[2];
  alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof fds)];
  struct msghdr message = WithDescriptors(mountpoint, fds, 2, control);
  ssize_t n = -1;
  if (connect(fd, reinterpret_cast<struct sockaddr*>(&address), sizeof address) == 0 &&
      sendmsg(fd, &message, MSG_NOSIGNAL) >= 0 && (n = recv(fd, answer, sizeof answer, 0)) > 0) {
    return Result(info.Env(), fd);
  }
  int saved = n == 0 ? ECONNRESET : errno;
  close(fd);
  errno = saved;
  return Result(info.Env(), -1);
}

}  // namespace

void InitHandover(Napi::Env env, Napi::Object exports) {
  Napi::Object layout = Napi::Object::New(env);
#define FIELD(name, value) layout.Set(#name, Napi::Number::New(env, value));
  STATE_LAYOUT(FIELD)
#undef FIELD
  exports.Set("layout", layout);
  exports.Set("callGuard", Napi::Function::New<CallGuard>(env));
  exports.Set("sharedMemory", Napi::Function::New<SharedMemory>(env));
  exports.Set("mapMemory", Napi::Function::New<MapMemory>(env));
  exports.Set("selfSocket", Napi::Function::New<SelfSocket>(env));
  exports.Set("sendDescriptors", Napi::Function::New<SendDescriptors>(env));
  exports.Set("receiveDescriptors", Napi::Function::New<ReceiveDescriptors>(env));
}

}  // namespace diskseqfs
