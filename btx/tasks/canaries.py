"""Canaries: harmless attacks on the sandbox, of which none may get through before a program is run.

Each is a program that passes only if its attack was stopped, or that must be ended. A sandbox in which Python does not
start lets none of them pass, so it is refused too.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from btx.tasks.enclosed import REMEDY, Limits, NotEnclosedError, run_enclosed

STARTS = "import math, json, re\nassert math.gcd(12, 18) == 6 and json.loads('[1]') == [1] and re.match('a+', 'aa')"
READS = """
import os
for path in {paths!r}:
    try:
        found = os.listdir(path) if path.endswith("/") else open(path, "rb").read(1)
    except OSError:
        continue
    raise SystemExit(f"{{path}} can be read")
"""
CONNECTS = """
import socket
for kind, address in ((socket.AF_INET, ("127.0.0.1", {port})), (socket.AF_UNIX, {name!r})):
    try:
        socket.socket(kind).connect(address)
    except OSError:
        continue
    raise SystemExit(f"{{address}} can be reached")
assert [name for _, name in socket.if_nameindex()] in ([], ["lo"]), socket.if_nameindex()
"""
SIGNALS = """
import os
assert os.getpid() < 10 and os.getppid() == 1 and not os.path.exists("/proc/1")
if {pid} > 10:  # else the number may be that of a process inside
    try:
        os.kill({pid}, 0)
    except ProcessLookupError:
        pass
    else:
        raise SystemExit("a process of the host can be seen")
try:
    os.chroot(".")
except PermissionError:
    pass
else:
    raise SystemExit("it has capabilities")
"""
WRITES = """
import os
for folder in ["/", os.path.dirname(os.__file__), {folder!r}]:
    try:
        open(os.path.join(folder, "btx-canary"), "w")
    except OSError:
        continue
    raise SystemExit(f"{{folder}} can be written")
open("mine", "w").write("x")
assert sorted(os.environ) == ["LC_CTYPE", "PYTHONHASHSEED"] or list(os.environ) == ["PYTHONHASHSEED"], os.environ
assert not os.read(0, 1)
"""
LINGERS = """
import os, signal
for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_IGN)
    except OSError:
        pass
if not os.fork():
    os.setsid()
while True:
    signal.pause()
"""
FORKS = """
import os, signal
for n in range({most}):
    try:
        if not os.fork():
            signal.pause()
    except OSError:
        break
else:
    raise SystemExit("it can start any number of processes")
"""
HOGS = """
held = []
try:
    for _ in range({most} // 2**20):
        held.append(bytearray(2**20))
except MemoryError:
    held.clear()
else:
    raise SystemExit("it can take any memory")
"""
PRINTS = "while True: print('x' * 1000)"
WAIT = Limits(seconds=0.5)


@dataclass(frozen=True)
class Canary:
    """An attack: what a program must not be able to do, a program that tries, and how that must end."""

    what: str
    program: str
    ends: str = "passed"
    limits: Limits = field(default_factory=Limits)


def canaries(secret: Path, port: int, name: bytes) -> list[Canary]:
    """All canaries; `secret` is a file, and `port` and the abstract UNIX socket `name` are listeners, of the host."""
    paths = [str(secret), f"{secret.parent}/", __file__, "/etc/passwd", "/proc/self/environ", "/dev/mem", "/sys/"]
    limits = Limits()
    return [
        Canary("start Python", STARTS),
        Canary("read a file of the host", READS.format(paths=paths)),
        Canary("reach a listener of the host", CONNECTS.format(port=port, name=name)),
        Canary("see or signal a process of the host", SIGNALS.format(pid=os.getpid())),
        Canary("write outside its folder", WRITES.format(folder=str(secret.parent))),
        Canary("outlive its time", LINGERS, "timed out", WAIT),
        Canary("start any number of processes", FORKS.format(most=4 * limits.processes)),
        Canary("take any memory", HOGS.format(most=2 * limits.memory)),
        Canary("write any output", PRINTS, "too much output"),
    ]


@cache
def require() -> None:
    """Run all canaries, once per process; NotEnclosedError that names the first one that got through."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        secret = folder / "secret"
        secret.write_text("canary", encoding="ascii")
        name = f"\0btx-{secrets.token_hex(8)}".encode()
        host, local = (stack.enter_context(socket.socket(kind)) for kind in (socket.AF_INET, socket.AF_UNIX))
        host.bind(("127.0.0.1", 0))
        local.bind(name)
        for listener in (host, local):
            listener.listen()
        for canary in canaries(secret, host.getsockname()[1], name):
            found = run_enclosed([canary.program], canary.limits)
            if found.how != canary.ends:
                said = found.said.strip().splitlines()[-1:] or [found.how]
                must = "cannot" if canary.what == "start Python" else "can"
                raise NotEnclosedError(
                    "programs of tasks are not run, since the sandbox of this system does not hold: a program inside "
                    f"{must} {canary.what} ({said[0]:.200}). {REMEDY}."
                )
