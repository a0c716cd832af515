"""The one exception for users' mistakes."""

import pytest

import r2ec_trl
from r2ec_trl.errors import UserError, first_line


def test_it_is_public_and_holds_its_sentence():
    assert r2ec_trl.UserError is UserError and issubclass(UserError, Exception)
    with pytest.raises(UserError, match="^one sentence$"):
        raise UserError("one sentence")


def test_a_reason_in_one_line():
    assert first_line(ValueError("\n one \ntwo")) == "one " and first_line(KeyError()) == "KeyError"
