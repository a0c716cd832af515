"""Where a bundle may be written, and that every part is in its hashes."""

import pytest

from r2ec_trl.bundle.format import check_hashes, check_output, read_parts
from r2ec_trl.errors import UserError


def test_only_a_bundle_or_nothing_is_replaced(own, tmp_path):
    (tmp_path / "other").mkdir()
    for fine in (own, tmp_path / "new", tmp_path / "other"):
        check_output(fine)
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="is no bundle"):
        check_output(tmp_path / "other")


def test_a_changed_hash_is_named(tmp_path):
    check_hashes({"adapter": "1", "prompts": "2"}, {"adapter": "1", "prompts": "2"}, tmp_path)
    with pytest.raises(UserError, match="prompts"):
        check_hashes({"adapter": "1", "prompts": "3"}, {"adapter": "1", "prompts": "2"}, tmp_path)


def test_one_bit_of_any_part_is_noticed(own):
    read_parts(own)
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        whole = (own / name).read_bytes()
        (own / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(UserError):
            read_parts(own)
        (own / name).write_bytes(whole)
