// SPDX-License-Identifier: MIT
// Stored descriptors, by name, which survive a daemon. The service manager stores them as well
// (sd_notify(3), FDSTORE=1), so that they survive this process; except "fuse", the
// connection, and "root", a directory of the tree, which only processes that can answer may have.
#ifndef DISKSEQFS_GUARD_STORE_H
#define DISKSEQFS_GUARD_STORE_H

#include <stdbool.h>
#include <stddef.h>

// Takes what the service manager has stored (LISTEN_FDS), and removes its variables from the environment. From now
// on it is told of every change.
void store_open(void);

// Stores descriptors, which the store owns from then on. A name may stand for many.
void store_put(const char *name, const int *fds, size_t count);
void store_remove(const char *name);
// Removes all, or all but those of one name.
void store_clear(const char *but);

// From now on all changes are sent to that socket as well; -1: to none.
void store_follow(int socket);
// Whether that socket has taken all of them so far.
bool store_is_followed(void);
// Carries out a message of another process: "put NAME", "remove NAME"; false for any other message. The
// store owns the descriptors in any case.
bool store_hear(const char *text, const int *fds, size_t count);

// The latest descriptor of a name; -1 if there is none.
int store_get(const char *name);
// All descriptors of a name, up to `max`. -> how many there are
size_t store_all(const char *name, int *fds, size_t max);

// Sends what has not been sent yet, except names that begin with a dot, and then
// `last`; false if the other end does not take it.
bool store_send(int socket, const char *last);
// The next receiver gets all of them.
void store_send_anew(void);

// Sends everything, and waits for the other end to take it.
void store_send_all(int socket);

// In a forked process: stops telling the service manager.
void store_be_silent(void);

// Tells the service manager what it had no room for; to be called now and then. -> whether it
// knows everything
bool store_tell(void);

// Tells the service manager, if there is one; see sd_notify(3).
void tell_manager(const char *text);

#endif
