"""What a step costs, without a clock: tokens forwarded in each pass, item encodes, the largest tensor, padding."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from r2ec_trl.policy.shared_prompt import pack_rows, shared_batches

G, MARKER = 4, "<answer>"


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.fixture
def step(make_trainer, replay, chat_tokenizer):
    """`step(**settings)` trains one step, a group a micro-batch: trainer, and `(gradient, tokens)` of each forward."""
    marker = chat_tokenizer(MARKER, add_special_tokens=False)["input_ids"]

    def sample(prompt_ids, number):
        dice = random.Random(f"{prompt_ids}{number}")
        return [dice.randrange(10, 300) for _ in range(2 + number)] + marker

    def run(**settings):
        replay(sample)
        trainer = make_trainer(
            per_device_train_batch_size=G,
            gradient_accumulation_steps=4,
            max_steps=1,
            watch_steps=0,
            max_completion_length=16,
            **settings,
        )
        forwards = []
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda _, args, kwargs: forwards.append((torch.is_grad_enabled(), kwargs["input_ids"])), with_kwargs=True
        )
        trainer.train()
        return trainer, forwards

    return run


def test_every_pass_forwards_a_prompt_once_and_the_items_once_a_step(step):
    """
    P + ΣR + G - 1 tokens a group and pass (the prompt's last token stands before each completion): the reward
    pass of all groups, four micro-steps of one group each, and one encode of the candidates.
    """
    trainer, forwards = step()
    batch = trainer.batch
    groups = [
        len(batch.prompts[row]) - 1 + sum(len(rollout.ids) + 1 for rollout in batch.rollouts[row : row + G])
        for row in range(0, 4 * G, G)
    ]
    trained = [ids for gradient, ids in forwards if gradient]
    assert len(trained) == 4 + 1  # micro-steps, and the candidates' one encode
    assert sorted(ids.numel() for ids in trained[:4]) == sorted(groups) and {len(ids) for ids in trained[:4]} == {1}
    items = [len(trainer.table.token_ids[row]) for row in batch.candidates]
    assert len(trained[4]) == len(items) and trained[4].numel() == len(items) * max(items)
    scored = [ids for gradient, ids in forwards if not gradient and ids.shape[1] == max(groups)]
    assert len(scored) == 1 and scored[0].shape == (len(groups), max(groups))


def test_the_flat_twin_forwards_every_prompt_for_every_rollout(step):
    trainer, forwards = step(shared_prompt=False)
    lengths = [len(sequence) for sequence in trainer.batch.sequences]
    trained = [ids for gradient, ids in forwards if gradient]
    longest = [max(lengths[row : row + G]) for row in range(0, 4 * G, G)]
    assert sorted(ids.numel() for ids in trained[:4]) == sorted(G * length for length in longest)


def test_no_tensor_of_a_step_is_as_large_as_the_logits(step):
    """The LM head sees labelled positions alone, in TRL's tiles of 32,768 words; prompts have no logits."""
    with Largest() as largest:
        trainer, _ = step()
    batch, tile = trainer.batch, 32_768
    groups = [slice(row, row + G) for row in range(0, 4 * G, G)]
    labels = max(sum(len(rollout.ids) for rollout in batch.rollouts[rows]) for rows in groups)
    tokens = min(sum(map(len, batch.sequences[rows])) for rows in groups)
    assert largest.numel <= labels * tile and labels < 0.5 * tokens


def test_packed_rows_waste_less_than_a_twentieth():
    """Ragged groups: prompts of 150-300 tokens, completions of 20-60, in batches of 8,192 tokens."""
    draw = random.Random(0)
    sequences, lengths = [], []
    for group in range(96):
        length = draw.randrange(150, 300)
        prompt = [group] * length
        for _ in range(G):
            sequences.append(prompt + [7] * draw.randrange(20, 60))
            lengths.append(length)
    needed = forwarded = 0
    for rows in shared_batches(sequences, lengths, 8192):
        packed = pack_rows([sequences[r] for r in rows], [lengths[r] for r in rows], 0, "cpu", hidden_size=256)
        needed, forwarded = needed + int(packed.attended.sum()), forwarded + packed.input_ids.numel()
    assert forwarded < 1.05 * needed
    assert needed < 0.5 * sum(map(len, sequences))
