"""Hundreds of malformed inputs; see probe.py."""

import pytest
from probe import probe

pytestmark = pytest.mark.slow


def test_every_input_is_right_or_refused_in_one_sentence():
    counts, failures = probe()
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) >= 300
