"""Upstream's text classification pipeline, with early exit: `pipeline("costeff-classification", model=...)`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TextClassificationPipeline
from transformers.pipelines.text_classification import ClassificationFunction

from .modeling_costeff import MODEL_INPUTS, CostEffPrediction

PIPELINE_TASK = "costeff-classification"


class CostEffClassificationPipeline(TextClassificationPipeline):
    """Text classification through `predict`: every answer also says after which layer it left, as `exit_layer`.

    Of a cascade it says by which member too, as `exit_model`, if the members share a tokenizer.

    Takes what `pipeline("text-classification")` takes, pairs, `top_k` and `function_to_apply` included, and
    `early_exit` and `skip_layers`, when it is made or called; what they mean is said at `predict`. Of a model whose
    rows skip layers it also says how many were run, as `layers_run`. Scores are `predict`'s probabilities,
    after the exit's temperature; a `function_to_apply` is applied to the raw logits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "predict"):
            raise ValueError(
                f"{type(self.model).__name__} has no exits to leave at. Take a model of this package, or "
                "pipeline('text-classification')."
            )

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> dict[str, Tensor]:
        """As upstream's; a tuple of two texts is a pair, which upstream would take for two texts and answer one of."""
        if isinstance(inputs, tuple):
            if len(inputs) != 2:
                raise ValueError(f"A row is a tuple of {len(inputs)}: {inputs!r}. A pair of texts has two.")
            inputs = dict(zip(("text", "text_pair"), inputs, strict=True))
        return super().preprocess(inputs, **tokenizer_kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        top_k = parameters.get("top_k")
        if isinstance(top_k, int) and top_k < 1:
            raise ValueError(f"`top_k` is {top_k}. It must be at least 1, or None for all labels.")
        exits = {name: parameters.pop(name) for name in ("early_exit", "skip_layers") if name in parameters}
        preprocess, forward, postprocess = super()._sanitize_parameters(**parameters)
        return preprocess, {**forward, **exits}, postprocess

    def _forward(self, model_inputs: dict[str, Tensor], **exits: Any) -> CostEffPrediction:
        return self.model.predict(
            **{name: model_inputs[name] for name in MODEL_INPUTS if name in model_inputs}, **exits
        )

    def postprocess(
        self,
        model_outputs: dict[str, Tensor],
        function_to_apply: ClassificationFunction | None = None,
        **settings: Any,
    ) -> Any:
        """A dict of label, score and place of exit, or with `top_k` a list of them, best first."""
        if function_to_apply is None:
            model_outputs = {**model_outputs, "logits": model_outputs["probabilities"]}
            function_to_apply = ClassificationFunction.NONE
        answers = super().postprocess(model_outputs, function_to_apply=function_to_apply, **settings)
        left: dict[str, int] = {
            name: int(model_outputs[name][0]) for name in ("exit_model", "exit_layer") if name in model_outputs
        }
        if "skipped_layers" in model_outputs:
            left["layers_run"] = left["exit_layer"] - int(model_outputs["skipped_layers"][0].sum())
        return {**answers, **left} if isinstance(answers, dict) else [{**row, **left} for row in answers]
