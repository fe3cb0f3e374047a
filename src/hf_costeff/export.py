"""A slim model as ONNX: one graph from exit to exit, and a small runner that needs neither torch nor this package.

Early exit is a decision between graphs, so each graph is plain and takes any batch size and length. Every export is
compared with the model before it is kept: same exits, logits within 1e-4.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .configuration_costeff import require_no_gates
from .data import make_collator
from .efficiency import Latency, measure_alternating
from .encoder_layers import eager_attention
from .exit_criteria import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    EntropyCriterion,
    ExitConfig,
    answers,
    same_answers,
)
from .metrics import compute_metrics
from .modeling_costeff import CostEffForSequenceClassification, CostEffModel
from .onnx_runner import CONFIG, TOKENIZER, Runner
from .packing import unpack_layers

OPSET = 17
"""The first with one operator for a layer norm; every onnxruntime since 2022 knows it."""
TOLERANCE = 1e-4
PROBE_ROWS = 12
RUNNER = "runner.py"


class Segment(nn.Module):
    """The layers from one stop to the next, and the exit head there; the first one starts with the embeddings."""

    def __init__(self, model: CostEffModel, start: int, stop: int) -> None:
        """Take a part of a model.

        Args:
            model: In eval mode.
            start: Layers that have been run before, 0 for none.
            stop: 1-based layer that it ends with.
        """
        super().__init__()
        self.model = model
        self.start = start
        self.stop = stop

    def forward(self, states: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        """Raw logits (batch, labels) and, unless it is the last segment, hidden states (batch, seq, hidden).

        `states` are token ids (batch, seq) in the first segment and hidden states in the others; the mask is 1 for real
        tokens and 0 for padding, shape (batch, seq).
        """
        hidden = states if self.start else self.model.embeddings(states, token_type_ids, None, None)
        allowed = attention_mask[:, None, None, :] != 0
        hidden, (logits,) = self.model.run_layers(
            hidden,
            attention_mask,
            torch.where(allowed, 0.0, torch.finfo(hidden.dtype).min),
            eager_attention,
            depths=range(self.start + 1, self.stop + 1),
            exits=[self.stop],
        )
        return logits if self.stop == self.model.config.num_hidden_layers else (logits, hidden)


class BiasAlone(nn.Module):
    """What is left of a block without heads or neurons; an empty matrix product is not portable."""

    def __init__(self, output: nn.Linear, has_weights: bool) -> None:
        super().__init__()
        self.bias = output.bias
        self.has_weights = has_weights

    def forward(self, hidden_states: Tensor, *others: Any) -> Any:
        """The bias, shape (hidden,), and for attention `None` instead of its weights."""
        return (self.bias, None) if self.has_weights else self.bias


class ByName(nn.Module):
    """A stock classifier whose inputs are given by position and passed on by name; families order them differently."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        """Raw logits (batch, labels)."""
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


@dataclass(frozen=True)
class Int8Loss:
    """What int8 changed against the fp32 graphs on given rows, at full depth.

    Args:
        rows: How many rows.
        agreement: Share of the rows with the same answer; `None` for regression.
        metrics_fp32: Metrics of the problem type; `None` without labels.
        metrics_int8: The same.
        fp32: Time of all rows, timed in alternation with int8.
        int8: See fp32.
    """

    rows: int
    agreement: float | None
    metrics_fp32: dict[str, float] | None
    metrics_int8: dict[str, float] | None
    fp32: Latency
    int8: Latency


@dataclass(frozen=True)
class OnnxExport:
    """What an export came to.

    Args:
        folder: Where it is.
        stops: 1-based layers with a graph's end, ascending.
        max_difference: Largest difference of a logit between the fp32 graphs and the model, on the probe rows.
        megabytes: Size of the graphs.
        int8_loss: What int8 changed; `None` without int8 or without rows.
    """

    folder: Path
    stops: list[int]
    max_difference: float
    megabytes: float
    int8_loss: Int8Loss | None = None


def export_onnx(
    model: CostEffForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | Path,
    int8: bool = False,
    rows: Dataset | None = None,
) -> OnnxExport:
    """Write a model as ONNX graphs with a runner, after checking that they answer as the model does.

    The graphs end at the saved settings' checked exits, or at every exit if there are none. The folder also holds the
    tokenizer, the settings and `runner.py`, and works without this package.

    Args:
        model: A multi-exit classifier; it is not changed.
        tokenizer: Its tokenizer, a fast one.
        output_dir: Folder to write, not a model's own; an earlier export in it is replaced.
        int8: Whether matrix products run, and embeddings are stored, in 8 bits (onnxruntime's dynamic quantization). A
            row's logits then depend a little on its batch.
        rows: Tokenized rows, with `labels` if they are known, on which the change by int8 is measured; `None` leaves
            that out.

    Raises:
        ValueError: A missing library, a folder with a model in it, a tokenizer that cannot travel, a model without
            exits, or graphs that do not answer as the model does; the folder is then as it was.
    """
    _require_libraries()
    if (Path(output_dir) / "config.json").exists():
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, which holds a model: its tokenizer would be written over. Name a "
            "folder of its own for the export."
        )
    if not isinstance(model, CostEffForSequenceClassification):
        raise ValueError(f"{type(model).__name__} has no exits to export. Compress it first: hf_costeff.compress.")
    make_collator(tokenizer)  # refuses a tokenizer without padding, or with padding on the left
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, and the runner reads tokenizer.json. Use a fast one: "
            "AutoTokenizer.from_pretrained(...)."
        )
    with TemporaryDirectory() as parent:
        exact = Path(parent) / "fp32"
        exact.mkdir()
        stops = write_graphs(model, tokenizer, exact)
        difference = check_parity(model, exact)
        chosen, loss = exact, None
        if int8:
            chosen = Path(parent) / "int8"
            quantize_graphs(exact, chosen)
            loss = None if rows is None else compare_int8(exact, chosen, rows, model.config.resolved_problem_type)
        _replace(chosen, Path(output_dir))
    size = sum(file.stat().st_size for file in Path(output_dir).glob("*.onnx"))
    return OnnxExport(Path(output_dir), stops, difference, size / 1e6, loss)


def _require_libraries() -> None:
    for name in ("onnx", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise ValueError(
                f"Export needs {name}, which is not installed. Run `pip install onnx onnxruntime`."
            ) from None


def write_graphs(
    model: CostEffForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[int]:
    """Write the fp32 graphs, the runner and all that it reads; returns the layers that the graphs end with.

    Args:
        model: A multi-exit classifier.
        tokenizer: Its tokenizer.
        folder: An empty folder.
    """
    config = model.config
    require_no_gates(config, "Export to graphs")
    model.costeff.exit_plan()  # refuses saved settings that do not fit
    saved = ExitConfig() if config.exit_config is None else ExitConfig.from_dict(config.exit_config)
    depth = config.num_hidden_layers
    stops = [layer for layer in config.exit_layers if layer == depth or saved.is_checked(layer)]
    names = ["input_ids", "attention_mask"]
    if config.type_vocab_size and "token_type_ids" in tokenizer.model_input_names:
        names.append("token_type_ids")
    plain, files = plain_model(model.costeff), {}
    for start, stop in zip([0, *stops], stops, strict=False):
        files[stop] = f"segment_{stop:02d}.onnx"
        inputs = names if start == 0 else ["hidden_states", "attention_mask"]
        write_graph(Segment(plain, start, stop), inputs, folder / files[stop])
    settings = {
        "segments": [{"exit_layer": stop, "file": file} for stop, file in files.items()],
        "exit_layers": config.exit_layers,
        "inputs": names,
        "num_labels": config.num_labels,
        "id2label": {str(label): name for label, name in config.id2label.items()},
        "problem_type": config.resolved_problem_type,
        "exit_config": config.exit_config,
        "max_length": min(config.longest_text, tokenizer.model_max_length),
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / TOKENIZER))
    shutil.copyfile(Path(__file__).with_name("onnx_runner.py"), folder / RUNNER)
    return stops


def plain_model(model: CostEffModel) -> CostEffModel:
    """A copy in single precision on the CPU, without empty or packed matrices.

    Args:
        model: The model, left as it is.
    """
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    unpack_layers(plain)
    for layer in plain.layers:
        if layer.attention.num_heads == 0:
            layer.attention = BiasAlone(layer.attention.output, has_weights=True)
        if layer.feed_forward.intermediate.out_features == 0:
            layer.feed_forward = BiasAlone(layer.feed_forward.output, has_weights=False)
    return plain


def write_graph(segment: Segment, inputs: Sequence[str], file: Path) -> None:
    """Write one segment as a graph of any batch size and length.

    Args:
        segment: Of a [`plain_model`].
        inputs: Names of its arguments.
        file: ONNX file to write.
    """
    config = segment.model.config
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    first = torch.zeros(2, 3, config.hidden_size) if segment.start else torch.zeros_like(mask)
    examples = dict(zip(inputs, (first, mask, torch.zeros_like(mask)), strict=False))
    outputs = ["logits"] if segment.stop == config.num_hidden_layers else ["logits", "hidden_states_out"]
    trace(segment, examples, outputs, file)


def write_stock_graph(model: PreTrainedModel, inputs: Sequence[str], file: Path) -> None:
    """Write a stock classifier as one graph of any batch size and length, to compare with.

    Args:
        model: Left as it is.
        inputs: Names of arguments, whole numbers of shape (batch, seq) each; those that its forward does not take are
            left out, and are no inputs of the graph.
        file: ONNX file to write; its output is `logits`.
    """
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval()
    plain.set_attn_implementation("eager")
    taken = inspect.signature(plain.forward).parameters
    names = [name for name in inputs if name in taken]
    trace(ByName(plain, names), {name: torch.ones(2, 3, dtype=torch.long) for name in names}, ["logits"], file)


def trace(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], file: Path) -> None:
    """Write a module as a graph whose inputs, and outputs but for the logits, have any batch size and length.

    By tracing, not by torch.export: onnxruntime's quantizer reads these graphs, and they need no other library.

    Args:
        module: In eval mode.
        inputs: Examples of its first arguments, in order, under the names that they get.
        outputs: Names of what it returns.
        file: ONNX file to write.
    """
    dynamic = {name: {0: "batch", 1: "seq"} for name in (*inputs, *outputs)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns of the length check, which the runner repeats
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={**dynamic, "logits": {0: "batch"}},
            opset_version=OPSET,
            dynamo=False,
        )


def check_parity(model: CostEffForSequenceClassification, folder: Path) -> float:
    """The largest difference of a logit between graphs and model, on random rows of many lengths.

    Args:
        model: What was exported.
        folder: Its export in fp32.

    Raises:
        ValueError: If a logit differs by more than 1e-4 (of the largest, if that is above 1) or a row leaves elsewhere.
    """
    runner = Runner(folder, threads=1)
    batch = probe_batch(model, runner.config["max_length"])
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval()
    rows = [{name: batch[name][row, :length].tolist() for name in batch} for row, length in enumerate(_lengths(batch))]
    if "token_type_ids" not in runner.config["inputs"]:
        batch.pop("token_type_ids")
    with torch.no_grad():
        exit_logits = torch.stack(plain(**batch).exit_logits, dim=1)
    largest = 0.0
    choices: list[Any] = [False, *probe_settings(exit_logits, runner, model.config.resolved_problem_type)]
    for settings in choices:
        early_exit = settings if settings is False else settings.to_dict()
        found = runner.predict_tokens(rows, early_exit, batch_size=5)
        expected = plain.predict(**batch, early_exit=settings)
        layers = [answer["exit_layer"] for answer in found]
        if layers != expected.exit_layer.tolist():
            raise ValueError(
                f"The graphs let rows leave after layers {layers} and the model after {expected.exit_layer.tolist()}, "
                f"with {early_exit}. The export was not kept; please report this with the versions of torch and "
                "onnxruntime."
            )
        logits = torch.tensor([answer["logits"] for answer in found])
        largest = max(largest, float((logits - expected.logits).abs().max()))
    if largest > TOLERANCE * max(1.0, float(exit_logits.abs().max())):
        raise ValueError(
            f"A logit of the graphs differs by {largest:.1e} from the model's; {TOLERANCE:.0e} is allowed. The "
            "export was not kept; please report this with the versions of torch and onnxruntime."
        )
    return largest


def _lengths(batch: Mapping[str, Tensor]) -> list[int]:
    return batch["attention_mask"].sum(dim=1).tolist()


def probe_batch(model: CostEffForSequenceClassification, longest: int) -> dict[str, Tensor]:
    """Random rows of 1 to 32 tokens, padded on the right; the same for every call, shape (12, seq).

    Args:
        model: Gives the vocabulary.
        longest: Tokens that the model can take.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    width = min(longest, 32)
    lengths = torch.linspace(1, width, PROBE_ROWS).long()[torch.randperm(PROBE_ROWS, generator=generator)]
    mask = torch.arange(width)[None] < lengths[:, None]
    tokens = torch.randint(config.vocab_size, mask.shape, generator=generator)
    padding = config.pad_token_id or 0
    tokens = torch.where(tokens == padding, (padding + 1) % config.vocab_size, tokens)
    types = torch.randint(max(1, config.type_vocab_size), mask.shape, generator=generator)
    return {
        "input_ids": torch.where(mask, tokens, padding),
        "attention_mask": mask.long(),
        "token_type_ids": types * mask,
    }


def probe_settings(exit_logits: Tensor, runner: Runner, problem_type: str) -> list[ExitConfig]:
    """Settings with which about half of the rows leave at the first exit that they may; none if there is no such.

    The limit lies in the widest gap among the middle rows, so that rounding moves nobody.

    Args:
        exit_logits: Of the probe rows, shape (rows, exits, labels).
        runner: Gives the exits that are asked.
        problem_type: As upstream's `config.problem_type`.
    """
    asked = list(runner.segments)
    if len(asked) == 1:
        return []
    logits = exit_logits[:, [runner.exit_layers.index(layer) for layer in asked]]
    if problem_type == REGRESSION:
        measured = (logits[:, 1] - logits[:, 0]).abs().amax(-1)
    else:
        measured = EntropyCriterion(ExitConfig(threshold=0.5), 1, problem_type).measured(logits[:, 0], 0)
    low, high = widest_gap(measured)
    if high - low < TOLERANCE:
        return []
    limit = (low + high) / 2
    if problem_type == REGRESSION:
        return [ExitConfig(criterion="patience", patience=1, tolerance=limit, checked_exits=asked)]
    return [ExitConfig(threshold=min(1.0, limit), checked_exits=asked)]


def widest_gap(values: Tensor) -> tuple[float, float]:
    """The two neighbours that lie farthest apart among the middle half of the values, shape (rows,).

    >>> widest_gap(torch.tensor([0.0, 5.0, 1.0, 1.5, 9.0, 6.0]))
    (1.5, 5.0)
    """
    ordered = values.double().sort().values
    quarter = len(ordered) // 4
    middle = ordered[quarter : len(ordered) - quarter]
    widest = int(middle.diff().argmax())
    return float(middle[widest]), float(middle[widest + 1])


def quantize_graphs(source: Path, target: Path) -> None:
    """Copy an export with the weights of its graphs in 8 bits.

    What was promised of the exit settings is left out, since it held for the exact weights.

    Args:
        source: An fp32 export.
        target: Folder to make.
    """
    shutil.copytree(source, target)
    settings = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    (settings["exit_config"] or {}).pop("calibration", None)
    (target / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    for graph in source.glob("*.onnx"):
        quantize_graph(graph, target / graph.name)


def quantize_graph(source: Path, target: Path) -> None:
    """Copy a graph with the weights of its matrix products and embeddings in 8 bits.

    Weights have one scale per column and 7 of the 8 bits: with 8, processors without VNNI overflow silently.

    Args:
        source: An fp32 graph.
        target: ONNX file to write.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # advice on preprocessing, on the root logger
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    finally:
        logging.disable(logging.NOTSET)


def compare_int8(exact: Path, quantized: Path, rows: Dataset, problem_type: str) -> Int8Loss:
    """What int8 changes on rows, at full depth, and how long both take.

    Args:
        exact: The fp32 export.
        quantized: The int8 export.
        rows: Tokenized rows.
        problem_type: As upstream's `config.problem_type`.
    """
    tokens = [{name: row[name] for name in row if name in ("input_ids", "token_type_ids")} for row in rows]
    runners = {"fp32": Runner(exact), "int8": Runner(quantized)}
    found = {name: runner.predict_tokens(tokens, False) for name, runner in runners.items()}
    logits = {name: torch.tensor([answer["logits"] for answer in answered]) for name, answered in found.items()}
    agreement = None
    if problem_type in (SINGLE_LABEL, MULTI_LABEL):
        exact_answers, int8_answers = (answers(values, problem_type) for values in logits.values())
        agreement = float(same_answers(exact_answers, int8_answers, problem_type).float().mean())
    metrics: dict[str, dict[str, float] | None] = {"fp32": None, "int8": None}
    if "labels" in rows.column_names:
        labels = np.array(rows["labels"])
        metrics = {name: compute_metrics(values.numpy(), labels, problem_type) for name, values in logits.items()}

    def timed(runner: Runner) -> Any:
        return lambda: runner.predict_tokens(tokens[:256], False)

    times = measure_alternating({name: timed(runner) for name, runner in runners.items()}, warmup=1, repeats=5)
    return Int8Loss(len(rows), agreement, metrics["fp32"], metrics["int8"], times["fp32"], times["int8"])


def _replace(source: Path, target: Path) -> None:
    """Move an export into a folder, instead of an earlier one."""
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("segment_*.onnx"):
        old.unlink()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
