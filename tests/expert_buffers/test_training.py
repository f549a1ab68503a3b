from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from global_rng import global_rng_untouched
from torch.nn.modules.batchnorm import _BatchNorm

from ddengine import data
from ddengine.nets import NetSpec, build
from ddengine.ops import dsa
from ddengine.rng import Rng
from expert_buffers.params import ParamSpec
from expert_buffers.partial import load_partial, save_partial
from expert_buffers.recipes import RECIPES, ExpertRecipe
from expert_buffers.training import initial_state, restored, score, scored_indices, train_epoch
from expert_buffers.trajectory import Recording

RNG = Rng(7).fold("expert", 3)
NET = NetSpec("convnet", width=4, depth=2)
BATCH = NetSpec("convnet", width=4, depth=2, norm="batch")
MTT = replace(RECIPES["mtt"], batch_size=47).resolved("digits")


@pytest.fixture(scope="module")
def images():
    """101 digits of all classes: two full batches of 47 and one of 7."""
    fit = data.load("digits").fit
    return fit.take(torch.arange(101) * 12)


def network(spec=NET):
    return build(spec, (1, 8, 8), 10, RNG.torch("weights"))


def same(one, other):
    velocities = [one.velocity is None, other.velocity is None]
    return (
        torch.equal(one.params, other.params)
        and (all(velocities) or (not any(velocities) and torch.equal(one.velocity, other.velocity)))
        and all(torch.equal(one.buffers[name], other.buffers[name]) for name in one.buffers)
    )


def epochs(recipe, images, count, spec=NET, precision="fp32"):
    net = network(spec)
    state = initial_state(net)
    for epoch in range(count):
        state = train_epoch(net, state, images, recipe, epoch, RNG, precision)
    return state


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 1e-2)])
@pytest.mark.parametrize("spec", [NET, BATCH], ids=["instance", "batch"])
def test_epochs_are_those_of_torch_sgd_on_the_module_itself(images, momentum, weight_decay, spec):
    recipe = replace(MTT, momentum=momentum, weight_decay=weight_decay, lr=0.1)
    net = network(spec).train()
    optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum, weight_decay=weight_decay)
    for epoch in range(2):
        mine = RNG.fold("epoch", epoch)
        order = torch.randperm(101, generator=mine.torch("shuffle"))
        for number, index in enumerate((order[:47], order[47:94], order[94:])):
            generator = mine.fold("batch", number).torch("dsa")
            numbers = dsa.sample(generator, recipe.augment, len(index), (8, 8), one_op=True)
            optimiser.zero_grad()
            F.cross_entropy(net(dsa.apply(images.model_input(index), numbers)), images.y[index]).backward()
            optimiser.step()
    found = epochs(recipe, images, 2, spec)
    wanted = initial_state(net)
    torch.testing.assert_close(found.params, wanted.params, rtol=1e-5, atol=1e-7)
    for name, buffer in wanted.buffers.items():
        torch.testing.assert_close(found.buffers[name], buffer, rtol=1e-5, atol=1e-7)


def test_what_ast_adds_is_off_at_its_neutral_values(images):
    neutral = ExpertRecipe("ast", batch_size=47, loss_ramp=(1.0, 1.0), augment=MTT.augment, alpha=0.4)
    assert same(epochs(neutral, images, 3), epochs(MTT, images, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.9},
        {"weight_decay": 0.1},
        {"penalty": 2.0},
        {"rho": 0.5},
        {"loss_ramp": (1.0, 0.5)},
        {"lr_drop": 0.5, "lr_drop_epoch": 1},
        {"augment": "none"},
        {"lr": 0.02},
    ],
    ids=str,
)
def test_every_option_changes_the_weights(images, change):
    assert not torch.equal(epochs(replace(MTT, **change), images, 2).params, epochs(MTT, images, 2).params)


def test_alpha_changes_what_a_radius_gives(images):
    sharp, flat = (replace(MTT, rho=0.5, alpha=alpha) for alpha in (0.0, 0.3))
    assert not torch.equal(epochs(sharp, images, 1).params, epochs(flat, images, 1).params)


def test_the_loss_ramp_is_a_scale_of_the_gradient(images):
    half = epochs(replace(MTT, loss_ramp=(0.5,)), images, 1)
    torch.testing.assert_close(half.params, epochs(replace(MTT, lr=0.005), images, 1).params)


@pytest.mark.parametrize("change", [{"rho": 0.5, "alpha": 0.3}, {"penalty": 2.0}], ids=str)
def test_statistics_move_once_a_step_with_the_augmented_batch_at_the_weights(images, change):
    recipe = replace(MTT, batch_size=101)
    plain, other = (epochs(r, images, 1, BATCH) for r in (recipe, replace(recipe, **change)))
    assert len(plain.buffers) == 6
    assert all(torch.equal(plain.buffers[name], other.buffers[name]) for name in plain.buffers)
    assert int(plain.buffers[next(n for n in plain.buffers if n.endswith("tracked"))]) == 1


def test_the_velocity_ends_where_the_rate_drops(images):
    recipe = replace(MTT, momentum=0.9, lr_drop=0.5, lr_drop_epoch=1)
    net, first = network(), epochs(recipe, images, 1)
    after = train_epoch(net, first, images, recipe, 1, RNG)
    assert first.velocity is not None
    assert same(after, train_epoch(net, replace(first, velocity=None), images, recipe, 1, RNG))
    kept = replace(recipe, lr=recipe.lr / 2, lr_drop_epoch=None)
    assert not torch.equal(after.params, train_epoch(net, first, images, kept, 1, RNG).params)


@pytest.mark.parametrize(
    ("count", "spec", "steps"), [(101, NET, 3), (95, NET, 3), (95, BATCH, 2), (94, NET, 2)]
)
def test_an_incomplete_batch_is_kept_and_one_image_is_no_batch_for_batch_norm(images, count, spec, steps):
    net, asked = network(spec), []
    some = images.take(torch.arange(count))
    train_epoch(net, initial_state(net), some, MTT, 0, RNG, stop=lambda: bool(asked.append(1)))
    assert len(asked) == steps


def test_a_stop_drops_the_epoch_and_leaves_the_state_alone(images):
    net, asked = network(BATCH), []
    before, state = initial_state(net), initial_state(net)
    recipe = replace(MTT, momentum=0.9)
    stopped = train_epoch(net, state, images, recipe, 0, RNG, stop=lambda: asked.append(1) or len(asked) == 3)
    assert (stopped, len(asked)) == (None, 3)
    assert same(state, before)
    train_epoch(net, state, images, recipe, 0, RNG)
    assert same(state, before)


def test_an_epoch_is_a_function_of_stream_and_number_and_draws_nothing_global(images):
    net = network()
    state = initial_state(net)
    with global_rng_untouched():
        one = train_epoch(net, state, images, MTT, 1, RNG)
    assert same(one, train_epoch(net, state, images, MTT, 1, RNG))
    assert not torch.equal(one.params, train_epoch(net, state, images, MTT, 2, RNG).params)
    other = Rng(7).fold("expert", 4)
    assert not torch.equal(one.params, train_epoch(net, state, images, MTT, 1, other).params)


def test_bf16_keeps_float32_weights_near_those_of_float32(images):
    half, full = epochs(MTT, images, 2, precision="bf16"), epochs(MTT, images, 2)
    assert half.params.dtype == torch.float32
    assert not torch.equal(half.params, full.params)
    moved = (full.params - initial_state(network()).params).norm()
    assert (half.params - full.params).norm() < 0.1 * moved


@pytest.mark.parametrize("spec", [NET, BATCH], ids=["instance", "batch"])
def test_score_is_loss_and_accuracy_of_the_module_in_eval_mode(images, spec, monkeypatch):
    monkeypatch.setattr("expert_buffers.training.SCORED_AT_ONCE", 43)
    state, net = epochs(MTT, images, 2, spec), network(spec)
    loss, accuracy = score(net, state, images)
    assert net.training
    with torch.no_grad():
        for name, parameter in ParamSpec.of(net).unflatten(state.params).items():
            net.get_parameter(name).copy_(parameter)
        for name, buffer in state.buffers.items():
            net.get_buffer(name).copy_(buffer)
        logits = net.eval()(images.model_input())
    assert loss == pytest.approx(F.cross_entropy(logits, images.y).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == images.y).float().mean().item())


def test_the_scored_images_are_a_fixed_draw_of_at_most_a_thousand():
    drawn = scored_indices(3, 2003)
    assert len(drawn) == len(set(drawn.tolist())) == 1000
    assert int(drawn.max()) < 2003
    assert torch.equal(drawn, scored_indices(3, 2003))
    assert not torch.equal(drawn, scored_indices(4, 2003))
    assert scored_indices(3, 7).tolist() == list(range(7))


def recorded(state, spec=BATCH):
    net = network(spec)
    start, stats = initial_state(net), ParamSpec.of_buffers(net)
    rows = [(s.params, stats.flatten(s.buffers), 1.0, 0.5) for s in (start, state)]
    resume = {"params": state.params}
    if state.velocity is not None:
        resume["momentum"] = state.velocity
    return Recording.begin("delta16", *rows[0]).append(*rows[1], resume)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_recording_continues_to_the_bits_of_a_straight_one(images, momentum):
    recipe, net = replace(MTT, momentum=momentum), network(BATCH)
    recording = recorded(epochs(recipe, images, 1, BATCH))
    state = restored(net, recording)
    assert any(isinstance(module, _BatchNorm) for module in net.modules())
    assert same(train_epoch(net, state, images, recipe, 1, RNG), epochs(recipe, images, 2, BATCH))


def test_a_partial_file_is_read_back_only_whole_and_in_its_buffer(images, tmp_path):
    path = tmp_path / "partial_00042.safetensors"
    recording = recorded(epochs(replace(MTT, momentum=0.9), images, 1, BATCH))
    assert load_partial(path, "this") is None
    save_partial(path, recording, "this")
    found = load_partial(path, "this")
    assert found.tensors().keys() == recording.tensors().keys()
    assert all(torch.equal(found.tensors()[name], t) for name, t in recording.tensors().items())
    assert load_partial(path, "another") is None
    whole = path.read_bytes()
    for place in range(7, len(whole), 997):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert load_partial(path, "this") is None
        path.write_bytes(whole[:place])
        assert load_partial(path, "this") is None
