"""The contrastive trainer on short prompts."""

import pytest
from peft import LoraConfig

from r2ec_trl.training.contrastive_trainer import ContrastiveConfig, ContrastiveTrainer

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture
def make_contrastive(tiny_model, shop, chat_tokenizer, tmp_path):
    def make(family="llama", peft=True, train=None, callbacks=None, dropout=0.0, **settings):
        quick = {
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "item_temperature": 0.1,
            "user_template": "{history}",
            "item_template": "{fields}",
            "item_fields": ["title"],
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        return ContrastiveTrainer(
            tiny_model(family),
            shop["items"],
            ContrastiveConfig(output_dir=str(tmp_path), **{**quick, **settings}),
            train if train is not None else shop["train"],
            shop["validation"],
            chat_tokenizer,
            peft_config=LoraConfig(lora_dropout=dropout, **LORA) if peft else None,
            callbacks=callbacks,
        )

    return make
