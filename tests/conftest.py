"""What the tests share: tiny models of three families, a byte-level tokenizer, a small shop. Nothing is downloaded."""

import functools
import os
import runpy
import shutil
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import datasets
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

torch.set_num_threads(1)

FAMILIES = ("guitar", "violin", "drum", "piano")
PARTS = ("strings", "stand", "case", "strap", "tuner", "cable", "bench", "polish", "lamp", "book")
BRANDS = ("fenta", "orvo", "kyra")
SPECIAL_TOKENS = ("<pad>", "<eos>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ '<|' + message.role + '|>\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def _shop_items() -> list[dict]:
    return [
        {
            "item_id": f"i{10 * family + part:02d}",
            "title": f"{FAMILIES[family]} {PARTS[part]}",
            "description": f"A {PARTS[part]} by {BRANDS[(family + part) % 3]} for every {FAMILIES[family]} player.",
            "brand": BRANDS[(family + part) % 3],
        }
        for family in range(4)
        for part in range(10)
    ]


def _shop_user(number: int) -> dict:
    """User u buys neighbouring parts for one instrument; the target is the next part."""
    family, start, length = number % 4, number // 4 % 10, 2 + number % 3
    history = [f"i{10 * family + (start + step) % 10:02d}" for step in range(length)]
    times = [1_700_000_000 + 86_400 * (number + 7 * step) for step in range(length)]
    return {
        "user_id": f"u{number:02d}",
        "history": history,
        "target": f"i{10 * family + (start + length) % 10:02d}",
        "history_ratings": [float(1 + (number + step) % 5) for step in range(length)],
        "history_timestamps": times,
        "timestamp": times[-1] + 86_400,
    }


@pytest.fixture(scope="session")
def shop() -> datasets.DatasetDict:
    """40 items; 40 users to train, 10 to validate, 10 to test. Never changed in place: use `.select()`."""
    users = [_shop_user(number) for number in range(60)]
    splits = {"train": users[:40], "validation": users[40:50], "test": users[50:], "items": _shop_items()}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})


@pytest.fixture(scope="session")
def shop_folder(shop, tmp_path_factory):
    """The shop as a dataset folder on disk; read only (copy it with `shutil.copytree` to break it)."""
    from r2ec_trl.data.schema import save_dataset_folder

    path = tmp_path_factory.mktemp("shop") / "dataset"
    words = {"source": "tests", "category": "instrument part", "category_plural": "instrument parts"}
    save_dataset_folder(shop, path, {**words, "dropped": {}, "split_rule": "by user number", "synthetic": True})
    return path


def _make_tokenizer(chat_template: str | None) -> transformers.PreTrainedTokenizerFast:
    texts = [f"{row['title']} {row['description']} The user bought this, next recommend" for row in _shop_items()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # No "<answer>" among the texts: the marker is several tokens, as in real models.
    backend.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=2048
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer():
    """Byte-level BPE whose chat template refuses a system turn, as Gemma's does."""
    return _make_tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def plain_tokenizer():
    """The same tokenizer without a chat template."""
    return _make_tokenizer(None)


@pytest.fixture(scope="session")
def tiny_model(chat_tokenizer):
    """`tiny_model("llama" | "qwen2" | "gemma2", seed=0, **config)` builds a model: 2 layers, head size 32, fp32."""

    def build(family: str = "llama", seed: int = 0, **overrides) -> transformers.PreTrainedModel:
        settings = {
            "vocab_size": len(chat_tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": chat_tokenizer.eos_token_id,
            "pad_token_id": chat_tokenizer.pad_token_id,
            "initializer_range": 0.2,  # the usual 0.02 leaves a model this small nearly uniform
        }
        if family == "gemma2":  # soft caps bite and the window is shorter than a prompt, or they would go untested
            settings |= {"query_pre_attn_scalar": 32, "sliding_window": 16, "attn_logit_softcapping": 5.0}
            settings["initializer_range"] = 0.05  # it scales its embeddings up by itself
            overrides = overrides | {"attn_implementation": "eager"}  # sdpa leaves the soft cap out
        config_class = {
            "llama": transformers.LlamaConfig,
            "qwen2": transformers.Qwen2Config,
            "gemma2": transformers.Gemma2Config,
        }[family]
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**(settings | overrides)))
        model.config.architectures = [type(model).__name__]
        return model.float().eval()

    return build


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_model, chat_tokenizer, tmp_path_factory):
    """`tiny_model_folder("llama")` is a folder with model and tokenizer, for `from_pretrained` and recipes."""

    @functools.cache
    def save(family: str = "llama"):
        path = tmp_path_factory.mktemp("models") / family
        tiny_model(family).save_pretrained(path)
        chat_tokenizer.save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session", params=["llama", "qwen2", "gemma2"])
def model_family(request) -> str:
    """Parametrises a test over the three families: `def test_x(tiny_model, model_family)`."""
    return request.param


QUICK = {
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_steps": 2,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "temperature": 1.0,
    "top_k": 0,
    "max_grad_norm": 0.0,  # no clipping: gradients are compared
    "user_template": "Bought:\n{history}\nNext {category} after {marker}?",
    "item_template": "{fields}",
    "item_fields": ["title"],
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def make_trainer(tiny_model, shop, chat_tokenizer, tmp_path):
    """
    `make_trainer(**settings)` builds a RecPOTrainer on short prompts. Besides RecPOConfig's fields it takes `family`,
    `model`, `tokenizer`, `peft` (default: LoRA), `reward` (default: the fused one), `train`, `validation` and
    `callbacks`.
    """
    from peft import LoraConfig

    from r2ec_trl.training.recpo_config import RecPOConfig
    from r2ec_trl.training.recpo_trainer import RecPOTrainer

    def build(
        family="llama",
        model=None,
        tokenizer=None,
        peft=True,
        reward=None,
        train=None,
        validation=None,
        callbacks=None,
        **settings,
    ):
        args = RecPOConfig(**{"output_dir": str(tmp_path / "run"), **QUICK, **settings})
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        return RecPOTrainer(
            model if model is not None else tiny_model(family),
            shop["items"],
            reward,
            args,
            train if train is not None else shop["train"],
            validation if validation is not None else shop["validation"],
            tokenizer or chat_tokenizer,
            callbacks=callbacks,
            peft_config=lora if peft else None,
        )

    return build


@pytest.fixture(scope="session")
def change_weights():
    """`change_weights(model)` moves all that is trained, as a training that nobody has to wait for."""

    def change(model):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)

    return change


@pytest.fixture
def replay(monkeypatch):
    """
    `replay(sample)` makes every trainer's sampler return `sample(prompt_ids, number)` for its number-th rollout of
    that prompt, instead of generating. Returns the list of what was handed out, `(prompt_ids, completion_ids)`.
    """
    from trl import GRPOTrainer

    def install(sample):
        given = []

        def generate(self, prompt_ids, *args, **kwargs):
            start = len(given)
            for ids in prompt_ids:
                number = sum(1 for earlier, _ in given[start:] if earlier == ids)
                given.append((ids, list(sample(ids, number))))
            return [completion for _, completion in given[start:]], None

        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)
        return given

    return install


PROTOCOL = {
    "reasoning": "full",
    "max_completion_length": 8,
    "item_temperature": 0.05,
    "forward_token_budget": 2048,
}
SHORT = {"user_template": "Bought:\n{history}\nNext {category}?", "item_template": "{fields}"}


@pytest.fixture(scope="session")
def make_bundle_folder(tiny_model_folder, chat_tokenizer, shop, tmp_path_factory):
    """`make_bundle_folder(seed=0, adapter=True, items=None, **prompt_fields)` writes a bundle of a tiny policy."""
    from peft import LoraConfig, get_peft_model

    from r2ec_trl.bundle.bundle import save_bundle
    from r2ec_trl.items.encoding import make_encoder, make_table
    from r2ec_trl.policy.answer_state import add_answer_state
    from r2ec_trl.policy.prompts import PromptConfig, Prompts

    def make(seed=0, adapter=True, items=None, **prompt_fields):
        base = tiny_model_folder("llama")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        if adapter:
            torch.manual_seed(seed)
            lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
            model = get_peft_model(model, lora)
        items = shop["items"] if items is None else items
        prompts = Prompts(chat_tokenizer, PromptConfig(category="part", **SHORT, **prompt_fields), items)
        add_answer_state(model.get_base_model() if adapter else model)
        table = make_table(prompts, items, "cosine", "cpu")
        with torch.no_grad():
            table.refresh(make_encoder(model.eval(), prompts, PROTOCOL["forward_token_budget"]))
        folder = tmp_path_factory.mktemp("bundle") / "bundle"
        card = {"source": "tests", "counts": {"items": len(items)}}
        return save_bundle(folder, model, prompts, table, items, protocol=PROTOCOL, dataset_card=card).folder

    return make


@pytest.fixture(scope="session")
def written(make_bundle_folder):
    """A bundle on disk: read only."""
    return make_bundle_folder()


@pytest.fixture
def own(written, tmp_path):
    """A copy of the bundle that a test may change."""
    return shutil.copytree(written, tmp_path / "own")


# -- for tests/serving, which skips itself where the extra `serve` is missing
@pytest.fixture(scope="module")
def served_folder(make_bundle_folder, shop):
    """The demo's bundle, if R2EC_TRL_BUNDLE names it; else a tiny one."""
    items = shop["items"].add_column("price", [None if n == 5 else float(n) for n in range(40)])
    return os.environ.get("R2EC_TRL_BUNDLE") or make_bundle_folder(items=items)


@pytest.fixture(scope="module")
def served(served_folder):
    from served import Served

    server = Served(served_folder, max_queue=64)
    yield server
    server.close()


@pytest.fixture(scope="module")
def library(served_folder):
    from r2ec_trl.serving.recommender import Recommender

    return Recommender.from_pretrained(served_folder)


@pytest.fixture
def changing(own):
    """A server whose catalogue the test may change."""
    from served import Served

    server = Served(own, body_seconds=0.5, max_body=4096)
    yield server
    server.close()


@pytest.fixture(scope="session")
def launch():
    """`launch("recpo", *words, out=folder, patch={})` runs a recipe in this process, some of its names replaced."""

    def call(recipe, *words, out=None, patch=None):
        main = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / f"{recipe}.py"))["main"]
        main.__globals__.update(patch or {})
        with pytest.MonkeyPatch.context() as monkeypatch:
            output = [] if out is None else ["--output_dir", str(out)]
            monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *output, *map(str, words)])
            main()

    return call
