"""The page in a real browser: it draws, filters, searches, links, and no text of a model runs."""

import json
import os
import re

import pytest
from report_compare import NAMES, make_comparison
from report_run import FEW, HOSTILE, make_run
from test_report import plain_sft

from intfast.study import report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="pip install -e '.[browser]' && playwright install chromium"
)
PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def chromium():
    """The browser of Playwright, or the one that CHROMIUM names."""
    with playwright.sync_playwright() as driver:
        options = {"args": ["--no-sandbox"], "executable_path": os.environ.get("CHROMIUM")}
        try:
            browser = driver.chromium.launch(**options)
        except playwright.Error as error:
            pytest.skip(f"no Chromium: playwright install chromium ({str(error).splitlines()[0]})")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Files by name: a usual run, two side by side, hostile texts, only begun, and a large one."""
    root = tmp_path_factory.mktemp("pages")
    one = make_run(root / "one", *FEW)
    two = make_run(root / "two", *FEW, "seed=1")
    begun = make_run(root / "begun", *FEW)
    for path in begun.iterdir():
        if path.name != "config.toml":
            path.unlink()
    runs = {
        "one": [one],
        "both": [one, two],
        "hostile": [make_run(root / "hostile", *FEW, text=HOSTILE)],
        "begun": [begun],
        "large": [make_run(root / "large", *FEW, num=2000)],
        "plain": [plain_sft(make_run(root / "plain", *FEW, text=HOSTILE), ("star", "reference"))],
        "compared": [make_comparison(root / "compared")],
        "compared_hostile": [make_comparison(root / "compared_hostile", (0,), HOSTILE)],
    }
    return {name: report.write(found, root / f"{name}.html") for name, found in runs.items()}


@pytest.fixture
def show(chromium, pages):
    """show(name, ...) opens a page and checks that it is quiet: no error, no request, no dialog."""
    contexts, noise = [], []

    def opened(name, size=DESKTOP, scheme="light", link=""):
        context = chromium.new_context(
            viewport={"width": size[0], "height": size[1]}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: noise.append(dialog.message))
        page.on("request", lambda r: r.url.startswith("file:") or noise.append(r.url))
        page.goto(pages[name].as_uri() + link)
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []


def title(page):
    return page.inner_text(".detail h3")


def shown_ids(page):
    return page.eval_on_selector_all(".row b", "nodes => nodes.map(n => n.textContent)")


# --- drawing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["one", "both", "hostile", "begun"])
def test_a_page_draws_within_its_width(show, name, size):
    page = show(name, size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    headings = page.eval_on_selector_all("h2", "nodes => nodes.map(n => n.textContent)")
    assert len(headings) == 7


def test_the_headline_says_what_was_measured(show):
    page = show("one")
    text = page.inner_text("#results")
    assert "3 sets of weights on the same 3 problems, 4 samples of each (36 graded answers" in text
    assert "95 % intervals" in text and "bootstrap" in text and "Wilson" in text
    row = page.inner_text("#results tbody tr:nth-child(3)")
    assert "InT + RL" in row and "75.0" in row and "pass@4" in text
    assert page.locator("#results svg path.line").count() == 3
    assert "48.0 s" in page.inner_text("#time") or "48.0" in page.inner_text("#time")
    assert "4,000" in page.inner_text("#time")
    assert "evaluate.samples" in page.inner_text("#settings")


def test_curves_name_their_values_under_the_pointer(show):
    page = show("one")
    chart = page.locator("figure", has_text="mean over the scored rollouts").first
    strip = chart.locator("rect.hit").first
    strip.hover()
    assert strip.locator("title").text_content() == "step 1\nInT + RL: 0.0333"
    assert strip.evaluate("node => getComputedStyle(node).opacity") > "0"


def test_without_scripts_all_figures_are_there(chromium, pages):
    page = chromium.new_page(java_script_enabled=False)
    page.goto(pages["one"].as_uri())
    assert page.locator("#results svg path.line").count() == 3
    assert "75.0" in page.inner_text("#results") and "48.0" in page.inner_text("#time")
    assert "allow scripts" in page.inner_text("main noscript")
    page.close()


def test_an_unfinished_run_says_what_is_missing(show):
    page = show("begun")
    assert "has not finished" in page.inner_text("header")
    assert "interventions.jsonl" in page.inner_text("header")
    assert "No evaluation" in page.inner_text("#results")


def test_only_the_rows_in_sight_are_drawn(show):
    page = show("large")
    assert "2,000 of 2,000" in page.inner_text("#browse")
    assert 0 < page.locator(".row").count() < 60
    page.evaluate("document.querySelector('.list').scrollTop = 1e9")
    page.locator(".row:last-child", has_text="1999").wait_for()
    assert page.locator(".row").count() < 60


# --- themes ------------------------------------------------------------------------------------


def brightness(page):
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3]))


def test_light_and_dark_follow_the_system_and_the_button(show):
    assert brightness(show("one", scheme="light")) > 600
    page = show("one", scheme="dark")
    assert brightness(page) < 200
    page.click("nav button")
    assert brightness(page) > 600


# --- the browser of interventions --------------------------------------------------------------


def test_an_intervention_with_its_replacement_chips_and_tokens(show):
    page = show("one")
    assert title(page).startswith("p-0/0/0")
    assert page.inner_text(".steps .cut .says") == "wrong turn"
    assert "line-through" in page.evaluate(
        "getComputedStyle(document.querySelector('.steps .cut .says')).textDecorationLine"
    )
    assert page.inner_text(".steps .new .says") == "right turn"
    assert page.locator(".steps del").inner_text() == "wrong"
    assert page.locator(".steps ins").inner_text() == "right"
    assert page.locator(".steps li").count() == 4
    chips = page.locator(".chip")
    assert [chips.nth(i).inner_text() for i in range(4)] == ["✓", "✗", "?", "✗"]
    assert "1 of 3 right" in page.inner_text(".starts")
    assert "0 of 4 right" in page.inner_text(".starts")
    chips.nth(1).click()
    assert "intervention 1 goes on" in page.inner_text(".detail")


def test_tokens_are_coloured_by_what_sft_did(show):
    page = show("one")
    page.get_by_role("button", name="log-prob difference").click()
    colors = page.eval_on_selector_all(".tok", "nodes => nodes.map(n => n.style.background)")
    # -0.25, 0, +3.5 and +1.75 nats
    assert "--down" in colors[0] and colors[1] == "transparent"
    assert "--up" in colors[2] and "--up" in colors[3]
    alpha = [float(re.search(r"/ ([\d.]+)", color).group(1)) for color in colors[2:]]
    assert alpha[0] == pytest.approx(2 * alpha[1], rel=0.01) or alpha[0] == alpha[1] == 0.62
    page.locator(".tok").nth(2).hover()
    assert "-4.000 → -0.500, difference 3.500" in page.inner_text("#tokens")
    page.get_by_role("button", name="loss weight").click()
    colors = page.eval_on_selector_all(".tok", "nodes => nodes.map(n => n.style.background)")
    assert all("--up" in color for color in colors)


def test_gates_filter_and_search_finds_every_text(show):
    page = show("one")
    page.click(".tools [data-gate=leak]")
    assert shown_ids(page) == ["p-2/0/0"]
    page.click(".tools [data-gate='']")
    assert len(shown_ids(page)) == 4
    for words, found in (
        ("THE REPLY ABOUT P-1", ["p-1/0/0"]),
        ("what is 3", ["p-3/0/0"]),
        ("right turn", ["p-0/0/0", "p-1/0/0", "p-2/0/0"]),
        ("so it is 7", ["p-0/0/0", "p-1/0/0", "p-2/0/0", "p-3/0/0"]),
        ("nowhere", []),
    ):
        page.fill("input[type=search]", words)
        assert shown_ids(page) == found
    assert "Nothing matches" in page.inner_text(".detail")
    page.fill("input[type=search]", "right turn")
    assert page.locator(".detail mark").first.inner_text() == "right turn"


def test_the_table_of_gates_leads_to_the_browser(show):
    page = show("one")
    page.locator("#interventions button", has_text="unsolved").click()
    assert shown_ids(page) == ["p-1/0/0"]


def test_the_keyboard_walks_and_searches(show):
    page = show("one")
    page.keyboard.press("j")
    assert title(page).startswith("p-1/0/0")
    assert page.evaluate("location.hash") == "#i/0/p-1%2F0%2F0"
    page.keyboard.press("k")
    assert title(page).startswith("p-0/0/0")
    page.keyboard.press("/")
    page.keyboard.type("p-3")
    assert shown_ids(page) == ["p-3/0/0"] and title(page).startswith("p-3/0/0")
    page.keyboard.press("Escape")
    assert len(shown_ids(page)) == 4
    page.keyboard.press("f")
    assert page.locator(".detail details:not([open])").count() == 0
    page.focus(".list")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert title(page).startswith("p-1/0/0")


def test_a_link_opens_its_intervention(show):
    page = show("both", link="#i/1/p-2%2F0%2F0")
    assert title(page).startswith("p-2/0/0")
    assert page.locator("select[aria-label=run]").input_value() == "1"
    page.evaluate("location.hash = '#i/0/p-3%2F0%2F0'")
    page.locator(".detail h3", has_text="p-3/0/0").wait_for()
    assert title(show("one", link="#i/9/x%")).startswith("p-0/0/0")


def test_orders_put_first_what_they_say(show):
    page = show("one")
    page.select_option("select[aria-label=order]", "gain")
    assert shown_ids(page)[0] == "p-0/0/0"
    page.select_option("select[aria-label=order]", "early")
    assert shown_ids(page)[-1] == "p-3/0/0"


# --- SFT data that are no interventions --------------------------------------------------------


def test_other_sft_data_unfold_to_their_tokens(show):
    page = show("plain")
    assert page.locator("#trained details").count() == 2
    assert page.locator("#trained .tok").count() == 0
    page.locator("#trained summary").nth(1).click()
    page.wait_for_selector("#trained .tok")
    assert page.locator("#trained .tok").count() == 4
    assert "reference solution, 4 loss tokens, mean log-prob -1.688" in page.inner_text("#trained")
    assert "What is 1 + 1?" in page.inner_text("#trained")
    page.locator("#trained").get_by_role("button", name="loss weight").click()
    colors = page.eval_on_selector_all("#trained .tok", "all => all.map(n => n.style.background)")
    assert all("--up" in color for color in colors)
    assert page.evaluate("window.pwned") is None


# --- several seeds, and comparisons ------------------------------------------------------------


def test_runs_of_several_seeds_are_pooled(show):
    page = show("both")
    text = page.inner_text("#results")
    assert "Over seeds 0, 1" in text and "differ in their seed alone" in text
    assert page.locator("#results .seed").count() == 3 * 2


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["compared", "compared_hostile"])
def test_a_comparison_draws_within_its_width(show, name, size):
    page = show(name, size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    headings = page.eval_on_selector_all("h2", "nodes => nodes.map(n => n.textContent)")
    assert headings[:3] == ["At equal RL steps", "At equal generated tokens", "Training"]
    assert page.locator("#results tbody tr").count() == len(NAMES)
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main iframe, main script, main svg[onload]").count() == 0


def test_a_comparison_says_what_it_measured_and_where_it_is_not_ahead(show):
    page = show("compared")
    assert "Measured: 3 held-out problems, 4 samples of each and seed" in page.inner_text("header")
    results = page.inner_text("#results")
    assert re.search(r"not told apart from: .*reference", results)
    assert "seeds and problems again with replacement" in results
    # Every arm has a dot for each seed.
    assert page.locator("#results .seed").count() == len(NAMES) * 2
    assert page.locator("#tokens .bar rect").count() > 3 and "1,000" in page.inner_text("#tokens")
    assert page.locator("#training svg path.band").count() >= 3
    settings = page.inner_text("#settings")
    assert "sft.epochs=7" in settings and 'sft.data="reference"' in settings
    links = page.eval_on_selector_all("#settings a", "all => all.map(a => a.getAttribute('href'))")
    assert "seed-1/int_rl/report.html" in links
    assert title(page).startswith("p-0/0/0")


# --- hostile texts -----------------------------------------------------------------------------


def test_no_text_of_a_model_becomes_markup(show):
    page = show("hostile")
    page.keyboard.press("f")
    for chip in range(page.locator(".chip").count()):
        page.locator(".chip").nth(chip).click()
    page.fill("input[type=search]", "<script>window")
    for _ in range(3):
        page.locator(".detail h3").click()
        page.keyboard.press("j")
        page.keyboard.press("t")
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main iframe, main script, main svg[onload]").count() == 0
    named = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(n => [...n.attributes].map(a => a.name))"
    )
    assert not [name for name in named if name.startswith("on")]
    assert HOSTILE[:60] in page.inner_text(".steps")


def test_a_script_that_got_in_would_not_run(show, pages, tmp_path, chromium):
    planted = tmp_path / "planted.html"
    text = pages["one"].read_text()
    planted.write_text(text.replace("</main>", "</main><script>window.pwned = 1</script>"))
    page = chromium.new_page()
    page.goto(planted.as_uri())
    page.wait_for_selector("html[data-ready]")
    assert page.evaluate("window.pwned") is None
    page.close()


def test_every_data_block_is_json(pages):
    for path in pages.values():
        blocks = re.findall(
            r'<script type="application/json"[^>]*>(.*?)</script>', path.read_text()
        )
        assert len(blocks) == 1 and json.loads(blocks[0])["gates"]
