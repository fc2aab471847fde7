"""Builds the walls around one program and becomes it. Run as a script, inside fresh namespaces when there are any.

Reads one JSON object from stdin: command, files {name: text}, stdin, limits in bytes, seconds and processes, and with namespaces `root` (an
empty directory to build the new root in) and `readable` (directories to show there, read-only). Writes "ready" to descriptor `status` just
before the program starts: whatever ends without it was a fault of the walls, not of the program.
"""

import ctypes
import json
import os
import resource
import sys

MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x1000, 0x4000, 0x40000, 0x2, 0x4
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000  # the number of the system call is the same on every architecture
READ_ONLY_NOSUID_NODEV = 0x1 | 0x2 | 0x4
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38
DEVICES = ("null", "zero", "urandom")
SCRATCH = "/scratch"

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Build, then become the program."""
    spec = json.load(sys.stdin)
    home = spec["scratch"]
    if spec.get("root"):
        change_root(spec["root"], spec["readable"], spec["limits"]["scratch_bytes"])
        home = SCRATCH
    os.chdir(home)
    for name, text in spec["files"].items():
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)
    with open(".stdin", "w+", encoding="utf-8") as file:
        file.write(spec["stdin"])
        file.flush()
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        os.dup2(file.fileno(), 0)
    os.unlink(".stdin")
    set_limits(spec["limits"])
    drop_rights()
    os.set_inheritable(spec["status"], False)
    os.write(spec["status"], b"ready")
    environment = {"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    os.execve(spec["command"][0], spec["command"], environment)


def change_root(root: str, readable: list[str], scratch_bytes: int) -> None:
    """A root in memory that holds the `readable` directories, three devices, and an empty directory to write in."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_bytes},mode=755")
    for directory in readable:
        inside = root + directory
        if os.path.islink(directory):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(directory), inside)
        elif not os.path.exists(inside):
            os.makedirs(inside)
            mount(directory, inside, None, MS_BIND | MS_REC)
            make_read_only(inside)
    os.mkdir(root + "/dev")
    for name in DEVICES:
        open(f"{root}/dev/{name}", "w").close()
        mount(f"/dev/{name}", f"{root}/dev/{name}", None, MS_BIND)
    os.mkdir(root + SCRATCH)
    os.chroot(root)


def make_read_only(path: str) -> None:
    """Everything mounted at and below `path`."""
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY_NOSUID_NODEV, 0, 0, 0)
    call = libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(ctypes.sizeof(attributes)))
    must(call, f"making {path} read-only")


def set_limits(limits: dict) -> None:
    """Hard limits; nothing in the jail may raise them."""
    for name, key in (("CPU", "cpu_s"), ("AS", "memory_bytes"), ("FSIZE", "file_bytes"), ("NOFILE", "files"), ("NPROC", "processes")):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limits[key], limits[key]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def drop_rights() -> None:
    """No capability survives the next exec, and no setuid program gives one back."""
    capability = 0
    while libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    must(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    must(
        libc.mount(source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), options.encode()), f"mounting {target}"
    )


def must(result: int, what: str) -> None:
    """Raises OSError when a system call failed."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


if __name__ == "__main__":
    main()
