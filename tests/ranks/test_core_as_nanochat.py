"""CORE without cropping beside nanochat's way, written here once more and plainly: its model, prompts and scores.

One process, one example at a time, all logits, no cache, no batch. The weights are trained on the tasks' own texts, so
that some answers of each kind are right.
"""

import random
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F

from megachat.errors import UserError
from megachat.evals.core import Evaluator, evaluate_tasks
from megachat.evals.core_bundle import CoreTask
from megachat.evals.core_prompts import RowLimit
from megachat.model.parameters import load_whole, placed_parameters
from megachat.parallel.build import build_evaluation_engine, build_module, start_collectives
from megachat.parallel.mesh import build_mesh
from megachat.place import place_of
from megachat.planning.plan import resolve_plan
from megachat.train.stage import build_stage
from tests.harness import run_ranks
from tests.ranks.test_core import tokenizer
from tests.training import small_config
from tests.unit.evals.bundle import examples

ROW, DEPTH, HEADS, KV_HEADS, HEAD = 48, 3, 4, 2, 16
MODEL = {
    "depth": DEPTH,
    "aspect_ratio": 20,
    "head_size": HEAD,
    "kv_heads": KV_HEADS,
    "sequence_len": ROW,
    "window_pattern": "SL",
}
STEPS = 120


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1.1920929e-07).sqrt()


def plain_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Computes nanochat's GPT on ids [rows, tokens] of any length; lambdas are under their name and block."""
    tokens = ids.size(1)
    frequencies = 1.0 / (100000 ** (torch.arange(0, HEAD, 2).float() / HEAD))
    angles = torch.outer(torch.arange(tokens).float(), frequencies)
    cos, sin = (table[None, :, None, :] for table in (angles.cos(), angles.sin()))

    def rotated(x):
        x1, x2 = x[..., : HEAD // 2], x[..., HEAD // 2 :]
        return torch.cat((x1 * cos + x2 * sin, x1 * -sin + x2 * cos), dim=3)

    behind = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    x = norm(weights["transformer.wte.weight"][ids])
    gate = torch.sigmoid(x[:, 1:, :24] @ weights["smear_gate.weight"].T)
    x = torch.cat((x[:, :1], x[:, 1:] + weights["smear_lambda"] * gate * x[:, :-1]), dim=1)
    x0 = x
    for block in range(DEPTH):
        x = weights[f"resid_lambdas.{block}"] * x + weights[f"x0_lambdas.{block}"] * x0
        h, name = norm(x), f"transformer.h.{block}."
        q, k, v = (
            (h @ weights[f"{name}attn.{part}.weight"].T).unflatten(-1, (-1, HEAD)) for part in ("c_q", "c_k", "c_v")
        )
        if block % 2 == (DEPTH - 1) % 2:
            gate = 3 * torch.sigmoid(h[..., :12] @ weights[f"{name}attn.ve_gate.weight"].T)
            v = v + gate[..., None] * weights[f"value_embeds.{block}.weight"][ids].view(v.shape)
        q, k = norm(rotated(q)) * 1.2, norm(rotated(k)) * 1.2
        k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=2) for part in (k, v))
        short = block % 2 == 0 and block != DEPTH - 1
        window = -(-ROW // 4 // 128) * 128 if short else ROW
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD**0.5
        share = scores.masked_fill(~((behind >= 0) & (behind <= window)), -torch.inf).softmax(dim=-1)
        x = x + torch.einsum("bhqk,bkhd->bqhd", share, v).flatten(2) @ weights[f"{name}attn.c_proj.weight"].T
        x = x + F.relu(norm(x) @ weights[f"{name}mlp.c_fc.weight"].T).square() @ weights[f"{name}mlp.c_proj.weight"].T
        if block == DEPTH // 2:
            backout = x
    x = norm(x - weights["backout_lambda"] * backout)
    return 15 * torch.tanh(x @ weights["lm_head.weight"][: tokenizer().vocab_size].T / 15)


def plain_texts(task: CoreTask, item: dict, shots: list[dict]) -> list[str]:
    before, between = "", task.delimiter
    for shot in shots:
        if task.kind == "multiple_choice":
            before += shot["query"] + between + shot["choices"][shot["gold"]] + "\n\n"
        elif task.kind == "schema":
            before += shot["context_options"][shot["gold"]] + between + shot["continuation"] + "\n\n"
        else:
            before += shot["context"].strip() + between + shot["continuation"] + "\n\n"
    if task.kind == "multiple_choice":
        return [before + item["query"] + between + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [before + context + between + item["continuation"] for context in item["context_options"]]
    question = before + item["context"].strip() + between
    return [question.strip(), question + item["continuation"]]


def equal_tokens(sequences: list[list[int]]) -> int:
    for number in range(min(map(len, sequences))):
        if any(sequence[number] != sequences[0][number] for sequence in sequences):
            return number
    return min(map(len, sequences))


@torch.no_grad()
def plain_answer(weights: dict[str, torch.Tensor], task: CoreTask, data: list[dict], number: int) -> tuple[bool, int]:
    """Returns nanochat's verdict on one example, and the length of its longest row."""
    others = [index for index in range(len(data)) if index != number]
    shots = [data[index] for index in random.Random(1234 + number).sample(others, task.shots)]
    rows = [[256, *text.encode()] for text in plain_texts(task, data[number], shots)]
    ends = [len(row) for row in rows]
    if task.kind == "multiple_choice":
        starts = [equal_tokens(rows)] * len(rows)
    elif task.kind == "schema":
        suffix = equal_tokens([row[::-1] for row in rows])
        starts = [end - suffix for end in ends]
    else:
        assert rows[1][: ends[0]] == rows[0] and ends[0] < ends[1]
        rows, starts, ends = rows[1:], ends[:1], ends[1:]
    ids = torch.full((len(rows), max(ends)), 256)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    output = plain_logits(weights, ids)
    if task.kind == "language_modeling":
        span = slice(starts[0] - 1, ends[0] - 1)
        return bool((output.argmax(dim=-1)[0, span] == ids[0, starts[0] : ends[0]]).all()), ends[0]
    losses = F.cross_entropy(output.flatten(0, 1), ids.roll(-1, dims=1).flatten(), reduction="none").view(ids.shape)
    means = [losses[row, starts[row] - 1 : ends[row] - 1].mean().item() for row in range(len(rows))]
    return means.index(min(means)) == data[number]["gold"], max(ends)


def some_tasks() -> list[CoreTask]:
    """Returns tasks of each kind whose prompts are longer than a row, and one whose choices are equal or empty."""
    odd = (
        {"query": "a", "choices": ["boat", "boat town"], "gold": 0},
        {"query": "b", "choices": ["boat town", "boat"], "gold": 0},
        {"query": "c", "choices": ["river", "river"], "gold": 1},
        {"query": "d", "choices": ["rain", "bank", "bank"], "gold": 2},
        {"query": "e", "choices": ["", "wine"], "gold": 0},
        {"query": "f", "choices": ["wine", "  "], "gold": 1},
        {"query": "g", "choices": ["song", "bread"], "gold": 0},
    )
    equal = ({"context_options": ["the rain", "the rain"], "continuation": "is old", "gold": gold} for gold in (0, 1))
    return [
        CoreTask("arc_easy", "multiple_choice", 6, "\nA: ", 0.5, tuple(examples("multiple_choice", 16))),
        CoreTask("winograd", "schema", 4, " ", 0.5, tuple(examples("schema", 16))),
        CoreTask("lambada_openai", "language_modeling", 5, " ", 0.0, tuple(examples("language_modeling", 16))),
        CoreTask("odd", "multiple_choice", 5, " ", 0.5, odd),
        CoreTask("equal", "schema", 0, " ", 0.5, tuple(equal)),
    ]


def in_order(task: CoreTask) -> list[dict]:
    data = list(task.examples)
    random.Random(1337).shuffle(data)
    return data


def trained_weights(layers) -> dict[str, torch.Tensor]:
    """Trains the plain model on texts of the language-modeling task, and loads the weights into the layers."""
    generator, weights = torch.Generator().manual_seed(1), {}
    parameters = {}
    for parameter in placed_parameters(layers):
        place = place_of(parameter)
        name = f"{place.name}.{place.offset[0]}" if place.name in ("resid_lambdas", "x0_lambdas") else place.name
        start = torch.randn(parameter.shape, generator=generator) * 0.2
        start = start + (1 if "resid" in name else 0)
        weights[name], parameters[name] = start.requires_grad_(), parameter
    (task,) = (task for task in some_tasks() if task.kind == "language_modeling")
    data = in_order(task)
    text = "\n\n".join(plain_texts(task, item, [])[1] for item in [*data, *data[::-1], *data]).encode()
    stream = torch.tensor([256, *text])
    optimizer = torch.optim.Adam(weights.values(), lr=0.01)
    for _ in range(STEPS):
        begins = torch.randint(len(stream) - ROW, (8,), generator=generator)
        ids = torch.stack([stream[begin : begin + ROW + 1] for begin in begins])
        loss = F.cross_entropy(plain_logits(weights, ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return {name: weight.detach() for name, weight in weights.items()}


def both_ways():
    config, letters = small_config(model=MODEL, batch={"tokens": ROW * 12}), tokenizer()
    start_collectives(torch.device("cpu"), "gloo", timedelta(seconds=600))
    mesh = build_mesh(torch.device("cpu"), tensor=1, pipeline=1)
    plan = resolve_plan(config, 1, letters.vocab_size)
    layers = build_stage(config, plan, mesh, torch.float32, start=False)
    weights = trained_weights(layers)
    engine = build_evaluation_engine(build_module(list(layers), torch.nn.Identity(), mesh), mesh)
    answers = {}
    for limit in (RowLimit(plan.dims.longest_row), RowLimit(ROW, crop=True)):
        evaluator = Evaluator(engine, plan.dims, mesh, limit, tokens_per_pass=600)
        answers[limit.crop], _ = evaluate_tasks(evaluator, some_tasks(), letters, max_per_task=-1)
    expected, longest = {}, 0
    for task in some_tasks():
        data = in_order(task)
        verdicts = [plain_answer(weights, task, data, number) for number in range(len(data))]
        expected[task.label] = tuple(right for right, _ in verdicts)
        longest = max(longest, *(length for _, length in verdicts))
    messages = []
    for damaged in ("transformer.h.1.mlp.c_proj.weight", "lm_head.weight"):
        parameter = next(p for p in placed_parameters(layers) if place_of(p).name == damaged)
        kept = parameter.detach().clone()
        load_whole(parameter, torch.full_like(parameter, torch.nan))
        for task in some_tasks()[:3]:
            with pytest.raises(UserError) as caught:
                evaluate_tasks(evaluator, [task], letters, max_per_task=-1)
            messages.append((task.label, str(caught.value)))
        load_whole(parameter, kept)
    return expected, answers, longest, messages


@pytest.fixture(scope="module")
def result():
    ((expected, answers, longest, messages),) = run_ranks(both_ways, 1)
    return expected, answers, longest, messages


def test_long_prompts_get_nanochats_answers(result):
    expected, answers, longest, _ = result
    assert {label: answer.right for label, answer in answers[False].items()} == expected
    assert longest > 128, "prompts must be longer than a row and than both windows"
    for label in ("arc_easy", "winograd", "lambada_openai"):
        assert 0 < sum(expected[label]) < len(expected[label]), f"{label} is too uniform to prove anything"
    cropped = {label: answer.right for label, answer in answers[True].items()}
    assert cropped["lambada_openai"] != expected["lambada_openai"], "cropping must make a difference here"


def test_equal_and_empty_choices_are_counted_and_scored_as_nanochat_scores_them(result):
    expected, answers, _, _ = result
    assert {label: answer.ambiguous for label, answer in answers[False].items()} == {
        "arc_easy": 0,
        "winograd": 0,
        "lambada_openai": 0,
        "odd": 6,
        "equal": 2,
    }
    assert sum(expected["equal"]) == 1  # the first of equal choices
    assert not any(answer.left_out for answer in answers[False].values())


def test_weights_that_are_not_numbers_are_reported_in_one_sentence(result):
    *_, messages = result
    assert len(messages) == 6
    for label, message in messages:
        assert message.startswith(f"the model computes NaN on CORE's task {label}, ") and "\n" not in message
