"""Stock encoders to ours: one table of names per family, the config and the tensors carried over at full width.

The supported families are one architecture under several names: post-LN blocks, learned positions, a first token that
stands for the text. What differs are names, the way positions are counted, and what the config leaves unsaid; all of
that stands in [`Family`], and nothing else in this module knows a family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from .configuration_costeff import CostEffConfig, require_no_gates
from .modeling_costeff import CostEffForSequenceClassification, CostEffModel
from .packed_linear import require_unpacked


@dataclass(frozen=True)
class Family:
    """How one stock family names its settings and its tensors.

    Args:
        model_type: `config.model_type` of the stock model.
        intermediate_size: Config attribute of the feed-forward width; so the next four for activation and dropouts.
        hidden_act: Config attribute.
        hidden_dropout: Config attribute.
        attention_dropout: Config attribute.
        classifier_dropout: Config attribute; its value may be `None`.
        type_vocab_size: Config attribute; `None` if the family has no token types.
        layer_norm_eps: Config attribute, or the number itself where the family fixes it.
        embedding_size: Config attribute of the embedding width where it may differ from `hidden_size`; else `None`.
        positions_skip_padding: Whether positions count the non-padding tokens from `pad_token_id + 1` (RoBERTa).
        layer: Prefix of a layer's tensors, `{i}` = 0-based layer. The names below follow it, without `.weight`/`.bias`.
        query: Query projection.
        key: Key projection.
        value: Value projection.
        attention_output: Projection after the heads.
        attention_norm: Layer norm after the attention.
        intermediate: First feed-forward matrix.
        feed_forward_output: Second feed-forward matrix.
        feed_forward_norm: Layer norm after the feed-forward part.
        dropped: Tensors of the stock encoder that are left behind on purpose: the pooler (an exit needs no dense
            layer) and position buffers of old checkpoints.
    """

    model_type: str
    intermediate_size: str = "intermediate_size"
    hidden_act: str = "hidden_act"
    hidden_dropout: str = "hidden_dropout_prob"
    attention_dropout: str = "attention_probs_dropout_prob"
    classifier_dropout: str = "classifier_dropout"
    type_vocab_size: str | None = "type_vocab_size"
    layer_norm_eps: str | float = "layer_norm_eps"
    embedding_size: str | None = None
    positions_skip_padding: bool = False
    layer: str = "encoder.layer.{i}"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    intermediate: str = "intermediate.dense"
    feed_forward_output: str = "output.dense"
    feed_forward_norm: str = "output.LayerNorm"
    dropped: tuple[str, ...] = (
        "pooler.dense.weight",
        "pooler.dense.bias",
        "embeddings.position_ids",
        "embeddings.token_type_ids",
    )

    def tensor_names(self, num_layers: int) -> dict[str, tuple[str, ...]]:
        """Name in [`CostEffModel`] -> stock names whose tensors, joined along dimension 0, make it.

        Args:
            num_layers: Encoder layers.

        Returns:
            Every tensor of the encoder without its exits, in the order of the forward pass.
        """
        tables = ["embeddings.word_embeddings", "embeddings.position_embeddings"]
        if self.type_vocab_size is not None:
            tables.append("embeddings.token_type_embeddings")
        names: dict[str, tuple[str, ...]] = {f"{table}.weight": (f"{table}.weight",) for table in tables}
        modules: dict[str, tuple[str, ...]] = {"embeddings.norm": ("embeddings.LayerNorm",)}
        for i in range(num_layers):
            ours, stock = f"layers.{i}", self.layer.format(i=i)
            modules |= {
                f"{ours}.attention.query_key_value": tuple(f"{stock}.{n}" for n in (self.query, self.key, self.value)),
                f"{ours}.attention.output": (f"{stock}.{self.attention_output}",),
                f"{ours}.attention_norm": (f"{stock}.{self.attention_norm}",),
                f"{ours}.feed_forward.intermediate": (f"{stock}.{self.intermediate}",),
                f"{ours}.feed_forward.output": (f"{stock}.{self.feed_forward_output}",),
                f"{ours}.feed_forward_norm": (f"{stock}.{self.feed_forward_norm}",),
            }
        for ours, sources in modules.items():
            for kind in ("weight", "bias"):
                names[f"{ours}.{kind}"] = tuple(f"{source}.{kind}" for source in sources)
        return names


BERT = Family("bert")
ROBERTA = replace(BERT, model_type="roberta", positions_skip_padding=True)
DISTILBERT = Family(
    "distilbert",
    intermediate_size="hidden_dim",
    hidden_act="activation",
    hidden_dropout="dropout",
    attention_dropout="attention_dropout",
    classifier_dropout="seq_classif_dropout",
    type_vocab_size=None,
    layer_norm_eps=1e-12,
    layer="transformer.layer.{i}",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1",
    feed_forward_output="ffn.lin2",
    feed_forward_norm="output_layer_norm",
)
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        BERT,
        ROBERTA,
        replace(ROBERTA, model_type="xlm-roberta"),
        replace(ROBERTA, model_type="camembert"),
        DISTILBERT,
        replace(BERT, model_type="electra", embedding_size="embedding_size"),
    )
}
WORDS = "embeddings.word_embeddings.weight"
HEADS = {"bert": ("bert.pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}
"""The dense layer and the final one of a stock classification head."""
SUPPORTED_FAMILIES: tuple[str, ...] = tuple(FAMILIES)


def family_of(stock_config: PreTrainedConfig) -> Family:
    """The table entry of a stock config.

    Args:
        stock_config: Config of a stock model.

    Returns:
        Its family.

    Raises:
        ValueError: If `model_type` is `"costeff"` already, or not in `SUPPORTED_FAMILIES`.
    """
    model_type = getattr(stock_config, "model_type", None)
    if model_type == CostEffConfig.model_type:
        raise ValueError(
            "This model is a COST-EFF model already (model_type 'costeff'), so there is nothing to convert. Use it as "
            "it is, or pass the stock checkpoint it was made from."
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"Cannot convert a model of type {model_type!r}. Supported are encoders of type "
            f"{', '.join(SUPPORTED_FAMILIES)} (MiniLM checkpoints are of type bert or xlm-roberta). Start from a "
            "checkpoint of one of these families."
        )
    return FAMILIES[model_type]


def convert_config(
    stock_config: PreTrainedConfig,
    *,
    exit_layers: Sequence[int] | None = None,
    exit_pooling: str = "cls",
    exit_head: str = "linear",
) -> CostEffConfig:
    """Our config for a stock one, at full width: same function, same labels.

    Label names and order, `problem_type`, dropouts, activation, epsilon and padding index come along. DistilBERT has no
    dropout after the attention's output projection; ours has one there, which matters in training only.

    Args:
        stock_config: Config of a model of one of the `SUPPORTED_FAMILIES`.
        exit_layers: 1-based layers that get an exit, the last one among them; `None` puts one after every layer.
        exit_pooling: What the exits look at, `"cls"` or `"mean"`; see [`CostEffConfig`].
        exit_head: Form of the exits, `"linear"` or `"attention"`.

    Returns:
        A config with uniform widths and an unfactorised embedding.

    Raises:
        ValueError: For an unsupported architecture: unknown or decoder-only type, a family member set up as decoder or
            with cross-attention, relative positions, an embedding narrower or wider than the hidden size, heads that do
            not divide the hidden size, or RoBERTa's positions without a padding index.

    Example:
        >>> from transformers import RobertaConfig
        >>> config = convert_config(RobertaConfig(num_hidden_layers=2, id2label={0: "bad", 1: "good"}))
        >>> config.intermediate_size, config.position_offset, config.exit_layers, config.id2label
        ([3072, 3072], 2, [1, 2], {0: 'bad', 1: 'good'})
    """
    family = family_of(stock_config)
    _refuse_variants(family, stock_config)
    eps = family.layer_norm_eps
    id2label = dict(stock_config.id2label or {})
    label2id: dict[str, Any] = dict(stock_config.label2id or {name: index for index, name in id2label.items()})
    return CostEffConfig(
        vocab_size=stock_config.vocab_size,
        hidden_size=stock_config.hidden_size,
        num_hidden_layers=stock_config.num_hidden_layers,
        num_attention_heads=stock_config.num_attention_heads,
        attention_head_size=stock_config.hidden_size // stock_config.num_attention_heads,
        intermediate_size=getattr(stock_config, family.intermediate_size),
        hidden_act=getattr(stock_config, family.hidden_act),
        hidden_dropout_prob=getattr(stock_config, family.hidden_dropout),
        attention_probs_dropout_prob=getattr(stock_config, family.attention_dropout),
        classifier_dropout=getattr(stock_config, family.classifier_dropout),
        max_position_embeddings=stock_config.max_position_embeddings,
        position_offset=stock_config.pad_token_id + 1 if family.positions_skip_padding else 0,
        type_vocab_size=0 if family.type_vocab_size is None else getattr(stock_config, family.type_vocab_size),
        layer_norm_eps=getattr(stock_config, eps) if isinstance(eps, str) else eps,
        initializer_range=stock_config.initializer_range,
        pad_token_id=stock_config.pad_token_id,
        exit_layers=None if exit_layers is None else list(exit_layers),
        exit_pooling=exit_pooling,
        exit_head=exit_head,
        id2label=id2label,
        label2id=label2id,
        problem_type=stock_config.problem_type,
    )


def _refuse_variants(family: Family, config: PreTrainedConfig) -> None:
    """Raise for a member of a supported family that computes another function than ours."""
    for flag in ("is_decoder", "add_cross_attention"):
        if getattr(config, flag, False):
            raise ValueError(
                f"Cannot convert this {family.model_type} model: its config has `{flag}=True`, and only bidirectional "
                f"encoders can be converted. Load an encoder checkpoint, or set `{flag}=False` if it is one."
            )
    positions = getattr(config, "position_embedding_type", None)
    if positions not in (None, "absolute"):
        raise ValueError(
            f"Cannot convert this {family.model_type} model: its `position_embedding_type` is {positions!r}, and only "
            "'absolute' (learned) positions are supported. Start from a checkpoint with absolute positions."
        )
    if family.embedding_size is not None and getattr(config, family.embedding_size) != config.hidden_size:
        raise ValueError(
            f"Cannot convert this {family.model_type} model: its `{family.embedding_size}` is "
            f"{getattr(config, family.embedding_size)} and its hidden_size {config.hidden_size}. It adds positions and "
            "normalises at the embedding's width and projects afterwards, which is not the function of a factorised "
            "word embedding. Start from a checkpoint where the two are equal, such as an ELECTRA of base size."
        )
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"Cannot convert this {family.model_type} model: {config.num_attention_heads} attention heads do not "
            f"divide the hidden size {config.hidden_size}. Correct `num_attention_heads` in its config."
        )
    if family.positions_skip_padding and config.pad_token_id is None:
        raise ValueError(
            f"Cannot convert this {family.model_type} model: its `pad_token_id` is None, and its positions are counted "
            "from the padding index. Set `pad_token_id` in its config (1 in the published checkpoints)."
        )


def longest_text(config: PreTrainedConfig) -> int:
    """Tokens that a classifier can take, ours or stock; for an unknown family what its config calls positions.

    Example:
        >>> from transformers import RobertaConfig
        >>> longest_text(RobertaConfig(max_position_embeddings=514))
        512
    """
    if isinstance(config, CostEffConfig):
        return config.longest_text
    try:
        return convert_config(config).longest_text
    except ValueError:
        return config.max_position_embeddings


def convert_state_dict(
    stock_base_state_dict: Mapping[str, Tensor], stock_config: PreTrainedConfig
) -> dict[str, Tensor]:
    """The encoder's tensors under the names of [`CostEffModel`], exits left out.

    Query, key and value are joined into one matrix with rows [query; key; value]. Every stock tensor is either used or
    named in the family's `dropped`; anything else is an error, so that no weight is lost unseen.

    Args:
        stock_base_state_dict: State dict of the bare encoder (`model.base_model.state_dict()`), names without prefix.
        stock_config: Its config.

    Returns:
        New tensors; the given ones are neither changed nor shared.

    Raises:
        ValueError: If tensors are missing or have no place, or the config is unsupported (as [`convert_config`]).
    """
    family = family_of(stock_config)
    _refuse_variants(family, stock_config)
    names = family.tensor_names(stock_config.num_hidden_layers)
    needed = {source for sources in names.values() for source in sources}
    if missing := sorted(needed - set(stock_base_state_dict)):
        raise ValueError(
            f"The state dict lacks {_some(missing)}, which a {family.model_type} encoder of "
            f"{stock_config.num_hidden_layers} layers has. Pass the bare encoder's: model.base_model.state_dict()."
        )
    if left_over := sorted(set(stock_base_state_dict) - needed - set(family.dropped)):
        raise ValueError(
            f"The state dict holds {_some(left_over)}, which a {family.model_type} encoder of "
            f"{stock_config.num_hidden_layers} layers does not have. Merge adapters and undo quantization before the "
            "conversion, and pass the bare encoder's: model.base_model.state_dict()."
        )
    return {
        ours: torch.cat([stock_base_state_dict[source].detach() for source in sources])
        for ours, sources in names.items()
    }


def _some(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + rest


def convert_from_stock(
    model: PreTrainedModel,
    *,
    exit_layers: Sequence[int] | None = None,
    exit_pooling: str = "cls",
    exit_head: str = "linear",
) -> CostEffForSequenceClassification:
    """A COST-EFF classifier with the encoder of a stock model, every hidden state equal to the stock model's.

    The exit heads are fresh: a stock head holds a dense layer that the exits do without, so they have to be trained.

    Args:
        model: A stock model of one of the `SUPPORTED_FAMILIES`: bare encoder, sequence classifier or any other head,
            which is left behind. It stays untouched; tensors are copied.
        exit_layers: As in [`convert_config`].
        exit_pooling: As in [`convert_config`].
        exit_head: As in [`convert_config`].

    Returns:
        The model at full width, with the dtype, device, attention implementation and train/eval mode of `model`.

    Raises:
        TypeError: If `model` is not a `PreTrainedModel` (a wrapper such as PEFT's or `DataParallel`).
        ValueError: As in [`convert_config`] and [`convert_state_dict`].
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"Cannot convert a {type(model).__name__}: expected a transformers PreTrainedModel. Unwrap it first "
            "(PEFT: `merge_and_unload()`, parallel wrappers: `.module`)."
        )
    config = convert_config(model.config, exit_layers=exit_layers, exit_pooling=exit_pooling, exit_head=exit_head)
    encoder_state = convert_state_dict(model.base_model.state_dict(), model.config)
    config._attn_implementation = model.config._attn_implementation
    converted = CostEffForSequenceClassification(config)
    converted.to(model.device, model.dtype)  # type: ignore[arg-type]  # upstream's wrapper hides `self`
    exit_state = {name: tensor for name, tensor in converted.costeff.state_dict().items() if name.startswith("exits.")}
    converted.costeff.load_state_dict(encoder_state | exit_state, strict=True)
    return converted.train(model.training)


def convert_to_stock(model: CostEffForSequenceClassification) -> PreTrainedModel:
    """A stock classifier that answers as ours does at full depth, for a serving stack that knows nothing of ours.

    It gives back what slenderizing saved: stock models have all heads, one feed-forward width and a whole embedding,
    so removed units come back as zeros and the factors are multiplied out. Fewer layers (`truncate`) stay fewer. The
    stock head's dense layer becomes the identity.

    Args:
        model: Its last exit must read the first token; earlier exits are left behind. It stays untouched.

    Returns:
        A `BertForSequenceClassification`, or `RobertaForSequenceClassification` where positions skip the padding, with
        the dtype, device and train/eval mode of `model`.

    Raises:
        ValueError: If the exits are attention heads or read the mean over the tokens, the head size does not divide the
            hidden size, or the model is packed or has gates.
    """
    config = model.config
    if not isinstance(config, CostEffConfig):
        raise ValueError(f"{type(model).__name__} is no multi-exit model; it may be stock already.")
    require_unpacked(config, "A stock model")
    require_no_gates(config, "Becoming a stock model")
    if config.exit_head != "linear":
        raise ValueError(
            f"`exit_head` is {config.exit_head!r}, and stock classifiers have one linear head. Train with "
            "exit_head='linear' to have a model that becomes stock."
        )
    if config.exit_pooling != "cls":
        raise ValueError(
            f"`exit_pooling` is {config.exit_pooling!r}, and stock classifiers read the first token. Train with "
            "exit_pooling='cls' to have a model that becomes stock."
        )
    if config.hidden_size % config.attention_head_size:
        raise ValueError(
            f"Heads of size {config.attention_head_size} do not divide the hidden size {config.hidden_size}, which a "
            "stock model needs."
        )
    stock = _empty_stock(config).to(model.device, model.dtype)
    state = stock.state_dict()
    encoder = stock.base_model_prefix
    for name, tensor in _stock_encoder(model.costeff).items():
        place = state[f"{encoder}.{name}"]
        place.zero_()[tuple(slice(size) for size in tensor.shape)] = tensor
    dense, final = HEADS[encoder]
    state[f"{dense}.weight"].copy_(torch.eye(config.hidden_size))
    state[f"{dense}.bias"].zero_()
    for kind in ("weight", "bias"):
        last = model.state_dict()[f"costeff.exits.{config.num_hidden_layers}.classifier.{kind}"]
        state[f"{final}.{kind}"].copy_(last)
    return stock.train(model.training)


def _empty_stock(config: CostEffConfig) -> PreTrainedModel:
    """A stock model of our depth, all heads and the widest layer's neurons."""
    kinds = (BertConfig, BertForSequenceClassification), (RobertaConfig, RobertaForSequenceClassification)
    config_class, model_class = kinds[config.position_offset > 0]
    shared = (
        *("vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "hidden_dropout_prob"),
        *("attention_probs_dropout_prob", "classifier_dropout", "max_position_embeddings", "layer_norm_eps"),
        *("initializer_range", "pad_token_id", "id2label", "label2id", "problem_type"),
    )
    return model_class(
        config_class(
            **{name: getattr(config, name) for name in shared},
            num_attention_heads=config.hidden_size // config.attention_head_size,
            intermediate_size=max(1, *config.intermediate_size),
            type_vocab_size=config.type_vocab_size or 2,  # a tokenizer may number the texts of a pair
        )
    )


def _stock_encoder(model: CostEffModel) -> dict[str, Tensor]:
    """Our encoder's tensors under BERT's names, each to be filled up with zeros to its stock shape."""
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.embeddings.projection is not None:
        ours[WORDS] = ours[WORDS] @ ours["embeddings.projection.weight"].T
    stock: dict[str, Tensor] = {}
    for name, sources in BERT.tensor_names(model.config.num_hidden_layers).items():
        tensor = ours.get(name, torch.zeros(0, model.config.hidden_size))  # a family may have no token types
        stock |= dict(zip(sources, tensor.chunk(len(sources)), strict=True))
    return stock


def check_same_shape(pretrained: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Refuse an assistant's starting point that is not of the teacher's shape.

    Raises:
        ValueError: Naming the sizes that differ.
    """
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    ours, theirs = convert_config(pretrained), convert_config(teacher)
    differing = [name for name in sizes if getattr(ours, name) != getattr(theirs, name)]
    if differing or pretrained.model_type != teacher.model_type:
        found = ", ".join(f"{name} {getattr(ours, name)} against {getattr(theirs, name)}" for name in differing)
        raise ValueError(
            f"`pretrained` is a {pretrained.model_type} and the teacher a {teacher.model_type} ({found}). Name the "
            "checkpoint that the teacher was fine-tuned from."
        )
