"""
Evaluate a policy on a dataset folder: greedy reasoning, then the whole catalogue.

    accelerate launch recipes/evaluate.py --dataset DATASET_FOLDER --model_name_or_path MODEL --adapter ADAPTER
    accelerate launch recipes/evaluate.py ... --reasoning full none truncated other     # does the reasoning help?
    python recipes/evaluate.py ... --engine vllm                                      # reasonings at vLLM's speed

Prints Hit / NDCG / MRR @5/10/20 with and without the history mask and 95 % bootstrap intervals, popularity and
item-to-item counts beside them, and cold targets apart; writes `metrics.json` and `ranks.parquet` with the protocol
inside, one folder a reasoning mode. `recipes/compare.py` compares two such folders user by user.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from r2ec_trl.answer_state import add_answer_state
from r2ec_trl.cli import parse, run
from r2ec_trl.evaluation import REASONING_MODES, evaluate_users, make_encoder, make_table
from r2ec_trl.loading import DataArguments, PolicyArguments, load_dataset, load_policy
from r2ec_trl.prompts import Prompts
from r2ec_trl.recpo_config import RecommendationArguments
from r2ec_trl.rollouts import MarkerReader, Rollout, generate_reasoning
from r2ec_trl.run_report import first_rows, settings_of, write_evaluation
from r2ec_trl.vllm_engine import generate_reasoning_vllm, load_engine


@dataclass
class EvaluateArguments(DataArguments, RecommendationArguments):
    """What is evaluated, and how."""

    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of the results."})
    split: str = field(
        default="test", metadata={"help": "Split to evaluate.", "choices": ["train", "validation", "test"]}
    )
    reasoning: list[str] = field(
        default_factory=lambda: ["full"], metadata={"help": f"One or more of {', '.join(REASONING_MODES)}."}
    )
    max_completion_length: int = field(default=512, metadata={"help": "Longest reasoning in tokens."})
    engine: str = field(
        default="transformers",
        metadata={"help": "What writes the reasonings.", "choices": ["transformers", "vllm"]},
    )
    bf16: bool = field(default=False, metadata={"help": "Run forwards in bfloat16 (the scores stay float32)."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap and of whose reasoning is swapped."})


def write_reasonings(
    args: EvaluateArguments, model: PreTrainedModel, reader: MarkerReader, prompt_ids: list[list[int]]
) -> list[Rollout]:
    """Greedy reasonings of all users, by the engine that is named."""
    if args.engine == "transformers":
        budget = 2 * args.forward_token_budget
        return generate_reasoning(model, reader, prompt_ids, args.max_completion_length, budget)
    llm = load_engine(model, args.max_prompt_length + args.max_completion_length)
    return generate_reasoning_vllm(llm, reader, prompt_ids, args.max_completion_length)


def main() -> None:
    args, policy_args = parse((EvaluateArguments, PolicyArguments), description=__doc__)
    accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
    dataset, card = load_dataset(args.dataset, args.output_dir)
    args.category = args.category or card["category"]
    users = first_rows(dataset[args.split], args.max_eval_users)
    model, tokenizer = load_policy(policy_args)
    add_answer_state(model.get_base_model() if hasattr(model, "get_base_model") else model)
    model = model.to(accelerator.device).eval()
    prompts = Prompts(tokenizer, args.prompt_config(), dataset["items"])
    table = make_table(prompts, dataset["items"], args.similarity, accelerator.device)
    reader = MarkerReader(tokenizer, args.marker)
    with torch.no_grad(), accelerator.autocast():
        table.refresh(make_encoder(model, prompts, args.forward_token_budget))
        rollouts = None
        if set(args.reasoning) != {"none"}:
            ids = [prompts.user_ids(user) for user in users]
            rollouts = write_reasonings(args, model, reader, ids)
        for reasoning in args.reasoning:
            frame = evaluate_users(
                model,
                prompts,
                table,
                users,
                args.max_completion_length,
                args.item_temperature,
                reasoning,
                args.forward_token_budget,
                rollouts=rollouts,
            )
            folder = Path(args.output_dir) if len(args.reasoning) == 1 else Path(args.output_dir) / reasoning
            settings = settings_of(
                args,
                reasoning,
                max_completion_length=args.max_completion_length,
                model=model.config._name_or_path,
                adapter=policy_args.adapter,
            )
            write_evaluation(folder, frame, dataset, card, users, settings, args.seed, args.split)


if __name__ == "__main__":
    run(main)
