"""Slim encoder classifiers that leave early, as Hugging Face Transformers models.

Importing the package registers the model types `costeff` and `costeff_cascade` with `AutoConfig` and
`AutoModelForSequenceClassification`, the first with `AutoModel` too, and the pipeline `costeff-classification`.
Training and the recipe are imported on first use: they need Transformers' Trainer, which imports peft.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .block_pruning import BlockShape, prune_blocks
from .configuration_cascade import CostEffCascadeConfig
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
from .gating import add_skip_gates
from .modeling_cascade import CostEffCascade
from .modeling_costeff import CostEffForSequenceClassification, CostEffModel
from .packing import choose_layouts, pack, unpack
from .pipeline_costeff import PIPELINE_TASK, CostEffClassificationPipeline
from .slenderization import SlenderizationPlan, slenderize

if TYPE_CHECKING:
    from .block_compression import BlockPruningArguments, block_prune
    from .block_training import BlockPenalty, MaskedTraining
    from .cascade import load_cascade, make_cascade, save_cascade
    from .cascade_training import CascadeArguments, train_cascade
    from .compression import compress
    from .difficulty import difficulty_labels, mark_hard_rows
    from .evaluation import calibrate
    from .export import export_onnx
    from .layer_skipping import LayerSkippingArguments, train_layer_skipping
    from .monitoring import ExitMonitor
    from .prediction import predict_texts
    from .trainer import CostEffTrainer
    from .training_args import CostEffTrainingArguments

__version__ = "0.1.0.dev0"
__all__ = [
    "BlockPenalty",
    "BlockPruningArguments",
    "BlockShape",
    "CascadeArguments",
    "ConfidenceCriterion",
    "CostEffCascade",
    "CostEffCascadeConfig",
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
    "LayerSkippingArguments",
    "MarginCriterion",
    "MaskedTraining",
    "PatienceCriterion",
    "SlenderizationPlan",
    "add_skip_gates",
    "block_prune",
    "calibrate",
    "choose_layouts",
    "compress",
    "convert_from_stock",
    "convert_to_stock",
    "difficulty_labels",
    "export_onnx",
    "load_cascade",
    "make_cascade",
    "mark_hard_rows",
    "pack",
    "predict_texts",
    "prune_blocks",
    "save_cascade",
    "slenderize",
    "train_cascade",
    "train_layer_skipping",
    "unpack",
]

AutoConfig.register(CostEffConfig.model_type, CostEffConfig, exist_ok=True)
AutoModel.register(CostEffConfig, CostEffModel, exist_ok=True)
AutoModelForSequenceClassification.register(CostEffConfig, CostEffForSequenceClassification, exist_ok=True)
AutoConfig.register(CostEffCascadeConfig.model_type, CostEffCascadeConfig, exist_ok=True)
AutoModelForSequenceClassification.register(CostEffCascadeConfig, CostEffCascade, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    PIPELINE_TASK, pipeline_class=CostEffClassificationPipeline, pt_model=AutoModelForSequenceClassification
)

_ON_FIRST_USE = {
    "BlockPruningArguments": "block_compression",
    "block_prune": "block_compression",
    "BlockPenalty": "block_training",
    "MaskedTraining": "block_training",
    "calibrate": "evaluation",
    "compress": "compression",
    "difficulty_labels": "difficulty",
    "export_onnx": "export",
    "load_cascade": "cascade",
    "make_cascade": "cascade",
    "mark_hard_rows": "difficulty",
    "save_cascade": "cascade",
    "CascadeArguments": "cascade_training",
    "train_cascade": "cascade_training",
    "LayerSkippingArguments": "layer_skipping",
    "train_layer_skipping": "layer_skipping",
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
