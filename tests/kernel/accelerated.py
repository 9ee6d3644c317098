"""A stress of accelerated connections: `python -m tests.kernel.accelerated CGROUP BYTES CONNECTIONS`, one JSON object of figures.

Two processes, one in each network namespace, talk over all connections at once. Each connection is a dialogue of messages of 1 byte to 1 MB; both
ends know the sizes and every byte from the number of the connection, so that loss, reordering and mixing are seen at the byte where they happen.
The waiting for answers bounds what is under way: accelerated sockets have no flow control of their own (check `backpressure`).
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from agent.bpf import acceleration

SIZES = (1, 7, 64, 64, 1021, 4096, 16381, 65536, 65536, 262144, 1 << 20)
BLOCK = 2 << 20
HEAD = struct.Struct("=I")  # each connection begins with its number
PATIENCE_S = 10.0
_BLOCK = random.Random(1).randbytes(BLOCK) * 2  # noqa: S311  both ends must draw the same


def sizes(number: int, total: int) -> Iterator[tuple[int, int]]:
    """(size, of the end that sends it: 0 caller, 1 receiver) of each message of a connection, `total` bytes in all."""
    chosen = random.Random(number)  # noqa: S311  the same at both ends
    turn = 0
    while total:
        size = min(chosen.choice(SIZES), total)
        yield size, turn
        total -= size
        turn ^= 1


class Dialogue:
    """One end of one connection. `step` does what can be done without waiting; True when all is said and the other end has closed."""

    def __init__(self, end: socket.socket, side: int, total: int, number: int | None = None) -> None:
        self.end = end
        self.side = side
        self.total = total
        self.crc = 0
        self.moved = 0
        self.messages = 0
        self.over_tcp = 0
        self._head = b""
        self.number = number
        self._script: Iterator[tuple[int, int]] = iter(())
        self._left = 0
        self._turn = 0
        self.position = [0, 0]
        self._split = random.Random(number)  # noqa: S311  a test that fails must fail again
        if number is not None:
            self._begin(number)
        end.setblocking(False)

    @property
    def wants(self) -> int:
        """Events of level-triggered epoll that let it go on."""
        return select.EPOLLOUT if self._left and self._turn == self.side else select.EPOLLIN

    def _begin(self, number: int) -> None:
        self.number = number
        self._script = sizes(number, self.total)
        self._next()

    def _next(self) -> None:
        self._left, self._turn = next(self._script, (0, -1))
        self.messages += self._left > 0

    def step(self) -> bool:
        try:
            while self.number is None:
                self._head += self._take(HEAD.size - len(self._head))
                if len(self._head) == HEAD.size:
                    self._begin(int(HEAD.unpack(self._head)[0]))
            while self._left:
                if self._turn == self.side:
                    self._send()
                else:
                    self._receive()
                if not self._left:
                    self._next()
            if self.side == 0:
                self.end.shutdown(socket.SHUT_WR)
                self.side = 2
            if self.end.recv(1):
                raise AssertionError(f"connection {self.number}: a byte too many")
        except BlockingIOError:
            return False
        self.over_tcp = acceleration.over_tcp(self.end) - 1  # TCP counts the FIN
        self.end.close()
        return True

    def _expected(self, size: int) -> bytes:
        start = (self.position[self._turn] + (self.number or 0) * 7919 + self._turn * 104729) % BLOCK
        return _BLOCK[start : start + size]

    def _send(self) -> None:
        size = self._split.choice((self._left, self._left, 4099, 131))  # a message in one write or in several
        piece = self._expected(min(size, self._left, BLOCK))
        self._account(piece[: self.end.send(piece)])

    def _receive(self) -> None:
        data = self._take(min(self._left, 1 << 18))
        if data != self._expected(len(data)):
            raise AssertionError(f"connection {self.number}: other bytes at {self.position[self._turn]} from end {self._turn}")
        self._account(data)

    def _take(self, size: int) -> bytes:
        data = self.end.recv(size)
        if not data:
            raise AssertionError(f"connection {self.number}: ended with {self._left} bytes of message {self.messages} missing")
        return data

    def _account(self, data: bytes) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.moved += len(data)
        self._left -= len(data)
        self.position[self._turn] += len(data)


def converse(dialogues: list[Dialogue], listeners: tuple[socket.socket, ...], expected: int, total: int) -> None:
    """Until all `expected` connections are over. Callers wait level-triggered, receivers edge-triggered."""
    epoll = select.epoll()
    talking = {d.end.fileno(): d for d in dialogues}
    doors = {listener.fileno(): listener for listener in listeners}
    over = 0
    for number in doors:
        epoll.register(number, select.EPOLLIN)
    for dialogue in dialogues:
        number = dialogue.end.fileno()
        epoll.register(number, select.EPOLLOUT)
        if dialogue.step():  # of one message, and the other end was quick
            over += 1
            del talking[number]
    while over < expected:
        events = epoll.poll(PATIENCE_S)
        if not events:
            raise AssertionError(f"hangs: {over} of {expected} connections are over, nothing happens for {PATIENCE_S:.0f} s")
        for ready, _ in events:
            number = ready
            if ready in doors:
                end, _peer = doors[ready].accept()
                number = end.fileno()
                talking[number] = Dialogue(end, 1, total)
                dialogues.append(talking[number])
                epoll.register(number, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
            if talking[number].step():
                over += 1
                del talking[number]
            elif talking[number].side != 1:
                epoll.modify(number, talking[number].wants)


def main(arguments: list[str]) -> int:
    """See the module."""
    own, total, connections = Path(arguments[0]), int(float(arguments[1])), int(arguments[2])
    each = total // connections
    started = time.monotonic()
    with acceleration.bed(own) as bed:
        report, result = os.pipe()
        child = os.fork()
        if child == 0:
            answers: list[Dialogue] = []
            status = 1
            try:
                converse(answers, (bed.listener, bed.deferred), connections, each)
                found = {str(d.number): [d.crc, d.moved, d.over_tcp] for d in answers}
                with os.fdopen(result, "w") as pipe:
                    json.dump(found, pipe)
                status = 0
            except AssertionError as error:
                sys.stderr.write(f"receiver: {error}\n")
            finally:
                os._exit(status)
        os.close(result)
        bed.listener.close()
        bed.deferred.close()
        callers = []
        for number in range(connections):
            end = bed.call(deferred=number % 10 == 9)  # a tenth stays with TCP
            end.sendall(HEAD.pack(number))
            callers.append(Dialogue(end, 0, each, number))
        converse(callers, (), connections, each)
        with os.fdopen(report) as pipe:
            answered = json.load(pipe)
        _, status = os.waitpid(child, 0)
    if status:
        return 1
    seconds = time.monotonic() - started
    wrong = accelerated = tcp = 0
    mixed = []
    for caller in callers:
        crc, moved, over_tcp = answered[str(caller.number)]
        both, whole = (over_tcp, caller.over_tcp), (HEAD.size + caller.position[0], caller.position[1])
        wrong += (crc, moved) != (caller.crc, caller.moved)
        accelerated += both == (0, 0)
        tcp += both == whole
        if both not in {(0, 0), whole}:
            mixed.append(f"{caller.number}: {both} of {whole} bytes (there, back) over TCP")
    figures = {
        "connections": connections,
        "accelerated": accelerated,
        "tcp": tcp,
        "mixed": mixed,
        "bytes": sum(d.moved for d in callers),
        "messages": sum(d.messages for d in callers),
        "wrong_checksums": wrong,
        "seconds": round(seconds, 2),
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
