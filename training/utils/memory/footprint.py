"""Count what a network holds in memory while it computes, on the meta device: no weight is read, nothing is computed.

The network is built as a run builds it, but with one and with two blocks; its own forward and backward run over tensors
without content, and every tensor that comes and goes is counted. The difference of the two is what a further block adds.
Workspaces that a kernel takes while it runs are not counted.
"""

import copy
import math
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from models.adapters.lora import add_lora, check_module_name, is_named, linear_layers
from models.adapters.prefix import PrefixPlan, add_prefix, check_prefix
from models.adapters.quantization import quantize_linears
from models.chatglm.quantized_linear import QuantizedLinear
from models.checkpoint_folder import told_by_transformers
from models.heads import CHUNK_LOGITS, TokenLogProbs, TokenScores, base_model
from models.load import set_dropout
from training.utils.memory.arithmetic import SMALL, Peak, Weights


class Ledger(TorchDispatchMode):
    """Count the bytes of every tensor that is made inside. Code that asks for a tensor's value gets True."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """known: tensors that do not count."""
        super().__init__()
        self.known: set[int] = set()
        self.live: dict[int, int] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self.known.add(storage._cdata)
            weakref.finalize(storage, self.known.discard, storage._cdata)  # another may stand at its address then
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True
        result = function(*args, **(kwargs or {}))
        # Autograd adds up gradients in place, but not under a dispatch mode; the sum that it makes then is freed at once.
        sums = function is torch.ops.aten.add.Tensor and not torch.is_grad_enabled()
        in_place = sums and torch._C._current_graph_task_id() != -1
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.add(tensor, lasting=not in_place)
        return result

    def add(self, tensor: Tensor, lasting: bool = True) -> None:
        """Count a tensor's storage once, until it is freed. lasting=False: the peak counts from the next tensor on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or key in self.known:
            return
        self.live[key] = storage.nbytes()
        self.now += self.live[key]
        if lasting:
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, key)

    def remove(self, key: int) -> None:
        """Stop counting a storage that is freed, or that counts elsewhere."""
        self.now -= self.live.pop(key, 0)

    def take_peak(self) -> int:
        """Return the peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


class _Attention(torch.autograd.Function):
    """Keep what the fused kernels keep (no scores); on the meta device torch would choose the plain kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        context = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, context, sums, *(() if mask is None else (mask,)))
        return context

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Stand in for scaled_dot_product_attention: keep only what the fused kernel would."""
    return _Attention.apply(query, key, value, attn_mask)


@contextmanager
def replaced(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Put another object in the place of a module's, or in an empty one."""
    known = getattr(module, name, None)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, known)


@contextmanager
def on_meta(ledger: Ledger, fused: bool = True) -> Iterator[None]:
    """Count tensors without content. autocast counts as off: transformers asks for meta, where torch 2.4 raises. Its
    checkpointing looks for a module torch.meta. OPT of transformers 5.0 draws whether it leaves a layer out: never.
    """
    kernel = replaced(F, "scaled_dot_product_attention", attention) if fused else nullcontext()
    autocast, module = replaced(torch, "is_autocast_enabled", lambda *_: False), replaced(torch, "meta", torch.cpu)
    draws = replaced(torch, "rand", lambda *_, **__: 1.0)
    with ledger, kernel, torch.device("meta"), autocast, module, draws:
        yield


class Moments(NamedTuple):
    """Bytes when the head begins (held), and peaks: until the head's gradient is there (head), while the blocks' backward
    runs (inside), and from the embedding's gradient on (behind).
    """

    held: float
    head: float
    inside: float
    behind: float


@dataclass(eq=False)
class Footprint:
    """One model of a run: its weights and what its passes hold. scalar: a score head in place of the language model's.

    lora_dim, lora_module_name, pre_seq_len, prefix_projection, quantization_bit as in the flags of the steps.
    """

    config: PretrainedConfig
    _: KW_ONLY
    dtype: torch.dtype
    scalar: bool = False
    attn: str = "sdpa"
    lora_dim: int = 0
    lora_module_name: str = "auto"
    pre_seq_len: int = 0
    prefix_projection: bool = False
    quantization_bit: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        self.attn = "eager" if self.attn == "eager" else "sdpa"
        self.blocks: int = self.config.num_hidden_layers
        self.vocabulary: int = self.config.vocab_size  # rows of the output matrix
        self.adapted, self.first_adapted = self.blocks, 0  # number of blocks with adapters, the first of them: _few_names
        self._models: dict[int, nn.Module] = {}
        self._measured: dict[tuple, Moments] = {}

    def model(self, blocks: int) -> nn.Module:
        """Return the network on the meta device with this number of blocks, under the head of the steps."""
        if blocks in self._models:
            return self._models[blocks]
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:blocks]
        set_dropout(config, 0.0)
        prefix = PrefixPlan(self.pre_seq_len, self.prefix_projection, "", None, 0) if self.pre_seq_len else None
        if prefix is not None:
            check_prefix(prefix, config, self.gradient_checkpointing)
        if prefix is not None and hasattr(config, "pre_seq_len"):
            config.pre_seq_len, config.prefix_projection = self.pre_seq_len, self.prefix_projection
        if self.scalar:
            config.num_labels = 1
        auto = AutoModelForSequenceClassification if self.scalar else AutoModelForCausalLM
        attn = self.attn if auto._model_mapping[type(config)]._supports_sdpa else "eager"
        # A ledger here too: code that asks for the value of a weight gets one.
        with torch.device("meta"), Ledger(), torch.random.fork_rng(devices=[]):
            with told_by_transformers(Path(f"config.json of {config.model_type}")):
                model = auto.from_config(config, dtype=self.dtype, attn_implementation=attn)
            model.tie_weights()  # transformers 5.0 leaves that out here
            if self.quantization_bit:
                quantize_linears(model, self.quantization_bit)
            model.get_input_embeddings().padding_idx = None
            if self.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if prefix is not None:
                model = add_prefix(model, prefix, fresh=False)
            if self.lora_dim:
                model = add_lora(model, dim=self.lora_dim, alpha=1.0, module_name=self._few_names(model, blocks))
        for parameter in model.parameters():  # as build_engine does
            parameter.data = parameter.data.to(self.dtype)
        self._models[blocks] = (TokenScores if self.scalar else TokenLogProbs)(model)
        return self._models[blocks]

    def _few_names(self, model: nn.Module, blocks: int) -> str:
        """Return --lora_module_name for a network of fewer blocks, and note which blocks of the whole one it names.

        A name with the number of a block ("layers.18.") may fit none of these few: here every block gets what any block gets.
        UserError for a name that no layer of the whole network has.
        """
        module_name = self.lora_module_name
        if module_name == "auto":
            return module_name
        layers, names, numbers = linear_layers(model), [], set()
        whole = [layer.replace(".0.", f".{block}.", 1) for layer in layers for block in range(self.blocks)]
        check_module_name(whole, module_name, self.config.model_type)
        for layer in layers:
            head, in_first_block, tail = layer.partition(".0.")
            if not in_first_block:  # of another block, or of none
                names += [layer] if is_named(layer, module_name) and not re.search(r"\.\d+\.", layer) else []
            elif named := [block for block in range(self.blocks) if is_named(f"{head}.{block}.{tail}", module_name)]:
                names += [f"{head}.{block}.{tail}" for block in range(blocks)]
                numbers |= set(named)
        if numbers:
            self.adapted, self.first_adapted = len(numbers), min(numbers)
        return ",".join(names)

    @cached_property
    def weights(self) -> Weights:
        """Return the counts of the whole network: those of one block, and as often as needed what a second one adds."""
        one, two = (counted(self.model(blocks)) for blocks in (1, 2))
        counts = {"largest": two.largest}
        for name in ("trained", "frozen", "small_trained", "small_frozen", "integers"):
            more = (self.adapted if name in ("trained", "small_trained") else self.blocks) - 1
            counts[name] = getattr(one, name) + (getattr(two, name) - getattr(one, name)) * more
        return Weights(**counts)

    def training(self, batch: int, length: int, keep: int | None = None) -> Peak:
        """Return the peak of forward and backward of a micro-batch [batch, length].

        keep: log-probabilities of this number of last tokens; None: of all.
        """
        two = self._moments(2, batch, length, keep)
        more = self.blocks - self.first_adapted - 2  # what lies below the first adapter needs no backward pass
        further = (two.held - self._moments(1, batch, length, keep, backward=False, graph=True).held) * more
        held, head, inside = (int(size + further) for size in (two.held, two.head, two.inside))
        most = max(head, inside, int(two.behind))
        logits = max(0, head - held) if head == most and not self.scalar else 0
        return Peak(most - logits, logits)

    def forward(self, batch: int, length: int, keep: int | None = None) -> Peak:
        """Return the peak of a forward pass alone."""
        pass_ = self._moments(2, batch, length, keep, backward=False, graph=False)
        logits = 0 if self.scalar else int(pass_.head - pass_.held)
        return Peak(int(pass_.head) - logits, logits)

    def _moments(
        self, blocks: int, batch: int, length: int, keep: int | None, backward: bool = True, graph: bool = True
    ) -> Moments:
        """Return what _passes measures. Above a few chunks of logits it grows with the rows: two batches are measured.

        Without logits it does once there are as many tokens as the network is wide (an OPT-1.3B was 11 % off from half of that).
        """
        width = 2 * self.config.hidden_size / length
        small = math.ceil(width if self.scalar else 2 * CHUNK_LOGITS / ((keep or length) * self.vocabulary))
        measured = []
        for rows in [batch] if batch <= small * (1 if self.scalar else 2) else [small, 2 * small]:
            key = (blocks, rows, length, keep, backward, graph)
            if key not in self._measured:
                self._measured[key] = self._passes(*key)
            measured.append(self._measured[key])
        if len(measured) == 1:
            return measured[0]
        steps = (batch - small) / small
        return Moments(*(first + (second - first) * steps for first, second in zip(*measured, strict=True)))

    def _passes(self, blocks: int, batch: int, length: int, keep: int | None, backward: bool, graph: bool) -> Moments:
        """Measure a forward pass, and a backward pass behind it. graph: keep what a backward pass needs."""
        model = self.model(blocks).train(graph)
        ledger = Ledger([*model.parameters(), *model.buffers()])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes = dict.fromkeys(Moments._fields, 0)
        hooks = []

        def at_head(_: nn.Module, inputs: tuple) -> None:
            sizes["held"] = ledger.now
            peak_at(inputs[0], "head")

        def peak_at(tensor: Tensor, moment: str) -> None:
            """Note the peak when the tensor's gradient is there."""
            if tensor.requires_grad:
                hooks.append(tensor.register_hook(lambda _: sizes.update({moment: ledger.take_peak()})))

        def finished(parameter: nn.Parameter) -> None:
            ledger.remove(parameter.grad.untyped_storage()._cdata)

        embeddings = base_model(model.model).get_input_embeddings()
        hooks.append(model.project.register_forward_pre_hook(at_head))
        hooks.append(embeddings.register_forward_hook(lambda _, __, output: peak_at(output, "inside")))
        hooks += [parameter.register_post_accumulate_grad_hook(finished) for parameter in trained]
        try:
            with on_meta(ledger, self.attn == "sdpa"), torch.set_grad_enabled(graph):
                ids, mask = (torch.ones(batch, length, dtype=torch.long) for _ in range(2))
                output = model(ids, mask, **({} if self.scalar else {"keep": keep}))
                if backward:
                    output.sum().backward()
                last = ledger.take_peak()
                del output
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        # Without a backward pass the head's peak is the last; a frozen embedding has no gradient.
        moment = "head" if not backward or not sizes["head"] else "behind" if sizes["inside"] else "inside"
        return Moments(**sizes | {moment: last})

    def cache(self, batch: int, length: int) -> int:
        """Return bytes of the keys and values of all blocks."""
        return self._cache_bytes * self.blocks * batch * length

    @cached_property
    def _cache_bytes(self) -> int:
        """Bytes of the keys and values of one token in one block."""
        decoder = base_model(self.model(1).model).base_model
        decoder.eval()  # with gradient checkpointing nothing is cached while training
        with on_meta(Ledger()), torch.no_grad():
            ids, mask = (torch.ones(1, 16, dtype=torch.long) for _ in range(2))
            layers = decoder(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values.layers
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors) // tensors[0].shape[-2]  # a prefix makes them longer than 16


def counted(model: nn.Module) -> Weights:
    """Count the weights of a network as it is."""
    parameters = list(model.parameters())
    modules = [sum(one.numel() for one in module.parameters(recurse=False)) for module in model.modules()]
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]

    def elements(trained: bool, limit: float = float("inf")) -> int:
        return sum(one.numel() for one in parameters if one.requires_grad == trained and one.numel() < limit)

    return Weights(
        trained=elements(True),
        frozen=elements(False),
        small_trained=elements(True, SMALL),
        small_frozen=elements(False, SMALL),
        largest=max(modules),
        integers=sum(layer.weight.nbytes + layer.weight_scale.nbytes for layer in layers),
    )
