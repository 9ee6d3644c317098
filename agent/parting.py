"""Which of a node's services and workloads are called through the waypoint right now, as the kernel knows it. Used by the supervisor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from agent.bpf.manifest import Redirect
from agent.bpf.sockets import Sockets
from agent.ids import Ids
from agent.l7.parting import Dialled
from agent.model import LocalWorkload


def called(sockets: Sockets, ids: Ids, local: Iterable[LocalWorkload]) -> Dialled:
    """What connections of these workloads through the waypoint were dialled to. Raises OSError if that cannot be known.

    One that was decided for an endpoint, because a policy of it alone needs the request, has the endpoint's address at the waypoint
    (bpf_src/mesh_connect.c).
    """
    services, workloads = set(), set()
    for one in local:
        for found in sockets.dump(Path(one.netns_path)):
            record = found.record
            if record.redirected != Redirect.WAYPOINT:
                continue
            if record.target:
                workloads.add(ids.name(record.target))
            else:
                services.add((ids.name(record.service).rpartition(":")[0], record.dialled_port))
    return Dialled(frozenset(services), frozenset(workloads))
