"""Users as they are asked about: right, or one sentence that names file and line."""

import gzip
import io
import json
import os
import threading

import pytest

from r2ec_trl.errors import UserError
from r2ec_trl.serving.users import check_user, read_users


def written(tmp_path, data):
    (tmp_path / "users.jsonl").write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path / "users.jsonl"


def test_users_of_a_file(tmp_path):
    text = '\ufeff["i1", "i2"]\n\n{"user_id": 7, "history_titles": ["a  bow"], "timestamp": null, "target": "x"}\r\n'
    users = [{"history": ["i1", "i2"]}, {"user_id": "7", "history_titles": ["a  bow"]}]
    assert read_users(written(tmp_path, text)) == users
    assert read_users(str(tmp_path / "users.jsonl")) == users
    assert read_users(io.StringIO(text[1:])) == users == read_users(io.BytesIO(text.encode()))
    assert read_users(io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii")) == users


def test_users_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text('["i1"]\n'))
    writer.start()
    assert read_users(tmp_path / "pipe") == [{"history": ["i1"]}]
    writer.join()


@pytest.mark.parametrize(
    "data, sentence",
    [
        ('["i1"]'.encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        ('["i1"]'.encode("utf-16-le"), "is UTF-16 text or no text at all"),
        (gzip.compress(b'["i1"]', mtime=0), "is packed by gzip here: unpack it"),
        (b"PK\x03\x04", "is a zip archive: unpack it first"),
        (b"PAR1", "is a Parquet file: recommend.py reads it with --output FOLDER"),
    ],
)
def test_a_file_of_another_kind_says_which(tmp_path, data, sentence):
    with pytest.raises(UserError, match=f"users.jsonl {sentence}"):
        read_users(written(tmp_path, data))


@pytest.mark.parametrize(
    "data, sentence",
    [
        ('["i1"]\n{"history": ["café"]}'.encode("latin-1"), "line 2 is not UTF-8 text; convert the file"),
        ('["i1"]\n[1\n', "line 2 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON: it is nested too deeply"),
        ('{"history": ' + "[" * 900 + "]" * 900 + "}", "line 1: `history` must be a list of texts, but holds"),
        ("3", "line 1 is neither a list of item ids nor an object with `history`, but 3"),
        ('"i1"', "line 1 is neither a list .* but 'i1'"),
        ("null", "line 1 is neither a list .* but None"),
        ("[1, 2]", "line 1: `history` must be a list of texts, but holds 1"),
        ('["i1", null]', "line 1: `history` must be a list of texts, but holds None"),
        ('["\\ud800"]', "line 1: `history` must be a list of texts, but holds '.ud800'"),
        ('{"history_titles": [" "]}', "line 1: `history_titles` must be a list of texts, but holds ' '"),
        ('{"history": {"i1": 1}}', "line 1: `history` must be a list of texts, not {'i1': 1}"),
        ('{"history": 5}', "line 1: `history` must be a list of texts, not 5"),
        ('{"history": "i1"}', "line 1: `history` must be a list of texts, not 'i1'"),
        ('{"history": ["i1"], "history_titles": ["x"]}', "line 1: give either `history`"),
        ('{"histroy": ["i1"]}', "line 1 has the key 'histroy'; give user_id, history"),
        ('{"history": ["i1"], "user_id": 1.5}', "line 1: `user_id` is 1.5; give a text"),
        ('{"history": ["i1"], "user_id": true}', "line 1: `user_id` is True"),
        ('{"history": ["i1"], "history_ratings": [NaN]}', "line 1: `history_ratings` holds nan"),
        ('{"history": ["i1"], "timestamp": "2024-01-01"}', "line 1: `timestamp` holds '2024-01-01'"),
        ('{"history": ["i1"], "timestamp": ' + "9" * 5000 + "}", "line 1 is not JSON: Exceeds the limit"),
        ("x" * (2**24 + 1), "line 1 has more than 16,777,216 characters"),
    ],
)
def test_what_is_no_user_is_one_sentence_with_its_line(tmp_path, data, sentence):
    with pytest.raises(UserError, match=f"users.jsonl, {sentence}") as caught:
        read_users(written(tmp_path, data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="cannot be read .Is a directory."):
        read_users(tmp_path)
    with pytest.raises(UserError, match="gone' cannot be read .No such file"):
        read_users(tmp_path / "gone")
    with pytest.raises(UserError, match="standard input, line 1 is not JSON"):
        read_users(io.StringIO("{"))


def test_a_checked_user_is_a_copy():
    given = {"user_id": "a", "history": ("i1",)}
    assert check_user(given, "User a") == {"user_id": "a", "history": ["i1"]}
    assert given == {"user_id": "a", "history": ("i1",)}
    assert json.dumps(check_user(given, "User a"))
