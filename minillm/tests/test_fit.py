"""fit() does what train() does: compiled or by hand, whatever the model, and as far as its head
allows."""
import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from minillm.arc import stages
from minillm.arc.fit import Padded, faster, fit
from minillm.arc.sizes import SIZES
from minillm.data import Rows, encode_document
from minillm.fast_train import (BlockByHand, FusedBlock, chunked_loss, fused_loss,
                                twin_of)
from minillm.lora import add_lora
from minillm.model import Llama
from minillm.tests.test_fast_train import batch, build, gradients, off
from minillm.tests.test_train import Batches, settings, tiny, weights
from minillm.tokenizer import Tokenizer
from minillm.train import TrainConfig, token_loss, train


def test_fit_ends_where_train_ends(monkeypatch):
    model, batches = build(std=0.15), [batch(4, 66)] * 6
    config = TrainConfig(6, 1e-3, warmup=3, clip=0.5, precision="float32", bar=False)
    plain, calls, forward = copy.deepcopy(model), [], BlockByHand.forward
    monkeypatch.setattr(BlockByHand, "forward", lambda *args: calls.append(1) or forward(*args))
    ours = [entry["loss"] for entry in fit(model, batches, config)]
    assert len(calls) == 2 * 6
    theirs = [entry["loss"] for entry in train(plain, batches, config)]
    assert len(calls) == 2 * 6 and ours == pytest.approx(theirs, rel=1e-5)
    assert theirs[-1] < theirs[0] - 0.01 and model.training
    assert all(off(a, b) < 1e-4 for a, b in zip(model.parameters(), plain.parameters()))


def test_without_a_compiler_one_line_says_so(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", broken)
    compiled, plain = tiny(), tiny()
    fit(compiled, Batches(), settings(), compiling=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no C++ compiler found" in out and "and much more" not in out
    fit(plain, Batches(), settings())
    assert torch.equal(weights(compiled), weights(plain))


def test_blocks_are_compiled_where_it_works(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: compiled.append(self))
    model = tiny()
    forward, loss = faster(model, compiling=True)
    assert compiled == list(forward.model.layers) and loss is chunked_loss
    assert all(type(block) is FusedBlock for block in compiled)
    assert list(map(id, forward.parameters())) == list(map(id, model.parameters()))


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4}, {"tie_embeddings": True}])
def test_fused_blocks_have_the_gradients_of_plain_ones(shape):
    model, data = build(**shape), batch(3, 20)
    (value, ours), (expected, plain) = (gradients(model, token_loss, data, forward=forward)
                                        for forward in (twin_of(model, FusedBlock), model))
    assert value == pytest.approx(expected, rel=1e-5)
    assert all(off(ours[name], plain[name]) < 1e-5 for name in plain)


def test_fused_blocks_with_adapters_are_plain_ones():
    model = add_lora(build(), rank=2, alpha=4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    ids = batch(2, 12)[0]
    assert torch.equal(twin_of(model, FusedBlock)(ids), model(ids))


def test_the_fused_loss_is_token_loss(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f: f)        # what it computes, not the compiler
    model, data = build(), batch(3, 20)
    (value, ours), (expected, plain) = (gradients(model, loss, data)
                                        for loss in (fused_loss, token_loss))
    assert value == pytest.approx(expected, rel=1e-5)
    assert all(off(ours[name], plain[name]) < 1e-5 for name in plain)


@pytest.mark.parametrize("loss", [chunked_loss, fused_loss])
@pytest.mark.parametrize("change", [
    lambda head: setattr(head, "bias", nn.Parameter(torch.linspace(-1, 1, head.out_features))),
    lambda head: head.register_forward_hook(lambda module, args, out: 3 * out)],
    ids=["bias", "hook"])
def test_a_head_that_is_more_than_its_weight_is_called(change, loss):
    """And not replaced by a loss that reads the weight only."""
    model = tiny()
    change(model.lm_head)
    assert torch.equal(loss(model, *Batches()[0]), token_loss(model, *Batches()[0]))


@pytest.mark.parametrize("lora", [False, True])
def test_blocks_of_the_size_gpu_compile_into_few_graphs_without_breaks(lora):
    """With the batches of that size, which have some hundred lengths, for a narrow model: one
    graph. Adapters take two, since nothing before the first block is trained. The backend only
    counts."""
    recipe = SIZES["gpu"].stories
    texts = stages.tales(1024, recipe.setting)
    tokenizer = Tokenizer.train(texts, recipe.model.vocab_size, stages.SPECIAL_TOKENS)
    rows = Rows([encode_document(text, tokenizer) for text in texts], 8)
    assert len({rows[i][0].shape[1] for i in range(20)}) > 10
    model = Llama(replace(recipe.model, dim=32, hidden_dim=48, n_layers=3))
    if lora:
        model = add_lora(model, 4, 8)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    twin = twin_of(model, FusedBlock)
    for block in twin.model.layers:
        block.compile(backend=count, dynamic=True)
    for i in range(20):
        token_loss(twin, *rows[i], "bf16").backward()
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    torch.compiler.reset()
    assert len(graphs) == 1 + lora and breaks == 0


def test_a_padded_batch_has_the_same_loss():
    """And the length that its model can read is the limit."""
    model, source = tiny(), Batches()
    longest = model.config.max_seq_len
    for i in range(3):
        inputs, targets = source[i]
        t = inputs.shape[1]
        padded = Padded(source, longest)[i]
        assert padded[0].shape == padded[1].shape == (len(inputs), min(64, longest)) and t < 64
        assert Padded(source, t)[i][0].shape == inputs.shape
        ours, theirs = token_loss(model, *padded), token_loss(model, inputs, targets)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
