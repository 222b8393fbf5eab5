import pytest

from infopt.core.errors import UsageError
from infopt.core.server.keys import Keys, parse_keys, read_keys

FILE = """
# who may ask
sk-alice-123  name=alice rate=60 concurrency=4   # the first
sk-bob-45678
"""


def test_a_file_of_keys() -> None:
    alice, bob = parse_keys(FILE, "keys")
    assert (alice.name, alice.rate, alice.concurrency) == ("alice", 60.0, 4)
    assert (bob.name, bob.rate, bob.concurrency) == ("key-2", None, None)
    keys = Keys((alice, bob))
    assert keys.find("sk-bob-45678") == bob and keys.find("sk-alice-123") == alice
    assert keys.find("") is keys.find("sk-alice-12") is keys.find("sk-alice-1234") is None


def test_no_key_is_kept_or_shown() -> None:
    assert all(word not in repr(parse_keys(FILE, "keys")) for word in ("sk-alice", "sk-bob"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("short", ["line 1 of keys", "8 characters"]),
        ("sk-secret-1 rat=3", ["line 1 of keys", "rate="]),
        ("sk-secret-1 rate=0", ["rate", "above 0"]),
        ("sk-secret-1 rate=nan", ["rate", "above 0"]),
        ("sk-secret-1 concurrency=1.5", ["concurrency", "whole"]),
        ("sk-secret-1 name=a/b", ["name", "letters"]),
        ("sk-secret-1\nsk-secret-1", ["same key"]),
        ("sk-secret-1 name=a\nsk-secret-2 name=a", ["same name"]),
        ("# nothing", ["no API key in keys"]),
    ],
)
def test_what_is_no_key_is_told_without_it(line: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_keys(line, "keys")
    assert [word for word in words if word not in str(caught.value)] == []
    assert "sk-secret" not in str(caught.value)


def test_salts_are_of_the_key_and_cannot_be_named_by_others() -> None:
    alice, bob = parse_keys(FILE, "keys")
    salts = {key.salt(asked) for key in (alice, bob) for asked in ("", "x", alice.salt(""))}
    assert len(salts) == 6


def test_where_keys_come_from(tmp_path: object) -> None:
    assert read_keys(None, {}) is None
    found = read_keys(None, {"INFOPT_API_KEYS": "sk-one-1111;sk-two-2222 name=two"})
    assert found is not None and len(found) == 2
    two = found.find("sk-two-2222")
    assert two is not None and two.name == "two"
    with pytest.raises(UsageError, match=r"cannot read the API keys in .*none\.txt"):
        read_keys(f"{tmp_path}/none.txt", {})
