"""RecPO's objective as pure functions, one equation each (paper §3: M4, M6, M7, M8). Tensors in, tensors out."""

import torch
import torch.nn.functional as F

from r2ec_trl.errors import UserError


def rloo_factor(group_sizes: torch.Tensor) -> torch.Tensor:
    """
    What turns `R_i - mean R` into RLOO's `R_i - mean_{j≠i} R_j` (M4): n / (n - 1), 1 for a group of one.

    Rewards 1, 2, 6 have mean 3, so R - mean = -2, -1, 3; times 3/2: -3, -1.5, 4.5 = 1-4, 2-3.5, 6-1.5.

    >>> rloo_factor(torch.tensor([3, 1]))
    tensor([1.5000, 1.0000])
    """
    sizes = group_sizes.float()
    return torch.where(sizes > 1, sizes / (sizes - 1).clamp(min=1), torch.ones_like(sizes))


def reward_spread(rewards: torch.Tensor, num_generations: int, summed: bool) -> torch.Tensor:
    """
    How far the rewards of each group deviate: the standard deviation of its scored rollouts, 0 where none is.

    Args:
        rewards (`torch.Tensor` of shape `(B*G, reward functions)`):
            Weighted, NaN where a function had nothing to say.
        num_generations (`int`):
            G.
        summed (`bool`):
            Of the sum of a rollout's rewards; else the largest of any function's.

    >>> reward_spread(torch.tensor([[0.0], [1.0], [0.5], [torch.nan]]), 2, summed=True)
    tensor([0.5000, 0.0000], dtype=torch.float64)
    """
    rewards = rewards.double()  # in which equal float32 numbers have exactly their mean
    if summed:
        rewards = rewards.nansum(dim=1, keepdim=True).masked_fill(rewards.isnan().all(dim=1, keepdim=True), torch.nan)
    grouped = rewards.view(-1, num_generations, rewards.shape[1])
    variance = (grouped - grouped.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1)  # (groups, functions)
    return variance.nan_to_num(nan=0.0).amax(dim=1).sqrt()


def item_credit_weights(
    advantages: torch.Tensor, num_generations: int, credit: int | None, eligible: torch.Tensor
) -> torch.Tensor:
    """
    δ_{i,i*} of M7: 1 for the `credit` best rollouts of each group, 0 elsewhere; ties go to the lowest index.

    Args:
        advantages (`torch.Tensor` of shape `(B*G,)`):
            Advantages, groups in a row.
        num_generations (`int`):
            G.
        credit (`int` or `None`):
            How many rollouts a group carry the item term: 1 is the paper's, `None` all.
        eligible (`torch.Tensor` of shape `(B*G,)`):
            Rollouts that may carry it (masked truncated ones may not).

    >>> item_credit_weights(torch.tensor([1., 1., -2., 0., 3., -3.]), 3, 1, torch.tensor([1, 1, 1, 1, 0, 1]).bool())
    tensor([1., 0., 0., 1., 0., 0.])
    """
    grouped = advantages.masked_fill(~eligible, -torch.inf).view(-1, num_generations)  # (B, G)
    keep = num_generations if credit is None else min(credit, num_generations)
    best = grouped.argsort(dim=1, descending=True, stable=True)[:, :keep]
    weights = torch.zeros_like(grouped).scatter(1, best, 1.0)
    return weights.view(-1) * eligible


def candidate_logprobs(
    states: torch.Tensor, candidates: torch.Tensor, positions: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    log π(v+ | x, o) of M6: log-softmax of h·h_v'/τ over the candidates, at the target.

    Args:
        states (`torch.Tensor` of shape `(n, d)`):
            Answer states, projected as the table's rows are.
        candidates (`torch.Tensor` of shape `(C, d)`):
            Rows of the distinct candidates: a target that several users share stands once, so it is never a negative
            of itself.
        positions (`torch.Tensor` of shape `(n,)`):
            Where each row's target stands among the candidates.
        temperature (`float`):
            τ.

    Returns:
        `torch.Tensor` of shape `(n,)`, float32.
    """
    with torch.autocast(states.device.type, enabled=False):
        logits = states.float() @ candidates.float().T / temperature  # (n, C)
        return -F.cross_entropy(logits, positions, reduction="none")


def clipped_objective(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
    delta: float | None = None,
) -> torch.Tensor:
    """
    ℓ(r, A) = min(rA, clip(r, 1-ε_low, 1+ε_high) A) of M7, elementwise, with r = exp(logprobs - old_logprobs); the
    first r is at most TRL's `delta`, where there is one.

    >>> clipped_objective(torch.tensor([.5, -.5]).exp().log(), torch.zeros(2), torch.tensor([1., -1.]), .2, .28)
    tensor([ 1.2800, -0.8000])
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return torch.min(ratio.clamp(max=delta) * advantages if delta else ratio * advantages, clipped * advantages)


def sapo_objective(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, positive: float, negative: float
) -> torch.Tensor:
    """
    TRL's SAPO for one action: a soft gate of the ratio, of one temperature for A > 0 and another for the rest.

    >>> sapo_objective(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, -1.0]), 1.0, 2.0)
    tensor([ 2., -1.])
    """
    temperatures = torch.where(advantages > 0, positive, negative)
    return torch.sigmoid(temperatures * (torch.exp(logprobs - old_logprobs) - 1)) * 4 / temperatures * advantages


def cispo_objective(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, cap: float
) -> torch.Tensor:
    """
    TRL's CISPO for one action: A log π, weighed by the ratio, which is capped (at `epsilon_high`) and has no gradient.

    >>> cispo_objective(torch.tensor([-1.0]), torch.tensor([-3.0]), torch.tensor([2.0]), 5.0)
    tensor([-10.])
    """
    return torch.exp(logprobs - old_logprobs).clamp(max=cap).detach() * advantages * logprobs


def token_normalizer(
    loss_type: str,
    mask: torch.Tensor,
    generation_tokens: torch.Tensor,
    max_length: int,
    accumulation: int,
    steps_per_generation: int,
) -> torch.Tensor:
    """
    What TRL divides one token's loss by, so that M7 can weigh an item like one more token of its rollout.

    Args:
        loss_type (`str`):
            TRL's.
        mask (`torch.Tensor` of shape `(rows, T)`):
            Trained tokens of the micro-batch.
        generation_tokens (`torch.Tensor`, a scalar):
            Trained tokens of the generation batch, a process's share of them.
        max_length (`int`):
            `max_completion_length`.
        accumulation (`int`):
            Micro-batches an optimizer step.
        steps_per_generation (`int`):
            Micro-batches a generation batch.

    Returns:
        `torch.Tensor`: a scalar, or one value a row where a row's own length counts.

    >>> mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    >>> names = ("dapo", "bnpo", "luspo", "grpo")
    >>> [token_normalizer(name, mask, torch.tensor(50.0), 4, 2, 1).tolist() for name in names]
    [100.0, 10.0, 4.0, [16.0, 4.0]]
    """
    rows = torch.tensor(float(len(mask)), device=mask.device)
    if loss_type in ("dapo", "cispo", "vespo"):
        return generation_tokens * accumulation / steps_per_generation
    if loss_type in ("grpo", "sapo"):  # a mean over rows of means over tokens
        return mask.sum(dim=1).clamp(min=1.0) * rows * accumulation
    if loss_type == "bnpo":
        return mask.sum().clamp(min=1.0) * accumulation
    if loss_type == "dr_grpo":
        return rows * max_length * accumulation
    if loss_type == "luspo":  # a mean over rows of sums over tokens
        return rows * accumulation
    raise UserError(f"`loss_type` {loss_type!r} is not known to the item term; add `--item_coef 0`, or use 'dapo'.")


def contrastive_loss(
    states: torch.Tensor, candidates: torch.Tensor, positions: torch.Tensor, temperature: float
) -> torch.Tensor:
    """M8: -log softmax of h_u·h_v'/τ over the batch's distinct targets, at v+; the mean over users (a scalar)."""
    return -candidate_logprobs(states, candidates, positions, temperature).mean()


def mean_pairwise_cosine(rows: torch.Tensor) -> torch.Tensor:
    """
    Mean cosine of all pairs of distinct rows of `(n, d)`: 1 means that the table has collapsed.

    Orthogonal unit rows a, b and a again: pairs 0, 1, 0, so 1/3.

    >>> mean_pairwise_cosine(torch.tensor([[1., 0.], [0., 2.], [3., 0.]]))
    tensor(0.3333)
    """
    unit = F.normalize(rows.float(), dim=1)
    count = len(rows)
    return (unit.sum(0).square().sum() - count) / (count * (count - 1))
