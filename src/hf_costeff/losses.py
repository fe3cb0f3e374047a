"""The parts of the multi-exit objective, each a plain function of tensors.

Every part is a sum over exits (or layers) with weight 1 each, as in COST-EFF (Shen et al. 2022): the only layer
weighting is the gradient equilibrium inside the model. Within an exit, a part is the mean over the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from .exit_criteria import MULTI_LABEL, REGRESSION, answer_confidence, probabilities


def task_loss(
    exit_logits: Sequence[Tensor],
    labels: Tensor,
    problem_type: str,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Loss of every exit against the true labels, summed over exits.

    Args:
        exit_logits: Raw logits of each exit, shape (batch, labels).
        labels: Class indices (batch,) for single-label; multi-hot (batch, labels) for multi-label; numbers (batch,) or
            (batch, labels) for regression.
        problem_type: Cross-entropy, binary cross-entropy, or mean squared error, as upstream's `config.problem_type`.
        class_weights: Weight of each class (single label) or of each positive label (multi-label), shape (labels,).
        label_smoothing: Share of the target spread evenly over the classes, in 0..1; single label only.

    Returns:
        A scalar.

    Example: two exits that know nothing of two classes cost 2 ln 2.

        >>> task_loss([torch.zeros(1, 2)] * 2, torch.tensor([1]), "single_label_classification")
        tensor(1.3863)
    """
    total = exit_logits[0].new_zeros((), dtype=torch.float32)
    for logits in exit_logits:
        logits = logits.float()
        if problem_type == REGRESSION:
            total = total + functional.mse_loss(logits, labels.float().view_as(logits))
        elif problem_type == MULTI_LABEL:
            total = total + functional.binary_cross_entropy_with_logits(
                logits, labels.float(), pos_weight=class_weights
            )
        else:
            total = total + functional.cross_entropy(
                logits, labels.view(-1), weight=class_weights, label_smoothing=label_smoothing
            )
    return total


def soft_label_loss(
    exit_logits: Sequence[Tensor], teacher_logits: Sequence[Tensor], problem_type: str, temperature: float = 1.0
) -> Tensor:
    """Loss of every exit against what its teacher exit says, summed over exits.

    Single label: -sum_c softmax(teacher / T)_c log softmax(student / T)_c, without a T^2 factor (COST-EFF).
    Multi-label: binary cross-entropy with the teacher's sigmoid; regression: squared distance to its value.

    Args:
        exit_logits: Student logits of each exit, shape (batch, labels).
        teacher_logits: Teacher logits for each student exit, same shapes and number.
        problem_type: As upstream's `config.problem_type`.
        temperature: T above; 1 leaves the distributions as they are.

    Returns:
        A scalar.
    """
    total = exit_logits[0].new_zeros((), dtype=torch.float32)
    for logits, target in zip(exit_logits, teacher_logits, strict=True):
        student, teacher = logits.float() / temperature, target.float() / temperature
        if problem_type == REGRESSION:
            total = total + functional.mse_loss(logits.float(), target.float())
        elif problem_type == MULTI_LABEL:
            total = total + functional.binary_cross_entropy_with_logits(student, teacher.sigmoid())
        else:
            total = total + functional.cross_entropy(student, teacher.softmax(dim=-1))
    return total


def representation_loss(
    hidden_states: Sequence[Tensor], teacher_hidden_states: Sequence[Tensor], attention_mask: Tensor | None
) -> Tensor:
    """Squared distance between student and teacher hidden states, summed over the embedding output and all layers.

    Each term is the mean over the hidden width, then over the real tokens of a row (padding masked out), then over the
    batch, so a long row does not outweigh a short one.

    Args:
        hidden_states: Student's, each of shape (batch, seq, hidden).
        teacher_hidden_states: Teacher's, same shapes and number.
        attention_mask: 1 for real tokens, shape (batch, seq); `None` where nothing is padded.

    Returns:
        A scalar.

    Example: only the first of two tokens is real.

        >>> student, teacher = torch.ones(1, 2, 4), torch.tensor([0.0, 9.0]).view(1, 2, 1).expand(1, 2, 4)
        >>> representation_loss([student], [teacher], torch.tensor([[1, 0]]))
        tensor(1.)
    """
    total = hidden_states[0].new_zeros((), dtype=torch.float32)
    batch, seq, hidden = hidden_states[0].shape
    if attention_mask is None:
        attention_mask = hidden_states[0].new_ones(batch, seq, dtype=torch.float32)
    token_weights = attention_mask.float() / (attention_mask.sum(dim=1, keepdim=True).clamp(min=1) * batch * hidden)
    for student, teacher in zip(hidden_states, teacher_hidden_states, strict=True):
        squared = (student.float() - teacher.float()).square().sum(dim=-1)
        total = total + (squared * token_weights).sum()
    return total


def difficulty_loss(exit_logits: Sequence[Tensor], hard: Tensor, problem_type: str, margin: float = 0.5) -> Tensor:
    """How far confidence on easy rows is from being `margin` above that on hard rows, summed over exits.

    The difficulty-aware regularisation of CascadeBERT (Li et al. 2021, section 3.3): each easy row of the batch is
    paired with one of its hard rows, drawn with replacement, the same pairs at every exit, and an exit's part is the
    mean over easy rows of max(0, margin - (confidence of the easy row - confidence of the hard one)). The confidence is
    that of the answer, right or wrong, and both rows get gradients.

    Args:
        exit_logits: Raw logits of each exit, shape (batch, labels).
        hard: True (or 1) for hard rows, shape (batch,).
        problem_type: As upstream's `config.problem_type`.
        margin: At least 0; from 1 - 1 / classes on no pair ever has enough.

    Returns:
        A scalar; 0 where the batch has no hard row or no easy one.

    Raises:
        ValueError: For regression, where nothing is sure or unsure.

    Example: an easy row at 0.5 and a hard one at 0.75 lack 0.5 + 0.25.

        >>> logits = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
        >>> difficulty_loss([logits], torch.tensor([False, True]), "single_label_classification")
        tensor(0.7500)
    """
    total = exit_logits[0].new_zeros((), dtype=torch.float32)
    easy, difficult = (hard == 0).nonzero().flatten(), (hard != 0).nonzero().flatten()
    if not len(easy) or not len(difficult):
        return total
    partners = difficult[torch.randint(len(difficult), (len(easy),), device=difficult.device)]
    for logits in exit_logits:
        confidence = answer_confidence(probabilities(logits.float(), problem_type), problem_type)
        if confidence is None:
            raise ValueError("A regression model has no confidence, so nothing can be learned from difficulty.")
        surer = torch.ones_like(confidence[easy])
        total = total + functional.margin_ranking_loss(confidence[easy], confidence[partners], surer, margin)
    return total


def skip_loss(skip_probabilities: Sequence[Tensor], around: float | None = None) -> Tensor:
    """The incentive to skip: 1 / (sum over layers of the batch's mean probability of skipping), as SmartBERT has it.

    The batch stands inside the reciprocal, so the gradient of a batch is not the mean of those of its parts. The
    tangent `around` a fixed sum has the same slope for every part.

    Args:
        skip_probabilities: The soft probability of every gate, shape (batch,) per layer, also where weights are hard.
        around: Sum at which the tangent is taken, above 0; `None` takes the reciprocal itself.

    Returns:
        A scalar, at least 1 / layers.

    Example: two layers are skipped with probability 1/4 each on average.

        >>> skip_loss([torch.tensor([0.5, 0.0]), torch.tensor([0.25, 0.25])])
        tensor(2.)
        >>> skip_loss([torch.tensor([0.5, 0.0]), torch.tensor([0.25, 0.25])], around=1.0)
        tensor(1.5000)
    """
    total = torch.stack([layer.float().mean() for layer in skip_probabilities]).sum()
    return 1 / total if around is None else (2 * around - total) / around**2


def cross_layer_contrastive_loss(
    states: Sequence[Tensor], attention_mask: Tensor | None, temperature: float = 0.5
) -> Tensor:
    """How badly a token is told from the others of its text by what the next depth says of it, summed over pairs.

    SmartBERT's (Hu et al. 2023): for each pair of adjacent depths, token i of the first is compared by cosine with all
    tokens of the same text at the second; the part is the mean over tokens of -log softmax_i(cosine / temperature),
    then over the batch. Unlike the released code, padding is neither asked nor compared with, and the right token is in
    the denominator everywhere.

    Args:
        states: Projected token states, shallow first, each of shape (batch, seq, width).
        attention_mask: 1 for real tokens, shape (batch, seq); `None` where nothing is padded.
        temperature: Divisor of the cosines, above 0.

    Returns:
        A scalar; 0 where there are fewer than two depths. A text of one token adds 0.

    Example: two tokens at right angles, unchanged by the layer.

        >>> tokens = torch.eye(2)[None]
        >>> cross_layer_contrastive_loss([tokens, tokens], None, temperature=1.0)
        tensor(0.3133)
    """
    total = states[0].new_zeros((), dtype=torch.float32)
    batch, seq, _ = states[0].shape
    if attention_mask is None:
        attention_mask = states[0].new_ones(batch, seq, dtype=torch.float32)
    real = attention_mask.bool()
    token_weights = real.float() / (real.sum(dim=1, keepdim=True).clamp(min=1) * batch)
    with torch.autocast(states[0].device.type, enabled=False):
        directions = [functional.normalize(state.float(), dim=-1) for state in states]
        for tokens, others in pairwise(directions):
            cosines = (tokens @ others.transpose(1, 2)).masked_fill(~real[:, None], -torch.inf)
            cosines = cosines.masked_fill(~real[:, :, None], 0.0)  # what padding says has no weight, and must be finite
            log_shares = functional.log_softmax(cosines / temperature, dim=-1)
            total = total - (log_shares.diagonal(dim1=1, dim2=2) * token_weights).sum()
    return total


def importance_loss(
    exit_logits: Sequence[Tensor],
    teacher_logits: Sequence[Tensor],
    hidden_states: Sequence[Tensor],
    teacher_hidden_states: Sequence[Tensor],
    labels: Tensor,
    attention_mask: Tensor | None,
    problem_type: str,
) -> Tensor:
    """What importance is scored on: 0.9 soft labels + 0.1 true labels + representations (COST-EFF's pipeline).

    Exit-aware when it is given all exits; given the last exit alone it is the ordinary Taylor score. Unlike the
    pipeline, the representation part is the mean over real tokens and not over a fixed 128.

    Args:
        exit_logits: Student logits of each exit, shape (batch, labels).
        teacher_logits: Teacher logits for each of them.
        hidden_states: Student's, each of shape (batch, seq, hidden).
        teacher_hidden_states: Teacher's, same shapes and number.
        labels: As in [`task_loss`].
        attention_mask: 1 for real tokens, shape (batch, seq).
        problem_type: As upstream's `config.problem_type`.

    Returns:
        A scalar.
    """
    return (
        0.9 * soft_label_loss(exit_logits, teacher_logits, problem_type)
        + 0.1 * task_loss(exit_logits, labels, problem_type)
        + representation_loss(hidden_states, teacher_hidden_states, attention_mask)
    )


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Total loss: each named part times its weight.

    A part with weight 0 stays in the graph, so that every parameter it touches gets a (zero) gradient; distributed
    training needs that.

    Example:
        >>> weighted_sum({"task_loss": torch.tensor(2.0)}, {"task_loss": 0.5})
        tensor(1.)
    """
    return torch.stack([weights[name] * part for name, part in parts.items()]).sum()
