"""Socket acceleration: attaching it, and the self-test that says what it would change for applications on this kernel.

Used by the supervisor, before anything is accelerated. `attach` puts mesh_sk_msg on the map of accelerated sockets; as long as no socket is in that
map nothing runs. `self_test` has a child process accelerate real connections between two network namespaces of its own, from a cgroup of its own,
and look at them as applications do. The agent's own process makes no socket for it and cannot hang in it.

Why a test and not a list of kernels: sockets in a sockhash get another recvmsg, sendmsg, poll and ioctl (net/ipv4/tcp_bpf.c, tcp_bpf_rebuild_protos),
and what those lack is fixed in stable kernels one by one. What none can do: splice(2) from a socket, which looks at TCP's own queue only
(net/ipv4/tcp.c, tcp_splice_read).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from agent import files
from agent.bpf import libbpf
from agent.errors import KernelRefused

CGROUP_PREFIX = "meshagent-selftest-"
TIME_LIMIT_S = 10.0
"""For the whole child. It needs 1.5 s; a check that has no answer by then has failed."""
CHECK_LIMIT_S = 1.0

_MSG_PROGRAM, _TEST_PROGRAM, _PEERS = "mesh_sk_msg", "mesh_selftest", "mesh_peers"
_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_TCP_FASTOPEN_CONNECT = 30  # include/uapi/linux/tcp.h
_SO_ZEROCOPY, _MSG_ZEROCOPY = 60, 0x4000000  # include/uapi/asm-generic/socket.h, include/linux/socket.h
_SPLICE_F_NONBLOCK = 2  # include/linux/splice.h
_BYTES_RECEIVED = 128  # offset in struct tcp_info, include/uapi/linux/tcp.h
_LAST_PACKETS_S = 1.0  # connections that are closed last so much longer at most; mesh_selftest removes their rows, so it must see them end
_TIME_WAIT = "06"  # include/net/tcp_states.h: what is left of a connection that has ended
_LINK_LIMIT_S = 3.0
_PORT, _DEFERRED_PORT = 1500, 1501
_CALLER, _RECEIVER = "192.0.2.1", "192.0.2.2"  # RFC 5737; they exist in the test's own namespaces only
_ENOUGH = 32 << 20
"""More than may be sent to a reader that does not read: both buffers together hold 10 MB by default (tcp_wmem, tcp_rmem)."""


@dataclass(frozen=True, slots=True)
class Check:
    """One named check: something applications rely on, whether accelerated sockets have it, and what was seen."""

    name: str
    passed: bool
    seen: str


def attach(programs: Path, maps: Path) -> None:
    """Have mesh_sk_msg run for the sockets that join mesh_peers from now on; doing it again is harmless.

    There is no bpf_link: the attachment is the map's own, and ends with the last pin and descriptor of the map (net/core/sock_map.c,
    sock_map_release_progs). Connections that are accelerated at that moment stay so until they close: each socket holds the program, and that the map.
    """
    try:
        with files.closing(libbpf.open_pin(programs / _MSG_PROGRAM)) as code, files.closing(libbpf.open_pin(maps / _PEERS)) as peers:
            libbpf.program_attach(code, peers, "sk_msg_verdict")
    except OSError as error:
        raise KernelRefused(
            f"cannot attach {_MSG_PROGRAM} to {_PEERS}: {error}; does this kernel have CONFIG_BPF_STREAM_PARSER?"
        ) from error


def failing(checks: tuple[Check, ...]) -> tuple[str, ...]:
    """Names of the checks that failed."""
    return tuple(check.name for check in checks if not check.passed)


def self_test(programs: Path, cgroup: Path, cache: Path, version: str, *, fresh: bool = False) -> tuple[Check, ...]:
    """Every check of `NAMES`, in that order. Blocks for 2 s, so call it in a thread, and after `attach`.

    The test makes its own cgroup below `cgroup`. The result stays in the file `cache` and counts for this kernel and this `version` (the hash of
    the programs); `fresh` asks the kernel again. What did not answer in time has failed; nothing is raised for that.
    """
    kernel = f"{platform.release()} {platform.version()}"
    if not fresh and (kept := _cached(cache, kernel, version)):
        return kept
    with place(programs, cgroup) as own:
        output, words = _run([sys.executable, "-m", "agent.bpf.acceleration", str(own)])
    checks = _parse(output, words)
    document = {"kernel": kernel, "version": version, "checks": [dataclasses.asdict(c) for c in checks]}
    files.write(cache, json.dumps(document, indent=1).encode())
    return checks


@contextlib.contextmanager
def place(programs: Path, cgroup: Path) -> Iterator[Path]:
    """A cgroup below `cgroup` in which everything is accelerated that has both ends in it. It is removed after the block, and must be empty then."""
    for left in cgroup.glob(f"{CGROUP_PREFIX}*"):
        if not Path("/proc", left.name.removeprefix(CGROUP_PREFIX)).exists():  # its agent was killed
            with contextlib.suppress(OSError):
                left.rmdir()
    made = cgroup / f"{CGROUP_PREFIX}{os.getpid()}"
    made.mkdir(exist_ok=True)
    try:
        with (
            files.closing(libbpf.open_pin(programs / _TEST_PROGRAM)) as code,
            files.closing(os.open(made, os.O_RDONLY | os.O_CLOEXEC)) as target,
            files.closing(libbpf.link_create(code, target, "cgroup_sock_ops")),  # not pinned: it goes with this process
        ):
            yield made
    finally:
        _remove(made)


def _run(argv: list[str]) -> tuple[bytes, str]:
    """Output, and the last words if it did not end well."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIME_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        return error.output or b"", f"no answer within {TIME_LIMIT_S:.0f} s"
    lines = done.stderr.decode(errors="replace").splitlines()
    return done.stdout, (lines[-1] if lines else f"exit code {done.returncode}") if done.returncode else ""


def _parse(output: bytes, words: str) -> tuple[Check, ...]:
    found = {}
    for line in output.splitlines():
        with contextlib.suppress(ValueError, TypeError):  # half a line, if the child was killed
            check = Check(**json.loads(line))
            found[check.name] = check
    return tuple(found.get(name) or Check(name, passed=False, seen=words or "no answer") for name in NAMES)


def _cached(cache: Path, kernel: str, version: str) -> tuple[Check, ...]:
    try:
        document = json.loads(cache.read_bytes())
        checks = tuple(Check(**check) for check in document["checks"])
        if (document["kernel"], document["version"]) == (kernel, version) and tuple(c.name for c in checks) == NAMES:
            return checks
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return ()


def _remove(place: Path) -> None:
    """Remove a cgroup; the last process leaves it a moment after it ended."""
    for _ in range(100):
        try:
            place.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
        else:
            return


# The child.


class _Unlike(Exception):
    """Plain TCP does this differently; the message says what was seen."""


class _TooLong(Exception):
    """A check hangs: raised by SIGALRM."""


def _expect(fact: bool, seen: str) -> None:
    if not fact:
        raise _Unlike(seen)


@final
class Pair:
    """The two ends of one connection."""

    def __init__(self, caller: socket.socket, receiver: socket.socket) -> None:
        self.caller = caller
        self.receiver = receiver

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.caller.close()
        self.receiver.close()

    @property
    def ends(self) -> tuple[tuple[socket.socket, socket.socket], ...]:
        """Both directions, as (sender, reader)."""
        return ((self.caller, self.receiver), (self.receiver, self.caller))


class Bed:
    """Two network namespaces joined by a veth pair, and listening sockets in one of them."""

    def __init__(self, *, plain: bool) -> None:
        """`plain`: connections are not accelerated, so that what TCP itself does can be seen by the same means."""
        self.plain = plain
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.caller_side, self.receiver_side = self._namespace(), self._namespace()
        self._wire()
        self._enter(self.receiver_side)
        Path("/proc/sys/net/ipv4/tcp_fastopen").write_text("3")  # of this namespace: data in the SYN, both as caller and as receiver
        self.listener = socket.create_server((_RECEIVER, _PORT), backlog=1024)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 1024)
        self.deferred = socket.create_server((_RECEIVER, _DEFERRED_PORT), backlog=1024)
        self.deferred.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        self._enter(self.caller_side)

    def close(self) -> None:
        """Wait for the last packets. The namespaces go with the last descriptor."""
        self.listener.close()
        self.deferred.close()
        end = time.monotonic() + _LAST_PACKETS_S
        for side in (self.caller_side, self.receiver_side):
            self._enter(side)
            while self._connected() and time.monotonic() < end:
                time.sleep(0.005)
        self._enter(self._home)
        for number in (self._home, self.caller_side, self.receiver_side):
            os.close(number)

    def _enter(self, namespace: int) -> None:
        if self._libc.setns(namespace, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "join network namespace")

    @staticmethod
    def _connected() -> bool:
        """Is there a connection in the namespace? (proc_net_tcp.rst)."""
        _head, *lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()
        return any(line.split()[3] != _TIME_WAIT for line in lines)

    def _namespace(self) -> int:
        if self._libc.unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "make network namespace")
        return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def _wire(self) -> None:
        from pyroute2 import IPRoute  # noqa: PLC0415  only the child needs it

        self._enter(self.caller_side)
        with IPRoute() as there:
            there.link("add", ifname="st0", kind="veth", peer={"ifname": "st1", "net_ns_fd": self.receiver_side})
            self._address(there, "st0", _CALLER)
            self._enter(self.receiver_side)
            with IPRoute() as here:
                self._address(here, "st1", _RECEIVER)
                self._carries(there, "st0")
                self._carries(here, "st1")

    @staticmethod
    def _address(route: Any, name: str, address: str) -> None:
        index = route.link_lookup(ifname=name)[0]
        route.addr("add", index=index, address=address, prefixlen=24)
        route.link("set", index=index, state="up")

    @staticmethod
    def _carries(route: Any, name: str) -> None:
        """Wait until a device sends: a work queue tells it that its peer is up, and until then its queue is `noop`, which drops all
        (net/core/link_watch.c, linkwatch_do_dev; net/sched/sch_generic.c, noop_enqueue). What is dropped is sent again after a second: a check
        would hang, and a SYN sent twice is not accelerated both ways (bpf_src/mesh_accelerate.c).
        """
        index = route.link_lookup(ifname=name)[0]
        limit = time.monotonic() + _LINK_LIMIT_S
        while route.get_links(index)[0].get_attr("IFLA_QDISC") == "noop":
            if time.monotonic() > limit:
                raise TimeoutError(errno.ETIMEDOUT, f"{name} has no carrier after {_LINK_LIMIT_S:.0f} s")
            time.sleep(0.001)

    def call(self, *, deferred: bool = False) -> socket.socket:
        """A connection from the caller's namespace, in which this thread is. `deferred`: the receiver joins too late, it stays with TCP.

        TCP_DEFER_ACCEPT holds the receiver's handshake back until the first data, which must go over TCP for that reason (tcp(7)).
        """
        return socket.create_connection((_RECEIVER, _DEFERRED_PORT if deferred else _PORT))

    def pair(self) -> Pair:
        """A connection that is accelerated both ways; its first byte each way is already sent and read."""
        for _ in range(20):
            caller = self.call()
            receiver, _peer = self.listener.accept()
            pair = Pair(caller, receiver)
            for sender, reader in pair.ends:
                sender.sendall(b"!")
                reader.recv(1)
            if self.plain or (not over_tcp(caller) and not over_tcp(receiver)):
                return pair
            pair.__exit__()
        raise _Unlike("20 connections, and none was accelerated")


def over_tcp(end: socket.socket) -> int:
    """Payload bytes that came to this socket through TCP and not by acceleration."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("=Q", info, _BYTES_RECEIVED)[0])


def _waiting(end: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(end, termios.FIONREAD, count)
    return count[0]


def _read(end: socket.socket, size: int) -> bytes:
    """Read exactly `size` bytes, or less if the other end closes."""
    data = bytearray()
    while len(data) < size and (piece := end.recv(min(size - len(data), 1 << 20))):
        data += piece
    return bytes(data)


@contextlib.contextmanager
def _meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Run `work` in a thread beside the block; what it raises is raised at the end of the block."""
    failure: list[Exception] = []

    def body() -> None:
        try:
            work()
        except (OSError, _Unlike) as error:
            failure.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    yield
    thread.join()
    if failure:
        raise failure[0]


def _later(end: socket.socket, data: bytes) -> None:
    """Write when the reader sleeps."""
    time.sleep(0.02)
    end.sendall(data)


def _redirect(bed: Bed) -> str:
    with bed.pair() as pair:
        for sender, reader in pair.ends:
            sender.sendall(bytes(5003))
            _expect(_read(reader, 5003) == bytes(5003), "other bytes")
            _expect(bed.plain or not over_tcp(reader), "bytes went over TCP")
    return "5003 bytes each way, none of them over TCP"


def _fionread(bed: Bed) -> str:
    with bed.pair() as pair:
        for sender, reader in pair.ends:
            sender.sendall(bytes(1009))
            before = _waiting(reader)
            reader.recv(307)
            after = _waiting(reader)
            _expect((before, after) == (1009, 702), f"{before} of 1009 bytes, {after} of 702")
    return "1009 bytes, 702 after reading 307"


def _fionread_tcp(bed: Bed) -> str:
    caller = bed.call(deferred=True)
    caller.sendall(bytes(1009))
    receiver, _ = bed.deferred.accept()
    with Pair(caller, receiver):
        _expect(over_tcp(receiver) == 1009, "the early bytes did not go over TCP")
        there = _waiting(receiver)
        receiver.sendall(bytes(509))
        select.select([caller], [], [], CHECK_LIMIT_S)
        back = _waiting(caller)
        _expect((there, back) == (1009, 509), f"{there} of 1009 bytes at the receiver, {back} of 509 at the caller")
    return "1009 and 509 bytes on a connection that stayed with TCP"


def _poll(bed: Bed) -> str:
    with bed.pair() as pair:
        for sender, reader in pair.ends:
            poll = select.poll()
            poll.register(reader, select.POLLIN)
            _expect(not poll.poll(0), "readable without data")
            sender.sendall(b"abc")
            _expect(bool(poll.poll(200)), "not readable with data")
            reader.recv(2)
            _expect(bool(poll.poll(200)), "not readable with data left")
            reader.recv(1)
            _expect(not poll.poll(0), "readable after all was read")
            with _meanwhile(partial(_later, sender, b"x")):
                _expect(bool(poll.poll(500)), "a sleeping poll was not woken")
            reader.recv(1)
    return "readable exactly while there is data; wakes"


def _epoll_level(bed: Bed) -> str:
    return _epoll(bed, 0)


def _epoll_edge(bed: Bed) -> str:
    return _epoll(bed, select.EPOLLET)


def _epoll(bed: Bed, mode: int, rounds: int = 1009) -> str:
    """An echo by epoll; the other end writes 1 to 3 bursts a round, so that edges come while the reader drains."""
    with bed.pair() as pair, select.epoll() as epoll:
        pair.receiver.setblocking(False)
        epoll.register(pair.receiver, select.EPOLLIN | select.EPOLLRDHUP | mode)

        def echo() -> None:
            got = 0
            while got < rounds * 6:
                _expect(bool(epoll.poll(0.5)), f"no wake-up after {got} of {rounds * 6} bytes")
                with contextlib.suppress(BlockingIOError):
                    while data := pair.receiver.recv(64):
                        got += len(data)
                        pair.receiver.sendall(data)

        with _meanwhile(echo):
            for _ in range(rounds):
                for burst in (b"a", b"bb", b"ccc"):
                    pair.caller.sendall(burst)
                _expect(_read(pair.caller, 6) == b"abbccc", "other bytes")
    return f"{rounds} rounds without a lost wake-up"


def _half_close(bed: Bed) -> str:
    with bed.pair() as pair:
        for sender, reader in pair.ends:
            sender.sendall(bytes(100_003))
            sender.shutdown(socket.SHUT_WR)
            size = len(_read(reader, 200_000))
            _expect(size == 100_003, f"{size} of 100003 bytes before the end")
            _expect(reader.recv(1) == b"", "no end of file")
    return "all bytes, then the end; the other direction went on"


def _splice(bed: Bed) -> str:
    with bed.pair() as pair:
        source, sink = os.pipe()
        with files.closing(source), files.closing(sink):
            pair.caller.sendall(bytes(5003))
            pair.receiver.setblocking(False)  # a blocking socket hangs where this fails
            try:
                moved = os.splice(pair.receiver.fileno(), sink, 5003, flags=_SPLICE_F_NONBLOCK)
            except BlockingIOError:
                raise _Unlike(
                    "EAGAIN with 5003 bytes waiting: splice(2) from an accelerated socket does not see them, and hangs if it blocks"
                ) from None
            _expect(moved == 5003, f"{moved} of 5003 bytes")
    return "5003 bytes from the socket into a pipe"


def _splice_to(bed: Bed) -> str:
    with bed.pair() as pair:
        source, sink = os.pipe()
        with files.closing(source), files.closing(sink):
            os.write(sink, b"ab" * 2503)
            moved = os.splice(source, pair.caller.fileno(), 5006)
            _expect(_read(pair.receiver, moved) == (b"ab" * 2503)[:moved], "other bytes")
    return f"{moved} bytes from a pipe into the socket"


def _sendfile(bed: Bed) -> str:
    size = (1 << 20) + 7
    content = os.urandom(size)
    with bed.pair() as pair, files.closing(os.memfd_create("selftest")) as file:
        os.write(file, content)

        def send() -> None:
            offset = 0
            while offset < size:
                offset += os.sendfile(pair.caller.fileno(), file, offset, size - offset)

        with _meanwhile(send):
            _expect(_read(pair.receiver, size) == content, "other bytes")
    return f"{size} bytes"


def _large(bed: Bed, size: int = 16 << 20) -> str:
    """Both directions at once, in writes of 1 byte to 1 MB."""
    chunk = os.urandom(1 << 20)
    pieces, left = [], size
    for length in itertools.cycle((1, 1 << 20, 4099, 65536, 17, 262147)):
        if not left:
            break
        pieces.append(memoryview(chunk)[: min(length, left)])
        left -= len(pieces[-1])
    expected = 0
    for piece in pieces:
        expected = zlib.crc32(piece, expected)

    def send(end: socket.socket) -> None:
        for piece in pieces:
            end.sendall(piece)

    def check(end: socket.socket) -> None:
        value, got = 0, 0
        while got < size and (data := end.recv(1 << 18)):
            value, got = zlib.crc32(data, value), got + len(data)
        _expect((got, value) == (size, expected), f"{got} bytes with another checksum")

    with (
        bed.pair() as pair,
        _meanwhile(partial(send, pair.caller)),
        _meanwhile(partial(send, pair.receiver)),
        _meanwhile(partial(check, pair.caller)),
    ):
        check(pair.receiver)
    return f"{size} bytes each way at once"


def _close_unread(bed: Bed) -> str:
    """RFC 2525, 2.17: closing with data unread resets the connection, so that the sender learns of the loss."""
    for first in (0, 1):
        with bed.pair() as pair:
            sender, reader = pair.ends[first]
            sender.sendall(bytes(1009))
            reader.close()
            try:
                data = sender.recv(1)
            except ConnectionResetError:
                continue
            raise _Unlike(f"recv gives {data!r} instead of ECONNRESET: the sender is not told that 1009 bytes were never read")
    return "the sender is told by a reset"


def _abort(bed: Bed) -> str:
    with bed.pair() as pair:
        pair.receiver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        pair.receiver.close()
        try:
            data = pair.caller.recv(1)
        except ConnectionResetError:
            return "ECONNRESET"
    raise _Unlike(f"recv gives {data!r} instead of ECONNRESET")


def _write_after_close(bed: Bed) -> str:
    with bed.pair() as pair:
        pair.receiver.close()
        for attempt in range(50):
            try:
                pair.caller.sendall(b"x")
            except (BrokenPipeError, ConnectionResetError):
                return f"refused at write {attempt + 1}"
            time.sleep(0.002)
    raise _Unlike("50 writes to a closed peer succeeded")


def _backpressure(bed: Bed) -> str:
    with bed.pair() as pair:
        pair.caller.setblocking(False)
        chunk, sent = bytes(1 << 16), 0
        with contextlib.suppress(BlockingIOError):
            while sent < _ENOUGH:
                sent += pair.caller.send(chunk)
        _expect(sent < _ENOUGH, f"{sent >> 20} MB sent to a reader that does not read, without an end: kernel memory fills up")
    return f"the writer must wait after {sent >> 10} KB"


def _urgent(bed: Bed) -> str:
    with bed.pair() as pair:
        pair.caller.sendall(b"abc")
        pair.caller.send(b"!", socket.MSG_OOB)
        try:
            data = pair.receiver.recv(1, socket.MSG_OOB | socket.MSG_DONTWAIT)
        except OSError as error:
            raise _Unlike(f"recv(MSG_OOB) gives {errno.errorcode.get(error.errno or 0)} with an urgent byte sent") from None
        _expect(data == b"!", f"recv(MSG_OOB) gives {data!r}, an ordinary byte")
    return "MSG_OOB arrives out of band"


def _zerocopy(bed: Bed) -> str:
    with bed.pair() as pair:
        pair.caller.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)
        pair.caller.send(bytes(1 << 16), _MSG_ZEROCOPY)
        _read(pair.receiver, 1 << 16)
        poll = select.poll()
        poll.register(pair.caller, 0)
        _expect(
            bool(poll.poll(200)), "MSG_ZEROCOPY is never reported as completed: the application may wait for ever to use its buffer again"
        )
    return "MSG_ZEROCOPY is reported as completed"


def _peek(bed: Bed) -> str:
    with bed.pair() as pair:
        pair.caller.sendall(b"abcdef")
        seen = [pair.receiver.recv(n, socket.MSG_PEEK) for n in (3, 6)] + [pair.receiver.recv(6)]
        _expect(seen == [b"abc", b"abcdef", b"abcdef"], f"{seen}")
    return "MSG_PEEK leaves the data"


def _wait_all(bed: Bed) -> str:
    with bed.pair() as pair:
        pair.caller.sendall(b"abc")
        with _meanwhile(partial(_later, pair.caller, b"def")):
            data = pair.receiver.recv(6, socket.MSG_WAITALL)
        _expect(data == b"abcdef", f"MSG_WAITALL for 6 bytes gives {len(data)}")
    return "MSG_WAITALL waits for all"


def _timeout(bed: Bed) -> str:
    with bed.pair() as pair:
        pair.receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 30_000))
        started = time.monotonic()
        try:
            pair.receiver.recv(1)
        except BlockingIOError:
            return f"SO_RCVTIMEO of 30 ms: EAGAIN after {(time.monotonic() - started) * 1000:.0f} ms"
    raise _Unlike("data out of nothing")


def _byte_order(bed: Bed, connections: int = 211) -> str:
    """The caller writes the moment it may, while the receiver's kernel side is still at work: each way of connecting in turn."""
    record = struct.Struct("=II")
    messages = 7

    def write(end: socket.socket, index: int, first: int = 0) -> socket.socket:
        for number in range(first, messages):
            end.sendall(record.pack(index, number))
        return end

    def blocking(index: int) -> socket.socket:
        return write(bed.call(), index)

    def deferred(index: int) -> socket.socket:
        return write(bed.call(deferred=True), index)

    def nonblocking(index: int) -> socket.socket:
        end = socket.socket()
        end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            end.connect((_RECEIVER, _PORT))
        select.select([], [end], [], CHECK_LIMIT_S)
        end.setblocking(True)
        return write(end, index)

    def fast_open(index: int) -> socket.socket:
        """One sendto connects and writes: past the program on the first call, in the SYN when the receiver's cookie is known (RFC 7413)."""
        end = socket.socket()
        end.sendto(record.pack(index, 0), socket.MSG_FASTOPEN, (_RECEIVER, _PORT))
        return write(end, index, 1)

    callers: list[socket.socket] = []
    ways = (blocking, deferred, nonblocking, fast_open)
    accelerated = 0
    with _meanwhile(lambda: callers.extend(ways[i % len(ways)](i) for i in range(connections))):
        for index in range(connections):
            receiver, _peer = (bed.deferred if ways[index % len(ways)] is deferred else bed.listener).accept()
            with receiver:
                data = _read(receiver, messages * record.size)
                found = [record.unpack_from(data, i * record.size) for i in range(len(data) // record.size)]
                _expect(found == [(found[0][0], n) for n in range(messages)], f"order {found}")
                accelerated += not over_tcp(receiver)
    for end in callers:
        end.close()
    return (
        f"{connections} connections with early writes: {accelerated} accelerated, {connections - accelerated} stayed with TCP, all in order"
    )


_CHECKS: tuple[tuple[str, Callable[[Bed], str]], ...] = (
    ("redirect", _redirect),
    ("byte-order", _byte_order),
    ("fionread", _fionread),
    ("fionread-over-tcp", _fionread_tcp),
    ("poll", _poll),
    ("epoll-level", _epoll_level),
    ("epoll-edge", _epoll_edge),
    ("half-close", _half_close),
    ("splice-from", _splice),
    ("splice-to", _splice_to),
    ("sendfile", _sendfile),
    ("large-transfer", _large),
    ("backpressure", _backpressure),
    ("close-unread", _close_unread),
    ("abort", _abort),
    ("write-after-close", _write_after_close),
    ("urgent", _urgent),
    ("zerocopy", _zerocopy),
    ("peek", _peek),
    ("wait-all", _wait_all),
    ("receive-timeout", _timeout),
)
NAMES = tuple(name for name, _ in _CHECKS)
"""Of all checks, in the order in which they are made."""


def _alarm(*_: object) -> None:
    raise _TooLong


def _answer(name: str, check: Callable[[Bed], str], bed: Bed) -> Check:
    signal.setitimer(signal.ITIMER_REAL, CHECK_LIMIT_S)
    try:
        return Check(name, passed=True, seen=check(bed))
    except _Unlike as error:
        return Check(name, passed=False, seen=str(error))
    except _TooLong:
        return Check(name, passed=False, seen=f"hangs: no answer within {CHECK_LIMIT_S:.0f} s")
    except OSError as error:
        return Check(name, passed=False, seen=f"fails with {errno.errorcode.get(error.errno or 0, '')} {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def bed(own: Path, *, plain: bool = False) -> Iterator[Bed]:
    """Two namespaces between which this process is accelerated; `own` is a cgroup from `place`, which this process joins and does not leave."""
    (own / "cgroup.procs").write_text("0")
    made = Bed(plain=plain)
    try:
        yield made
    finally:
        made.close()


def main(arguments: list[str]) -> int:
    """The child. Arguments: the test's own cgroup, and "plain" for one without acceleration. Writes one JSON object a check."""
    signal.signal(signal.SIGALRM, _alarm)
    with bed(Path(arguments[0]), plain=arguments[1:] == ["plain"]) as made:
        for name, check in _CHECKS:
            sys.stdout.write(json.dumps(dataclasses.asdict(_answer(name, check, made))) + "\n")
            sys.stdout.flush()
    os._exit(0)  # without waiting for the thread of a check that hangs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
