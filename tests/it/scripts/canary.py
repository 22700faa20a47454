"""What a pool child could do if a stranger's repository took it over.

Stops the child (ptrace, as root from outside), lets it make system calls as its own code would,
and prints what the kernel answered: {name: 0 or more, or the name of the error}. The child goes on
afterwards as if nothing had happened. x86-64 only.

Arguments: child's process id, parent's process id, port that is out of reach, child's directory.
"""
import ctypes
import errno
import json
import os
import socket
import struct
import sys

ATTACH, DETACH, STEP, GETREGS, SETREGS = 16, 17, 9, 12, 13
REGISTERS = ("r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp "
             "ss fs_base gs_base ds es fs gs").split()
ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request, pid, data=None):
    if libc.ptrace(request, pid, None, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request}: {os.strerror(number)}; run as root, in a "
                              "container with --cap-add SYS_PTRACE")


class Child:
    def __init__(self, pid):
        self.pid = pid
        ptrace(ATTACH, pid)
        os.waitpid(pid, 0x40000000)
        self.saved = self.registers()
        self.memory = open(f"/proc/{pid}/mem", "r+b", buffering=0)
        # It waits in a system call, so the two bytes before the next instruction make one.
        self.memory.seek(self.saved["rip"] - 2)
        assert self.memory.read(2) == b"\x0f\x05", "the child does not wait in a system call"

    def registers(self):
        block = (ctypes.c_ulonglong * len(REGISTERS))()
        ptrace(GETREGS, self.pid, ctypes.addressof(block))
        return dict(zip(REGISTERS, block))

    def set(self, registers):
        block = (ctypes.c_ulonglong * len(REGISTERS))(*(registers[name] for name in REGISTERS))
        ptrace(SETREGS, self.pid, ctypes.addressof(block))

    def call(self, number, *arguments):
        free = self.saved["rsp"] - 65536
        now = dict(self.saved, rip=self.saved["rip"] - 2, rax=number, orig_rax=2**64 - 1)
        for name, argument in zip(ARGUMENTS, arguments):
            if isinstance(argument, bytes):
                self.memory.seek(free)
                self.memory.write(argument + b"\0")
                argument, free = free, free + len(argument) + 64
            now[name] = argument % 2**64
        self.set(now)
        ptrace(STEP, self.pid)
        os.waitpid(self.pid, 0x40000000)
        result = ctypes.c_longlong(self.registers()["rax"]).value
        return errno.errorcode.get(-result, str(result)) if result < 0 else result

    def leave(self):
        self.set(self.saved)
        ptrace(DETACH, self.pid)


pid, parent, port = (int(text) for text in sys.argv[1:4])
directory = sys.argv[4].encode()
child = Child(pid)
HERE, CREATE = -100, os.O_CREAT | os.O_WRONLY
address = struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), socket.inet_aton("127.0.0.1"))
try:
    seen = {
        "write to its own directory": child.call(257, HERE, directory + b"/canary", CREATE, 0o600),
        "read /etc/shadow": child.call(257, HERE, b"/etc/shadow", os.O_RDONLY),
        "read the parent's environment": child.call(257, HERE, b"/proc/%d/environ" % parent, os.O_RDONLY),
        "read the parent's memory": child.call(257, HERE, b"/proc/%d/mem" % parent, os.O_RDONLY),
        "list the directory of all children": child.call(257, HERE, os.path.dirname(directory), os.O_RDONLY | os.O_DIRECTORY),
        "write to /tmp": child.call(257, HERE, b"/tmp/canary-%d" % pid, CREATE, 0o600),
        "trace the parent": child.call(101, ATTACH, parent, 0, 0),
        "signal the parent": child.call(62, parent, 0),
        "start a process": child.call(56, 17, 0, 0, 0, 0),
        "start a program": child.call(59, b"/bin/true", 0, 0),
        "open a unix socket": child.call(41, socket.AF_UNIX, socket.SOCK_STREAM, 0),
        "mount": child.call(165, b"none", b"/mnt", b"tmpfs", 0, 0),
        "use io_uring": child.call(425, 4, b"\0" * 120),
        "use user namespaces": child.call(272, 0x10000000),
    }
    tcp = child.call(41, socket.AF_INET, socket.SOCK_STREAM, 0)
    seen["open a TCP socket"] = tcp
    if isinstance(tcp, int):
        seen["connect to Redis"] = child.call(42, tcp, address, 16)
        child.call(3, tcp)
finally:
    child.leave()
print("answer: " + json.dumps(seen))
