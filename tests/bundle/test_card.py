"""The card is rewritten in place, and what others wrote stays."""

import dataclasses

from r2ec_trl.bundle.bundle import Bundle
from r2ec_trl.bundle.card import BEGIN, END, write_card


def test_only_our_section_changes(own):
    meta = Bundle.load(own).meta
    card = write_card("---\ntags: [mine]\n---\n\n# My model\n\nwords of mine\n", meta)
    assert (
        "words of mine" in card
        and card.count(BEGIN) == card.count(END) == 1
        and "- mine" in card
        and "- recpo" in card
    )
    again = write_card(card.replace("words of mine", "other words"), dataclasses.replace(meta, num_items=41))
    assert "other words" in again and again.count(BEGIN) == 1 and "catalogue of 41 items" in again


def test_a_damaged_head_gives_a_plain_card(own):
    card = write_card("---\ntags: [\n---\n# x", Bundle.load(own).meta)
    assert card.startswith("---\n") and BEGIN in card
