"""A cascade of complete classifiers: a row that one of them is not sure of goes on to the next, larger one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from .configuration_cascade import CostEffCascadeConfig
from .configuration_costeff import CostEffConfig
from .exit_criteria import ExitConfig, answer_confidence, probabilities
from .exiting_rows import ExitPlan, ends_and_counts, host_index
from .modeling_costeff import (
    CostEffForSequenceClassification,
    CostEffPrediction,
    CostEffPreTrainedModel,
    inference,
)
from .promises import warn_if_void

AskMember = Callable[[int, list[int]], tuple[Tensor, Tensor]]
"""(number of the member from 1, rows) -> their raw logits in the cascade's order of labels and their exit layers."""


@dataclass
class CostEffCascadePrediction(CostEffPrediction):
    """What `predict` of a cascade returns, in the caller's row order: what [`CostEffPrediction`] has, and two more.

    Args:
        exit_model: The member that answered, counted from 1, shape (batch,). `exit_layer` is the layer within it.
        layers_run: Layers that each row ran in each member, 0 where it did not come, shape (batch, members). Their sum
            is the cost in layers; [`hf_costeff.cascade_costs.cascade_flops`] makes FLOPs of them.
    """

    exit_model: Tensor | None = None
    layers_run: Tensor | None = None


def build_member(config: PreTrainedConfig) -> PreTrainedModel:
    """An empty classifier of a member's own configuration, in torch's default precision, which loading sets."""
    if config.model_type == CostEffConfig.model_type:  # which only an importer of this package has registered
        return CostEffForSequenceClassification(config)
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.get_default_dtype())


class CostEffCascade(CostEffPreTrainedModel):
    """Complete classifiers, smallest first: the next one runs on the rows that those before it were not sure of.

    CascadeBERT (Li et al. 2021, section 3.1). `forward` is the last member; `predict` is the cascade. A member may have
    exits of its own, with settings of its own: exits inside, cascade outside. Unlike the released code, every member
    has its own configuration, and only deferred rows reach the next one.
    """

    config: CostEffCascadeConfig  # type: ignore[assignment] # another than the base's, as a cascade is another model
    config_class = CostEffCascadeConfig  # type: ignore[assignment]
    base_model_prefix = "cascade"
    _no_split_modules = []

    def __init__(self, config: CostEffCascadeConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.members = nn.ModuleList(build_member(member) for member in config.members)
        config.members = [member.config for member in self.members]
        self.post_init()

    @classmethod
    def from_members(
        cls, members: Sequence[PreTrainedModel], member_tokenizers: list[str] | None = None
    ) -> CostEffCascade:
        """A cascade of these very models; they are not copied.

        A saved model has one precision, so all members get the widest of theirs, in place. The order is taken as it is,
        and so is that all read the same token indices: [`hf_costeff.cascade.make_cascade`] also loads members, puts
        them in the order of their cost and compares their tokenizers.

        Args:
            members: Sequence classifiers, smallest first: the cascade asks them in this order, whatever they cost.
            member_tokenizers: As in [`CostEffCascadeConfig`].

        Raises:
            StrictDataclassError: As [`CostEffCascadeConfig`].
            ValueError: One model as two members.
        """
        if len({id(member) for member in members}) < len(members):
            raise ValueError(
                "The same model is given as two members. It would answer the same twice, and cannot be saved so: give "
                "each model once."
            )
        config = CostEffCascadeConfig(
            members=[member.config for member in members], member_tokenizers=member_tokenizers
        )
        with torch.device("meta"):
            cascade = cls(config)
        cascade.members = nn.ModuleList(members)
        config.members = [member.config for member in members]
        dtypes = [tensor.dtype for tensor in cascade.parameters() if tensor.is_floating_point()]
        return cascade.to(members[-1].device, reduce(torch.promote_types, dtypes)).train(members[-1].training)

    def member(self, index: int) -> PreTrainedModel:
        """A member by its place in the list, counted from 0."""
        return cast(PreTrainedModel, self.members[index])

    def get_input_embeddings(self) -> nn.Module:
        """Those of the last member."""
        return self.member(-1).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Those of the last member."""
        self.member(-1).set_input_embeddings(value)

    @classmethod
    def _auto_map(cls) -> dict[str, str]:
        return AUTO_MAP if cls.__module__ == __name__ else {}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What the last member answers at full depth, with its own kind of output.

        Args:
            input_ids: Token indices, shape (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` means no padding.
            token_type_ids: Segment indices, shape (batch, seq); left out for a member that takes none.
            labels: As the last member takes them.
            **kwargs: Further arguments of the last member.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        last = self.member(-1)
        with _telling_of_rows(len(self.members), last, input_ids):
            return last(**_accepted(last, inputs), labels=labels, **kwargs)

    def predict(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        early_exit: bool | float | ExitConfig | None = None,
    ) -> CostEffCascadePrediction:
        """Classify, each row by the first member that is sure of it.

        Rows that leave do not reach the next member, and the others reach it cropped to their longest. A row's answer
        does not depend on the batch it came in. Runs without dropout and gradients, as [`CostEffModel.predict`].

        Args:
            input_ids: Token indices, shape (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, shape (batch, seq); `None` means no padding.
            token_type_ids: Segment indices, shape (batch, seq); left out for a member that takes none.
            early_exit: As for [`CostEffModel.predict`]: one threshold for all members, or an [`ExitConfig`] in which
                members, counted from 1, stand for exit layers. Full depth is the last member alone, at full depth. A
                member whose threshold lets nobody leave is not run. Otherwise members with exits use the exit settings
                that they were saved with.

        Returns:
            As the single model, with the member that answered and the layers that were run.

        Raises:
            ValueError: Empty batch, a row of padding only, `early_exit=True` without saved settings, settings that do
                not fit, rows that a member cannot read, logits that are not finite, or members that read other token
                indices.
        """
        if input_ids is None or input_ids.dim() != 2 or 0 in input_ids.shape:
            found = "None" if input_ids is None else f"of shape {tuple(input_ids.shape)}"
            raise ValueError(f"`input_ids` is {found}. predict needs a non-empty (batch, seq).")
        plan = self.exit_plan(early_exit)
        if self.config.member_tokenizers is not None and len(plan.stops) > 1:
            raise ValueError(
                "The members have tokenizers of their own, so `input_ids` mean another text to each of them. Give the "
                "texts: hf_costeff.predict_texts(cascade, tokenizers, texts)."
            )
        ends, _ = ends_and_counts(attention_mask, *input_ids.shape)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}

        def ask(member: int, rows: list[int]) -> tuple[Tensor, Tensor]:
            index, columns = host_index(rows, input_ids.device), max(ends[row] for row in rows)
            chosen = {name: tensor[index, :columns] for name, tensor in inputs.items() if tensor is not None}
            return self.ask_member(member, chosen, full_depth=plan.criterion is None)

        with inference(self):
            return run_cascade(plan, len(self.members), input_ids.shape[0], ask)

    def exit_plan(self, early_exit: bool | float | ExitConfig | None = None) -> ExitPlan:
        """What `predict(early_exit=...)` means: which members are asked, counted from 1, and who may leave there.

        Args:
            early_exit: As for `predict`.

        Raises:
            ValueError: `early_exit=True` without saved settings, or settings that do not fit.
        """
        settings = ExitConfig.resolve(early_exit, self.config.exit_config)
        plan = ExitPlan.make(settings, self.config.exit_layers, self.config.resolved_problem_type)
        calibration = None if settings is None else settings.calibration
        warn_if_void(self, calibration, settings=self.config.member_settings)
        return plan

    def ask_member(self, member: int, inputs: dict[str, Any], full_depth: bool = False) -> tuple[Tensor, Tensor]:
        """What one member says of a batch. Call it inside [`inference`].

        Args:
            member: Counted from 1.
            inputs: Of the member's tokenizer, shape (batch, seq) each; what it does not take is left out.
            full_depth: Whether exits of the member are not used; otherwise its saved exit settings hold.

        Returns:
            Raw logits in the cascade's order of labels, shape (batch, labels), and exit layers, shape (batch,).
        """
        model = self.member(member - 1)
        if isinstance(model, CostEffForSequenceClassification):
            prediction = model.predict(**inputs, early_exit=False if full_depth else None)
            logits, exit_layer = prediction["logits"], prediction["exit_layer"]
        else:
            with _telling_of_rows(member, model, inputs["input_ids"]):
                logits = model(**_accepted(model, inputs)).logits
            exit_layer = torch.full(logits.shape[:1], model.config.num_hidden_layers, device=logits.device)
        positions = self.config.label_positions[member - 1]
        return (logits if positions is None else logits[:, positions]), exit_layer


def run_cascade(plan: ExitPlan, members: int, rows: int, ask: AskMember) -> CostEffCascadePrediction:
    """Ask the plan's members one after the other, each about the rows that those before it left over.

    Args:
        plan: Which members are asked, and who may leave there.
        members: How many there are, asked or not.
        rows: How many there are, at least 1.
        ask: Called only for rows that are still in.

    Raises:
        ValueError: If logits are not finite.
    """
    waiting, exit_model = torch.arange(rows), torch.zeros(rows, dtype=torch.long)
    layers_run = torch.zeros(rows, members, dtype=torch.long)
    answers = scaled = seen = None
    for member in plan.stops:
        logits, exit_layer = ask(member, waiting.tolist())
        _check_finite(logits, waiting, member)
        if answers is None or scaled is None:
            answers = logits.new_zeros(rows, logits.shape[-1])
            scaled = torch.zeros_like(answers)
        here = logits.unsqueeze(1)
        seen = here if seen is None else torch.cat([seen, here.to(seen)], dim=1)
        evidence = plan.evidence(seen, member)
        passed = [True] * len(waiting) if evidence is None else plan.passes(evidence.tolist(), member)
        on_host = torch.tensor(passed)
        leaves = on_host.to(seen.device)
        left = waiting[on_host]
        layers_run[waiting, member - 1] = exit_layer.cpu()
        exit_model[left] = member
        answers[left] = seen[leaves, -1]
        scaled[left] = plan.scaled(seen[leaves, -1], member)
        waiting, seen = waiting[~on_host], seen[~leaves]
        if not len(waiting):
            break
    assert answers is not None and scaled is not None  # a plan has a last stop
    chances = probabilities(scaled, plan.problem_type)
    return CostEffCascadePrediction(
        logits=answers,
        exit_layer=layers_run[torch.arange(rows), exit_model - 1].to(answers.device),
        probabilities=chances,
        confidence=answer_confidence(chances, plan.problem_type),
        exit_model=exit_model.to(answers.device),
        layers_run=layers_run.to(answers.device),
    )


def _check_finite(logits: Tensor, rows: Tensor, member: int) -> None:
    broken = (~logits.isfinite().all(-1)).tolist()
    if True in broken:
        position = broken.index(True)
        raise ValueError(
            f"The logits of row {int(rows[position])} in member {member} are {logits[position].tolist()}. They must be "
            f"finite: the checkpoint is broken, or too large for {logits.dtype}. Load an intact one, or use "
            "dtype=torch.float32."
        )


@contextmanager
def _telling_of_rows(number: int, member: PreTrainedModel, input_ids: Tensor | None) -> Iterator[None]:
    """A clear error where a member fails on rows that are too long for it, or not of its vocabulary."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        if input_ids is None or not input_ids.numel():
            raise
        length, highest = input_ids.shape[1], int(input_ids.max())
        vocabulary = getattr(member.config, "vocab_size", None) or math.inf
        positions = getattr(member.config, "max_position_embeddings", None) or math.inf
        if highest < vocabulary and length + 2 <= positions:  # RoBERTa counts positions from 2
            raise
        raise ValueError(
            f"Member {number} cannot read these rows: they are {length} tokens long, with token indices up to "
            f"{highest}, and it has {positions} positions and a vocabulary of {vocabulary}. Cut longer texts. If its "
            "tokenizer is another than that of the other members, build the cascade with hf_costeff.make_cascade."
        ) from error


def _accepted(model: PreTrainedModel, inputs: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What a member's forward names among these inputs."""
    names = inspect.signature(model.forward).parameters
    return {name: tensor for name, tensor in inputs.items() if name in names and tensor is not None}


AUTO_MAP = {"AutoModelForSequenceClassification": f"{__name__.split('.')[-1]}.{CostEffCascade.__name__}"}
CostEffCascadeConfig.register_for_auto_class()
CostEffCascade.register_for_auto_class("AutoModelForSequenceClassification")
