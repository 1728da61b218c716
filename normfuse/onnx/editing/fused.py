"""Operations of several parts, of which folding knows the first: what ONNX Runtime fuses, and recurrent layers."""

from __future__ import annotations

import torch

from .calls import Call, aten, unknown_operation
from .operations import channelwise, convolution, product, weight_of
from .restored import WITH_SCALES
from .translating import operation

_MICROSOFT = "com.microsoft"
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@operation("FusedMatMul", domain=_MICROSOFT)
def _fused_matmul(call: Call) -> bool:
    """A product of two values, either of which may be transposed; a factor."""
    ranks = [len(call.shape(place)) for place in (0, 1)]
    if call.get("transBatchA", 0) or call.get("transBatchB", 0) or min(ranks) < 2:
        return False
    constant = next((place for place in (1, 0) if call.is_constant(place)), None)
    if constant is None and call.get("alpha", 1.0) != 1:
        return False  # an average's shift would be multiplied as well
    factors, slots = list(call.operands), []
    for place, name in enumerate(("transA", "transB")):
        turned = bool(call.get(name, 0))
        if place == constant:
            factors[place], slot = weight_of(call, place, transposed=turned, argument=place)
            slots.append(slot)
        elif turned:
            factors[place] = call.step(aten.transpose.int, factors[place], -1, -2)
    return call.emit(aten.matmul.default, *factors, slots=slots)


@operation(*WITH_SCALES, domain=_MICROSOFT)
def _product_with_scales(call: Call) -> bool:
    """With quantised weights; MatMulNBits has a bias only in newer versions of ONNX Runtime, so that it gets none."""
    kind = call.node.op_type
    scales, place = WITH_SCALES[kind]
    bias = call.operand(place)
    if call.restored is None or (bias is not None and not call.is_constant(place)):
        return False
    read = [None if number in (scales, place) else operand for number, operand in enumerate(call.operands)]
    value = call.step(unknown_operation(kind), read, value=call.result())
    if bias is not None or kind != "MatMulNBits":
        return channelwise(call, value, bias, operand=place)
    return call.scale_channels(value, *call.factor(1, 1))


@operation("FusedGemm", domain=_MICROSOFT)
def _fused_gemm(call: Call) -> bool:
    """A product with a bias, and an activation."""
    part = product(call, call.step)
    return bool(part) and call.opaque([part], {0, 1, 2})


@operation("FusedConv", domain=_MICROSOFT)
def _fused_conv(call: Call) -> bool:
    """A convolution, perhaps a residual, and an activation."""
    target, args = convolution(call)
    if target is None:
        return False
    read = {number for number in (0, 1, 2) if number < len(call.operands)}
    return call.opaque([call.step(target, *args, optional={2: 2})], read)


@operation("Attention", domain=_MICROSOFT)
def _attention(call: Call) -> bool:
    """Its product with the weights of queries, keys and values."""
    if not call.is_constant(1) or len(call.shape(1)) != 2:
        return False
    if call.operand(2) is not None and not call.is_constant(2):
        return False
    weight, slot = weight_of(call, 1, transposed=True)
    slots = [slot, call.slot(2, 2)]
    return call.opaque(
        [call.step(aten.linear.default, call.operands[0], weight, call.operand(2), slots=slots)], {0, 1, 2}
    )


@operation(*_GATES)
def _recurrent(call: Call) -> bool:
    """The product of every step's input: weights [directions, gates, inputs], biases [directions, 2 * gates]."""
    biases = call.number(3)
    if not call.is_constant(1) or (call.operand(3) is not None and biases is None):
        return False
    directions, rows, width = call.shape(1)
    weight = call.derived(aten.reshape.default, call.operands[1], [directions * rows, width])
    bias, rest = None, torch.zeros(directions, rows)
    if biases is not None:
        half = call.derived(aten.slice.Tensor, call.operands[3], 1, 0, rows)
        bias = call.derived(aten.reshape.default, half, [-1])
        rest = torch.tensor(biases[:, rows:])

    def unfold(value: torch.Tensor) -> torch.Tensor:
        return value.reshape(directions, rows, width)

    def unfold_bias(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value.reshape(directions, rows), rest.to(value.dtype)], 1)

    slots = [call.slot(1, 1, store=unfold), call.slot(2, 3, store=unfold_bias, required=bias is not None)]
    return call.opaque([call.step(aten.linear.default, call.operands[0], weight, bias, slots=slots)], {0, 1, 3})
