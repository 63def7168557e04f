"""Whole models under torch.compile, torch.export and AOTInductor are one graph and give the same numbers."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_attn import Seq2SeqTransformer, TransformerEncoder, TransformerEncoderLayer

PAD, VOCAB, BATCH = 0, 40, 3


def encoder_decoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 24}
    return Seq2SeqTransformer(VOCAB, VOCAB, **sizes, dropout=0.0, max_len=64, pad_id=PAD, sos_id=1, eos_id=2)


def tokens(length: int, padding: int, batch: int = BATCH) -> Tensor:
    x = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
    x[0, length - padding :] = PAD
    return x


def encoder_decoder_inputs(length: int) -> dict[str, Tensor]:
    return {"src": tokens(length + 2, 3), "tgt": tokens(length, 2)}


def transformers_model(name: str) -> nn.Module:
    pytest.importorskip("transformers", minversion="5.15", reason="pip install -e .[huggingface]")
    import models

    from fused_attn.integrations import huggingface

    return huggingface.enable(models.BY_ID[name].build())


def transformers_inputs(name: str, length: int) -> dict:
    x = tokens(length, 3)
    inputs = {"input_ids": x, "attention_mask": (x != PAD).long()}
    if name == "t5":
        return inputs | {"decoder_input_ids": tokens(length + 1, 0), "use_cache": False}
    return inputs | ({} if name == "bert-pretraining" else {"use_cache": False})


MODELS = ["encoder-decoder", "bert-pretraining", "llama", "t5"]


def build(name: str) -> nn.Module:
    return encoder_decoder() if name == "encoder-decoder" else transformers_model(name)


def inputs(name: str, length: int) -> dict:
    return encoder_decoder_inputs(length) if name == "encoder-decoder" else transformers_inputs(name, length)


def check_same(module: nn.Module, model: nn.Module, arguments: dict) -> None:
    """Asserts that the compiled `module` has the outputs and the gradients of `model`."""
    results = []
    for run in (model, module):
        model.zero_grad()
        out = run(**arguments)
        outputs = [out] if isinstance(out, Tensor) else [x for x in out.to_tuple() if isinstance(x, Tensor)]
        sum(x.cos().sum() for x in outputs).backward()
        results.append([*(x.detach() for x in outputs), *(p.grad for p in model.parameters())])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-6


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.compiler.reset()
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_graph_for_all_lengths(name: str) -> None:
    """Forward and backward are one graph each.

    torch compiles once for the first length, and a second time, for all lengths, when another length comes.
    """
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = build(name)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (9, 10, 23):
        check_same(compiled, model, inputs(name, length))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor() -> None:
    model = encoder_decoder()
    check_same(torch.compile(model, fullgraph=True), model, encoder_decoder_inputs(9))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_activation_checkpointing(compiler: str | None, use_reentrant: bool) -> None:
    """When checkpointing runs a layer a second time, dropout drops the same entries."""
    if compiler and use_reentrant:
        pytest.skip("torch.compile takes only the other kind")
    torch.manual_seed(0)
    layers = nn.ModuleList(TransformerEncoderLayer(16, 2, 24, dropout=0.3, batch_first=True) for _ in range(2))
    x = torch.randn(BATCH, 9, 16, requires_grad=True)
    ignored = tokens(9, 3) == PAD

    def run(x: Tensor, is_checkpointed: bool) -> Tensor:
        for layer in layers:
            if is_checkpointed:
                x = checkpoint(layer, x, None, ignored, use_reentrant=use_reentrant)
            else:
                x = layer(x, None, ignored)
        return x

    gradients = []
    for is_checkpointed in (False, True):
        function = torch.compile(run, fullgraph=True, backend=compiler) if compiler else run
        torch.manual_seed(1)
        out = function(x, is_checkpointed)
        x.grad = None
        out[~ignored].square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


# ---- Export


class Classifier(nn.Module):
    """Turns token ids (B, L) into logits (B, 5): an encoder, and a projection of the first token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCAB, 16)
        self.encoder = TransformerEncoder(TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x), src_key_padding_mask=x == PAD)[:, 0])


def export(model: nn.Module, *names: str, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    dimensions = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=64)}
    with torch.no_grad():
        return torch.export.export(model.eval(), example, dynamic_shapes=dict.fromkeys(names, dimensions))


def test_export() -> None:
    model = Classifier()
    program = export(model, "x", example=(tokens(9, 3).flip(1),))
    assert program.graph_module.code.count("fused_attn.attention") == 2
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    for x in (tokens(9, 3).flip(1), tokens(21, 4, batch=5)):
        torch.testing.assert_close(loaded(x), model(x))


def test_export_of_a_transformers_model() -> None:
    model = transformers_model("bert-cls")
    x = tokens(9, 3)
    program = export(model, "input_ids", "attention_mask", example=(x, (x != PAD).long()))
    assert program.graph_module.code.count("fused_attn.attention") == 2
    for x in (tokens(9, 3), tokens(21, 4, batch=5)):
        mask = (x != PAD).long()
        torch.testing.assert_close(program.module()(x, mask).logits, model(x, mask).logits)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_package(tmp_path: Path) -> None:
    model = Classifier()
    program = export(model, "x", example=(tokens(9, 3),))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "encoder.pt2"))
    packaged = torch._inductor.aoti_load_package(path)
    for x in (tokens(9, 3), tokens(21, 4, batch=5)):
        torch.testing.assert_close(packaged(x), model(x))
