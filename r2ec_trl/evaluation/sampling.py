"""G sampled reasonings a user with their ranks: what a reward is tried on, and what "best of G" chooses from."""

import inspect
from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from r2ec_trl.evaluation.users import rank_users
from r2ec_trl.items.encoding import make_encoder
from r2ec_trl.items.table import ItemTable
from r2ec_trl.policy.adapters import base_of
from r2ec_trl.policy.answer_state import pad_right
from r2ec_trl.policy.batching import length_sorted_batches
from r2ec_trl.policy.generation import generate_reasoning
from r2ec_trl.policy.prompts import Prompts
from r2ec_trl.policy.rollouts import MarkerReader, Rollout
from r2ec_trl.progress import track

LIKELIHOOD_SHARE = 8  # of the token budget: a forward of theirs holds logits of the whole vocabulary


@torch.no_grad()
def sample_reasonings(
    model: PreTrainedModel,
    reader: MarkerReader,
    prompt_ids: Sequence[Sequence[int]],
    num_samples: int,
    max_new_tokens: int,
    token_budget: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> list[Rollout]:
    """
    `num_samples` reasonings a prompt, prompt after prompt, from the policy's own distribution by default: T = 1, the
    whole vocabulary. The random state of the caller is left as it was.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": top_k}
    repeated = [ids for ids in prompt_ids for _ in range(num_samples)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return generate_reasoning(
            model, reader, repeated, max_new_tokens, batch_tokens=2 * token_budget, sampling=sampling
        )


@torch.no_grad()
def log_likelihoods(
    model: torch.nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    rollouts: Sequence[Rollout],
    pad_token_id: int,
    token_budget: int,
) -> list[float]:
    """Log-probability (nats) of the tokens that the policy wrote, one sum a rollout; appended markers do not count."""
    sequences = [[*prompt, *rollout.ids] for prompt, rollout in zip(prompt_ids, rollouts, strict=True)]
    found = [0.0] * len(sequences)
    short = "logits_to_keep" in inspect.signature(base_of(model).forward).parameters
    for batch in track(_logit_batches(prompt_ids, sequences, token_budget, short), "likelihoods"):
        input_ids, mask = pad_right([sequences[i] for i in batch], pad_token_id, next(model.parameters()).device)
        first = min(len(prompt_ids[i]) for i in batch) - 1 if short else 0  # the first position whose logits are read
        only = {"logits_to_keep": input_ids.shape[1] - first} if short else {}
        logits = model(input_ids=input_ids, attention_mask=mask, **only).logits  # (rows, length - first, V)
        for row, i in enumerate(batch):
            start, written = len(prompt_ids[i]), sum(rollouts[i].trained)
            scores = logits[row, start - 1 - first : start - 1 - first + written].float().log_softmax(-1)
            found[i] = scores.gather(1, input_ids[row, start : start + written, None]).sum().item()
    return found


def _logit_batches(
    prompt_ids: Sequence[Sequence[int]], sequences: Sequence[Sequence[int]], token_budget: int, short: bool
) -> list[list[int]]:
    """Rows of a forward: `token_budget` tokens, logits of a share of them."""
    batches = []
    for batch in length_sorted_batches([len(ids) for ids in sequences], token_budget):
        skipped = min(len(prompt_ids[i]) for i in batch) - 1 if short else 0
        rows = max(1, token_budget // LIKELIHOOD_SHARE // (len(sequences[batch[0]]) - skipped))
        batches += [batch[i : i + rows] for i in range(0, len(batch), rows)]
    return batches


@torch.no_grad()
def sample_users(
    model: PreTrainedModel,
    prompts: Prompts,
    table: ItemTable,
    users: Dataset,
    num_samples: int,
    max_new_tokens: int,
    item_temperature: float,
    token_budget: int = 16_384,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> tuple[pl.DataFrame, list[Rollout]]:
    """
    Rank every user's target in the whole catalogue after each of G sampled reasonings.

    Args:
        model, prompts, table:
            The policy, its prompt maker and the item table encoded with it.
        users ([`~datasets.Dataset`]):
            Rows of `user_id`, `history`, `target` and what the prompts use.
        num_samples (`int`):
            G.
        max_new_tokens (`int`), item_temperature (`float`), token_budget (`int`):
            Longest reasoning, τ, and tokens of a forward.
        temperature (`float`, *optional*, defaults to `1.0`), top_k (`int`, *optional*, defaults to `0`):
            Of the sampling; 0 leaves the whole vocabulary.
        seed (`int`, *optional*, defaults to `0`):
            Of the sampling.

    Returns:
        `polars.DataFrame` of users · G rows, user after user, and the rollouts. Columns: those of
        [`~r2ec_trl.evaluation.users.evaluate_users`], and `row` (the user's number), `target_prob` (M2),
        `target_score`, `log_likelihood` (of the reasoning, nats), `completion` (the text as the policy wrote it, as
        rewards see it) and `completion_ids`.
    """
    reader = MarkerReader(prompts.tokenizer, prompts.config.marker)
    user_ids = [prompts.user_ids(user) for user in users]
    rollouts = sample_reasonings(
        model, reader, user_ids, num_samples, max_new_tokens, token_budget, temperature, top_k, seed
    )
    row = np.repeat(np.arange(len(users)), num_samples)
    prompt_ids = [user_ids[i] for i in row]
    sequences = [[*prompt, *rollout.ids] for prompt, rollout in zip(prompt_ids, rollouts, strict=True)]
    lengths = [len(prompt) for prompt in prompt_ids]
    states = table.project(make_encoder(model, prompts, token_budget)(sequences, prompt_lengths=lengths))
    states = states.to(table.device)
    histories = [table.row_indices(history) for history in users["history"][:]]
    each = [histories[i] for i in row]
    frame, scores = rank_users(prompts, table, users.select(row), each, states, rollouts, item_temperature)
    written = [rollout.ids[: sum(rollout.trained)] for rollout in rollouts]
    columns = {
        "target_prob": scores.logprob.exp().tolist(),
        "target_score": scores.score.tolist(),
        "log_likelihood": log_likelihoods(model, prompt_ids, rollouts, prompts.tokenizer.pad_token_id, token_budget),
        "completion": prompts.tokenizer.batch_decode(written, skip_special_tokens=True),
        "completion_ids": [rollout.ids for rollout in rollouts],
    }
    return frame.insert_column(0, pl.Series("row", row)).hstack(pl.DataFrame(columns)), rollouts


def most_likely(frame: pl.DataFrame) -> list[int]:
    """Of each user's samples the one the policy finds most likely, as places in the frame; the first among equals."""
    found = frame.with_row_index("place").sort("row", -pl.col("log_likelihood"), "place", maintain_order=True)
    return found.group_by("row", maintain_order=True).first()["place"].to_list()
