"""Files that one process at a time may hold."""

import errno
import fcntl
from typing import IO

_NO_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP


def lock(file: IO) -> bool:
    """Locks an open file until it is closed; False if another process holds it.

    Where the file system has no locks, as Lustre without its option `flock`, a line is
    printed and the file counts as locked.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"{file.name} cannot be locked, this file system has no locks: see to it "
            "that nothing else writes to its folder.",
            flush=True,
        )
    return True
