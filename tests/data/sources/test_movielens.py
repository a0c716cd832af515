"""Every release of MovieLens in two lines, and the exact rows that come out."""

import pytest

from r2ec_trl.data import import_movielens
from r2ec_trl.errors import UserError


def test_movielens_100k(tmp_path):
    (tmp_path / "u.data").write_text("196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    flags = {"242": "0|1|0", "302": "0|0|0"}
    titles = {"242": "Misérables, Les (1995)", "302": "unknown"}
    (tmp_path / "u.item").write_bytes(
        "".join(f"{key}|{titles[key]}|01-Jan-1995||http://x|{flags[key]}\n" for key in flags).encode("latin-1")
    )
    (tmp_path / "u.genre").write_text("unknown|0\nDrama|1\nWar|2\n\n")
    source = import_movielens(tmp_path)
    assert source.interactions.to_dicts() == [
        {"user_id": "196", "item_id": "242", "rating": 3.0, "timestamp": 881250949},
        {"user_id": "186", "item_id": "302", "rating": 3.0, "timestamp": 891717742},
    ]
    assert source.items.to_dicts() == [
        {"item_id": "242", "title": "Misérables, Les (1995)", "genres": ["Drama"], "year": "1995"},
        {"item_id": "302", "title": "unknown", "genres": [], "year": None},
    ]


def test_a_file_of_genres_without_any_is_one_sentence(tmp_path):
    (tmp_path / "u.data").write_text("1\t1\t5\t881250949\n")
    (tmp_path / "u.item").write_text("1|Toy Story (1995)|01-Jan-1995||http://x|0\n")
    (tmp_path / "u.genre").write_text("\n")
    with pytest.raises(UserError, match="u.genre is empty: unpack the archive again"):
        import_movielens(tmp_path)


def test_movielens_1m(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    (tmp_path / "movies.dat").write_bytes(
        "661::Élan: A Film (1996)::Drama|Musical\n1193::Cuckoo (1975)::Drama\n".encode("latin-1")
    )
    source = import_movielens(tmp_path)
    assert source.interactions.rows() == [("1", "1193", 5.0, 978300760), ("1", "661", 3.0, 978302109)]
    assert source.items.to_dicts() == [
        {"item_id": "661", "title": "Élan: A Film (1996)", "genres": ["Drama", "Musical"], "year": "1996"},
        {"item_id": "1193", "title": "Cuckoo (1975)", "genres": ["Drama"], "year": "1975"},
    ]


def test_movielens_csv(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n296,"President, The (1995)",Comedy|Drama\n306,"Say ""Hi""",(no genres listed)\n'
    )
    source = import_movielens(tmp_path)
    assert source.interactions.rows() == [("1", "296", 5.0, 1147880044), ("1", "306", 3.5, 1147868817)]
    assert source.items.to_dicts() == [
        {"item_id": "296", "title": "President, The (1995)", "genres": ["Comedy", "Drama"], "year": "1995"},
        {"item_id": "306", "title": 'Say "Hi"', "genres": None, "year": None},
    ]


def test_movielens_that_is_none(tmp_path):
    with pytest.raises(UserError, match="has no u.data, ratings.dat or ratings.csv"):
        import_movielens(tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with pytest.raises(UserError, match="has ratings.csv but no movies.csv"):
        import_movielens(tmp_path)
