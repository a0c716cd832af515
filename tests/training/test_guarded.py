"""What both trainers wire into transformers' loop: test_faults.py and test_checkpoints.py say what it does."""

from transformers import Trainer

from r2ec_trl.training.contrastive_trainer import ContrastiveTrainer
from r2ec_trl.training.guarded import GuardedTraining
from r2ec_trl.training.recpo_trainer import RecPOTrainer


def test_both_trainers_run_guarded_and_every_override_has_its_reason():
    ours = {name for name in vars(GuardedTraining) if hasattr(Trainer, name) and not name.startswith("__")}
    assert ours == {"train", "_prepare_inputs", "_get_grad_norm", "_save_checkpoint"}
    assert all(f"`{name}`:" in GuardedTraining.__doc__ for name in ours)
    for trainer in (ContrastiveTrainer, RecPOTrainer):
        own = {"_prepare_inputs" if trainer is RecPOTrainer else "train"}  # groups kept whole, a report, on top of it
        assert all(getattr(trainer, name) is getattr(GuardedTraining, name) for name in ours - own), trainer
