"""The page in a real browser: headless Chromium picks, reads, filters and adds; nothing comes from elsewhere."""

import os
import time
from functools import partial

import pytest

pytest.importorskip("gradio", reason='needs `pip install "r2ec_trl[page]"`')
from served import Served  # noqa: E402

from r2ec_trl.serving.messages import reasoning_price  # noqa: E402
from r2ec_trl.serving.page import mount_page  # noqa: E402
from r2ec_trl.serving.recommender import Recommender  # noqa: E402

HOSTILE = "<svg onload=a=1>"


@pytest.fixture
def page(own):
    """The page of a bundle that the test may change: the one R2EC_TRL_BUNDLE names, in memory, or a tiny one."""
    server = Served(os.environ.get("R2EC_TRL_BUNDLE") or own, mount=partial(mount_page, open_catalogue=True))
    server.recommender.bundle.folder = None
    yield server
    server.close()


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs `pip install selenium`")
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "window-size=1100,1250"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


def until(what, seconds=30, told=lambda: ""):
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, f"the page did not get there: {told()}"
        time.sleep(0.05)
    return value


@pytest.mark.browser
def test_pick_read_filter_and_add(page, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    def find(selector):
        return browser.find_elements("css selector", selector)

    def value(name):
        return find(f"#{name} textarea, #{name} input")[0].get_attribute("value")

    def items(name):
        script = "return [...document.querySelectorAll(arguments[0])].map(cell => cell.innerText.trim())"
        return [cell for cell in browser.execute_script(script, f"#{name} [role=gridcell]") if cell]

    def done(note="Done"):
        until(lambda: value("status").startswith(note) and items("with") and items("without"))

    def press(name):
        browser.execute_script("arguments[0].click()", find(f"#{name}")[0])

    def write(name, text):
        field = find(f"#{name} textarea, #{name} input")[0]
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(Keys.DELETE, text)

    bundle = page.recommender.bundle
    picked = bundle.items["title"][3:6]
    browser.get(f"http://127.0.0.1:{page.port}/page/")
    until(lambda: find("#bought input"))
    for title in picked:
        find("#bought input")[0].send_keys(title, Keys.ENTER)
        until(lambda: title in find("#bought")[0].text)
    find("#bought input")[0].send_keys(Keys.ESCAPE)
    press("ask")
    done()
    library = Recommender(bundle)
    [full] = library.recommend([{"history_titles": picked}], 10, reasoning="full")
    [none] = library.recommend([{"history_titles": picked}], 10, reasoning="none")
    assert value("reasoning").strip() == full.reasoning
    assert items("with")[0] == full.items[0].title and items("without")[0] == none.items[0].title
    if folder := os.environ.get("R2EC_TRL_SCREENSHOT"):
        browser.save_screenshot(folder)

    word = full.items[4].title.split()[-1]
    write("where", f"title LIKE '%{word}'")
    press("ask")
    until(lambda: items("with") and all(title.endswith(word) for title in items("with")[::2]))
    write("where", "nonsense <<")
    press("ask")
    until(lambda: value("status").startswith("`where` is 'nonsense <<'"))

    write("where", "")
    write("title", HOSTILE)
    press("add")
    until(lambda: "rank" in value("status"), told=lambda: [value(one) for one in ("status", "where", "title")])
    assert len(bundle.items) == len(bundle.table) and bundle.items["title"][-1] == HOSTILE
    [again] = library.recommend([{"history_titles": picked}], len(bundle.items), reasoning="full")
    rank = 1 + [item.title for item in again.items].index(HOSTILE)
    assert f"is item {len(bundle.items)}, rank {rank} for this user" in value("status")
    write("where", "title LIKE '%<svg%'")
    press("ask")
    until(lambda: items("with")[:1] == [HOSTILE])
    assert browser.execute_script("return window.a") is None and not find("#with [role=gridcell] svg[onload]")
    origins = browser.execute_script(
        "return [...new Set(performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin))]"
    )
    assert origins == [f"http://127.0.0.1:{page.port}"]


@pytest.mark.browser
def test_a_server_with_a_token_asks_for_it_before_adding(own, browser):
    server = Served(own, mount=partial(mount_page, token="sesam"))
    find = partial(browser.find_elements, "css selector")
    browser.get(f"http://127.0.0.1:{server.port}/page/")
    until(lambda: find("#title textarea"))
    for word, said in (("", "Adding needs the right token."), ("sesam", "'a gong' is item 41")):
        find("#title textarea")[0].clear()
        find("#title textarea")[0].send_keys("a gong")
        find("#token input")[0].send_keys(word)
        browser.execute_script("arguments[0].click()", find("#add")[0])
        until(lambda: find("#status textarea, #status input")[0].get_attribute("value").startswith(said))
    server.close()


def test_the_price_of_no_reasoning_is_the_bundles_own():
    def report(mode, value):
        figures = {"model": {"ndcg@10": {"value": value}}}
        return {"protocol": {"settings": {"reasoning": mode}}, "unmasked": figures}

    metrics = {"before": report("full", 0.1), "after": report("full", 0.3628), "reasoning_none": report("none", 0.2)}
    assert reasoning_price(metrics) == "NDCG@10 on the test split is 0.363 with reasoning and 0.200 without."
    metrics.pop("reasoning_none")
    assert "does not hold figures with and without" in reasoning_price(metrics) == reasoning_price({"x": None})
