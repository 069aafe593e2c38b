"""What several nodes agree on, with the answers of the others played."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from errors import UserError
from tests.training.utils.engine.test_checkpoint import WEIGHTS, FakeEngine, checkpoint_of, fake_run
from training.utils.engine.checkpoint import Checkpoint
from training.utils.run.nodes import Nodes

pytestmark = pytest.mark.fast


class Played(Nodes):
    """Two nodes with a process each; answer(value of this one) is what the other says."""

    def __init__(self, answer) -> None:
        super().__init__(["node 0 (a)", "node 1 (b)"], several=True)
        self.answer = answer

    def gather(self, value):
        return [value, self.answer(value)]


def played(folder: Path, answer=lambda value: value, **marks) -> Checkpoint:
    """The first node's. Questions that the test does not ask are answered as this node does."""
    run = fake_run(folder, "auto")
    run.nodes = Played(answer)
    return Checkpoint(run, {"model": FakeEngine(0)}, {"seed": 1} | marks, {})


@pytest.fixture
def saved(tmp_path) -> Path:
    """A folder with the checkpoints of steps 3 and 6."""
    checkpoint = checkpoint_of(tmp_path, 1)
    checkpoint.save(3)
    checkpoint.save(6)
    return tmp_path


@pytest.mark.parametrize(("others", "step"), [([6, 3], 6), ([3], 3), ([9, 3], 3)])
def test_all_go_on_from_the_newest_step_that_every_node_has(saved, caplog, others, step):
    def answer(value):
        return [f"step-{one:08d}" for one in others] if isinstance(value, list) else value

    assert played(saved, answer).resume() == step
    said = f"node 0 (a): step-00000006, node 1 (b): step-{others[0]:08d}): all go on from step-{step:08d}"
    assert (said in caplog.text) == (others != [6, 3])


def test_a_node_that_has_lost_its_folder_is_named(saved):
    sentence = r"no checkpoint under .* is whole on every node \(node 0 \(a\): step-00000006, node 1 \(b\): none\)"
    with pytest.raises(UserError, match=sentence):
        played(saved, lambda value: [] if isinstance(value, list) else value).resume()


def test_nothing_anywhere_is_a_beginning(tmp_path):
    assert played(tmp_path).resume() == 0


def test_the_trouble_of_one_node_is_the_sentence_of_all(saved):
    def answer(value):
        return value if isinstance(value, (list, dict)) else "step-00000006 is half-written"

    with pytest.raises(UserError, match=r"node 1 \(b\): step-00000006 is half-written"):
        played(saved, answer).resume()


def test_nodes_that_have_changed_places_are_told_so(saved):
    checkpoint = played(saved)
    checkpoint.run.rank = 1
    with pytest.raises(UserError, match=r"node 0 .a.: .*step-00000006 has nothing of rank 1.*--node_rank"):
        checkpoint.resume()


def test_a_step_that_one_node_lacks_is_written_again_by_both(saved):
    checkpoint = played(saved, lambda value: False if value is True else value)
    checkpoint.engines["model"].value = 2
    checkpoint.save(6)
    assert load_file(saved / "checkpoints/step-00000006" / WEIGHTS)["weight:0:weight"].item() == 2


def test_all_nodes_must_be_started_alike():
    def build(**other):
        return played(Path("x"), lambda value: value | other, data="abc", model_name_or_path="/disk/a")

    build(model_name_or_path="/disk/b")   # the same model elsewhere
    with pytest.raises(UserError, match=r"node 1 \(b\) was started with --seed 2, node 0 \(a\) with 1; start the same command"):
        build(seed=2)
    with pytest.raises(UserError, match=r"node 1 \(b\) reads other training data than node 0 \(a\)"):
        build(data="xyz", seed=2)


def test_on_one_node_nobody_is_asked():
    nodes = Nodes(["vm", "vm"])   # two processes of one node have a disk in common, and see the same
    assert Nodes(["vm"]).gather(5) == [5] and nodes.together(lambda: 7) == 7 and nodes.keeps_disk
    with pytest.raises(UserError, match=r"^why$"):
        nodes.together(lambda: (_ for _ in ()).throw(UserError("why")))
