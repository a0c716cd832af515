"""What DeepSpeed cannot do is one sentence before anything is loaded."""

from types import SimpleNamespace

import pytest

from r2ec_trl.errors import UserError
from r2ec_trl.training import launch


def settings(**changes):
    usual = {"ds3_gather_for_generation": True, "gradient_checkpointing": True, "item_coef": 1.0}
    return SimpleNamespace(**{**usual, "item_gradient": "candidates", **changes})


def test_only_zero_3_is_looked_at(monkeypatch):
    launch.check_sharding(settings(ds3_gather_for_generation=False), trains_adapter=True)
    monkeypatch.setattr(launch, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="ds3_gather_for_generation"):
        launch.check_sharding(settings(ds3_gather_for_generation=False), trains_adapter=False)
    with pytest.raises(UserError, match="--gradient_checkpointing false"):
        launch.check_sharding(settings(), trains_adapter=True)
    for fine in ({"gradient_checkpointing": False}, {"item_gradient": "none"}, {"item_coef": 0.0}):
        launch.check_sharding(settings(**fine), trains_adapter=True)
    launch.check_sharding(settings(), trains_adapter=False)
