// SPDX-License-Identifier: MIT
// Descriptors that outlive a daemon, by name. The service manager keeps them as well
// (sd_notify(3), FDSTORE=1), so that they outlive this process, too; but for "fuse", the
// connection, and "root", a directory behind it, which whoever cannot answer must not have.
#ifndef DISKSEQFS_GUARD_STORE_H
#define DISKSEQFS_GUARD_STORE_H

#include <stdbool.h>
#include <stddef.h>

// What the service manager has kept for this process (LISTEN_FDS); it is told of
// everything from here on. Its variables are taken out of the environment.
void store_open(void);

// Descriptors are the store's from then on. A name may stand for many.
void store_put(const char *name, const int *fds, size_t count);
void store_remove(const char *name);
// All, or all but that.
void store_clear(const char *but);

// All that is put and removed from here on is sent to that socket as well; -1: to none.
void store_follow(int socket);
// Whether it has taken all so far.
bool store_is_followed(void);
// Does what another process says: "put NAME", "remove NAME"; false where it says anything else. The
// descriptors are the store's in any case.
bool store_hear(const char *text, const int *fds, size_t count);

// The one that was put last; -1 where there is none.
int store_get(const char *name);
// All of a name, up to `max`; how many there are.
size_t store_all(const char *name, int *fds, size_t max);

// Sends what has not been sent yet, but for those whose name begins with a dot, and then
// `last`; false where the other end does not take it.
bool store_send(int socket, const char *last);
// Whoever is sent them next has been sent none.
void store_send_anew(void);

// Sends everything, and waits for the other end to take it.
void store_send_all(int socket);

// In a process that has been forked: the service manager is not told any more.
void store_be_silent(void);

// Tells the service manager what it had no room for, to be called now and then; whether it
// knows all.
bool store_tell(void);

// Under a service manager, tells it that; see sd_notify(3).
void tell_manager(const char *text);

#endif
