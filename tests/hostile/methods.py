"""Every method of the server with the types of its messages."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import grpc
from google.protobuf import message_factory
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from distlock_proto import legacy_pb2, lock_table_pb2


class Method(NamedTuple):
    """One method; `path` is its full name as gRPC sends it."""

    path: str
    request: type[Message]
    reply: type[Message]
    is_streaming: bool

    @property
    def name(self) -> str:
        """Its short name."""
        return self.path.rpartition("/")[2]


def _methods(service: str, file: Any) -> list[Method]:
    found = file.services_by_name[service]
    return [
        Method(
            f"/{found.full_name}/{method.name}",
            message_factory.GetMessageClass(method.input_type),
            message_factory.GetMessageClass(method.output_type),
            service in ("Health", "ServerReflection") and method.name != "Check",
        )
        for method in found.methods
    ]


LOCK_TABLE: Final = _methods("LockTable", lock_table_pb2.DESCRIPTOR)
LEGACY: Final = _methods("LockManagerService", legacy_pb2.DESCRIPTOR)
OTHERS: Final = [
    *_methods("Health", health_pb2.DESCRIPTOR),
    *_methods("ServerReflection", reflection_pb2.DESCRIPTOR),
]
METHODS: Final = [*LOCK_TABLE, *LEGACY, *OTHERS]
READING: Final = frozenset(
    {"Lookup", "Wait", "List", "Count", "DownloadResult", "GetServerInfo", "ListLocks"}
    | {"CountLocks", "GetCurrentServerTime", "Check", "Watch", "ServerReflectionInfo"}
)
"""Short names of methods that change nothing."""


def raw_call(channel: grpc.Channel, path: str) -> Any:
    """Give the function that sends bytes to a method and returns the bytes of its reply."""
    call: Any = channel.unary_unary(path)  # bytes, without serializers
    return call
