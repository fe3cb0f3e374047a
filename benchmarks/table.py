"""Write the measured tables of docs/results.md from benchmarks/results/*.json.

    python benchmarks/table.py

Each table stands between two marker comments and is replaced whole, so a figure in the page is always one that a run
has written.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from hf_costeff.markdown import markdown_table
from results_file import RESULTS, rows_of

PAGE = RESULTS.parent.parent / "docs" / "results.md"
TASKS = ("sst2", "mrpc", "cola", "rte", "stsb", "qnli", "mnli", "clinc150")
VARIANTS = ("base", "final-exit", "random", "single-exit", "last-exit", "two-stage", "squat")


def main() -> None:
    tables = {
        "tasks": tasks_table(),
        "seeds": seeds_table(),
        "soft-labels": soft_labels_table(),
        "clock": clock_table(),
        "ablations": ablation_table(),
        "peers": peers_table(),
        "promises": promises_table(),
        "curves": curves_table(),
        "difficulty": difficulty_table(),
        "cascades": cascades_table(),
        "cascades-paper": paper_form_table(),
        "cascade-clock": cascade_clock_table(),
    }
    if block_runs():
        tables["block-quality"] = block_quality_table()
    if (RESULTS / "block-size.json").exists():
        tables["block-size"] = block_size_table()
    if (RESULTS / "block-speed.json").exists():
        tables["block-speed"] = block_speed_table()
    if skipping_runs():
        tables["skipping"] = skipping_table()
    text = PAGE.read_text()
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        text, places = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if not places:
            raise ValueError(f"{PAGE} has no markers for the table {name!r}. Write <!-- {name}:begin --> and :end.")
    PAGE.write_text(text)


OTHERS = re.compile("-(same|last)-")
"""In the name of a run whose exits have another teacher than the recipe would choose, as a comparison."""


def all_runs() -> dict[str, dict]:
    files = (file for task in TASKS for file in sorted(RESULTS.glob(f"{task}-*-*.json")))
    return {file.stem: json.loads(file.read_text()) for file in files}


def runs() -> list[tuple[str, dict]]:
    """Every run of the recipe as it is; of what was not run since, the other."""
    found = all_runs()
    as_it_is = {name: OTHERS.sub("-", name) for name in found}
    return [(name, run) for name, run in found.items() if as_it_is[name] == name or as_it_is[name] not in found]


def soft_labels_table() -> str:
    """What is kept of the teacher with soft labels from the exit at its depth and from the last, all else alike."""
    taught: dict[str, dict[str, dict]] = {}
    by_itself: dict[str, str] = {}
    for name, run in all_runs().items():
        teacher = run["stages"]["prediction"]["soft_label_exit"]
        taught.setdefault(OTHERS.sub("-", name), {})[teacher] = run
        if not OTHERS.search(name):
            by_itself[name] = teacher
    rows = []
    for name, pair in taught.items():
        if len(pair) == 2:
            kept, metric = [], pair["same"]["metric"]
            for run in (pair["same"], pair["last"]):
                full, paper = run["rows"][2]["metrics"][metric], run["at_paper_flops"]
                reached = (full, paper["early_exit"], paper["on_validation_texts"]["early_exit"])
                kept.append([value / run["rows"][0]["metrics"][metric] for value in reached])
            cells = [f"{before:.1%} / {after:.1%}" for before, after in zip(*kept, strict=True)]
            rows.append([name, metric, by_itself.get(name, ""), *cells])
    header = ["run", "metric", "auto takes", "full depth, same / last", "chosen for 1/19, same / last"]
    return markdown_table([*header, "1/19 on these texts, same / last"], rows)


def tasks_table() -> str:
    lines = [
        "| run | metric | teacher | assistant | slim, full depth | kept | early exit, chosen for 1/19 | kept | came to "
        "| early exit, 1/19 on these texts | kept | mean exit layer | parameters | FLOPs, full depth |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs():
        teacher, assistant, full, _ = run["rows"]
        metric, paper = run["metric"], run["at_paper_flops"]
        base, low, high = teacher["metrics"][metric], *paper["difference_to_teacher_95"]["full_depth"][1:]
        exact = paper["on_validation_texts"]
        early_low, early_high = paper["difference_to_teacher_95"]["early_exit"][1:]
        lines.append(
            f"| {name} | {metric} | {base:.4f} | {assistant['metrics'][metric]:.4f} "
            f"| {full['metrics'][metric]:.4f} ({100 * low:+.1f} to {100 * high:+.1f} points) "
            f"| {full['metrics'][metric] / base:.1%} "
            f"| {paper['early_exit']:.4f} ({100 * early_low:+.1f} to {100 * early_high:+.1f} points) "
            f"| {paper['early_exit'] / base:.1%} | 1/{teacher['flops_per_row_at_128'] / paper['flops']:.1f} "
            f"| {exact['early_exit']:.4f} | {exact['early_exit'] / base:.1%} "
            f"| {exact['mean_exit_layer']:.2f} of {len(full['exit_shares'])} "
            f"| 1/{teacher['parameters'] / full['parameters']:.2f} "
            f"| 1/{teacher['flops_per_row_at_128'] / full['flops_per_row_at_128']:.2f} |"
        )
    return "\n".join(lines)


def seeds_table() -> str:
    """What each task keeps of its teacher, over seeds; a seed changes every stage, the teacher too."""
    lines = [
        "| task | seeds | teacher | slim, full depth | kept | early exit, chosen for 1/19 | kept "
        "| early exit, 1/19 on these texts | kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    by_task: dict[str, list[dict[str, float]]] = {}
    for name, run in runs():
        teacher, full, paper = run["rows"][0], run["rows"][2], run["at_paper_flops"]
        found = {
            "teacher": teacher["metrics"][run["metric"]],
            "full": full["metrics"][run["metric"]],
            "chosen": paper["early_exit"],
            "exact": paper["on_validation_texts"]["early_exit"],
        }
        kept = {f"{key} kept": 100 * value / found["teacher"] for key, value in found.items()}
        by_task.setdefault(name.rsplit("-", 1)[0], []).append(found | kept)
    for task, seeds in by_task.items():
        if len(seeds) > 1:
            cells = [task, str(len(seeds)), spread(seeds, "teacher")]
            for key in ("full", "chosen", "exact"):
                cells += [spread(seeds, key), spread(seeds, f"{key} kept", 1) + "%"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def clock_table() -> str:
    lines = [
        "| run | threshold chosen for | metric, early exit | kept | mean exit layer | FLOPs, real lengths "
        "| batch 32: full depth / early exit | batch 1: full depth / early exit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs():
        teacher, _, full, early = run["rows"]
        metric = run["metric"]
        goal = ", ".join(f"{key} {value:g}" for key, value in run["exit_config"]["calibration"]["goal"].items())
        speed = {
            size: " / ".join(f"{teacher['ms_per_text'][size] / row['ms_per_text'][size]:.2f}x" for row in (full, early))
            for size in ("32", "1")
        }
        lines.append(
            f"| {name} | {goal} | {early['metrics'][metric]:.4f} "
            f"| {early['metrics'][metric] / teacher['metrics'][metric]:.1%} "
            f"| {early['mean_exit_layer']:.2f} | 1/{teacher['flops_per_row'] / early['flops_per_row']:.1f} "
            f"| {speed['32']} | {speed['1']} |"
        )
    return "\n".join(lines)


def ablation_table() -> str:
    lines = [
        "| task | variant | seeds | full depth | mean over exits | at 1/19 FLOPs | mean exit layer | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted(RESULTS.glob("ablation-*.json")):
        rows = by_seed(json.loads(file.read_text()), "-")
        for variant in filter(rows.__contains__, VARIANTS):
            found = rows[variant]
            lines.append(
                f"| {file.stem.removeprefix('ablation-')} | {variant} | {len(found)} | {spread(found, 'full_depth')} "
                f"| {spread(found, 'mean_exit')} | {spread([row['at_paper_flops'] for row in found], 'early_exit')} "
                f"| {spread([row['at_paper_flops'] for row in found], 'mean_exit_layer', 2)} "
                f"| {found[0]['parameters']:,} |"
            )
    return "\n".join(lines)


def peers_table() -> str:
    """Times over the teacher's in torch float32, each round over its own; quartiles in brackets."""
    found = json.loads((RESULTS / "peers.json").read_text())
    rows = [
        [
            name,
            f"{row['accuracy']:.4f}",
            *(_times_as_fast(row[how]["times_as_fast_as_the_teacher"]) for how in ("batch 1", "batch 32", "offline")),
            f"{row['batch 1']['ms_per_text']:.2f} / {row['batch 32']['ms_per_text']:.2f}",
            f"{row['mb_on_disk']:.1f}",
            f"{row['added_memory_mb']:.0f}",
        ]
        for name, row in found["contenders"].items()
    ]
    header = [
        "",
        "accuracy",
        "batch 1",
        "batch 32",
        "offline",
        "ms per text, batch 1 / 32",
        "MB on disk",
        "MB of memory",
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _times_as_fast(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['lower_quartile']:.2f} to {ratio['upper_quartile']:.2f})"


def promises_table() -> str:
    """How often settings chosen on a sample lose more than epsilon on the whole pool, promised and plainly swept."""
    rows = []
    for file in sorted(RESULTS.glob("guarantees-*.json"), key=lambda file: TASKS.index(_task(file))):
        found = json.loads(file.read_text())
        by_kind = {(run["goal"], run["rows"], run["epsilon"], run["guarantee"]): run for run in found["runs"]}
        for (goal, size, epsilon, guarantee), promised in by_kind.items():
            if guarantee:
                plain = by_kind[goal, size, epsilon, False]
                cells = (f"{_task(file)}, {found['pool_rows']:,}", goal, f"{size:,}", f"{100 * epsilon:g}")
                cells += (f"{promised['share_broken']:.1%}", f"{promised['share_fell_back']:.1%}")
                cells += (f"{promised['mean_speedup']:.2f}x", f"{plain['share_broken']:.1%}")
                rows.append((*cells, f"{plain['share_accuracy_dropped_more']:.1%}", f"{plain['mean_speedup']:.2f}x"))
    header = ["pool", "goal", "rows per sample", "epsilon, points", "promise broken", "fell back", "fewer FLOPs"]
    return markdown_table([*header, "plain sweep broken", "by net accuracy", "fewer FLOPs"], rows)


def curves_table() -> str:
    """Times fewer FLOPs on validation with at most so many points of accuracy lost, by the way thresholds are set."""
    rows = []
    for name, found in json.loads((RESULTS / "exit-curves.json").read_text()).items():
        for way, points in found["at_equal_accuracy"].items():
            cells = [f"{point['speedup']:.2f}x" for point in points.values()]
            rows.append([f"{name} ({found['full_depth_accuracy']:.3f})", way, *cells])
    return markdown_table(["run (accuracy at full depth)", "thresholds", "0", "0.5", "1", "2 points lost"], rows)


TARGETS = ("2x", "3x", "4x", "6x", "8x")
VARIANTS_OF_FIRST = {"none": "none", "difficulty": "difficulty-aware", "random": "difficulty shuffled (control)"}
WAYS = {
    "first-none": "cascade, first member of {layers} layer(s)",
    "student-2": "cascade, first member of 2 layers",
    "student-3": "cascade, first member of 3 layers",
    "cascade-slim": "cascade, slim model first",
    "assistant-entropy": "exits of the assistant, entropy",
    "assistant-patience": "exits of the assistant, patience",
    "slim-entropy": "exits of the slim model, entropy",
    "slim-patience": "exits of the slim model, patience",
}


def cascade_runs() -> list[tuple[str, dict]]:
    """Name and figures of every run of benchmarks/cascade.py that is complete."""
    found = []
    for task in TASKS:
        for file in sorted(RESULTS.glob(f"cascade-{task}-*.json")):
            run = json.loads(file.read_text())
            if "comparisons" in run["rows"]:
                found.append((file.stem.removeprefix("cascade-"), {"settings": run["settings"], **run["rows"]}))
    return found


PAPER_TASKS = ("mrpc", "qnli", "sst2", "mnli")
PAPER = {
    ("2x", "fewer layers"): (-3.8, -4.3, -2.6, -4.7),
    ("2x", "exits by entropy"): (-4.5, -4.9, -3.3, -10.2),
    ("2x", "exits by patience"): (-4.5, -2.5, -4.2, -4.8),
    ("2x", "cascade"): (-3.0, -1.1, -1.8, -1.6),
    ("3x", "fewer layers"): (-6.2, -5.8, -6.0, -8.8),
    ("3x", "exits by entropy"): (-5.4, -8.1, -4.7, -21.4),
    ("3x", "exits by patience"): (-6.3, -7.9, -8.3, -8.7),
    ("3x", "cascade"): (-4.9, -2.0, -2.6, -3.4),
    ("4x", "fewer layers"): (-8.4, -7.4, -7.1, -9.8),
    ("4x", "exits by entropy"): (-6.0, -14.6, -8.1, -28.8),
    ("4x", "exits by patience"): (-9.0, None, None, -22.3),
    ("4x", "cascade"): (-6.3, -4.0, -3.2, -5.3),
}
"""Points from BERT-base on GLUE's test sets, F1 on MRPC: Li et al. 2021, main table (BERT-kL, DeeBERT, PABEE,
CascadeBERT; MNLI matched)."""
OURS = {
    "exits by entropy": "assistant-entropy",
    "exits by patience": "assistant-patience",
    "cascade": "first-difficulty",
    "cascade, slim model first": "cascade-slim",
    "exits of the slim model": "slim-entropy",
}
STUDENTS = {"2x": "student-3", "3x": "student-2"}


def paper_form_table() -> str:
    """Points from the large model at each speed-up: the paper's, and ours of the first seed."""
    ours, rows = {name.partition("-")[0]: run for name, run in reversed(cascade_runs())}, []
    for target in TARGETS[:3]:
        for method in ("fewer layers", *OURS):
            published = PAPER.get((target, method), (None,) * len(PAPER_TASKS))
            cells = [
                f"{'' if points is None else f'{points:+.1f}'} / {_ours(ours[task], target, method)}"
                for task, points in zip(PAPER_TASKS, published, strict=True)
                if task in ours
            ]
            rows.append([target, method, *cells])
    return markdown_table(["at", "answered by", *(task for task in PAPER_TASKS if task in ours)], rows)


def _ours(run: dict, target: str, method: str) -> str:
    if method == "fewer layers":
        found = run.get(STUDENTS.get(target, ""))
    else:
        way = run[OURS[method]]
        found = way.get("cascade", way)[target]
    if found is None or "unreachable" in found:
        return ""
    return f"{100 * (found['metric'] - run['teacher']['metric']):+.1f} ({found['speedup']:.1f}x)"


def difficulty_table() -> str:
    """What difficulty-aware training does to the first member and its cascade, beside the control."""
    rows = []
    for name, run in cascade_runs():
        for variant, said in VARIANTS_OF_FIRST.items():
            first, compared = run[f"first-{variant}"], run["comparisons"]
            moved = compared.get(f"first-{variant} alone: DIS")
            cells = [name, said, f"{first['metric']:.4f}", f"{first['dis']:.4f}", _interval(moved)]
            rows.append([*cells, *(_at(first["cascade"][target]) for target in TARGETS[:3])])
    header = ["run", "first member", "alone", "DIS", "DIS against none, points"]
    return markdown_table([*header, *(f"cascade, {target}" for target in TARGETS[:3])], rows)


def cascades_table() -> str:
    """Every way of answering at counted speed-ups over the teacher, and how far it is from the first way."""
    rows = []
    for name, run in cascade_runs():
        teacher = run["teacher"]
        rows.append(
            [f"{name}, {teacher['name']}", "the last member alone", f"{teacher['metric']:.4f} at 1x", *[""] * 4]
        )
        for way, said in WAYS.items():
            if way in run:
                at = run[way].get("cascade", run[way])
                cells = []
                for target in TARGETS:
                    moved = run["comparisons"].get(f"{way} at {target}: metric")
                    cells.append(" ".join(filter(None, (_at(at[target]), moved and f"[{_interval(moved)}]"))))
                rows.append([name, said.format(layers=run["settings"]["layers"]), *cells])
        for layers in run["settings"]["student_layers"]:
            student = run[f"student-{layers}"]
            alone = f"{student['metric']:.4f} at {student['speedup']:.1f}x"
            rows.append([name, f"student of {layers} layer(s) alone", alone, *[""] * (len(TARGETS) - 1)])
    return markdown_table(["run", "answered by", *TARGETS], rows)


def cascade_clock_table() -> str:
    """The formula, the count and the clock, when half of the rows leave at the first member."""
    rows = []
    for name, run in cascade_runs():
        for lengths, said in (("fixed_length", "64 tokens"), ("real_lengths", "real lengths")):
            found = run["formula-and-clock"][lengths]
            low, high = found["measured_quartiles"]
            cells = [name, said, f"{found['leaving']:.1%}", f"{found['formula']:.3f}", f"{found['counted']:.3f}"]
            rows.append([*cells, f"{found['measured']:.2f} ({low:.2f} to {high:.2f})"])
            rows[-1].append(f"{found['measured_over_formula']:.2f}")
    return markdown_table(["run", "texts", "leaving", "formula", "counted", "measured", "measured / formula"], rows)


VARIANTS_OF_BLOCKS = (
    *("one-shot", "one-shot by taylor", "plain", "reweighted", "plain at 300", "reweighted at 300", "proximal"),
)
RATIOS = {"0.3": "1.43x", "0.44": "1.79x", "0.5": "2x", "0.6": "2.5x", "0.8": "5x"}


def block_runs() -> dict[str, dict[str, list[dict]]]:
    """Task and model -> what was done to it, a row per seed, of benchmarks/block_pruning.py quality.

    A multi-exit model has two sets of rows: its last exit, and the mean over its exits.
    """
    found = {}
    for file in sorted(RESULTS.glob("block-quality-*.json")):
        rows = rows_of(file)
        name = file.stem.removeprefix("block-quality-").replace("-", ", ", 1)
        found[name] = by_seed(rows, "-")
        if "packed_exits" in next(iter(rows.values())):
            means = {key: row | {"packed": statistics.mean(row["packed_exits"])} for key, row in rows.items()}
            found[f"{name}, mean over exits"] = by_seed(means, "-")
    return found


def block_quality_table() -> str:
    """Metric at each compression of the encoder's matrices, and the largest one that costs at most a point.

    The compression is nominal, as the paper counts; beside it what became of the bytes.
    """
    rows = []
    for name, found in block_runs().items():
        dense = found["dense"]
        rows.append([name, "no blocks pruned", str(len(dense)), spread(dense, "packed"), *[""] * (len(RATIOS) + 1)])
        for variant in VARIANTS_OF_BLOCKS:
            pruned = {ratio: found[f"{variant}-{ratio}"] for ratio in RATIOS if f"{variant}-{ratio}" in found}
            if not pruned:
                continue
            enough = mean(dense, "packed") - 0.01
            kept = [
                f"{RATIOS[ratio]} ({_smaller(group)} bytes)"
                for ratio, group in pruned.items()
                if mean(group, "packed") >= enough
            ]
            cells = [
                f"{spread(pruned[ratio], 'packed')}, {_smaller(pruned[ratio])} bytes" if ratio in pruned else ""
                for ratio in RATIOS
            ]
            seeds = str(max(map(len, pruned.values())))
            rows.append([name, variant, seeds, "", *cells, kept[-1] if kept else "none"])
    return markdown_table(["run", "pruned", "seeds", "1x", *RATIOS.values(), "largest within 1 point"], rows)


def _smaller(group: list[dict]) -> str:
    """Bytes of the pruned matrices before over after, which is more than nominal where whole units died."""
    return f"{statistics.mean(before / after for before, after in (row['matrix_bytes'] for row in group)):.1f}x"


def block_size_table() -> str:
    """Bytes saved on the pruned matrices, indices included, as a share of the nominal compression."""
    found = rows_of(RESULTS / "block-size.json")
    rows = []
    for blocks in dict.fromkeys(name.rpartition(", ")[0] for name in found):
        at = {ratio: found.get(f"{blocks}, {ratio}") for ratio in RATIOS}
        rows.append([blocks, *(f"{row['share_of_nominal']:.3f}" if row else "" for row in at.values())])
    return markdown_table(["blocks", *RATIOS.values()], rows)


def block_speed_table() -> str:
    """CPU time of the model with full matrices over packed ones in the chosen layouts, 64 tokens."""
    rows = []
    for name, found in rows_of(RESULTS / "block-speed.json").items():
        blocks, _, ratio = name.rpartition(", ")
        cells = [blocks, RATIOS.get(ratio, ratio)]
        for batch in ("batch 32", "batch 1"):
            low, high = found[batch]["lowest_and_highest"]
            cells.append(f"{found[batch]['times_as_fast']:.2f} ({low:.2f} to {high:.2f})")
        chosen = found["batch 32"]["chosen"].items()
        rows.append([*cells, ", ".join(f"{count} {layout}" for layout, count in chosen)])
    header = ["blocks", "compression", "times as fast, batch 32", "batch 1", "layouts at batch 32"]
    return markdown_table(header, rows)


UNGATED = "exits/free"
SKIPPING_GOALS = ("2x", "3x")


def skipping_runs() -> dict[str, dict[str, list[dict]]]:
    """Task -> variant and target -> a row per seed, of benchmarks/skip_gates.py."""
    files = sorted(RESULTS.glob("skip-*.json"))
    return {file.stem.removeprefix("skip-"): by_seed(rows_of(file), "/") for file in files}


def skipping_table() -> str:
    """Skipping alone, and with exits at fewer FLOPs than the ungated model; measured over counted at batch 32.

    In brackets the points from the ungated model of the same seed, with the widest of the seeds' 95% intervals.
    """
    rows = []
    for task, found in skipping_runs().items():
        for name, group in found.items():
            variant, _, target = name.partition("/")
            cells = [task, variant if target == "free" else f"{variant}, {target} layers", str(len(group))]
            if name == UNGATED:
                cells += [f"none: {spread(group, 'ungated_metric')}", *[""] * 4]
            else:
                cells += [
                    _against_ungated(group, "skips"),
                    spread(group, "soft_metric"),
                    spread(group, "layers_run", 2),
                ]
                cells.append(spread(group, "skips_speedup", 2))
                kinds = ("", "last_") if "at" in group[0] else ("",)
                shares = [f"{mean(group, f'{kind}clocked_over_counted'):.2f}" for kind in kinds]
                cells.append(" / ".join(shares))
            rows.append([*cells, *(_at_goal(group, goal) for goal in SKIPPING_GOALS)])
    header = ["task", "variant", "seeds", "skipping alone", "the same, soft weights", "layers run", "fewer FLOPs"]
    header += ["measured / counted, alone / with exits", *(f"with exits, {goal}" for goal in SKIPPING_GOALS)]
    return markdown_table(header, rows)


def _at_goal(group: list[dict], goal: str) -> str:
    """Metric and speed-up with calibrated settings; or how many seeds do not get there."""
    at = [row["at"][goal] for row in group if "at" in row]
    if not at:
        return ""
    reached = [row for row in at if "metric" in row]
    if len(reached) < len(at):
        return f"out of reach in {len(at) - len(reached)} of {len(at)}"
    return f"{_against_ungated(at)} at {mean(at, 'speedup'):.2f}x"


def _against_ungated(group: list[dict], which: str = "") -> str:
    prefix = which and f"{which}_"
    points, lows, highs = zip(*(row[f"{prefix}difference_95"] for row in group), strict=True)
    return f"{spread(group, f'{prefix}metric')} [{_interval([statistics.mean(points), min(lows), max(highs)])}]"


def _at(found: dict) -> str:
    return "out of reach" if "unreachable" in found else f"{found['metric']:.4f} ({found['speedup']:.2f}x)"


def _interval(moved: list[float] | None) -> str:
    return "" if moved is None else "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * value for value in moved))


def _task(file: Path) -> str:
    return file.stem.split("-")[1]


def by_seed(rows: dict[str, dict], separator: str) -> dict[str, list[dict]]:
    """Rows whose names differ only in the seed at the end, together."""
    found: dict[str, list[dict]] = {}
    for name, row in rows.items():
        found.setdefault(name.rpartition(separator)[0], []).append(row)
    return found


def mean(rows: list[dict], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def spread(rows: list[dict], key: str, digits: int = 4) -> str:
    """Mean, and the range where there are several seeds."""
    values = [row[key] for row in rows]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(rows, key):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
