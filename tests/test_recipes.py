"""The schedule of the paper's pipeline, number by number, and what holds for every recipe."""

from __future__ import annotations

import pytest

from hf_costeff.recipes import RECIPES, Phase, fast_recipe, paper_recipe

SMALL, MEDIUM, LARGE = 3_668, 67_349, 392_702  # MRPC, SST-2, MNLI


@pytest.mark.parametrize(
    ("phase", "rows", "expected"),
    [
        (Phase(2, 1e-4), 320, 20),
        (Phase(2, 1e-4), 321, 22),  # an incomplete batch is a step too
        (Phase(0.5, 1e-4), 320, 5),
        (Phase(1, 1e-4, min_steps=60), 320, 60),
        (Phase(9, 1e-4, max_steps=50), 320, 50),
        (Phase(1, 1e-4, min_steps=60, max_steps=50), 320, 50),
        (Phase(0.001, 1e-4), 320, 1),
        (Phase(0, 1e-4, min_steps=60), 320, 0),
    ],
)
def test_a_phase_takes_its_epochs_in_steps_within_its_limits(phase, rows, expected):
    assert phase.steps(rows, batch_size=32) == expected


# Heads kept: epochs of stage 3 in all, of stage 4 and of stage 5, for MRPC, SST-2 and MNLI (the pipeline's tables).
STAGES = {
    2: ((20, 20, 10), (5, 10, 6), (3, 5, 3)),
    4: ((16, 16, 7), (4, 9, 4), (3, 4, 2)),
    6: ((12, 12, 5), (3, 8, 3), (2, 3, 2)),
    8: ((8, 8, 3), (2, 6, 2), (1, 2, 1)),
}


@pytest.mark.parametrize("heads", STAGES)
@pytest.mark.parametrize(("rows", "column"), [(SMALL, 0), (MEDIUM, 1), (LARGE, 2)])
def test_the_paper_recipe_has_the_epochs_of_the_pipeline(heads, rows, column):
    recipe = paper_recipe(rows, heads)
    slenderization, representation, prediction = STAGES[heads][column]
    assert recipe.interval.epochs * (12 - heads) == pytest.approx(slenderization, rel=0.02)
    assert (recipe.representation.epochs, recipe.prediction.epochs) == (representation, prediction)
    tuning = (12, 5, 3)[column]
    assert (recipe.teacher.epochs, recipe.assistant_prediction.epochs) == (tuning, tuning)
    assert recipe.assistant_representation.epochs == (4, 1, 1)[column]
    assert recipe.interval.representation_only_ratio == (0.5, 0.7, 0.7)[column]


def test_the_paper_recipe_has_the_learning_rates_of_batch_size_32():
    recipe = paper_recipe(MEDIUM, 2)
    assert recipe.batch_size == 32 and recipe.events is None and recipe.importance_rows is None
    rates = [recipe.teacher, recipe.assistant_representation, recipe.assistant_prediction, recipe.representation]
    assert [phase.learning_rate for phase in rates] == [2e-5, 2e-5, 2e-5, 3e-5]
    assert recipe.prediction.learning_rate == 2e-5
    assert recipe.exit_pooling == "cls"


def test_heads_outside_the_pipelines_table_take_its_nearest_column():
    assert paper_recipe(SMALL, 1) == paper_recipe(SMALL, 2)
    assert paper_recipe(SMALL, 12) == paper_recipe(SMALL, 8)
    assert paper_recipe(SMALL, 0) == paper_recipe(SMALL, 2)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("rows", [1, 1000, MEDIUM, LARGE])
@pytest.mark.parametrize("heads", [0, 1, 3, 12])
def test_every_recipe_trains_the_stages_that_make_the_result(name, rows, heads):
    recipe = RECIPES[name](rows, heads, 2)
    assert recipe.name == name
    for phase in (recipe.teacher, recipe.assistant_prediction, recipe.interval, recipe.prediction):
        assert phase.steps(rows, recipe.batch_size) >= 1 and phase.learning_rate > 0
        assert 0 <= phase.representation_only_ratio <= 1


def test_the_fast_recipe_depends_on_the_number_of_classes_alone():
    assert fast_recipe(100, 1, 3) == fast_recipe(LARGE, 8, 2)
    many = fast_recipe(15_000, 2, 150)
    steps = {
        phase: getattr(many, phase).steps(15_000, 32) for phase in ("teacher", "assistant_prediction", "prediction")
    }
    assert steps == {"teacher": 3000, "assistant_prediction": 2000, "prediction": 3000}
