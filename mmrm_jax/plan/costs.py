"""Arithmetic and memory traffic of one train step, counted from the model's configuration.

XLA's own count takes the body of a scan once, whatever its length, so it cannot be used for stacked layers. What counts
are matrix products; all else is bound by memory and fused into them. `flash` says that attention runs in kernels that
keep no scores (splash attention), instead of plain array code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from flax import nnx

from mmrm_jax.config import BranchInput, ModelConfig, Remat, TrainConfig
from mmrm_jax.plan.shapes import DataShape


@dataclasses.dataclass(frozen=True)
class Product:
    """`times` matrix products [rows, inner] @ [inner, columns] per group of a batch.

    `layers` holds those that are alike but have weights of their own. In attention (`weight` False) both sides are
    activations, and where it is `causal` half of the scores are masked. `tensor` says that the mesh's tensor axis
    splits it. `last` marks what ends a layer: no backward pass needs its result.
    """

    rows: int
    inner: int
    columns: int
    times: float = 1
    layers: int = 1
    weight: bool = True
    tensor: bool = True
    last: bool = False
    causal: bool = False

    @property
    def flops(self) -> float:
        """Of one forward pass over one group."""
        return 2.0 * self.rows * self.inner * self.columns * self.times * self.layers


@dataclasses.dataclass(frozen=True)
class Part:
    """Products that are trained, frozen and recomputed together.

    Attributes:
        products: Its matrix products.
        trained: Whether its weights get a gradient. Adapters' products are too small to count.
        passes_input: Whether a gradient has to reach its input.
        remat: What of it the backward pass computes again.
    """

    products: tuple[Product, ...]
    trained: bool
    passes_input: bool
    remat: Remat = "none"

    def passes(self, product: Product) -> int:
        """How often the mathematics computes a product: forward, and for the gradient of either side.

        Without weights, both sides are inputs.
        """
        return 1 + (self.trained + self.passes_input if product.weight else 2 * self.passes_input)

    def recomputed(self, product: Product) -> bool:
        """Whether the backward pass, where there is one, computes a product's forward again."""
        again = (self.remat == "full" and not product.last) or (self.remat == "dots" and not product.weight)
        return again and (self.trained or self.passes_input)

    def computed(self, product: Product, flash: bool) -> float:
        """How often a device computes a product, with what it computes again.

        Flash kernels skip what causality masks. Backward, they compute seven products where the mathematics has four:
        one kernel gives the gradient of queries, another that of keys and values, each from scores of its own.
        """
        times = float(self.passes(product) + self.recomputed(product))
        if product.weight or not flash:
            return times
        return (times + 1.5 * self.passes_input) * (0.5 if product.causal else 1.0)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one train step.

    Attributes:
        model_flops: What the mathematics needs, over all devices: forward, and backward where something is trained.
        device_flops: What one device computes, with what is recomputed or computed on several devices alike.
        device_bytes: What one device moves to and from its memory: operands and results of matrix products in
            the compute dtype, attention's scores in float32 where they are kept, and one update of parameters and
            moments.
    """

    model_flops: float
    device_flops: float
    device_bytes: float

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.device_flops / self.device_bytes


def vision_products(model: ModelConfig, tiles: int) -> tuple[Product, ...]:
    """The tower: patches, then the layers up to the selected one. S tokens a tile, class token included.

    Attention is split over the tensor axis where the number of heads is even (`models.vision`).
    """
    v = model.vision
    depth = model.select_layer if model.select_layer >= 0 else v.num_layers + 1 + model.select_layer
    patches = (v.image_size // v.patch_size) ** 2
    s, head, even = patches + 1, v.width // v.num_heads, v.num_heads % 2 == 0
    return (
        Product(tiles * patches, 3 * v.patch_size**2, v.width, tensor=False),
        Product(tiles * s, v.width, v.width, times=4, layers=depth, tensor=even),
        Product(tiles * s, v.width, v.mlp_width, layers=depth),
        Product(tiles * s, v.mlp_width, v.width, layers=depth, last=True),
        Product(s, head, s, times=tiles * v.num_heads, layers=depth, weight=False, tensor=even),
        Product(s, s, head, times=tiles * v.num_heads, layers=depth, weight=False, tensor=even),
    )


def projector_products(model: ModelConfig, tiles: int) -> tuple[Product, ...]:
    """Two linear layers over visual tokens."""
    width, tokens = model.decoder.width, tiles * model.visual_tokens_per_tile
    inner = int(model.vision.width / model.downsample_ratio**2)
    return (
        Product(tokens, inner, width),
        Product(tokens, width, width),
    )


def decoder_products(model: ModelConfig, shape: DataShape, view: BranchInput) -> tuple[Product, ...]:
    """The prefix once, N responses beside it, each in a row of its own; scores are computed whole and masked.

    Flash kernels, which take a group's rows for one, compute as many scores of two responses, and more of several.
    """
    d, depth = model.decoder, model.decoder.num_layers
    tokens, prefix = shape.tokens(view, model), shape.prefix_of(view, model)
    heads, kv = d.num_heads * d.head_width, d.num_kv_heads * d.head_width
    of_responses = shape.responses * d.num_heads
    return (
        Product(tokens, d.width, heads, layers=depth),
        Product(tokens, d.width, kv, times=2, layers=depth),
        Product(tokens, heads, d.width, layers=depth),
        Product(tokens, d.width, d.mlp_width, times=2, layers=depth),
        Product(tokens, d.mlp_width, d.width, layers=depth, last=True),
        Product(prefix, d.head_width, prefix, times=d.num_heads, layers=depth, weight=False, causal=True),
        Product(prefix, prefix, d.head_width, times=d.num_heads, layers=depth, weight=False, causal=True),
        Product(shape.response, d.head_width, prefix + shape.response, of_responses, depth, weight=False),
        Product(shape.response, prefix + shape.response, d.head_width, of_responses, depth, weight=False),
    )


def branch_parts(
    model: ModelConfig, remat: Remat, shape: DataShape, view: BranchInput, trainable: nnx.State
) -> Iterator[Part]:
    """What a branch computes, from its input on, and what of it the backward pass goes through.

    `trainable` is the (abstract) state of what the branch trains.
    """
    kernels = {path[0] for path, _ in nnx.to_flat_state(trainable) if path[-1] == "kernel"}
    tiles, below = shape.tiles_of(view), False  # whether a gradient has to pass through a part, to what lies before it
    if tiles:
        patches, *layers = vision_products(model, tiles)
        trained, below = "vision" in kernels, "vision" in trainable
        yield Part((patches,), trained, passes_input=False)
        yield Part(tuple(layers), trained, passes_input=below, remat=remat)
        below = below or "projector" in trainable  # its layer norm comes before its products
        yield Part(projector_products(model, tiles), "projector" in kernels, passes_input=below)
    below = below or "decoder" in trainable  # as do embeddings and norms here
    yield Part(decoder_products(model, shape, view), "decoder" in kernels, passes_input=below, remat=remat)


def train_costs(
    model: ModelConfig,
    config: TrainConfig,
    shape: DataShape,
    views: dict[str, BranchInput],
    params: dict[str, nnx.State],
    *,
    batch_ways: int,
    tensor_ways: int,
    state_bytes: float,
    flash: bool = False,
) -> Costs:
    """Costs of a step whose groups are split `batch_ways` and whose matrices `tensor_ways` over the mesh.

    `params` is what each branch trains (`TrainState.params`, abstract). `state_bytes` is what one device holds of it
    and of its moments: read and written once by the update.
    """
    itemsize = 2 if config.compute_dtype == "bfloat16" else 4
    model_flops, device_flops, device_bytes = 0.0, 0.0, 2.0 * state_bytes
    for branch, view in views.items():
        for i, part in enumerate(branch_parts(model, config.remat, shape, view, params[branch])):
            if config.features_dtype and shape.tiles_of(view) and i < 2:
                continue  # the tower's two parts: its features are read
            # Tower and projector see a blank tile once for all groups of a micro-batch, on every device.
            shared = view == "blank" and i < 3
            groups = config.micro_batches if shared else config.batch_size
            for product in part.products:
                done = part.computed(product, flash)
                ways = (1 if shared else batch_ways) * (tensor_ways if product.tensor else 1)
                model_flops += part.passes(product) * product.flops * (1 if shared else groups)
                device_flops += done * product.flops * groups / ways
                moved = _traffic(product, groups / ways, config.micro_batches, tensor_ways, itemsize, flash)
                device_bytes += done * moved
    return Costs(model_flops, device_flops, device_bytes)


def _traffic(
    product: Product, groups: float, micro_batches: int, tensor_ways: int, itemsize: int, flash: bool
) -> float:
    """Bytes of one pass on one device: activations group by group, weights once a micro-batch."""
    p = product
    many = p.times * p.layers
    if p.weight:
        activations = p.rows * (p.inner + p.columns) * many * groups * itemsize
        weights = p.inner * p.columns * many * micro_batches * itemsize / (tensor_ways if p.tensor else 1)
        return activations + weights
    # Scores are the larger of the three; plain code writes and reads them in float32.
    scores, rest = p.rows * max(p.inner, p.columns), (p.rows + max(p.inner, p.columns)) * min(p.inner, p.columns)
    return (scores * 4 * (not flash) + rest * itemsize) * many * groups
