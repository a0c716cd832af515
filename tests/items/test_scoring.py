"""Ranks, log-probabilities and best items against a plain twin that holds the full (B, N) matrix."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from r2ec_trl.errors import UserError
from r2ec_trl.items import scoring
from r2ec_trl.items.scoring import CatalogueScores, exclusion_matrix, normalise, target_rank_and_logprob, top_k


@pytest.fixture(autouse=True, params=["float64", "float32"])
def precision(request, monkeypatch):
    """Every test twice: small catalogues as they are, and as if they were large ones, with one float32 product."""
    if request.param == "float32":
        monkeypatch.setattr("r2ec_trl.items.scoring.FLOAT64_PRODUCTS", 0)
    return request.param


def same(one, other, precision="float64"):
    """Equal ranks and scores; the log-sum-exp of a float32 product depends on its shape in the last digits."""
    assert torch.equal(one.rank, other.rank) and torch.equal(one.score, other.score)
    tolerance = 0 if precision == "float64" else 1e-5
    torch.testing.assert_close(one.logprob, other.logprob, atol=tolerance, rtol=tolerance, equal_nan=True)


def twin(states, rows, targets, temperature, histories, keep_target):
    """Rank and log-probability the plain way: one full matrix, one Python loop."""
    scores = (states.double() @ rows.double().T).float()  # (B, N)
    ranks, logprobs = [], []
    for line, target, history in zip(scores, targets.tolist(), histories, strict=True):
        available = [item for item in range(len(rows)) if item not in history or (keep_target and item == target)]
        if target not in available:
            ranks.append(len(rows) + 1)
            logprobs.append(-math.inf)
            continue
        ranks.append(1 + sum(bool(line[item] >= line[target]) for item in available if item != target))
        logprobs.append((line[target] / temperature - torch.logsumexp(line[available] / temperature, 0)).item())
    return torch.tensor(ranks), torch.tensor(logprobs)


def problem(num_states=6, num_items=50, size=16, seed=0, history=4):
    """Unit vectors, with duplicate rows (items of equal text), histories with duplicates, and a repeat target."""
    generator = torch.Generator().manual_seed(seed)
    states = normalise(torch.randn(num_states, size, generator=generator), "cosine")
    rows = normalise(torch.randn(num_items, size, generator=generator), "cosine")
    rows[-1] = rows[num_items // 2] = rows[0]
    targets = torch.randint(num_items, (num_states,), generator=generator)
    targets[0] = 0
    histories = torch.randint(num_items, (num_states, history), generator=generator).tolist()
    histories[-1] = [targets[-1].item()] * history
    return states, rows, targets, histories


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        self.elements = max([self.elements, *(out.numel() for out in outputs if isinstance(out, torch.Tensor))])
        self.products += func is torch.ops.aten.mm.default
        return result


def test_hand_worked():
    """Scores .6 .8 .6 .1 for the target at row 0: .8 is better, the other .6 is equal, so the rank is 3.

    At temperature .2 the exponents are 3, 4, 3, .5: log-probability 3 - log(2e^3 + e^4 + e^.5) = -1.568.
    """
    rows = torch.tensor([[0.6], [0.8], [0.6], [0.1]])
    result = target_rank_and_logprob(torch.tensor([[1.0]]), rows, torch.tensor([0]), temperature=0.2)
    assert result.rank.tolist() == [3] and result.rank.dtype == torch.int64
    expected = 3 - math.log(2 * math.exp(3) + math.exp(4) + math.exp(0.5))
    assert result.logprob.item() == pytest.approx(expected, abs=1e-6) and result.logprob.dtype == torch.float32
    assert result.score.tolist() == pytest.approx([0.6])


def test_excluded_rows_neither_count_nor_are_in_the_softmax():
    """Without row 1 (.8), named twice, the target of score .6 has the equal one before it: rank 2, probability 1/2."""
    rows = torch.tensor([[0.6], [0.8], [0.6]])
    excluded = torch.tensor([[1, 1, -1]])
    result = target_rank_and_logprob(
        torch.tensor([[1.0]]), rows, torch.tensor([0]), temperature=0.2, excluded=excluded
    )
    assert result.rank.tolist() == [2]
    assert result.logprob.exp().item() == pytest.approx(0.5)


def test_repeat_target_is_kept_in_training_and_a_miss_in_masked_evaluation():
    arguments = (torch.tensor([[1.0]]), torch.tensor([[0.6], [0.8], [0.5]]), torch.tensor([0]))
    excluded = torch.tensor([[0, 0]])
    kept = target_rank_and_logprob(*arguments, temperature=0.2, excluded=excluded)
    missed = target_rank_and_logprob(*arguments, temperature=0.2, excluded=excluded, keep_target=False)
    assert kept.rank.tolist() == [2] and math.isfinite(kept.logprob.item())
    assert missed.rank.tolist() == [4] and missed.logprob.tolist() == [-math.inf]


def test_padding_excludes_no_row(precision):
    """-1 is padding, not the last row (mistake 17 the other way round: a real row must not be lost to padding)."""
    states, rows, targets, _ = problem()
    plain = target_rank_and_logprob(states, rows, targets, temperature=0.02)
    padded = target_rank_and_logprob(
        states, rows, targets, temperature=0.02, excluded=torch.full((6, 3), -1), chunk_size=7
    )
    same(plain, padded, precision)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_states=st.integers(1, 5),
    num_items=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    chunk_size=st.integers(1, 45),
    keep_target=st.booleans(),
)
def test_agrees_with_the_twin(num_states, num_items, seed, chunk_size, keep_target):
    states, rows, targets, histories = problem(num_states, num_items, 3, seed)
    result = target_rank_and_logprob(
        states,
        rows,
        targets,
        temperature=0.1,
        excluded=exclusion_matrix(histories),
        keep_target=keep_target,
        chunk_size=chunk_size,
    )
    ranks, logprobs = twin(states, rows, targets, 0.1, histories, keep_target)
    assert torch.equal(result.rank, ranks)
    torch.testing.assert_close(result.logprob, logprobs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep_target", [True, False])
@pytest.mark.parametrize("num_states", [1, 2, 17])
def test_the_same_for_every_chunk_size(num_states, keep_target, precision):
    states, rows, targets, histories = problem(num_states, 1500, 96)
    arguments = dict(temperature=0.02, excluded=exclusion_matrix(histories), keep_target=keep_target)
    one = target_rank_and_logprob(states, rows, targets, **arguments)
    best = top_k(states, rows, 30, excluded=arguments["excluded"])
    for chunk_size in (7, 500, 1499, 1500):
        other = target_rank_and_logprob(states, rows, targets, **arguments, chunk_size=chunk_size)
        same(one, other, precision)
        again = top_k(states, rows, 30, excluded=arguments["excluded"], chunk_size=chunk_size)
        assert all(torch.equal(a, b) for a, b in zip(best, again, strict=True)), chunk_size


def test_a_row_does_not_depend_on_the_batch_around_it(precision):
    states, rows, targets, _ = problem(17, 1500, 96)
    batch = target_rank_and_logprob(states, rows, targets, temperature=0.02)
    for user in (0, 5, 16):
        alone = target_rank_and_logprob(states[user : user + 1], rows, targets[user : user + 1], temperature=0.02)
        same(CatalogueScores(*(part[user : user + 1] for part in batch)), alone, precision)


@pytest.mark.parametrize("num_states", [1, 4])
def test_equal_rows_tie_wherever_they_stand(num_states):
    """A float32 product gives equal rows unequal scores at some shapes, so a tie would be broken by rounding."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(num_states, 576, generator=generator)
    rows = torch.randn(1, 576, generator=generator).expand(1003, 576).contiguous()
    for chunk_size in (None, 17, 1000):
        result = target_rank_and_logprob(
            states, rows, torch.arange(num_states), temperature=1.0, chunk_size=chunk_size
        )
        assert result.rank.tolist() == [1003] * num_states
        assert top_k(states, rows, 3, chunk_size=chunk_size)[1].tolist() == [[0, 1, 2]] * num_states


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["duplicates", "near", "collapsed", "long rows", "huge", "ascending"]),
    chunk_size=st.sampled_from([None, 7, 64, 200]),
    temperature=st.sampled_from([0.02, 0.001]),
    half=st.booleans(),
)
def test_ranks_ties_and_best_items_of_adversarial_tables(seed, kind, chunk_size, temperature, half):
    """Duplicates of targets, rows 1e-7 apart, all rows alike, mixed lengths, products beyond float32."""
    generator = torch.Generator().manual_seed(seed)
    states, rows, targets, histories = problem(5, 300, 24, seed)
    if kind in ("duplicates", "near"):
        rows = rows[torch.randint(20, (300,), generator=generator)]
    if kind == "near":
        rows = rows + 1e-7 * torch.randn(rows.shape, generator=generator)
    if kind == "collapsed":
        rows = normalise(rows[:1] + 1e-6 * rows, "cosine")
    if kind == "long rows":
        rows = rows * 10.0 ** torch.randint(-3, 4, (300, 1), generator=generator)
    if kind == "huge":
        states, rows = states * 1e18, rows * 1e20
    if kind == "ascending":
        rows = rows[(states[0] @ rows.T).argsort()]
    rows = rows.half() if half and kind != "huge" else rows
    excluded = exclusion_matrix(histories)
    result = target_rank_and_logprob(
        states, rows, targets, temperature=temperature, excluded=excluded, chunk_size=chunk_size
    )
    ranks, logprobs = twin(states, rows.float(), targets, temperature, histories, True)
    assert torch.equal(result.rank, ranks)
    if kind != "huge":
        largest = (states.norm(dim=1).max() * rows.float().norm(dim=1).max()).item() / temperature
        torch.testing.assert_close(result.logprob, logprobs, atol=3e-6 * max(largest, 1), rtol=1e-5)
    scores = (states.double() @ rows.double().T).float()
    for line, history in zip(scores, histories, strict=True):
        line[history] = -math.inf
    expected = scores.sort(dim=1, descending=True, stable=True)
    values, indices = top_k(states, rows, 12, excluded=excluded, chunk_size=chunk_size)
    assert torch.equal(indices, expected.indices[:, :12]) and torch.equal(values, expected.values[:, :12])


def test_a_table_that_was_written_to_is_measured_again(precision):
    """The bound follows the longest row, which is remembered: one row a million times as long as the others."""
    states, rows, targets, _ = problem(4, 500, 16)
    target_rank_and_logprob(states, rows, targets, temperature=1.0)
    rows[7] *= 1e6
    assert torch.equal(
        target_rank_and_logprob(states, rows, targets, temperature=1.0).rank,
        twin(states, rows, targets, 1.0, [[]] * 4, True)[0],
    )
    if precision == "float32":
        assert scoring._longest(rows) == pytest.approx(1e6)


@pytest.mark.parametrize("kernels", ["high", "medium"])
def test_kernels_of_reduced_precision_leave_every_pair_to_float64(monkeypatch, kernels):
    """TF32 has steps of 2^-11 and bfloat16 of 2^-8, where the bound counts on float32's 2^-24."""
    monkeypatch.setattr(scoring, "FLOAT64_PRODUCTS", 0)
    states, rows, targets, _ = problem(4, 500, 16)
    before, origin = torch.get_float32_matmul_precision(), torch.zeros(4)
    assert scoring._Float32(states, rows).bound(origin) is not None
    try:
        torch.set_float32_matmul_precision(kernels)
        assert scoring._Float32(states, rows).bound(origin) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_large_catalogue_takes_one_float32_product(precision):
    """No float64 product of the whole, and no more memory than two chunks and the pairs that are settled."""
    states, rows, targets, _ = problem(16, 20_000, 8)
    with LargestTensor() as record:
        result = target_rank_and_logprob(states, rows, targets, temperature=0.02, chunk_size=5000)
        indices = top_k(states, rows, 10, chunk_size=5000)[1]
    if precision == "float32":
        assert record.products == 1  # of the first chunk of top_k
    assert record.elements <= 2 * 5056 * 16 < 16 * 20_000
    assert torch.equal(result.rank, twin(states, rows, targets, 0.02, [[]] * 16, True)[0])
    exact = (states.double() @ rows.double().T).float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(indices, exact.indices[:, :10])


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_inputs_are_scored_in_fp32(autocast):
    """A language model's vectors share a direction: all cosines lie near .9, where bf16 has steps of .004 (mistake 6).

    A bf16 product leaves less than 100 distinct scores over 4,000 items, so ties would decide the ranks.
    """
    states, rows, targets, _ = problem(8, 4000, 64)
    states, rows = (normalise(vectors + 3 * states[0], "cosine").bfloat16() for vectors in (states, rows))
    assert (states @ rows.T)[1].unique().numel() < 100
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = target_rank_and_logprob(states, rows, targets, temperature=0.02)
        scores = top_k(states, rows, 4000)[0]
    assert scores[1].unique().numel() > 3900
    ranks, logprobs = twin(states.float(), rows.float(), targets, 0.02, [[]] * 8, True)
    assert torch.equal(result.rank, ranks)
    torch.testing.assert_close(result.logprob, logprobs, atol=1e-4, rtol=1e-5)


def test_global_precision_settings_do_not_reach_the_scores(precision):
    states, rows, targets, _ = problem(8, 400, 64)
    exact = target_rank_and_logprob(states, rows, targets, temperature=0.02)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # TF32 on a GPU, bf16 on some CPUs
        low = target_rank_and_logprob(states, rows, targets, temperature=0.02)
    finally:
        torch.set_float32_matmul_precision(before)
    same(exact, low, precision)


def test_never_the_full_matrix():
    states, rows, targets, histories = problem(32, 3000, 8)
    excluded = exclusion_matrix(histories)
    with LargestTensor() as record:
        target_rank_and_logprob(states, rows, targets, temperature=0.02, excluded=excluded, chunk_size=1000)
        top_k(states, rows, 10, excluded=excluded, allowed=torch.ones(3000, dtype=torch.bool), chunk_size=1000)
    assert 32 * 1000 <= record.elements < 32 * 3000


def test_a_small_catalogue_takes_one_product(precision):
    states, rows, targets, _ = problem(8, 100, 8)
    with LargestTensor() as record:
        target_rank_and_logprob(states, rows, targets, temperature=0.02)
    if precision == "float64":
        assert record.products == 1


def test_float64_rows_are_bounded_too(monkeypatch):
    states, rows, targets, _ = problem(8, 100, 16)
    expected = target_rank_and_logprob(states, rows, targets, temperature=0.02)
    monkeypatch.setattr("r2ec_trl.items.scoring.ROW_VALUES_AT_ONCE", 160)
    same(expected, target_rank_and_logprob(states, rows, targets, temperature=0.02))


def test_default_chunk_is_bounded_by_memory_not_by_items(monkeypatch, precision):
    monkeypatch.setattr("r2ec_trl.items.scoring.SCORES_AT_ONCE", 320)
    states, rows, targets, _ = problem(32, 100, 4)
    with LargestTensor() as record:
        small = target_rank_and_logprob(states, rows, targets, temperature=0.02)
    assert record.elements <= (
        400 if precision == "float64" else 4096
    )  # the rows themselves; a block of 64 rows twice
    monkeypatch.setattr("r2ec_trl.items.scoring.SCORES_AT_ONCE", 2**24)
    large = target_rank_and_logprob(states, rows, targets, temperature=0.02)
    same(small, large, precision)


def test_a_broken_state_never_ranks_well():
    states, rows, targets, _ = problem(3, 40)
    states[1] = math.nan
    result = target_rank_and_logprob(states, rows, targets, temperature=0.02, chunk_size=16)
    assert result.rank[1].item() == 40 and math.isnan(result.logprob[1].item())
    assert top_k(states, rows, 2)[1][1].tolist() == [-1, -1]


def test_top_k_hand_worked():
    """Equal scores: the lower row first. Row 3 is excluded for the first user, row 0 is allowed for nobody."""
    states, rows = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.9], [0.5], [0.5], [0.7], [-0.2]])
    allowed = torch.tensor([False, True, True, True, True])
    for size in (None, 2):  # row 3 is the second of its chunk, as row 1 is
        for mask, best in ((allowed, [[1, 2, 4], [4, 1, 2]]), (~allowed, [[0, -1, -1], [0, -1, -1]])):
            excluded = torch.tensor([[3, 3], [-1, -1]])
            scores, indices = top_k(states, rows, 3, excluded=excluded, allowed=mask, chunk_size=size)
            assert indices.tolist() == best
    assert top_k(states, rows, 2, allowed=allowed)[0][0].tolist() == pytest.approx([0.7, 0.5])


def test_top_k_takes_minus_zero_for_zero():
    """-1e-60 is -0.0 in float32, which equals 0.0: the lower row comes first."""
    scores, indices = top_k(torch.tensor([[1e-30]]), torch.tensor([[-1e-30], [0.0], [1e-30]]), 3)
    assert indices.tolist() == [[0, 1, 2]]


def test_top_k_where_fewer_are_available():
    scores, indices = top_k(torch.ones(1, 1), torch.ones(3, 1), 10, excluded=torch.tensor([[0, 2, -1]]))
    assert indices.tolist() == [[1, -1, -1]] and scores.tolist() == [[1.0, -math.inf, -math.inf]]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1e-30, 3e8]), min_size=1, max_size=30),
    k=st.integers(1, 35),
    chunk_size=st.integers(1, 35),
)
def test_top_k_is_a_stable_sort(values, k, chunk_size):
    scores, indices = top_k(torch.ones(1, 1), torch.tensor(values)[:, None], k, chunk_size=chunk_size)
    order = sorted(range(len(values)), key=lambda item: (-values[item], item))[:k]
    assert indices[0].tolist() == order
    assert torch.equal(scores[0], torch.tensor([values[item] for item in order]))


def test_normalise():
    """(3, 4) has length 5; "dot" leaves it. bf16 comes out as fp32, and the gradient passes."""
    vectors = torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(normalise(vectors, "cosine"), torch.tensor([[0.6, 0.8]]))
    assert torch.equal(normalise(vectors, "dot"), torch.tensor([[3.0, 4.0]]))
    normalise(vectors, "cosine").sum().backward()
    assert vectors.grad is not None
    with pytest.raises(UserError, match="choose one of cosine, dot"):
        normalise(vectors, "euclidean")


def test_exclusion_matrix():
    assert exclusion_matrix([[3], [1, 2], []]).tolist() == [[3, -1], [1, 2], [-1, -1]]
    assert exclusion_matrix([[], []]).shape == (2, 0)
    assert exclusion_matrix([]).shape == (0, 0)


def test_empty_exclusions_and_empty_batches():
    states, rows, targets, _ = problem()
    plain = target_rank_and_logprob(states, rows, targets, temperature=0.02)
    empty = target_rank_and_logprob(states, rows, targets, temperature=0.02, excluded=exclusion_matrix([[]] * 6))
    assert torch.equal(plain.rank, empty.rank)
    assert target_rank_and_logprob(states[:0], rows, targets[:0], temperature=0.02).rank.shape == (0,)
    assert top_k(states[:0], rows, 3)[1].shape == (0, 3)


def test_no_gradient_leaves():
    states, rows, targets, _ = problem()
    result = target_rank_and_logprob(states.requires_grad_(), rows.requires_grad_(), targets, temperature=0.02)
    assert not result.logprob.requires_grad and not result.score.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"targets": torch.tensor([50] * 6)}, r"targets must be row indices in 0\.\.49"),
        ({"targets": torch.tensor([-1] * 6)}, r"targets must be row indices in 0\.\.49"),
        ({"rows": torch.zeros(50, 3)}, "states and rows must be"),
        ({"rows": torch.zeros(0, 16)}, "at least one row"),
    ],
)
def test_wrong_arguments(change, message):
    states, rows, targets, _ = problem()
    arguments = {"states": states, "rows": rows, "targets": targets, "temperature": 0.02, **change}
    with pytest.raises(ValueError, match=message):
        target_rank_and_logprob(**arguments)


def test_k_must_be_positive():
    with pytest.raises(ValueError, match="k must be at least 1"):
        top_k(torch.ones(1, 1), torch.ones(3, 1), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("keep_target", [True, False])
def test_a_gpu_gives_the_same_ranks(keep_target):
    states, rows, targets, histories = problem(32, 5000, 256)
    for device in ("cpu", "cuda"):
        arguments = [tensor.to(device) for tensor in (states, rows, targets)]
        excluded = exclusion_matrix(histories, device)
        result = target_rank_and_logprob(
            *arguments, temperature=0.02, excluded=excluded, keep_target=keep_target, chunk_size=1700
        )
        best = top_k(*arguments[:2], 50, excluded=excluded, chunk_size=1700)
        if device == "cpu":
            expected, expected_best = result, best
    assert torch.equal(result.rank.cpu(), expected.rank) and torch.equal(result.score.cpu(), expected.score)
    torch.testing.assert_close(result.logprob.cpu(), expected.logprob, atol=1e-6, rtol=1e-6)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(best, expected_best, strict=True))
