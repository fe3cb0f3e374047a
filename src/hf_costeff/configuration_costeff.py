"""The numbers that rebuild an empty COST-EFF model: widths per layer, embedding rank, exits and exit settings."""

# No `from __future__ import annotations` here: `@strict` skips the type check of a field whose annotation is a string.

import math
import sys
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .exit_criteria import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ExitConfig
from .packed_linear import Packing

MAX_LAYERS = 1_000
MAX_WIDTH = 1_000_000
MAX_LABELS = 100_000
MAX_WEIGHTS = 20_000_000_000  # together; the largest published encoders have half of it
if TYPE_CHECKING:  # what __post_init__ leaves
    PerLayer = list[int]
    ExitLayers = list[int]
else:  # what is accepted
    PerLayer = int | list[int]
    ExitLayers = list[int] | None

EXIT_HEADS = ("linear", "attention")
EXIT_POOLINGS = ("cls", "mean")
SKIP_GATES = ("attention", "linear")
GATE_HEADS, EXIT_HEAD_HEADS = 2, 4  # attention heads of an attention gate, and of an attention exit head


def expand_per_layer(value: Any, num_layers: int) -> Any:
    """One value per layer: a scalar is repeated, a list is copied, anything else is left to the validation.

    >>> expand_per_layer(12, 3)
    [12, 12, 12]
    >>> expand_per_layer([4, 0, 1], 3)
    [4, 0, 1]
    """
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value] * num_layers if isinstance(value, int) else value


def _check_integer(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"`{name}` is {value!r}. It must be a whole number in {low}..{high}.")


def _check_label_names(names: Any) -> None:
    """`names` is `id2label`, from JSON (keys are strings) or from a caller."""
    well_formed = (
        isinstance(names, dict)
        and len(names) <= MAX_LABELS
        and {str(key) for key in names} == {str(label) for label in range(len(names))}
        and all(isinstance(name, (str, int)) for name in names.values())
    )
    if not well_formed:
        raise ValueError(
            f"`id2label` is {_shortened(names)}. It must give every label from 0 on a name, at most {MAX_LABELS:,}: "
            '{0: "negative", 1: "positive"}.'
        )


def _shortened(value: Any, length: int = 200) -> str:
    """How a value reads in an error message, however long it is.

    >>> _shortened([1, 2]), _shortened("a" * 500, 5)
    ('[1, 2]', "'aaaa...")
    """
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _first_token_attention_parameters(hidden_size: int, size: int) -> int:
    """Of a small self-attention that is read at the first token: a map to its width, queries, keys and values."""
    return (hidden_size + 1) * size + 2 * (size + 1) * size + size * size


def problem_type_of(config: PreTrainedConfig) -> str:
    """A classifier's `problem_type` where it is set; otherwise regression for one label, single-label for several."""
    if config.problem_type is not None:
        return config.problem_type
    return REGRESSION if config.num_labels == 1 else SINGLE_LABEL


def label_names(config: PreTrainedConfig) -> list[str] | None:
    """Names of a classifier's labels in its order, without case; `None` if they are LABEL_0, LABEL_1, ..."""
    names = [str(config.id2label[label]).strip().casefold() for label in sorted(config.id2label)]
    return None if all(name == f"label_{label}" for label, name in enumerate(names)) else names


def require_no_gates(config: Any, action: str) -> None:
    """Refuse a gated model where every row has to run every layer.

    Args:
        config: Of the model; one of another family has no gates.
        action: What cannot be done, as the subject of a sentence.

    Raises:
        ValueError: Saying how to load it without gates.
    """
    if getattr(config, "skip_gates", None) is not None:
        raise ValueError(
            f"{action} needs a model whose rows all run the same layers, and this one has skip gates "
            f"({config.skip_gates!r}). Load it without them: from_pretrained(..., skip_gates=None)."
        )


def check_skip_layers(skip_layers: bool | None, config: Any) -> None:
    """Refuse to skip layers where nothing decides which.

    Args:
        skip_layers: As for `predict`.
        config: Of the model; one of another family has no gates.

    Raises:
        ValueError: `skip_layers=True` without gates.
    """
    if skip_layers and getattr(config, "skip_gates", None) is None:
        raise ValueError(
            f"`skip_layers` is {skip_layers}, and this model has no gates. Leave it out, or give the model gates and "
            "train them: hf_costeff.add_skip_gates(model)."
        )


def check_exit_config(values: dict[str, Any] | None) -> None:
    """Nothing, if `config.exit_config` holds settings that an [`ExitConfig`] can have, or none.

    Raises:
        ValueError: It does not.
    """
    if values is None:
        return
    try:
        settings = ExitConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`exit_config` is {_shortened(values)}. {error}") from error
    if not isinstance(settings.calibration, (dict, type(None))):
        raise ValueError(f"`exit_config` is {_shortened(values)}. Its `calibration` must be a dict.")


@strict
class CostEffConfig(PreTrainedConfig):
    """Configuration of [`CostEffModel`]: a post-LN encoder whose heads, neurons and embedding may be narrow and uneven.

    The residual width (`hidden_size`) is never cut; what shrinks is the number of heads and feed-forward neurons of
    each layer and the rank of the word embedding (COST-EFF, Shen et al. 2022, section 3). Everything that is needed
    to build the empty model stands here, so `from_pretrained` needs no other file than `config.json`.

    Args:
        vocab_size: Entries of the word embedding.
        hidden_size: Residual width, the size of every hidden state.
        embedding_rank: Rank of the factorised word embedding, in 1..`hidden_size`; `None` keeps one full matrix.
        num_hidden_layers: Encoder layers (depth).
        num_attention_heads: Heads kept, one number per layer; a scalar holds for every layer, 0 removes the attention
            of a layer but for its output bias.
        attention_head_size: Width of one head. It does not follow from `hidden_size`, because heads are removed.
        intermediate_size: Feed-forward neurons kept, one number per layer; scalar and 0 as for the heads.
        hidden_act: Name of the feed-forward activation (a key of `transformers.activations.ACT2FN`).
        hidden_dropout_prob: Dropout probability of embeddings, sublayer outputs and exit heads.
        attention_probs_dropout_prob: Dropout probability of the attention weights.
        classifier_dropout: Dropout probability before an exit's classifier; `None` uses `hidden_dropout_prob`.
        max_position_embeddings: Rows of the position table (RoBERTa's include its offset).
        position_offset: 0 numbers positions 0, 1, 2, ...; above 0, non-padding tokens are numbered from this value
            and padding gets `pad_token_id` (RoBERTa's way, with offset `pad_token_id + 1`).
        type_vocab_size: Token types; 0 for none (DistilBERT).
        layer_norm_eps: Epsilon of every layer norm.
        initializer_range: Standard deviation of fresh weights.
        pad_token_id: Index of the padding token.
        exit_layers: 1-based layers that own an exit, ascending. `None` puts an exit after every layer. The last layer
            is always in.
        exit_head: Form of the exit head. `"linear"`: classifier(dropout(tanh(pooled hidden state))). `"attention"`:
            one small self-attention of its own, read at the first token (SmartBERT, Hu et al. 2023).
        exit_head_size: Width of an attention exit head, a multiple of 4.
        exit_pooling: What a linear exit head or gate looks at: `"cls"`, the first token (the paper), or `"mean"`, the
            mean over the real tokens, which carries meaning from the first layer on.
        gradient_equilibrium: Whether training scales gradients so that a layer sees the mean over this and all deeper
            exits (Li et al. 2019). It never changes a forward result.
        skip_gates: Form of the gate before each layer that decides, row by row, whether the layer is skipped:
            `"attention"`, one small self-attention of its own (SmartBERT), or `"linear"`, one linear map of what
            `exit_pooling` looks at, for slim models. `None`: no gates, every row runs every layer. With `"cls"` the
            linear gate of layer 1 sees the same for every row, since the first token has not read the text yet.
        gate_size: Width of an attention gate, a multiple of 2.
        skip_threshold: A row skips a layer whose gate gives a probability of this or more, in 0..1.
        exit_config: Saved exit settings as a plain dict (see [`ExitConfig`]); `None` if the model was not calibrated.
        packed_layers: Linear layers of which only some blocks are stored: name in [`CostEffModel`] -> its
            [`hf_costeff.packed_linear.Packing`] as a plain dict; `None` for none.

    Raises:
        StrictDataclassError: (huggingface_hub's, around a `ValueError` or `TypeError`) for a value out of range or of
            the wrong type.

    Example:
        >>> config = CostEffConfig(num_hidden_layers=2, num_attention_heads=[2, 0], intermediate_size=8)
        >>> config.num_attention_heads, config.intermediate_size, config.exit_layers
        ([2, 0], [8, 8], [1, 2])
    """

    model_type = "costeff"
    keys_to_ignore_at_inference = ["exit_logits", "hidden_states", "attentions", "skip_probabilities", "exit_states"]

    vocab_size: int = 30522
    hidden_size: int = 768
    embedding_rank: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: PerLayer = cast(Any, 12)
    attention_head_size: int = 64
    intermediate_size: PerLayer = cast(Any, 3072)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    max_position_embeddings: int = 512
    position_offset: int = 0
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    exit_layers: ExitLayers = cast(Any, None)
    exit_head: str = "linear"
    exit_head_size: int = 128
    exit_pooling: str = "cls"
    gradient_equilibrium: bool = True
    skip_gates: str | None = None
    gate_size: int = 128
    skip_threshold: float | int = 0.5
    exit_config: dict | None = None
    packed_layers: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # Before anything is expanded: a layer or a label takes memory for its widths or its name alone.
        _check_integer("num_hidden_layers", self.num_hidden_layers, 1, MAX_LAYERS)
        if kwargs.get("num_labels") is not None:
            _check_integer("num_labels", kwargs["num_labels"], 1, MAX_LABELS)
        if self.id2label is not None:
            _check_label_names(self.id2label)
        self.num_attention_heads = expand_per_layer(self.num_attention_heads, self.num_hidden_layers)
        self.intermediate_size = expand_per_layer(self.intermediate_size, self.num_hidden_layers)
        if self.exit_layers is None:
            self.exit_layers = list(range(1, self.num_hidden_layers + 1))
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Upstream's. PEFT asks for it before it looks up its default target modules, so ours are entered here.

        It is the only thing of ours that PEFT calls on the way, whether it was imported before the model was built or
        after, and PEFT has no way to register a model type. PEFT is never imported for this: it costs as much as torch.
        """
        known = sys.modules.get("peft.utils.constants")
        if known is not None:
            known.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(self.model_type, ["query_key_value"])
        return super().to_dict()

    @property
    def resolved_problem_type(self) -> str:
        """As [`problem_type_of`]."""
        return problem_type_of(self)

    @property
    def longest_text(self) -> int:
        """Tokens that the position table holds."""
        return self.max_position_embeddings - self.position_offset

    @property
    def exit_head_parameters(self) -> int:
        """Weights and biases of one exit head."""
        labels, size = self.num_labels or 0, self.exit_head_size
        if self.exit_head == "linear":
            return (self.hidden_size + 1) * labels
        return _first_token_attention_parameters(self.hidden_size, size) + (size + 1) * (size + labels)

    @property
    def gate_parameters(self) -> int:
        """Weights and biases of one gate; 0 without gates."""
        if self.skip_gates is None:
            return 0
        if self.skip_gates == "linear":
            return self.hidden_size + 1
        return _first_token_attention_parameters(self.hidden_size, self.gate_size) + self.gate_size + 1

    def matrix_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """Rows and columns of the four matrices of a 1-based layer, by the name of their module in [`CostEffModel`]."""
        width = self.num_attention_heads[layer - 1] * self.attention_head_size
        neurons, prefix = self.intermediate_size[layer - 1], f"layers.{layer - 1}."
        return {
            f"{prefix}attention.query_key_value": (3 * width, self.hidden_size),
            f"{prefix}attention.output": (self.hidden_size, width),
            f"{prefix}feed_forward.intermediate": (neurons, self.hidden_size),
            f"{prefix}feed_forward.output": (self.hidden_size, neurons),
        }

    def packing(self, name: str, shape: tuple[int, int]) -> Packing | None:
        """What is stored of a matrix of `matrix_shapes`; `None` if all of it is."""
        described = (self.packed_layers or {}).get(name)
        return None if described is None else Packing.from_dict(described, *shape)

    def validate_sizes(self) -> None:
        """Refuse sizes that no model can have, before any memory is taken."""
        for name in ("vocab_size", "hidden_size", "attention_head_size", "max_position_embeddings"):
            _check_integer(name, getattr(self, name), 1, 100 * MAX_WIDTH if name == "vocab_size" else MAX_WIDTH)
        _check_integer("type_vocab_size", self.type_vocab_size, 0, MAX_WIDTH)
        _check_integer("position_offset", self.position_offset, 0, self.max_position_embeddings - 1)
        if self.position_offset and self.pad_token_id is None:
            raise ValueError(
                "`position_offset` counts non-padding tokens, so it needs a `pad_token_id`, which is None."
            )
        if self.pad_token_id is not None:
            _check_integer("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        if self.embedding_rank is not None:
            _check_integer("embedding_rank", self.embedding_rank, 1, self.hidden_size)
        for name, heads in (("gate_size", GATE_HEADS), ("exit_head_size", EXIT_HEAD_HEADS)):
            _check_integer(name, getattr(self, name), heads, MAX_WIDTH)
            if getattr(self, name) % heads:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be a multiple of {heads}.")

    def validate_numbers(self) -> None:
        """Refuse probabilities outside 0..1 and scales that are negative or not finite."""
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "skip_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{name}` is {value!r}. It must be a probability in 0..1.")
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` is {value!r}. It must be a finite number, 0 or more.")

    def validate_names(self) -> None:
        """Refuse an unknown activation or problem type, and a model without labels."""
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}. It must be one of {', '.join(sorted(ACT2FN))}.")
        problem_types = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
        if self.problem_type is not None and self.problem_type not in problem_types:
            raise ValueError(f"`problem_type` is {self.problem_type!r}. It must be one of {', '.join(problem_types)}.")
        if self.num_labels < 1:
            raise ValueError("`num_labels` is 0. An exit needs at least 1 label (1 means regression).")

    def validate_widths(self) -> None:
        """Refuse per-layer widths that are negative, huge, or not one per layer."""
        for name in ("num_attention_heads", "intermediate_size"):
            widths = getattr(self, name)
            if len(widths) != self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` has {len(widths)} entries for {self.num_hidden_layers} layers. "
                    "Give one number per layer, or one number for all."
                )
            for layer, width in enumerate(widths, start=1):
                _check_integer(f"{name} of layer {layer}", width, 0, MAX_WIDTH)
        inner = 4 * self.attention_head_size * sum(self.num_attention_heads) + 2 * sum(self.intermediate_size)
        tables = self.max_position_embeddings + self.type_vocab_size + (self.embedding_rank or 0)  # with the projection
        exits = len(self.exit_layers or ()) * self.exit_head_parameters
        words = self.vocab_size * (self.embedding_rank or self.hidden_size)
        weights = words + self.hidden_size * (inner + tables) + exits + self.num_hidden_layers * self.gate_parameters
        if weights > MAX_WEIGHTS:
            raise ValueError(
                f"These sizes make {weights:,} weights; at most {MAX_WEIGHTS:,} are taken. Look at `hidden_size` "
                f"({self.hidden_size}), `vocab_size` ({self.vocab_size}), `embedding_rank`, `attention_head_size` "
                f"({self.attention_head_size}), `num_hidden_layers`, `num_attention_heads`, `intermediate_size`, "
                f"`gate_size` ({self.gate_size}) and `exit_head_size` ({self.exit_head_size})."
            )

    def validate_exits(self) -> None:
        """Refuse exit layers that are out of order, out of range, or leave the last layer without an exit."""
        layers = self.exit_layers
        if not layers or layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] != self.num_hidden_layers:
            raise ValueError(
                f"`exit_layers` is {layers}. It must ascend without repeats within 1..{self.num_hidden_layers} and end "
                f"with the last layer, {self.num_hidden_layers}."
            )
        choices = {"exit_head": EXIT_HEADS, "exit_pooling": EXIT_POOLINGS, "skip_gates": (*SKIP_GATES, None)}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}. It must be one of {', '.join(map(str, known))}."
                )

    def validate_exit_config(self) -> None:
        """Refuse saved exit settings that no `predict` could use."""
        check_exit_config(self.exit_config)

    def validate_packed_layers(self) -> None:
        """Refuse packed layers that the model does not have, or of which more is kept than there is."""
        if self.packed_layers is None:
            return
        self.validate_widths()  # shapes follow from them
        left = set(self.packed_layers)
        for layer in range(1, self.num_hidden_layers + 1):
            for name, shape in self.matrix_shapes(layer).items():
                left.discard(name)
                try:
                    self.packing(name, shape)
                except ValueError as error:
                    shown = _shortened(self.packed_layers[name])
                    raise ValueError(f"`packed_layers` has {name} as {shown}. {error}") from error
        if left:
            names = _shortened(sorted(map(str, left)))
            raise ValueError(f"`packed_layers` names {names}. There is no such linear layer in this model.")
