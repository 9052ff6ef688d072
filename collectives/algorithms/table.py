"""Every algorithm under the name a group calls it by; rooted and gathering ones choose by size and layout here.

Not here: which size and layout takes which (selection.py).
"""

from collections.abc import Callable

from torch import Tensor

from elastic_run.collectives.algorithms import (
    chain,
    direct,
    exchange,
    hierarchical,
    pairwise,
    piped,
    ring,
    shared,
    staged,
    streamed,
)
from elastic_run.collectives.algorithms.direct import all_to_all, gather, receive, scatter, send
from elastic_run.collectives.algorithms.exchange import barrier
from elastic_run.collectives.algorithms.quantised_all_reduce import all_reduce as all_reduce_q8
from elastic_run.collectives.algorithms.tree_exact import all_reduce as all_reduce_exact
from elastic_run.collectives.channel import Channel
from elastic_run.collectives.operation import Algorithm
from elastic_run.collectives.reduction import Reduction
from elastic_run.collectives.selection import Form, Method, form_of

ALL_REDUCE: dict[Method, Callable[[Channel, Tensor, Reduction], Algorithm]] = {
    Method.EXCHANGE: exchange.all_reduce,
    Method.SHARED_ONCE: shared.all_reduce_once,
    Method.SHARED: shared.all_reduce,
    Method.STREAMED: streamed.all_reduce,
    Method.PIPED: piped.all_reduce,
    Method.PAIRWISE: pairwise.all_reduce,
    Method.RING: ring.all_reduce,
    Method.HIERARCHICAL: hierarchical.all_reduce,
}


def broadcast(io: Channel, data: Tensor, root: int) -> Algorithm:
    """Copy the root's `data` to every member."""
    forms = {Form.DIRECT: direct.broadcast, Form.STAGED: staged.broadcast, Form.CHUNKED: chain.broadcast}
    return forms[_form(io, data)](io, data, root)


def reduce(io: Channel, data: Tensor, root: int, reduction: Reduction) -> Algorithm:
    """Reduce everybody's `data` into the root's."""
    forms = {Form.DIRECT: direct.reduce, Form.STAGED: staged.reduce, Form.CHUNKED: pairwise.reduce}
    return forms[_form(io, data)](io, data, root, reduction)


def all_gather(io: Channel, output: Tensor, data: Tensor) -> Algorithm:
    """Put every member's `data` into `output`, by rank."""
    forms = {Form.DIRECT: direct.all_gather, Form.STAGED: staged.all_gather, Form.CHUNKED: direct.all_gather}
    return forms[_form(io, data)](io, output, data)


def reduce_scatter(io: Channel, output: Tensor, data: Tensor, reduction: Reduction) -> Algorithm:
    """Reduce this member's row of everybody's `data` into `output`."""
    forms = {
        Form.DIRECT: direct.reduce_scatter,
        Form.STAGED: staged.reduce_scatter,
        Form.CHUNKED: pairwise.reduce_scatter,
    }
    return forms[_form(io, data)](io, output, data, reduction)


def _form(io: Channel, data: Tensor) -> Form:
    return form_of(data.numel() * data.element_size(), io.layout, io.options)


__all__ = [
    "ALL_REDUCE",
    "all_gather",
    "all_reduce_exact",
    "all_reduce_q8",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "receive",
    "reduce",
    "reduce_scatter",
    "scatter",
    "send",
]
