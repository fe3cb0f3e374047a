"""The COST-EFF encoder: narrow post-LN layers, an exit after each, and one loop that serves training and early exit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from transformers import PreTrainedModel, initialization
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from .configuration_costeff import EXIT_HEAD_HEADS, GATE_HEADS, CostEffConfig, check_skip_layers
from .encoder_layers import CostEffEmbeddings, CostEffLayer, eager_attention
from .exit_criteria import ExitConfig, answer_confidence, probabilities
from .exit_heads import EXIT_HEAD_CLASSES, EXIT_POOLING_FUNCTIONS, FreshLinear
from .exiting_rows import ExitPlan, LeavingRows, RunningRows, ends_and_counts, host_index, pick
from .hub import CARD, copy_report, plain_card, push_folder
from .modeling_outputs import CostEffClassifierOutput, CostEffModelOutput, CostEffPrediction
from .packed_linear import PackedLinear, use_packed_layers
from .promises import warn_if_void
from .skip_gates import SKIP_GATE_CLASSES, SkipMixing, is_skipped

MODEL_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What `predict` takes of a tokenizer's output."""


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

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FreshLinear):
            module.reset_parameters()
            return
        super()._init_weights(module)
        if isinstance(module, PackedLinear):
            initialization.normal_(module.values, std=self.config.initializer_range)
            initialization.zeros_(module.bias)

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        """Nothing for a subclass from elsewhere: upstream saves its file, which may not import ours."""
        return AUTO_MAP if cls.__module__ == __name__ else {}

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As upstream's; the code goes along, so that any Auto class loads the folder with `trust_remote_code=True`."""
        self.config.auto_map = dict(self._auto_map())
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
        and figures go along; otherwise a card without figures. One that somebody has written on the Hub stays, unless
        that folder's is by hand too.

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
            if not copy_report(self.name_or_path, folder):
                plain_card(repo_id, folder).save(Path(folder) / CARD)
            return push_folder(folder, repo_id, token=token, revision=revision, tags=tags, **options)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Torch's inference mode without dropout inside; every module's mode as it was afterwards."""
    training, below = [], [model]
    for module in below:  # it grows; modules() takes many times as long, which for one short text would be felt
        if module._modules:
            below.extend(child for child in module._modules.values() if child is not None)
        if module.training:
            training.append(module)
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():  # a short text alone feels what autograd costs per operation, even when off
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
        shared = {
            "pool": EXIT_POOLING_FUNCTIONS[config.exit_pooling],
            "attention_dropout": config.attention_probs_dropout_prob,
        }
        head_class = EXIT_HEAD_CLASSES[config.exit_head]
        sizes = {"size": config.exit_head_size, "num_heads": EXIT_HEAD_HEADS}
        self.exits = nn.ModuleDict(
            {
                str(layer): head_class(config.hidden_size, config.num_labels, dropout, **sizes, **shared)
                for layer in config.exit_layers
            }
        )
        self.gates = nn.ModuleList()
        if config.skip_gates is not None:
            gate_class = SKIP_GATE_CLASSES[config.skip_gates]
            self.gates.extend(
                gate_class(config.hidden_size, size=config.gate_size, num_heads=GATE_HEADS, **shared)
                for _ in self.layers
            )
        use_packed_layers(self, config.packed_layers)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding: (vocab, hidden), or (vocab, rank) where it is factorised."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embedding by one of any vocabulary and the same width.

        Raises:
            ValueError: If the width differs.
        """
        width = self.embeddings.word_embeddings.embedding_dim
        if value.embedding_dim != width:
            raise ValueError(
                f"The new word embedding is {value.embedding_dim} wide. It must be {width}: `embedding_rank`, or the "
                "hidden size where the embedding is not factorised."
            )
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
        hard_gates: bool | None = None,
        use_gates: bool = True,
        output_exit_states: bool = False,
        **kwargs: Any,
    ) -> CostEffModelOutput:
        """Run every layer and every exit.

        With gates, a layer's output o_l = F_l(h_{l-1}) and what it was given are mixed: h_l = (1 - g) o_l + g h_{l-1},
        where g is the row's probability of skipping the layer. The exit after a layer looks at o_l, and the last one at
        the mixed h_L, which always answers.

        Args:
            input_ids: Token indices, shape (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` means no padding.
            token_type_ids: Segment indices, shape (batch, seq); `None` means all 0. Ignored by a model without types.
            position_ids: Positions, shape (batch, seq); `None` numbers them as the checkpoint's family does.
            inputs_embeds: Instead of `input_ids`, what `get_input_embeddings()` would return.
            output_hidden_states: Also return all hidden states; `None` uses the config.
            output_attentions: Also return attention weights (eager attention only); `None` uses the config.
            gradient_equilibrium: Overrides the config's; changes gradients only, never results.
            hard_gates: Whether g counts as 1 from `skip_threshold` on and as 0 below, with the gradient of g itself
                (straight-through): what `predict` does. `None`: not in training mode. Without gates nothing changes.
            use_gates: `False` runs every layer whatever the gates say.
            output_exit_states: Also return the token states of the exit heads.
            **kwargs: Ignored.

        Raises:
            ValueError: `output_exit_states` of a model without attention exit heads.
        """
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        equilibrium = self.config.gradient_equilibrium if gradient_equilibrium is None else gradient_equilibrium
        embedded = self._embed(input_ids, token_type_ids, position_ids, inputs_embeds)
        mixing = self._mixing(hard_gates) if len(self.gates) and use_gates else None
        hidden_states = [embedded] if output_hidden_states else None
        attentions: list[Tensor | None] | None = [] if output_attentions else None
        exit_states = self._exit_states() if output_exit_states else None
        last_hidden_state, exit_logits = self.run_layers(
            embedded,
            attention_mask,
            create_bidirectional_mask(self.config, inputs_embeds=embedded, attention_mask=attention_mask),
            self._attention_function(),
            depths=range(1, self.config.num_hidden_layers + 1),
            exits=self.config.exit_layers,
            hidden_states=hidden_states,
            attentions=attentions,
            exit_states=exit_states,
            mixing=mixing,
            equilibrium=equilibrium and torch.is_grad_enabled(),
        )
        return CostEffModelOutput(
            last_hidden_state=last_hidden_state,
            exit_logits=tuple(exit_logits),
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if attentions is None else tuple(attentions),
            skip_probabilities=None if mixing is None else tuple(mixing.probabilities),
            exit_states=None if exit_states is None else tuple(exit_states),
        )

    def predict(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        early_exit: bool | float | ExitConfig | None = None,
        skip_layers: bool | None = None,
    ) -> CostEffPrediction:
        """Classify, letting each row leave at the first exit that is sure of it, and skip layers as its gates say.

        Rows that leave are dropped from the running batch and the rest is cropped to its longest row; a row's answer
        does not depend on the batch it came in, if the padding is on the right. Runs without dropout and gradients
        whatever mode the model is in; one that several threads share has to be in `eval()` mode.

        Args:
            input_ids: Token indices, shape (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` means no padding.
            token_type_ids: Segment indices, shape (batch, seq); `None` means all 0.
            early_exit: `None` what the model was saved with (full depth if nothing was), `False` full depth, `True` the
                saved settings, a number a threshold on the normalised entropy (0: nobody leaves early, 1: everybody
                leaves at the first exit, of the layers it runs), or an [`ExitConfig`].
            skip_layers: Whether rows skip the layers whose gates say so; the exits of these are not asked about them,
                but for the last, which always answers. `None`: if there are gates. `False` runs every layer.

        Returns:
            Logits, exit layers, probabilities, confidence and skipped layers, in the caller's order.

        Raises:
            ValueError: Empty batch, a row of padding only, `early_exit=True` without saved settings, settings that do
                not fit the model or its gates, `skip_layers=True` without gates, or logits that are not finite.
        """
        plan = self.exit_plan(early_exit, skip_layers)
        with inference(self):
            rows: RunningRows | None = self.enter(input_ids, attention_mask, token_type_ids)
            left = []
            while rows is not None:
                leaving, rows = self.advance(rows, plan)
                left += [] if leaving is None else [leaving]
        return self.answer(left, plan)

    def exit_plan(
        self, early_exit: bool | float | ExitConfig | None = None, skip_layers: bool | None = None
    ) -> ExitPlan:
        """What `predict(early_exit=...)` means for this model: which exits are asked, and who may leave there.

        Args:
            early_exit: As for `predict`.
            skip_layers: As for `predict`.

        Raises:
            ValueError: `early_exit=True` without saved settings, settings that do not fit the model or its gates, or
                `skip_layers=True` without gates.
        """
        check_skip_layers(skip_layers, self.config)
        skips = bool(len(self.gates) if skip_layers is None else skip_layers)
        settings = ExitConfig.resolve(early_exit, self.config.exit_config)
        plan = ExitPlan.make(settings, self.config.exit_layers, self.config.resolved_problem_type, skips)
        threshold = self.config.skip_threshold if skips else None
        warn_if_void(self, None if settings is None else settings.calibration, threshold)
        return plan

    def enter(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        numbers: Sequence[int] | None = None,
    ) -> RunningRows:
        """Rows at the bottom of the model, embedded and cropped to the longest. Call it inside [`inference`].

        Args:
            input_ids: Token indices, shape (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` means no padding.
            token_type_ids: Segment indices, shape (batch, seq); `None` means all 0.
            numbers: The caller's number of each row, by which answers are ordered; `None` counts from 0.

        Raises:
            ValueError: Empty batch, or a row of padding only.
        """
        if input_ids is None or input_ids.dim() != 2 or 0 in input_ids.shape:
            found = "None" if input_ids is None else f"of shape {tuple(input_ids.shape)}"
            raise ValueError(f"`input_ids` is {found}. predict needs a non-empty (batch, seq).")
        ends, counts = ends_and_counts(attention_mask, *input_ids.shape)
        columns = max(ends)
        padded = min(counts) < columns
        types = None if token_type_ids is None else token_type_ids[:, :columns]
        return RunningRows(
            numbers=list(range(len(ends)) if numbers is None else numbers),
            ends=ends,
            counts=counts,
            hidden_states=self._embed(input_ids[:, :columns], types, None, None),
            padding_mask=None if attention_mask is None or not padded else attention_mask[:, :columns],
            skipped=[()] * len(ends),
            attend=self._attention_function(),
        )

    def advance(self, rows: RunningRows, plan: ExitPlan) -> tuple[LeavingRows | None, RunningRows | None]:
        """Run rows on to the plan's next stop and ask who leaves there. Call it inside [`inference`].

        Args:
            rows: Rows that have come equally far; used up.
            plan: From [`exit_plan`].

        Returns:
            Who left and who goes on, `None` where nobody does.

        Raises:
            ValueError: If logits are not finite.
        """
        stop = plan.next_stop(rows.depth)
        if not plan.skips:
            return rows.leave(plan, self._run(rows, stop, [stop])[0])
        asked: list[int] = []
        asks_all = stop == self.config.num_hidden_layers  # those who skip the last layer are answered there too
        while rows.depth < stop:
            layer = rows.depth + 1
            decided = is_skipped(
                self.gates[layer - 1](rows.hidden_states, rows.padding_mask), self.config.skip_threshold
            )
            asked, running = rows.split(decided.tolist())  # the one transfer of a gated layer
            if running is not None:
                answers = self._run(running, layer, [] if asks_all else [stop])
                rows.put(asked, running)
            rows.depth = layer
        if asks_all:
            return rows.leave(plan, self.exits[str(stop)](rows.hidden_states, rows.padding_mask))
        return rows.leave(plan, answers[0], asked) if asked else (None, rows)

    def _run(self, rows: RunningRows, stop: int, exits: Collection[int]) -> list[Tensor]:
        """Run rows on to a layer; the logits of the exits there."""
        if rows.attention_mask is None and rows.padding_mask is not None:
            rows.attention_mask = create_bidirectional_mask(
                self.config,
                inputs_embeds=rows.hidden_states,
                attention_mask=rows.padding_mask,
                allow_is_bidirectional_skip=False,  # the host knows that there is padding; looking would wait
            )
        rows.hidden_states, logits = self.run_layers(
            rows.hidden_states,
            rows.padding_mask,
            rows.attention_mask,
            rows.attend,
            depths=range(rows.depth + 1, stop + 1),
            exits=exits,
        )
        rows.depth = stop
        return logits

    def answer(self, left: Sequence[LeavingRows], plan: ExitPlan) -> CostEffPrediction:
        """What rows answered, in the order of their numbers. Call it outside [`inference`].

        Args:
            left: Rows that left, at least one.
            plan: The plan they ran under.
        """
        numbers = [number for rows in left for number in rows.numbers]
        logits = torch.cat([rows.logits for rows in left])
        scaled = torch.cat([plan.scaled(rows.logits, rows.exit_layer) for rows in left])
        layers = [rows.exit_layer for rows in left for _ in rows.numbers]
        skipped = [layers for rows in left for layers in rows.skipped]
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        if order != list(range(len(numbers))):
            index, layers, skipped = host_index(order, logits.device), pick(layers, order), pick(skipped, order)
            logits, scaled = logits[index], scaled[index]
        chances = probabilities(scaled, plan.problem_type)
        return CostEffPrediction(
            logits=logits,
            exit_layer=host_index(layers, logits.device),
            probabilities=chances,
            confidence=answer_confidence(chances, plan.problem_type),
            skipped_layers=self._marked(skipped).to(logits.device, non_blocking=True) if plan.skips else None,
        )

    def _marked(self, layers: Sequence[Sequence[int]]) -> Tensor:
        """Booleans of shape (rows, layers), True at these 1-based layers of each row."""
        depth = self.config.num_hidden_layers
        return torch.tensor([[layer in own for layer in range(1, depth + 1)] for own in layers])

    def _mixing(self, hard_gates: bool | None) -> SkipMixing:
        hard = not self.training if hard_gates is None else hard_gates
        return SkipMixing(self.config.skip_threshold if hard else None)

    def _exit_states(self) -> list[Tensor]:
        if self.config.exit_head != "attention":
            raise ValueError(
                f"`output_exit_states` is True and `exit_head` {self.config.exit_head!r}. Only attention exit heads "
                "have token states: build the model with exit_head='attention'."
            )
        return []

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

    def _attention_function(self) -> Callable[..., Any]:
        return ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)

    def run_layers(
        self,
        hidden: Tensor,
        padding_mask: Tensor | None,
        attention_mask: Any,
        attend: Callable[..., Any],
        *,
        depths: range,
        exits: Collection[int],
        hidden_states: list[Tensor] | None = None,
        attentions: list[Tensor | None] | None = None,
        exit_states: list[Tensor] | None = None,
        mixing: SkipMixing | None = None,
        equilibrium: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """The one loop over layers and exits.

        Args:
            hidden: What the first of these layers takes, shape (batch, seq, hidden).
            padding_mask: For the exit heads: 1 for real tokens, 0 for padding, shape (batch, seq); `None` where nothing
                is padded.
            attention_mask: What `attend` takes.
            attend: Attention function, with the arguments of [`eager_attention`].
            depths: 1-based layers to run, in order.
            exits: Layers whose exit answers, if they are among them.
            hidden_states: What goes on after every layer is appended here, shape (batch, seq, hidden).
            attentions: The same for attention weights.
            exit_states: The same for the token states of attention exit heads, shape (batch, seq, exit_head_size).
            mixing: Mixes every layer's output with what it was given, as the gates say; `None`: every layer runs.
            equilibrium: Whether gradients are scaled by the number of exits ahead.

        Returns:
            Output of the last layer, shape (batch, seq, hidden), and raw logits of the exits, each (batch, labels).
        """
        exit_logits: list[Tensor] = []
        kept = {} if exit_states is None else {"exit_states": exit_states}
        for depth in depths:
            # Equilibrium: with m exits at or after a layer, x m into it and x 1/m out of it leave it the mean gradient.
            exits_ahead = len(exits) - len(exit_logits)
            inward = ScaleGradient.apply(hidden, exits_ahead) if equilibrium and depth > 1 else hidden
            made, weights = self.layers[depth - 1](inward, attention_mask, attend)
            hidden = made if mixing is None else mixing(inward, made, self.gates[depth - 1](inward, padding_mask))
            if equilibrium:
                hidden = ScaleGradient.apply(hidden, 1 / exits_ahead)
                made = hidden if mixing is None else ScaleGradient.apply(made, 1 / exits_ahead)
            if hidden_states is not None:
                hidden_states.append(hidden)
            if attentions is not None:
                attentions.append(weights)
            if depth in exits:
                answers_from = hidden if depth == self.config.num_hidden_layers else made
                exit_logits.append(self.exits[str(depth)](answers_from, padding_mask, **kept))
        return hidden, exit_logits


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
        hard_gates: bool | None = None,
        use_gates: bool = True,
        output_exit_states: bool = False,
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
            hard_gates: Whether gates decide or mix; `None`: they mix in training mode.
            use_gates: `False` runs every layer.
            output_exit_states: Also return the token states of attention exit heads.
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
            hard_gates=hard_gates,
            use_gates=use_gates,
            output_exit_states=output_exit_states,
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
            skip_probabilities=outputs.skip_probabilities,
            exit_states=outputs.exit_states,
        )

    def predict(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        early_exit: bool | float | ExitConfig | None = None,
        skip_layers: bool | None = None,
    ) -> CostEffPrediction:
        """See [`CostEffModel.predict`]."""
        return self.costeff.predict(input_ids, attention_mask, token_type_ids, early_exit, skip_layers)

    def truncate(self, exit_layer: int) -> CostEffForSequenceClassification:
        """A new, shallower model that ends where an exit is, and answers at full depth what that exit answers here.

        Earlier exits and gates stay; saved exit settings do not, because they were chosen for the deeper model. Rows
        that skip the new last layer are answered too, by an exit that was never asked about them before.

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
        if config.packed_layers is not None:
            names = {name for layer in range(1, exit_layer + 1) for name in config.matrix_shapes(layer)}
            config.packed_layers = {name: value for name, value in config.packed_layers.items() if name in names}
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
