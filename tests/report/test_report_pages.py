"""The pages of a report are drawn from its JSON alone, and need nothing else to be read.

What a page is judged by is not ours: Python's HTML parser, huggingface_hub, a Markdown parser.
"""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sample_report
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from moefy.errors import MoefyError
from moefy.report import (
    draw,
    figures,
    html,
    model_card,
    redraw,
    section_experts,
    section_frontier,
)
from moefy.report.chart import RAMP, THEME, looks
from moefy.report.citations import PARTITION, ROUTER, sources
from moefy.report.format import BANDS
from moefy.report.heatmaps import STEPS
from moefy.report.sections import labels, sections, verdicts
from moefy.report.terminal import show_report

VOID = {"meta", "link", "br", "input", "img", "hr"}
PAGES = {"moefy/report.md", "moefy/report.html", "README.md"}


class Page(HTMLParser):
    """The elements of a page, with the text below each; complains of tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])

    def handle_endtag(self, tag):
        assert self.elements[self._open[-1]][0] == tag, (tag, self.elements[self._open[-1]])
        self._open.pop()

    def handle_data(self, data):
        for number in self._open:
            self.texts[number].append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self, tag: str) -> list[str]:
        return [
            " ".join("".join(text).split())
            for (name, _), text in zip(self.elements, self.texts, strict=True)
            if name == tag
        ]


@pytest.fixture(scope="module")
def report():
    return sample_report.full()


@pytest.fixture(scope="module")
def pages(report):
    return draw(report)


@pytest.fixture(scope="module")
def page(pages):
    return Page(pages["moefy/report.html"])


# The page stands alone


def faults(text: str) -> list[str]:
    """What a page asks of the network, or leaves to sight alone, or names twice."""
    page, found = Page(text), []
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "poster", "data", "srcset"):
            value = attributes.get(name) or ""
            if value and not value.startswith(("#", "data:")):
                found.append(f"{tag} {name} {value}")
        if tag in ("script", "iframe", "object", "embed", "form"):
            found.append(f"{tag} on the page")
        if any(name.startswith("on") for name in attributes):
            found.append(f"{tag} with a handler")
    found += [f"url {url}" for url in re.findall(r"url\((?!#|data:)[^)]*\)|@import", text)]
    for tag in ("svg", "img"):
        found += [f"{tag} without words" for one in page.all(tag)
                  if not (one.get("aria-label") or one.get("alt"))]  # fmt: skip
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    found += [f"id {one} twice" for one in {one for one in ids if ids.count(one) > 1}]
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', text)
    used += [one["aria-labelledby"] for _, one in page.elements if one.get("aria-labelledby")]
    return found + [f"no id {one}" for one in {*used} - {*ids}]


def test_the_page_stands_alone(pages):
    assert faults(pages["moefy/report.html"]) == []
    assert faults(draw(sample_report.empty())["moefy/report.html"]) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("<main", '<script src="https://x.org/a.js"></script><main', "script on the page"),
        ("<main", '<img src="https://x.org/a.png" alt="a"><main', "img src"),
        ("<main", '<p onclick="x()"></p><main', "p with a handler"),
        ("--sans:", "--sans: url(https://x.org/font);", "url url("),
        ('role="img" aria-label', 'role="img" title', "svg without words"),
        ('<section id="speed"', '<section id="quality"', "id quality twice"),
        ('<section id="speed"', "<section", "no id speed"),
    ],
)
def test_a_planted_fault_is_found(before, after, fault, pages):
    text = pages["moefy/report.html"]
    assert before in text
    assert any(found.startswith(fault) for found in faults(text.replace(before, after)))


def test_the_page_tells_the_browser_to_load_nothing(page):
    (policy,) = (m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'unsafe-inline'")


def test_headings_and_tables_can_be_heard(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert len(page.words("caption")) == len(page.all("table")) and all(page.words("caption"))
    assert all(page.words("figcaption")) and all(words for words in page.words("th"))
    (root,) = page.all("html")
    assert root["lang"] == "en"


def test_every_colour_follows_the_theme(pages):
    text = pages["moefy/report.html"]
    style, rest = text.split("</style>")
    assert re.findall(r"#[0-9a-f]{6}\b", rest) == []  # no colour of one theme alone is left
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for name in THEME.values():
        assert f"--{name}:" in light and f"--{name}:" in dark
    assert len(RAMP) == len(STEPS) + 1
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(re.findall(r"--([\w-]+):", style))


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_and_lines_stand_out_in_both_themes(pages):
    style = pages["moefy/report.html"].split("</style>")[0]
    for theme in style.split("prefers-color-scheme: dark", 1):
        colours = dict(reversed(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", theme)))
        back = luminance(colours["card"])
        for name in ("ink", "muted", "blue", "vermillion", "green", "purple", "amber", "grey"):
            light, dark = sorted((luminance(colours[name]), back), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


# It says what the report says


def test_every_part_is_there(report, page):
    names = {section.name for section in sections(report)}
    assert names == {
        "quality", "frontier", "speed", "size", "benchmarks", "generation", "behaviour",
        "prompts", "robustness", "routing", "layers", "finetune", "conversion", "lost",
        "quantized",
    }  # fmt: skip
    assert names <= {attributes.get("id") for attributes in page.all("section")}
    pictures = [one for section in sections(report) for one in section.pictures]
    assert len(page.all("svg")) == len(page.all("figure")) == len(pictures)
    assert len({one.name for one in pictures}) == len(pictures)
    said = [one["aria-label"] or "" for one in page.all("svg")]
    (load,) = (
        text for text in said if text.startswith("Load of each expert in each layer of moe.")
    )
    assert "1 dead" in load


def test_every_score_is_in_the_tables(report, page, pages):
    cells = page.words("td") + page.words("th")
    for rows in report["texts"].values():
        for label, row in rows.items():
            assert any(cell.endswith(label) for cell in cells)
            assert f"{row['perplexity']:.2f}" in cells
            assert f"{row['perplexity']:.2f}" in pages["moefy/report.md"]
    for engine in report["speed"].values():
        for row in engine["rows"]:
            assert f"{row['tokens_per_second']:,.1f}" in cells
    assert "< 0.001 *" not in cells and "0.003 *" in cells and "0.30" in cells


def test_the_terminal_shows_the_tables_of_the_page(report, pages, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    show_report(report, Path("out"))
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    for table in (table for section in sections(report) for table in section.tables):
        shown = [" ".join(row).split() in lines for row in table.rows]
        assert all(shown) if table.on_terminal else table.caption.split() not in lines
    for words in ("static: the same", "SLOWER in", "Warning: 4% of", "Not run: piqa", "Report:"):
        assert words in out


def test_the_frontiers_name_what_is_better_and_what_a_loss_means(report, page, pages):
    found = section_frontier.frontier(report, looks(labels(report)))
    (table,) = found.tables
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["moe"]["beaten by"] == "static (bytes)"
    assert rows["static"]["beaten by"] == "" and rows["dense"]["in words"] == ""
    assert rows["moe, fine-tuned"]["in words"] == "clearly different"
    assert float(rows["moe, fine-tuned"]["KL"]) == pytest.approx((0.430 + 0.258) / 2, abs=1e-3)
    assert rows["dense"]["MB read"] == "269.0" and rows["dense"]["M operations"] == "135"
    assert len(found.pictures) == 4
    assert "moe 0.903 at 189.6" in found.pictures[0].alt
    # A warning stands beside the figures where the weights were quantised before, and only there.
    warning = "a block of 32 holds 13 different values"
    assert any(warning in words for words in page.words("p"))
    fresh = section_frontier.frontier({**report, "rivals": {"levels": 31.6}}, looks(labels(report)))
    assert warning not in " ".join(fresh.lead) and warning in " ".join(found.lead)
    assert "beaten by" in pages["README.md"]
    models = {"q4_K_M": {"types": {"Q5_0": 9, "Q8_0": 1}}, "run q8_0": {"types": {"Q8_0": 9}}}
    fallen = section_frontier.frontier({**report, "models": models}, looks(labels(report))).lead
    assert fallen[-1].endswith("most weights are Q5_0 in q4_K_M.")
    models["q4_K_M"] = {"types": {"Q4_K": 9, "Q6_K": 1}}
    fitting = section_frontier.frontier({**report, "models": models}, looks(labels(report))).lead
    assert len(fitting) == len(fallen) - 1
    old = [{"label": "moe", "kind": "converted", "text": "t", "active": 0.5, "dnll": 1.0}]
    assert not section_frontier.frontier({**report, "frontier": old}, looks(labels(report)))
    assert "beaten by" not in draw({**report, "frontier": old})["README.md"]


def test_a_frontier_goes_through_no_oracle_and_no_loser():
    """Its line is in the picture once, through the points that it should go through."""
    look = looks({"dense": "dense"})["dense"]
    spots = [figures.Spot(n, look, x, y) for n, x, y in (("a", 1, 1), ("b", 2, 1.5), ("c", 3, 0))]
    spots.append(figures.Spot("oracle", look, 1, 0.1, a_model=False))
    (axis,) = figures.frontier(spots, BANDS, axis="MB").axes
    (line,) = (line for line in axis.lines if line.get_drawstyle() == "steps-post")
    assert [*zip(line.get_xdata(), line.get_ydata(), strict=True)] == [(1, 1), (3, 0)]
    assert {text.get_text() for text in axis.texts} >= {"a", "b", "c", "oracle", "noticeable"}


def test_worse_is_told_as_loudly_as_better(page, pages):
    heads = [words for words in page.words("h3")]
    assert heads == ["▼ Does not pay", "▲ Pays", "○ Not measured"]
    assert "SLOWER in transformers on this machine" in page.words("strong")
    assert "slower than dense" in page.words("dd") and "faster than dense" in page.words("dd")
    for text in (pages["moefy/report.md"], pages["README.md"]):
        body = text.split("---\n")[-1]
        assert body.index("Does not pay") < body.index("Pays") < body.index("perplexity")


def test_what_was_seen_in_calibration_is_a_warning(page, pages):
    warning = "Warning: 4% of heldout_code stands word for word in the calibration text."
    assert warning in page.words("p")
    assert warning.replace("_", r"\_") in pages["moefy/report.md"]


def test_what_a_model_writes_is_text(report, page, pages):
    """Written by a model, it is neither markup on the page nor in Markdown."""
    said = " ".join(sample_report.HOSTILE.split())
    assert said in page.words("dd")
    assert page.all("script") == []
    tokens = MarkdownIt().enable("table").parse(pages["moefy/report.md"])
    kinds = {token.type for token in tokens} | {
        child.type for token in tokens for child in token.children or ()
    }
    assert not kinds & {"html_block", "html_inline", "code_inline", "link_open", "image"}
    heads = [t.children for t, after in zip(tokens[1:], tokens, strict=False)
             if after.type == "heading_open"]  # fmt: skip
    assert "head" not in [c.content for children in heads for c in children or ()]
    texts = ["".join(c.content for c in t.children or ()) for t in tokens if t.type == "inline"]
    assert any(said in text for text in texts)
    columns = [len(line.split(" | ")) for line in pages["moefy/report.md"].splitlines()
               if "script" in line and line.startswith("|")]  # fmt: skip
    assert columns == [6]


def test_odd_names_draw(report):
    """Names that matplotlib or a page would take for markup, and numbers that are not known."""
    odd = {**sample_report.empty(), "models": report["models"]}
    odd |= {key: copy.deepcopy(report[key]) for key in ("texts", "routing")}
    name = 'a $x$ <b> & "q" partition=weights refit=false router=linear seed=12345678'
    odd["texts"] = {name: {**odd["texts"]["heldout_wiki"]}}
    odd["texts"][name][name] = odd["texts"][name].pop("static")
    odd["routing"][name] = odd["routing"].pop("moe")
    odd["texts"][name]["moe"] |= {"dnll_standard_error": None, "kl": None, "bits_per_byte": None}
    text = draw(odd)["moefy/report.html"]
    assert any(name in words for words in Page(text).words("th"))
    assert faults(text) == []


PARTS = [key for key, value in sample_report.full().items() if isinstance(value, dict | list)]


@pytest.mark.parametrize("part", [key for key in PARTS if key != "run"])
def test_any_part_may_be_absent(part, report, monkeypatch):
    monkeypatch.setattr(html, "can_draw", lambda: False)  # what is drawn is the same as elsewhere
    for lacking in ({**report, part: type(report[part])()}, {**report}):
        if lacking[part] == report[part]:
            del lacking[part]
        assert set(draw(lacking)) == PAGES


def test_without_matplotlib_the_tables_remain(report, monkeypatch):
    monkeypatch.setattr(html, "can_draw", lambda: False)
    page = Page(draw(report)["moefy/report.html"])
    assert page.all("svg") == [] and len(page.all("table")) > 10
    assert any("pip install 'moefy[report]'" in words for words in page.words("p"))


def test_verdicts_gather_what_is_said():
    told = [{"verdict": v, "sentence": s, "because": {}} for v, s in (("pays", "a: b"), ("x", "c"))]
    found = verdicts({"advice": [*told, {"verdict": "pays", "sentence": "d; e", "because": {}}]})
    assert [(one.word, one.sign) for one in found] == [("pays", "▲"), ("x", "○")]
    assert found[0].sentences == (("a", ": b"), ("d", "; e"))


@pytest.mark.parametrize(
    ("ratio", "low", "high", "word"),
    [
        (1.2, 1.1, 1.3, "faster than dense"),
        (0.8, 0.7, 0.9, "slower than dense"),
        (0.8, 0.7, 1.03, "no clear difference: 0.70× to 1.03×"),
        (1.03, 1.02, 1.04, "no clear difference: 1.02× to 1.04×"),
    ],
)
def test_the_headline_says_no_more_than_the_advice(ratio, low, high, word):
    from moefy.evaluate import advice
    from moefy.report.sections import CLEAR, tiles

    row = {"phase": "decode", "batch": 1, "label": "moe", "tokens_per_second": 1.0}
    row |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    told = {**sample_report.empty(), "main": "moe", "models": {"moe": {"kind": "converted"}}}
    (tile,) = tiles({**told, "speed": {"llama.cpp": {"rows": [row]}}})
    assert tile.word == word and CLEAR == advice.CLEAR
    assert word.startswith(advice.verdict(row).split()[0])


def test_models_are_told_apart(report):
    shown = looks(labels(report))
    assert list(shown)[0] == "dense"
    marks = [(look.colour, look.marker) for look in shown.values()]
    assert len(set(marks)) == len(marks)
    kinds = {str(n): kind for n, kind in enumerate(["converted"] * 3 + ["finetuned"] * 3)}
    assert len({(one.colour, one.marker) for one in looks(kinds).values()}) == 6


# Drawn again


def test_pages_are_drawn_again_from_the_file_alone(report, pages, tmp_path):
    (tmp_path / "moefy").mkdir()
    (tmp_path / "moefy" / "report.json").write_text(json.dumps(report))
    assert redraw(tmp_path) == report
    assert {name: (tmp_path / name).read_text() for name in PAGES} == pages


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (None, 3, "does not exist"),
        ("{", 7, "not JSON"),
        ("[]", 7, "not as moefy writes it"),
        ('{"moefy": "0.1.0", "texts": {}}', 7, "format 1; expected 2"),
        ('{"format": 3}', 7, "format 3; expected 2"),
        ('{"format": 2, "run": {}}', 7, "not as moefy writes it"),
        ('{"format": 2}', 7, "not as moefy writes it"),
    ],
)
def test_a_report_that_cannot_be_drawn(content, code, says, tmp_path):
    (tmp_path / "moefy").mkdir()
    if content is not None:
        (tmp_path / "moefy" / "report.json").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MoefyError) as caught:
        redraw(tmp_path)
    assert caught.value.code == code and says in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_draws_and_opens(report, tmp_path, monkeypatch, capsys):
    from moefy import cli

    (tmp_path / "moefy").mkdir()
    (tmp_path / "moefy" / "report.json").write_text(json.dumps(report))
    opened: list[str] = []
    monkeypatch.setattr(html, "can_draw", lambda: False)
    monkeypatch.setattr("webbrowser.open", lambda page: opened.append(page) or len(opened) < 2)
    for code in (0, 5):
        monkeypatch.setattr(
            "sys.argv", ["moefy", "report", str(tmp_path), "--redraw", "--open", "--quiet"]
        )
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
    page = (tmp_path / "moefy" / "report.html").as_uri()
    assert opened == [page] * 2
    assert capsys.readouterr().err == f"moefy: no browser was found; open {page}\n"


# The card


def test_the_card_is_one_of_the_hub(report, pages):
    data = ModelCard(pages["README.md"]).data
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.base_model == "owner/SmolModel-135M" and data.license == "apache-2.0"
    assert data.language == ["en"] and {"moefy", "moe"} <= set(data.tags or ())
    found = {
        (one.dataset_name, one.metric_type): one.metric_value for one in data.eval_results or ()
    }
    label = "moe, fine-tuned"
    wiki = report["texts"]["heldout_wiki"][label]["perplexity"]
    assert found["heldout_wiki", "perplexity"] == pytest.approx(wiki, abs=1e-3)
    task = report["benchmarks"]["continue_wiki"][label]["value"]
    assert found["continue_wiki", "acc"] == pytest.approx(task, abs=1e-3)
    assert len(found) == 4  # and not the benchmark that was not run


def test_the_first_card_has_no_numbers(report):
    text = model_card(report["run"])
    data = ModelCard(text).data
    assert data.eval_results is None and data.base_model == "owner/SmolModel-135M"
    assert "`moefy report` measures how much" in text and "without training" in text


def test_a_fine_tuned_card_tells_of_both(report, pages):
    trained = report["finetune"]["moe, fine-tuned"]["summary"]
    for text in (pages["README.md"], model_card(report["run"], trained=trained)):
        assert "and fine-tuned on 241,664 tokens" in text and "without training" not in text
        assert "tokens of `train.txt`" in text and "from 4.100 to 3.200" in text


def test_a_card_names_no_folder_of_its_maker(report):
    run = {**report["run"], "model": "/home/me/models/mine/", "hub_id": None}
    run["calibration"] = {**run["calibration"], "source": "/home/me/secret/calib.txt"}
    text = model_card(run)
    assert "/home" not in text and "# mine, 50%" in text and "calib.txt" in text
    assert ModelCard(text).data.base_model is None


def test_a_card_of_our_own_class_says_what_it_needs(report):
    run = {**report["run"], "target": "moefy", "engines": ["transformers"]}
    assert "import moefy.modeling\n" in model_card(run) and "It needs moefy" in model_card(run)
    static = {**report["run"], "shape": {**report["run"]["shape"], "num_experts": 0}}
    assert ModelCard(model_card(static)).data.tags == ["moefy"]
    assert "statically pruned" in model_card(static)


def test_a_licence_of_its_own_is_inherited(report):
    told = {"license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/x"}
    text = model_card({**report["run"], "licence": told})
    data = ModelCard(text).data
    assert (data.license, data["license_name"]) == ("other", "gemma")
    assert "[gemma](https://ai.google.dev/x), inherited" in text
    assert "named none" in model_card({**report["run"], "licence": {}})


def test_every_method_names_its_source():
    """The sources of a card are those that the modules tell of themselves."""
    import inspect

    from moefy.convert.stages import _module

    recipe = {"refit": False, "drift": 0, "calibration": "x", "partition": "", "router": ""}
    linear = re.findall(r"arXiv (\d+\.\d+)", " ".join(ROUTER["linear"]))
    for table, package, stage in ((PARTITION, "partition", "split"), (ROUTER, "router", "fit")):
        for name, works in table.items():
            module = _module(package, name)
            text = inspect.getsource(module) + (getattr(module, stage).__doc__ or "")
            for number in re.findall(r"arXiv (\d+\.\d+)", " ".join(works)):
                if (
                    works is not ROUTER["linear"] and number not in linear
                ):  # in modules of their own
                    assert number in text, (name, number)
    assert sources({**recipe, "partition": "static", "router": "linear"}) == [*PARTITION["static"]]
    ours = {"partition": "alternating", "router": "linear", "refit": True, "drift": 0.5}
    assert len(sources({**recipe, **ours, "calibration": "self"})) == 7


def test_what_even_loads_cost_is_told_where_it_was_tried():
    report = sample_report.full()
    found = section_experts.layers(report)
    (table,) = found.tables
    assert [row[0] for row in table.rows] == ["0%", "25%", "50%", "75%", "100%"]
    assert table.rows[0][1:] == ("0.60", "0.60", "100.00%")
    assert table.rows[-1][1:] == ("0.10", "0.10", "97.00%")
    assert "evenness" in {picture.name for picture in found.pictures}
    for layer in report["run"]["layers"]:
        layer["balance"] = []
    assert "evenness" not in {picture.name for picture in section_experts.layers(report).pictures}
