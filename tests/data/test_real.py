"""
Real data, where it is: `R2EC_ML100K` names the folder of ml-100k in RecBole's atomic format (it is inside the wheel of
recbole 1.2.1), `R2EC_SEQUENCES` a folder of ready sequences.
"""

import os

import pytest

from r2ec_trl.data import (
    SplitRule,
    audit_dataset,
    cut_dataset,
    import_recbole,
    import_sequences,
    prepare,
    validate_dataset,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ml100k():
    folder = os.environ.get("R2EC_ML100K")
    if not folder:
        pytest.skip("R2EC_ML100K is not set")
    return import_recbole(folder)


@pytest.mark.parametrize("rule, rows", [("leave_one_out", (97_171, 943, 943)), ("time_ratio", (79_245, 9_906, 9_906))])
def test_ml100k(tmp_path, ml100k, rule, rows):
    done = prepare(ml100k, SplitRule(rule), tmp_path)
    validate_dataset(done.dataset, "ml-100k")
    assert (done.facts["users"], done.facts["items"], done.facts["interactions"]) == (943, 1_682, 100_000)
    assert tuple(len(done.dataset[split]) for split in ("train", "validation", "test")) == rows
    audit = audit_dataset(done.dataset, rule)
    assert not any(audit["leakage"].values())
    assert 0.5 < done.facts["tied_share"] < 0.52
    if rule == "time_ratio":  # the reason to leave one out instead
        assert round(audit["splits"]["test"]["rows_of_cold_users"] / rows[2], 2) == 0.86


def test_ready_sequences():
    folder = os.environ.get("R2EC_SEQUENCES")
    if not folder:
        pytest.skip("R2EC_SEQUENCES is not set")
    from collections import Counter

    dropped = Counter()
    dataset = import_sequences(folder, dropped=dropped)
    validate_dataset(dataset, folder)
    assert not dropped and not any(audit_dataset(dataset, "given")["leakage"].values())
    cut = cut_dataset(dataset, max_items=500, max_users=300, dropped=dropped)
    validate_dataset(cut, "cut")
    assert len(cut["items"]) == 500 and all(len(set(cut[split]["user_id"])) <= 300 for split in ("train", "test"))
