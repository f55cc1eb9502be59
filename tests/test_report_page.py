"""The page as markup: hostile texts stay texts, no script but its own, contrast in both themes."""

import base64
import hashlib
import re

import pytest
from report_run import FEW, HOSTILE, Seen, make_run

from intfast.safe_text import printable
from intfast.study import report
from intfast.study.tables import PAGE

# --- hostile texts -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("hostile") / "run", *FEW, text=HOSTILE)
    return report.page([folder])


def test_hostile_text_is_data_and_nothing_else(hostile):
    page = Seen(hostile)
    scripts = page.of("script")
    assert [attrs for attrs, _ in scripts] == [
        {"type": "application/json", "id": "runs"},
        {},
        {"type": "text/plain", "id": "items-0"},
    ]
    assert_harmless(page)
    assert page.block("items-0")["items"][0]["reply"].endswith(HOSTILE)
    settings = {row[0]: row[1] for rows in page.tables["settings"] for row in rows}
    # Hidden characters are written out.
    assert settings["commit"] == " ".join(printable(HOSTILE).split())
    assert not set("\x00\x1b\u202e") & set(hostile)


def assert_harmless(page):
    """Nothing but the elements and attributes that the page has with any text."""
    assert not [tag for tag, _ in page.elements if not OWN.fullmatch(tag)]
    for _, attrs in page.elements:
        assert not {name for name in attrs if name.startswith("on")} and "src" not in attrs
        assert re.fullmatch(r"#\w+|(seed-\d+/)?[\w.%-]+/report\.html", attrs.get("href", "#x"))
        # The policy of the page forbids them.
        assert "style" not in attrs


OWN = re.compile(
    "html|head|meta|title|style|body|noscript|header|nav|main|section|script|h1|h2|h3|p|div|span|"
    "a|b|i|code|ul|ol|li|button|details|summary|table|thead|tbody|tr|th|td|figure|figcaption|"
    "svg|path|line|rect|circle|text"
)


def test_no_data_block_can_end_itself_or_open_a_comment(hostile):
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', hostile, re.S):
        assert not set("<>&") & set(block)


def test_a_hostile_folder_name_is_escaped(tmp_path):
    folder = make_run(tmp_path / "a<b onclick=x>&", *FEW)
    page = Seen(report.page([folder]))
    assert page.of("title")[0][1] == "a<b onclick=x>& - intfast"
    assert page.of("h1")[0][1] == "a<b onclick=x>&"
    assert_harmless(page)


def test_only_the_pages_own_script_and_style_may_run(hostile):
    page = Seen(hostile)
    policy = next(a["content"] for a, _ in page.of("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    ((_, style),) = page.of("style")
    (script,) = [text for attrs, text in page.of("script") if not attrs]
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy


def test_the_script_never_parses_a_text_as_html():
    for path in PAGE.glob("*.js"):
        code = path.read_text()
        for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert name not in code, f"{path.name}: {name}"


def test_the_folder_of_the_page_stays_small_and_readable():
    lines = [line for path in PAGE.iterdir() for line in path.read_text().splitlines()]
    assert len(lines) <= 750 and max(map(len, lines)) <= 100


# --- the look ----------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", [":root {", ':root[data-theme="dark"] {'])
def test_text_has_contrast_in_both_themes(theme):
    style = (PAGE / "page.css").read_text()
    block = style[style.index(theme) :].split("}")[0]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    pairs = [("ink", "bg"), ("ink", "panel"), ("muted", "bg"), ("muted", "panel")]
    pairs += [("ink", "right-soft"), ("ink", "wrong-soft"), ("muted", "sunken")]
    pairs += [(n, f"{n}-soft") for n in ("right", "wrong", "note", "accent")]
    for front, back in pairs:
        assert contrast(colors[front], colors[back]) >= 4.5, (front, back)
    for i in range(8):
        assert contrast(colors[f"c{i}"], colors["panel"]) >= 3, i


def contrast(front, back):
    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
