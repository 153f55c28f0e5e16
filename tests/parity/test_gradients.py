"""Gradients of the Bradley-Terry loss with respect to every parameter, against torch's autograd."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="parity with transformers needs torch: pip install -e '.[test,parity]'")

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tiny_models import make_batch, one_micro
from torch_models import make_model, random_conversations, read_model, torch_hidden

from mmrm_jax.models.hf.names import canonical_name
from mmrm_jax.models.hf.weights import save_params
from mmrm_jax.objectives import Seen, standard
from mmrm_jax.train.state import abstract_model
from mmrm_jax.train.step import branch_rewards
from mmrm_jax.types import Comparison

pytestmark = pytest.mark.filterwarnings("default")
PAIRS = ((0, 1), (2, 0), (3, 1))
CLOSE = 1e-5
# A key's bias moves every score of a query alike where nothing rotates keys: its gradient is zero in exact arithmetic,
# and what is left is rounding, which is measured by the gradient of the query's bias.
ZERO = "vision_tower.encoder.layer.{}.attention.k_proj.bias"


def torch_gradients(model, group, config, score: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradients by tensor name). In float64, so that differences are mmrm_jax's own."""
    model = model.double()
    head = torch.tensor(score, dtype=torch.float64, requires_grad=True)
    hidden, lengths = torch_hidden(model, group, config)
    rewards = hidden[torch.arange(len(lengths)), lengths - 1] @ head
    winners, losers = (list(side) for side in zip(*PAIRS))
    loss = -torch.nn.functional.logsigmoid(rewards[winners] - rewards[losers]).mean()
    loss.backward()
    named = {canonical_name(name, "native"): p.grad for name, p in model.named_parameters()}
    return loss.item(), {name: g.numpy() for name, g in named.items() if g is not None} | {
        "score.weight": head.grad[None].numpy()
    }


@pytest.mark.parametrize("name", ["qwen2", "qwen2 dynamic", "qwen3", "llama with biases", "phi3 longrope"])
def test_gradients(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    config, params = read_model(tmp_path)
    group = random_conversations(config, tiles=2, lengths=(5, 8, 1, 3))
    group = dataclasses.replace(group, comparisons=tuple(Comparison(*pair) for pair in PAIRS))
    batch = one_micro(make_batch([group], config, views={"primary": "multimodal"}, extra=1))
    graphdef, empty = abstract_model(config)[0], nnx.State({})

    @jax.jit
    def loss_of(params, batch):
        rewards = branch_rewards(graphdef, {"primary": params}, empty, batch, jnp.dtype("float32"))["primary"]
        terms = standard().terms(Seen({"primary": rewards}, batch.comparisons))
        return jnp.sum(terms.loss * batch.comparisons.mask.astype(jnp.float32)) / len(PAIRS)

    loss, grads = jax.value_and_grad(loss_of)(params, batch)
    # Under the names and in the layouts of tensors: what is saved of parameters can be saved of gradients.
    save_params(tmp_path, config, grads, layout="native")
    ours = load_file(tmp_path / "model.safetensors")
    want, theirs = torch_gradients(model, group, config, np.asarray(params["score"].get_value()))
    np.testing.assert_allclose(loss, want, rtol=CLOSE)
    # Vision layers after the selected one have no gradient in torch, and zero in JAX.
    for key in sorted(ours.keys() - theirs.keys()):
        assert "vision_tower.encoder.layer." in key and not np.any(ours[key]), key
    assert theirs.keys() <= ours.keys()
    zero = {ZERO.format(i) for i in range(config.vision.num_layers)}
    for key, g in theirs.items():
        size = np.linalg.norm(theirs[key.replace("k_proj", "q_proj") if key in zero else key])
        assert size > 0 or not np.any(ours[key]), key
        assert np.linalg.norm(ours[key] - g) <= CLOSE * size, key
