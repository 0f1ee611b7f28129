"""The rollout: padded and ragged micro-batches against single samples in an independent loop; the KV cache is used;
the bytes stored for backward do not grow with the number of passes."""

import plain_loop
import pytest
import torch
from micro_batch import losses_of, stored_bytes
from random_samples import ragged_batch, random_sample
from torch.utils._python_dispatch import TorchDispatchMode

from mirage_ds.data.collate import collate
from mirage_ds.model.parts_cache import KeyValue, PartsCache
from mirage_ds.model.rollout import Rollout

aten = torch.ops.aten


def plain_losses(model, samples, stage: str) -> tuple[float, float]:
    """The same micro-batch, one sample at a time, without a cache or padding."""
    model.hf.zero_grad()
    total = 0.0
    for sample in samples:
        ce_loss, latent_loss = plain_loop.sample_losses(model.hf, vars(sample), stage)
        loss = model.ce_loss_weight * ce_loss + latent_loss
        loss.backward()
        total += loss.item()
    grads = [parameter.grad.norm() for parameter in model.hf.parameters() if parameter.grad is not None]
    return total, torch.stack(grads).norm().item()


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_a_ragged_micro_batch_is_the_sum_of_its_samples(make_model, stage: str, recompute: bool) -> None:
    """Rows of different lengths and K, some without images, latents or labels."""
    model = make_model(stage, recompute=recompute)
    for samples in (
        ragged_batch(1, 4, stage=stage, latent_sizes=[4, 4, 4, 4]),
        ragged_batch(2, 4, stage=stage, latent_sizes=[1, 6, 3, 8]),
        ragged_batch(3, 6, stage=stage),
    ):
        assert losses_of(model, samples) == pytest.approx(plain_losses(model, samples, stage), rel=2e-5)


def test_several_blocks_of_logits(make_model) -> None:
    """All but the last are recomputed in backward."""
    samples = ragged_batch(1, 4, stage="text", latent_sizes=[4, 4, 4, 4])
    model = make_model("text")
    one_block = losses_of(model, samples)
    model.rollout.head.block_rows = 3
    assert losses_of(model, samples) == pytest.approx(one_block, rel=1e-6)


def test_more_passes_than_needed_change_nothing(make_model) -> None:
    """Ranks that gather layer by layer agree on the largest number of passes among them."""
    model = make_model("stage2")
    samples = ragged_batch(2, 2, stage="stage2", latent_sizes=[2, 3])
    length = collate(samples, align_latents=True).input_ids.shape[1]
    for num_passes in (4, 9, length):
        assert losses_of(model, samples, num_passes) == pytest.approx(losses_of(model, samples), rel=2e-5)


class ForgetfulRollout(Rollout):
    """A rollout whose passes do not see the passes before them."""

    def one_pass(self, hidden, past: list[list[KeyValue]], position_embeddings, seen, uses, **keywords):
        kept = [list(parts) for parts in past]
        for parts in past:
            parts.clear()
        mask = seen["attention_mask"]
        seen = {"attention_mask": mask if mask is None else mask[..., -hidden.shape[1] :]}
        output = super().one_pass(hidden, past, position_embeddings, seen, uses, **keywords)
        self.forgotten = sum(map(len, kept))
        return output


@pytest.mark.parametrize(
    ("further", "keywords"), [((), {}), (({"cache_position": None},), {}), ((), {"kwargs": {}})], ids=str
)
def test_the_cache_takes_what_any_version_passes(further: tuple, keywords: dict) -> None:
    """Earlier versions of transformers pass a fourth argument, 5.24 a keyword."""
    past, new = (tuple(torch.randn(2, 1, 2, length, 4)) for length in (3, 2))
    cache = PartsCache([past])
    keys, values = cache.update(*new, 0, *further, **keywords)
    torch.testing.assert_close(keys, torch.cat([past[0], new[0]], dim=2))
    torch.testing.assert_close(values, torch.cat([past[1], new[1]], dim=2))
    assert cache.new == new


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
def test_a_dropped_kv_cache_is_an_error(make_model, monkeypatch: pytest.MonkeyPatch, recompute: bool) -> None:
    model = make_model("stage2", recompute=recompute)
    samples = ragged_batch(1, 2, stage="stage2", latent_sizes=[3, 3])
    right, _ = losses_of(model, samples)
    model.rollout.__class__ = ForgetfulRollout
    with pytest.raises(RuntimeError, match=r"KV cache of layer 0 holds 1 of \d+ columns"):
        losses_of(model, samples)
    monkeypatch.setattr(ForgetfulRollout, "check_cache", lambda *_: None)
    wrong, _ = losses_of(model, samples)
    assert abs(wrong - right) > 1e-3 * right


def bytes_of_one_row(model, latent_size: int) -> int:
    """Bytes that a forward pass stores for backward, for one row of the same length for any K."""
    sample = random_sample(5, stage="stage2", latent_size=latent_size, images=2)
    extra = 300 + 8 - latent_size
    sample.input_ids = torch.cat([sample.input_ids, torch.full((extra,), 20)])
    sample.labels = torch.cat([sample.labels, torch.full((extra,), 20)])
    after = sample.position_ids.max() + 1 + torch.arange(extra)
    sample.position_ids = torch.cat([sample.position_ids, after.expand(3, -1)], dim=1)
    for name in ("image_mask", "latent_mask"):
        setattr(sample, name, torch.cat([getattr(sample, name), torch.zeros(extra).bool()]))
    return stored_bytes(model, [sample])


def test_stored_bytes_do_not_grow_with_the_number_of_passes(make_model) -> None:
    """Keys and values are stored once. Without recomputation, the concatenated copies of every pass would be stored."""
    model = make_model("stage2")
    few, many = bytes_of_one_row(model, 2), bytes_of_one_row(model, 8)
    assert many <= 1.05 * few, (few, many)
    assert bytes_of_one_row(make_model("stage2", recompute=False), 8) > 1.5 * many


class WeightGradients(TorchDispatchMode):
    """Counts the tensors of a shape that are made."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.count += func.overloadpacket in (aten.mm, aten.add, aten.addmm) and output.shape == self.shape
        return output


@pytest.mark.parametrize("recompute", [True, False], ids=["recomputed", "stored"])
def test_gradients_of_weights_are_made_as_often_for_any_number_of_latents(make_model, recompute: bool) -> None:
    """Passes of one column share one. For each pass, a large weight's gradient would be written and added."""
    model = make_model("stage2", recompute=recompute)
    counts = []
    for latent_size in (2, 8, [2, 2], [8, 8]):
        batch = collate(ragged_batch(5, 1, stage="stage2", latent_sizes=[latent_size]), align_latents=True)
        loss = model(batch).loss
        with WeightGradients(model.rollout.layers[0].mlp.down_proj.weight.shape) as made:
            loss.backward()
        counts.append(made.count)
    layers = len(model.rollout.layers)
    # In each layer: of the first pass and of the last one of each block, their sums, and the one of all passes of one
    # column added to them.
    assert counts == [4 * layers, 4 * layers, 6 * layers, 6 * layers]


def test_passes_over_one_column_are_stored_only_while_they_are_few(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from the left, whose latents lie in different columns, make more of them than any row has latents."""
    model = make_model("stage2")
    recomputed: list[bool] = []
    one_pass = Rollout.one_pass

    def noted(self, hidden, *arguments, **keywords):
        if hidden.shape[1] == 1:
            recomputed.append(keywords["recompute"])
        return one_pass(self, hidden, *arguments, **keywords)

    monkeypatch.setattr(Rollout, "one_pass", noted)
    (one, other), found = ragged_batch(1, 2, stage="stage2", latent_sizes=[4, 4]), []
    for samples in ([one], [one, other]):
        recomputed.clear()
        batch = collate(samples, align_latents=False)
        assert not batch.left_padded
        model(batch)
        found.append((len(recomputed), set(recomputed)))
    assert found == [(3, {False}), (6, {True})]
