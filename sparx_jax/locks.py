"""Files that one process at a time may hold."""

import errno
import fcntl
from typing import IO

_NO_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP


def lock(file: IO) -> bool:
    """Locks an open file until it is closed; False if another process holds it.

    A file system may have no locks, as Lustre without its option `flock`: it says so
    and takes the file for free.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{file.name} cannot be locked: nothing may be started here twice.")
    return True
