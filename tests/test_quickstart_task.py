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
    assert set(sizes) == {(n, 2) for n in (7, 8, 9)}
    assert set(uses) == {0, 1}


def test_only_the_right_readings_give_the_answer():
    for instance in hard_instances(60):
        body, values = task.body_text(instance), task.evaluate(instance, task.RIGHT)
        answer = task.answer_text(instance, values)
        symbols = task.contested_symbols(instance)
        right = []
        for code in range(2 ** len(symbols)):
            held = {s: task.READINGS[s][code >> i & 1] for i, s in enumerate(symbols)}
            expression = task.PLAIN | held
            right.append(brute_force(body, expression.get) == answer)
        assert right == [False] * (len(right) - 1) + [True]


def test_splits_are_disjoint_and_repeatable():
    rows = {split: task.problem_rows(3, split, 60) for split in ("train", "test", "easy")}
    assert rows["test"] == task.problem_rows(3, "test", 60) != task.problem_rows(4, "test", 60)
    every = [row for split in rows.values() for row in split]
    assert len({row["id"] for row in every}) == len({row["problem"] for row in every}) == 180
    for row in rows["easy"]:
        assert not set(row["problem"]) & set(task.READINGS)


def test_terseness_leaves_out_routine_lines_of_the_same_problems_and_nothing_else():
    kept = Counter()
    for q in (0.0, 0.5, 1.0):
        for row in task.problem_rows(3, "train", 40, q):
            instance = task.parse_body(row["problem"])
            *lines, answer = row["reference_solution"].split(" , ")
            assert answer == f"ans {row['answer']}"
            values = task.evaluate(instance, task.RIGHT)
            stated = [line.split(" -> ")[1] for line in lines]
            assert all(
                f"{d.target} {values[d.target]}" in stated
                for d in instance.definitions
                if d.operator in task.READINGS
            )
            routine = [d.target for d in instance.definitions if d.operator not in task.READINGS]
            kept[q, "of"] += len(routine)
            kept[q] += sum(f"{name} {values[name]}" in stated for name in routine)
    assert kept[0.0] == kept[0.0, "of"] and kept[1.0] == 0
    assert kept[0.5] / kept[0.5, "of"] == pytest.approx(0.5, abs=0.1)
    without = [
        [{k: v for k, v in row.items() if k != "reference_solution"} for row in rows]
        for rows in (task.problem_rows(3, "train", 40, q) for q in (0.0, 1.0))
    ]
    assert without[0] == without[1]


def test_rewrites_leave_out_a_share_of_what_the_reference_leaves_out():
    rng, lines, spelled = random.Random(0), Counter(), Counter()
    for instance in hard_instances(200):
        values = task.evaluate(instance, task.RIGHT)
        omit = task.omitted(rng, instance, 1.0)
        text = task.solution_text(rng, instance, values, task.RIGHT, omit, 0.25)
        steps = text.rpartition(" ans ")[0].split(" ;")[:-1]
        assert text.endswith(f" ans {task.answer_text(instance, values)}")
        for step in steps:
            assert step.split()[-1] == str(values[step.split()[-2]])
        for d in instance.definitions:
            (found,) = [step for step in steps if step.split()[0] == d.target] or [None]
            if d.operator in task.READINGS:
                spelled[" > " in found] += 1
            else:
                lines[found is not None] += 1
    for kept in (lines, spelled):
        assert kept[False] / kept.total() == pytest.approx(0.25, abs=0.05)


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
    for seed in range(400):
        document = base.random_document(random.Random(seed), 1, 9, late=seed % 2 == 0)
        tags[document.tag] += 1
        spans = [text for text, _ in document.spans]
        ids = [i for span in spans for i in tokenizer.encode(span)]
        text = " ".join(spans)
        assert tokenizer.encode(text) == ids == [base.WORD_ID[word] for word in text.split()]
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert set(tags) == set(base.MIXTURE) == set(base.LATE_MIXTURE)
    for mixture in (base.MIXTURE, base.LATE_MIXTURE):
        assert sum(mixture.values()) == pytest.approx(1)
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
    authors = [base.author_readings(rng) for _ in range(3000)]
    for symbol, pair in task.READINGS.items():
        shares = Counter(readings[symbol] for readings in authors)
        assert set(shares) == set(pair)
        assert shares[pair[0]] == pytest.approx(1500, abs=150)


def test_a_hint_gives_the_readings_of_its_whole_lines_alone():
    seen = Counter()
    for seed in range(600):
        document = base.random_document(random.Random(seed), 4, 9)
        if document.tag != base.HINT:
            continue
        (prompt, _), (solution, _) = document.spans
        shown = prompt.partition(" : ")[2]
        steps = {step.split()[0]: step.split() for step in solution.split(" ; ")[:-1]}
        for line in shown.split(" , ")[:-1]:
            _, x, symbol, _, y, _, target, value = line.split()
            if symbol not in task.READINGS:
                continue
            # v x op y : X op Y > FIRST primitive SECOND = v VALUE
            *_, left, _, right, _, first, primitive, second, _, _, _ = steps[target]
            assert sorted((left, right)) == sorted((first, second))
            if left != right:
                reading = f"x{primitive}y" if first == left else f"y{primitive}x"
                seen[task.apply(reading, int(x), int(y)) == int(value)] += 1
    assert seen[True] > 20 and not seen[False]


def test_training_is_repeatable_learns_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(base, "DOCUMENTS_PER_STEP", 4)
    monkeypatch.setattr(base, "WARM_STEPS", 1)
    monkeypatch.setattr(base, "greedy_shares", lambda model, seed: {})
    batch = base.pack(base.random_document(random.Random(seed), 1, 4) for seed in range(8))

    @torch.no_grad()
    def loss(model):
        return F.cross_entropy(base.row_logits(model, batch), batch.target_N).item()

    def trained(seed, name):
        model = Decoder(Architecture.from_hf(base.MODEL_CONFIG))
        base.initialise(model, seed)
        before = loss(model)
        base.train(model, seed, 6, tmp_path / name)
        return before, loss(model)

    (before, after), again, other = trained(1, "a"), trained(1, "b"), trained(2, "c")
    assert (before, after) == again != other

    # Stopped behind its third step, whose state is the last one written.
    monkeypatch.setattr(base, "CHECK_EVERY", 3)
    model = Decoder(Architecture.from_hf(base.MODEL_CONFIG))
    base.initialise(model, 1)
    shares = iter([{}])
    monkeypatch.setattr(base, "greedy_shares", lambda model, seed: next(shares))
    with pytest.raises(StopIteration):
        base.train(model, 1, 6, tmp_path / "d")
    monkeypatch.setattr(base, "greedy_shares", lambda model, seed: {})
    assert trained(1, "d") == (before, after)
    assert after < 0.97 * before


# The shipped files


def test_shipped_problems_are_the_generated_ones():
    for split, count in task.SPLITS.items():
        lines = (SHIPPED / f"{split}.jsonl").read_text(encoding="ascii").splitlines()
        assert [json.loads(line) for line in lines] == task.problem_rows(0, split, count)
    lines = (SHIPPED / "train_q0.jsonl").read_text(encoding="ascii").splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == task.problem_rows(0, "train", task.SPLITS["train"], q=0.0)
    assert all(file.stat().st_size < 2_000_000 for file in SHIPPED.rglob("*"))


def test_shipped_model_solves_easy_problems(tokenizer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(SHIPPED / "base", padding_side="left")
    assert shipped.get_vocab() == tokenizer.get_vocab()
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "base")
    assert sum(p.numel() for p in model.parameters()) == 375_712
    rows = task.problem_rows(1, "easy", 40)
    prompts = shipped([f"{task.SOLVE} {row['problem']}" for row in rows], padding=True)
    ids = model.generate(
        **prompts.convert_to_tensors("pt"), max_new_tokens=150, do_sample=False, use_cache=True
    )
    texts = shipped.batch_decode(ids[:, len(prompts.input_ids[0]) :])
    answers = [text.partition(f" {task.EOS}")[0].rpartition("ans ")[2] for text in texts]
    right = sum(a == row["answer"] for a, row in zip(answers, rows, strict=True))
    assert right >= 36, f"{right} of 40 easy problems solved"
