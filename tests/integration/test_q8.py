"""The q8 all-reduce between real processes: the same bits on all members, the oracle's, within the documented bound."""

import random

import mesh_workers
import pytest
import torch
from mesh_workers import Crew, Site
from torch import Tensor

from elastic_run.collectives.errors import CollectiveAborted
from elastic_run.collectives.options import MIB, MeshOptions
from elastic_run.collectives.quantised import BLOCK_ELEMENTS, decode, encode, encoded_bytes, error_bound
from elastic_run.collectives.reduction import Reduction

TRANSPORTS = {"shared memory": MeshOptions(), "tcp": MeshOptions(shared_memory=False)}
OPERATION_S = 60.0
ROUNDINGS = {torch.float64: 2.0**-24, torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative error of bringing a float32 result into the type, or (float64) the value into float32."""


def member_values(member: int, numel: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A bell curve of another scale per block; here and there an infinity, a NaN, a block of zeros."""
    generator = torch.Generator().manual_seed(1000 * seed + member)
    values = torch.randn(numel, generator=generator)
    for block, piece in enumerate(values.split(BLOCK_ELEMENTS)):
        piece.mul_(2.0 ** int(torch.randint(-4, 5, (), generator=generator)))
        match (block + seed) % 7:
            case 1 if member == 0:
                piece[len(piece) // 2 :][:1] = torch.inf
            case 3 if member == 1:
                piece[:1] = torch.nan
            case 5:
                piece.zero_()
    return values.to(dtype)


def coded(values: Tensor) -> Tensor:
    """What is left of float32 values that went through the code."""
    encode(values, code := torch.empty(encoded_bytes(values.numel()), dtype=torch.uint8))
    decode(code, out := torch.empty(values.numel()))
    return out


def expected(inputs: list[Tensor], reduction: Reduction) -> Tensor:
    """By definition: decoded parts are summed in rank order, the sum is coded again."""
    total = torch.zeros(inputs[0].numel())
    for values in inputs:
        total += coded(values.to(torch.float32))
    return coded(total / len(inputs) if reduction is Reduction.AVG else total).to(inputs[0].dtype)


def check_bound(result: Tensor, inputs: list[Tensor], reduction: Reduction) -> None:
    """Every finite block is within the bound of the exact sum; every other is NaN throughout."""
    stacked = torch.stack(inputs).to(torch.float64)
    divisor = len(inputs) if reduction is Reduction.AVG else 1
    blocks = zip(result.split(BLOCK_ELEMENTS), stacked.split(BLOCK_ELEMENTS, dim=1), strict=True)
    for block, values in blocks if len(result) else ():
        if not bool(values.isfinite().all()):
            assert bool(block.isnan().all())
            continue
        exact = values.sum(dim=0) / divisor
        peaks = values.abs().amax(dim=1, keepdim=True)
        limit = error_bound(peaks) / divisor + peaks.sum() * 2 * ROUNDINGS[result.dtype]
        assert bool(((block.to(torch.float64) - exact).abs() <= limit).all())


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one, nan=12345.0), torch.nan_to_num(other, nan=12345.0))


def random_operations(site: Site) -> list[bytes]:
    group, chance, digests = site.install(), random.Random(len(site.endpoints)), []
    for seed in range(14):
        numel = chance.choice([0, 1, 255, 256, 257, 3000, 20_001, 131_072 + 77, 700_001])
        dtype = chance.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
        reduction = chance.choice([Reduction.SUM, Reduction.AVG])
        inputs = [member_values(member, numel, dtype, seed) for member in range(group.size)]
        mine = inputs[group.rank].clone()
        tensors = list(mine.split(max(1, numel // 3))) if chance.random() < 0.3 and numel else [mine]
        group.all_reduce_q8(tensors, reduction, sync=chance.random() < 0.5).wait(OPERATION_S)
        assert same_bits(mine, expected(inputs, reduction)), (numel, dtype, reduction)
        check_bound(mine, inputs, reduction)
        digests.append(bytes(mine.view(torch.uint8).tolist()) if numel < 4000 else b"")
    group.barrier().wait(OPERATION_S)
    return digests


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_members_have_the_same_bits_within_the_bound(size: int, transport: str) -> None:
    results = mesh_workers.run(size, random_operations, TRANSPORTS[transport])
    assert results == [results[0]] * size


def reduce_until_aborted(site: Site) -> str | None:
    group, numel = site.install(), 4 * MIB
    given = torch.randn(numel, generator=torch.Generator().manual_seed(group.rank))
    value, right = given.clone(), None
    for count in range(10_000):
        value.copy_(given)
        try:
            group.all_reduce_q8([value], sync=count % 2 == 0).wait(OPERATION_S)
        except CollectiveAborted as error:
            assert torch.equal(value, given)
            site.tell(("over", error.culprit))
            site.hear()
            return error.culprit
        right = value.clone() if right is None else right
        assert torch.equal(value, right)
        if count == 1:
            site.tell("under way")
    raise AssertionError("nobody interrupted it")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_member_is_named_and_the_value_is_unchanged(transport: str) -> None:
    with Crew(3, reduce_until_aborted, TRANSPORTS[transport]) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "under way"
        crew.signal(2)
        survivors = [crew.hear(rank) for rank in (0, 1)]
        for rank in (0, 1):
            crew.tell(rank, "leave")
            crew.result(rank)
    assert survivors == [("over", "w2")] * 2


def test_what_has_no_8_bit_code_is_refused() -> None:
    with mesh_workers.meshes(1) as [mesh]:
        group = mesh.install(mesh_workers.DataView(number=1, members=(mesh.endpoint,)))
        with pytest.raises(ValueError, match="q8 takes"):
            group.all_reduce_q8([torch.zeros(3, dtype=torch.int32)])
        with pytest.raises(ValueError, match="q8 sums or averages"):
            group.all_reduce_q8([torch.zeros(3)], Reduction.MAX)
