"""Keys are checked many at a time: with the same verdict as each by itself."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from distlock_server.limits import MAX_KEY_BYTES, RequestError, check_key, check_keys

some_keys = st.one_of(
    st.text(min_size=1, max_size=5).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.binary(max_size=4),
    st.sampled_from([b"k" * MAX_KEY_BYTES, b"k" * (MAX_KEY_BYTES + 1), b""]),
)


def is_fine(keys: list[bytes]) -> bool:
    """Give the verdict of each key by itself."""
    try:
        for key in keys:
            check_key(key)
    except RequestError:
        return False
    return len(set(keys)) == len(keys)


@given(keys=st.lists(some_keys, max_size=6))
@example(keys=["\u00e9".encode()[:1], "\u00e9".encode()[1:]])
@example(keys=[b"a\n", b"\nb", b"\x00"])
def test_same_verdict(keys: list[bytes]) -> None:
    """No key is let through because of what stands beside it, and none is refused for it."""
    try:
        check_keys(keys)
    except RequestError:
        assert not is_fine(keys)
    else:
        assert is_fine(keys)
