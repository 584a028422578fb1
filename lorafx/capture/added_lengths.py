"""The lengths of all layers' caches grow by one operator, at the end of the graph.

    before      n1 = N1 + 1; n2 = N2 + 1; ...     AOTAutograd overwrites N1 with n1 after the graph
    after       add_each_([N1, N2, ...], 1)       the graph returns N1, N2, ...

A static cache keeps the number of its tokens in a tensor for each layer. Inductor would lower,
schedule and write an addition for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lorafx.capture.written_back import described_results
from lorafx.kernels.ops.add_each_op import ADD_EACH
from lorafx.op_arguments import bound
from lorafx.program.frame import fake_value
from lorafx.torch_internals.aot_autograd import InputMutationAOTOutput, PlainAOTOutput
from lorafx.torch_internals.frames import inputs_given_back

aten = torch.ops.aten


def add_lengths(gm: fx.GraphModule) -> int:
    """Have one operator add the same number, in place, to all inputs of `gm` that are overwritten
    with such a sum. Returns to how many inputs a number is added so.

    Only on a CPU, as for outlined layers that write into a cache (lorafx.capture.written_back).
    """
    output = gm.graph.output_node()
    sums: dict[Any, list[fx.Node]] = {}
    for node in _overwriting(gm):
        sums.setdefault(bound(node)["other"], []).append(node)
    edits = 0
    for number, nodes in sums.items():
        if len(nodes) < 2:
            continue
        lengths = [bound(node)["self"] for node in nodes]
        with gm.graph.inserting_before(output):
            gm.graph.call_function(ADD_EACH, (lengths, number))
        for node, length in zip(nodes, lengths, strict=True):
            node.replace_all_uses_with(length)
            gm.graph.erase_node(node)
        edits += len(nodes)
    if edits:
        gm.graph.lint()
        gm.recompile()
    return edits


def _overwriting(gm: fx.GraphModule) -> list[fx.Node]:
    """Sums of an input and a number which are read for nothing but to overwrite that input."""
    output = gm.graph.output_node()
    unread = inputs_given_back()
    places: dict[fx.Node, list[Any]] = {}
    for item, desc in described_results(gm):
        if isinstance(desc, PlainAOTOutput) and desc.idx in unread:
            continue
        if isinstance(item, fx.Node):
            place = desc.mutated_input if isinstance(desc, InputMutationAOTOutput) else None
            places.setdefault(item, []).append(place)
    return [
        item
        for item, found in places.items()
        if set(item.users) == {output}
        and _is_longer(item)
        and found == [bound(item)["self"].meta.get("desc")]
        and not _returned(bound(item)["self"], item, output)
    ]


def _returned(length: fx.Node, total: fx.Node, output: fx.Node) -> bool:
    """Whether the length from before may be returned too: Inductor takes copies that change nothing
    for what they are of, which is overwritten by then."""
    dtype, found = fake_value(length).dtype, [length]
    met = {total}
    while found:
        for user in found.pop().users:
            if user is output:
                return True
            value = None if user in met else fake_value(user)
            met.add(user)
            several = isinstance(value, (tuple, list))
            if several or (isinstance(value, Tensor) and value.dtype == dtype):
                found.append(user)
    return False


def _is_longer(node: fx.Node) -> bool:
    """Whether it is the sum of an input, one integer on a CPU, and a number."""
    if node.target is not aten.add.Tensor:
        return False
    given = bound(node)
    length, number = given["self"], given["other"]
    if not isinstance(length, fx.Node) or length.op != "placeholder":
        return False
    value, total = fake_value(length), fake_value(node)
    return (
        given["alpha"] == 1
        and _is_number(number)
        and value.device.type == "cpu"
        and value.ndim == 0
        and value.dtype == total.dtype
        and not (value.is_floating_point() or value.is_complex())
    )


def _is_number(item: Any) -> bool:
    value = fake_value(item) if isinstance(item, fx.Node) else item
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
