"""A page to show a recommender: purchases in, the reasoning as it is written, items with it and without."""

import queue
import secrets
import uuid
from collections.abc import Iterator
from typing import Any

import gradio as gr
import polars as pl
from fastapi import FastAPI

from r2ec_trl.errors import UserError
from r2ec_trl.serving.batching import Batcher, Refused
from r2ec_trl.serving.messages import reasoning_price
from r2ec_trl.serving.recommender import Recommendation

PATH, SECONDS, ITEMS, CHOICES = "/page", 60.0, 10, 200
FONTS = ("system-ui", "sans-serif")  # the reader's own: nothing is fetched from elsewhere
Shown = tuple[str, str, list[list[Any]], list[list[Any]]]


def mount_page(app: FastAPI, batcher: Batcher, token: str | None = None, open_catalogue: bool = False) -> FastAPI:
    """
    Add the page to a server under `/page`.

    Args:
        app ([`~fastapi.FastAPI`]), batcher ([`~r2ec_trl.serving.batching.Batcher`]):
            The server, and what answers.
        token (`str`, *optional*):
            Has to be typed to add an item; without one, items can be added only with `open_catalogue`.
        open_catalogue (`bool`, *optional*, defaults to `False`):
            Anyone may add items.
    """
    theme = gr.themes.Base(font=FONTS, font_mono=("ui-monospace", "monospace"))
    blocks = make_page(batcher, token, open_catalogue)
    return gr.mount_gradio_app(app, blocks, PATH, footer_links=[], ssr_mode=False, theme=theme)


def make_page(batcher: Batcher, token: str | None, open_catalogue: bool) -> gr.Blocks:
    """The page's parts and what they do; text of data is shown as text, never as markup."""
    bundle = batcher.recommender.bundle
    with gr.Blocks(title="r2ec_trl", analytics_enabled=False) as page:
        gr.Markdown("# What would this user buy next?")
        bought = gr.Dropdown(
            find_titles(bundle.items, ""),
            multiselect=True,
            allow_custom_value=True,
            label="Purchases, oldest first: type to find",
            elem_id="bought",
        )
        where = gr.Textbox(label='Filter, such as "price < 50" (empty: all items)', elem_id="where")
        ask = gr.Button("Recommend", variant="primary", elem_id="ask")
        status = gr.Textbox(label="Status", interactive=False, elem_id="status")
        with gr.Row():
            with gr.Column():
                reasoning = gr.Textbox(label="Reasoning", lines=4, interactive=False, elem_id="reasoning")
                first = _table("With reasoning", "with")
            with gr.Column():
                gr.Textbox(reasoning_price(bundle.meta.metrics), label="Its price", lines=4, interactive=False)
                second = _table("Without reasoning", "without")
        with gr.Accordion("Add an item", open=True, visible=bool(open_catalogue or token)):
            title = gr.Textbox(label="Title", elem_id="title")
            word = gr.Textbox(label="Token", type="password", visible=not open_catalogue, elem_id="token")
            add = gr.Button("Add it", elem_id="add")

        def add_item(title: str, word: str, titles: list[str], where: str) -> Iterator[Shown]:
            if not open_catalogue and not (token and secrets.compare_digest((word or "").encode(), token.encode())):
                yield "Adding needs the right token.", "", [], []
                return
            item_id = f"page-{uuid.uuid4().hex[:8]}"
            try:
                batcher.call(lambda: bundle.add_items([{"item_id": item_id, "title": title}])).result(SECONDS)
                yield from recommend(batcher, titles, where, f"{title!r} is item {len(bundle.items)}", item_id)
            except (UserError, Refused, TimeoutError) as error:
                yield str(error) or "The time is over.", "", [], []

        shown = [status, reasoning, first, second]
        ask.click(lambda titles, where: (yield from recommend(batcher, titles, where)), [bought, where], shown)
        add.click(add_item, [title, word, bought, where], shown)

        def search(typed: gr.KeyUpData) -> Any:
            return gr.update(choices=find_titles(bundle.items, typed.input_value or ""))

        bought.key_up(search, None, bought, show_progress="hidden")
    return page.queue(max_size=64, default_concurrency_limit=16)


def recommend(
    batcher: Batcher, titles: list[str] | None, where: str | None, note: str = "", item_id: str | None = None
) -> Iterator[Shown]:
    """Status, reasoning, items with it and items without it, again with every piece of the reasoning."""
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ask: dict[str, Any] = {"history": {"history_titles": titles or []}, "where": (where or "").strip() or None}
    ask["k"] = len(batcher.recommender.bundle.items) if item_id else ITEMS
    jobs = []
    try:
        jobs += batcher.submit([{**ask, "reasoning": "none", "k": ITEMS}], SECONDS)
        jobs += batcher.submit([{**ask, "reasoning": "full"}], SECONDS, [heard.put])
        jobs[1].future.add_done_callback(heard.put)
        text, without = "", _rows(jobs[0].future.result(SECONDS))
        while isinstance(piece := heard.get(timeout=SECONDS), str):
            text += piece
            yield "The reasoning is being written …", text, [], without
        result = jobs[1].future.result(SECONDS)
        place = next((rank for rank, item in enumerate(result.items, 1) if item.item_id == item_id), None)
        if item_id:
            note += f", {f'rank {place}' if place else 'filtered out'} for this user"
        yield note or "Done", result.reasoning, _rows(result), without
    except (UserError, Refused, TimeoutError, queue.Empty) as error:
        yield f"{note}{'; ' if note else ''}{str(error) or 'The time is over.'}", "", [], []
    finally:
        for job in jobs:
            job.future.cancel()


def find_titles(items: Any, typed: str) -> list[str]:
    """The first titles that contain what was typed."""
    titles = pl.Series("title", items["title"][:])
    return titles.filter(titles.str.to_lowercase().str.contains(typed.lower(), literal=True)).head(CHOICES).to_list()


def _table(label: str, name: str) -> gr.Dataframe:
    return gr.Dataframe(headers=["item", "score"], datatype="str", label=label, interactive=False, elem_id=name)


def _rows(result: Recommendation) -> list[list[Any]]:
    return [[item.title, f"{item.score:.4f}"] for item in result.items[:ITEMS]]
