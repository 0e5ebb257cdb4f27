"""Runs a program with nothing to reach: the script of the process that `execution.passes` starts, which imports nothing
of this package.

The first line of stdin is a token, the rest the program. The modules in `PRELOADED` are imported; then the process
gives up, for good, every system call that is not in `ALLOWED`: it can compute, but open no file, start no process or
thread, and reach no network. If the program comes to its end, the token is written to stdout.
"""

import ctypes
import importlib
import os
import platform
import resource
import struct
import sys

PRELOADED = """abc array ast base64 binascii bisect calendar cmath collections collections.abc contextlib copy
dataclasses datetime decimal encodings.ascii encodings.latin_1 enum fractions functools hashlib heapq io
itertools json math numbers operator pprint queue random re statistics string struct textwrap time
traceback types typing unicodedata warnings"""
# The numbers of: read, write, close, fstat, lseek, mmap, mprotect, munmap, brk, rt_sigaction, rt_sigprocmask,
# rt_sigreturn, mremap, madvise, nanosleep, getpid, exit, sigaltstack, gettid, futex, clock_gettime, clock_nanosleep,
# exit_group, getrandom.
ALLOWED = {
    "x86_64": (0xC000003E, (0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 25, 28, 35, 39, 60, 131, 186, 202, 228, 230, 231,
                            318)),
    "aarch64": (0xC00000B7, (63, 64, 57, 80, 62, 222, 226, 215, 214, 134, 135, 139, 216, 233, 101, 172, 93, 132, 178,
                             98, 113, 115, 94, 278)),
}
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # of the Berkeley packet filter, in which the kernel takes the list
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE: the call fails with EPERM
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2  # of prctl


def give_up_system_calls() -> None:
    """Lets the kernel refuse every system call but `ALLOWED`, until the process ends."""
    architecture, numbers = ALLOWED[platform.machine()]
    rules = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, architecture), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    for number in numbers:
        rules += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    rules += [(RETURN, 0, 0, REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = ctypes.create_string_buffer(struct.pack("HP", len(rules), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    for call in ((NO_NEW_PRIVILEGES, 1, 0, 0, 0), (SECCOMP, FILTER, ctypes.addressof(program), 0, 0)):
        if libc.prctl(*call) != 0:
            sys.exit(f"the kernel does not confine this process: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    seconds, memory = int(sys.argv[1]), int(sys.argv[2])
    token, _, program = sys.stdin.buffer.read().partition(b"\n")
    verdict, nowhere = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    for name in PRELOADED.split():
        importlib.import_module(name)
    limits = {resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: 4096,
              resource.RLIMIT_CORE: 0}
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    give_up_system_calls()
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    os.write(verdict, token)


if __name__ == "__main__":
    main()
