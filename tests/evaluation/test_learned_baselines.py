"""Learnt baselines: how rows become sequences, how the best is chosen; and, marked `baselines`, that they learn."""

import numpy as np
import pytest
from datasets import Dataset

from r2ec_trl.errors import UserError
from r2ec_trl.evaluation import learned_baselines as learned
from r2ec_trl.evaluation.baselines import ScoredBaseline, baseline_frame
from r2ec_trl.metrics import ndcg_at_k

ITEMS = [f"i{item}" for item in range(12)]


def chain(users, length=6, items=11):
    """Everybody goes one item further round a circle of 11, from where they begin; the twelfth is never bought."""
    rows = [[(start + step) % items for step in range(length)] for start in range(users)]
    return Dataset.from_list(
        [
            {
                "user_id": f"u{user}",
                "history": [f"i{item}" for item in row[:end]],
                "target": f"i{row[end]}",
                "timestamp": 100 * end + user,
            }
            for user, row in enumerate(rows)
            for end in range(1, length)
        ]
    )


def test_rows_of_a_user_that_do_not_go_on_begin_anew():
    rows = [([], 4), ([4], 5), ([5], 6), ([1, 2], 3), ([9], 9)]
    assert learned.train_sequences(rows, list("uuuvu")) == [[4, 5, 6], [1, 2, 3], [9, 9]]


def test_pieces_ask_for_every_target_with_a_past():
    for length in (2, 3, 4, 21):
        for size in (1, 2, 3, 20, 21, 22, 50):
            found = learned.pieces(list(range(size)), length)
            assert all(2 <= len(piece) <= length for piece in found) or size == 1
            assert {item for piece in found for item in piece[1:]} == set(range(1, size))


def test_recent_popularity_counts_the_newest_by_time():
    """Rows 0 to 9 by time, shuffled: targets a but for the newest two, b."""
    order = [3, 9, 0, 1, 8, 2, 4, 5, 6, 7]
    train = Dataset.from_dict(
        {"target": ["b" if time > 7 else "a" for time in order], "history": [["a"]] * 10, "timestamp": order}
    )
    test = {"user_id": ["u"], "history": [["a"]], "target": ["b"]}
    ranks = {}
    for ((settings, baseline),) in learned.recent_popularity(train, ["a", "b", "c"]):
        ranks[settings["share"]] = baseline_frame(baseline, test)["rank"][0]
    assert ranks == {0.02: 1, 0.05: 1, 0.1: 1, 0.2: 1, 0.5: 2}
    with pytest.raises(UserError, match="have no `timestamp`"):
        next(learned.recent_popularity(train.remove_columns("timestamp"), ["a"]))


def test_the_best_is_chosen_and_a_path_that_gets_worse_is_left():
    index, asked = {"a": 0, "b": 1, "c": 2}, []
    validation = {"user_id": ["u"], "history": [["a"]], "target": ["c"]}

    def path(name, ranks):
        for step, rank in enumerate(ranks):
            asked.append((name, step))
            scores = {1: [0, 0, 1.0], 2: [0, 2.0, 1.0], 3: [2.0, 2.0, 1.0]}[rank]
            yield {"name": name, "step": step}, ScoredBaseline(
                index, lambda rows, s=scores: np.tile(s, (len(rows), 1))
            )

    told = []
    baseline, tries = learned.tune(
        [path("one", [3, 2, 3, 3, 1]), path("two", [2, 1, 2])], validation, lambda *one: told.append(one)
    )
    assert asked == [("one", 0), ("one", 1), ("one", 2), ("one", 3), ("two", 0), ("two", 1), ("two", 2)]
    assert tries[0] == {"settings": {"name": "two", "step": 1}, "ndcg@10": 1.0} and len(tries) == len(told) == 7
    assert baseline_frame(baseline, validation)["rank"].to_list() == [1]


def test_users_unknown_to_a_model_get_popularity_and_unknown_items_tie_below():
    counts = np.array([1, 5, 0])
    answer = learned._or_popularity(lambda rows: np.full((len(rows), 3), 7.0), {0, 1}, counts, [[2], [0, 2], []])
    assert answer.tolist() == [[1, 5, 0], [7, 7, 7], [1, 5, 0]]
    spread = learned._spread(np.array([[4.0, 2.0], [1.0, 3.0]]), np.array([3, 0]), 4)
    assert spread.tolist() == [[2, 1, 1, 4], [3, 0, 0, 1]]


def test_text_scores_by_hand():
    """Newest first, the last but one weighs half with decay 1."""
    rows = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert learned._text_scores(rows, 5, 1.0, [[0, 1]]).tolist() == [[0.5, 1.0]]
    assert learned._text_scores(rows, 5, 0.0, [[0, 1]]).tolist() == [[1.0, 1.0]]
    assert learned._text_scores(rows, 1, 0.0, [[0, 1]]).tolist() == [[0.0, 1.0]]


def ndcg(baseline, rows):
    return float(ndcg_at_k(baseline_frame(baseline, rows)["rank"], 10).mean())


@pytest.mark.baselines
def test_ease_is_that_of_the_paper():
    """B = I - P diag(1 / diag(P)), P the inverse of X'X + lambda I; x B for the newest purchases."""
    train = chain(30)
    last = dict(zip(train["user_id"], zip(train["history"], train["target"], strict=True), strict=True))
    bought = np.zeros((30, 11))
    for user, (history, target) in enumerate(last.values()):
        bought[user, [ITEMS.index(item) for item in (*history, target)]] = 1
    for ((settings, baseline),) in learned.ease(train, ITEMS):
        inverse = np.linalg.inv(bought.T @ bought + settings["regularization"] * np.eye(11))
        weights = np.eye(11) - inverse / np.diag(inverse)
        scores = baseline.score([[0, 4, 7]])[0]
        newest = [0, 4, 7][-settings["history_items"] :]
        assert np.allclose(scores[:11], weights[newest].sum(axis=0), atol=1e-5)
        assert scores[11] < scores[:11].min(), "never bought: below all others"


@pytest.mark.baselines
@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_sequence_models_learn_a_chain_and_score_as_rectools_does(name):
    """After ten epochs the next item of the circle is first; scores are those of the library's own `recommend`."""
    train, test = chain(44), chain(22, length=4).select(range(2, 66, 3))
    path = next(iter(getattr(learned, name)(train, ITEMS, 5, seed=0)))
    best = 0.0
    for settings, baseline in path:
        best = max(best, ndcg(baseline, test))
        if best > 0.95 or settings["epochs"] >= 60:
            break
    assert best > 0.95 and {"n_factors", "dropout_rate", "epochs"} <= set(settings)
    again = next(iter(next(iter(getattr(learned, name)(train, ITEMS, 5, seed=0)))))[1]
    first = next(iter(next(iter(getattr(learned, name)(train, ITEMS, 5, seed=0)))))[1]
    assert np.array_equal(first.score([[0, 1]]), again.score([[0, 1]]))


@pytest.mark.baselines
@pytest.mark.parametrize("model_name", ["SASRecModel", "HSTUModel"])
def test_scores_are_those_of_recommend(model_name):
    import rectools.models
    from pytorch_lightning import seed_everything

    seed_everything(0)
    options = {"relative_time_attention": False} if model_name == "HSTUModel" else {}
    model = getattr(rectools.models, model_name)(
        n_factors=8, n_heads=2, session_max_len=5, epochs=1, recommend_torch_device="cpu", **options
    )
    sequences = [[row % 11, (row + 1) % 11, (row + 2) % 11] for row in range(22)]
    dataset = learned._dataset(sequences)
    model.fit(dataset)
    found = model.recommend(list(range(22)), dataset, k=11, filter_viewed=False)
    known = model.data_preparator.get_known_item_ids().astype(np.int64)
    scores = learned._session_scores(model.torch_model.eval(), known, 1, 5, 12, sequences)
    for user, item, score in zip(found["user_id"], found["item_id"], found["score"], strict=True):
        assert scores[user, item] == pytest.approx(score, abs=1e-4)
    assert (scores[:, 11] < scores[:, :11].min(axis=1)).all()


@pytest.mark.baselines
def test_text_neighbours_find_the_nearest_text(tmp_path):
    """A sentence encoder of random weights in a folder: an item's own text is the nearest to it."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "drum", "violin", "bow", "case", "red", "blue"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(tmp_path / "bert")
    encoder = models.Transformer(str(tmp_path / "bert"))
    SentenceTransformer(modules=[encoder, models.Pooling(encoder.get_word_embedding_dimension())]).save(
        str(tmp_path / "encoder")
    )
    items = Dataset.from_dict(
        {"item_id": ["a", "b", "c"], "title": ["red drum", "blue drum", "violin bow"], "brand": ["case", None, "case"]}
    )
    train = Dataset.from_dict({"user_id": ["u"], "history": [["a"]], "target": ["b"]})
    found = [one for (one,) in learned.text_neighbours(train, items, str(tmp_path / "encoder"))]
    assert [settings["fields"] for settings, _ in found] == [["title"]] * 5 + [["title", "brand"]] * 5
    for settings, baseline in found:
        scores = baseline.score([[0], [2]])
        assert scores.argmax(axis=1).tolist() == [0, 2] and np.allclose(scores.max(axis=1), 1, atol=1e-5)
