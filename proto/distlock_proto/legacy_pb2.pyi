from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AcquireLockRequest(_message.Message):
    __slots__ = ["lock", "overwrite"]
    LOCK_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    lock: Lock
    overwrite: bool
    def __init__(self, lock: _Optional[_Union[Lock, _Mapping]] = ..., overwrite: bool = ...) -> None: ...

class AcquireLockResponse(_message.Message):
    __slots__ = ["acquired_lock", "elapsed", "existing_lock"]
    ACQUIRED_LOCK_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    EXISTING_LOCK_FIELD_NUMBER: _ClassVar[int]
    acquired_lock: Lock
    elapsed: _duration_pb2.Duration
    existing_lock: Lock
    def __init__(self, acquired_lock: _Optional[_Union[Lock, _Mapping]] = ..., existing_lock: _Optional[_Union[Lock, _Mapping]] = ..., elapsed: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class AcquireManyRequest(_message.Message):
    __slots__ = ["max_acquired_locks", "requests"]
    MAX_ACQUIRED_LOCKS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    max_acquired_locks: int
    requests: _containers.RepeatedCompositeFieldContainer[AcquireLockRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[AcquireLockRequest, _Mapping]]] = ..., max_acquired_locks: _Optional[int] = ...) -> None: ...

class AcquireManyResponse(_message.Message):
    __slots__ = ["responses"]
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    responses: _containers.RepeatedCompositeFieldContainer[AcquireLockResponse]
    def __init__(self, responses: _Optional[_Iterable[_Union[AcquireLockResponse, _Mapping]]] = ...) -> None: ...

class AnyRequest(_message.Message):
    __slots__ = ["acquire_lock_request", "acquire_many_request", "get_current_server_time_request", "list_locks_request", "release_lock_request"]
    ACQUIRE_LOCK_REQUEST_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_MANY_REQUEST_FIELD_NUMBER: _ClassVar[int]
    GET_CURRENT_SERVER_TIME_REQUEST_FIELD_NUMBER: _ClassVar[int]
    LIST_LOCKS_REQUEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_LOCK_REQUEST_FIELD_NUMBER: _ClassVar[int]
    acquire_lock_request: AcquireLockRequest
    acquire_many_request: AcquireManyRequest
    get_current_server_time_request: GetCurrentServerTimeRequest
    list_locks_request: ListLocksRequest
    release_lock_request: ReleaseLockRequest
    def __init__(self, acquire_lock_request: _Optional[_Union[AcquireLockRequest, _Mapping]] = ..., acquire_many_request: _Optional[_Union[AcquireManyRequest, _Mapping]] = ..., release_lock_request: _Optional[_Union[ReleaseLockRequest, _Mapping]] = ..., get_current_server_time_request: _Optional[_Union[GetCurrentServerTimeRequest, _Mapping]] = ..., list_locks_request: _Optional[_Union[ListLocksRequest, _Mapping]] = ...) -> None: ...

class AnyResponse(_message.Message):
    __slots__ = ["acquire_lock_response", "acquire_many_response", "get_current_server_time_response", "list_locks_response", "release_lock_response"]
    ACQUIRE_LOCK_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ACQUIRE_MANY_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    GET_CURRENT_SERVER_TIME_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    LIST_LOCKS_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    RELEASE_LOCK_RESPONSE_FIELD_NUMBER: _ClassVar[int]
    acquire_lock_response: AcquireLockResponse
    acquire_many_response: AcquireManyResponse
    get_current_server_time_response: GetCurrentServerTimeResponse
    list_locks_response: ListLocksResponse
    release_lock_response: ReleaseLockResponse
    def __init__(self, acquire_lock_response: _Optional[_Union[AcquireLockResponse, _Mapping]] = ..., acquire_many_response: _Optional[_Union[AcquireManyResponse, _Mapping]] = ..., release_lock_response: _Optional[_Union[ReleaseLockResponse, _Mapping]] = ..., get_current_server_time_response: _Optional[_Union[GetCurrentServerTimeResponse, _Mapping]] = ..., list_locks_response: _Optional[_Union[ListLocksResponse, _Mapping]] = ...) -> None: ...

class CountLocksRequest(_message.Message):
    __slots__ = ["end_key", "start_key"]
    END_KEY_FIELD_NUMBER: _ClassVar[int]
    START_KEY_FIELD_NUMBER: _ClassVar[int]
    end_key: str
    start_key: str
    def __init__(self, start_key: _Optional[str] = ..., end_key: _Optional[str] = ...) -> None: ...

class CountLocksResponse(_message.Message):
    __slots__ = ["elapsed", "expired", "no_expiration", "unexpired"]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    NO_EXPIRATION_FIELD_NUMBER: _ClassVar[int]
    UNEXPIRED_FIELD_NUMBER: _ClassVar[int]
    elapsed: _duration_pb2.Duration
    expired: int
    no_expiration: int
    unexpired: int
    def __init__(self, expired: _Optional[int] = ..., unexpired: _Optional[int] = ..., no_expiration: _Optional[int] = ..., elapsed: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GetCurrentServerTimeRequest(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class GetCurrentServerTimeResponse(_message.Message):
    __slots__ = ["server_time"]
    SERVER_TIME_FIELD_NUMBER: _ClassVar[int]
    server_time: _timestamp_pb2.Timestamp
    def __init__(self, server_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class ListLocksRequest(_message.Message):
    __slots__ = ["end_key", "excludes", "includes", "start_key"]
    END_KEY_FIELD_NUMBER: _ClassVar[int]
    EXCLUDES_FIELD_NUMBER: _ClassVar[int]
    INCLUDES_FIELD_NUMBER: _ClassVar[int]
    START_KEY_FIELD_NUMBER: _ClassVar[int]
    end_key: str
    excludes: _containers.RepeatedCompositeFieldContainer[LockMatchExpression]
    includes: _containers.RepeatedCompositeFieldContainer[LockMatchExpression]
    start_key: str
    def __init__(self, start_key: _Optional[str] = ..., end_key: _Optional[str] = ..., includes: _Optional[_Iterable[_Union[LockMatchExpression, _Mapping]]] = ..., excludes: _Optional[_Iterable[_Union[LockMatchExpression, _Mapping]]] = ...) -> None: ...

class ListLocksResponse(_message.Message):
    __slots__ = ["elapsed", "locks"]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    LOCKS_FIELD_NUMBER: _ClassVar[int]
    elapsed: _duration_pb2.Duration
    locks: _containers.RepeatedCompositeFieldContainer[Lock]
    def __init__(self, locks: _Optional[_Iterable[_Union[Lock, _Mapping]]] = ..., elapsed: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Lock(_message.Message):
    __slots__ = ["acquired_since", "data", "expires_in", "global_id", "last_owner_name"]
    ACQUIRED_SINCE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_ID_FIELD_NUMBER: _ClassVar[int]
    LAST_OWNER_NAME_FIELD_NUMBER: _ClassVar[int]
    acquired_since: _timestamp_pb2.Timestamp
    data: bytes
    expires_in: _duration_pb2.Duration
    global_id: str
    last_owner_name: str
    def __init__(self, global_id: _Optional[str] = ..., expires_in: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., acquired_since: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., last_owner_name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class LockMatchExpression(_message.Message):
    __slots__ = ["global_id_regex", "is_expired"]
    GLOBAL_ID_REGEX_FIELD_NUMBER: _ClassVar[int]
    IS_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    global_id_regex: str
    is_expired: bool
    def __init__(self, global_id_regex: _Optional[str] = ..., is_expired: bool = ...) -> None: ...

class ProcessBatchRequest(_message.Message):
    __slots__ = ["is_synchronized", "requests"]
    IS_SYNCHRONIZED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    is_synchronized: bool
    requests: _containers.RepeatedCompositeFieldContainer[AnyRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[AnyRequest, _Mapping]]] = ..., is_synchronized: bool = ...) -> None: ...

class ProcessBatchResponse(_message.Message):
    __slots__ = ["elapsed", "responses"]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    RESPONSES_FIELD_NUMBER: _ClassVar[int]
    elapsed: _duration_pb2.Duration
    responses: _containers.RepeatedCompositeFieldContainer[AnyResponse]
    def __init__(self, responses: _Optional[_Iterable[_Union[AnyResponse, _Mapping]]] = ..., elapsed: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ReleaseLockRequest(_message.Message):
    __slots__ = ["lock", "return_released_lock"]
    LOCK_FIELD_NUMBER: _ClassVar[int]
    RETURN_RELEASED_LOCK_FIELD_NUMBER: _ClassVar[int]
    lock: Lock
    return_released_lock: bool
    def __init__(self, lock: _Optional[_Union[Lock, _Mapping]] = ..., return_released_lock: bool = ...) -> None: ...

class ReleaseLockResponse(_message.Message):
    __slots__ = ["elapsed", "released_lock"]
    ELAPSED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_LOCK_FIELD_NUMBER: _ClassVar[int]
    elapsed: _duration_pb2.Duration
    released_lock: Lock
    def __init__(self, released_lock: _Optional[_Union[Lock, _Mapping]] = ..., elapsed: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...
