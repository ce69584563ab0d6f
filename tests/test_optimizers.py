import copy
import math
import platform
import subprocess
import sys
from argparse import Namespace

import pytest
import torch
import torch._inductor.compile_fx
from conftest import ROOT, tiny_unet

from networks.edm_unet import DhariwalUNet, SongUNet
from support.device import compile_networks
from support.optimizers import Muon, adamw, load_optimizer, lr_factor, optimizer_step, update_ema
from support.script import UserError


def test_ema_equals_its_closed_form():
    """With decay d and the warm-up far behind: ema_n = d^n ema_0 + (1 - d) sum_k d^(n - k) w_k."""
    ema, net = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    weights, decay = [3.0, -1.0, 2.0, 0.5], 0.8
    torch.nn.init.constant_(ema.weight, 10.0)
    for step, weight in enumerate(weights):
        torch.nn.init.constant_(net.weight, weight)
        update_ema(ema, net, decay, updates=1000 + step)
    n = len(weights)
    expected = decay**n * 10 + (1 - decay) * sum(decay ** (n - 1 - k) * w for k, w in enumerate(weights))
    assert math.isclose(ema.weight.item(), expected, rel_tol=1e-6)
    update_ema(ema, net, decay, updates=1)  # early, the decay is 1/11
    assert math.isclose(ema.weight.item(), expected / 11 + weights[-1] * 10 / 11, rel_tol=1e-6)


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="of glibc's memory")
def test_freed_memory_serves_the_next_tensors():
    """Tensors are made and freed in turn in a new process: the kernel gives no new pages after the first round."""
    code = """
import resource, torch
from support.device import keep_freed_memory
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.ones(size, 1000, 1000) for size in (1, 3, 10)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = new_pages()
keep_freed_memory()
new_pages()
print(before, new_pages())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert before > 50_000 and after < 1000


def test_gradients_are_clipped_to_a_total_norm():
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([a, b], fused=True)
    for grads, step in (((3.0, 4.0), (0.6, 0.8)), ((0.03, 0.04), (0.03, 0.04))):
        a.data.zero_(), b.data.zero_()
        a.grad, b.grad = (torch.tensor([value]) for value in grads)
        norm = optimizer_step(optimizer, lr=0.1, max_norm=1.0)
        assert norm.item() == pytest.approx(math.hypot(*grads))
        assert (a.item(), b.item()) == pytest.approx([-0.1 * value for value in step], rel=1e-4)


def test_learning_rate_rises_and_falls_linearly():
    factors = [lr_factor(step, warmup_steps=4, decay=0.25, step_number=16) for step in range(16)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4:13] == [1.0] * 9 and factors[13:] == [0.75, 0.5, 0.25]
    assert lr_factor(0, warmup_steps=0, decay=0.0, step_number=5) == 1.0


@pytest.mark.parametrize("change", [dict(memory_format=torch.channels_last), dict(device="meta")], ids=str)
def test_an_optimizer_goes_on_in_another_layout_and_on_another_device(change):
    """Fused AdamW reads weights and moments in the order of memory. Whether AdamW is fused depends on the device."""
    old = torch.nn.Conv2d(8, 8, 3)
    new = copy.deepcopy(old).to(**change)
    optimizers = [adamw(layer.parameters(), 1e-3) for layer in (old, new)]
    for parameter in old.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers[0].step()
    load_optimizer(optimizers[1], optimizers[0].state_dict())
    on_meta = new.weight.is_meta
    assert [optimizer.param_groups[0]["fused"] for optimizer in optimizers] == [True, not on_meta]
    for name in ("exp_avg", "exp_avg_sq"):
        theirs, ours = optimizers[0].state[old.weight][name], optimizers[1].state[new.weight][name]
        assert ours.is_meta == on_meta and ours.stride() == new.weight.stride()
        assert on_meta or (torch.equal(ours, theirs) and ours.stride() != theirs.stride())


def is_inside(name, parameter):
    return name.split(".")[0] in ("encoder", "middle", "decoder") and parameter.dim() > 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_steps_along_an_orthogonal_matrix(layout):
    """A hidden weight `[out, n]` moves by lr * 0.2 * sqrt(max(out, n)) * U V^T for a gradient U S V^T, and decays.

    Torch's five iterations bring the singular values only near 1, into 0.6 to 1.3. All other parameters move as by
    AdamW.
    """
    torch.manual_seed(0)
    net, twin = tiny_unet().to(memory_format=layout), tiny_unet()
    twin.load_state_dict(net.state_dict())
    for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
        parameter.grad = torch.randn_like(parameter)
        other.grad = parameter.grad.contiguous()
    conv = net.encoder[0][0].conv0.weight
    before, gradient = conv.detach().clone(), conv.grad.flatten(1)
    optimizer_step(Muon(net, 0.0), 0.01, math.inf)
    optimizer_step(adamw(twin.parameters(), 0.0), 0.01, math.inf)
    step = (before * (1 - 0.01 * 0.01) - conv.detach()).flatten(1) / (0.01 * 0.2 * max(gradient.shape) ** 0.5)
    U, _, V = torch.linalg.svd(gradient, full_matrices=False)
    values = U.T @ step @ V.T
    assert values.diag().min() > 0.6 and values.diag().max() < 1.3
    assert (values - values.diag().diag()).abs().max() < 0.05
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)) != is_inside(name, parameter), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_that_of_torch():
    """Over three steps, with momentum; torch's takes matrices alone."""
    net = tiny_unet()
    ours, muon = Muon(net, 1e-2), net.encoder[0][0].conv1.weight
    theirs = muon.detach().flatten(1).clone().requires_grad_()
    reference = torch.optim.Muon([theirs], 1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        muon.grad = torch.randn_like(muon)
        theirs.grad = muon.grad.flatten(1).clone()
        optimizer_step(ours, 1e-2, math.inf)
        reference.step()
    torch.testing.assert_close(muon.flatten(1), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("network", [SongUNet, DhariwalUNet])
def test_muon_knows_the_blocks_of_every_network(network):
    """What it steps are the matrices inside the blocks; without blocks it refuses."""
    net = network(img_resolution=8, model_channels=32, channel_mult=(1, 1), num_blocks=1, attn_resolutions=(4,))
    hidden = {id(parameter) for parameter in Muon(net, 1e-3).hidden}
    for name, parameter in net.named_parameters():
        assert (id(parameter) in hidden) == is_inside(name, parameter), name
    with pytest.raises(UserError, match="none of the blocks of Conv2d"):
        Muon(torch.nn.Conv2d(4, 1, 1), 1e-3)


@pytest.mark.parametrize("layouts", [[torch.contiguous_format, torch.channels_last], [torch.channels_last] * 2])
def test_muons_momentum_does_not_depend_on_the_memory_layout(layouts):
    """A network that goes on in another layout, as on another device, makes the same next step."""
    torch.manual_seed(0)
    net, other = tiny_unet().to(memory_format=layouts[0]), tiny_unet().to(memory_format=layouts[1])
    optimizers = [Muon(network, 1e-2) for network in (net, other)]
    gradients = [[torch.randn_like(parameter) for parameter in net.parameters()] for _ in range(2)]

    def step(network, optimizer, gradients):
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        optimizer_step(optimizer, 1e-2, math.inf)

    step(net, optimizers[0], gradients[0])
    state = copy.deepcopy(optimizers[0].state_dict())
    other.load_state_dict(net.state_dict())
    load_optimizer(optimizers[1], state)
    for network, optimizer in zip((net, other), optimizers, strict=True):
        step(network, optimizer, gradients[1])
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        # Newton-Schulz computes in bfloat16, in another order.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_compiled_graphs_have_fixed_sizes(monkeypatch):
    """A grid of 80 images before batches of 16: one graph per size, since dynamic sizes would slow convolutions."""
    graphs = []

    def compile_fx(graph, inputs, **options):
        graphs.append(inputs)
        return graph.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    torch._dynamo.reset()
    net = tiny_unet()
    compile_networks(Namespace(compile=True), net)
    trial = len(graphs)
    for batch in (80, 16, 80, 16):
        net(torch.randn(batch, 1, 8, 8), torch.ones(batch), torch.zeros(batch, dtype=torch.long))
        net.encode(torch.randn(batch, 1, 8, 8), torch.ones(batch), torch.zeros(batch, dtype=torch.long), [4])
    torch._dynamo.reset()
    assert trial == 1 and len(graphs) == 1 + 2 * 2
    for inputs in graphs:
        assert all(torch.is_tensor(tensor) and all(type(size) is int for size in tensor.shape) for tensor in inputs)


def test_a_step_that_is_not_finite_moves_nothing_and_is_counted():
    """Fused AdamW skips it itself."""
    layer = torch.nn.Linear(2, 2)
    optimizer = adamw(layer.parameters(), 1e-3)
    for bad, *counted in ((False, 0, 0), (True, 1, 1), (True, 2, 2), (False, 0, 2), (True, 1, 2)):
        before = layer.weight.detach().clone()
        layer(torch.full((1, 2), float("nan") if bad else 1.0)).sum().backward()
        norm = optimizer_step(optimizer, 1e-2, 10.0)
        assert norm.isfinite() != bad and layer.weight.grad is None and [*map(int, optimizer.bad_steps)] == counted
        assert torch.equal(layer.weight, before) == bad and layer.weight.isfinite().all()
