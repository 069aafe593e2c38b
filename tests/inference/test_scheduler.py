"""Continuous batching: an answer is the same whoever else is in work, joins or leaves."""

import threading
from concurrent.futures import wait

import pytest
import torch

from inference.chatbot import Sampling
from inference.engine import Batch, generate
from inference.scheduler import Answer, Busy, NotFinite, Scheduler, Stopping, _Group
from inference.served import open_model
from models.adapters.lora import add_lora, save_adapter, save_prefix
from models.load import load_causal_lm
from models.templates import load_template
from models.tokenizer import load_tokenizer
from tests.tiny import TEXT, tiny_checkpoint
from tests.tiny_chatglm import GENERATIONS, tiny_chatglm

LONGEST = 24
FAMILIES = ("opt", "bloom", "llama", "gpt2", "glm4")  # a kind of positions each; what the others have is among these


@pytest.fixture
def scheduler():
    """Make a scheduler that ends with the test."""
    made = []

    def make(served, max_batch=4, max_queue=64) -> Scheduler:
        made.append(Scheduler(served, max_batch, max_queue, LONGEST))
        return made[-1]

    yield make
    for one in made:
        one.stop(wait=True)


def questions(served) -> list[Answer]:
    """Questions of many lengths, greedy and sampled, most with settings of their own; answers of many lengths."""
    asked = []
    for number in range(10):
        text = " ".join(TEXT)[7 * number : 7 * number + 5 + 13 * (number % 4)]
        prompt = served.template.encode_prompt(served.tokenizer, [{"role": "user", "content": text}])
        greedy = number % 3 == 0
        sampling = Sampling(
            (5, LONGEST, 11, 1, 17)[number % 5], 0.7 + 0.1 * (number % 2), 0.9, 0 if number % 4 else 20, greedy, number,
            1.2 if number % 5 == 1 else 1.0,
        )  # fmt: skip
        asked.append(Answer(prompt, sampling))
    return asked


def alone(served, answer: Answer) -> list[int]:
    """What the engine that trains and chats gives the same question by itself."""
    sampling = answer.sampling
    ids = torch.tensor([answer.prompt])
    generation = generate(
        served.model, ids, torch.ones_like(ids), stop_token_ids=served.stop_token_ids,
        pad_token_id=served.tokenizer.pad_token_id, row_seeds=[sampling.seed], max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k, greedy=sampling.greedy,
        repetition_penalty=sampling.repetition_penalty,
    )  # fmt: skip
    return generation.sequences[0, : generation.lengths[0]].tolist()


def ask_in_three_lots(scheduler: Scheduler, asked: list[Answer]) -> None:
    """Ask one, more once it has three tokens, and the rest once those have one; return when all are answered."""
    lots = [asked[5:], asked[1:5]]

    def more(answer: Answer) -> None:
        if lots and len(answer.tokens) in (1, 3):
            scheduler.submit(lots.pop())

    asked[0].sampling = Sampling(LONGEST, greedy=True)
    asked[0].on_token = more
    scheduler.submit(asked[:1])
    wait([answer.future for answer in asked], timeout=120)
    assert not lots


def check(served, scheduler) -> None:
    asked = questions(served)
    ask_in_three_lots(scheduler(served), asked)
    for number, answer in enumerate(asked):
        assert answer.future.result(0) is answer
        assert answer.tokens == alone(served, answer), number
        stopped = answer.tokens[-1] in served.stop_token_ids
        assert answer.finish == ("stop" if stopped else "length")
        assert stopped or len(answer.tokens) == answer.sampling.max_new_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_depends_on_its_question_alone(tmp_path, scheduler, family):
    check(open_model(str(tiny_checkpoint(tmp_path, family, seed=1))), scheduler)


def test_passes_run_in_a_thread_that_has_lent_itself(llama, scheduler, monkeypatch):
    """The answers are the same, and each token is drawn in that thread, which reads few prompts at a time; the scheduler's own ends
    when all is answered.
    """
    monkeypatch.setattr("inference.scheduler.LENT_TOKENS", 60)
    lent, asked, drawn = scheduler(llama), questions(llama), set()
    lent.lent = True
    for answer in asked:
        answer.on_token = lambda _: drawn.add(threading.get_ident())
    assert not lent.pass_here()
    lent.submit(asked[:3])
    for number in range(200):
        if number == 4:
            lent.submit(asked[3:])
        if not lent.pass_here():
            break
        assert number or lent.in_work < 3 < lent.max_batch
    assert [answer.tokens for answer in asked] == [alone(llama, answer) for answer in asked]
    assert drawn == {threading.get_ident()} and lent.alive
    lent.stop(wait=True)
    assert not lent.alive


def test_a_stop_in_the_middle_of_a_lent_pass_ends_nothing_that_is_in_work(llama, scheduler, monkeypatch):
    """Questions that a pass has taken, but not read, are in work, too: the thread that laid out the weights stays."""
    lent, [answer, *_], lay_out = scheduler(llama), questions(llama), _Group.__init__
    lent.lent = True

    def stopping(self, *of) -> None:
        lay_out(self, *of)
        lent.stop()
        lent.thread.join(0.2)
        assert lent.alive

    monkeypatch.setattr(_Group, "__init__", stopping)
    lent.submit([answer])
    while lent.pass_here():
        pass
    assert answer.future.result(0).tokens == alone(llama, answer)
    lent.stop(wait=True)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_same_of_chatglm(tmp_path, scheduler, shared_dir, generation):
    check(open_model(str(tiny_chatglm(tmp_path / "model", generation, shared_dir))), scheduler)


@pytest.mark.parametrize("kind", ["chatglm2-6b", "llama"])
def test_the_same_behind_a_prefix(tmp_path, scheduler, request, kind):
    if kind == "llama":
        folder = tiny_checkpoint(tmp_path / "model", kind)
    else:
        folder = tiny_chatglm(tmp_path / "model", kind, request.getfixturevalue("shared_dir"))
    model = load_causal_lm(folder, dtype=torch.float32, pre_seq_len=5)
    tokenizer = load_tokenizer(folder)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_prefix(model, tokenizer, load_template(folder, tokenizer), tmp_path / "prefix", trained)
    check(open_model(str(tmp_path / "prefix")), scheduler)


def test_sliding_windows_and_rows_that_cannot_change_places(tmp_path, scheduler):
    """A network whose cache keeps no more than its window gets a batch for each lot, side by side."""
    served = open_model(str(tiny_checkpoint(tmp_path, "mistral", sliding_window=8)))
    check(served, scheduler)


def test_equal_prompts_are_read_once(tmp_path, scheduler, monkeypatch):
    served = open_model(str(tiny_checkpoint(tmp_path, "llama")))
    rows, forward = [], served.model.lm_head.forward

    def counting(hidden):
        rows.append(len(hidden))
        return forward(hidden)

    monkeypatch.setattr(served.model.lm_head, "forward", counting)
    answers = [Answer([5, 6, 7], Sampling(4, seed=number)) for number in range(4)]
    one = scheduler(served)
    one.submit(answers)
    wait([answer.future for answer in answers], timeout=60)
    assert rows[0] == 1 and rows[1] == 4
    assert [answer.tokens for answer in answers] == [alone(served, answer) for answer in answers]


def follow_up(served, first: Answer, words: str) -> Answer:
    """The next turn of a dialogue, whose prompt begins with all that the model read and said."""
    more = served.tokenizer(words, add_special_tokens=False)["input_ids"]
    return Answer([*first.prompt, *first.tokens, *more], Sampling(8, greedy=True))


@pytest.mark.parametrize("family", ["opt", "bloom", "llama", "gpt2", "glm4", "chatglm2-6b"])
def test_a_dialogue_is_read_from_where_it_ended(tmp_path, scheduler, request, family):
    """The second turns of two dialogues, and a prompt that is no dialogue's, in one lot: the answers are those without a cache."""
    if family in FAMILIES:
        folder = tiny_checkpoint(tmp_path, family, seed=1)
    else:
        folder = tiny_chatglm(tmp_path / "model", family, request.getfixturevalue("shared_dir"))
    served = open_model(str(folder))
    one, read = scheduler(served), []
    served.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0].numel()))
    first = questions(served)[:2]
    one.submit(first)
    wait([answer.future for answer in first], timeout=60)
    read.clear()
    second = [follow_up(served, answer, TEXT[2][:9]) for answer in first]
    one.submit(second)
    wait([answer.future for answer in second], timeout=60)
    unread = max(len(after.prompt) - len(before.prompt) - len(before.tokens) for before, after in zip(first, second, strict=True))
    assert read[0] == 2 * (unread + 1)  # the last token of an answer is drawn, not read
    third = [follow_up(served, answer, TEXT[3][:7]) for answer in second]
    third.append(Answer(first[0].prompt[::-1], Sampling(8, greedy=True)))
    one.submit(third)
    wait([answer.future for answer in third], timeout=60)
    for answer in (*second, *third):
        assert answer.tokens == alone(served, answer)


@pytest.mark.parametrize("family", ["opt", "bloom", "llama"])
def test_questions_that_were_asked_before_take_a_place_before_the_pass(tmp_path, scheduler, monkeypatch, family):
    """Their prompts are known but for the last token, which is read with those of the others."""
    served = open_model(str(tiny_checkpoint(tmp_path, family, seed=1)))
    one, taken, replace = scheduler(served), [], Batch.replace
    monkeypatch.setattr(Batch, "replace", lambda self, *of: (taken.append(of[1].unread is not None), replace(self, *of)))
    for _ in range(2):
        asked = questions(served)
        one.submit(asked)
        wait([answer.future for answer in asked], timeout=120)
        assert [answer.tokens for answer in asked] == [alone(served, answer) for answer in asked]
    assert any(taken)


@pytest.mark.parametrize("generation", ["chatglm-6b"])
def test_a_context_that_sees_itself_whole_is_not_shared(tmp_path, scheduler, generation, shared_dir):
    served = open_model(str(tiny_chatglm(tmp_path / "model", generation, shared_dir)))
    one, [answer] = scheduler(served), questions(served)[:1]
    one.submit([answer])
    answer.future.result(60)
    assert not one.prompts.kept


def test_adapters_answer_side_by_side(tmp_path, scheduler):
    base = tiny_checkpoint(tmp_path / "base", "qwen2")
    for name, seed in (("law", 1), ("art", 2)):
        model = add_lora(load_causal_lm(base, dtype=torch.float32), 4, 8.0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        save_adapter(model, tmp_path / name)
    served = open_model(str(base), "base", {name: str(tmp_path / name) for name in ("law", "art")})
    asked = questions(served)
    for number, answer in enumerate(asked):
        answer.adapter = (None, "law", "art")[number % 3]
    ask_in_three_lots(scheduler(served), asked)
    singly = {name: open_model(str(tmp_path / name)) for name in ("law", "art")} | {None: open_model(str(base))}
    assert [answer.tokens for answer in asked] == [alone(singly[answer.adapter], answer) for answer in asked]


@pytest.fixture(scope="module")
def llama(folder_of):
    return open_model(str(folder_of("llama")))


def long(number: int = 0) -> Answer:
    return Answer([5, 6, 7, number], Sampling(LONGEST, greedy=True, stop_strings=()))


def test_penalties_lower_what_was_said(llama, scheduler):
    plain, penalised = long(), long()
    penalised.frequency, penalised.presence = 2.0, 2.0
    scheduler(llama).submit([plain, penalised])
    wait([plain.future, penalised.future], timeout=60)
    assert len(set(penalised.tokens)) > len(set(plain.tokens))
    # by hand: argmax of the logits less presence and count x frequency
    ids = penalised.prompt.copy()
    for place, token in enumerate(penalised.tokens):
        with torch.no_grad():
            logits = llama.model(torch.tensor([ids])).logits[0, -1]
        said = penalised.tokens[:place]
        for other in set(said):
            logits[other] -= 2.0 + 2.0 * said.count(other)
        assert int(logits.argmax()) == token
        ids.append(token)


def test_log_probabilities_are_the_models_own(llama, scheduler):
    answer = Answer([5, 6, 7], Sampling(6, temperature=0.5, seed=3), top=2)
    scheduler(llama).submit([answer, long(1)])
    answer.future.result(60)
    ids = torch.tensor([[*answer.prompt, *answer.tokens]])
    with torch.no_grad():
        scores = llama.model(ids).logits[0, 2:-1].log_softmax(-1)
    for place, (value, likeliest) in enumerate(answer.log_probs):
        assert value == pytest.approx(float(scores[place, answer.tokens[place]]), rel=1e-4)
        assert [token for token, _ in likeliest] == scores[place].topk(2).indices.tolist()


def test_a_cancelled_answer_frees_its_place(llama, scheduler):
    one = scheduler(llama, max_batch=1)
    first, second = long(1), long(2)
    first.on_token = lambda answer: len(answer.tokens) == 2 and answer.future.cancel()
    one.submit([first, second])
    assert second.future.result(60).tokens == alone(llama, second)
    assert len(first.tokens) == 2


def test_a_full_queue_and_the_end(llama, scheduler):
    one = scheduler(llama, max_batch=1, max_queue=2)
    begun, go = threading.Event(), threading.Event()
    first = long(1)
    first.on_token = lambda answer: (begun.set(), go.wait(60))
    one.submit([first])
    begun.wait(60)
    waiting = [long(2), long(3)]
    one.submit(waiting)
    with pytest.raises(Busy):
        one.submit([long(4)])
    one.stop()
    for answer in waiting:
        assert isinstance(answer.future.exception(60), Stopping)
    with pytest.raises(Stopping):
        one.submit([long(5)])
    go.set()
    assert first.future.result(60).tokens == alone(llama, first)


def test_what_goes_wrong_harms_nobody_else(llama, scheduler, monkeypatch):
    """Logits that are no numbers end one answer; an error of the network all in work, and the next are answered."""
    one = scheduler(llama)
    bad, good = Answer([9, 9, 9], Sampling(8, greedy=True)), long(1)
    embedding = llama.model.get_input_embeddings()
    forward = embedding.forward

    def poisoned(ids):
        states = forward(ids)
        states[(ids == 9) & (ids.roll(1) == 9) & (ids.roll(2) == 9)] = float("nan")
        return states

    monkeypatch.setattr(embedding, "forward", poisoned)
    one.submit([bad, good])
    assert isinstance(bad.future.exception(60), NotFinite)
    assert good.future.result(60).tokens == alone(llama, good)

    def out_of_memory(ids):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(embedding, "forward", out_of_memory)
    lost = long(2)
    one.submit([lost])
    assert "out of memory" in str(lost.future.exception(60))
    monkeypatch.setattr(embedding, "forward", forward)
    last = long(3)
    one.submit([last])
    assert last.future.result(60).tokens == alone(llama, last)
