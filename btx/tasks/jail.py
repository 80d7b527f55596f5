"""The program that builds a sandbox and starts an untrusted Python program in it: standard library only.

`btx/tasks/enclosed.py` starts it as a process of its own, since only a process with a single thread can enter a user
namespace. Three processes: the outer one enters the namespaces; its child is process 1 of the new pid namespace,
mounts the file system and waits; the program is a child of that. When process 1 ends, the kernel ends all the others.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

# From <linux/sched.h>, <linux/mount.h> and <linux/prctl.h>.
NAMESPACES = {
    "user": 0x10000000, "mount": 0x00020000, "pid": 0x20000000, "network": 0x40000000, "ipc": 0x08000000,
    "uts": 0x04000000, "cgroup": 0x02000000,
}  # fmt: skip
BIND, RECURSIVE, PRIVATE, NOSUID, NODEV = 4096, 16384, 1 << 18, 2, 4
READ_ONLY = 1 | NOSUID | NODEV  # the same bits in mount() and in mount_setattr()
MOUNT_SETATTR, AT_RECURSIVE, AT_FDCWD = 442, 0x8000, -100  # the same number on every architecture, since Linux 5.12
DETACH = 2
PDEATHSIG, CAPBSET_DROP, NO_NEW_PRIVS = 1, 24, 38
NOBODY = 65534
NEW = "/proc"  # where the new root is mounted: a folder that exists everywhere and holds no interpreter
WORK = "/tmp"  # the only place inside where a program can write
WORK_BYTES = 16 * 2**20

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, function: Any, *args: Any) -> None:
    """Call a function of libc; OSError that names what was tried."""
    if function(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    call(f"mount {target}", libc.mount, source.encode(), target.encode(), kind.encode(), flags, data.encode())


def read_only(target: str, *, recursive: bool) -> None:
    """Make a mount (and all below it) read-only, without devices and set-user-id programs."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)  # set, clear, propagation, user namespace
    flags = AT_RECURSIVE if recursive else 0
    size = ctypes.sizeof(attributes)
    call(f"make {target} read-only", libc.syscall, MOUNT_SETATTR, AT_FDCWD, target.encode(), flags,
         ctypes.byref(attributes), ctypes.c_size_t(size))  # fmt: skip


def enter_namespaces() -> bool:
    """Enter new namespaces; returns whether a second user, without any rights, is mapped there."""
    uid, gid, own = os.geteuid(), os.getegid(), os.getpid()
    done_r, done_w = os.pipe()
    helper = 0 if uid else os.fork()
    if not uid and not helper:  # only a process outside may map a second user
        os.close(done_w)
        if os.read(done_r, 1):
            ok = True
            for name in ("uid_map", "gid_map"):
                ok = ok and _wrote(f"/proc/{own}/{name}", f"0 0 1\n{NOBODY} {NOBODY} 1")
            os._exit(0 if ok else 1)
        os._exit(1)
    call(f"unshare {', '.join(NAMESPACES)}", libc.unshare, sum(NAMESPACES.values()))
    if helper:
        os.write(done_w, b"x")
        if os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) == 0:
            return True
    if not (_wrote("/proc/self/setgroups", "deny") and _wrote("/proc/self/uid_map", f"0 {uid} 1")
            and _wrote("/proc/self/gid_map", f"0 {gid} 1")):  # fmt: skip
        raise OSError("the user cannot be mapped into a user namespace")
    return False


def _wrote(path: str, text: str) -> bool:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError:
        return False
    return True


def build_root(config: dict[str, Any]) -> None:
    """Mount a file system that has what Python needs, read-only, and leave the old one."""
    mount("none", "/", "", RECURSIVE | PRIVATE)
    mount("tmpfs", NEW, "tmpfs", NOSUID | NODEV, f"size={2**20},mode=755")
    os.mkdir(NEW + WORK)  # before all else, since an interpreter may lie below it
    mount("tmpfs", NEW + WORK, "tmpfs", NOSUID | NODEV, f"size={WORK_BYTES},nr_inodes=1024,mode=1777")
    for path in config["binds"]:
        inside = NEW + path
        if os.path.lexists(inside):
            continue  # below a folder that is bound already
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.mkdir(inside)
        else:
            os.close(os.open(inside, os.O_CREAT, 0o644))
        mount(path, inside, "", BIND | RECURSIVE)
        if path != os.devnull:
            read_only(inside, recursive=True)
    for path in config["covers"]:
        mount("tmpfs", NEW + path, "tmpfs", READ_ONLY, f"size={2**16},mode=755")
    os.chdir(NEW)
    call("pivot_root", libc.pivot_root, b".", b".")  # the old root then lies on top of the new one
    call("leave the old root", libc.umount2, b".", DETACH)
    os.chdir("/")
    read_only("/", recursive=False)
    os.chdir(WORK)


def give_up_rights(config: dict[str, Any], second: bool) -> None:
    """Become the second user, if there is one, give up all capabilities, and set the limits."""
    if second:
        os.setgroups([])
        for capability in range(64):
            libc.prctl(CAPBSET_DROP, capability, 0, 0, 0)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    else:  # without a bounding set, the program has no capability after exec
        for capability in range(64):
            libc.prctl(CAPBSET_DROP, capability, 0, 0, 0)
    call("set no_new_privs", libc.prctl, NO_NEW_PRIVS, 1, 0, 0, 0)
    for name, most in config["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def start(config: dict[str, Any], second: bool, status: int) -> None:
    """Become the program."""
    give_up_rights(config, second)
    os.set_inheritable(status, False)  # its end closes, silently, when the program starts
    os.execve(config["command"][0], config["command"], config["environment"])


def code_of(status: int) -> int:
    """The exit code that stands for a wait status: 128 and the signal where one ended the process."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def first_process(config: dict[str, Any], second: bool, status: int) -> int:
    """Process 1: build the file system, start the program, wait for it; returns its exit code."""
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    build_root(config)
    program = os.fork()
    if not program:
        start(config, second, status)
    os.close(status)
    for fd in config["fds"]:
        os.close(fd)
    while True:  # as process 1 it inherits, and reaps, whatever the program leaves behind
        pid, ended = os.wait()
        if pid == program:
            return code_of(ended)


def main(config: dict[str, Any], status: int) -> int:
    """The outer process; returns the program's exit code."""
    second = enter_namespaces()
    libc.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != config["parent"]:
        raise OSError("the process that asked for it has ended")
    child = os.fork()
    if not child:
        run_to_end(lambda: first_process(config, second, status), status)
    os.close(status)
    for fd in config["fds"]:
        os.close(fd)
    return code_of(os.waitpid(child, 0)[1])


def run_to_end(work: Any, status: int) -> None:
    """Do the work and end this process with its result; an error is reported through `status`."""
    try:
        os._exit(work())
    except BaseException as error:
        os.write(status, (str(error) or repr(error)).encode()[:1000])
        os._exit(1)


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    run_to_end(lambda: main(said, said["status"]), said["status"])
