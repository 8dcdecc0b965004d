"""Compiled blocks: one graph for all layers, the same gradients, and eager where nothing can be compiled."""

import pytest
import torch

from nsa import KVCache, ModelConfig, NSAConfig, Transformer, routing
from nsa.model import compile_blocks

PATTERN = NSAConfig(l=8, d=4, l_sel=8, n_sel=4, w=9)


@pytest.fixture(autouse=True)
def fresh():
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 5):
        pytest.skip("blocks compile from torch 2.5 on")
    from torch._dynamo import config

    before = config.optimize_ddp
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    config.optimize_ddp = before


def _model(attention, n_layers=10):
    """More layers than torch compiles forms of one function."""
    torch.manual_seed(0)
    nsa = PATTERN if attention == "nsa" else NSAConfig()
    shape = {"vocab_size": 31, "dim": 16, "n_heads": 4, "n_kv_groups": 2, "d_k": 8, "d_v": 8}
    return Transformer(ModelConfig(**shape, n_layers=n_layers, attention=attention, nsa=nsa))


def _selections():
    return sum(n for (op, _), n in routing.launches.items() if op == "selection")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_one_graph_serves_all_layers_with_the_gradients_of_eager(attention, checkpointing):
    from torch._dynamo.utils import counters

    model, ids, graphs = _model(attention), torch.randint(31, (2, 70)), []

    def aot_eager(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def gradients():
        model.zero_grad()
        before = _selections()
        loss = model.loss(ids, ids.roll(1, 1))
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())], _selections() - before

    model.gradient_checkpointing = checkpointing
    want, chosen = gradients()
    counters.clear()
    assert compile_blocks(model, "on", backend=aot_eager) is None
    probes = len(graphs)
    got, chosen_compiled = gradients()
    assert len(graphs) - probes == 2, "a graph for the blocks, one for the last norm"
    assert not counters["graph_break"]
    assert chosen_compiled == chosen == (10 if attention == "nsa" else 0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    gradients()
    assert len(graphs) - probes == 2


def test_validation_and_other_lengths_compile_anew_and_a_cache_does_not():
    model, graphs = _model("nsa", 3), []

    def eager(graph, inputs):
        graphs.append(graph)
        return graph

    compile_blocks(model, "on", backend=eager)
    del graphs[:]
    ids = torch.randint(31, (1, 40))
    with torch.no_grad():
        model(ids, KVCache(model.cfg, 1, 40, device="cpu", dtype=torch.float32))
        assert graphs == []
        first = model(ids)
        assert len(graphs) == 2
        model(ids[:, :30])
    assert len(graphs) == 4
    torch.testing.assert_close(model(ids).detach(), first, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_has_the_state_of_an_eager_one():
    model = _model("nsa", 2)
    names = list(model.state_dict())
    compile_blocks(model, "on", backend="eager")
    assert list(model.state_dict()) == names
    assert list(Transformer(model.cfg).state_dict()) == names


def test_without_a_compiler_the_model_stays_eager_and_says_why_in_a_line():
    def broken(graph, inputs):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    model = _model("nsa", 1)
    blocks = model.run_block
    reason = compile_blocks(model, "on", backend=broken)
    assert "Failed to find C compiler" in reason
    assert "\n" not in reason
    assert model.run_block is blocks
    model.loss(torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)).backward()


def test_on_a_cpu_blocks_are_compiled_when_asked_for_alone():
    model = _model("nsa", 1)
    if model.embed.weight.device.type == "cpu":
        assert "CUDA" in compile_blocks(model)


@pytest.mark.parametrize(
    ("card", "version", "eager"),
    [((9, 0), (2, 11), False), ((9, 0), (2, 13), False), ((9, 0), (2, 10), True), ((8, 0), (2, 11), True)],
)
def test_auto_compiles_where_it_was_measured(monkeypatch, card, version, eager):
    from nsa import model

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: card)
    monkeypatch.setattr(model, "_TORCH", version)
    assert bool(model._eager_by_default(torch.device("cuda"))) is eager
