from __future__ import annotations

import json
import math

import pytest
import torch

from hf_costeff.exit_criteria import (
    CRITERIA,
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    ExitConfig,
    decision_log_probabilities,
    decision_probabilities,
    entropy,
    margin,
    normalized_confidence,
    probabilities,
    simulate_exits,
    spread,
)


def measured(name: str, logits: torch.Tensor, problem_type: str = SINGLE_LABEL) -> torch.Tensor:
    """What a threshold criterion compares, for logits of shape (rows, labels)."""
    criterion = CRITERIA[name](ExitConfig(criterion=name, threshold=0.5), 1, problem_type)
    return criterion.measured(logits, 0)


def plain_entropy(chances: list[float]) -> float:
    return -sum(p * math.log(p) for p in chances if p > 0)


def plain_softmax(logits: list[float]) -> list[float]:
    weights = [math.exp(value - max(logits)) for value in logits]
    return [weight / sum(weights) for weight in weights]


def leaves(settings: ExitConfig, logits: list, problem_type: str = SINGLE_LABEL) -> list[bool]:
    """Answers at the first of two exits for rows of raw logits."""
    history = torch.tensor(logits).unsqueeze(1)
    return settings.build_criterion(2, problem_type).leaves(history, 0).tolist()


# The measures


@pytest.mark.parametrize("labels", [2, 3, 150])
def test_equal_logits_have_the_entropy_ln_of_the_number_of_classes(labels):
    logits = torch.full((1, labels), 7.5)
    assert entropy(decision_probabilities(logits, SINGLE_LABEL)).item() == pytest.approx(math.log(labels), rel=1e-6)
    assert measured("entropy_nats", logits).item() == pytest.approx(math.log(labels), rel=1e-6)
    assert measured("entropy", logits).item() == pytest.approx(1.0, rel=1e-6)
    assert measured("confidence", logits).item() == pytest.approx(0.0, abs=1e-6)
    assert measured("margin", logits).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
@pytest.mark.parametrize("name", ["entropy", "entropy_nats", "confidence", "margin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_measure_is_finite_for_huge_logits_and_says_certain(name, problem_type, dtype):
    logits = torch.tensor([[1e4, -1e4, -1e4], [-1e4, -1e4, 1e4]], dtype=dtype)
    sure = 0.0 if name.startswith("entropy") else 1.0
    assert measured(name, logits, problem_type).tolist() == pytest.approx([sure, sure], abs=1e-6)


def test_single_label_measures_equal_a_plain_computation():
    rows = [[0.3, -1.2, 2.0, 0.1], [5.0, 4.9, -3.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    for row in rows:
        chances = plain_softmax(row)
        first, second = sorted(chances, reverse=True)[:2]
        logits = torch.tensor([row])
        assert probabilities(logits, SINGLE_LABEL)[0].tolist() == pytest.approx(chances, abs=1e-6)
        assert measured("entropy_nats", logits).item() == pytest.approx(plain_entropy(chances), abs=1e-6)
        assert measured("entropy", logits).item() == pytest.approx(plain_entropy(chances) / math.log(4), abs=1e-6)
        assert measured("confidence", logits).item() == pytest.approx((first - 1 / 4) / (1 - 1 / 4), abs=1e-6)
        assert measured("margin", logits).item() == pytest.approx(first - second, abs=1e-6)


def test_multi_label_measures_are_those_of_the_least_sure_label():
    row = [4.0, -0.4, -6.0]
    chances = [1 / (1 + math.exp(-value)) for value in row]
    unsure = chances[1]
    logits = torch.tensor([row])
    assert probabilities(logits, MULTI_LABEL)[0].tolist() == pytest.approx(chances, abs=1e-6)
    expected_entropy = plain_entropy([unsure, 1 - unsure])
    assert measured("entropy_nats", logits, MULTI_LABEL).item() == pytest.approx(expected_entropy, abs=1e-6)
    assert measured("entropy", logits, MULTI_LABEL).item() == pytest.approx(expected_entropy / math.log(2), abs=1e-6)
    gap = (1 - unsure) - unsure
    assert measured("confidence", logits, MULTI_LABEL).item() == pytest.approx(gap, abs=1e-6)
    assert measured("margin", logits, MULTI_LABEL).item() == pytest.approx(gap, abs=1e-6)


def test_a_multi_label_model_with_one_label_still_has_two_classes_to_decide_between():
    assert measured("entropy", torch.zeros(1, 1), MULTI_LABEL).item() == pytest.approx(1.0)


def test_the_measures_keep_leading_dimensions():
    logits = torch.randn(5, 4, 3)
    assert decision_log_probabilities(logits, SINGLE_LABEL).shape == (5, 4, 1, 3)
    for measure in (entropy, normalized_confidence, margin):
        assert measure(decision_probabilities(logits, SINGLE_LABEL)).shape == (5, 4)
        assert measure(decision_probabilities(logits, MULTI_LABEL)).shape == (5, 4, 3)


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
def test_probabilities_are_the_exponentials_of_the_log_probabilities(problem_type):
    logits = 5 * torch.randn(4, 3)
    expected = decision_log_probabilities(logits, problem_type).exp().reshape(4, -1)
    assert torch.allclose(decision_probabilities(logits, problem_type).reshape(4, -1), expected, atol=1e-6)


def test_regression_has_values_and_no_probabilities():
    values = torch.tensor([[3.7], [-40.0]])
    assert torch.equal(probabilities(values, REGRESSION), values)
    with pytest.raises(ValueError, match='criterion="patience"'):
        decision_log_probabilities(values, REGRESSION)


# The threshold criteria


def test_a_row_leaves_when_its_entropy_is_strictly_below_the_threshold():
    rows = [[2.0, 0.0], [0.5, 0.0]]
    exact = measured("entropy", torch.tensor(rows)).tolist()
    between = sum(exact) / 2
    assert leaves(ExitConfig(threshold=between), rows) == [True, False]
    for row, value in zip(rows, exact, strict=True):
        assert leaves(ExitConfig(threshold=value), [row]) == [False]
        assert leaves(ExitConfig(threshold=math.nextafter(value, 2) + 1e-6), [row]) == [True]


@pytest.mark.parametrize("name", ["confidence", "margin"])
def test_a_row_leaves_when_its_confidence_or_margin_is_strictly_above_the_threshold(name):
    rows = [[2.0, 0.0, -1.0], [0.5, 0.0, 0.0]]
    exact = measured(name, torch.tensor(rows)).tolist()
    assert leaves(ExitConfig(criterion=name, threshold=sum(exact) / 2), rows) == [True, False]
    for row, value in zip(rows, exact, strict=True):
        assert leaves(ExitConfig(criterion=name, threshold=value), [row]) == [False]


@pytest.mark.parametrize(
    ("name", "nobody", "everybody"), [("entropy", 0.0, 1.0), ("confidence", 1.0, 0.0), ("margin", 1.0, 0.0)]
)
def test_the_ends_of_the_scale_keep_everybody_in_or_let_everybody_leave(name, nobody, everybody):
    rows = [[0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [1.0, 0.5, 0.2]]
    assert leaves(ExitConfig(criterion=name, threshold=nobody), rows) == [False] * 3
    assert leaves(ExitConfig(criterion=name, threshold=everybody), rows) == [True] * 3


@pytest.mark.parametrize("name", ["confidence", "margin"])
def test_a_threshold_of_one_keeps_a_certain_row_in_for_any_number_of_classes(name):
    for labels in range(2, 64):
        certain = [1e4] + [-1e4] * (labels - 1)
        assert leaves(ExitConfig(criterion=name, threshold=1.0), [certain]) == [False]


def test_a_threshold_in_nats_is_the_papers_and_may_exceed_one():
    rows = [[1.0, 0.5, 0.2, 0.0], [3.0, 0.0, 0.0, 0.0]]
    nats = [plain_entropy(plain_softmax(row)) for row in rows]
    assert nats[1] < 1.2 < nats[0]
    assert leaves(ExitConfig(criterion="entropy_nats", threshold=1.2), rows) == [False, True]
    assert leaves(ExitConfig(threshold=1.2 / math.log(4)), rows) == [False, True]


def test_a_temperature_divides_the_logits_of_its_exit():
    row = [3.0, 0.0]
    warm, cold = plain_entropy(plain_softmax([1.5, 0.0])), plain_entropy(plain_softmax([3.0, 0.0]))
    threshold = (warm + cold) / 2
    settings = ExitConfig(criterion="entropy_nats", threshold=threshold, temperatures=[2.0, 1.0])
    criterion = settings.build_criterion(2, SINGLE_LABEL)
    history = torch.tensor([[row]])
    assert criterion.leaves(history, 0).tolist() == [False]
    assert criterion.leaves(history, 1).tolist() == [True]


def test_each_exit_uses_its_own_threshold():
    logits = torch.tensor([[[1.0, 0.0]] * 3])
    value = measured("entropy", torch.tensor([[1.0, 0.0]])).item()
    tight, loose = value / 2, (1 + value) / 2
    for thresholds, expected in [([loose, tight, tight], 0), ([tight, loose, tight], 1), ([tight, tight, loose], 2)]:
        assert simulate_exits(logits, ExitConfig(threshold=thresholds), [1, 2, 3], SINGLE_LABEL).tolist() == [expected]


def test_the_last_threshold_is_never_used():
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    for last in (0.0, 1.0):
        assert simulate_exits(logits, ExitConfig(threshold=[0.0, last]), [1, 2], SINGLE_LABEL).tolist() == [1]


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL])
@pytest.mark.parametrize("name", ["entropy", "entropy_nats", "confidence", "margin"])
def test_a_looser_threshold_lets_no_row_stay_longer(name, problem_type):
    torch.manual_seed(0)
    logits = 2 * torch.randn(200, 5, 3)
    ladder = [step / 20 for step in range(21)]
    loosening = ladder if name.startswith("entropy") else ladder[::-1]
    exits = torch.stack(
        [
            simulate_exits(logits, ExitConfig(criterion=name, threshold=value), [1, 2, 3, 4, 5], problem_type)
            for value in loosening
        ]
    )
    assert (exits[1:] <= exits[:-1]).all()
    assert exits[0].float().mean() > exits[10].float().mean() > exits[-1].float().mean()


# Patience


def pabee(answers: list, patience: int, agree) -> int:
    """Exit index by the counter of Zhou et al. 2020: reset on a change, leave when it reaches the patience."""
    count = 0
    for index in range(1, len(answers)):
        count = count + 1 if agree(answers[index - 1], answers[index]) else 0
        if count == patience:
            return index
    return len(answers) - 1


@pytest.mark.parametrize("patience", [1, 2, 3, 6])
@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
def test_patience_counts_like_pabee(patience, problem_type):
    torch.manual_seed(patience)
    logits = torch.randn(100, 6, 1 if problem_type == REGRESSION else 2)
    settings = ExitConfig(criterion="patience", patience=patience, tolerance=0.8)
    expected = []
    for row in logits.tolist():
        if problem_type == REGRESSION:
            expected.append(pabee([values[0] for values in row], patience, lambda a, b: abs(a - b) < 0.8))
        elif problem_type == MULTI_LABEL:
            sets = [tuple(value > 0 for value in values) for values in row]
            expected.append(pabee(sets, patience, lambda a, b: a == b))
        else:
            expected.append(pabee([values.index(max(values)) for values in row], patience, lambda a, b: a == b))
    found = simulate_exits(logits, settings, list(range(1, 7)), problem_type).tolist()
    assert found == expected
    assert min(found) == min(patience, 5)


def test_patience_may_differ_from_exit_to_exit_and_where_it_is_0_everybody_leaves():
    answers = [[0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [1, 1, 1, 0, 0]]
    logits = torch.eye(2)[torch.tensor(answers)]

    def exits(patience: int | list[int], problem_type: str = SINGLE_LABEL, **settings: object) -> list[int]:
        config = ExitConfig(criterion="patience", patience=patience, **settings)
        return simulate_exits(logits, config, [1, 2, 3, 4, 5], problem_type).tolist()

    assert exits([1, 2, 2, 0, 0]) == [3, 3, 2]
    assert exits([2, 1, 1, 1, 1]) == exits(1)  # one exit has nothing to agree with
    assert exits(0) == exits(0, MULTI_LABEL) == exits(0, REGRESSION) == [0, 0, 0]
    assert exits(0, checked_exits=[3]) == [2, 2, 2]


def test_a_longer_patience_and_a_smaller_tolerance_let_no_row_leave_earlier():
    torch.manual_seed(0)
    values = torch.randn(100, 6, 1)

    def exits(patience: int, tolerance: float) -> torch.Tensor:
        settings = ExitConfig(criterion="patience", patience=patience, tolerance=tolerance)
        return simulate_exits(values, settings, list(range(1, 7)), REGRESSION)

    assert (exits(1, 0.5) <= exits(2, 0.5)).all()
    assert (exits(1, 1.0) <= exits(1, 0.3)).all()
    assert (exits(1, 0.0) == 5).all()


def test_patience_sees_checked_exits_only():
    answers = [0, 1, 0, 1, 0]
    logits = torch.eye(2)[answers].unsqueeze(0)
    settings = ExitConfig(criterion="patience", patience=1, checked_exits=[1, 3])
    assert simulate_exits(logits, settings, [1, 2, 3, 4, 5], SINGLE_LABEL).tolist() == [2]
    assert simulate_exits(logits, ExitConfig(criterion="patience", patience=1), [1, 2, 3, 4, 5], SINGLE_LABEL) == 4


def test_checked_exits_are_layers_and_not_positions():
    logits = torch.zeros(1, 3, 2)
    everybody = {"threshold": 1.0}
    assert simulate_exits(logits, ExitConfig(**everybody, checked_exits=[4]), [2, 4, 6], SINGLE_LABEL).tolist() == [1]
    assert simulate_exits(logits, ExitConfig(**everybody, checked_exits=[]), [2, 4, 6], SINGLE_LABEL).tolist() == [2]
    assert simulate_exits(logits, ExitConfig(**everybody, checked_exits=[6]), [2, 4, 6], SINGLE_LABEL).tolist() == [2]


# Settings


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"criterion": "luck"}, "criterion"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": [0.5, 1.1]}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": "0.3"}, "threshold"),
        ({"threshold": True}, "threshold"),
        ({"criterion": "entropy_nats", "threshold": -1.0}, "threshold"),
        ({"temperatures": 0.0}, "temperatures"),
        ({"temperatures": [1.0, -1.0]}, "temperatures"),
        ({"temperatures": float("inf")}, "temperatures"),
        ({"temperatures": "1"}, "temperatures"),
        ({"patience": -1}, "patience"),
        ({"patience": [1, -1]}, "patience"),
        ({"patience": [1, True]}, "patience"),
        ({"patience": 1.5}, "patience"),
        ({"patience": 2.0}, "patience"),
        ({"patience": float("inf")}, "patience"),
        ({"patience": "2"}, "patience"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tolerance": "0.1"}, "tolerance"),
        ({"checked_exits": [3, 1]}, "checked_exits"),
        ({"checked_exits": [1, 1]}, "checked_exits"),
        ({"checked_exits": [0]}, "checked_exits"),
        ({"checked_exits": ["1"]}, "checked_exits"),
        ({"checked_exits": 3}, "checked_exits"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_value_and_the_range(values, name):
    with pytest.raises(ValueError, match=rf"`{name}` is .* It must be") as refusal:
        ExitConfig(**values)
    wrong = values[name]
    assert any(repr(part) in str(refusal.value) for part in (wrong if isinstance(wrong, list) else [wrong])) or repr(
        wrong
    ) in str(refusal.value)


def test_a_threshold_in_nats_has_no_upper_limit():
    assert ExitConfig(criterion="entropy_nats", threshold=4.0).threshold == 4.0


@pytest.mark.parametrize(
    ("settings", "problem_type", "message"),
    [
        (ExitConfig(), SINGLE_LABEL, "needs a `threshold`"),
        (ExitConfig(criterion="patience"), SINGLE_LABEL, "needs `patience`"),
        (ExitConfig(criterion="patience", patience=1), REGRESSION, "needs `tolerance`"),
        (ExitConfig(criterion="patience", patience=[1, 0]), SINGLE_LABEL, "`patience` has 2 entries"),
        (ExitConfig(threshold=0.5), REGRESSION, 'criterion="patience"'),
        (ExitConfig(criterion="margin", threshold=0.5), REGRESSION, 'criterion="patience"'),
        (ExitConfig(threshold=[0.5, 0.5]), SINGLE_LABEL, "2 entries and the model has 3 exits"),
        (ExitConfig(threshold=[]), SINGLE_LABEL, "0 entries and the model has 3 exits"),
        (ExitConfig(threshold=0.5, temperatures=[1.0] * 4), SINGLE_LABEL, "4 entries and the model has 3 exits"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_when_the_criterion_is_built(settings, problem_type, message):
    with pytest.raises(ValueError, match=message):
        settings.build_criterion(3, problem_type)


def test_spread_gives_one_number_per_exit():
    assert spread("threshold", 1, 3) == [1.0, 1.0, 1.0]
    assert spread("threshold", (0.1, 0.2), 2) == [0.1, 0.2]


def test_settings_survive_json():
    settings = ExitConfig(
        criterion="patience",
        patience=2,
        tolerance=0.25,
        temperatures=[1.5, 1.0],
        checked_exits=[2, 4],
        calibration={"split": "calibration", "rows": 872, "promise": {"max_accuracy_drop": 0.5}},
    )
    assert ExitConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert ExitConfig.from_dict(ExitConfig(threshold=0.0).to_dict()) == ExitConfig(threshold=0.0)


def test_an_unknown_stored_setting_is_refused_by_name():
    with pytest.raises(ValueError, match=r"\['tau'\].*threshold"):
        ExitConfig.from_dict({"tau": 0.3})


SAVED = {"criterion": "margin", "threshold": 0.7, "temperatures": 2.0, "checked_exits": [1, 3]}


@pytest.mark.parametrize(
    ("early_exit", "saved", "expected"),
    [
        (None, None, None),
        (None, SAVED, ExitConfig(**SAVED)),
        (True, SAVED, ExitConfig(**SAVED)),
        (False, None, None),
        (False, SAVED, None),
        (0, None, ExitConfig(threshold=0.0)),
        (1, None, ExitConfig(threshold=1.0)),
        (1.0, None, ExitConfig(threshold=1.0)),
        (7, None, ExitConfig(threshold=1.0)),
        (0.3, None, ExitConfig(threshold=0.3)),
        (0.3, SAVED, ExitConfig(threshold=0.3, temperatures=2.0, checked_exits=[1, 3])),
        (1, SAVED, ExitConfig(threshold=1.0, temperatures=2.0, checked_exits=[1, 3])),
        (0, SAVED, ExitConfig(threshold=0.0, temperatures=2.0, checked_exits=[1, 3])),
        (ExitConfig(threshold=0.2), SAVED, ExitConfig(threshold=0.2)),
    ],
)
def test_early_exit_resolves_booleans_by_identity_and_numbers_as_thresholds(early_exit, saved, expected):
    assert ExitConfig.resolve(early_exit, saved) == expected


def test_true_without_saved_settings_is_an_error_that_names_calibrate():
    with pytest.raises(ValueError, match="hf-costeff calibrate"):
        ExitConfig.resolve(True, None)


@pytest.mark.parametrize("early_exit", [-0.1, float("nan"), -math.inf])
def test_a_threshold_below_zero_or_not_a_number_is_refused(early_exit):
    with pytest.raises(ValueError, match="threshold"):
        ExitConfig.resolve(early_exit, None)


@pytest.mark.parametrize("early_exit", ["0.3", [0.3], {"threshold": 0.3}])
def test_anything_but_a_boolean_a_number_or_settings_is_a_type_error(early_exit):
    with pytest.raises(TypeError, match="ExitConfig"):
        ExitConfig.resolve(early_exit, None)


def test_full_depth_needs_no_valid_saved_settings():
    assert ExitConfig.resolve(False, {"criterion": "from a later version"}) is None
    with pytest.raises(ValueError, match="criterion"):
        ExitConfig.resolve(None, {"criterion": "from a later version"})


def test_simulated_exits_of_a_row_do_not_depend_on_the_other_rows():
    torch.manual_seed(0)
    logits = torch.randn(40, 5, 3)
    for settings in (ExitConfig(threshold=0.7), ExitConfig(criterion="patience", patience=2)):
        whole = simulate_exits(logits, settings, [1, 2, 3, 4, 5], SINGLE_LABEL)
        alone = [simulate_exits(logits[row : row + 1], settings, [1, 2, 3, 4, 5], SINGLE_LABEL) for row in range(40)]
        assert whole.tolist() == torch.cat(alone).tolist()
        assert len(set(whole.tolist())) > 2
