"""What both trainers wire into transformers' loop: test_faults.py and test_checkpoints.py say what else it does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from r2ec_trl.training.contrastive_trainer import ContrastiveTrainer
from r2ec_trl.training.guarded import GuardedTraining
from r2ec_trl.training.recpo_trainer import RecPOTrainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def test_both_trainers_run_guarded_and_every_override_has_its_reason():
    ours = {name for name in vars(GuardedTraining) if hasattr(Trainer, name) and not name.startswith("__")}
    assert ours == {"train", "_prepare_inputs", "_get_grad_norm", "_save_checkpoint"}
    assert all(f"`{name}`:" in GuardedTraining.__doc__ for name in ours)
    for trainer in (ContrastiveTrainer, RecPOTrainer):
        own = {"_prepare_inputs" if trainer is RecPOTrainer else "train"}  # groups kept whole, a report, on top of it
        assert all(getattr(trainer, name) is getattr(GuardedTraining, name) for name in ours - own), trainer


class Stop(TrainerCallback):
    """A stop as sudden as an exception after the third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_run_from_an_adapter_with_a_reference_goes_on_from_its_checkpoint(make_trainer, tiny_model, tmp_path):
    """With `beta` TRL lays "ref" beside the trained adapter, and transformers would read that one alone."""

    def trainer_of(folder, **more):
        torch.manual_seed(0)
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny_model("llama"), lora)
        settings = {**SAVING, "max_steps": 3, "beta": 0.1, "output_dir": str(tmp_path / folder)}
        return make_trainer(model=model, peft=False, **settings, **more)

    whole = trainer_of("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer_of("cut", callbacks=[Stop()]).train()
    assert (tmp_path / "cut" / "checkpoint-2" / "ref").is_dir()
    resumed = trainer_of("cut")
    resumed.train(resume_from_checkpoint="latest")
    expected, found = trained(whole), trained(resumed)
    assert found.keys() == expected.keys() and not any(".ref." in name for name in found)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_an_adapter_in_bfloat16_stays_so_when_it_goes_on(make_trainer):
    """TRL makes QLoRA's so, PEFT makes what it loads float32."""
    first = make_trainer(**SAVING)
    first.train()
    again = make_trainer(**SAVING)
    for weight in again.model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.bfloat16()
    again.train(resume_from_checkpoint="latest")  # nothing is left to train: it is loaded
    assert again.model.load_adapter.__func__ is type(again.model).load_adapter  # afterwards PEFT's own
    expected, found = trained(first), trained(again)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in found.items())


def test_a_second_training_keeps_no_rollouts_and_no_synced_step_of_the_first(make_trainer, monkeypatch):
    """vLLM would skip the sync of new weights at a step whose number it has seen in the run before."""
    trainer, began = make_trainer(), []
    monkeypatch.setattr(
        Trainer, "train", lambda self, *_: began.append((self._step, self._buffered_inputs, self._last_loaded_step))
    )
    trainer._step, trainer._buffered_inputs, trainer._last_loaded_step = 3, [{}], 0
    trainer.train()
    assert began == [(0, None, -1)]
