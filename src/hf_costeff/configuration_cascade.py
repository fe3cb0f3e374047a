"""The configuration of a cascade: those of its members, smallest first, and when a row is sure enough to leave."""

# No `from __future__ import annotations` here: `@strict` skips the type check of a field whose annotation is a string.

import copy
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_costeff import CostEffConfig, check_exit_config, label_names, problem_type_of, require_no_gates

FEWEST_MEMBERS = 2
if TYPE_CHECKING:  # what __post_init__ leaves
    Members = list[Any]
else:  # what is accepted
    Members = list | None


def naming_member(configs: Sequence[PreTrainedConfig]) -> PreTrainedConfig:
    """The member whose labels the cascade takes: the last that has names, or the last of all if none has."""
    return next((config for config in reversed(configs) if label_names(config) is not None), configs[-1])


def match_labels(configs: Sequence[PreTrainedConfig]) -> list[list[int] | None]:
    """Where the labels of every member stand among its own logits, in the order of the last member.

    Labels are matched by name, without case; by position for a member that has no names but LABEL_0, LABEL_1, ...

    Args:
        configs: Of the members.

    Returns:
        For every member one position per label; `None` where the order is that of the last member.

    Raises:
        ValueError: Label sets or problem types that differ, or orders that differ while the last member has no names;
            both sides are named.

    Example:
        >>> from transformers import BertConfig
        >>> names = [{0: "no", 1: "yes"}, {0: "yes", 1: "no"}]
        >>> match_labels([BertConfig(id2label=id2label) for id2label in names])
        [[1, 0], None]
    """
    last, naming = configs[-1], naming_member(configs)
    wanted, kind = label_names(naming), problem_type_of(last)
    other = "the last member" if naming is last else f"member {configs.index(naming) + 1}"
    found: list[list[int] | None] = []
    for number, config in enumerate(configs, start=1):
        names = label_names(config)
        if problem_type_of(config) != kind or config.num_labels != last.num_labels:
            raise ValueError(
                f"Member {number} has {config.num_labels} labels ({problem_type_of(config)}) and the last member "
                f"{last.num_labels} ({kind}). All members of a cascade must answer the same question."
            )
        if names is None or wanted is None or names == wanted:
            found.append(None)
            continue
        sides = f"Member {number} has the labels {list(config.id2label.values())} and {other} "
        sides += f"{list(naming.id2label.values())}"
        if sorted(names) != sorted(wanted) or len(set(names)) < len(names):
            raise ValueError(
                f"{sides}. They must be the same names, in any order. If they mean the same, give both the same "
                "`id2label`."
            )
        if naming is not last:
            raise ValueError(
                f"{sides}, in another order, and the last member has no names, so nobody knows which of them its "
                "LABEL_0 is. Give the last member its `id2label`."
            )
        found.append([names.index(name) for name in wanted])
    return found


@strict
class CostEffCascadeConfig(PreTrainedConfig):
    """Configuration of [`CostEffCascade`]: complete models of growing cost, tried one after the other.

    The order of the labels and the problem type are those of the last member, names those of the last one that has some
    (CascadeBERT, Li et al. 2021).

    Args:
        members: Configurations of the members, smallest first, at least two: objects or their dicts. Any sequence
            classifier of Transformers or a [`CostEffConfig`], each with its own sizes and exits.
        exit_config: Saved settings of the cascade as a plain dict (see [`ExitConfig`]): what `exit_layers` are to a
            single model the members, counted from 1, are here. `None` if the cascade was not calibrated. The exit
            settings of a member stand in its own configuration.
        member_tokenizers: Subfolder of every member's tokenizer in the model's folder, `""` for the folder itself;
            `None` if all members share the one tokenizer there.

    Raises:
        StrictDataclassError: (huggingface_hub's, around a `ValueError` or `TypeError`) for fewer than two members, a
            cascade as a member, or members whose labels do not agree.

    Example:
        >>> from transformers import BertConfig
        >>> config = CostEffCascadeConfig(members=[BertConfig(num_hidden_layers=2), BertConfig()])
        >>> config.exit_layers, [member.num_hidden_layers for member in config.members]
        ([1, 2], [2, 12])
    """

    model_type = "costeff_cascade"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["exit_logits", "hidden_states", "attentions"]

    members: Members = cast(Any, None)
    exit_config: dict | None = None
    member_tokenizers: list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.members = [_config_of(member) for member in self.members or ()]
        if self.members and getattr(self, "id2label", None) is None and kwargs.get("num_labels") is None:
            self.id2label = dict(naming_member(self.members).id2label)
            self.label2id = {name: label for label, name in self.id2label.items()}
            self.problem_type = problem_type_of(self.members[-1])
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Upstream's, with the members as dicts."""
        members, self.members = self.members, []  # upstream copies what it does not know
        try:
            values = super().to_dict()
        finally:
            self.members = members
        return {**values, "members": [_values_of(member) for member in members]}

    @property
    def exit_layers(self) -> list[int]:
        """The members counted from 1, where [`ExitConfig`] and calibration speak of exit layers."""
        return list(range(1, len(self.members) + 1))

    @property
    def resolved_problem_type(self) -> str:
        """As [`CostEffConfig.resolved_problem_type`]."""
        return problem_type_of(self)

    @property
    def label_positions(self) -> list[list[int] | None]:
        """As [`match_labels`] of the members."""
        return match_labels(self.members)

    @property
    def member_settings(self) -> str:
        """What decides the answers of the members besides their weights, as text: exit settings and orders of labels.

        Records of how settings were chosen are left out.
        """
        chosen = [getattr(member, "exit_config", None) or {} for member in self.members]
        settings = [{name: own[name] for name in own if name != "calibration"} for own in chosen]
        return json.dumps([settings, self.label_positions], sort_keys=True)

    def validate_members(self) -> None:
        """Refuse too few members, a cascade within, and members whose labels do not agree with the last one's."""
        members = self.members
        if len(members) < FEWEST_MEMBERS:
            raise ValueError(
                f"A cascade of {len(members)} has nothing to defer to. `members` must name at least {FEWEST_MEMBERS} "
                "models, smallest first."
            )
        for number, member in enumerate(members, start=1):
            if member.model_type == self.model_type:
                raise ValueError(f"Member {number} is itself a cascade. List its members instead.")
            require_no_gates(member, f"A cascade, as member {number},")
        match_labels(members)
        if self.num_labels != members[-1].num_labels:
            raise ValueError(f"`num_labels` is {self.num_labels}, and the last member has {members[-1].num_labels}.")

    def validate_member_tokenizers(self) -> None:
        """Refuse tokenizers that are not one per member."""
        folders = self.member_tokenizers
        if folders is not None and (len(folders) != len(self.members) or not all(map(_is_folder, folders))):
            raise ValueError(
                f"`member_tokenizers` is {folders!r}. It must give one subfolder per member, or be None where all "
                "share a tokenizer."
            )

    def validate_exit_config(self) -> None:
        """Refuse saved settings that no `predict` could use."""
        check_exit_config(self.exit_config)


def require_single_model(config: PreTrainedConfig, what: str) -> None:
    """Refuse a cascade where a single model is needed.

    Args:
        config: Of the model.
        what: Its name, as the subject of a sentence.

    Raises:
        ValueError: Saying what works with cascades.
    """
    if config.model_type == CostEffCascadeConfig.model_type:
        raise ValueError(
            f"{what} is a cascade, and a single model is needed. Name its members instead; a cascade itself is served "
            "by hf-costeff cascade calibrate, cascade predict and push."
        )


def _is_folder(name: Any) -> bool:
    """The model's own folder or one directly below it: names come from files that anybody may have written."""
    return isinstance(name, str) and not name.startswith(".") and "/" not in name and "\\" not in name


def _values_of(member: PreTrainedConfig) -> dict[str, Any]:
    """What differs from the defaults; nothing of where the member was loaded from, nor its precision, the cascade's."""
    values = member.to_diff_dict()
    return {name: value for name, value in values.items() if name not in ("transformers_version", "auto_map", "dtype")}


def _config_of(member: Any) -> PreTrainedConfig:
    if isinstance(member, PreTrainedConfig):
        return member
    if not isinstance(member, dict) or not isinstance(member.get("model_type"), str):
        raise TypeError(f"A member is {member!r:.200}. It must be a configuration, or the dict of one.")
    values = copy.deepcopy(member)
    model_type = values.pop("model_type")
    if model_type == CostEffConfig.model_type:
        return CostEffConfig(**values)
    return AutoConfig.for_model(model_type, **values)
