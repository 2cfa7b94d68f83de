# SPDX-License-Identifier: Apache-2.0
"""Error-compensated rounding of one decoder layer: each linear is rounded for the input it will
read at run time.

Two copies of the calibration's hidden states travel through the model: one through the layers as
they are served (codes, scales and quantized activations), and, for asymmetric calibration, one
through the transformed layers in full precision. Within a layer the linears are rounded in the
order data reaches them (qkv, o, gate and up, down), and each group reads what the already rounded
ones before it produce.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from smoothrot_offline import ranks
from smoothrot_offline.learn.fisher import MOST_OUTPUTS
from smoothrot_offline.rounding.gptq import HessianAccumulator, quantize_gptq
from smoothrot_offline.rounding.rtn import QuantizedWeight
from smoothrot_offline.rounding.served import BuiltLayer, quantizers, rotations
from smoothrot_offline.source.architecture import Architecture
from smoothrot_offline.source.family import ModelSpec
from smoothrot_offline.source.layers import CHUNK_TOKENS, LayerRunner
from smoothrot_vllm.format import QuantizationSchema

_log = logging.getLogger(__name__)


class SequentialRounding:
    """Rounds the layers of one model in order; keeps the hidden states that the next layer reads.

    Args:
        runner: builds single decoder layers.
        schema: how each linear is quantized.
        hidden: float32 ``(samples, seqlen, spec.stream)``, the transformed embedding of the
            calibration tokens, of this rank's sequences; it is changed.
        asymmetric: aim at the full-precision model's outputs (GPTAQ, arXiv 2504.02692; Qronos,
            arXiv 2505.11695) rather than at those of the rounded model's own inputs (GPTQ, arXiv
            2210.17323).
        propagation: share of the earlier layers' error that asymmetric calibration makes up for;
            all of it follows the noise of the calibration text.
        token_weights: of each layer, by linear, float32 ``(tokens,)``: how much each token counts;
            those of a linear that is not named count once.
        qronos, act_order, damping: see
            :func:`~smoothrot_offline.rounding.gptq.quantize_gptq`.
    """

    def __init__(
        self,
        runner: LayerRunner,
        schema: QuantizationSchema,
        hidden: torch.Tensor,
        *,
        asymmetric: bool,
        propagation: float,
        token_weights: Sequence[Mapping[str, torch.Tensor]],
        qronos: bool,
        act_order: bool,
        damping: float,
    ) -> None:
        self._runner = runner
        self._spec = runner.spec
        self._schema = schema
        self._hidden = hidden
        self._asymmetric = asymmetric
        self._propagation = propagation
        self._token_weights = token_weights
        self._qronos = qronos
        self._exact = hidden.clone() if asymmetric else hidden
        self._act_order = act_order
        self._damping = damping

    def state(self) -> dict[str, torch.Tensor]:
        """What the next layer depends on, by name: the hidden states as served and, if
        asymmetric, in full precision."""
        return {"hidden": self._hidden} | ({"exact": self._exact} if self._asymmetric else {})

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from a :meth:`state` that was kept."""
        self._hidden = state["hidden"]
        self._exact = state.get("exact", self._hidden)

    def layer(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        output_moments: Mapping[str, torch.Tensor],
    ) -> dict[str, QuantizedWeight]:
        """Round decoder layer ``index`` and move the hidden states past it.

        Args:
            index: which layer; call in order.
            tensors: the transformed layer's tensors by names relative to it, any float dtype.
            output_moments: by linear, what ``outputs`` of
                :func:`~smoothrot_offline.rounding.gptq.quantize_gptq` is; output channels of a
                linear that is not named are rounded each by itself.

        Returns:
            The codes and scales of each quantized linear, named relative to the layer.
        """
        prefix, table = self._spec.layer_prefix(index), self._spec.layer_table(index)
        online = self._schema.online
        schemes = {linear: self._schema.scheme(prefix + linear) for linear in table.linears}
        turned = rotations(table, online)
        maps = turned | quantizers(schemes, online)
        copies = [BuiltLayer(*self._runner.build(index, tensors), self._spec, table, maps)]
        if self._asymmetric:
            copies.append(
                BuiltLayer(*self._runner.build(index, tensors), self._spec, table, turned)
            )
        rounded: dict[str, QuantizedWeight] = {}
        weights = self._token_weights[index] if self._token_weights else {}

        def round_group(group: tuple[str, ...], inputs: Iterable[Sequence[torch.Tensor]]) -> None:
            """Round linears that read one input: a chunk at a time, as served and, if
            asymmetric, in full precision."""
            quantized = [linear for linear in group if schemes[linear] is not None]
            if not quantized:
                return
            # Without weights of its own a linear has the statistics of its group.
            own = {linear: linear if linear in weights else group[0] for linear in quantized}
            statistics = {
                key: HessianAccumulator(
                    tensors[f"{key}.weight"].shape[1], self._asymmetric, self._hidden.device
                )
                for key in dict.fromkeys(own.values())
            }
            first = 0
            for chunk in inputs:
                last = first + chunk[0].flatten(0, -2).shape[0]
                for key, found in statistics.items():
                    found.add(*chunk, weights=weights[key][first:last] if key in weights else None)
                first = last
            for found in statistics.values():
                found.reduce()
            pieces = (
                partial(
                    self._round,
                    prefix + linear,
                    tensors[f"{linear}.weight"],
                    statistics[own[linear]],
                    outputs=output_moments.get(linear),
                )
                for linear in quantized
            )
            for linear, done in zip(quantized, ranks.shared_out(pieces), strict=True):
                rounded[linear] = done
                copies[0].set_weight(linear, done.dequantize())

        def inputs_of(
            part: Callable[[BuiltLayer, torch.Tensor], torch.Tensor],
        ) -> Iterator[list[torch.Tensor]]:
            """What a part of each copy of the layer gives, a chunk at a time."""
            for chunk in self._chunks():
                yield [part(copy, hidden) for copy, hidden in zip(copies, chunk, strict=True)]

        qkv, *inner, output = table.attention_groups()
        with torch.no_grad():
            round_group(qkv, inputs_of(BuiltLayer.attention_input))
            for group in inner:
                round_group(group, inputs_of(_attending(group[0])))
            attended = list(inputs_of(BuiltLayer.output_input))
            round_group(output, attended)
            for chunk, inputs in zip(self._chunks(), attended, strict=True):
                for copy, hidden, read in zip(copies, chunk, inputs, strict=True):
                    hidden.copy_(copy.middle(hidden, read))
            del attended
            for group in table.common_groups():
                round_group(group, inputs_of(_reading(group[0])))
            if table.experts is not None:
                self._round_experts(index, tensors, copies, rounded)
            for chunk in self._chunks():
                for copy, hidden in zip(copies, chunk, strict=True):
                    hidden.copy_(copy.finish(hidden))
        return rounded

    def _round_experts(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        copies: Sequence[BuiltLayer],
        rounded: dict[str, QuantizedWeight],
    ) -> None:
        """Round gate and up of every expert, then down, each for the tokens that the served layer
        routes to it.

        In full precision the experts are those of the same tokens, whatever its own router says.
        The fewer tokens an expert has than inputs, the more its H is damped; with none it is
        rounded to nearest.
        """
        served = copies[0]
        few: dict[int, int] = {}
        for groups in self._spec.layer_table(index).expert_groups():
            channels = tensors[f"{groups[0][0]}.weight"].shape[1]
            statistics = {
                group[0]: HessianAccumulator(channels, self._asymmetric, self._hidden.device)
                for group in groups
            }
            for hidden, *exact in self._chunks():
                inputs, routing = served.expert_inputs(hidden, statistics)
                targets = [
                    copy.expert_inputs(h, statistics, routing)[0]
                    for copy, h in zip(copies[1:], exact, strict=True)
                ]
                for first, x in inputs.items():
                    statistics[first].add(x, *(target[first] for target in targets))
            pieces = self._expert_pieces(index, tensors, groups, statistics, few)
            linears = [linear for group in groups for linear in group]
            for linear, done in zip(linears, ranks.shared_out(pieces), strict=True):
                rounded[linear] = done
                served.set_weight(linear, done.dequantize())
        _warn_of_few_tokens(index, few)

    def _expert_pieces(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        groups: Sequence[tuple[str, ...]],
        statistics: dict[str, HessianAccumulator],
        few: dict[int, int],
    ) -> Iterator[Callable[[], QuantizedWeight]]:
        """The rounding of each linear; ``statistics``, by the first of a group, are let go of, and
        ``few`` gets the tokens of experts that had too few."""
        for expert, group in enumerate(groups):
            seen = statistics.pop(group[0])
            seen.reduce()
            channels = tensors[f"{group[0]}.weight"].shape[1]
            if seen.tokens < channels:
                few[expert] = seen.tokens
            for linear in group:
                name, weight = self._spec.layer_prefix(index) + linear, tensors[f"{linear}.weight"]
                shortage = channels / max(1, seen.tokens)
                yield partial(self._round, name, weight, seen, shortage=shortage)

    def _round(
        self,
        name: str,
        weight: torch.Tensor,
        statistics: HessianAccumulator,
        *,
        shortage: float = 1.0,
        outputs: torch.Tensor | None = None,
    ) -> QuantizedWeight:
        """Round for what was gathered; ``shortage`` above one multiplies the damping."""
        scheme = self._schema.scheme(name)
        assert scheme is not None
        cross = statistics.cross
        return quantize_gptq(
            weight,
            statistics.hessian,
            scheme.weights,
            act_order=self._act_order,
            damping=self._damping * max(1.0, shortage),
            cross=None if cross is None else cross * self._propagation,
            qronos=self._qronos,
            outputs=outputs,
            name=f"{name}.weight",
        )

    def _chunks(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """The hidden states a few sequences at a time: as served, and in full precision if
        asymmetric."""
        step = max(1, CHUNK_TOKENS // self._hidden.shape[1])
        streams = [self._hidden, self._exact] if self._asymmetric else [self._hidden]
        return zip(*(stream.split(step) for stream in streams), strict=True)


_FACTORIZING = 3
"""Operations in float32 that take as long as factorizing a matrix in float64 and inverting the
factor, by the cube of its order: as measured on one core for orders of 4096 and 8192."""


def rounding_flop(
    spec: ModelSpec, tokens: int, asymmetric: bool, weighed: bool, related: bool
) -> float:
    """Floating-point operations of error-compensated rounding beside the passes of the tokens: an
    H, or two, of each input, or of each linear where tokens are weighed; then for each linear, and
    each expert's, its factorization, and the errors carried, between output channels too where
    those are related."""

    def gathered_of(table: Architecture) -> int:
        shapes = [spec.linear_shape(linear, table) for linear in table.linears]
        return sum(shape[1] ** 2 for shape in (shapes if weighed else set(shapes)))

    def rounded_of(table: Architecture) -> float:
        shapes = [spec.linear_shape(linear, table) for linear in table.linears]
        found = sum(_FACTORIZING * k**3 + 2 * n * k**2 for n, k in shapes)
        most = MOST_OUTPUTS if related else 0
        return found + sum(n**3 / 3 + k * n**2 for n, k in shapes if n <= most)

    inputs, rounded = max(map(gathered_of, spec.tables)), max(map(rounded_of, spec.tables))
    chosen = spec.config.num_experts_per_tok if spec.experts else 1
    matrices = 2 if asymmetric else 1
    return matrices * spec.layers * (tokens * 2 * inputs * chosen + rounded)


def _attending(linear: str) -> Callable[[BuiltLayer, torch.Tensor], torch.Tensor]:
    return lambda copy, hidden: copy.attention_part_input(linear, hidden)


def _reading(linear: str) -> Callable[[BuiltLayer, torch.Tensor], torch.Tensor]:
    return lambda copy, middle: copy.feed_forward_input(linear, middle)


def _warn_of_few_tokens(index: int, few: Mapping[int, int]) -> None:
    if few:
        named = ", ".join(f"{expert} ({tokens})" for expert, tokens in sorted(few.items()))
        _log.warning(
            "decoder layer %d: fewer calibration tokens than inputs were routed to these experts"
            " (tokens): %s. Their rounding follows the calibration less, and that of an expert"
            " without a token not at all. Use a longer or more varied text (--calib,"
            " --calib-samples) if they matter.",
            index,
            named,
        )
