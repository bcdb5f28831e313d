"""Passes of the backbone's layers as CUDA graphs, captured once per shape: summaries, whole segments, and training.

A graph replaces the hundreds of launches of a pass, which on a GPU take longer than what they launch. In training the
graph of the backward pass recomputes the layers from their input, so that one segment's activations exist at any depth.
A text's ragged last segment runs as a whole one, whose other positions it does not see. Passes with padding or a cache
take the ordinary path. Gradients of one model are to be computed by one backward pass at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from hmt import capture
from hmt.backbone import run_layers
from hmt.remat import offloaded

if TYPE_CHECKING:
    from hmt.model import HMTForCausalLM

KEPT_GRAPHS = 8  # of different shapes
KEPT_SETTINGS = 3  # of a model: training and evaluation, say, or with autocast and without
Layers = Callable[..., Tensor]  # called like hidden_states


class _Layers(nn.Module):
    """`run_layers` as a module, so that it can run with other tensors in place of the backbone's parameters."""

    def __init__(self, backbone: PreTrainedModel, last_rows: int):
        super().__init__()
        self.backbone, self.last_rows = backbone, last_rows

    def forward(self, embeds: Tensor) -> Tensor:
        with capture.static_checkpoints(self.backbone):
            return run_layers(self.backbone, embeds, last_rows=self.last_rows).last_hidden_state


@dataclass
class LayerGraph:
    """The layers on [B, T, d] embeddings, and the hidden states of their last positions.

    Fewer rows, and rows with fewer positions, which no position after them can change, run as well.
    """

    turn: capture.Turn  # of `run`; `run_back` is called with it taken
    embeds: Tensor
    hidden: Tensor
    forward: Callable[[], object]
    d_hidden: Tensor | None = None  # of training
    d_embeds: Tensor | None = None
    backward: Callable[[], object] | None = None

    def run(self, embeds: Tensor, last_rows: int) -> Tensor:
        """Hidden states of the last positions of `embeds`."""
        rows, length, _ = embeds.shape
        with self.turn:
            self.embeds[:rows, :length].copy_(embeds)
            self.embeds[:rows, length:].zero_()  # whatever is left there must be finite
            self.forward()
            return self.hidden[:rows, :last_rows].clone()  # the next pass overwrites the buffer

    def run_back(self, embeds: Tensor, d_hidden: Tensor) -> Tensor:
        """Gradient of the embeddings; those of the weights are added to their sums."""
        rows, length, _ = embeds.shape
        self.embeds.zero_()
        self.embeds[:rows, :length].copy_(embeds)
        self.d_hidden.zero_()[:rows, : d_hidden.shape[1]].copy_(d_hidden)  # type: ignore[union-attr]
        self.backward()  # type: ignore[misc]
        return self.d_embeds[:rows, :length].clone()  # type: ignore[index]


@dataclass
class LayerGraphs:
    """The graphs of a model, by shape, and the sums of its weights' gradients."""

    turn: capture.Turn
    graphs: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    uses: dict[tuple[Any, ...], int] = field(default_factory=dict)  # of a shape since its graph was dropped, if ever
    made: dict[tuple[Any, ...], int] = field(default_factory=dict)  # how often a shape has been captured
    sums: dict[str, Tensor] = field(default_factory=dict)  # by the names of the weights that the outputs depend on
    summed: int | None = None  # the backward pass that the sums are of, while it is under way
    begun: set[int] = field(default_factory=set)  # backward passes whose sums have not been delivered
    pool: Any = None  # of memory, shared: no graph leaves anything in it for another

    def find(self, model: HMTForCausalLM, shape: tuple[int, int], last_rows: int) -> LayerGraph | None:
        """The graph for embeddings of this shape [B, T], captured when it is needed; None: the ordinary path."""
        weight = model.get_input_embeddings().weight
        training = torch.is_grad_enabled()
        if training and not model.config.cuda_graphs:
            return None  # it takes memory for a second set of gradients
        key = (shape, last_rows, weight.dtype, weight.device, training)
        self.uses[key] = self.uses.get(key, 0) + 1
        # shapes that push each other out are captured ever more rarely
        enough = capture.USES_BEFORE * 4 ** self.made.get(key, 0)
        if key not in self.graphs and model.config.cuda_graphs is None and self.uses[key] <= enough:
            return None
        return self.get(model, key, partial(self._make, model, shape, last_rows, training))

    def get(self, model: HMTForCausalLM, key: tuple[Any, ...], make: Callable[..., Any]) -> Any:
        """The graph under this key, or make(ready), ready(step) being a step that is captured where there is CUDA.

        Where the model decides by itself, a capture that fails is said once, and None from then on.
        """
        with self.turn:
            if key not in self.graphs:
                self.graphs[key] = self._try(model, make)
                self.made[key] = self.made.get(key, 0) + 1
            self.graphs[key] = graph = self.graphs.pop(key)  # the last one is the last to be dropped
            while len(self.graphs) > KEPT_GRAPHS:
                dropped = next(iter(self.graphs))
                del self.graphs[dropped]
                self.uses.pop(dropped, None)
            return graph

    def _try(self, model: HMTForCausalLM, make: Callable[..., Any]) -> Any:
        if self.pool is None and model.device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()

        def ready(step: Callable[[], object]) -> Callable[[], object]:
            return capture.captured(step, model.device, self.pool, self.turn.side)

        with capture.to_be_captured():
            if model.config.cuda_graphs:
                return make(ready)
            try:
                return make(ready)
            except RuntimeError as error:
                why = (str(error) or type(error).__name__).splitlines()[0]
                warnings.warn(
                    f"hmt goes on without a CUDA graph (cuda_graphs=False keeps it quiet): {why}", stacklevel=2
                )
                return None

    def _make(
        self, model: HMTForCausalLM, shape: tuple[int, int], last_rows: int, training: bool, ready: Callable[..., Any]
    ) -> LayerGraph | None:
        weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        layers = _Layers(model.backbone, last_rows)
        embeds = weight.new_zeros(*shape, weight.shape[1])
        drawing = capture.Drawing(model.device)
        hidden = torch.empty_like(layers(embeds))
        if model.training and drawing.undone():
            return None
        graph = LayerGraph(self.turn, embeds, hidden, ready(lambda: hidden.copy_(layers(embeds))))
        if training:
            graph.d_hidden, graph.d_embeds = torch.zeros_like(hidden), torch.zeros_like(embeds)
            places = _places(layers)
            self._find_weights(layers, places, embeds)
            graph.backward = ready(
                partial(_recompute_and_backward, layers, places, embeds, graph.d_hidden, graph.d_embeds, self.sums)
            )
            self.summed = None  # warming up has added to the sums
        return graph

    def _find_weights(self, layers: _Layers, places: dict[str, str], embeds: Tensor) -> None:
        if self.sums:
            return
        weights = {name: attrgetter(name)(layers) for name in set(places.values())}
        trained = {name: weights[name] for name in sorted(weights) if weights[name].requires_grad}
        if not trained:
            return
        with torch.enable_grad():
            hidden = layers(embeds)
            found = torch.autograd.grad(hidden, list(trained.values()), torch.zeros_like(hidden), allow_unused=True)
        for (name, p), gradient in zip(trained.items(), found, strict=True):
            if gradient is not None:
                self.sums[name] = torch.zeros_like(p)

    def run_back(self, graph: LayerGraph, embeds: Tensor, d_hidden: Tensor) -> Tensor:
        """`graph.run_back` as a part of the backward pass under way, whose sums begin at zero."""
        this = torch._C._current_graph_task_id()
        with self.turn:
            if self.summed != this:
                # what asks for other gradients than the weights' never delivers, nor does what fails
                self._refuse_overlap(this)
                self.begun = {*sorted(self.begun)[-63:], this}
                self.summed = this
                if self.sums:
                    torch._foreach_zero_(list(self.sums.values()))
            return graph.run_back(embeds, d_hidden)

    def deliver(self) -> Sequence[Tensor | None]:
        """The sums of the backward pass under way, once."""
        this = torch._C._current_graph_task_id()
        with self.turn:
            if self.summed != this:
                self._refuse_overlap(this)
                return [None] * len(self.sums)
            self.summed = None
            self.begun.discard(this)
            # copies, in few launches: autograd holds on to them, while another call's passes already add up theirs
            return torch._foreach_mul(list(self.sums.values()), 1.0) if self.sums else ()

    def _refuse_overlap(self, this: int) -> None:
        if this in self.begun:
            raise RuntimeError(
                "two backward passes of one model overlap, and its CUDA graphs hold the gradients of one: run one "
                "after the other, or set cuda_graphs to False"
            )


@dataclass
class GraphedCall:
    """The graphs of a model during one call of it."""

    model: HMTForCausalLM
    graphs: LayerGraphs
    token: Tensor | None = None

    def layers(self, shape: tuple[int, int], last_rows: int) -> Layers | None:
        """`hidden_states`, without padding and cache, of embeddings of this shape [B, T]; None: the ordinary path."""
        graph = self.graphs.find(self.model, shape, last_rows)
        if graph is None:
            return None
        if torch.is_grad_enabled() and self.token is None:
            # looked up now: other objects than at the capture may lie in the same memory
            weights = [attrgetter(name)(self.model) for name in self.graphs.sums]
            self.token = _Gradients.apply(self.graphs, *weights)
        return partial(self._run, graph)

    def _run(
        self,
        graph: LayerGraph,
        backbone: PreTrainedModel,
        embeds: Tensor,
        mask: Tensor | None,
        cache: Any,
        last_rows: int,
    ) -> Tensor:
        if self.token is None:
            return graph.run(embeds, last_rows)
        with offloaded(self.model.config.offload_states):
            return _Pass.apply(self.graphs, graph, embeds, last_rows, self.token)


# not attributes of the models: a copied or pickled model must not take along graphs of the weights of another
_graphs: WeakKeyDictionary[HMTForCausalLM, dict[tuple[Any, ...], LayerGraphs]] = WeakKeyDictionary()


def graphed_call(model: HMTForCausalLM, look: capture.Look) -> GraphedCall | None:
    """The graphs of this model, with its weights where they lie now; None where no pass can be captured."""
    if capture.is_over(model):
        _graphs.pop(model, None)
    if model.config.cuda_graphs is False or look.reason is not None:
        return None
    kept = _graphs.setdefault(model, {})
    graphs = kept.pop(look.dependencies, None)
    if graphs is None:
        graphs = LayerGraphs(capture.turn_of(model, model.device))
        for key in [key for key in kept if key[1] != look.dependencies[1]]:
            del kept[key]  # of weights that lie elsewhere now
    kept[look.dependencies] = graphs
    while len(kept) > KEPT_SETTINGS:
        kept.pop(next(iter(kept)))
    return GraphedCall(model, graphs)


def _places(layers: _Layers) -> dict[str, str]:
    """Every place of a parameter in the modules, and the first place of the same parameter."""
    first: dict[int, str] = {}
    places = {}
    for path, module in layers.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            place = f"{path}.{name}"
            places[place] = first.setdefault(id(parameter), place)
    return places


def _recompute_and_backward(
    layers: _Layers,
    places: dict[str, str],
    embeds: Tensor,
    d_hidden: Tensor,
    d_embeds: Tensor,
    sums: dict[str, Tensor],
) -> None:
    # leaves of their own: autograd adds to the sums, and nothing that hangs on the weights hears of it
    x, leaves = embeds.detach().requires_grad_(), {}
    for name, total in sums.items():
        leaves[name] = attrgetter(name)(layers).detach().requires_grad_()
        leaves[name].grad = total
    everywhere = {place: leaves[name] for place, name in places.items() if name in leaves}
    with torch.enable_grad():
        hidden = torch.func.functional_call(layers, everywhere, (x,), tie_weights=False)
    hidden.backward(d_hidden)
    d_embeds.copy_(cast(Tensor, x.grad))


class _Pass(torch.autograd.Function):
    """hidden [B, rows, d] of embeds [B, T, d]; keeps its input only."""

    @staticmethod
    def forward(
        ctx: Any, graphs: LayerGraphs, graph: LayerGraph, embeds: Tensor, last_rows: int, token: Tensor
    ) -> Tensor:
        ctx.graphs, ctx.graph = graphs, graph
        ctx.save_for_backward(embeds)
        return graph.run(embeds, last_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor) -> tuple[Tensor | None, ...]:
        (embeds,) = ctx.saved_tensors
        return None, None, ctx.graphs.run_back(ctx.graph, embeds, d_hidden), None, d_hidden.new_zeros(())


class _Gradients(torch.autograd.Function):
    """The token that all passes of a call depend on: through it the weights get their gradients, once, at the end.

    Its backward pass comes after those of all passes; otherwise autograd would add up theirs, weight by weight.
    """

    @staticmethod
    def forward(ctx: Any, graphs: LayerGraphs, *weights: Tensor) -> Tensor:
        ctx.graphs = graphs
        ctx.save_for_backward(*weights)
        return weights[0].new_zeros(()) if weights else torch.zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises where a weight has been changed since: the passes have been recomputed with it
        return None, *ctx.graphs.deliver()
