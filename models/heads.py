"""What the three steps ask of a network: log-probabilities of given tokens, and one score per position.

Both are modules that a DeepSpeed engine can hold, and everything happens inside ``forward``: under ZeRO-3 weights are
whole only there.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from models.adapters.new_rows import active_rows, with_new_logits
from models.last_layer import last_layer_at
from models.packed_rows import packed_rows
from models.zero3 import gathered

if TYPE_CHECKING:  # transformers' networks take seconds to import
    from transformers import Cache

    from models.shared_prompts import SharedRows

# Logits held at a time: 2^25 float32 values are 128 MiB. Smaller chunks save memory that nobody misses and add up more partial
# gradients of the output matrix in the model's dtype.
CHUNK_LOGITS = 2**25
CPU_BLOCK = 2**17  # logits that logsumexp looks at together on a CPU: its copy of them stays in the cache (2.2 times as fast)
SCALAR_HEADS = ("score", "classifier_head")  # the second is ChatGLM2's


class TokenLogProbs(nn.Module):
    """log p(token | tokens before it), for a causal language model (PreTrainedModel, or PeftModel around one)."""

    def __init__(self, causal_lm: nn.Module, chunk_logits: int = CHUNK_LOGITS) -> None:
        super().__init__()
        self.model = causal_lm
        self.project = _TokenProjection(chunk_logits)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        keep: int | None = None,
        target_mask: Tensor | None = None,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        shared: SharedRows | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input_ids, attention_mask: [batch, time], padded on either side. Returns float32 [batch, n], the
        log-probabilities of input_ids[:, -n:] with n = keep, or time - 1.

        target_mask [batch, time] bool: only these tokens are targets; other places of the result are 0 and cost no
        logits (column 0 has no past and is never a target). labels [batch, time]: targets in the place of input_ids.
        temperature divides the logits. with_entropy: also the entropies (nats) of the distributions the tokens were
        drawn from, same shape. shared: the same rows with the prompts of pairs computed once.
        """
        n = input_ids.shape[1] - 1 if keep is None else keep
        if not 0 < n < input_ids.shape[1]:
            raise ValueError(f"keep={keep} of {input_ids.shape[1]} tokens: the first token has no past")
        # the state before a token predicts it
        wanted = None if target_mask is None else target_mask[:, -n:].bool()
        read = None if wanted is None else F.pad(wanted, (input_ids.shape[1] - 1 - n, 1))
        hidden = last_hidden_state(self.model, input_ids, attention_mask, shared, read)[:, -n - 1 : -1]
        targets = (input_ids if labels is None else labels)[:, -n:]
        self.project.use(base_model(self.model).get_output_embeddings())
        if wanted is None:
            results = self.project(hidden.flatten(0, 1), targets.flatten(), temperature, with_entropy)
            results = [values.view(targets.shape) for values in results]
        else:
            results = self.project(hidden[wanted], targets[wanted], temperature, with_entropy)
            nowhere = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
            results = [nowhere.masked_scatter(wanted, values) for values in results]
        return tuple(results) if with_entropy else results[0]


class _BorrowedWeight(nn.Module):
    """A module that computes with the parameters of another one, without owning them (no second name in the state
    dict).

    Under ZeRO-3 it must say so, or the weights arrive empty; calling the owner once per chunk instead would gather the
    weights once per chunk and hang when processes have different numbers of chunks.
    """

    def use(self, layer: nn.Module) -> None:
        """Borrow ``weight`` and ``bias`` of a linear layer for the next forward."""
        object.__setattr__(self, "layer", layer)  # not as a submodule
        for parameter in layer.parameters(recurse=False):
            if hasattr(parameter, "ds_id"):
                import deepspeed

                deepspeed.zero.register_external_parameter(self, parameter)


class _TokenProjection(_BorrowedWeight):
    """Hidden states -> log-probabilities of their targets; at most chunk_logits logits exist at a time, forward and
    backward.
    """

    def __init__(self, chunk_logits: int) -> None:
        super().__init__()
        self.chunk_logits = chunk_logits

    def forward(self, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, ...]:
        """hidden [n, width], targets [n] -> float32 log-probabilities [n], and entropies [n] if asked."""
        weight, bias, new_rows = self.layer.weight, getattr(self.layer, "bias", None), active_rows(self.layer)
        rows = max(1, self.chunk_logits // weight.shape[0])
        if hidden.shape[0] <= rows:  # one chunk: keeping its logits costs what computing them again would
            return chunk_log_probs(hidden, targets, weight, bias, temperature, with_entropy, new_rows)
        compute = partial(checkpoint, chunk_log_probs, use_reentrant=False, preserve_rng_state=False)
        chunks = [
            compute(states, tokens, weight, bias, temperature, with_entropy, new_rows)
            for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


def chunk_log_probs(
    hidden: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    new_rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return log softmax(W h / temperature)[target], and if asked the entropy of that softmax, in float32 whatever the dtype
    of W.

    hidden [n, width], targets [n], weight [vocab, width] -> ([n],) or ([n], [n]). new_rows [new, width] stand for the
    last rows of W (models/adapters/new_rows.py).
    log p_i = x_i - L,  H = L - sum_j p_j x_j,  with x the divided logits and L = logsumexp(x).
    """
    logits = with_new_logits(F.linear(hidden, weight, bias), hidden, new_rows, bias).float()
    if temperature != 1.0:  # a pass over all logits
        logits = logits / temperature
    if not with_entropy:
        return (_TargetLogProbs.apply(logits, targets),)
    normaliser = logits.logsumexp(dim=-1)
    log_probs = logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser
    return log_probs, normaliser - (logits.softmax(dim=-1) * logits).sum(dim=-1)


class _TargetLogProbs(torch.autograd.Function):
    """log softmax(x)[target], with the gradient (onehot - softmax(x)) written over the logits x: autograd's own writes four
    such matrices. A second backward pass through the same graph is refused by torch, because the logits are gone.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """logits [n, vocab] float32, targets [n] -> [n]."""
        rows = CPU_BLOCK // logits.shape[-1] if logits.device.type == "cpu" else len(logits)
        normaliser = torch.cat([block.logsumexp(dim=-1) for block in logits.split(max(1, rows))])
        ctx.save_for_backward(logits, normaliser, targets)
        return logits.gather(-1, targets[:, None]).squeeze(-1) - normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """grad [n] -> [n, vocab]."""
        logits, normaliser, targets = ctx.saved_tensors
        gradient = logits.sub_(normaliser[:, None]).exp_().mul_(-grad[:, None])
        return gradient.scatter_add_(-1, targets[:, None], grad[:, None]), None


class TokenScores(nn.Module):
    """A score at every position: reward model and critic, for a sequence-classification model with one label."""

    def __init__(self, scalar_model: nn.Module) -> None:
        super().__init__()
        self.model = scalar_model
        self.project = _ScoreProjection()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        shared: SharedRows | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """input_ids, attention_mask: [batch, time], padded on either side -> float32 scores [batch, time].

        The score at a position has seen the tokens up to and including it. shared: as for TokenLogProbs. read [batch, time]
        bool: only these scores are asked for; the others may be anything.
        """
        hidden = last_hidden_state(self.model, input_ids, attention_mask, shared, read)
        self.project.use(score_layer(self.model))
        return self.project(hidden)


class _ScoreProjection(_BorrowedWeight):
    """The scalar head in float32: 16-bit values near 5 lie 1/32 apart (bf16)."""

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, time, width] -> [batch, time]."""
        bias = getattr(self.layer, "bias", None)
        return F.linear(hidden.float(), self.layer.weight.float(), None if bias is None else bias.float()).squeeze(-1)


def at_last_token(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Take the values of each row at its last real token, padded left or right: [batch, time, ...] -> [batch, ...]."""
    positions = torch.arange(values.shape[1], device=values.device)
    last = positions.masked_fill(~attention_mask.bool(), -1).amax(dim=1).clamp(min=0)
    return values[torch.arange(len(values), device=values.device), last]


def last_hidden_state(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    shared: SharedRows | None = None,
    read: Tensor | None = None,
) -> Tensor:
    """[batch, time] -> [batch, time, width], what the head of the model would see.

    Padding on either side changes nothing. A prefix that peft holds stands in front of the tokens as their past, as in
    PeftModel.forward; ChatGLM puts its own there itself. No key-value cache is kept. read [batch, time] bool: only these states
    are asked for; the others may be anything.
    """
    decoder = base_model(model).base_model
    if shared is not None:
        bias = shared.attention_bias(decoder.dtype)
        ids, positions = shared.input_ids, shared.position_ids
        output = decoder(input_ids=ids, attention_mask=bias, position_ids=positions, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)[shared.places]
    inputs, packed = {"input_ids": input_ids}, None
    two_dimensional = hasattr(decoder, "position_ids_for")  # ChatGLM-6B, whose context sees its padding
    if not (two_dimensional or prefix_length(model)) and bool(attention_mask[:, 0].all()):
        # All padding is behind the tokens, where causal attention does not look: without a mask the kernels skip that half.
        packed = packed_rows(decoder, attention_mask)
        if packed is not None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            inputs = {"input_ids": packed.pack(input_ids), "position_ids": packed.pack(positions)}
            inputs |= {"attention_mask": packed.no_mask, "packed": packed}
            read = None if read is None else packed.pack(read)
    else:
        inputs["attention_mask"] = mask_with_prefix(model, attention_mask.long())
        if prefix_length(model):
            inputs["past_key_values"] = prefix_cache(model, len(input_ids))
        positions = position_ids_for(model, input_ids, attention_mask)
        if positions is not None:
            inputs["position_ids"] = positions
    with last_layer_at(decoder, read):
        hidden = decoder(**inputs, use_cache=False).last_hidden_state
    return hidden if packed is None else packed.unpack(hidden)


@cache
def forward_arguments(network: type[nn.Module]) -> frozenset[str]:
    """Return the names of the arguments of a class of networks. Kept: a look costs 0.2 ms, as much as ten small products."""
    return frozenset(inspect.signature(network.forward).parameters)


def position_ids_for(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, room: int = 0) -> Tensor | None:
    """Return the position ids of the tokens and of ``room`` more that will be generated behind them; slice the last dimension.

    input_ids, attention_mask: [batch, time]. Returns [batch, time + room]: real tokens count from 0, or from the length
    of the prefix that peft holds. A decoder with positions of its own kind is asked for them (ChatGLM-6B: [batch, 2,
    time + room]). None for families without such an argument (BLOOM), which derive the same from the mask.
    """
    network = base_model(model)
    decoder = getattr(network, "base_model", network)
    if hasattr(decoder, "position_ids_for"):
        return decoder.position_ids_for(input_ids, attention_mask, room)
    if "position_ids" not in forward_arguments(type(decoder)):
        return None
    mask = F.pad(attention_mask.long(), (0, room), value=1)
    return (prefix_length(model) + mask.cumsum(dim=1) - 1).clamp(min=0)


def prefix_length(model: nn.Module) -> int:
    """Return the number of places of the prefix that peft holds outside the network; 0 without one, and for ChatGLM's own."""
    config = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def prefix_cache(model: nn.Module, batch: int) -> Cache | None:
    """Return the keys and values of the prefix that peft holds, for a batch of this size; None without one."""
    return model.get_prompt(batch) if prefix_length(model) else None


def mask_with_prefix(model: nn.Module, attention_mask: Tensor) -> Tensor:
    """[batch, time] -> [batch, prefix + time]: the prefix that peft holds is visible to every row."""
    return F.pad(attention_mask, (prefix_length(model), 0), value=1)


def is_peft(model: nn.Module) -> bool:
    """Return True for a PeftModel. Told by a method of its own, because importing peft takes seconds."""
    return hasattr(model, "get_base_model")


def base_model(model: nn.Module) -> nn.Module:
    """Return the PreTrainedModel itself, without the PeftModel around it (LoRA layers sit inside it, a prefix does not)."""
    return model.get_base_model() if is_peft(model) else model


def score_name(model: nn.Module) -> str | None:
    """Return the name of the scalar head in a network of ours or transformers'; None if it has none."""
    return next((name for name in SCALAR_HEADS if hasattr(base_model(model), name)), None)


def score_layer(model: nn.Module) -> nn.Module:
    """Return the scalar head. peft trains a copy of it, which counts unless the adapter is disabled."""
    head = getattr(base_model(model), score_name(model) or "score")
    if not hasattr(head, "modules_to_save"):
        return head
    return head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]


def start_head(layer: nn.Module, seed: int) -> None:
    """Fill a new scalar head: N(0, 1/sqrt(width + 1)), Stiennon et al. 2020 (arXiv 2009.01325), with a bias of 0 if it has
    one, the same on every process and under every ZeRO stage.
    """
    width = getattr(layer.weight, "ds_shape", layer.weight.shape)[-1]
    fresh = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / (width + 1) ** 0.5
    with gathered(list(layer.parameters())):
        if layer.weight.numel() == width:  # under ZeRO-3 whole only inside
            layer.weight.data.copy_(fresh)
            if layer.bias is not None:
                layer.bias.data.zero_()
