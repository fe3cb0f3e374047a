"""The report's page: what it tells, that it quotes any text as text, and the command that writes it."""

from __future__ import annotations

import dataclasses
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from datasets import disable_progress_bars

from helpers import sentence_rows, tiny_config, tiny_model, word_tokenizer
from hf_costeff import ExitConfig, promises
from hf_costeff.cli import main
from hf_costeff.exit_replay import ExitLogits
from hf_costeff.exit_report import Chart, Heading, Paragraph, Table, to_html, to_markdown, write_exit_report

NASTY = "<script>alert('x')</script> | [a](b) `c` *d*\n# e"
CALIBRATION = {"rows": 50, "disagreement": 0.02, "mean_exit_layer": 1.5, "speedup_over_full_depth": 1.3}
PROMISE = {"loss": "max_disagreement", "epsilon": 0.05, "delta": 0.1, "rows": 400, "flips": 3}


def config_of(**changes):
    settings = ExitConfig(threshold=0.5, calibration={**CALIBRATION, "promise": PROMISE}).to_dict()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 2}
    return tiny_config(**{**sizes, "id2label": {0: NASTY, 1: "bright"}, "exit_config": settings, **changes})


def records_of(rows: int = 40) -> ExitLogits:
    """The first exit is sure of class 1 everywhere, and wrong in one row of twenty, which alone is of class 0."""
    labels = torch.ones(rows, dtype=torch.long)
    labels[::20] = 0
    last = torch.stack([1.0 - labels, labels.float()], -1) * 4
    return ExitLogits(
        torch.stack([torch.tensor([[0.0, 4.0]]).repeat(rows, 1), last], 1), torch.arange(rows) % 30 + 2, labels
    )


TEXTS = [f"{NASTY} {row}" for row in range(40)]


@pytest.fixture(autouse=True)
def without_charts(request, monkeypatch):
    """Charts take most of the time, so only the test that looks at them draws them."""
    if "charts" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture
def charts():
    pytest.importorskip("matplotlib")


class Reader(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_html_quotes_names_and_texts_as_text_and_shows_charts(tmp_path, charts):
    page = write_exit_report(records_of(), config_of(), "accuracy", tmp_path, texts=TEXTS)
    assert page == tmp_path / "report.html"
    reader = Reader(page.read_text())
    assert "script" not in reader.tags and "a" not in reader.tags
    assert TEXTS[0] in reader.texts and TEXTS[20] in reader.texts and TEXTS[1] not in reader.texts
    assert NASTY in reader.texts
    pictures = re.findall(r'<img src="([^"]+)"', page.read_text())
    assert pictures == ["reliability.png", "curve.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_markdown_quotes_them_too(tmp_path):
    page = write_exit_report(records_of(), config_of(), "accuracy", tmp_path, texts=TEXTS, markdown=True)
    assert page == tmp_path / "report.md"
    quoted = r"&lt;script&gt;alert('x')&lt;/script&gt; \| \[a\](b) \`c\` \*d\* \# e"
    text = page.read_text()
    assert f"| {quoted} 20 | {quoted} | {quoted} | bright | 1 |" in text and "<script" not in text
    assert len({line.replace(r"\|", "").count("|") for line in text.splitlines() if quoted in line}) == 2


def test_it_tells_what_early_exit_costs_and_whom(tmp_path):
    text = write_exit_report(records_of(), config_of(), "accuracy", tmp_path, texts=TEXTS, markdown=True).read_text()
    for words in (
        "On 40 rows accuracy is 1.0000 at full depth and 0.9500 with early exit. A row runs 1.00 of 2 layers",
        "The settings were chosen before: On 50 rows: 2.00% answer otherwise",
        "for at most 5.00% of them the early answer differs",
        "| 1 | 0.9500 | 100.0% |",
        "| 2 | 1.0000 | 0.0% |",
        "| 2 | 100.0% | 0.0% | -100.0 | 1.00 | rare |",
        "| bright | 38 | 100.0% | 100.0% | +0.0 | 1.00 |  |",
        "2 of 40 rows are answered otherwise than at full depth.",
    ):
        assert words in text
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings[1:] == [
        "Exit by exit",
        "Speed and accuracy",
        "Damage by class",
        "Damage by length",
        "Texts that flip",
    ]


def test_without_texts_none_is_quoted(tmp_path):
    text = write_exit_report(records_of(), config_of(), "accuracy", tmp_path, markdown=True).read_text()
    assert "Texts that flip" not in text and "Damage by class" in text


def test_at_most_a_hundred_texts_are_quoted(tmp_path):
    records, texts = records_of(3000), ["a text"] * 3000
    page = write_exit_report(records, config_of(), "accuracy", tmp_path, texts=texts, markdown=True).read_text()
    assert "150 of 3,000 rows are answered otherwise than at full depth; the first 100 are shown." in page
    assert page.count("| a text |") == 100


def test_multi_label_names_the_labels_that_are_on(tmp_path):
    config = config_of(problem_type="multi_label_classification", id2label={0: "dull", 1: "bright"})
    logits = torch.tensor([[[4.0, 4.0], [4.0, -4.0]], [[-4.0, -4.0], [-4.0, 4.0]]])
    records = ExitLogits(logits, torch.full((2,), 8), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    text = write_exit_report(records, config, "f1", tmp_path, texts=["a", "b"], markdown=True).read_text()
    assert "| a | dull | dull | dull, bright | 1 |" in text and "| b | bright | bright | none | 1 |" in text
    assert "Damage by class" not in text and "Damage by length" in text


def test_regression_has_no_flips_and_no_damage(tmp_path):
    settings = ExitConfig("patience", patience=0).to_dict()
    config = config_of(num_labels=1, id2label={0: "score"}, exit_config=settings)
    values = torch.arange(30.0)
    records = ExitLogits(torch.stack([-values, values], 1).unsqueeze(-1), torch.full((30,), 8), values)
    text = write_exit_report(records, config, "spearman", tmp_path, texts=["a"] * 30, markdown=True).read_text()
    assert "spearman is 1.0000 at full depth and -1.0000 with early exit" in text
    assert "Damage" not in text and "flip" not in text and "reliability" not in text


@pytest.mark.parametrize("drawn", [False, True])
def test_every_exit_of_a_gated_model_is_judged_on_the_rows_asked(drawn, tmp_path, request):
    if drawn:
        request.getfixturevalue("charts")
    skipped = torch.zeros(40, 2, dtype=torch.bool)
    skipped[::20, 0] = True  # the two rows that the first exit has wrong
    for records, cells in (
        (dataclasses.replace(records_of(), skipped=skipped), "| 1 | 95.0% | 1.0000 | 95.0% |"),
        (dataclasses.replace(records_of(), skipped=torch.tensor([[True, False]] * 40)), "| 1 | 0.0% |  | 0.0% |"),
    ):
        config = config_of(skip_gates="linear")
        text = write_exit_report(records, config, "accuracy", tmp_path, markdown=True).read_text()
        assert cells in text and "| 2 | 100.0% | 1.0000 |" in text
        assert "| exit after layer | rows asked | accuracy |" in text and "judged on the rows asked" in text
    assert "rows asked" not in write_exit_report(records_of(), config_of(), "accuracy", tmp_path).read_text()


def test_a_gated_regression_without_settings_is_reported_at_full_depth(tmp_path):
    values = torch.arange(30.0)
    logits, skipped = torch.stack([-values, values], 1).unsqueeze(-1), torch.tensor([[True, False]] * 30)
    records = ExitLogits(logits, torch.full((30,), 8), values, skipped=skipped)
    config = config_of(num_labels=1, id2label={0: "score"}, exit_config=None, skip_gates="linear")
    text = write_exit_report(records, config, "spearman", tmp_path, markdown=True).read_text()
    assert "A row runs 1.00 of 2 layers on average, leaves after layer 2.00 and takes 1.00 times fewer" in text
    with pytest.raises(ValueError, match="The model has no exit settings"):
        write_exit_report(records, config_of(num_labels=1, exit_config=None), "spearman", tmp_path)
    with pytest.raises(ValueError, match="The model has one exit, after its last layer"):
        write_exit_report(records, config_of(num_labels=1, exit_config=None, exit_layers=[2]), "spearman", tmp_path)


def test_a_model_that_skips_alone_is_reported_at_full_depth(tmp_path):
    records = dataclasses.replace(records_of(), skipped=torch.tensor([[True, False]] * len(records_of().logits)))
    config = config_of(exit_config=None, skip_gates="linear")
    text = write_exit_report(records, config, "accuracy", tmp_path, markdown=True).read_text()
    assert "A row runs 1.00 of 2 layers on average, leaves after layer 2.00 and takes 1.00 times fewer" in text


def test_without_matplotlib_the_page_has_no_charts(tmp_path):
    text = write_exit_report(records_of(), config_of(), "accuracy", tmp_path, texts=TEXTS).read_text()
    assert "<img" not in text and "Speed and accuracy" in text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_model_without_settings_has_nothing_to_report(tmp_path):
    with pytest.raises(ValueError, match="The model has no exit settings"):
        write_exit_report(records_of(), config_of(exit_config=None), "accuracy", tmp_path)


def test_blocks_are_rendered_in_order():
    blocks = [Heading("a & b"), Paragraph("c < d"), Table(["e"], [["f"]]), Chart("g.png", 'h "i"')]
    assert Reader(to_html(blocks)).tags[-9:] == ["h2", "p", "table", "tr", "th", "tr", "td", "p", "img"]
    assert to_markdown(blocks) == '## a &amp; b\n\nc &lt; d\n\n| e |\n| --- |\n| f |\n\n![h "i"](g.png)\n'


# --- the command


@pytest.fixture
def slim(tmp_path, monkeypatch) -> str:
    disable_progress_bars()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = tiny_model(num_labels=2, exit_config=ExitConfig(threshold=1.0).to_dict())
    with torch.no_grad():  # the first exit says the opposite of what it said, so that answers change
        for parameter in model.costeff.exits["1"].classifier.parameters():
            parameter.neg_()
    model.save_pretrained(tmp_path / "slim")
    word_tokenizer().save_pretrained(tmp_path / "slim")
    sentence_rows(60).to_csv(tmp_path / "rows.csv")
    sentence_rows(60).to_csv(tmp_path / "train.csv")
    return str(tmp_path / "slim")


def files(folder: str) -> list[str]:
    return [f"--validation_file={folder}/../rows.csv"]


def test_the_command_writes_the_page_and_says_where(slim, tmp_path, capsys):
    out = tmp_path / "told"
    assert main(["report", slim, *files(slim), "--output_dir", str(out), "--metric", "f1", "--markdown"]) == 0
    assert f"The report is in {out / 'report.md'}." in capsys.readouterr().out
    text = (out / "report.md").read_text()
    assert "On 60 rows f1 is" in text and "Texts that flip" in text
    assert any(sentence in text for sentence in sentence_rows(60)["text"])


def test_the_command_leaves_texts_out_when_asked(slim, tmp_path):
    assert main(["report", slim, *files(slim), "--output_dir", str(tmp_path / "told"), "--no_texts"]) == 0
    assert "Texts that flip" not in (tmp_path / "told" / "report.html").read_text()


@pytest.mark.parametrize("inside", ["", "/report"])
def test_texts_do_not_go_into_a_folder_that_may_be_pushed(inside, slim, capsys):
    assert main(["report", slim, *files(slim), "--output_dir", slim + inside]) == 1
    assert "lies in the model's folder, which may be pushed" in capsys.readouterr().err


def test_the_command_refuses_what_it_cannot_report_on(slim, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "told")]
    assert main(["report", slim, *out, "--dataset", f"{slim}/.."]) == 1
    assert "No rows to report on are named" in capsys.readouterr().err
    assert main(["report", slim, *files(slim), *out, "--metric", "bleu"]) == 1
    assert "'bleu'" in capsys.readouterr().err
    tiny_model(num_labels=2).save_pretrained(slim)
    assert main(["report", slim, *files(slim), *out]) == 1
    assert "The model has no exit settings" in capsys.readouterr().err and not (tmp_path / "told").exists()


def test_the_command_knows_that_a_gated_model_skips(slim, tmp_path, caplog):
    calibration = {"skip_threshold": 0.5}
    model = tiny_model(num_labels=2, skip_gates="linear", exit_pooling="mean")
    model.config.exit_config = ExitConfig(threshold=1.0, calibration=calibration).to_dict()
    model.save_pretrained(slim)
    promises.logger.addHandler(caplog.handler)
    promises.logger.warning_once.cache_clear()
    try:
        assert main(["report", slim, *files(slim), "--output_dir", str(tmp_path / "told")]) == 0
    finally:
        promises.logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "skip threshold" in record.getMessage()]
