"""ControllerStates, what controllers remember in the API server: how large one is, and how one is written. Used by `store` and `lastgood` of this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from controller.kubernetes.api import Api
from controller.kubernetes.shapes import Seen
from controller.objects import Key

KIND: Final = "ControllerState"
VERSION: Final = "meshagent.io/v1alpha1"
MOST: Final = 1 << 20
"""Bytes of one object's documents, as they are sent and stored: etcd takes 1.5 MiB (https://etcd.io/docs/latest/dev-guide/limit/)."""


def path(namespace: str) -> str:
    """Where those of a namespace are."""
    return f"/apis/{VERSION}/namespaces/{namespace}/controllerstates"


def escaped(text: str) -> int:
    """How long it is as a string in JSON, as Python sends it and as Go stores it (https://pkg.go.dev/encoding/json#Marshal), whichever escapes more."""
    return len(json.dumps(text)) - 2 + 5 * sum(text.count(one) for one in "<>&")


def size(documents: Mapping[str, str]) -> int:
    """The same of documents, with what stands around them."""
    return 2 + sum(escaped(name) + escaped(text) + AROUND for name, text in documents.items()) if documents else 0


AROUND: Final = 8
"""Bytes around a document: quotes, colon, comma, brackets."""


async def put(api: Api, key: Key, held: Seen | None, documents: Mapping[str, str]) -> dict[str, Any]:
    """Make an object, or replace the version that was read; return the API server's answer. Raises what a request raises."""
    metadata = {"name": key.name, "namespace": key.namespace}
    metadata |= {} if held is None else {"resourceVersion": held.version, "uid": held.uid}
    body = {"apiVersion": VERSION, "kind": KIND, "metadata": metadata, "documents": documents}
    where = path(key.namespace)
    return await (api.send("POST", where, body) if held is None else api.send("PUT", f"{where}/{key.name}", body))
