"""The Space: what it computes, that nothing typed or named becomes markup, and the page itself in a browser."""

from __future__ import annotations

import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import demo
import hf_costeff
from helpers import sentence_rows, tiny_bert, tiny_model, word_tokenizer
from space.comparison import EARLY, FULL, MAX_TEXTS, TEACHER, SideBySide, read_texts, render

APP = Path(__file__).parent.parent / "examples" / "space" / "app.py"
HOSTILE = "<script>window.hacked = 1</script>"
NAMES = [HOSTILE, "<b>${7*7}</b> & bright"]
LABELS = {
    "num_labels": 2,
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: row for row, name in enumerate(NAMES)},
}
TEXTS = [
    "a good film",
    f"{HOSTILE} ${{7*7}} {{{{7*7}}}} <img src='x' onerror='window.hacked = 1'> & so on",
    "the plot was not very bright but the music ends well",
    "dull",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A slim model, a teacher with the same labels, and rows that are labelled as the slim model does at full depth."""
    path = tmp_path_factory.mktemp("space")
    slim, tokenizer = tiny_model(**LABELS), word_tokenizer()
    texts = list(sentence_rows(300)["text"])
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():  # so that every exit gives either answer to some of the texts
        for head, logits in zip(slim.costeff.exits.values(), slim(**batch).exit_logits, strict=True):
            head.classifier.bias -= logits.mean(0)
    slim.save_pretrained(path / "slim")
    tiny_bert(**LABELS).save_pretrained(path / "teacher")
    for name in ("slim", "teacher"):
        tokenizer.save_pretrained(path / name)
    answers = slim.predict(**batch).logits.argmax(-1)
    with open(path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, answers.tolist(), strict=True)])
    return path


@pytest.fixture(scope="module")
def models(folder) -> SideBySide:
    return SideBySide.load(str(folder / "slim"), str(folder / "teacher"), str(folder / "rows.csv"))


# --- what is computed


def test_answers_are_those_of_the_models_themselves(models):
    found = models.compare(TEXTS, budget=5, repeats=1)
    batch = models.tokenizer(TEXTS, return_tensors="pt", padding=True, truncation=True)
    expected = models.slim.predict(**batch, early_exit=found.settings)
    assert len(set(expected.exit_layer.tolist())) > 1
    assert [answer.exit_layer for answer in found.answers] == expected.exit_layer.tolist()
    assert [answer.label for answer in found.answers] == [
        LABELS["id2label"][row] for row in expected.logits.argmax(-1).tolist()
    ]
    logits = models.teacher(**batch).logits
    assert [answer.teacher_label for answer in found.answers] == [
        LABELS["id2label"][row] for row in logits.argmax(-1).tolist()
    ]
    for answer, own, others in zip(found.answers, expected.probabilities, logits.softmax(-1), strict=True):
        assert answer.confidence == pytest.approx(float(own.max()), abs=1e-5)
        assert answer.teacher_confidence == pytest.approx(float(others.max()), abs=1e-5)


def test_the_confidence_shown_at_the_exit_that_answered_is_that_of_the_answer(models):
    found = models.compare(TEXTS, budget=5, repeats=1)
    for answer in found.answers:
        assert len(answer.by_exit) == 4
        assert answer.by_exit[answer.exit_layer - 1] == pytest.approx(answer.confidence, abs=1e-5)
    temperatures = torch.tensor(found.settings.temperatures)
    exits = models.slim(**models.tokenizer(TEXTS[0], return_tensors="pt")).exit_logits
    chances = [(logits[0] / heat).softmax(-1).max() for logits, heat in zip(exits, temperatures, strict=True)]
    torch.testing.assert_close(torch.tensor(found.answers[0].by_exit), torch.stack(chances), rtol=1e-4, atol=1e-5)


def test_a_bigger_budget_lets_texts_leave_earlier_and_says_what_it_costs(models):
    by_budget = [models.settings(budget).calibration for budget in (0, 5, 100)]
    layers = [seen["mean_exit_layer"] for seen in by_budget]
    assert layers == sorted(layers, reverse=True) and layers[0] > layers[1] > layers[2] == 1
    assert all(seen["full_depth"] == 1 for seen in by_budget)  # the labels are the model's own
    assert by_budget[0]["early_exit"] == 1 and 0.95 <= by_budget[1]["early_exit"] < 1
    everybody = models.compare(TEXTS, budget=100, repeats=1)
    assert {answer.exit_layer for answer in everybody.answers} == {1}


def test_every_contender_is_timed_on_the_texts_that_were_typed(models):
    times = models.compare(TEXTS, budget=0, repeats=2).ms_per_text
    assert list(times) == [TEACHER, FULL, EARLY] and all(0 < ms < 1000 for ms in times.values())


def test_a_text_longer_than_the_model_can_take_is_cut(models):
    assert models.compare(["good " * 100], budget=0, repeats=1).answers[0].exit_layer >= 1


# --- what is shown


def test_texts_and_label_names_stay_text_whatever_they_hold(models):
    comparison = models.compare(TEXTS, budget=0, repeats=1)
    page = render(comparison, models.exit_layers)
    tree = ElementTree.fromstring(page)  # an unescaped < or & would not even parse
    allowed = {"div", "table", "thead", "tbody", "tr", "th", "td", "p", "section", "b", "i", "span", "em"}
    assert {element.tag for element in tree.iter()} <= allowed
    assert [p.text for p in tree.iter("p") if p.get("class") == "text"] == TEXTS
    bold = [b.text for b in tree.iter("b") if b.text]
    assert bold == [answer.label for answer in comparison.answers] and set(bold) <= set(NAMES)
    assert "<script" not in page and "<img" not in page


def test_the_chart_has_a_bar_for_every_exit_and_marks_the_one_that_answered(models):
    comparison = models.compare(TEXTS, budget=5, repeats=1)
    cards = list(ElementTree.fromstring(render(comparison, models.exit_layers)).iter("section"))
    for card, answer in zip(cards, comparison.answers, strict=True):
        bars = card.findall(".//div[@class='chart']/div")
        states = [bar.get("class") for bar in bars]
        left = answer.exit_layer - 1
        assert states == [*["exit ran"] * left, "exit left", *["exit saved"] * (3 - left)]
        widths = [float(bar.find("i/b").get("style").removeprefix("width:").removesuffix("%")) for bar in bars]
        assert widths == pytest.approx([100 * confidence for confidence in answer.by_exit], abs=0.06)


def test_lines_are_texts_and_blank_ones_are_not():
    assert read_texts("  one \n\n\t\ntwo\n") == ["one", "two"]
    with pytest.raises(ValueError, match="Type a text"):
        read_texts(" \n ")
    with pytest.raises(ValueError, match=f"{MAX_TEXTS + 1} texts"):
        read_texts("good\n" * (MAX_TEXTS + 1))


# --- what is refused


def test_models_that_do_not_go_together_are_refused(folder, models, tmp_path):
    rows = str(folder / "rows.csv")
    with pytest.raises(ValueError, match="without exits"):
        SideBySide.load(str(folder / "teacher"), str(folder / "teacher"), rows)
    with pytest.raises(ValueError, match="teacher's labels"):
        SideBySide(models.slim, tiny_bert(num_labels=2), models.tokenizer, models.records)
    with pytest.raises(ValueError, match="regression"):
        SideBySide(tiny_model(num_labels=1), models.teacher, models.tokenizer, models.records)


# --- the page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


OWN = ("MODEL", "TEACHER", "ROWS")


@contextmanager
def running(script: Path, words: Sequence[object], folder: Path, **variables: str) -> Iterator[tuple[str, str]]:
    """The app as a user starts it, with one command in a folder: its address, and what it has printed."""
    pytest.importorskip("gradio")
    kept = {name: value for name, value in os.environ.items() if name not in OWN}
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(script), *map(str, words)]
    log = folder / "log"
    with open(log, "w") as out:
        started = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env={**kept, **settings, **variables})
    try:
        for _ in range(240):
            if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                break
            assert started.poll() is None, log.read_text()
            time.sleep(0.5)
        yield f"{found[0]}/", log.read_text()
    finally:
        started.terminate()
        started.wait(30)


@pytest.fixture
def app(monkeypatch):
    """The script as a module."""
    pytest.importorskip("gradio")
    monkeypatch.syspath_prepend(str(APP.parent))
    for name in OWN:
        monkeypatch.delenv(name, raising=False)
    return importlib.import_module("app")


@pytest.fixture(scope="module")
def address(folder):
    words = ["--model", folder / "slim", "--teacher", folder / "teacher", "--rows", folder / "rows.csv"]
    with running(APP, words, folder) as (url, _):
        yield url


def ask(address: str, typed: str, budget: float) -> ElementTree.Element:
    """The answer that the page would show."""
    from gradio_client import Client

    return ElementTree.fromstring(Client(address, verbose=False).predict(typed, budget, api_name="/answer"))


def test_without_flags_it_shows_what_the_demo_leaves(app, tmp_path):
    """Two folders under build/demo, where `make demo` puts them; held-out rows are generated as the demo's."""
    labels = dict(enumerate(demo.LABEL_NAMES))
    for name, make in (("model", tiny_model), ("teacher", tiny_bert)):
        make(num_labels=2, id2label=labels).save_pretrained(tmp_path / app.DEMO / name)
        word_tokenizer().save_pretrained(tmp_path / app.DEMO / name)
    with running(APP, [], tmp_path) as (address, _):
        shown = ask(address, app.EXAMPLES, 0.5)
    assert [p.text for p in shown.iter("p") if p.get("class") == "text"] == app.EXAMPLES.splitlines()
    assert {b.text for b in shown.iter("b") if b.text} <= set(labels.values())
    assert "On 1,000 rows" in next(p.text for p in shown.iter("p") if p.get("class") == "note")


def test_the_demo_leaves_its_models_where_the_page_looks(app, monkeypatch, tmp_path):
    asked = {}

    def compress(teacher, splits, output_dir, **options):
        asked.update(teacher=Path(teacher), model=Path(output_dir), rows=splits[options["calibration_split"]])
        raise KeyboardInterrupt  # all that is to be seen here

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "compress", compress)
    monkeypatch.setattr(demo, "train_teacher", lambda *given: None)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    with pytest.raises(KeyboardInterrupt):
        demo.main()
    asked["model"].mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["app.py"])
    given = app.parse()
    assert (Path(given.model), Path(given.teacher)) == (asked["model"], asked["teacher"])
    assert list(given.rows) == list(asked["rows"])


@pytest.mark.slow
def test_as_a_space_it_runs_from_its_own_folder_with_the_package_beside_it(folder, tmp_path):
    """As docs/how-to/space.md puts it together: only what requirements.txt names is installed there."""
    place = tmp_path / "space"
    shutil.copytree(APP.parent, place)
    shutil.copytree(Path(hf_costeff.__file__).parent, place / "hf_costeff")
    shutil.copy(folder / "rows.csv", place)
    with open(place / "hf_costeff" / "__init__.py", "a") as file:
        file.write("print('the copy is in use')\n")
    variables = {"MODEL": str(folder / "slim"), "TEACHER": str(folder / "teacher"), "ROWS": "rows.csv"}
    with running(place / "app.py", [], place, **variables, PYTHONPATH="") as (address, printed):
        assert "the copy is in use" in printed
        assert len(list(ask(address, "a good film", 0).iter("section"))) == 1


def test_a_spaces_requirements_are_those_of_the_package_and_the_page():
    settings = ConfigParser()
    settings.read(APP.parents[2] / "setup.cfg")
    needed = settings["options"]["install_requires"] + settings["options.extras_require"]["space"]
    lines = (APP.parent / "requirements.txt").read_text().splitlines()
    assert sorted(line for line in lines if not line.startswith("#")) == sorted(needed.split())


def test_a_model_that_cannot_be_loaded_is_one_line(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", "nowhere", "--rows", "rows.csv"])
    with pytest.raises(SystemExit, match=r"^app\.py: The checkpoint 'nowhere' \(there is no local folder"):
        app.main()


@pytest.mark.parametrize(
    ("words", "advice"),
    [([], "build/demo/model is not there. Run `make demo` first"), (["--model", "org/slim"], "--rows is missing")],
)
def test_without_the_demos_model_or_rows_of_your_own_the_app_says_what_to_do(
    words, advice, app, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["app.py", *words])
    with pytest.raises(SystemExit) as stop:
        app.parse()
    assert stop.value.code == 2 and advice in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as running:
        window = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield window
        window.close()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1200, 900), (360, 740)])
def test_a_person_types_submits_and_moves_the_slider(width, height, address, browser):
    page = browser.new_page(viewport={"width": width, "height": height})
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.locator(".costeff section").nth(2).wait_for()  # the three texts it begins with

    page.locator("textarea").fill("\n".join(TEXTS))
    page.get_by_role("button", name="Answer").click()
    page.locator(".costeff section").nth(3).wait_for()
    assert page.locator(".costeff .text").all_inner_texts() == TEXTS
    assert page.locator(".costeff section > p > b").first.inner_text() in NAMES
    assert page.evaluate("window.hacked === undefined") and page.locator(".costeff img, .costeff script").count() == 0

    before = page.locator(".costeff .note").inner_text()
    page.locator("input[type=range]").press("End")  # ten points
    page.wait_for_function("before => document.querySelector('.costeff .note').innerText !== before", arg=before)
    assert mean_exit_layer(page.locator(".costeff .note").inner_text()) < mean_exit_layer(before)

    assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert page.locator(".costeff section").first.bounding_box()["width"] > 0.75 * min(width, 600)
    page.locator("textarea").fill(" ")
    page.get_by_role("button", name="Answer").click()
    page.get_by_text("Type a text, or paste several").wait_for()
    assert complaints == [] and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


def mean_exit_layer(note: str) -> float:
    return float(note.split("mean exit layer ")[1].split(",")[0])
