"""RecBole's atomic files, and the exact rows that come out."""

import pytest

from r2ec_trl.data import import_recbole
from r2ec_trl.errors import UserError


def recbole(folder, inter, item=None, name="shop"):
    (folder / f"{name}.inter").write_text(inter)
    if item is not None:
        (folder / f"{name}.item").write_text(item)
    return folder


def test_recbole(tmp_path):
    recbole(
        tmp_path,
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\ti\t4.5\t881250949.0\nu\tj\t1\t9e8\n",
        'item_id:token\tmovie_title:token_seq\tclass:token_seq\ni\tThe "One\tDrama War\nj\tTwo\t\n',
    )
    source = import_recbole(tmp_path)
    assert source.interactions.rows() == [("u", "i", 4.5, 881250949), ("u", "j", 1.0, 900000000)]
    assert source.items.to_dicts() == [
        {"item_id": "i", "title": 'The "One', "class": "Drama War"},
        {"item_id": "j", "title": "Two", "class": None},
    ]


def test_recbole_with_given_splits_and_no_ratings(tmp_path):
    for word, row in {"train": "u\ti\t1", "valid": "u\tj\t2", "test": "u\ti\t3"}.items():
        (tmp_path / f"shop.{word}.inter").write_text(f"user_id:token\titem_id:token\ttimestamp:float\n{row}\n")
    source = import_recbole(tmp_path)
    assert source.interactions.rows() == [("u", "i", 1, 0), ("u", "j", 2, 1), ("u", "i", 3, 2)]
    assert source.items.is_empty()


def test_recbole_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="holds no .inter file"):
        import_recbole(tmp_path)
    recbole(tmp_path, "user_id:token\titem_id:token\nu\ti\n")
    with pytest.raises(UserError, match=r"has no column 'timestamp' \(for timestamp\); it has user_id:token"):
        import_recbole(tmp_path)
    recbole(tmp_path, "", name="other")
    with pytest.raises(UserError, match="holds files of other, shop"):
        import_recbole(tmp_path)


def test_blanks_and_repeats_in_a_header(tmp_path):
    recbole(
        tmp_path, "user_id :token\titem_id :token\ttimestamp :float\nu\ti\t1\n", "item_id:token\ttitle:x\ni\tOne\n"
    )
    assert import_recbole(tmp_path).interactions.rows() == [("u", "i", 1)]
    recbole(
        tmp_path, "user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n", "item_id:x\ttitle:a\ttitle:b\ni\tA\tB\n"
    )
    with pytest.raises(UserError, match="shop.item names column 'title' twice: rename one"):
        import_recbole(tmp_path)


def test_ratings_in_some_files_alone_are_one_sentence_and_names_may_hold_dots(tmp_path):
    head, row = "user_id:token\titem_id:token\ttimestamp:float", "u\ti\t1"
    for word in ("train", "valid", "test"):
        rated = word == "train"
        text = f"{head}{chr(9) + 'rating:float' if rated else ''}\n{row}{chr(9) + '5' if rated else ''}\n"
        (tmp_path / f"shop.v2.{word}.inter").write_text(text)
    with pytest.raises(UserError, match="only some files of shop.v2 have the column 'rating'"):
        import_recbole(tmp_path)
    assert import_recbole(tmp_path, rating_column=None).interactions.height == 3
