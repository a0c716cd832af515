"""
The objective (M1–M7 in the README) in float64, written from its equations and from nothing in the library: plain
loops, one rollout a forward, no padding, no fused head. Also `record`, which notes what a trainer really did.
"""

import contextlib
import math
import types
from dataclasses import dataclass, field

import pytest
import torch
from peft import get_peft_model


# ------------------------------------------------------------------------------------------------ what a trainer did
@dataclass
class Generation:
    """One generation batch: dataset rows, prompts, rollouts and rewards, in the order of generation."""

    rows: list
    prompts: list
    rollouts: list
    advantages: list
    output: dict


@dataclass
class MicroStep:
    """One micro-batch: its inputs, loss, gradient alone, the weights it saw and the step it belongs to."""

    inputs: dict
    loss: float
    gradient: dict
    weights: dict
    generation: int
    global_step: int


@dataclass
class Record:
    generations: list = field(default_factory=list)
    steps: list = field(default_factory=list)


def record(trainer) -> Record:
    """Train, and note every generation batch and micro-batch."""
    notes = Record()
    generate, compute, step = (
        trainer._generate_and_score_completions,
        trainer._compute_loss,
        trainer.training_step,
    )
    seen = []

    def noting_generate(inputs):
        output = generate(inputs)
        rollouts, prompts = trainer.batch.rollouts, [list(ids) for ids in trainer.batch.prompts]
        advantages = output["advantages"].tolist()
        notes.generations.append(Generation(inputs, prompts, rollouts, advantages, dict(output)))
        return output

    def noting_compute(model, inputs):
        seen.append(inputs)
        return compute(model, inputs)

    def gradients(model):
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    def noting_step(model, inputs, num_items_in_batch=None):
        before = gradients(model)
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        loss = step(model, inputs, num_items_in_batch).item()
        gradient = {name: after - before[name] for name, after in gradients(model).items()}
        where = len(notes.generations) - 1
        notes.steps.append(MicroStep(seen[-1], loss, gradient, weights, where, trainer.state.global_step))
        return torch.tensor(loss)

    trainer._generate_and_score_completions = noting_generate
    trainer._compute_loss = noting_compute
    trainer.training_step = noting_step
    trainer.train()
    return notes


def row_of(inputs: dict, generation: Generation, row: int) -> int:
    """Which rollout of the generation batch stands in a row of a (shuffled) micro-batch."""
    prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist()
    completion = inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist()
    found = [
        i
        for i, (ids, rollout) in enumerate(zip(generation.prompts, generation.rollouts, strict=True))
        if (ids, rollout.ids) == (prompt, completion)
    ]
    assert len(found) == 1, "the rollouts of a test must differ"
    return found[0]


# ------------------------------------------------------------------------------------------------------ the equations
def double_model(model, peft_config=None):
    """A fresh Llama, optionally with an adapter, that really computes in float64 (its norms would fall to float32)."""
    model = model.double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = types.MethodType(_rms_norm, module)
    model = model if peft_config is None else get_peft_model(model, peft_config).double()
    return model.eval()


def _rms_norm(self, x):
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def advantages_of(rewards: list[float], size: int, kind: str) -> list[float]:
    """M4, group by group."""
    result = []
    for start in range(0, len(rewards), size):
        group = rewards[start : start + size]
        for i, reward in enumerate(group):
            if kind == "rloo":
                others = group[:i] + group[i + 1 :]
                result.append(reward - sum(others) / len(others))
            else:
                mean = sum(group) / size
                std = math.sqrt(sum((r - mean) ** 2 for r in group) / (size - 1))
                result.append((reward - mean) / (std + 1e-4))  # TRL's guard against groups of equal rewards
    return result


def best_of(advantages: list[float], size: int, credit: int | None) -> list[bool]:
    """δ of M7: the `credit` highest of each group, the earlier one in a tie."""
    chosen = [False] * len(advantages)
    for start in range(0, len(advantages), size):
        order = sorted(range(start, start + size), key=lambda i: (-advantages[i], i))
        for i in order if credit is None else order[:credit]:
            chosen[i] = True
    return chosen


def surrogate(ratio, advantage: float, low: float, high: float):
    """ℓ of M7."""
    clipped = 1 - low if ratio < 1 - low else 1 + high if ratio > 1 + high else ratio
    return min(ratio * advantage, clipped * advantage, key=lambda value: float(torch.as_tensor(value).detach()))


def forward(model, ids: list[int]):
    """Logits `(T, vocabulary)` and last hidden states `(T, d)` of one sequence."""
    output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return output.logits[0], output.hidden_states[-1][0]


def unit(vector):
    return vector / vector.norm()


def token_logprobs(model, prompt: list[int], completion: list[int], temperature: float):
    """log π(o_t | x, o_<t) of every completion token, and the state at the last one."""
    logits, states = forward(model, prompt + completion)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    picked = [logprobs[len(prompt) + t - 1, token] for t, token in enumerate(completion)]
    return torch.stack(picked), unit(states[-1])


@dataclass
class Oracle:
    """M5–M7 for one generation batch: `terms` are the losses of its rollouts, whose sum is the loss."""

    table_ids: list  # item prompts of the whole catalogue
    targets: list  # row of each rollout's target
    prompts: list
    completions: list
    trained: list
    advantages: list
    size: int
    credit: int | None = 1
    low: float = 0.2
    high: float = 0.2
    tau: float = 0.05
    temperature: float = 1.0
    item_coef: float = 1.0
    token_coef: float = 1.0
    negatives: str = "batch"
    item_gradient: bool = True

    def rows(self, model):
        """Encodings of the distinct targets."""
        return {row: unit(forward(model, self.table_ids[row])[1][-1]) for row in sorted(set(self.targets))}

    def catalogue(self, model):
        with torch.no_grad():
            return {row: unit(forward(model, ids)[1][-1]) for row, ids in enumerate(self.table_ids)}

    def item_logprob(self, state, target: int, rows: dict):
        """M6's π(v+ | x, o)."""
        scores = torch.stack([state @ vector / self.tau for vector in rows.values()])
        return torch.log_softmax(scores, dim=0)[list(rows).index(target)]

    def actions(self, model, rows: dict, i: int):
        tokens, state = token_logprobs(model, self.prompts[i], self.completions[i], self.temperature)
        return tokens, self.item_logprob(state, self.targets[i], rows)

    @torch.no_grad()
    def old_actions(self, model):
        """log π_old of every action, and the catalogue of that moment."""
        self.constants = self.catalogue(model)
        rows = self._rows(model)
        self.old = [tuple(x.clone() for x in self.actions(model, rows, i)) for i in range(len(self.prompts))]

    def _rows(self, model):
        fresh = self.rows(model) if self.item_gradient else {row: self.constants[row] for row in set(self.targets)}
        return {**self.constants, **fresh} if self.negatives == "catalogue" else fresh

    def terms(self, model, only: int | None = None):
        """Token and item loss of every rollout, or of one."""
        count = sum(sum(mask) for mask in self.trained)
        carried = best_of(self.advantages, self.size, self.credit)
        rows = self._rows(model)
        result = []
        for i in range(len(self.prompts)) if only is None else [only]:
            tokens, item = self.actions(model, rows, i)
            old_tokens, old_item = self.old[i]
            token_loss = torch.zeros((), dtype=torch.float64)
            for t, mask in enumerate(self.trained[i]):
                ratio = (tokens[t] - old_tokens[t]).exp()
                token_loss = token_loss - mask * surrogate(ratio, self.advantages[i], self.low, self.high)
            item_loss = -carried[i] * surrogate((item - old_item).exp(), self.advantages[i], self.low, self.high)
            result.append((self.token_coef * token_loss + self.item_coef * item_loss) / count)
        return result


def gradient_of(value, model) -> dict:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    if not value.requires_grad:  # every action of the rollout is clipped
        return {name: torch.zeros_like(parameter) for name, parameter in zip(names, parameters, strict=True)}
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
    }


def distance(a: dict, b: dict) -> tuple[float, float]:
    """Norms of the difference of two gradients and of the second."""
    assert a.keys() == b.keys()
    difference = sum((a[name].double() - b[name].double()).square().sum().item() for name in a)
    return math.sqrt(difference), math.sqrt(sum(b[name].double().square().sum().item() for name in b))


@contextlib.contextmanager
def goes_red():
    """What is inside must fail: the mistake is back."""
    with pytest.raises(AssertionError):
        yield
