"""train.py: which command lines it makes, what it skips, how it ends - with small programs in place of the steps."""

import json
import os
import shlex
import sys
import textwrap
from dataclasses import asdict

import pytest

import train
from steps import STEPS, step_of
from tests.tiny import tiny_checkpoint
from training.utils.flags.parse import parse as parse_step
from training.utils.flags.steps import DPOArguments, PPOArguments, RewardArguments, SFTArguments
from training.utils.run.environment import describe_inputs

ARGUMENTS = {1: SFTArguments, 2: RewardArguments, 3: PPOArguments}
DPO = {1: SFTArguments, 2: DPOArguments}


@pytest.fixture(autouse=True)
def no_visible_devices(monkeypatch):
    """Tests decide what the environment says about devices."""
    for name in ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def planned(*words: str) -> dict[int, list[str]]:
    """The flags of each step that a command line plans."""
    return {step.number: step.flags for step in train.plan(train.parse(list(words)))}


def launched(*words: str) -> list[str]:
    """The launcher's own words for the first step, up to --module."""
    args = train.parse(list(words))
    command = train.launch_command(train.plan(args)[0], args)
    return command[3 : command.index("--module")]


def value(flags: list[str], name: str) -> str:
    """The value that counts: the last one given."""
    return flags[len(flags) - flags[::-1].index(name)]


# --- command lines ----------------------------------------------------------------------------------------------------


PAIRS = zip(train.DEPLOYMENTS, train.OPT_SIZES, strict=False)
SIZES = [(deployment, size, f"facebook/opt-{size}", size) for deployment, size in PAIRS]
OTHERS = {"facebook/opt-1.3b": "1.3b", "bigscience/bloom-1b1": "bloom-1b1", "some/where/mine/": "mine"}


@pytest.mark.parametrize(
    ("deployment", "given", "model", "name"), [*SIZES, *(("cpu", given, given, name) for given, name in OTHERS.items())]
)
def test_every_model_and_deployment_gives_flags_that_the_steps_accept(deployment, given, model, name):
    """Folders are named as in DeepSpeed-Chat, whatever the spelling of the model."""
    steps = planned("--actor-model", given, "--deployment-type", deployment)
    parsed = {number: parse_step(ARGUMENTS[number], flags) for number, flags in steps.items()}
    assert (parsed[1].model_name_or_path, parsed[2].model_name_or_path) == (model, "facebook/opt-350m")
    assert parsed[3].actor_model_name_or_path == parsed[1].output_dir == f"output/actor-models/{name}"
    assert parsed[3].critic_model_name_or_path == parsed[2].output_dir == "output/reward-models/350m"
    assert parsed[3].output_dir == f"output/step3-models/{name}"


@pytest.mark.parametrize("deployment", train.DEPLOYMENTS)
def test_dpo_takes_the_place_of_steps_2_and_3(deployment):
    words = ["--method", "dpo", "--actor-model", "13b", "--deployment-type", deployment, "--actor-zero-stage", "3"]
    steps = planned(*words, "--dpo-flags", "--beta 0.3")
    sft, dpo = (parse_step(DPO[number], flags) for number, flags in steps.items())
    assert dpo.model_name_or_path == sft.output_dir == "output/actor-models/13b"
    assert (dpo.output_dir, dpo.beta, dpo.zero_stage, sft.zero_stage) == ("output/dpo-models/13b", 0.3, 3, 3)


def test_flags_reach_the_steps_they_belong_to():
    words = "--actor-zero-stage 3 --reward-zero-stage 1 --data-path a.json b.json --step 3 1 2 --sft-flags --offload"
    more = "--reward-flags '--max_steps 2 --seed 5 --zero_stage 0' '--ppo-flags=--ppo_epochs 2'"
    flags = planned(*shlex.split(f"{words} {more}"))
    assert list(flags) == [1, 2, 3]
    parsed = {number: parse_step(ARGUMENTS[number], words) for number, words in flags.items()}
    assert (parsed[1].zero_stage, parsed[2].zero_stage) == (3, 0)  # flags of a step come last, so that they win
    assert (parsed[3].actor_zero_stage, parsed[3].critic_zero_stage) == (3, 1)
    assert parsed[1].offload and not parsed[2].offload
    assert (parsed[2].max_steps, parsed[2].seed, parsed[3].ppo_epochs) == (2, 5, 2)
    assert all(args.data_path == ["a.json", "b.json"] for args in parsed.values())


def test_the_recipe_is_passed_on_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "launch: {platform: cpu, processes: 2, env: {OMP_NUM_THREADS: 3}}\n"
        "sft: {model_name_or_path: base, zero_stage: 1, output_dir: nowhere}\n"
        "reward: {model_name_or_path: other}\nppo: {kl_coef: 0.25}\n"
    )
    args = train.parse(["--config", str(recipe), "--reward-model", "mine", "--output-dir", "out"])
    steps = {step.number: step.flags for step in train.plan(args)}
    sft, reward, ppo = (parse_step(ARGUMENTS[number], steps[number]) for number in (1, 2, 3))
    assert (sft.model_name_or_path, sft.output_dir, sft.zero_stage) == ("base", "out/actor-models/base", 1)
    assert reward.model_name_or_path == "mine"
    assert (ppo.kl_coef, ppo.actor_model_name_or_path) == (0.25, "out/actor-models/base")
    environment = train.environment(args).over(os.environ)
    assert (environment["OMP_NUM_THREADS"], environment["DS_ACCELERATOR"]) == ("3", "cpu")
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(train.ROOT)
    assert launched("--config", str(recipe))[:4] == ["--hostfile", os.devnull, "--num_gpus", "2"]
    assert launched("--config", str(recipe), "--num-gpus", "1")[:4] == ["--hostfile", os.devnull, "--num_gpus", "1"]


def test_a_recipe_may_name_the_folders_and_start_the_reward_model_from_the_sft_model(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "sft: {model_name_or_path: base, output_dir: out/sft}\n"
        "reward: {model_name_or_path: out/sft, output_dir: out/rm}\nppo: {output_dir: out/ppo}\n"
    )
    one, two, three = train.plan(train.parse(["--config", str(recipe)]))
    assert [str(step.folder) for step in (one, two, three)] == ["out/sft", "out/rm", "out/ppo"]
    assert value(three.flags, "--actor_model_name_or_path") == "out/sft"
    assert value(three.flags, "--critic_model_name_or_path") == "out/rm"
    assert list(two.needs) == [1] and list(three.needs) == [1, 2]

    one, two, three = train.plan(train.parse(["--config", str(recipe), "--output-dir", "new"]))
    assert value(two.flags, "--model_name_or_path") == str(one.folder) == "new/actor-models/base"
    assert list(two.needs) == [1]


@pytest.mark.parametrize(
    ("deployment", "more", "masks", "wanted"),
    [
        ("single_gpu", [], "", ["--num_gpus", "1"]),
        ("single_node", [], "", ["--master_port"]),  # every device
        ("ascend_910", [], "", ["--master_port"]),
        ("single_node", ["--num-gpus", "4"], "", ["--num_gpus", "4"]),
        # deepspeed --num_gpus 1 takes card 0 whatever CUDA_VISIBLE_DEVICES says
        ("single_gpu", [], "5,7", ["--include", "localhost:5"]),
        ("single_node", ["--num-gpus", "2"], "5,7", ["--include", "localhost:5,7"]),
        ("cpu", ["--num-gpus", "2"], "5,7", ["--num_gpus", "2"]),
    ],
)
def test_launcher_words_of_the_deployments(monkeypatch, deployment, more, masks, wanted):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", masks)
    assert launched("--deployment-type", deployment, *more)[2 : 2 + len(wanted)] == wanted
    assert launched("--deployment-type", "multi_node", "--hostfile", "hosts") == ["--hostfile", "hosts"]


def test_a_hostfile_with_one_host_is_obeyed(tmp_path):
    hosts, words = tmp_path / "hosts", ["--deployment-type", "multi_node", "--hostfile", str(tmp_path / "hosts")]
    hosts.write_text("localhost slots=2\n")
    assert launched(*words)[:4] == ["--hostfile", os.devnull, "--num_gpus", "2"]
    hosts.write_text("other.invalid slots=4\n")
    wanted = f"--hostfile {hosts} --num_gpus 4 --force_multi --master_addr other.invalid"
    assert launched(*words) == wanted.split()


def test_a_platform_brings_its_environment_and_a_recipe_that_of_its_own_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    found = train.environment(train.parse(["--deployment-type", "dcu_z100l"])).variables
    assert (found["DS_ACCELERATOR"], found["HSA_FORCE_FINE_GRAIN_PCIE"]) == ("cuda", "1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("launch: {platform: ascend_910}\nsft: {}\n")
    for words in ([], ["--deployment-type", "single_node"]):
        args = train.parse(["--config", str(recipe), *words])
        assert train.options(args).platform.name == "ascend_910"
        assert train.environment(args).variables["DS_ACCELERATOR"] == "npu"
    args = train.parse(["--config", str(recipe), "--deployment-type", "cpu"])
    assert train.environment(args).variables["DS_ACCELERATOR"] == "cpu"


def test_a_step_whose_inputs_are_made_anew_does_not_resume_on_the_old_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train.parse(["--resume"])
    steps = train.plan(args)
    assert [train.choose([step], args)[0].flags.count("--resume") for step in steps] == [1, 1, 1]  # what was cut short
    both = {step.section: step.flags.count("--resume") for step in train.choose(steps, args)}
    assert both == {"sft": 1, "reward": 1, "ppo": 0}  # PPO's checkpoint, if there is one, is of models that are replaced now


def test_a_recipe_is_found_by_the_models_name(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ROOT", tmp_path)
    (tmp_path / "configs/single_node").mkdir(parents=True)
    recipe = tmp_path / "configs/single_node/glm.yaml"
    recipe.write_text("launch: {platform: single_node}\nsft: {model_name_or_path: THUDM/glm, output_dir: out/sft}\n")
    args = train.parse(["--deployment-type", "single_node", "--actor-model", "glm"])
    assert args.config == str(recipe)
    assert parse_step(SFTArguments, train.plan(args)[0].flags).model_name_or_path == "THUDM/glm"
    # A size, a hub id, a folder and a deployment without such a recipe mean what they always meant.
    for words in (["--actor-model", "1.3b"], ["--actor-model", "THUDM/glm"], ["--actor-model", "glm"]):
        assert train.parse([*words, *(["--deployment-type", "single_gpu"] if words[1] == "glm" else [])]).config is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glm").mkdir()
    assert train.parse(["--deployment-type", "single_node", "--actor-model", "glm"]).config is None


def test_dry_run_prints_commands_that_a_shell_reads_and_makes_nothing(tmp_path, capsys):
    output = tmp_path / "a folder"
    assert train.main(["--dry-run", "--deployment-type", "cpu", "--num-gpus", "2", "--output-dir", str(output)]) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert [command[command.index("--module") + 1] for command in commands] == [step.module for step in STEPS[:3]]
    assert all(command[:2] == ["env", "DS_ACCELERATOR=cpu"] for command in commands)
    assert value(commands[2], "--actor_model_name_or_path") == str(output / "actor-models" / "1.3b")
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sttep", "1"], "did you mean --step"),
        (["--step", "4"], "invalid choice: 4"),
        (["--deployment-type", "single"], "invalid choice: 'single'"),
        (["--num-gpus", "0"], "give 1 or more"),
        (["--ppo-flags", "--x 'y"], "check its quotes"),
        (["--sft-flags", "--seed 5 --output_dir x"], "--sft-flags: --output_dir cannot be passed on to a step"),
        (["--ppo-flags", "--output-dir=x"], "--ppo-flags: --output_dir cannot be passed on to a step"),
        (["--hostfile", "hosts"], "--hostfile has no effect with --deployment-type single_gpu; add --deployment-type multi_node"),
        (["--force", "--resume"], "--force runs a step from its beginning, --resume from its checkpoint; drop one"),
        (["--force", "--keep"], "--force runs finished steps again, --keep leaves them; drop one"),
        (["--dry-run", "--sft-flags", "--learning_rat 1"], "did you mean --learning_rate?"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--actor-zero-stage", "4"], "invalid choice: 4"),
        (["--method", "dpo", "--step", "1", "3"], "DPO takes the place of steps 2 and 3; it is --step 2."),
        (["--method", "dpo", "--reward-model", "350m"], "--reward-model has no effect with --method dpo"),
        (["--dpo-flags", "--beta 1"], "--dpo-flags has no effect with --method ppo"),
        (["--config", "launch: {num_gpu: 2}\nsft: {}\n"], "unknown key 'num_gpu'"),
        (["--config", "learning_rate: 1e-4\n"], "sections launch, sft, reward and ppo"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(words, sentence, tmp_path, capsys):
    if "\n" in words[-1]:
        (tmp_path / "recipe.yaml").write_text(words[-1])
        words = [*words[:-1], str(tmp_path / "recipe.yaml")]
    assert train.main(words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1


# --- running: small programs in place of the steps --------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """Flags that name two tiny models with one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    actor, reward = (tiny_checkpoint(folder / name, "opt", max_position_embeddings=512) for name in ("actor", "reward"))
    return ["--actor-model", str(actor), "--reward-model", str(reward), "--deployment-type", "cpu"]


SUCCEED = """
    import json, sys, pathlib, shutil
    done = json.loads(sys.argv[1])
    flags = done['flags']
    folder = pathlib.Path(flags['output_dir'])
    print('working in', folder.name)
    if 'model_name_or_path' in flags:
        shutil.copytree(flags['model_name_or_path'], folder, dirs_exist_ok=True)
    (folder / 'sanbu_done.json').write_text(json.dumps(done))
"""


@pytest.fixture
def fake_steps(monkeypatch):
    """Replace the steps by programs; returns the dictionary to put them into, by number of the step."""
    programs = dict.fromkeys((1, 2, 3), SUCCEED)

    def command(step, args):
        parsed = parse_step(step_of(step.section).arguments_class, step.flags)
        done = json.dumps({"flags": asdict(parsed), **describe_inputs(parsed)}, default=str)
        return [sys.executable, "-c", textwrap.dedent(programs[step.number]), done]

    monkeypatch.setattr(train, "launch_command", command)
    return programs


def test_three_steps_in_order_streamed_and_logged_then_skipped(fake_steps, models, tmp_path, capfdbinary):
    words = [*models, "--output-dir", str(tmp_path)]
    assert train.main(words) == 0
    out = capfdbinary.readouterr().out.decode()
    places = [out.index(f"=== step {number}") for number in (1, 2, 3)]
    assert places == sorted(places) and out.count("took 0:0") == 3
    for folder in ("actor-models/actor", "reward-models/reward", "step3-models/actor"):
        log = (tmp_path / folder / "training.log").read_text()
        assert log.startswith("$ ") and f"working in {folder.split('/')[1]}\n" in log
    assert "python chat.py --path" in out
    assert f"\nReport: {tmp_path}/report.html\n" in out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f"Step {number}: " in page for number in (1, 2, 3)) and "not there" not in page

    assert train.main(words) == 0
    again = capfdbinary.readouterr().out.decode()
    assert again.count("is done:") == 3 and "working in" not in again

    # With the reward model renewed, a PPO model trained on the old one is no longer done.
    (tmp_path / "reward-models/reward/sanbu_done.json").unlink()
    assert train.main(words) == 0
    out = capfdbinary.readouterr().out.decode()
    assert "step 1 (supervised fine-tuning) is done" in out and out.count("\nworking in") == 2

    assert train.main([*words, "--step", "2", "--force"]) == 0
    assert capfdbinary.readouterr().out.decode().count("\nworking in reward") == 1


def test_dpo_is_run_behind_step_1_and_named_in_what_to_do_next(fake_steps, models, tmp_path, capfdbinary):
    words = [*models[:2], *models[4:], "--output-dir", str(tmp_path), "--method", "dpo"]
    assert train.main([*words, "--step", "2"]) == 2
    command = capfdbinary.readouterr().err.decode().split("run it first: python train.py ")[1].rstrip(". \n")
    args = train.parse(shlex.split(command))
    assert (args.step, args.method) == ([1], "dpo")
    assert train.main(words) == 0
    out = capfdbinary.readouterr().out.decode()
    assert out.index("=== step 1 (supervised fine-tuning) ->") < out.index("=== step 2 (DPO) ->") and "step 3" not in out
    assert f"python chat.py --path {tmp_path / 'dpo-models/actor'}" in out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "DPO" in page and "Step 2" not in page
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()  # a page that cannot be written takes nothing from the models
    assert train.main(words) == 0
    out = capfdbinary.readouterr().out.decode()
    assert out.count("is done:") == 2 and "\nNo report: --output" in out and "Is a directory" in out


def test_a_failing_step_stops_the_rest_and_its_own_words_are_repeated(fake_steps, models, tmp_path, capfd):
    fake_steps[2] = "import sys; print('error: pairs.jsonl, line 7: no field', file=sys.stderr); sys.exit(2)"
    assert train.main([*models, "--output-dir", str(tmp_path)]) == 2
    captured = capfd.readouterr()
    assert "step 2 (reward model) ended with exit code 2" in captured.err
    assert "it said: pairs.jsonl, line 7: no field" in captured.err
    assert "step 3" not in captured.out
    # the next call takes up where this one stopped
    fake_steps[2] = SUCCEED
    assert train.main([*models, "--output-dir", str(tmp_path)]) == 0
    assert "step 1 (supervised fine-tuning) is done" in capfd.readouterr().out
    # a step that ends badly is not done, though it was before
    fake_steps[2] = "raise SystemExit(3)"
    words = [*models, "--output-dir", str(tmp_path), "--step", "2"]
    assert train.main([*words, "--force"]) == 3 and not (tmp_path / "reward-models/reward/sanbu_done.json").exists()


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("raise MemoryError('HIP out of memory. Tried to allocate')", 1, "the memory was not enough"),
        ("import os; os.kill(os.getpid(), 9)", 137, "exit code 137"),
        ("print('all went well')", 1, "did not write sanbu_done.json"),
        ("import nowhere_to_be_found", 1, "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    ],
)
def test_other_ends_of_a_step(fake_steps, models, tmp_path, capfd, program, code, words):
    fake_steps[1] = program
    assert train.main([*models, "--output-dir", str(tmp_path)]) == code
    assert words in capfd.readouterr().err


def test_a_step_done_with_other_data_flags_recipe_or_code_is_not_taken_for_done(fake_steps, models, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (tmp_path / "recipe.yaml").write_text("sft: {seed: 7}\nreward: {}\nppo: {}\n")
    other = tiny_checkpoint(tmp_path / "other" / "actor", "opt", max_position_embeddings=512)
    words = [*models, "--data-path", "data.jsonl", "--config", "recipe.yaml", "--output-dir", "out", "--step", "1"]

    def result(*more: str) -> tuple[int, str, str]:
        code = train.main([*words, *more])
        return code, *capfd.readouterr()

    assert result()[0] == 0
    # The same, spelled in another way; and what does not change the model.
    words[words.index("data.jsonl")] = "./data.jsonl"
    assert "is done" in result("--sft-flags", "--logging_steps 3 --save_steps 5")[1]

    for more, sentence in (
        (["--sft-flags", "--seed 3 --max_steps 2"], "--max_steps is 2 now and was 0; --seed is 3 now and was 7."),
        (["--actor-zero-stage", "2"], "--zero_stage is 2 now and was"),
        (["--actor-model", str(other)], f"--model_name_or_path is {other} now and was {models[1]}"),
    ):
        for dry in ([], ["--dry-run"]):
            code, out, error = result(*more, *dry)
            assert (code, out, error.count("\n")) == (2, "", 1) and sentence in error
            assert "--force trains again, --keep goes on with what is there" in error
        code, out, _ = result(*more, "--keep")
        assert code == 0 and f"kept although {sentence.removesuffix('.')}" in out and "working in" not in out
    (tmp_path / "recipe.yaml").write_text("sft: {seed: 8}\nreward: {}\nppo: {}\n")
    assert "--seed is 8 now and was 7." in result()[2]
    assert "\nworking in actor" in result("--force")[1] and "is done" in result()[1]

    words[words.index("./data.jsonl")] = "data.jsonl"
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "c"}\n')
    assert "data.jsonl has another content now." in result()[2]
    assert result("--force")[0] == 0
    with (tmp_path / models[1] / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"another.")
    assert f"was done otherwise: {models[1]} has other weights now." in result()[2]
    assert result("--force")[0] == 0
    monkeypatch.setattr("scripts.done.describe_inputs", lambda args: describe_inputs(args) | {"code": "changed"})
    assert "was done otherwise: the program's code is another now." in result()[2]
    # Folders of earlier versions say nothing of data and code.
    done = tmp_path / "out/actor-models/actor/sanbu_done.json"
    done.write_text(json.dumps({"flags": json.loads(done.read_text())["flags"]}))
    assert "is done" in result()[1]


def test_a_dry_run_says_what_would_be_skipped(fake_steps, models, tmp_path, capfd):
    words = [*models, "--output-dir", str(tmp_path)]
    assert train.main([*words, "--step", "1"]) == 0
    capfd.readouterr()
    assert train.main([*words, "--dry-run"]) == 0
    first, *rest = capfd.readouterr().out.splitlines()
    assert first.startswith("# step 1 (supervised fine-tuning) is done: ")
    assert [line[:9] for line in rest if line.startswith("#")] == ["# step 2 ", "# step 3 "]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data-path", "absent.json"], "--data_path absent.json: no such file or folder"),
        (["--data-path", "empty.jsonl"], "empty.jsonl: no records in it."),
        (["--data-path", "broken.json"], "broken.json, line 1: the JSON list is not closed"),
        (["--ppo-flags", "--ppo_epoch 2"], "--ppo_epoch is not a flag of step 3 (PPO); did you mean --ppo_epochs?"),
    ],
)
def test_wrong_flags_and_data_of_any_step_are_told_before_the_first_starts(models, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.json").write_text("[")
    assert train.main([*models, *words]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and told.err.count("\n") == 1 and not told.out and not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data-path", "pairs.jsonl", "answers.json"], 'answers.json: no record has a "rejected" answer. Step 2 trains on pairs'),
        (["--data-path", "answers.json", "--method", "dpo"], "answers.json: no record has a"),
        (["--reward-flags", "--max_seq_len 513"], "step 2 (reward model): --max_seq_len 513 is more than the 512 positions"),
        (["--ppo-flags", "--max_prompt_seq_len 400"], "step 3 (PPO): --max_prompt_seq_len + --max_answer_seq_len = 656 is more"),
    ],
)
def test_data_without_pairs_and_lengths_without_positions_are_told_before_the_first_step(
    fake_steps, models, tmp_path, monkeypatch, capsys, words, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (tmp_path / "answers.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 3))
    models = [*models[:2], *models[4:]] if "dpo" in words else models
    assert train.main([*models, "--data-path", "pairs.jsonl", *words]) == 2
    told = capsys.readouterr()
    assert sentence in told.err and told.err.count("\n") == 1 and not list(tmp_path.rglob("training.log"))


def test_two_tokenizers_are_refused_before_anything_runs(fake_steps, models, tmp_path, capsys):
    other = tiny_checkpoint(tmp_path / "bloom", "bloom")
    words = [*models[:2], "--reward-model", str(other), *models[4:], "--output-dir", str(tmp_path / "out")]
    assert train.main(words) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("training.log"))
