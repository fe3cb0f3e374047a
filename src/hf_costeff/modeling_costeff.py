"""The COST-EFF encoder: narrow post-LN layers, an exit after each, and one loop that serves training and early exit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_costeff import CostEffConfig
from .exit_criteria import REGRESSION, ExitConfig, probabilities
from .exit_heads import EXIT_HEAD_CLASSES, EXIT_POOLING_FUNCTIONS
from .exiting_rows import ExitingRows
from .hub import push_folder, write_card
from .promises import warn_if_void


@dataclass
class CostEffModelOutput(ModelOutput):
    """What [`CostEffModel`] returns.

    Args:
        last_hidden_state: Output of the last layer, shape (batch, seq, hidden).
        exit_logits: Raw logits of every exit, shallow first, each of shape (batch, labels).
        hidden_states: With `output_hidden_states=True`: embedding output and every layer's output, layers + 1 tensors
            of shape (batch, seq, hidden).
        attentions: With `output_attentions=True` and eager attention: shape (batch, heads, seq, seq) per layer, `None`
            for a layer without heads.
    """

    last_hidden_state: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None


@dataclass
class CostEffClassifierOutput(ModelOutput):
    """What [`CostEffForSequenceClassification`] returns.

    Args:
        loss: Sum of the task loss over all exits, a scalar; only if labels were given.
        logits: Raw logits of the last exit, shape (batch, labels).
        exit_logits: As in [`CostEffModelOutput`].
        hidden_states: As in [`CostEffModelOutput`].
        attentions: As in [`CostEffModelOutput`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor | None, ...] | None = None


@dataclass
class CostEffPrediction(ModelOutput):
    """What `predict` returns, in the caller's row order.

    Args:
        logits: Raw logits of the exit each row left at, shape (batch, labels).
        exit_layer: 1-based layer each row left after, shape (batch,).
        probabilities: Softmax or sigmoid of the temperature-scaled logits, the values themselves for regression, shape
            (batch, labels).
        confidence: Largest probability (single label) or that of the least sure label's decision (multi-label), shape
            (batch,); `None` for regression.
    """

    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    probabilities: Tensor | None = None
    confidence: Tensor | None = None


class ScaleGradient(torch.autograd.Function):
    """The identity forward; the gradient times `factor` backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        """The tensor itself, any shape."""
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The scaled gradient, same shape."""
        return gradient * ctx.factor, None


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention, returning its weights.

    Args:
        module: The attention module, asked whether it trains.
        query: Shape (batch, heads, seq, head_size); key and value alike.
        key: See query.
        value: See query.
        attention_mask: Additive, broadcastable to (batch, heads, seq, seq); `None` where nothing is padded.
        scaling: Factor on the scores.
        dropout: Probability on the weights while training.
        **kwargs: Ignored; other attention functions take more.

    Returns:
        Context of shape (batch, seq, heads, head_size), and weights of shape (batch, heads, seq, seq).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer of any width, 0 included, without torch's warning that an empty matrix needs no values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return nn.Linear(in_features, out_features)


class CostEffEmbeddings(nn.Module):
    """Word (factorised or not), position and token-type embeddings, summed and normalised."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        embedding_rank: int | None,
        max_position_embeddings: int,
        position_offset: int,
        type_vocab_size: int,
        pad_token_id: int | None,
        layer_norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, embedding_rank or hidden_size, padding_idx=pad_token_id)
        self.projection = None if embedding_rank is None else nn.Linear(embedding_rank, hidden_size, bias=False)
        self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size) if type_vocab_size else None
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.position_offset = position_offset
        self.pad_token_id = pad_token_id or 0

    def position_ids(self, input_ids: Tensor | None, seq_length: int, device: torch.device) -> Tensor:
        """Positions, shape (batch or 1, seq): 0, 1, 2, ..., or RoBERTa's count of the non-padding tokens."""
        longest = self.position_embeddings.num_embeddings - self.position_offset
        if seq_length > longest:
            raise ValueError(
                f"The input has {seq_length} tokens and the position table ends at {longest}. "
                f"Truncate: tokenizer(..., truncation=True, max_length={longest})."
            )
        if not self.position_offset or input_ids is None:
            return torch.arange(self.position_offset, self.position_offset + seq_length, device=device)[None]
        real = input_ids.ne(self.pad_token_id).long()
        return (real.cumsum(1) + self.position_offset - 1) * real + self.pad_token_id * (1 - real)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """Embedding output h_0, shape (batch, seq, hidden).

        `input_ids` has shape (batch, seq); `inputs_embeds` is what `word_embeddings` would return, shape (batch, seq,
        rank or hidden).
        """
        embedded = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        width = self.word_embeddings.embedding_dim
        if embedded.shape[-1] != width:
            factorised = " (factorised)" if self.projection is not None else ""
            raise ValueError(
                f"`inputs_embeds` has width {embedded.shape[-1]}, and this model's word embedding has width {width}"
                f"{factorised}. Pass model.get_input_embeddings()(input_ids)."
            )
        if position_ids is None:
            position_ids = self.position_ids(input_ids, embedded.shape[1], embedded.device)
        if self.projection is not None:
            embedded = self.projection(embedded)
        embedded = embedded + self.position_embeddings(position_ids)
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = position_ids.new_zeros(1, 1)
            embedded = embedded + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.norm(embedded))


class CostEffAttention(nn.Module):
    """Multi-head self-attention with any number of heads; without heads only the output bias is left."""

    is_causal = False

    def __init__(self, hidden_size: int, num_heads: int, head_size: int, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = head_size
        self.attention_dropout = attention_dropout
        self.query_key_value = linear(hidden_size, 3 * num_heads * head_size)
        self.output = linear(num_heads * head_size, hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, attend: Callable[..., Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values, shape (batch, seq, hidden), and from eager attention its weights (batch, heads, seq, seq)."""
        if self.num_heads == 0:  # through the empty maps, so that every parameter gets a gradient (DDP insists)
            return self.output(self.query_key_value(hidden_states)), None
        batch, seq, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, seq, 3, self.num_heads, self.head_size)
        query, key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=dropout
        )
        return self.output(context.reshape(batch, seq, -1)), weights


class CostEffFeedForward(nn.Module):
    """Two linear maps around an activation; without neurons only the output bias is left."""

    def __init__(self, hidden_size: int, num_neurons: int, activation: str) -> None:
        super().__init__()
        self.intermediate = linear(hidden_size, num_neurons)
        self.activation = ACT2FN[activation]
        self.output = linear(num_neurons, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape (batch, seq, hidden) to the same."""
        return self.output(self.activation(self.intermediate(hidden_states)))


class CostEffLayer(GradientCheckpointingLayer):
    """One post-LN encoder layer."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_size: int,
        num_neurons: int,
        activation: str,
        layer_norm_eps: float,
        hidden_dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.attention = CostEffAttention(hidden_size, num_heads, head_size, attention_dropout)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.feed_forward = CostEffFeedForward(hidden_size, num_neurons, activation)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(hidden_dropout)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, attend: Callable[..., Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of shape (batch, seq, hidden) to the same, and the attention weights if there are any."""
        attended, weights = self.attention(hidden_states, attention_mask, attend)
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        transformed = self.feed_forward(hidden_states)
        return self.feed_forward_norm(hidden_states + self.dropout(transformed)), weights


class CostEffPreTrainedModel(PreTrainedModel):
    """Loading, saving and weight initialisation, as every Transformers model has them."""

    config: CostEffConfig
    config_class = CostEffConfig
    base_model_prefix = "costeff"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch, so Trainer must divide by accumulation steps
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["CostEffLayer"]

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As upstream's; the code goes along, so that any Auto class loads the folder with `trust_remote_code=True`."""
        is_ours = type(self).__module__ == __name__  # upstream saves the file of a subclass, which may not import ours
        self.config.auto_map = dict(AUTO_MAP) if is_ours else {}
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        max_shard_size: int | str = "50GB",
        tags: list[str] | None = None,
        **options: Any,
    ) -> CommitInfo:
        """As upstream's, with a card that speaks of this model where upstream's is an empty form.

        While weights and exit settings are those of the local folder the model was loaded from, that folder's card
        and figures go along. Otherwise a card that is on the Hub stays, and a new repository gets one without figures.

        Args:
            repo_id: `name` or `org/name`; made if it is not there.
            token: Access token; `None` uses the one you are logged in with.
            revision: Branch, made if it is not there; `None` is `main`.
            max_shard_size: Largest weights file.
            tags: Added to those of the card.
            **options: `commit_message`, `commit_description`, `private` and `create_pr`, as [`push_folder`].

        Raises:
            PermissionError: If the Hub does not let you write there.
            ConnectionError: If the connection breaks; pushing again is safe.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            write_card(folder, repo_id, origin=self.name_or_path, token=token, revision=revision, tags=tags)
            return push_folder(folder, repo_id, token=token, revision=revision, **options)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients inside; every module's mode as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class CostEffModel(CostEffPreTrainedModel):
    """The encoder with its exits: hidden states, exit logits, and early-exit prediction."""

    def __init__(self, config: CostEffConfig) -> None:
        super().__init__(config)
        self.embeddings = CostEffEmbeddings(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            embedding_rank=config.embedding_rank,
            max_position_embeddings=config.max_position_embeddings,
            position_offset=config.position_offset,
            type_vocab_size=config.type_vocab_size,
            pad_token_id=config.pad_token_id,
            layer_norm_eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )
        self.layers = nn.ModuleList(
            CostEffLayer(
                hidden_size=config.hidden_size,
                num_heads=num_heads,
                head_size=config.attention_head_size,
                num_neurons=num_neurons,
                activation=config.hidden_act,
                layer_norm_eps=config.layer_norm_eps,
                hidden_dropout=config.hidden_dropout_prob,
                attention_dropout=config.attention_probs_dropout_prob,
            )
            for num_heads, num_neurons in zip(config.num_attention_heads, config.intermediate_size, strict=True)
        )
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        pool = EXIT_POOLING_FUNCTIONS[config.exit_pooling]
        self.exits = nn.ModuleDict(
            {
                str(layer): EXIT_HEAD_CLASSES[config.exit_head](config.hidden_size, config.num_labels, dropout, pool)
                for layer in config.exit_layers
            }
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding: (vocab, hidden), or (vocab, rank) where it is factorised."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embedding; its width must stay."""
        self.embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        gradient_equilibrium: bool | None = None,
        **kwargs: Any,
    ) -> CostEffModelOutput:
        """Run every layer and every exit.

        Args:
            input_ids: Token indices, shape (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` means no padding.
            token_type_ids: Segment indices, shape (batch, seq); `None` means all 0. Ignored by a model without types.
            position_ids: Positions, shape (batch, seq); `None` numbers them as the checkpoint's family does.
            inputs_embeds: Instead of `input_ids`, what `get_input_embeddings()` would return.
            output_hidden_states: Also return all hidden states; `None` uses the config.
            output_attentions: Also return attention weights (eager attention only); `None` uses the config.
            gradient_equilibrium: Overrides the config's; changes gradients only, never results.
            **kwargs: Ignored.
        """
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        equilibrium = self.config.gradient_equilibrium if gradient_equilibrium is None else gradient_equilibrium
        embedded = self._embed(input_ids, token_type_ids, position_ids, inputs_embeds)
        return self._run_layers(
            embedded,
            attention_mask,
            hidden_states=[] if output_hidden_states else None,
            attentions=[] if output_attentions else None,
            equilibrium=equilibrium and torch.is_grad_enabled(),
        )

    def predict(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        early_exit: bool | float | ExitConfig | None = None,
    ) -> CostEffPrediction:
        """Classify, letting each row leave at the first exit that is sure of it.

        Rows that leave are dropped from the running batch and the rest is cropped to its longest row; a row's answer
        does not depend on the batch it came in. Runs without dropout and gradients whatever mode the model is in.

        Args:
            input_ids: Token indices, shape (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` means no padding.
            token_type_ids: Segment indices, shape (batch, seq); `None` means all 0.
            early_exit: `None` what the model was saved with (full depth if nothing was), `False` full depth, `True` the
                saved settings, a number a threshold on the normalised entropy (0: nobody leaves early, 1: everybody
                leaves at the first exit), or an [`ExitConfig`].

        Returns:
            Logits, exit layers, probabilities and confidence, in the caller's order.

        Raises:
            ValueError: Empty batch, a row of padding only, `early_exit=True` without saved settings, settings that do
                not fit the model.
        """
        settings = ExitConfig.resolve(early_exit, self.config.exit_config)
        if input_ids is None or input_ids.dim() != 2 or 0 in input_ids.shape:
            found = "None" if input_ids is None else f"of shape {tuple(input_ids.shape)}"
            raise ValueError(f"`input_ids` is {found}. predict needs a non-empty (batch, seq).")
        rows = self._exiting_rows(settings, input_ids, attention_mask)
        warn_if_void(self, None if settings is None else settings.calibration)
        with inference(self):
            longest = rows.longest
            types = None if token_type_ids is None else token_type_ids[:, :longest]
            padding_mask = None if attention_mask is None else attention_mask[:, :longest]
            self._run_layers(self._embed(input_ids[:, :longest], types, None, None), padding_mask, rows=rows)
            return self._prediction(rows)

    def _embed(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        return self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)

    def _run_layers(
        self,
        hidden: Tensor,
        padding_mask: Tensor | None,
        *,
        rows: ExitingRows | None = None,
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor | None] | None = None,
        equilibrium: bool = False,
    ) -> CostEffModelOutput:
        """The one loop. Without `rows` all exits are computed; with `rows` only those they ask for, and rows leave."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mask = self._attention_mask(hidden, padding_mask, rows)
        exit_logits: list[Tensor] = []
        exits_ahead = len(self.config.exit_layers)
        if hidden_states is not None:
            hidden_states.append(hidden)
        for depth, layer in enumerate(self.layers, start=1):
            # Equilibrium: with m exits at or after a layer, x m into it and x 1/m out of it leave it the mean gradient.
            inward = ScaleGradient.apply(hidden, exits_ahead) if equilibrium and depth > 1 else hidden
            hidden, weights = layer(inward, mask, attend)
            if equilibrium:
                hidden = ScaleGradient.apply(hidden, 1 / exits_ahead)
            if hidden_states is not None:
                hidden_states.append(hidden)
            if attentions is not None:
                attentions.append(weights)
            if str(depth) not in self.exits:
                continue
            exits_ahead -= 1
            if rows is None:
                exit_logits.append(self.exits[str(depth)](hidden, padding_mask))
            elif depth in rows.evaluated:
                survivors = rows.leave(depth, self.exits[str(depth)](hidden, padding_mask))
                if survivors is None:
                    continue
                if len(survivors) == 0:
                    break
                hidden = hidden[survivors, : rows.longest]
                padding_mask = None if padding_mask is None else padding_mask[survivors, : rows.longest]
                mask = self._attention_mask(hidden, padding_mask, rows)
        return CostEffModelOutput(
            last_hidden_state=hidden,
            exit_logits=tuple(exit_logits),
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if attentions is None else tuple(attentions),
        )

    def _attention_mask(self, hidden: Tensor, padding_mask: Tensor | None, rows: ExitingRows | None) -> Any:
        """What the attention function takes; `rows` know on the host whether anything is padded."""
        if rows is None:
            return create_bidirectional_mask(self.config, inputs_embeds=hidden, attention_mask=padding_mask)
        if not rows.padded:
            return None
        return create_bidirectional_mask(
            self.config, inputs_embeds=hidden, attention_mask=padding_mask, allow_is_bidirectional_skip=False
        )

    def _exiting_rows(
        self, settings: ExitConfig | None, input_ids: Tensor, attention_mask: Tensor | None
    ) -> ExitingRows:
        layers = self.config.exit_layers
        if settings is None:
            return ExitingRows(None, [], layers, input_ids, attention_mask)
        if settings.checked_exits is not None and (stray := set(settings.checked_exits) - set(layers)):
            raise ValueError(f"`checked_exits` names layers without an exit: {sorted(stray)}. Exits: {layers}.")
        criterion = settings.build_criterion(len(layers), self.config.resolved_problem_type)
        checked = [layer for layer in layers if settings.is_checked(layer)]
        return ExitingRows(criterion, checked, layers, input_ids, attention_mask)

    def _prediction(self, rows: ExitingRows) -> CostEffPrediction:
        logits, exit_layer = rows.answers()
        problem_type = self.config.resolved_problem_type
        scaled = logits
        if rows.criterion is not None and problem_type != REGRESSION:
            temperatures = logits.new_tensor(rows.criterion.temperatures)
            exits = torch.bucketize(exit_layer, exit_layer.new_tensor(self.config.exit_layers))
            scaled = logits / temperatures[exits].unsqueeze(-1)
        chances = probabilities(scaled, problem_type)
        confidence = {
            "single_label_classification": lambda: chances.amax(-1),
            "multi_label_classification": lambda: torch.maximum(chances, 1 - chances).amin(-1),
            "regression": lambda: None,
        }[problem_type]()
        return CostEffPrediction(logits=logits, exit_layer=exit_layer, probabilities=chances, confidence=confidence)


class CostEffForSequenceClassification(CostEffPreTrainedModel):
    """[`CostEffModel`] with labels, loss and problem type, as upstream's sequence classifiers have them."""

    def __init__(self, config: CostEffConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.costeff = CostEffModel(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        gradient_equilibrium: bool | None = None,
        **kwargs: Any,
    ) -> CostEffClassifierOutput:
        """As [`CostEffModel.forward`]; with `labels` also the task loss, summed over all exits.

        Args:
            input_ids: Token indices, shape (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, shape (batch, seq).
            token_type_ids: Segment indices, shape (batch, seq).
            position_ids: Positions, shape (batch, seq).
            inputs_embeds: Instead of `input_ids`, what `get_input_embeddings()` would return.
            labels: Class indices (batch,), multi-hot floats (batch, labels), or numbers (batch,) by problem type.
            output_hidden_states: Also return all hidden states.
            output_attentions: Also return attention weights (eager attention only).
            gradient_equilibrium: Overrides the config's.
            **kwargs: Ignored.
        """
        outputs = self.costeff(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            gradient_equilibrium=gradient_equilibrium,
            return_dict=True,
        )
        loss = None
        if labels is not None:
            loss = sum(self.loss_function(labels, logits, self.config) for logits in outputs.exit_logits)
        return CostEffClassifierOutput(
            loss=loss,
            logits=outputs.exit_logits[-1],
            exit_logits=outputs.exit_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def predict(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        early_exit: bool | float | ExitConfig | None = None,
    ) -> CostEffPrediction:
        """See [`CostEffModel.predict`]."""
        return self.costeff.predict(input_ids, attention_mask, token_type_ids, early_exit)

    def truncate(self, exit_layer: int) -> CostEffForSequenceClassification:
        """A new, shallower model that ends where an exit is, and answers at full depth what that exit answers here.

        Earlier exits stay; saved exit settings do not, because they were chosen for the deeper model.

        Args:
            exit_layer: 1-based layer of the exit.

        Raises:
            ValueError: If there is no exit after that layer.
        """
        if exit_layer not in self.config.exit_layers:
            exits = ", ".join(map(str, self.config.exit_layers))
            raise ValueError(
                f"`exit_layer` is {exit_layer!r}, but the exits are after layers {exits}. Name one of them."
            )
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = exit_layer
        config.num_attention_heads = config.num_attention_heads[:exit_layer]
        config.intermediate_size = config.intermediate_size[:exit_layer]
        config.exit_layers = [layer for layer in config.exit_layers if layer <= exit_layer]
        config.exit_config = None
        config.validate()
        shallow = CostEffForSequenceClassification(config).to(self.device, self.dtype)
        state = self.state_dict()
        shallow.load_state_dict({name: state[name] for name in shallow.state_dict()})
        return shallow.train(self.training)


AUTO_CLASSES = {"AutoModel": CostEffModel, "AutoModelForSequenceClassification": CostEffForSequenceClassification}
AUTO_MAP = {auto: f"{__name__.split('.')[-1]}.{model_class.__name__}" for auto, model_class in AUTO_CLASSES.items()}
CostEffConfig.register_for_auto_class()  # upstream's way of saving a class's code with it
for _auto_class, _model_class in AUTO_CLASSES.items():
    _model_class.register_for_auto_class(_auto_class)
