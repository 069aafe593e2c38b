"""The original ChatGLM networks' outputs against ours, case by case.

    python -m tests.models.golden ../shared/golden        prints the largest difference of every case as a table
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, logging

import models  # noqa: F401  (registers the networks)
from tests.closeness import gap

FAMILIES = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b")
FOLDERS = ("tiny", "tiny-prefix", "tiny-prefix-proj")
GIVEN = ("input_ids", "attention_mask", "position_ids", "labels")


@cache
def golden(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by case and name, and the figures of golden.json."""
    cases: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(folder / "golden.safetensors").items():
        case, _, rest = name.rpartition("/")
        cases.setdefault(case, {})[rest] = tensor
    return cases, json.loads((folder / "golden.json").read_text(encoding="utf-8"))


def case_names(root: Path) -> list[tuple[str, str, str]]:
    """(family, folder, case) of everything float32 but the prefixes by themselves."""
    return [
        (family, folder, case)
        for family in FAMILIES
        for folder in FOLDERS
        if (root / family / folder).is_dir()
        for case in golden(root / family / folder)[0]
        if case != "prefix"
    ]


@cache
def network(folder: Path, attention: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The language model of a golden folder, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.eval()


def real_tokens(given: dict[str, Tensor]) -> Tensor:
    """[batch, time] bool from whatever mask was given; everything is real without one."""
    mask = given.get("attention_mask")
    if mask is None:
        return torch.ones_like(given["input_ids"], dtype=torch.bool)
    return ~mask[:, 0, -1].bool() if mask.dim() == 4 else mask.bool()


def compare(root: Path, family: str, folder: str, case: str, attention: str = "sdpa") -> dict[str, float]:
    """Largest difference of each quantity that the golden holds for a case."""
    cases, figures = golden(root / family / folder)
    case_tensors, case_figures = cases[case], figures.get(case, {})
    model = network(root / family / folder, attention)
    if case.startswith("seqcls"):
        return compare_classifier(root / family / folder, case_tensors, case_figures)
    if case.startswith("generate"):
        return compare_generation(model, case_tensors, case_figures)
    if case.startswith("decode"):
        return compare_decoding(model, case_tensors)
    if case.startswith("chunked"):
        return compare_chunks(model, case_tensors)
    return compare_forward(model, case_tensors, case_figures, attention)


def compare_forward(model, tensors: dict[str, Tensor], figures: dict[str, Any], attention: str) -> dict[str, float]:
    """Logits, hidden states, cache, probabilities, masks, positions, loss and gradient norms of one forward pass."""
    given = {name: tensors[name] for name in GIVEN if name in tensors}
    real = real_tokens(given)
    model.zero_grad()
    caught = {}
    last_block = model.transformer.layers if hasattr(model.transformer, "layers") else model.transformer.encoder.layers
    hook = last_block[-1].register_forward_hook(lambda module, inputs, output: caught.update(block=output[0]))
    output = model(**given, use_cache=True, output_hidden_states=True, output_attentions=True)
    hook.remove()
    gaps = {}
    wanted = tensors["logits"]
    gaps["logits"] = gap(output.logits[:, -wanted.shape[1] :], wanted, real[:, -wanted.shape[1] :])
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "hidden_states":
            gaps[name] = gap(output.hidden_states[int(rest)], tensor, real)
        elif kind == "past":
            layer, part = rest.split(".")
            cached = output.past_key_values.layers[int(layer)]
            ours = (cached.keys if part == "key" else cached.values).permute(2, 0, 1, 3)
            rows = slice(-real.shape[1], None)  # a prefix stands before the tokens and is real
            gaps[name] = gap(ours[rows].transpose(0, 1), tensor[rows].transpose(0, 1), real)
            if len(tensor) > real.shape[1]:
                gaps[f"{name}.prefix"] = gap(ours[: -real.shape[1]], tensor[: -real.shape[1]])
        elif kind == "attention_probs" and attention == "eager":
            gaps[name] = gap(output.attentions[int(rest)].flatten(0, 1), tensor)
    if "last_block_output" in tensors:
        gaps["last_block_output"] = gap(caught["block"], tensors["last_block_output"], real)
    if "final_layernorm_output" in tensors:
        normed = model.transformer(given["input_ids"], given.get("attention_mask"), given.get("position_ids"))
        gaps["final_layernorm_output"] = gap(normed.last_hidden_state, tensors["final_layernorm_output"], real)
    if "model_position_ids" in tensors:
        ours = model.transformer.position_ids_for(given["input_ids"])
        gaps["model_position_ids"] = gap(ours, tensors["model_position_ids"])
    hidden = tensors.get("model_attention_mask", tensors.get("model_full_attention_mask"))
    if hidden is not None:
        bias = model.transformer.bias(given["input_ids"], given.get("attention_mask"), 0, 0, torch.float32)
        gaps["model_attention_mask"] = gap((bias < 0).float(), hidden.float())
    if "loss" in figures:
        gaps["loss"] = abs(output.loss.item() - figures["loss"])
    if "grad_norm" in figures:
        output.loss.backward()
        ours = {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}
        assert ours.keys() == figures["grad_norm"].keys()
        gaps["grad_norm"] = max(abs(ours[n] - norm) / max(1.0, norm) for n, norm in figures["grad_norm"].items())
    return gaps


def compare_classifier(folder: Path, tensors: dict[str, Tensor], figures: dict[str, Any]) -> dict[str, float]:
    """Logits and loss of ChatGLM2's sequence classifier."""
    labels = tensors["classifier_head.weight"].shape[0]
    logging.set_verbosity_error()  # the head is missing there, as it must
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, dtype=torch.float32).eval()
    logging.set_verbosity_warning()
    model.load_state_dict({n: t for n, t in tensors.items() if n.startswith("classifier_head")}, strict=False)
    output = model(**{name: tensors[name] for name in GIVEN if name in tensors})
    return {"logits": gap(output.logits, tensors["logits"]), "loss": abs(output.loss.item() - figures["loss"])}


@torch.no_grad()
def compare_decoding(model, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Logits of the prompt's last place and of each forced token on the cache, and the second call's inputs."""
    given = {name: tensors[name] for name in GIVEN if name in tensors}
    ids, mask, positions = given["input_ids"], given.get("attention_mask"), given.get("position_ids")
    forced, wanted = tensors["forced_ids"], tensors["step_logits"]
    output = model(**given, use_cache=True)
    steps, seen = [output.logits[:, -1]], ids
    gaps = {}
    for step in range(forced.shape[1] - 1):
        seen = torch.cat([seen, forced[:, step : step + 1]], dim=1)
        flat = real_tokens(given).long()
        grown = torch.cat([flat, flat.new_ones(len(flat), step + 1)], dim=1)
        options = {"past_key_values": output.past_key_values, "attention_mask": None if mask is None else grown}
        if positions is not None and positions.dim() == 3:
            options["prompt_position_ids"] = positions
        inputs = model.prepare_inputs_for_generation(seen, **options)
        if step == 0:
            assert torch.equal(inputs["input_ids"], tensors["step1.input_ids"])
            differences = inputs["position_ids"] - tensors["step1.position_ids"]
            gaps["step1.position_ids"] = float(differences.abs().max())
            if "step1.attention_mask" in tensors:
                theirs = real_tokens({"attention_mask": tensors["step1.attention_mask"]})
                gaps["step1.attention_mask"] = gap(grown.bool().float(), theirs.float())
        output = model(**inputs)
        steps.append(output.logits[:, -1])
    return gaps | {"step_logits": gap(torch.stack(steps, dim=1), wanted)}


@torch.no_grad()
def compare_chunks(model, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Five tokens at once on top of a cache."""
    first, second = (
        {name: tensors[f"{part}.{name}"] for name in GIVEN if f"{part}.{name}" in tensors} for part in ("first", "second")
    )
    cache = model(**first, use_cache=True).past_key_values
    return {"logits": gap(model(**second, past_key_values=cache, use_cache=True).logits, tensors["second.logits"])}


@torch.no_grad()
def compare_generation(model, tensors: dict[str, Tensor], figures: dict[str, Any]) -> dict[str, float]:
    """transformers' greedy generate: 0 if all tokens are the same, else how many differ."""
    given = {name: tensors[name] for name in GIVEN if name in tensors}
    ends = {"eos_token_id": figures["eos_token_id"]} if "eos_token_id" in figures else {}
    sequences = model.generate(**given, max_new_tokens=figures["max_new_tokens"], do_sample=False, **ends)
    wanted = tensors["sequences"]
    full = torch.full_like(wanted, model.config.pad_token_id)
    full[:, : sequences.shape[1]] = sequences
    return {"differing_tokens": float((full != wanted).sum())}


def table(root: Path) -> str:
    """Markdown: the largest difference of every case, over all its quantities."""
    lines = ["| family | checkpoint | case | largest difference | in |", "|---|---|---|---|---|"]
    for family, folder, case in case_names(root):
        gaps = compare(root, family, folder, case, "eager") if "single" in case else compare(root, family, folder, case)
        worst = max(gaps, key=gaps.get)
        where = worst if gaps[worst] else f"{len(gaps)} quantities"
        lines.append(f"| {family} | {folder} | {case} | {gaps[worst]:.1e} | {where} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
