"""The texts of ``python -m fused_attn`` and of `explain`, which tell a user why something is slow or missing."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import types
import warnings

import pytest
import torch
from conftest import DEVICE

import fused_attn
from fused_attn import native, selfcheck, speed
from fused_attn.__main__ import main
from fused_attn.backends import cpu, dispatch
from fused_attn.backends.cuda import hardware
from fused_attn.backends.triton import backend as triton_backend

needs_kernels = pytest.mark.skipif(cpu._C is None, reason="the native kernels are not built")


@pytest.fixture
def without_kernels(monkeypatch):
    """Makes the package behave as after an installation without a compiler."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "_C", None)
    missing = native.why_missing("_C_", "a C++ compiler", ModuleNotFoundError())
    monkeypatch.setattr(cpu, "missing", missing)
    dispatch._warn_of_reference.cache_clear()
    yield
    dispatch.choose.cache_clear()
    dispatch._warn_of_reference.cache_clear()


@needs_kernels
@pytest.mark.quick
def test_info_names_what_runs(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert cpu._C.cpu_isa() in text
    runs = fused_attn.info().backends["cpu float32"]
    assert runs["cpu"] == [] and runs["reference"] == []


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="needs a system with SIGPIPE")
def test_a_reader_that_ends_early_is_no_error():
    command = [sys.executable, "-m", "fused_attn", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == -signal.SIGPIPE


@pytest.mark.quick
def test_without_kernels_everything_still_runs(without_kernels, capsys):
    assert main(["info"]) == 0
    assert "need a C++ compiler" in capsys.readouterr().out
    # No other test uses this size, so its plan is not in the cache yet.
    query = torch.randn(1, 3, 71, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # `explain` computes nothing, so it must not warn
        explanation = fused_attn.explain(query, query, query)
    assert explanation.chosen == "reference"
    assert "C++ compiler" in str(explanation)
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run .*\n.*C\+\+ compiler"):
        fused_attn.fused_attention(query, query, query, backend="cpu")
    assert main(["check"]) == 1
    assert "no backend but the reference" in capsys.readouterr().out


@pytest.mark.quick
def test_the_slow_reference_is_told_once(without_kernels):
    """The warning comes once for all calls together. A call that names the backend "reference" does not warn."""
    x = torch.randn(1, 3, 73, 24, requires_grad=True)
    offsets = torch.tensor([0, 73], dtype=torch.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_attn.fused_attention(x, x, x, backend="reference")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for y in (x, x, x.double(), x[:, :, :71]):
            fused_attn.fused_attention(y, y, y, is_causal=True).sum().backward()
        rows = x[0].transpose(0, 1)
        fused_attn.fused_attention_varlen(rows, rows, rows, offsets, offsets, 73, 73)
        fused_attn.FusedMultiheadAttention(24, 3)(x[0], x[0], x[0])
    (warning,) = caught
    assert "slow" in str(warning.message) and "need a C++ compiler" in str(warning.message)


@pytest.mark.quick
def test_a_head_dim_beyond_the_kernels_is_told_once():
    dispatch._warn_of_reference.cache_clear()
    x = torch.randn(1, 1, 79, 601)
    with pytest.warns(UserWarning, match=r"slow(?s:.*)- cpu: .*(head dim 601 is above 512|C\+\+ compiler)") as caught:
        for y in (x, x[:, :, :78]):
            fused_attn.fused_attention(y, y, y)
    assert len(caught) == 1


@needs_kernels
@pytest.mark.slow
def test_check_passes(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["check", "--no-speed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    variants = len(cpu._C.cpu_isas())
    assert len(lines) == 4 * len(selfcheck.CASES) * variants + 1
    for what in ("float64", "packed", "value dim"):
        assert any(what in line for line in lines)
    assert all(line.endswith("ok") for line in lines[:-1])


@pytest.mark.skipif(DEVICE == "cuda", reason="of Triton's interpreter")
@pytest.mark.quick
def test_check_includes_the_interpreter_where_it_is_switched_on(monkeypatch, capsys):
    pytest.importorskip("triton.language")
    monkeypatch.setattr(selfcheck, "CASES", selfcheck.CASES[-2:-1])
    assert main(["check", "--no-speed"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("triton")]
    assert len(lines) == 2 and "float32" in lines[0] and "float16" in lines[1]


@needs_kernels
@pytest.mark.quick
def test_check_finds_a_wrong_kernel(monkeypatch, capsys):
    right = cpu.forward

    def wrong(*args):
        out, lse = right(*args)
        out[0, 0, 0, 0] += 0.01
        return out, lse

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "forward", wrong)
    monkeypatch.setattr(selfcheck, "CASES", selfcheck.CASES[:1])
    assert main(["check", "--no-speed"]) == 1
    assert "WRONG" in capsys.readouterr().out


@needs_kernels
@pytest.mark.quick
def test_check_finds_a_kernel_that_is_wrong_without_gradients_alone(monkeypatch, capsys):
    """Decoding has kernels of its own, which no call with gradients runs."""
    right = cpu.forward

    def wrong(*args):
        out, lse = right(*args)
        return (out, lse) if args[2] else (out + 0.01, lse)  # args[2]: whether the caller needs the lse

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "forward", wrong)
    for case in (selfcheck.CASES[0], selfcheck.CASES[-1]):
        monkeypatch.setattr(selfcheck, "CASES", (case,))
        assert main(["check", "--no-speed"]) == 1
    assert "0 of" in capsys.readouterr().out.splitlines()[-1]


@needs_kernels
@pytest.mark.quick
def test_check_goes_on_after_a_kernel_that_raises(monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError("an illegal memory access was encountered\nmore")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(cpu, "forward", fails)
    monkeypatch.setattr(selfcheck, "CASES", selfcheck.CASES[:2])
    assert main(["check", "--no-speed"]) == 1
    lines = capsys.readouterr().out.splitlines()
    checks = 2 * 4 * len(cpu._C.cpu_isas())
    assert len(lines) == checks + 1 and lines[-1] == f"0 of {checks} right"
    failure = "failed: RuntimeError: an illegal memory access was encountered  WRONG"
    assert all(line.endswith(failure) for line in lines[:-1])


SMALL = speed.Sizes(1, 2, 64, 64, torch.float32)


@pytest.fixture
def small(monkeypatch):
    """A check of one case, and speeds of small calls, in a fraction of a second."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(selfcheck, "CASES", selfcheck.CASES[:1])
    monkeypatch.setattr(speed, "SIZES", speed.SIZES | {"cpu": SMALL})
    monkeypatch.setattr(speed, "SECONDS", 0.0)


@needs_kernels
@pytest.mark.quick
def test_check_has_a_line_for_the_speed_of_each_kernel(small, capsys):
    assert main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    speeds = [line for line in lines if "TFLOP/s" in line and "head dim" in line]
    assert len(speeds) == len(speed.lines()) >= 11
    for words in (("forward", "plain"), ("backward", "relative bias"), ("decode", "plain")):
        assert any(all(word in line for word in words) for line in speeds)
    assert all("% of a matrix product" in line and "torch " in line and "times as long" in line for line in speeds)
    assert any(line.startswith("matrix product on cpu: ") for line in lines)


@needs_kernels
@pytest.mark.quick
def test_check_as_json(small, capsys):
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checked"] == len(report["results"]) == 4 * len(cpu._C.cpu_isas()) and report["wrong"] == 0
    assert report["info"]["versions"]["torch"] == torch.__version__
    for result in report["results"]:
        assert result["is_right"] and result["error"] <= result["allowed"] and result["failure"] == ""
    for measured in report["speed"]:
        assert measured["line"]["backend"] == "cpu" and measured["tflops"] > 0 and measured["torch_milliseconds"] > 0


@needs_kernels
@pytest.mark.quick
def test_speeds_are_medians_of_calls_in_turns(small, monkeypatch):
    """Of a clock on which a matrix product takes 1 s, ours 2 s and torch's 5 s in most rounds."""
    asked = []

    def measure(calls, timer, rounds, seconds):
        asked.append(list(calls))
        for call in calls.values():
            call()
        return {"matmul": [1.0, 1.0, 9.0], "ours": [2.0, 0.1, 2.0], "torch": [5.0, 5.0, 0.1]}

    monkeypatch.setattr(speed.measurement, "measure", measure)
    causal, backward = (
        next(speed.run([speed.Line("cpu", "cpu", direction, feature, 64)]))
        for direction, feature in (("forward", "causal"), ("backward", "bias"))
    )
    assert asked == [["matmul", "ours", "torch"]] * 2
    assert (causal.milliseconds, causal.torch_milliseconds) == (2000.0, 5000.0)
    visible = 64 * 65 // 2  # of a causal mask
    assert causal.tflops == pytest.approx(2 * 2 * 64 * 2 * visible / 2.0 / 1e12)
    assert causal.matmul_tflops == pytest.approx(2 * 64**3 / 1e12)
    assert backward.tflops == pytest.approx(2 * 5 * 64 * 2 * 64 * 64 / 2.0 / 1e12)
    assert speed.matmul_rates([causal, backward]) == {"cpu": causal.matmul_tflops}


@needs_kernels
@pytest.mark.quick
@pytest.mark.parametrize("feature", speed.FEATURES)
def test_torch_computes_the_same_as_the_line_beside_it(feature):
    sizes, device = SMALL._replace(batch=2), torch.device("cpu")
    made = speed.FEATURES[feature](sizes, device)
    if made.torchs is None or "dropout_p" in made.torchs:
        pytest.skip("torch computes nothing like it")
    leaves = [speed._random(2, 2, 64, 16, dtype=torch.float32, device=device) for _ in range(3)]
    ours = fused_attn.fused_attention(*leaves, **made.ours)
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(*leaves, **made.torchs))


@needs_kernels
@pytest.mark.quick
def test_a_line_that_cannot_be_measured_says_why(small, monkeypatch, capsys):
    def fails(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(speed, "fused_attention", fails)
    assert main(["check"]) == 0  # nothing is wrong
    lines = [line for line in capsys.readouterr().out.splitlines() if "not measured" in line]
    assert len(lines) == len(speed.lines())
    assert all(line.endswith("not measured: CUDA out of memory. Tried to allocate") for line in lines)


@needs_kernels
@pytest.mark.slow
def test_several_processes_share_jobs(monkeypatch):
    """As the jobs of a GPU, whose Triton kernels take long to compile. The results come in the order of the jobs.

    The device cpu:0, which is the CPU, counts as a GPU here, because its name is not cpu.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    jobs = [selfcheck.Job("cpu:0", dtype, case) for dtype in selfcheck.DTYPES[:2] for case in ("plain", "causal")]
    together = list(selfcheck.run(jobs, 2))
    assert [str(result) for results in together for result in results] == [
        str(result) for job in jobs for result in selfcheck.results_of(job)
    ]


@pytest.mark.quick
def test_kernels_for_gpus_are_compiled_while_the_cpu_s_are_checked(monkeypatch):
    events = []

    class Pool(contextlib.nullcontext):
        def submit(self, function, job):
            events.append(("started", job.device))
            return types.SimpleNamespace(result=lambda: events.append(("finished", job.device)) or [job.device])

    monkeypatch.setattr(selfcheck, "ProcessPoolExecutor", lambda *arguments: Pool(Pool()))
    monkeypatch.setattr(selfcheck, "results_of", lambda job: events.append(("ran", job.device)) or [job.device])
    jobs = [selfcheck.Job(device, torch.float16, "plain") for device in ("cpu", "cuda")]
    assert list(selfcheck.run(jobs, 2)) == [["cpu"], ["cuda"]]
    assert events == [("started", "cuda"), ("ran", "cpu"), ("finished", "cuda")]


def end_the_process(job: selfcheck.Job) -> None:
    """What a process does that a fault of a kernel ends. It stands for `selfcheck.results_of`."""
    os._exit(1)


@pytest.mark.slow
def test_a_process_that_dies_is_a_wrong_result(monkeypatch):
    monkeypatch.setattr(selfcheck, "results_of", end_the_process)
    jobs = [selfcheck.Job("cuda", torch.float16, case) for case in ("plain", "causal")]
    for (result,) in selfcheck.run(jobs, 2):
        assert not result.is_right and "a process has ended abruptly" in str(result)


@needs_kernels
@pytest.mark.quick
def test_check_runs_the_kernels_on_all_threads_and_the_reference_on_one(monkeypatch):
    threads, evaluate = [], selfcheck._evaluate

    def record(case, inputs, backend, dtype):
        threads.append((backend, torch.get_num_threads()))
        return evaluate(case, inputs, backend, dtype)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(selfcheck, "_evaluate", record)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        selfcheck.results_of(selfcheck.Job("cpu", torch.float32, "plain"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [("reference", 1)] * 2 + [("cpu", 2)] * len(cpu._C.cpu_isas())


@pytest.mark.quick
def test_check_computes_the_truth_for_the_mask_that_kernels_get(monkeypatch):
    """The float64 evaluation reads the mask as rounded to float16, not the mask before it was rounded."""
    masks = []

    def record(*args, attn_mask, **options):
        masks.append(attn_mask.detach().double())
        return fused_attn.fused_attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(selfcheck, "fused_attention", record)
    case = next(case for case in selfcheck.CASES if case.name == "bias")
    inputs = selfcheck._inputs(case, torch.device("cpu"), torch.float16)
    for tensors in (inputs, [x.double() for x in inputs]):
        selfcheck._evaluate(case, tensors, "reference", torch.float16)
    assert len(masks) == 4 and all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.quick
def test_explain_describes_the_call():
    query = torch.randn(2, 4, 8, 16)
    text = str(fused_attn.explain(query, query, query, is_causal=True, key_padding_mask=torch.zeros(2, 8).bool()))
    assert "B=2 H=4 L=8 S=8 D=16 float32 on cpu" in text
    assert "key_padding" in text and "right=0" in text
    for backend in dispatch.BACKENDS:
        assert backend.name in text


#: The backend of a call in half precision on a GPU.
HALF = "triton" if hardware.module is None else "cuda"


@pytest.mark.quick
@pytest.mark.parametrize(
    ("device", "dtype", "chosen", "reason"),
    [
        ("sm_100", torch.bfloat16, HALF, None),
        ("sm_90", torch.bfloat16, HALF, None),
        ("sm_90a", torch.float32, "triton", None),
        ("sm_80", torch.float16, HALF, None),
        ("sm_75", torch.float16, "reference", "compute capability 7.5, expected 8.0 or higher"),
        ("sm_90", torch.float64, "reference", "dtype torch.float64 is none of"),
        ("cpu", torch.float32, "cpu" if cpu._C is not None else "reference", "the tensors are on cpu, expected cuda"),
        ("meta", torch.float32, "reference", "the tensors are on meta, expected cuda"),
    ],
)
def test_explain_answers_for_a_device_that_is_not_there(monkeypatch, device, dtype, chosen, reason):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.randn(2, 4, 8, 16, dtype=dtype)
    explanation = fused_attn.explain(query, query, query, is_causal=True, device=device)
    assert explanation.chosen == chosen
    assert (explanation.reasons["triton"] == []) == (reason is None)
    if reason is not None:
        assert reason in str(explanation)
    if device.startswith("sm_"):
        assert f"on cuda {device.rstrip('a')}" in str(explanation)


@pytest.mark.quick
def test_explain_names_a_backend_s_reasons_on_a_device_that_is_not_there():
    query = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match=r"(?s)backend='triton' cannot run .* on cuda sm_75.*compute capability 7\.5"):
        fused_attn.explain(query, query, query, backend="triton", device="sm_75")


@pytest.mark.quick
def test_explain_of_cuda_needs_no_gpu():
    pytest.importorskip("triton", reason="triton is not installed")
    query = torch.randn(2, 4, 8, 16)
    for device in ("cuda", torch.device("cuda")):
        assert fused_attn.explain(query, query, query, device=device).problem.device.type == "cuda"


@pytest.mark.quick
@pytest.mark.parametrize("device", ["sm_9", "sm_abc", "sm_", "SM_90", "gpu", "cuda:x", 3.5])
def test_explain_names_a_device_that_is_none(device):
    query = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match=rf"device: expected .* such as 'sm_90', got {device!r}"):
        fused_attn.explain(query, query, query, device=device)


@pytest.mark.quick
@pytest.mark.parametrize("device", ["cuda:90", torch.device("cuda", 90)])
def test_explain_refuses_the_number_of_a_gpu_that_is_not_here(device):
    query = torch.randn(2, 4, 8, 16)
    expected = f"device: expected one of the {torch.cuda.device_count()} GPUs of this machine, or an .* such as 'sm_90'"
    with pytest.raises(ValueError, match=rf"{expected} .*, got .*90"):
        fused_attn.explain(query, query, query, device=device)


@pytest.mark.quick
def test_explain_refuses_an_int_beyond_the_gpus():
    query = torch.randn(2, 4, 8, 16)
    with pytest.raises(ValueError, match=r"device: expected .* such as 'sm_90'.*, got 90"):
        fused_attn.explain(query, query, query, device=90)


@pytest.mark.quick
def test_help_names_every_backend():
    text = inspect.getdoc(fused_attn.fused_attention)
    for backend in dispatch.BACKEND_NAMES:
        assert f'``"{backend}"``' in text


@pytest.mark.quick
def test_info_says_what_the_triton_kernels_need(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["info"]) == 0
    assert "no: they need an NVIDIA GPU of compute capability 8.0 or higher, and" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreter" in fused_attn.info().triton["run here"]


@pytest.mark.quick
def test_info_says_how_the_cuda_kernels_run(monkeypatch, capsys):
    """On a GPU of the binary's architectures, on a later one, and on one that the binary does not fit."""
    build = {"version": "1", "compiler": "nvcc 13.0.88", "architectures": "90a-real,100"}
    module = types.SimpleNamespace(build_info=lambda: build, unusable_reason=lambda index: "")
    monkeypatch.setattr(hardware, "module", module)
    capabilities = [(9, 0), (12, 0), (8, 6)]

    def properties(device):
        major, minor = capabilities[torch.device(device).index]
        return types.SimpleNamespace(name=f"GPU {device}", major=major, minor=minor, total_memory=2**34)

    def capability(device=None):
        return capabilities[torch.device("cuda", device).index if isinstance(device, int) else device.index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties(torch.device("cuda", index)))
    monkeypatch.setattr(triton_backend, "installation_problem", lambda: "triton is not installed")
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    command = native.install_command(FUSED_ATTN_CUDA_ARCHITECTURES="80")
    for expected in (
        "compiler           nvcc 13.0.88",
        "architectures      sm_90a (machine code), sm_100 (machine code and PTX)",
        "on cuda:0          yes, machine code of sm_90a",
        "on cuda:1          yes, PTX of sm_100, which the driver compiles at first use",
        "on cuda:2          no: the CUDA kernels have been built for sm_90a (machine code), sm_100 (machine code and "
        f"PTX), expected sm_86; on the machine with the GPU, {command} builds them for it",
    ):
        assert expected in text
    (reason,) = fused_attn.info().backends["cuda:2 bfloat16"]["cuda"]
    assert "expected sm_86" in reason


@pytest.mark.quick
@pytest.mark.parametrize(
    ("version", "reason"), [("3.2.0", "triton 3.2.0 is installed, expected 3.6 or newer"), ("3.10.0+git1a2b", None)]
)
def test_an_old_triton_is_a_reason(monkeypatch, version, reason):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "__version__", version)
    triton_backend.installation_problem.cache_clear()
    try:
        assert triton_backend.installation_problem() == reason
        query = torch.randn(2, 4, 8, 16)
        assert (fused_attn.explain(query, query, query, device="sm_90").chosen == "triton") == (reason is None)
    finally:
        triton_backend.installation_problem.cache_clear()
