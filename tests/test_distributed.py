"""
The same numbers on one process and on two, plain, under DDP and under every ZeRO stage: loss, gradients and
parameters after two SGD steps from replayed rollouts (tests/distributed_worker.py runs a case).

    python -m pytest -m distributed tests/test_distributed.py                     # every pair of values
    WHOLE_MATRIX=1 python -m pytest -m distributed tests/test_distributed.py      # all of it
"""

import dataclasses
import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.data.schema import load_dataset_folder
from r2ec_trl.errors import UserError
from r2ec_trl.evaluation.report import read_ranks
from r2ec_trl.policy.loading import PolicyArguments, load_policy
from r2ec_trl.training.checkpoints import is_whole
from r2ec_trl.training.contrastive_trainer import ContrastiveConfig

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "distributed_worker.py"
TOLERANCE = 1e-5
ROLLOUTS, GENERATIONS = 40, 8  # 20 rollouts a process: the middle one of five groups straddles two processes
TRAIN_ROWS = [3, 7, 11, 2, 35, 0, 1, 5, 6, 32]  # two batches; the first and the last user of each share a target
ENGINES = ("plain", "zero1", "zero2", "zero3")
PAIRS = [  # engine, processes, accumulation, weights: every pair of values occurs
    ("plain", 1, 2, "full"),
    ("plain", 1, 4, "lora"),
    ("plain", 2, 1, "full"),
    ("plain", 2, 2, "lora"),
    ("zero1", 1, 1, "lora"),
    ("zero1", 2, 4, "full"),
    ("zero1", 2, 2, "lora"),
    ("zero2", 2, 1, "full"),
    ("zero2", 1, 4, "lora"),
    ("zero2", 2, 2, "lora"),
    ("zero3", 2, 4, "lora"),
    ("zero3", 1, 2, "full"),
]
if os.environ.get("WHOLE_MATRIX"):
    PAIRS = list(itertools.product(ENGINES, (1, 2), (1, 2, 4), ("lora", "full")))
VARIANTS = {
    "checkpointing": {"gradient_checkpointing": True},
    "sliced": {"slice_table": True, "mask_history": True},
    "options": {
        "item_negatives": "catalogue",
        "item_credit": "all",
        "advantage": "rloo",
        "scale_rewards": "none",
        "num_iterations": 2,
        "max_steps": 4,
        "mask_truncated_completions": True,
        "mask_history": True,
    },
}
VARIANT_RUNS = [  # engine, processes, accumulation, weights, variant
    ("plain", 2, 2, "lora", "checkpointing"),
    ("plain", 2, 1, "full", "options"),
    ("zero2", 2, 2, "lora", "checkpointing"),
    ("zero3", 1, 2, "full", "checkpointing"),
    ("zero3", 2, 1, "lora", "options"),
    ("plain", 2, 4, "lora", "sliced"),
    ("zero3", 2, 2, "full", "sliced"),
]
SETTINGS = {
    "num_generations": GENERATIONS,
    "max_steps": 2,
    "max_completion_length": 8,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "temperature": 1.0,
    "top_k": 0,
    "item_temperature": 0.2,
    "item_coef": 3.0,
    "user_template": "Bought:\n{history}\nNext {category} after {marker}?",
    "item_template": "{fields}",
    "item_fields": ["title"],
    "shuffle_dataset": False,
    "gradient_checkpointing": False,
    "bf16": False,
    "logging_steps": 1,
    "watch_steps": 0,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch_words(engine: str, processes: int) -> list[str]:
    """The command line that starts a script under an engine on so many processes, without a GPU."""
    if engine == "plain" and processes == 1:
        return [sys.executable]
    if engine == "plain":
        words = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
        return [sys.executable, *words]
    config = ROOT / "accelerate_configs" / f"{engine}.yaml"
    words = ["-m", "accelerate.commands.launch", f"--config_file={config}", f"--num_processes={processes}"]
    return [sys.executable, *words, f"--main_process_port={free_port()}", "--num_machines=1", "--machine_rank=0"]


def launch(engine: str, processes: int, script: Path, *words: str, timeout: float = 300, check: bool = True):
    """Run a script under an engine; its output is shown when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if engine == "plain":
        environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(
        [*launch_words(engine, processes), str(script), *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode:
        pytest.fail(f"{engine} on {processes}: status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done


@pytest.fixture(scope="session")
def adapter_folder(tiny_model, tmp_path_factory):
    """A LoRA adapter with random weights of the tiny Llama, on disk: every process starts from the same one."""
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(tiny_model("llama"), lora).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def run_cases(tiny_model_folder, shop_folder, adapter_folder, tmp_path_factory):
    """`run_cases(engine, processes, cases)` trains each case, all in one launch, and returns the worker's records."""

    def run(engine, processes, cases):
        folder = tmp_path_factory.mktemp(f"{engine}-{processes}")
        written = [
            {
                "trainer": "recpo",
                "model": str(tiny_model_folder("llama")),
                "dataset": str(shop_folder),
                "adapter": str(adapter_folder) if case["weights"] == "lora" else None,
                "train_rows": TRAIN_ROWS,
                "output": str(folder / f"result{number}.pt"),
                "evaluate": True,
                **case,
                "settings": {"output_dir": str(folder / f"run{number}"), **case["settings"]},
            }
            for number, case in enumerate(cases)
        ]
        (folder / "cases.json").write_text(json.dumps(written))
        launch(engine, processes, WORKER, str(folder / "cases.json"), timeout=400 + 60 * len(cases))
        return [torch.load(case["output"], weights_only=False) for case in written]

    return run


@pytest.fixture(scope="session")
def results(run_cases):
    """`results(engine, processes)`: (accumulation, weights, variant) → record of all that is tested, in one launch."""

    @functools.cache
    def get(engine, processes):
        runs = [*[(*pair, None) for pair in PAIRS], *VARIANT_RUNS]
        wanted = [run[2:] for run in runs if run[:2] == (engine, processes)]
        if (engine, processes) == ("plain", 1):  # the reference: one process, one micro-batch a step, no engine
            variants = (None, "options", "sliced")  # one process holds all slices: an ordinary table
            wanted += [(1, weights, variant) for weights in ("lora", "full") for variant in variants]
        wanted = list(dict.fromkeys(wanted))
        cases = []
        for accumulation, weights, variant in wanted:
            batch = {"per_device_train_batch_size": ROLLOUTS // processes // accumulation}
            batch["gradient_accumulation_steps"] = accumulation
            cases.append({"weights": weights, "settings": {**SETTINGS, **batch, **VARIANTS.get(variant, {})}})
        return dict(zip(wanted, run_cases(engine, processes, cases), strict=True))

    return get


def distance(one: dict, other: dict) -> float:
    """Largest relative difference (in the 2-norm) of two runs' tensors of one kind."""
    assert one.keys() == other.keys()
    scale = max(value.norm().item() for value in other.values())
    return max(
        ((one[name] - other[name]).norm() / max(other[name].norm().item(), 1e-3 * scale)).item() for name in other
    )


def assert_engine(result, engine, processes):
    names = {"plain": "DistributedDataParallel" if processes > 1 else None}
    expected = names.get(engine, "DeepSpeedEngine")
    if expected is not None:
        assert result["engine"] == expected
    else:
        assert result["engine"] in ("LlamaForCausalLM", "PeftModelForCausalLM")
    assert result["stage"] == (None if engine == "plain" else int(engine[-1]))
    assert result["processes"] == processes


def assert_same_numbers(result, expected):
    loss = ((result["loss"] - expected["loss"]).abs() / expected["loss"].abs()).max().item()
    gradients = max(map(distance, result["gradients"], expected["gradients"]))
    parameters = distance(result["parameters"], expected["parameters"])
    print(f"relative difference: loss {loss:.1e}, gradients {gradients:.1e}, parameters {parameters:.1e}")
    assert max(loss, gradients, parameters) < TOLERANCE
    assert len(result["gradients"]) == len(expected["gradients"]) == result["logs"][-1]["step"]
    exact = ["user_id", "rank", "rank_masked", "reasoning", "top_item_ids"]  # users in order, whoever ranked them
    assert result["evaluation"][exact].equals(expected["evaluation"][exact])
    assert torch.allclose(result["table"], expected["table"], atol=1e-5)


@pytest.mark.parametrize(("engine", "processes", "accumulation", "weights"), PAIRS)
def test_same_numbers_everywhere(results, engine, processes, accumulation, weights):
    result = results(engine, processes)[accumulation, weights, None]
    assert_engine(result, engine, processes)
    assert_same_numbers(result, results("plain", 1)[1, weights, None])


@pytest.mark.parametrize(("engine", "processes", "accumulation", "weights", "variant"), VARIANT_RUNS)
def test_same_numbers_under_other_settings(results, engine, processes, accumulation, weights, variant):
    result = results(engine, processes)[accumulation, weights, variant]
    assert_engine(result, engine, processes)
    expected = (1, weights, None if variant == "checkpointing" else variant)
    assert_same_numbers(result, results("plain", 1)[expected])


def test_the_reference_run_trains_tokens_and_items(results):
    """What all runs are compared with is no zero: both terms carry loss and gradient."""
    for weights in ("lora", "full"):
        record = results("plain", 1)[1, weights, None]
        assert all(abs(row["item/loss"]) > 1e-3 and row["entropy"] > 0.1 for row in record["logs"] if "loss" in row)
        assert all(sum(value.norm() for value in step.values()) > 1e-2 for step in record["gradients"])


@pytest.mark.parametrize(("engine", "weights"), [("plain", "lora"), ("zero2", "lora"), ("zero3", "full")])
def test_two_processes_resume_to_the_same_numbers(run_cases, tmp_path, engine, weights):
    """Four AdamW steps, against two, a checkpoint and two more; the third starts the second epoch."""
    batch = {"per_device_train_batch_size": ROLLOUTS // 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    saving = {"save_strategy": "steps", "save_steps": 2, "shuffle_dataset": True, **batch}
    whole = {"weights": weights, "settings": {**SETTINGS, **batch, "shuffle_dataset": True, "max_steps": 4}}
    first = {"weights": weights, "settings": {**SETTINGS, **saving, "output_dir": str(tmp_path / "run")}}
    second = {**first, "resume": "latest", "settings": {**first["settings"], "max_steps": 4}}
    expected, _, resumed = run_cases(engine, 2, [whole, first, second])
    assert_engine(resumed, engine, 2)
    assert len(resumed["gradients"]) == 2
    assert distance(resumed["gradients"][0], expected["gradients"][2]) < TOLERANCE
    assert distance(resumed["parameters"], expected["parameters"]) < TOLERANCE
    assert torch.allclose(resumed["table"], expected["table"], atol=1e-5)
    assert is_whole(tmp_path / "run" / "checkpoint-4")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_checkpointing": True}, "--gradient_checkpointing false"),
        ({"ds3_gather_for_generation": False}, "leave it on"),
    ],
)
def test_zero3_refuses_what_deepspeed_cannot_do(monkeypatch, make_trainer, settings, words):
    monkeypatch.setattr("r2ec_trl.training.launch.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match=words):
        make_trainer(**settings)


def test_zero3_refuses_a_quantised_base(monkeypatch, tiny_model_folder):
    monkeypatch.setattr("r2ec_trl.policy.loading.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(UserError, match="zero2.yaml"):
        load_policy(PolicyArguments(model_name_or_path=str(tiny_model_folder("llama")), load_in_4bit=True))


def test_contrastive_training_and_evaluation_on_two_processes(run_cases):
    """Users of other processes are negatives too, and each process evaluates its share of the users."""
    shared = set(SETTINGS) & {field.name for field in dataclasses.fields(ContrastiveConfig)}
    shared -= {"num_generations", "temperature", "top_k"}  # of sampled reasonings
    records = []
    for processes in (1, 2):
        batch = {"per_device_train_batch_size": 6 // processes, "eval_strategy": "no"}
        settings = {**{name: SETTINGS[name] for name in shared}, **batch, "item_temperature": 1.0}
        case = {"trainer": "contrastive", "weights": "lora", "settings": settings}
        records += run_cases("plain", processes, [{**case, "train_rows": list(range(12))}])
    one, two = records
    assert_engine(two, "plain", 2)
    assert_same_numbers(two, one)


@pytest.mark.parametrize(
    ("engine", "flags"),
    [
        ("plain", ["--slice_table"]),
        ("zero2", ["--use_peft", "false"]),
        ("zero3", []),
        ("zero3", ["--use_peft", "false"]),
    ],
)
def test_the_bundle_of_two_processes_gives_their_figures(tmp_path, engine, flags):
    """Each process ranks its users by the bundle on disk; the sliced table was put together for it."""
    words = "--max_steps 2 --max_test_users 40 --eval_strategy no --save_strategy no --load_best_model_at_end false"
    batch = "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 --use_cpu --output_dir"
    recipe = ROOT / "recipes" / "recpo.py"
    launch(engine, 2, recipe, *words.split(), *batch.split(), str(tmp_path), *flags)
    ranks, _ = read_ranks(tmp_path)
    bundle = Bundle.load(tmp_path / "bundle")
    frame = bundle.evaluate(load_dataset_folder(tmp_path / "demo_dataset")["test"].select(range(40)))
    assert frame["user_id"].equals(ranks["user_id"]) and bundle.staleness()["max_drift"] < 1e-6
    assert (frame["rank"] == ranks["rank"]).mean() > 0.95  # other batches: the last bits may differ
    assert ("after" in bundle.meta.metrics) and bundle.meta.adapter is (not flags or engine == "plain")
