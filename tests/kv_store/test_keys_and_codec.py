"""Keys, identities and the header: what differs must never be taken for the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.crc import key_slot

from expertmesh.errors import ConfigError
from expertmesh.kv_store import Identity, Keyspace
from expertmesh.kv_store.codec import HEADER_BYTES, Verdict, judge, judge_length, seal

IDENTITY = Identity("weights", "0.32.0", "float32", "layout", "avx2", 128, 4096)
SECRET = b"a secret of the mesh"


@pytest.mark.parametrize("name", [field.name for field in fields(Identity)])
def test_every_part_of_an_identity_gives_other_keys_and_another_origin(name: str) -> None:
    value = getattr(IDENTITY, name)
    other = replace(IDENTITY, **{name: value + 1 if isinstance(value, int) else value + "x"})
    ours, theirs = Keyspace(IDENTITY, SECRET).of("t"), Keyspace(other, SECRET).of("t")
    assert other.prefix != IDENTITY.prefix
    assert ours.key(b"block") != theirs.key(b"block")
    assert ours.origin != theirs.origin


def test_parts_of_an_identity_do_not_run_into_each_other() -> None:
    one, two = replace(IDENTITY, dtype="ab", layout="c"), replace(IDENTITY, dtype="a", layout="bc")
    assert one.digest != two.digest


@given(tenants=st.lists(st.text(max_size=8), min_size=2, max_size=6, unique=True), block=st.binary(max_size=40))
def test_tenants_share_no_key(tenants: list[str], block: bytes) -> None:
    space = Keyspace(IDENTITY, SECRET)
    assert len({space.of(tenant).key(block) for tenant in tenants}) == len(tenants)
    assert len({space.of(tenant).origin for tenant in tenants}) == len(tenants)
    assert Keyspace(IDENTITY, SECRET + b"!").of(tenants[0]).key(block) != space.of(tenants[0]).key(block)


def test_a_key_is_the_same_in_every_process_and_tells_nothing() -> None:
    code = (
        "from expertmesh.kv_store import Identity, Keyspace;"
        f"print(Keyspace({IDENTITY!r}, {SECRET!r}).of('tenant').key(b'block').decode())"
    )
    key = Keyspace(IDENTITY, SECRET).of("tenant").key(b"block")
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip().encode() == key
    assert key.startswith(IDENTITY.prefix)
    assert b"tenant" not in key
    assert b"block".hex().encode() not in key


def test_blocks_of_one_prompt_are_spread_over_a_cluster() -> None:
    keys = Keyspace(IDENTITY, SECRET).of("")
    assert len({key_slot(keys.key(b"%d" % i)) * 3 // 16384 for i in range(30)}) == 3


def test_a_short_secret_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="3 bytes; at least 16") as caught:
        Keyspace(IDENTITY, b"abc")
    assert "abc" not in str(caught.value)
    assert SECRET.decode() not in repr(Keyspace(IDENTITY, SECRET)) + repr(vars(Keyspace(IDENTITY, SECRET)))


KEYS = Keyspace(IDENTITY, SECRET).of("t")
payloads = st.binary(max_size=300)


@given(payload=payloads)
def test_what_was_sealed_is_sound(payload: bytes) -> None:
    header = seal(b"key", KEYS.origin, memoryview(payload))
    assert len(header) == HEADER_BYTES
    assert judge(b"key", header, payload, KEYS.origin) is Verdict.SOUND
    assert judge(b"key", header, payload) is Verdict.SOUND


@given(payload=payloads, data=st.data())
def test_a_changed_bit_anywhere_is_found(payload: bytes, data: st.DataObject) -> None:
    value = bytearray(seal(b"key", KEYS.origin, payload) + payload)
    position = data.draw(st.integers(0, 8 * len(value) - 1).filter(lambda p: p // 8 not in (5, 6, 7)))  # not padding
    value[position // 8] ^= 1 << position % 8
    assert judge(b"key", value[:HEADER_BYTES], value[HEADER_BYTES:], KEYS.origin) is not Verdict.SOUND


@given(payload=st.binary(min_size=1, max_size=300), data=st.data())
def test_a_shortened_value_is_truncated(payload: bytes, data: st.DataObject) -> None:
    value = seal(b"key", KEYS.origin, payload) + payload
    cut = value[: data.draw(st.integers(0, len(value) - 1))]
    assert judge(b"key", cut[:HEADER_BYTES], cut[HEADER_BYTES:], KEYS.origin) is Verdict.TRUNCATED
    assert judge_length(len(cut), len(payload)) is Verdict.TRUNCATED


def test_another_key_tenant_version_or_length_is_not_ours() -> None:
    header = seal(b"key", KEYS.origin, b"payload")
    assert judge(b"other key", header, b"payload", KEYS.origin) is Verdict.CORRUPT
    assert judge(b"key", header, b"payload", Keyspace(IDENTITY, SECRET).of("u").origin) is Verdict.FOREIGN
    assert judge(b"key", header, b"payload and more", KEYS.origin) is Verdict.FOREIGN
    assert judge(b"key", b"XMKV\x02" + header[5:], b"payload", KEYS.origin) is Verdict.FOREIGN
    assert judge(b"key", b"\0" * HEADER_BYTES, b"", KEYS.origin) is Verdict.FOREIGN
    assert judge_length(HEADER_BYTES + 8, 7) is Verdict.FOREIGN
