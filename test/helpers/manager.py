#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A service manager for one service: starts it, keeps the descriptors that it is
given (sd_notify(3), FDSTORE=1), and starts it anew when it ends, as systemd does
with Restart=always and KillMode=process.

STORE_MAX: as FileDescriptorStoreMax=. MESSAGE_MS: how long it takes for each message.

    manager.py COMMAND [ARGUMENT]...

Commands on stdin, a line each: "kill" (SIGKILL), "term" (SIGTERM), "stop" (the
same, and not started again; what was kept is closed). On stdout: "pid N" at
each start, "status TEXT" when it says so, "ended" when it was stopped.
"""
import array, os, select, signal, socket, sys, tempfile, time

directory = tempfile.mkdtemp(prefix='diskseqfs-manager-')
path = directory + '/notify'
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
notify.bind(path)
store = []  # (name, fd)
store_max = int(os.environ.pop('STORE_MAX', 8192))
message_s = int(os.environ.pop('MESSAGE_MS', 0)) / 1000
pid = 0
stopping = False


def say(text):
    print(text, flush=True)


def start():
    global pid
    pid = os.fork()
    if pid:
        return say('pid %d' % pid)
    environment = dict(os.environ, NOTIFY_SOCKET=path, FDSTORE=str(store_max))
    if store:
        # From 3 on, in order; first out of the way of each other.
        fds = [os.dup(fd) for _, fd in store]
        high = max(fds) + len(fds) + 10
        fds = [os.dup2(fd, high + i) for i, fd in enumerate(fds)]
        for i, fd in enumerate(fds):
            os.dup2(fd, 3 + i)
            os.close(fd)
        environment.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(store)),
                           LISTEN_FDNAMES=':'.join(name for name, _ in store))
    os.execvpe(sys.argv[1], sys.argv[1:], environment)


def heard():
    while True:
        try:
            data, ancillary, _, _ = notify.recvmsg(4096, socket.CMSG_SPACE(253 * 4))
        except BlockingIOError:
            return
        time.sleep(message_s)
        fds = array.array('i')
        for _, _, part in ancillary:
            fds.frombytes(part)
        for fd in fds:
            os.set_inheritable(fd, False)
        fields = dict(line.split('=', 1) for line in data.decode().splitlines())
        if fields.get('FDSTORE') == '1':
            room = max(0, store_max - len(store))
            store.extend((fields['FDNAME'], fd) for fd in fds[:room])
            for fd in fds[room:]:
                os.close(fd)
        elif fields.get('FDSTOREREMOVE') == '1':
            for entry in [entry for entry in store if entry[0] == fields['FDNAME']]:
                store.remove(entry)
                os.close(entry[1])
        if 'STATUS' in fields:
            say('status ' + fields['STATUS'])


child_read, child_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
signal.set_wakeup_fd(child_write)
signal.signal(signal.SIGCHLD, lambda *_: None)
start()
running = True
while running:
    ready, _, _ = select.select([notify, child_read] + ([] if stopping else [0]), [], [])
    if notify in ready:
        heard()
    if 0 in ready:
        line = os.read(0, 4096)
        if not line:
            line = b'stop'
        for command in line.split():
            if command == b'kill':
                os.kill(pid, signal.SIGKILL)
            elif command in (b'term', b'stop'):
                os.kill(pid, signal.SIGTERM)
            if command == b'stop':
                stopping = True
    if child_read in ready:
        os.read(child_read, 4096)
        try:
            ended, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended = pid
        if ended:
            heard()
            if stopping:
                running = False
            else:
                start()
for _, fd in store:
    os.close(fd)
os.unlink(path)
os.rmdir(directory)
say('ended')
