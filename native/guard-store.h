// Descriptors that outlive a daemon, by name. The service manager keeps them as well
// (sd_notify(3), FDSTORE=1), so that they outlive this process, too; but for "fuse", the
// connection, which whoever cannot answer must not keep alive.
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
void store_clear(void);

// The one that was put last; -1 where there is none.
int store_get(const char *name);
// All of a name, up to `max`; how many there are.
size_t store_all(const char *name, int *fds, size_t max);

// Sends what has not been sent yet, but for those whose name begins with a dot, and then
// `last`; false where the other end does not take it.
bool store_send(int socket, const char *last);
// Whoever is sent them next has been sent none.
void store_send_anew(void);

// A message to anybody; whether it was taken.
bool send_descriptors(int socket, const char *text, const int *fds, size_t count);

// In a process that has been forked: nothing is kept any more, and nobody is told.
void store_forget(void);

// Tells the service manager what it had no room for, to be called now and then; whether it
// knows all.
bool store_tell(void);

// Under a service manager, tells it that; see sd_notify(3).
bool has_manager(void);
void tell_manager(const char *text);

#endif
