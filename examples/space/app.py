"""A page to try a slim model beside its teacher: type texts, move the accuracy budget, see who leaves where.

    make demo && python examples/space/app.py
    python examples/space/app.py --model org/slim-bert --teacher org/my-bert --rows held_out.csv

`--rows` are labelled texts that no training saw: on them a budget is turned into exit settings. For the demo's model
they are generated. On a Space, set the variables MODEL, TEACHER and ROWS instead of flags.
"""

from __future__ import annotations

import argparse
import os
import sys
from html import escape
from pathlib import Path

import gradio as gr
from comparison import MAX_TEXTS, SideBySide, read_texts, render

HERE = Path(__file__).parent
DEMO = Path("build/demo")
EXAMPLES = "a gripping film.\nthe soup was not fresh.\nthe plot is witty, but the ending ruins it."


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL", str(DEMO / "model")))
    parser.add_argument("--teacher", default=os.environ.get("TEACHER", str(DEMO / "teacher")))
    parser.add_argument("--rows", default=os.environ.get("ROWS"), help="csv, tsv, json, jsonl or parquet, with labels.")
    parser.add_argument("--port", type=int, help="Default: the first free one from 7860 on.")
    given = parser.parse_args()
    if given.rows is None:
        if given.model != str(DEMO / "model"):
            parser.error("--rows is missing: labelled texts that no training saw, to turn a budget into settings.")
        if not Path(given.model).is_dir():
            parser.error(f"{given.model} is not there. Run `make demo` first, or name a --model.")
        sys.path.append(str(HERE.parent))  # the generator of the demo's corpus lies there
        from demo_corpus import make_splits

        given.rows = make_splits(train=12_000, calibration=1000, validation=1000, seed=0)["calibration"]  # as demo.py
    return given


def build(models: SideBySide) -> gr.Blocks:
    """The page."""

    def answer(typed: str, budget: float) -> str:
        try:
            return render(models.compare(read_texts(typed), budget), models.exit_layers)
        except ValueError as error:
            raise gr.Error(escape(str(error))) from error

    with gr.Blocks(title="Slim and early: beside the teacher", analytics_enabled=False) as page:
        gr.Markdown(
            "# Slim and early\nEasy texts leave a slim model at an early layer. Here it stands beside its teacher."
        )
        with gr.Row():
            with gr.Column(min_width=300):
                typed = gr.Textbox(EXAMPLES, label=f"Texts, one per line (at most {MAX_TEXTS})", lines=5, max_lines=15)
                budget = gr.Slider(
                    0,
                    10,
                    value=0.5,
                    step=0.25,
                    label="Accuracy budget, in points",
                    info="What early exit may cost on held-out rows. More is faster.",
                )
                ask = gr.Button("Answer", variant="primary")
            with gr.Column(min_width=300, scale=2):
                shown = gr.HTML(label="Answers")
        gr.on(
            [page.load, ask.click, typed.submit, budget.change],
            answer,
            [typed, budget],
            shown,
            trigger_mode="always_last",  # of a slider on the move, the place where it stops
            api_name="answer",
        )
    return page


def main() -> None:
    given = parse()
    try:
        models = SideBySide.load(given.model, given.teacher, given.rows)
    except ValueError as error:
        sys.exit(f"app.py: {error}")
    page = build(models)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # the default ones need the network
    page.launch(
        server_port=given.port,
        theme=gr.themes.Default(**fonts),
        css_paths=HERE / "style.css",
        footer_links=[],
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
