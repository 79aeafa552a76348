from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor
KEY_STATE_ABSENT: KeyState
KEY_STATE_BUSY: KeyState
KEY_STATE_BUSY_AHEAD: KeyState
KEY_STATE_COMPLETED: KeyState
KEY_STATE_DONE: KeyState
KEY_STATE_EXHAUSTED: KeyState
KEY_STATE_EXPIRED: KeyState
KEY_STATE_FAILED: KeyState
KEY_STATE_GRANTED: KeyState
KEY_STATE_KEPT: KeyState
KEY_STATE_LOST: KeyState
KEY_STATE_NOT_ASKED: KeyState
KEY_STATE_RELEASED: KeyState
KEY_STATE_RENEWED: KeyState
KEY_STATE_RESET: KeyState
KEY_STATE_UNSPECIFIED: KeyState
LIST_FILTER_ALL: ListFilter
LIST_FILTER_FAILED: ListFilter
LIST_FILTER_HELD: ListFilter

class Block(_message.Message):
    __slots__ = ["digest", "n_keys"]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    N_KEYS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    n_keys: int
    def __init__(self, digest: _Optional[bytes] = ..., n_keys: _Optional[int] = ...) -> None: ...

class ClaimReply(_message.Message):
    __slots__ = ["attempts", "next", "remaining_ns", "results", "revision", "states", "tokens"]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_NS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    attempts: _containers.RepeatedScalarFieldContainer[int]
    next: Slice
    remaining_ns: _containers.RepeatedScalarFieldContainer[int]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    revision: int
    states: bytes
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, states: _Optional[bytes] = ..., tokens: _Optional[_Iterable[int]] = ..., remaining_ns: _Optional[_Iterable[int]] = ..., attempts: _Optional[_Iterable[int]] = ..., results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., revision: _Optional[int] = ..., next: _Optional[_Union[Slice, _Mapping]] = ...) -> None: ...

class ClaimRequest(_message.Message):
    __slots__ = ["ahead", "claim_id", "frontier", "keys", "max_attempts", "max_grants", "owner", "ttl_ns", "want_results"]
    AHEAD_FIELD_NUMBER: _ClassVar[int]
    CLAIM_ID_FIELD_NUMBER: _ClassVar[int]
    FRONTIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    MAX_GRANTS_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    TTL_NS_FIELD_NUMBER: _ClassVar[int]
    WANT_RESULTS_FIELD_NUMBER: _ClassVar[int]
    ahead: bool
    claim_id: bytes
    frontier: FrontierRequest
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    max_attempts: int
    max_grants: int
    owner: str
    ttl_ns: int
    want_results: bool
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., claim_id: _Optional[bytes] = ..., ttl_ns: _Optional[int] = ..., owner: _Optional[str] = ..., max_grants: _Optional[int] = ..., max_attempts: _Optional[int] = ..., ahead: bool = ..., want_results: bool = ..., frontier: _Optional[_Union[FrontierRequest, _Mapping]] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ["result"]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: Result
    def __init__(self, result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class Completions(_message.Message):
    __slots__ = ["claim_id", "keys", "tokens"]
    CLAIM_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    claim_id: bytes
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, claim_id: _Optional[bytes] = ..., keys: _Optional[_Iterable[bytes]] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class CountReply(_message.Message):
    __slots__ = ["done", "expired", "failed", "held", "is_complete", "revision"]
    DONE_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    IS_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    done: int
    expired: int
    failed: int
    held: int
    is_complete: bool
    revision: int
    def __init__(self, done: _Optional[int] = ..., held: _Optional[int] = ..., expired: _Optional[int] = ..., failed: _Optional[int] = ..., is_complete: bool = ..., revision: _Optional[int] = ...) -> None: ...

class CountRequest(_message.Message):
    __slots__ = ["namespace", "prefix"]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    prefix: bytes
    def __init__(self, namespace: _Optional[str] = ..., prefix: _Optional[bytes] = ...) -> None: ...

class DownloadResultReply(_message.Message):
    __slots__ = ["chunk", "size_bytes"]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    size_bytes: int
    def __init__(self, chunk: _Optional[bytes] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class DownloadResultRequest(_message.Message):
    __slots__ = ["key", "max_bytes", "offset_bytes", "token"]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    max_bytes: int
    offset_bytes: int
    token: int
    def __init__(self, key: _Optional[bytes] = ..., token: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., max_bytes: _Optional[int] = ...) -> None: ...

class Fail(_message.Message):
    __slots__ = ["error"]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: str
    def __init__(self, error: _Optional[str] = ...) -> None: ...

class FrontierRequest(_message.Message):
    __slots__ = ["blocks", "n_keys", "place"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    N_KEYS_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[Block]
    n_keys: int
    place: int
    def __init__(self, blocks: _Optional[_Iterable[_Union[Block, _Mapping]]] = ..., place: _Optional[int] = ..., n_keys: _Optional[int] = ...) -> None: ...

class GetServerInfoReply(_message.Message):
    __slots__ = ["database_id", "engine", "max_chunk_bytes", "max_error_bytes", "max_inline_result_bytes", "max_key_bytes", "max_keys_per_request", "max_owner_bytes", "max_result_bytes", "max_ttl_ns", "max_wait_ns", "reset_generation", "revision", "uptime_ns", "version", "wall_ns"]
    DATABASE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ERROR_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_KEYS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_OWNER_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_RESULT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_TTL_NS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_NS_FIELD_NUMBER: _ClassVar[int]
    RESET_GENERATION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_NS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WALL_NS_FIELD_NUMBER: _ClassVar[int]
    database_id: bytes
    engine: str
    max_chunk_bytes: int
    max_error_bytes: int
    max_inline_result_bytes: int
    max_key_bytes: int
    max_keys_per_request: int
    max_owner_bytes: int
    max_result_bytes: int
    max_ttl_ns: int
    max_wait_ns: int
    reset_generation: int
    revision: int
    uptime_ns: int
    version: str
    wall_ns: int
    def __init__(self, version: _Optional[str] = ..., database_id: _Optional[bytes] = ..., engine: _Optional[str] = ..., wall_ns: _Optional[int] = ..., revision: _Optional[int] = ..., reset_generation: _Optional[int] = ..., max_key_bytes: _Optional[int] = ..., max_keys_per_request: _Optional[int] = ..., max_owner_bytes: _Optional[int] = ..., max_error_bytes: _Optional[int] = ..., max_inline_result_bytes: _Optional[int] = ..., max_result_bytes: _Optional[int] = ..., max_chunk_bytes: _Optional[int] = ..., max_ttl_ns: _Optional[int] = ..., max_wait_ns: _Optional[int] = ..., uptime_ns: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class Holder(_message.Message):
    __slots__ = ["claim_id", "key", "token"]
    CLAIM_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    claim_id: bytes
    key: bytes
    token: int
    def __init__(self, key: _Optional[bytes] = ..., claim_id: _Optional[bytes] = ..., token: _Optional[int] = ...) -> None: ...

class InvalidateReply(_message.Message):
    __slots__ = ["revision", "states"]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    revision: int
    states: bytes
    def __init__(self, states: _Optional[bytes] = ..., revision: _Optional[int] = ...) -> None: ...

class InvalidateRequest(_message.Message):
    __slots__ = ["invalidations"]
    INVALIDATIONS_FIELD_NUMBER: _ClassVar[int]
    invalidations: _containers.RepeatedCompositeFieldContainer[Invalidation]
    def __init__(self, invalidations: _Optional[_Iterable[_Union[Invalidation, _Mapping]]] = ...) -> None: ...

class Invalidation(_message.Message):
    __slots__ = ["key", "token"]
    KEY_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    token: int
    def __init__(self, key: _Optional[bytes] = ..., token: _Optional[int] = ...) -> None: ...

class KeyInfo(_message.Message):
    __slots__ = ["attempts", "error", "key", "owner", "remaining_ns", "result", "revision", "since_wall_ns", "state", "token"]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    REMAINING_NS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SINCE_WALL_NS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    attempts: int
    error: str
    key: bytes
    owner: str
    remaining_ns: int
    result: Result
    revision: int
    since_wall_ns: int
    state: KeyState
    token: int
    def __init__(self, key: _Optional[bytes] = ..., state: _Optional[_Union[KeyState, str]] = ..., token: _Optional[int] = ..., owner: _Optional[str] = ..., remaining_ns: _Optional[int] = ..., since_wall_ns: _Optional[int] = ..., attempts: _Optional[int] = ..., error: _Optional[str] = ..., revision: _Optional[int] = ..., result: _Optional[_Union[Result, _Mapping]] = ...) -> None: ...

class ListReply(_message.Message):
    __slots__ = ["infos", "next_start_key", "revision"]
    INFOS_FIELD_NUMBER: _ClassVar[int]
    NEXT_START_KEY_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    infos: _containers.RepeatedCompositeFieldContainer[KeyInfo]
    next_start_key: bytes
    revision: int
    def __init__(self, infos: _Optional[_Iterable[_Union[KeyInfo, _Mapping]]] = ..., next_start_key: _Optional[bytes] = ..., revision: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ["end_key", "filter", "limit", "start_key", "want_results"]
    END_KEY_FIELD_NUMBER: _ClassVar[int]
    FILTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    START_KEY_FIELD_NUMBER: _ClassVar[int]
    WANT_RESULTS_FIELD_NUMBER: _ClassVar[int]
    end_key: bytes
    filter: ListFilter
    limit: int
    start_key: bytes
    want_results: bool
    def __init__(self, start_key: _Optional[bytes] = ..., end_key: _Optional[bytes] = ..., filter: _Optional[_Union[ListFilter, str]] = ..., limit: _Optional[int] = ..., want_results: bool = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ["blocks", "infos", "results", "revision", "states"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INFOS_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    blocks: bytes
    infos: _containers.RepeatedCompositeFieldContainer[KeyInfo]
    results: _containers.RepeatedCompositeFieldContainer[Result]
    revision: int
    states: bytes
    def __init__(self, states: _Optional[bytes] = ..., infos: _Optional[_Iterable[_Union[KeyInfo, _Mapping]]] = ..., revision: _Optional[int] = ..., results: _Optional[_Iterable[_Union[Result, _Mapping]]] = ..., blocks: _Optional[bytes] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ["blocks", "keys", "want_infos", "want_results"]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    WANT_INFOS_FIELD_NUMBER: _ClassVar[int]
    WANT_RESULTS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedScalarFieldContainer[bytes]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    want_infos: bool
    want_results: bool
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., want_infos: bool = ..., want_results: bool = ..., blocks: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = []
    def __init__(self) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ["lost_states", "revision", "states"]
    LOST_STATES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    lost_states: bytes
    revision: int
    states: bytes
    def __init__(self, states: _Optional[bytes] = ..., lost_states: _Optional[bytes] = ..., revision: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ["renewals"]
    RENEWALS_FIELD_NUMBER: _ClassVar[int]
    renewals: _containers.RepeatedCompositeFieldContainer[Renewal]
    def __init__(self, renewals: _Optional[_Iterable[_Union[Renewal, _Mapping]]] = ...) -> None: ...

class Renewal(_message.Message):
    __slots__ = ["holder", "started", "ttl_ns"]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TTL_NS_FIELD_NUMBER: _ClassVar[int]
    holder: Holder
    started: bool
    ttl_ns: int
    def __init__(self, holder: _Optional[_Union[Holder, _Mapping]] = ..., ttl_ns: _Optional[int] = ..., started: bool = ...) -> None: ...

class ResetReply(_message.Message):
    __slots__ = ["revision", "states"]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    revision: int
    states: bytes
    def __init__(self, states: _Optional[bytes] = ..., revision: _Optional[int] = ...) -> None: ...

class ResetRequest(_message.Message):
    __slots__ = ["keys", "max_revision"]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_REVISION_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    max_revision: int
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., max_revision: _Optional[int] = ...) -> None: ...

class Result(_message.Message):
    __slots__ = ["payload", "sha256", "size_bytes", "storage", "token"]
    class Storage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = []
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    STORAGE_INLINE: Result.Storage
    STORAGE_NONE: Result.Storage
    STORAGE_SERVER: Result.Storage
    STORAGE_URL: Result.Storage
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    sha256: bytes
    size_bytes: int
    storage: Result.Storage
    token: int
    def __init__(self, storage: _Optional[_Union[Result.Storage, str]] = ..., payload: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ..., token: _Optional[int] = ...) -> None: ...

class SettleReply(_message.Message):
    __slots__ = ["lost_states", "revision", "states"]
    LOST_STATES_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    lost_states: bytes
    revision: int
    states: bytes
    def __init__(self, states: _Optional[bytes] = ..., lost_states: _Optional[bytes] = ..., revision: _Optional[int] = ...) -> None: ...

class SettleRequest(_message.Message):
    __slots__ = ["completions", "settlements"]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    SETTLEMENTS_FIELD_NUMBER: _ClassVar[int]
    completions: _containers.RepeatedCompositeFieldContainer[Completions]
    settlements: _containers.RepeatedCompositeFieldContainer[Settlement]
    def __init__(self, settlements: _Optional[_Iterable[_Union[Settlement, _Mapping]]] = ..., completions: _Optional[_Iterable[_Union[Completions, _Mapping]]] = ...) -> None: ...

class Settlement(_message.Message):
    __slots__ = ["complete", "fail", "holder", "release"]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    FAIL_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    complete: Complete
    fail: Fail
    holder: Holder
    release: Release
    def __init__(self, holder: _Optional[_Union[Holder, _Mapping]] = ..., complete: _Optional[_Union[Complete, _Mapping]] = ..., fail: _Optional[_Union[Fail, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ["block", "n_keys", "place"]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    N_KEYS_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    block: int
    n_keys: int
    place: int
    def __init__(self, block: _Optional[int] = ..., place: _Optional[int] = ..., n_keys: _Optional[int] = ...) -> None: ...

class UploadResultReply(_message.Message):
    __slots__ = ["received_bytes"]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    def __init__(self, received_bytes: _Optional[int] = ...) -> None: ...

class UploadResultRequest(_message.Message):
    __slots__ = ["chunk", "holder", "offset_bytes", "sha256", "size_bytes"]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    holder: Holder
    offset_bytes: int
    sha256: bytes
    size_bytes: int
    def __init__(self, holder: _Optional[_Union[Holder, _Mapping]] = ..., offset_bytes: _Optional[int] = ..., chunk: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class WaitReply(_message.Message):
    __slots__ = ["revision", "states"]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    revision: int
    states: bytes
    def __init__(self, states: _Optional[bytes] = ..., revision: _Optional[int] = ...) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ["keys", "min_settled", "timeout_ns"]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MIN_SETTLED_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_NS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    min_settled: int
    timeout_ns: int
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., timeout_ns: _Optional[int] = ..., min_settled: _Optional[int] = ...) -> None: ...

class KeyState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []

class ListFilter(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = []
