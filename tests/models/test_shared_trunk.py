"""One trunk under actor, critic, reward model and reference: equal to four models, and in memory once."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from models.adapters.lora import add_lora, merged_state_dict, save_adapter
from models.adapters.quantization import quantized_layers
from models.adapters.shared_trunk import SharedTrunk, check_scorer
from models.heads import TokenLogProbs, TokenScores, base_model
from models.load import load_scalar_model
from models.save import save_model
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.closeness import assert_close
from tests.models.chatglm_folders import change_json
from tests.models.common import load, shake, tokens
from tests.tiny import tiny_checkpoint

RANK = 3
ROLES = ("ref", "reward", "actor", "critic")


def write_reward_model(actor, folder, dtype=torch.float32, rank=RANK, bits=0):
    """What step 2 leaves with --lora_dim: merged weights with a head, and the adapter alone."""
    model = add_lora(load_scalar_model(actor, dtype=dtype, seed=5, quantization_bit=bits), rank, 2 * rank)
    shake(model, seed=11)
    base_model(model).config.update({"reward_mean": 0.3, "reward_std": 1.7})
    tokenizer = load_tokenizer(actor)
    save_model(model, tokenizer, load_template(actor, tokenizer), folder, merged_state_dict(model))
    save_adapter(model, folder / "adapter")
    return folder


def separate(actor, reward, **options):
    """The four networks as --memory_mode separate has them."""
    return {
        "ref": load(actor, **options),
        "reward": load(reward, load_scalar_model, **options),
        "actor": load(actor, gradient_checkpointing=True, **options),
        "critic": load(reward, load_scalar_model, gradient_checkpointing=True, **options),
    }


def trunk_of(actor, **options):
    return SharedTrunk(load(actor, **options), str(actor))


def shared(actor, reward, **options):
    """The same four over one trunk."""
    trunk = trunk_of(actor, **options)
    return {
        "ref": trunk.model,
        "reward": trunk.scalar_model(str(reward)),
        "actor": trunk.causal_lm(gradient_checkpointing=True),
        "critic": trunk.scalar_model(str(reward), gradient_checkpointing=True),
    }


def with_heads(networks):
    """What PPO calls: adapters over actor and critic (with values, as in the middle of a run), heads, no dropout."""
    found = {}
    for seed, role in enumerate(ROLES):
        network = networks[role]
        if role in ("actor", "critic"):
            torch.manual_seed(seed)
            network = add_lora(network, RANK, 2 * RANK)
            shake(network, seed)
        else:
            network.requires_grad_(False)
        found[role] = (TokenLogProbs if role in ("ref", "actor") else TokenScores)(network)
    return found


def outputs_and_gradients(models, ids, mask):
    """All forwards before both backwards: what is recomputed meets whatever was active last."""
    found = {role: models[role](ids, mask) for role in ("actor", "critic", "ref", "reward")}
    (found["critic"] * torch.arange(ids.shape[1])).sum().backward()
    found["actor"].sum().backward()
    for role in ("actor", "critic"):
        for name, parameter in models[role].named_parameters():
            if parameter.requires_grad:
                found[f"{role}: {name}"] = parameter.grad
    return {name: value.detach() for name, value in found.items()}


def test_outputs_gradients_and_merged_weights_of_four_models(any_checkpoint, tmp_path):
    reward = write_reward_model(any_checkpoint, tmp_path / "reward")
    ids, mask = tokens(folder=any_checkpoint)
    mask[0, :2] = 0
    networks = [with_heads(make(any_checkpoint, reward)) for make in (shared, separate)]
    one, four = (outputs_and_gradients(heads, ids, mask) for heads in networks)
    assert one.keys() == four.keys() and len(one) > 6
    for name, value in four.items():
        assert value.abs().max() > 1e-4, f"{name} says nothing"
        assert_close(one[name], value)
    for role in ("actor", "critic"):  # the critic's hold the reward model's adapter and its own
        found, expected = (merged_state_dict(heads[role].model) for heads in networks)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(found[name], tensor)
        configs = [base_model(heads[role].model).config.to_dict() for heads in networks]
        assert configs[0] == configs[1]


# --- memory -----------------------------------------------------------------------------------------------------------


def held(*modules) -> dict[int, int]:
    """Bytes by storage of every tensor that the modules hold, counted once however many of them hold it."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An actor and a reward model that was trained over it, wide enough for an adapter to be small."""
    folder = tmp_path_factory.mktemp("wide")
    actor = tiny_checkpoint(folder / "actor", "llama", hidden_size=128, intermediate_size=512, head_dim=32)
    return actor, write_reward_model(actor, folder / "reward")


def test_the_weights_are_in_memory_once(folders):
    one, four = (with_heads(make(*folders)) for make in (shared, separate))
    model = sum(held(load(folders[0])).values())
    adapters = {
        tensor.data_ptr(): tensor.nbytes
        for role in ("actor", "critic")
        for name, tensor in one[role].named_parameters()
        if tensor.requires_grad
    }
    frozen = {layer: change for layer, change in one["reward"].named_buffers() if "frozen_" in layer}
    extra = sum(adapters.values()) + sum(tensor.nbytes for tensor in frozen.values())
    assert sum(held(*four.values()).values()) > 3.8 * model
    assert sum(held(*one.values()).values()) <= 1.01 * model + extra
    assert extra < 0.15 * model


def test_casting_one_network_casts_all_and_copies_nothing(folders):
    networks = with_heads(shared(*folders))
    for network in networks.values():   # as each engine does
        network.to(torch.bfloat16)
    ref = set(held(networks["ref"]))
    for role, network in networks.items():
        own = {key for key in held(network) if key not in ref}
        assert sum(held(network)[key] for key in own) < 0.1 * sum(held(networks["ref"]).values()), role
    ids, mask = tokens()
    assert all(network(ids, mask).isfinite().all() for network in networks.values())


def test_only_adapters_and_heads_are_trained(folders):
    models = with_heads(shared(*folders))
    outputs_and_gradients(models, *tokens())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in models["ref"].parameters())
    mine = {role: {id(p) for p in models[role].parameters() if p.requires_grad} for role in ("actor", "critic")}
    assert mine["actor"] and mine["critic"] and not mine["actor"] & mine["critic"]
    trained = [name for name, p in models["critic"].named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(trained) == 1 and ".score." in trained[0]


def test_dropout_is_each_network_s_own(folders):
    trunk = trunk_of(folders[0])
    calm, noisy = (TokenScores(trunk.scalar_model(str(folders[1]), dropout=dropout)) for dropout in (0.0, 0.5))
    with torch.no_grad():
        assert torch.equal(calm(*tokens()), calm(*tokens())) and not torch.equal(noisy(*tokens()), noisy(*tokens()))
        assert torch.equal(calm(*tokens()), noisy.eval()(*tokens()))


# --- other precisions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_within_its_rounding(dtype, folder_of, tmp_path):
    """A reward model saved in 16 bits is known as the trunk's own, and scores as its merged weights do."""
    actor = folder_of("opt")
    reward = write_reward_model(actor, tmp_path / "reward", dtype)
    ids, mask = tokens()
    for run in (dtype, torch.float32):
        trunk = trunk_of(actor, dtype=run)
        with torch.no_grad():
            found, expected = (
                TokenScores(network)(ids, mask)
                for network in (trunk.scalar_model(str(reward)), load(reward, load_scalar_model))
            )
        assert float((found - expected).abs().max()) < 30 * torch.finfo(dtype).eps * float(expected.abs().max())


@pytest.mark.parametrize(("family", "bits"), [("llama", 8), ("gpt2", 4)])
@pytest.mark.parametrize("trained_over", ["integers", "floats"])
def test_a_trunk_of_integers_is_shared_too(family, bits, trained_over, folder_of, tmp_path):
    """The integers are one set of tensors, and the adapter is added to what they stand for."""
    actor = folder_of(family)
    reward = write_reward_model(actor, tmp_path / "reward", bits=bits if trained_over == "integers" else 0)
    networks = shared(actor, reward, quantization_bit=bits)
    layers = {role: quantized_layers(network) for role, network in networks.items()}
    assert layers["ref"] and all(found.keys() == layers["ref"].keys() for found in layers.values())
    for role, found in layers.items():
        assert all(found[name].weight is layer.weight for name, layer in layers["ref"].items()), role
    ids, mask = tokens()
    scores = TokenScores(networks["reward"])(ids, mask)
    if trained_over == "integers":   # whose merged weights are exact
        expected = TokenScores(load(reward, load_scalar_model))(ids, mask)
        assert_close(scores, expected, 1e-4)
    models = with_heads(networks)
    outputs_and_gradients(models, ids, mask)
    plain = load(reward, load_scalar_model)
    plain.load_state_dict(merged_state_dict(models["critic"].model))
    with torch.no_grad():
        assert_close(TokenScores(plain)(ids, mask), models["critic"](ids, mask), 1e-4)


# --- what cannot be shared --------------------------------------------------------------------------------------------


def refused(actor, reward, words, **options):
    trunk = trunk_of(actor, **options)
    with pytest.raises(UserError, match=words) as error:
        trunk.scalar_model(str(reward))
    assert str(error.value).count(". ") == 0 and "--memory_mode separate" in str(error.value)


def test_the_reward_model_of_another_base_is_refused(folders, folder_of, tmp_path):
    _, reward = folders
    other = tiny_checkpoint(tmp_path / "other", "llama", seed=1, hidden_size=128, intermediate_size=512, head_dim=32)
    refused(other, reward, "differs by .*train step 2 with --lora_dim from .*other")
    wide = tiny_checkpoint(tmp_path / "wide", "llama", hidden_size=64, intermediate_size=512, head_dim=16)
    refused(wide, reward, "other sizes")
    shallow = shutil.copytree(folders[0], tmp_path / "shallow")
    change_json(shallow / "config.json", num_hidden_layers=1)
    refused(shallow, reward, "does not have")
    opt = folder_of("opt")
    refused(opt, reward, "type llama, not opt")
    with pytest.raises(UserError, match="type llama, not opt"):
        check_scorer(str(reward), str(opt))
    refused(other, reward, "differs by", quantization_bit=8)


def test_weights_that_were_trained_themselves_are_refused(folders, tmp_path):
    actor, reward = folders
    tuned = shutil.copytree(reward, tmp_path / "tuned")
    shutil.rmtree(tuned / "adapter")
    refused(actor, tuned, "differs by")
    with pytest.raises(UserError, match="all its weights were trained"):   # which shows before anything is loaded
        check_scorer(str(tuned), str(actor))
    check_scorer(str(reward), str(actor))
    check_scorer(str(actor), str(actor))
    slight = shutil.copytree(reward, tmp_path / "slight")
    tensors = load_file(reward / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name] * (1 + 5e-6)
    save_file(tensors, slight / "model.safetensors", metadata={"format": "pt"})
    refused(actor, slight, f"{name} differs by")


def test_adapters_of_other_kinds_are_refused(folders, tmp_path):
    actor, reward = folders
    layer = "base_model.model.model.layers.9.mlp.up_proj"
    down, up = {f"{layer}.lora_A.weight": torch.zeros(3, 128)}, {f"{layer}.lora_B.weight": torch.zeros(512, 3)}
    for changes, words in (
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(2, 3)}, "no LoRA of a linear layer"),
        (down | up, "not among its weights"),
        (down, "lacks one of the two"),
    ):
        odd = shutil.copytree(reward, tmp_path / "odd", dirs_exist_ok=True)
        file = odd / "adapter" / "adapter_model.safetensors"
        save_file(load_file(reward / "adapter" / file.name) | changes, file)
        refused(actor, odd, words)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated or damaged"):
        trunk_of(actor).scalar_model(str(odd))


def test_a_critic_may_start_from_the_language_model_itself(folders):
    actor, _ = folders
    ids, mask = tokens()
    found = TokenScores(trunk_of(actor).scalar_model(str(actor), seed=3))(ids, mask)
    torch.testing.assert_close(found, TokenScores(load(actor, load_scalar_model, seed=3))(ids, mask))
