"""Types on the tensor axis: the real step has them, and each planted fault is named with its function and tensor."""

import re

import pytest
import torch

from megachat.kernels import channel_norm, cross_entropy
from megachat.model.gpt import MLP
from megachat.model.lookup import LookupRead
from megachat.optim.row_tables import RowTables
from megachat.parallel import engine, tensor
from megachat.parallel.engine import ZeroAdamW
from megachat.place import Place, place_of, set_place
from tests.tensor_types import TypeFault, check, one_process
from tests.training import small_config

SCALES = ("query", "key", "mlp", "attention", "final", "embedding")


def config(*, sequence: bool = False, size: int = 2, ngram_width: int | None = None):
    """Every kind of parameter in three blocks."""
    return small_config(
        model={"depth": 3, "head_size": 8, "kv_heads": 2, "sequence_len": 64, "norm_scales": SCALES},
        lookup={"after_blocks": (0,), "rows": 400, "max_rows_per_token": 60},
        ngram={"blocks": (0,), "rows": 60, "width": ngram_width},
        parallel={"tensor": size, "sequence": sequence},
        batch={"tokens": None, "accumulation": 1},
    )


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("ngram_width", [None, 8])
def test_every_value_and_gradient_has_its_declared_type(sequence, ngram_width):
    assert check(config(sequence=sequence, ngram_width=ngram_width)) > 150


def no_sum(which: str):
    """tensor.all_reduce that forgets the sums of this name."""
    real = tensor.all_reduce
    return lambda value, axis, *arguments, name: None if name == which else real(value, axis, *arguments, name=name)


def doubled_sum(value, axis, name, real=tensor._sum_over_ranks):
    return real(real(value, axis, name), axis, name)


def identity(value, axis):
    return value.view_as(value)


def summed_gradient(gradient, axis):
    """The gradient of a sum, summed again over equal gradients."""
    return gradient * 2


def forgotten_in_backward(ctx, gradient, real=channel_norm._DividedNorm.backward):
    ctx.add = lambda value: None
    return real(ctx, gradient)


def mlp_with_residual(self, x):
    return self.c_proj(torch.relu(self.c_fc(x)).square()) + x


def without_mask(self, ids):
    local = (ids - self.start).clamp(0, len(self.weight) - 1)
    return tensor._apply(tensor._LEAVE, torch.nn.functional.embedding(local, self.weight), self.axis)


def local_tokens(value, axis):
    return value.chunk(axis.size, dim=1)[axis.rank].contiguous()


def chunk_terms_alone(logits, targets, cap, part, squash=cross_entropy.squash, real=cross_entropy._chunk_terms):
    return real(logits, targets, cap, cross_entropy.VocabularyPart(part.start), squash)


def lookup_without_offset(self, query, ids, real=LookupRead.forward):
    for table in {self.keys, self.values} - {None}:
        place = place_of(table.weight)
        set_place(table.weight, Place(place.name, place.whole, place.block, place.start, place.cut))
    return real(self, query, ids)


def parts_of_the_other_rank(self, name, request):
    return request.wanted * self._parts[name] + (self._parts[name] - 1 - request.tensor_ranks)


def collect_twice(self, name, request, gradient, real=RowTables._collect):
    real(self, name, request, gradient)
    real(self, name, request, gradient)


def reduce_twice(self, real=ZeroAdamW.reduce):
    real(self)
    real(self)


# fault -> (what is replaced, its name, by what, whether with sequence parallelism, the message)
FAULTS = {
    "a partial value + a replicated one": (
        *(MLP, "forward", mlp_with_residual, False),
        "what leave on the output of block 0 mlp takes should be partial, but is different on each rank",
    ),
    "a forgotten sum out of a region": (
        *(tensor._LEAVE, "forward", identity, False),
        "what leave on the output of embed wte returns should be replicated, but is partial",
    ),
    "a sum that is done twice": (
        *(tensor, "_sum_over_ranks", doubled_sum, False),
        "what leave on the output of embed wte returns should be replicated, but is equal on all ranks, but 2 times",
    ),
    "a table that does not mask the ids of other ranks": (
        *(tensor._VocabularyTable, "forward", without_mask, False),
        "what leave on the output of embed wte takes should be partial, but",
    ),
    "a region's output that is cut and not summed": (
        *(tensor._SCATTER_TOKENS, "forward", local_tokens, True),
        "what scatter_tokens on the output of block 0 attn returns should be cut along dim 1, but is cut into parts",
    ),
    "a loss without its sum": (
        *(tensor, "all_reduce", no_sum("sum over the vocabulary"), False),
        "the sum over the ranks in loss should be replicated, but is partial",
    ),
    "a loss that does not call its sum": (
        *(cross_entropy, "_chunk_terms", chunk_terms_alone, False),
        "the loss should be replicated, but is different on each rank",
    ),
    "a norm over channels without its sum": (
        *(tensor, "all_reduce", no_sum("sum of squares of a norm"), False),
        "the sum over the ranks in block 0 lookup.mix.norm should be replicated, but is partial",
    ),
    "a lookup that reads the rows of rank 0": (
        *(LookupRead, "forward", lookup_without_offset, False),
        "what leave on the output of block 0 lookup.read takes should be partial, but",
    ),
    "n-gram columns of another rank": (
        *(RowTables, "_wanted_parts", parts_of_the_other_rank, False),
        "rows read from ngram.0.2.weight should be cut along dim 2, but is cut into parts that are not those",
    ),
    "a forgotten sum of gradients into a region": (
        *(tensor._ENTER, "backward", lambda gradient, axis: gradient, False),
        "the gradient of what enter on the output of head takes should be replicated, but is partial",
    ),
    "gradients that are summed twice": (
        *(tensor._LEAVE, "backward", summed_gradient, False),
        "the gradient of the output of block 2 mlp.c_proj should be replicated, but is equal on all ranks, but 2 times",
    ),
    "gradients of tokens that are cut and not summed": (
        *(tensor._GATHER_TOKENS, "backward", local_tokens, True),
        "the gradient of what gather_tokens on the output of head takes should be cut along dim 1, but",
    ),
    "gradients of tokens that are not gathered": (
        *(tensor._SLICE, "backward", lambda gradient, axis: torch.cat([gradient] * axis.size, 1), True),
        "the gradient of what slice on the output of embed takes should be replicated, but is different",
    ),
    "a norm over channels whose gradient lacks its sum": (
        *(channel_norm._DividedNorm, "backward", staticmethod(forgotten_in_backward), False),
        "the gradient of the output of block 0 lookup.mix.w_up should be cut along dim 2, but",
    ),
    "gradients of sparse rows that are counted twice": (
        *(RowTables, "_collect", collect_twice, False),
        "the gradient of ngram.0.2.weight should be partial, but is different on each rank, and the sum is 2 times",
    ),
    "a parameter that is not marked as used by each rank's tokens": (
        *(tensor, "mark_partial_over_tensor", lambda parameter: None, True),
        "the gradient of final_scale should be replicated, but is partial",
    ),
    "gradients of such parameters that are summed twice": (
        *(ZeroAdamW, "reduce", reduce_twice, True),
        "the reduced gradient of resid_lambdas should be replicated, but is equal on all ranks, but 2 times",
    ),
    "a replicated gradient that the norm counts on every rank": (
        *(engine, "is_counted_copy", lambda parameter, rank: True, False),
        "the squares of AdamW's gradients in the norm should be partial, but",
    ),
    "a cut gradient that the norm counts on one rank": (
        *(engine, "is_counted_copy", lambda parameter, rank: rank == 0, False),
        "the squares of AdamW's gradients in the norm should be partial, but",
    ),
}


@pytest.fixture(scope="module")
def whole():
    return one_process(config())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault, whole, monkeypatch):
    target, name, replacement, sequence, message = FAULTS[fault]
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(TypeFault, match=f"^{re.escape(message)}"):
        check(config(sequence=sequence), whole)


def test_ranks_that_call_different_collectives_are_named(whole, monkeypatch):
    real = tensor._sum_over_ranks
    monkeypatch.setattr(tensor, "_sum_over_ranks", lambda *inputs: inputs[0] if inputs[1].rank else real(*inputs))
    with pytest.raises(TypeFault, match="^the ranks call different collectives: all_reduce"):
        check(config(), whole)
