"""Slim encoder classifiers that leave early, as Hugging Face Transformers models.

Importing the package registers the model type `costeff` with `AutoConfig`, `AutoModel` and
`AutoModelForSequenceClassification`, and the pipeline `costeff-classification`. Training and the recipe are imported on
first use: they need Transformers' Trainer, which imports peft.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .block_pruning import BlockShape, prune_blocks
from .configuration_costeff import CostEffConfig
from .conversion import convert_from_stock, convert_to_stock
from .exit_criteria import (
    ConfidenceCriterion,
    EntropyCriterion,
    EntropyInNatsCriterion,
    ExitConfig,
    MarginCriterion,
    PatienceCriterion,
)
from .modeling_costeff import CostEffForSequenceClassification, CostEffModel
from .packing import choose_layouts, pack, unpack
from .pipeline_costeff import PIPELINE_TASK, CostEffClassificationPipeline
from .slenderization import SlenderizationPlan, slenderize

if TYPE_CHECKING:
    from .block_training import BlockPenalty, MaskedTraining
    from .compression import compress
    from .evaluation import calibrate
    from .export import export_onnx
    from .monitoring import ExitMonitor
    from .prediction import predict_texts
    from .trainer import CostEffTrainer
    from .training_args import CostEffTrainingArguments

__version__ = "0.1.0.dev0"
__all__ = [
    "BlockPenalty",
    "BlockShape",
    "ConfidenceCriterion",
    "CostEffClassificationPipeline",
    "CostEffConfig",
    "CostEffForSequenceClassification",
    "CostEffModel",
    "CostEffTrainer",
    "CostEffTrainingArguments",
    "EntropyCriterion",
    "EntropyInNatsCriterion",
    "ExitConfig",
    "ExitMonitor",
    "MarginCriterion",
    "MaskedTraining",
    "PatienceCriterion",
    "SlenderizationPlan",
    "calibrate",
    "choose_layouts",
    "compress",
    "convert_from_stock",
    "convert_to_stock",
    "export_onnx",
    "pack",
    "predict_texts",
    "prune_blocks",
    "slenderize",
    "unpack",
]

AutoConfig.register(CostEffConfig.model_type, CostEffConfig, exist_ok=True)
AutoModel.register(CostEffConfig, CostEffModel, exist_ok=True)
AutoModelForSequenceClassification.register(CostEffConfig, CostEffForSequenceClassification, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    PIPELINE_TASK, pipeline_class=CostEffClassificationPipeline, pt_model=AutoModelForSequenceClassification
)

_ON_FIRST_USE = {
    "BlockPenalty": "block_training",
    "MaskedTraining": "block_training",
    "calibrate": "evaluation",
    "compress": "compression",
    "export_onnx": "export",
    "ExitMonitor": "monitoring",
    "predict_texts": "prediction",
    "CostEffTrainer": "trainer",
    "CostEffTrainingArguments": "training_args",
}


def __getattr__(name: str) -> Any:
    """The public names that need Trainer, imported when they are first asked for."""
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{_ON_FIRST_USE[name]}", __name__), name)
    return globals()[name]
