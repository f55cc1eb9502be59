import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.quickstart_task import base, task
from intfast.config import PromptConfig
from intfast.model.decoder import Architecture, Decoder
from intfast.prompts import CompactStyle, split_steps

SHIPPED = Path(__file__).parents[1] / "configs" / "quickstart"
EXAMPLE = "a 7 ; b 3 ; c 5 ; d a # b ; e d + c ; ? d c e :"
MISREAD = "d a # b : 7 # 3 > 7 - 3 = d 4 ; e d + c : 4 + 5 = e 9 ; ans d 4 c 5 e 9"


@pytest.fixture(scope="module")
def tokenizer():
    return task.build_tokenizer()


def hard_instances(count):
    return [task.hard_instance(random.Random(seed)) for seed in range(count)]


def solved(instance, seed, readings=None, slips=None):
    """(order, values, attempt) of one solution; readings default to some misconceptions."""
    rng = random.Random(seed)
    readings = readings or base.solver_readings(rng)
    values = task.evaluate(instance, readings, slips)
    order = task.attempt_order(rng, instance)
    steps = [task.step_text(definition, values, readings) for definition in order]
    return order, values, task.attempt_text(steps, instance, values)


def brute_force(problem, reading_of):
    """The answer by substitution into Python expressions: shares no code with the task."""
    *clauses, query = problem.removesuffix(" :").split(" ; ")
    values = {}
    for words in map(str.split, clauses):
        if len(words) == 2:
            values[words[0]] = int(words[1])
        else:
            target, left, operator, right = words
            operands = {"x": values[left], "y": values[right]}
            values[target] = eval(reading_of(operator), operands) % 17
    return " ".join(f"{name} {values[name]}" for name in query.split()[1:])


def test_the_page_example():
    instance = task.parse_body(EXAMPLE)
    assert task.body_text(instance) == EXAMPLE
    right = task.evaluate(instance, task.RIGHT)
    reference = "a 7 # b 3 -> d 13 , d 13 + c 5 -> e 1 , ans d 13 c 5 e 1"
    assert task.reference_text(instance, right) == reference
    wrong = task.evaluate(instance, task.PLAIN | {"#": "x-y"})
    steps = [task.step_text(d, wrong, {"#": "x-y"}) for d in instance.definitions]
    assert task.attempt_text(steps, instance, wrong) == MISREAD
    reply = task.check_reply(instance.definitions, wrong, right, task.RIGHT)
    assert reply == "d 4 13 bad <fix> d a # b : 7 # 3 > 3 - 7 = d 13 ;"


def test_hard_problems_have_the_stated_shape():
    sizes, uses = Counter(), Counter()
    for instance in hard_instances(150):
        definitions = instance.definitions
        contested = [d.operator in task.READINGS for d in definitions]
        m = len(task.contested_symbols(instance))
        sizes[len(definitions), m] += 1
        uses[sum(contested) - m] += 1
        assert not any(contested[:2])
        *derived, root = [d.target for d in definitions]
        used = Counter(name for d in definitions for name in (d.left, d.right))
        assert all(used[name] == 1 for name in derived) and used[root] == 0  # a tree
        assert all(d.left != d.right for d in definitions)
        assert instance.query[-1] == root and len({*instance.query} - {*instance.inputs}) == 3
    assert set(sizes) == {(n, m) for n in (5, 6, 7) for m in (2, 3)}
    assert set(uses) == {0, 1}


def test_only_the_right_readings_give_the_answer():
    for instance in hard_instances(60):
        row = task.problem_row(instance, "x")
        symbols = task.contested_symbols(instance)
        right = []
        for code in range(2 ** len(symbols)):
            held = {s: task.READINGS[s][code >> i & 1] for i, s in enumerate(symbols)}
            expression = task.PLAIN | held
            right.append(brute_force(row["problem"], expression.get) == row["answer"])
        assert right == [False] * (len(right) - 1) + [True]


def test_splits_are_disjoint_and_repeatable():
    rows = {split: task.problem_rows(3, split, 60) for split in ("train", "test", "easy")}
    assert rows["test"] == task.problem_rows(3, "test", 60) != task.problem_rows(4, "test", 60)
    every = [row for split in rows.values() for row in split]
    assert len({row["id"] for row in every}) == len({row["problem"] for row in every}) == 180
    for row in rows["easy"]:
        assert not set(row["problem"]) & set(task.READINGS)


def test_first_wrong_step_is_where_the_states_part():
    seen = Counter()
    for seed, instance in enumerate(hard_instances(100)):
        order, values, attempt = solved(instance, seed)
        truth = task.evaluate(instance, task.RIGHT)
        differs = [values[d.target] != truth[d.target] for d in order]
        body = task.body_text(instance)
        expected = differs.index(True) if any(differs) else None
        assert task.first_wrong_step(body, f"{attempt} <eos>") == expected
        seen[expected is None] += 1
    assert seen[False] > 80
    instance = hard_instances(1)[0]
    body, (_, _, attempt) = task.body_text(instance), solved(instance, 0, task.RIGHT)
    steps = len(instance.definitions)
    assert task.first_wrong_step(body, attempt) is None
    assert task.first_wrong_step(body, attempt + " ;") == steps  # not an answer line
    *head, last = attempt.split()
    assert task.first_wrong_step(body, " ".join([*head, str((int(last) + 1) % 17)])) == steps
    shortened = attempt.split(" ; ", 1)[1]
    assert task.first_wrong_step(body, shortened) == steps - 1  # the answer comes too early


def test_check_replies_agree_with_the_oracle_and_the_parser(tokenizer):
    style = CompactStyle(PromptConfig(style="compact", separator=" ;"), tokenizer)
    seen = Counter()
    for seed, instance in enumerate(hard_instances(100)):
        slips = {instance.definitions[0].target: 4} if seed % 3 == 0 else None
        readings = task.RIGHT if seed % 5 == 0 else None
        order, values, attempt = solved(instance, seed, readings, slips)
        truth = task.evaluate(instance, task.RIGHT)
        reply = task.check_reply(order, values, truth, task.RIGHT)
        verdict = style.read(reply, split_steps(attempt, " ;"))
        body, where = (
            task.body_text(instance),
            task.first_wrong_step(task.body_text(instance), attempt),
        )
        seen[where] += 1
        if where is None:
            assert reply.endswith("ok <none>") and verdict.reason == "no_error"
            continue
        fix = reply.split(" <fix> ")[1]
        assert verdict.location == where + 1 and verdict.content.strip() == fix
        # With the fix in its place the attempt is right up to and including that step.
        steps = attempt.split(" ; ")
        repaired = " ; ".join([*steps[:where], fix.removesuffix(" ;"), *steps[where + 1 :]])
        assert task.first_wrong_step(body, repaired) not in range(where + 1)
    assert seen[None] >= 10 and len(seen) >= 5


def test_attempts_keep_the_order_of_dependence():
    orders = set()
    for seed in range(200):
        instance = task.random_instance(random.Random(7), 6, 2)
        order = task.attempt_order(random.Random(seed), instance)
        known = set(instance.inputs)
        for definition in order:
            assert {definition.left, definition.right} <= known
            known.add(definition.target)
        orders.add(tuple(order))
    assert len(orders) > 3


def test_every_text_survives_the_tokenizer(tokenizer):
    assert len(tokenizer) == len(task.VOCABULARY) == 62
    tags = Counter()
    for seed in range(300):
        document = base.random_document(random.Random(seed), 1, 8)
        tags[document.tag] += 1
        spans = [text for text, _ in document.spans]
        ids = [i for span in spans for i in tokenizer.encode(span)]
        text = " ".join(spans)
        assert tokenizer.encode(text) == ids == [base.WORD_ID[word] for word in text.split()]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert set(tags) == set(base.MIXTURE)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (task.PAD, task.EOS)
    with pytest.raises(Exception, match="UNK"):
        tokenizer.encode("a 17")


def test_packed_rows_predict_the_learnt_words():
    documents = [base.random_document(random.Random(seed), 1, 7) for seed in range(40)]
    batch = base.pack(documents)
    learnt = [w for d in documents for text, learn in d.spans if learn for w in text.split()]
    assert [task.VOCABULARY[i] for i in batch.target_N] == learnt
    starts = (batch.position_T == 0).nonzero().flatten().tolist()
    assert starts == [sum(batch.lengths[:i]) for i in range(40)]
    assert not set(batch.row_N.tolist()) & {start - 1 for start in starts[1:]}


def test_solvers_hold_misconceptions_and_references_tell_nothing():
    rng = random.Random(0)
    solvers = [base.solver_readings(rng) for _ in range(3000)]
    held = Counter(readings[s] == task.RIGHT[s] for readings in solvers for s in task.READINGS)
    assert held[True] / held.total() == pytest.approx(base.RIGHT_SHARE, abs=0.004)
    references = [base.random_readings(rng) for _ in range(3000)]
    for symbol in task.READINGS:
        shares = Counter(readings[symbol] for readings in references)
        assert all(shares[p] == pytest.approx(1000, abs=120) for p in task.PRIMITIVES)


def test_training_is_repeatable_and_learns(monkeypatch):
    monkeypatch.setattr(base, "DOCUMENTS_PER_STEP", 4)
    monkeypatch.setattr(base, "WARM_STEPS", 1)
    monkeypatch.setattr(base, "greedy_shares", lambda model, seed: {})
    batch = base.pack(base.random_document(random.Random(seed), 1, 4) for seed in range(8))

    @torch.no_grad()
    def loss(model):
        return F.cross_entropy(base.row_logits(model, batch), batch.target_N).item()

    def trained(seed):
        model = Decoder(Architecture.from_hf(base.MODEL_CONFIG))
        base.initialise(model, seed)
        before = loss(model)
        base.train(model, seed, 6)
        return before, loss(model)

    (before, after), again, other = trained(1), trained(1), trained(2)
    assert (before, after) == again != other
    assert after < 0.97 * before


# The shipped files


def test_shipped_problems_are_the_generated_ones():
    for split, count in task.SPLITS.items():
        lines = (SHIPPED / f"{split}.jsonl").read_text(encoding="ascii").splitlines()
        assert [json.loads(line) for line in lines] == task.problem_rows(0, split, count)
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*")) < 3_000_000


def test_shipped_model_solves_easy_problems(tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(SHIPPED / "base", padding_side="left")
    assert shipped.get_vocab() == tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "base")
    assert sum(p.numel() for p in model.parameters()) == 375_712
    rows = task.problem_rows(1, "easy", 40)
    prompts = shipped([f"{task.SOLVE} {row['problem']}" for row in rows], padding=True)
    ids = model.generate(
        **prompts.convert_to_tensors("pt"), max_new_tokens=110, do_sample=False, use_cache=True
    )
    texts = shipped.batch_decode(ids[:, len(prompts.input_ids[0]) :])
    answers = [text.partition(f" {task.EOS}")[0].rpartition("ans ")[2] for text in texts]
    right = sum(a == row["answer"] for a, row in zip(answers, rows, strict=True))
    assert right >= 36, f"{right} of 40 easy problems solved"
