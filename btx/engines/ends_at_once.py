"""Has whoever imports it end without tidying up: the fork server, whose forks are told to end when it does.

Taking torch apart takes it most of a second, in which a job could go on, or finish, after its run was killed. It is the
last module that the server imports, so that its handler is the first to run; forks run no such handlers.
"""

import atexit
import os

atexit.register(os._exit, 0)
