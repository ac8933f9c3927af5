// SPDX-License-Identifier: MIT
// Requests while there is no daemon: what must not wait is answered, all else is stored for the next daemon.
#ifndef DISKSEQFS_GUARD_REQUESTS_H
#define DISKSEQFS_GUARD_REQUESTS_H

#include <stdbool.h>

// Reads what is waiting, up to a limit; false if the mount is gone.
bool read_requests(void);
// Answers those that the daemon had read and not answered, if they must not wait.
void answer_all_stored(void);
// A later crash is not blamed on the requests that are stored.
void reset_tries(void);

#endif
