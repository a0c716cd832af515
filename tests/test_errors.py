"""The one exception for users' mistakes."""

import pytest

import r2ec_trl
from r2ec_trl.errors import UserError


def test_it_is_public_and_holds_its_sentence():
    assert r2ec_trl.UserError is UserError and issubclass(UserError, Exception)
    with pytest.raises(UserError, match="^one sentence$"):
        raise UserError("one sentence")
