"""What one layer is made of, and the embeddings before it: narrow post-LN blocks with flat arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain softmax attention, returning its weights.

    Args:
        module: The attention module, asked whether it trains.
        query: Shape (batch, heads, seq, head_size); key and value alike.
        key: See query.
        value: See query.
        attention_mask: Additive, broadcastable to (batch, heads, seq, seq); `None` where nothing is padded.
        scaling: Factor on the scores.
        dropout: Probability on the weights while training.
        **kwargs: Ignored; other attention functions take more.

    Returns:
        Context of shape (batch, seq, heads, head_size), and weights of shape (batch, heads, seq, seq).
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer of any width, 0 included, without torch's warning that an empty matrix needs no values."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return nn.Linear(in_features, out_features)


class CostEffEmbeddings(nn.Module):
    """Word (factorised or not), position and token-type embeddings, summed and normalised."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        embedding_rank: int | None,
        max_position_embeddings: int,
        position_offset: int,
        type_vocab_size: int,
        pad_token_id: int | None,
        layer_norm_eps: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, embedding_rank or hidden_size, padding_idx=pad_token_id)
        self.projection = None if embedding_rank is None else nn.Linear(embedding_rank, hidden_size, bias=False)
        self.position_embeddings = nn.Embedding(max_position_embeddings, hidden_size)
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size) if type_vocab_size else None
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.position_offset = position_offset
        self.pad_token_id = pad_token_id or 0

    def position_ids(self, input_ids: Tensor | None, seq_length: int, device: torch.device) -> Tensor:
        """Positions, shape (batch or 1, seq): 0, 1, 2, ..., or RoBERTa's count of the non-padding tokens."""
        longest = self.position_embeddings.num_embeddings - self.position_offset
        if seq_length > longest:
            raise ValueError(
                f"The input has {seq_length} tokens and the position table ends at {longest}. "
                f"Truncate: tokenizer(..., truncation=True, max_length={longest})."
            )
        if not self.position_offset or input_ids is None:
            return torch.arange(self.position_offset, self.position_offset + seq_length, device=device)[None]
        real = input_ids.ne(self.pad_token_id).long()
        return (real.cumsum(1) + self.position_offset - 1) * real + self.pad_token_id * (1 - real)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        """Embedding output h_0, shape (batch, seq, hidden).

        `input_ids` has shape (batch, seq); `inputs_embeds` is what `word_embeddings` would return, shape (batch, seq,
        rank or hidden).
        """
        embedded = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        width = self.word_embeddings.embedding_dim
        if embedded.shape[-1] != width:
            factorised = " (factorised)" if self.projection is not None else ""
            raise ValueError(
                f"`inputs_embeds` has width {embedded.shape[-1]}, and this model's word embedding has width {width}"
                f"{factorised}. Pass model.get_input_embeddings()(input_ids)."
            )
        if position_ids is None:
            position_ids = self.position_ids(input_ids, embedded.shape[1], embedded.device)
        if self.projection is not None:
            embedded = self.projection(embedded)
        places = self.position_embeddings(position_ids)
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = position_ids.new_zeros(1, 1)
            places = places + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.norm(embedded + places))


class CostEffAttention(nn.Module):
    """Multi-head self-attention with any number of heads; without heads only the output bias is left."""

    is_causal = False

    def __init__(self, hidden_size: int, num_heads: int, head_size: int, attention_dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_size = head_size
        self.attention_dropout = attention_dropout
        self.query_key_value = linear(hidden_size, 3 * num_heads * head_size)
        self.output = linear(num_heads * head_size, hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, attend: Callable[..., Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed values, shape (batch, seq, hidden), and from eager attention its weights (batch, heads, seq, seq)."""
        if self.num_heads == 0:  # through the empty maps, so that every parameter gets a gradient (DDP insists)
            return self.output(self.query_key_value(hidden_states)), None
        batch, seq, _ = hidden_states.shape
        fused = self.query_key_value(hidden_states).view(batch, seq, 3, self.num_heads, self.head_size)
        query, key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, scaling=self.head_size**-0.5, dropout=dropout
        )
        return self.output(context.reshape(batch, seq, -1)), weights


class CostEffFeedForward(nn.Module):
    """Two linear maps around an activation; without neurons only the output bias is left."""

    def __init__(self, hidden_size: int, num_neurons: int, activation: str) -> None:
        super().__init__()
        self.intermediate = linear(hidden_size, num_neurons)
        self.activation = ACT2FN[activation]
        self.output = linear(num_neurons, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shape (batch, seq, hidden) to the same."""
        return self.output(self.activation(self.intermediate(hidden_states)))


class CostEffLayer(GradientCheckpointingLayer):
    """One post-LN encoder layer."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_size: int,
        num_neurons: int,
        activation: str,
        layer_norm_eps: float,
        hidden_dropout: float,
        attention_dropout: float,
    ) -> None:
        super().__init__()
        self.attention = CostEffAttention(hidden_size, num_heads, head_size, attention_dropout)
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.feed_forward = CostEffFeedForward(hidden_size, num_neurons, activation)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(hidden_dropout)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, attend: Callable[..., Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states of shape (batch, seq, hidden) to the same, and the attention weights if there are any."""
        attended, weights = self.attention(hidden_states, attention_mask, attend)
        hidden_states = self.attention_norm(hidden_states + self.dropout(attended))
        transformed = self.feed_forward(hidden_states)
        return self.feed_forward_norm(hidden_states + self.dropout(transformed)), weights
