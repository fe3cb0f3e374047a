"""Tiny models and batches that several test files share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_costeff import CostEffConfig, CostEffForSequenceClassification

TINY: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": [2, 0, 1, 3],
    "attention_head_size": 4,
    "intermediate_size": [10, 7, 0, 16],
    "max_position_embeddings": 24,
    "num_labels": 3,
}


def tiny_config(**changes: Any) -> CostEffConfig:
    """A four-layer model with uneven widths, one layer without heads and one without neurons; `changes` win."""
    return CostEffConfig(**{**TINY, **changes})


def tiny_model(seed: int = 0, model_class: type = CostEffForSequenceClassification, **changes: Any) -> Any:
    """A tiny model in eval mode, every weight random: rows differ, and its exits agree often but not always."""
    torch.manual_seed(seed)
    model = model_class(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm_weight = name.endswith("norm.weight")
            is_small = is_norm_weight or name.endswith("bias")
            spread = 0.2 if is_small else 0.25 if "layers." in name else 1.0
            parameter.copy_(is_norm_weight + spread * torch.randn_like(parameter))
        first, *others = getattr(model, "costeff", model).exits.values()
        for head in others:
            head.classifier.weight.mul_(0.4).add_(first.classifier.weight)
    return model.eval()


def balance_gates(model: Any) -> Any:
    """The same model, each gate's bias such that half of some rows skip its layer, attention heads not too sure."""
    batch = random_batch([2 + row % 10 for row in range(64)], seed=9)
    with torch.no_grad():
        for head in list(model.costeff.exits.values()) if model.config.exit_head == "attention" else []:
            head.classifier.weight.mul_(0.3)
        for layer, gate in enumerate(model.costeff.gates):
            gate.decision.bias -= torch.logit(model(**batch).skip_probabilities[layer], eps=1e-6).median()
    return model


def random_batch(
    lengths: list[int], seed: int = 0, pad_token_id: int = 0, width: int | None = None
) -> dict[str, Tensor]:
    """Right-padded rows of the given lengths; real tokens are never the padding token."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    shape = (len(lengths), width)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    tokens = torch.randint(3, TINY["vocab_size"], shape, generator=generator)
    types = torch.randint(0, 2, shape, generator=generator)
    return {
        "input_ids": torch.where(mask, tokens, pad_token_id),
        "attention_mask": mask.long(),
        "token_type_ids": types * mask,
    }


def select_rows(batch: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    """The same rows of every tensor."""
    return {name: tensor[rows] for name, tensor in batch.items()}


WORDS = "a an the film story is was very good bad not but and dull bright slow plot cast music ends well badly".split()  # noqa: SIM905


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of `WORDS`, in BERT's frame, for a vocabulary of `TINY["vocab_size"]`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*special, *WORDS])}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        **{"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=TINY["max_position_embeddings"],
    )


def tiny_bert(seed: int = 0, model_class: type = BertForSequenceClassification, **changes: Any) -> Any:
    """A stock model of `tiny_config`'s size, three heads and 16 neurons in each of four layers, in eval mode."""
    torch.manual_seed(seed)
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")}
    settings = {**sizes, "num_attention_heads": 3, "intermediate_size": 16, "num_labels": 3, **changes}
    model = model_class(BertConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def save_named(folder: Path, *names: str) -> str:
    """A stock classifier with these labels in this order, and its tokenizer, in a folder of their own."""
    path = folder / "-".join(names)
    tiny_bert(num_labels=len(names), id2label=dict(enumerate(names))).save_pretrained(path)
    word_tokenizer().save_pretrained(path)
    return str(path)


def token_rows(count: int, seed: int = 0, num_labels: int = 3, longest: int = 9) -> Dataset:
    """Rows of 2 to `longest` random tokens with class labels, not padded."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        tokens = torch.randint(4, TINY["vocab_size"], (length,), generator=generator).tolist()
        label = int(torch.randint(num_labels, (), generator=generator))
        rows.append({"input_ids": tokens, "attention_mask": [1] * length, "labels": label})
    return Dataset.from_list(rows)


def sentence_rows(count: int, seed: int = 0, longest: int = 9) -> Dataset:
    """Texts of random `WORDS`, no two alike, labelled by what they hold more of: good words (1) or others (0)."""
    generator = random.Random(seed)
    texts: dict[str, int] = {}
    while len(texts) < count:
        words = generator.choices(WORDS, k=generator.randint(4, longest))
        texts[" ".join(words)] = int(sum(word in ("good", "bright", "well", "music") for word in words) > 0)
    return Dataset.from_dict({"text": list(texts), "label": list(texts.values())})
