"""The stopwatch around the calls that write maps."""

from __future__ import annotations

import time

import pytest

from agent.bpf import libbpf
from bench.maps import WRITES, response, stopwatch
from bench.model import Model
from meshapi import discovery_pb2 as pb


def test_calls_that_write_are_timed_also_those_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(libbpf, "update_batch", lambda *_: time.sleep(0.01))
    monkeypatch.setattr(libbpf, "delete", fails)
    with stopwatch() as spent:
        libbpf.update_batch(0, b"", b"", 0)
        with pytest.raises(PermissionError):
            libbpf.delete(0, b"")
    assert len(spent) == 2
    assert spent[0] >= 0.01


def test_afterwards_everything_is_as_it_was() -> None:
    before = [getattr(libbpf, name) for name in WRITES]
    with pytest.raises(KeyError), stopwatch():
        raise KeyError
    assert [getattr(libbpf, name) for name in WRITES] == before


def test_a_response_is_what_a_controller_sends() -> None:
    service = Model().service(7)
    decoded = pb.DiscoveryResponse.FromString(response("seven", [service]))
    assert (decoded.version, list(decoded.resources)) == ("seven", [service])
