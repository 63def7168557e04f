"""The stages of the suite, the most useful first. README.md has a table of them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable

from benchmarks.cases import MASKS
from benchmarks.conventions import DEVICE_LOST, OUR_BACKENDS, OURS, ROOT
from tools.gpu_suite import reports
from tools.gpu_suite.suite import Skip, Stage, Suite, verdict_of

#: How often a benchmark is started again after a kernel has made the device unusable.
MAX_RESTARTS = 5
#: pytest's workers share one GPU. With more workers, most would wait for the GPU or for its memory.
MOST_TEST_WORKERS = 8
#: pytest exits with this code if it finds no test.
NO_TESTS = 5


def environment(suite: Suite) -> str:
    """Logs the GPU, the driver, the CUDA compiler, and what fused_attn finds on this machine."""
    for tool in (("nvidia-smi",), ("nvcc", "--version")):
        if shutil.which(tool[0]):
            suite.run(*tool)
        else:
            suite.say(f"{tool[0]}: not on the PATH")
    return suite.python("-m", "fused_attn", "info")


def build(suite: Suite) -> str:
    """Compiles the native modules with CMake and installs them into fused_attn/, which the other stages import.

    pip is not used, because it would need scikit-build-core, and a network to fetch it.
    """
    if suite.is_dry and suite.python("-c", "from fused_attn import _C; print(_C.build_info())") == "ok":
        return "ok: already built"
    cmake = ["cmake"] if shutil.which("cmake") else [sys.executable, "-m", "cmake"]
    folder = str(ROOT / "build" / f"suite-{sys.implementation.cache_tag}")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    all_kernels = "-DFUSED_ATTN_CUDA_ARCHITECTURES=all"  # the tests run those for Ampere on Hopper, too
    on_spills = f"-DFUSED_ATTN_FAIL_ON_SPILLS={'ON' if suite.fails_on_spills else 'OFF'}"
    settings = [f"-DPython_EXECUTABLE={sys.executable}", all_kernels, on_spills]
    for command in (
        [*cmake, "-S", str(ROOT), "-B", folder, *generator, *settings],
        [*cmake, "--build", folder, "--parallel"],
        [*cmake, "--install", folder, "--prefix", str(ROOT / "fused_attn")],
    ):
        verdict = verdict_of(suite.run(*command))
        if verdict != "ok":
            return verdict
    return suite.python("-c", "from fused_attn import _C; print(_C.build_info())")


def check(suite: Suite) -> str:
    """Runs ``python -m fused_attn check``, and compares every mask of the attention benchmark with float64.

    All commands run at the same time. Most of their time goes into compiling Triton kernels, and one command compiles
    on one core. Later stages find the compiled kernels in Triton's cache. No command measures a speed.
    """
    commands = {"self-check": [sys.executable, "-m", "fused_attn", "check", "--no-speed"]}
    workers = max(1, min(len(MASKS), (os.cpu_count() or 1) - 1))
    for number in range(workers):
        masks = list(MASKS)[number::workers]
        command = [sys.executable, "-m", "benchmarks", "attention", "--device", suite.device, "--check-only", *FIRST]
        command += ["--only", *masks, "--rivals", OURS, *OUR_BACKENDS]
        command += ["--quick", "--lengths", "64"] if suite.is_dry else ["--lengths", "2048"]
        commands[" ".join(masks)] = command + suite.minutes
    codes = dict(zip(commands, suite.run_all(list(commands.values())), strict=True))
    return "; ".join(f"{name}: {verdict_of(code)}" for name, code in codes.items() if code != 0) or "ok"


#: Several tests share the GPU, so none may measure a time.
WITHOUT_TIMING = "gpu and not timing"


def cuda_tests(suite: Suite) -> str:
    """The CUDA kernels on the GPU. They come first, because most of the later stages run them."""
    return _tests(suite, reports.CUDA_TESTS, *_gpu_test_files("tests/cuda"), "-m", WITHOUT_TIMING)


def gpu_tests(suite: Suite) -> str:
    """The tests marked ``gpu`` outside of tests/cuda."""
    files = sorted(set(_gpu_test_files("tests")) - set(_gpu_test_files("tests/cuda")))
    return _tests(suite, reports.GPU_TESTS, *files, "-m", WITHOUT_TIMING)


def _gpu_test_files(folder: str) -> list[str]:
    """The files with tests that are marked ``gpu``. pytest would need long to collect all files."""
    return [str(path) for path in sorted((ROOT / folder).glob("**/test_*.py")) if "mark.gpu" in path.read_text()]


def kernel_tests(suite: Suite) -> str:
    """The tests of the Triton kernels that need no GPU: what the installed Triton compiles for each architecture."""
    # A dry run only collects the tests. Triton's interpreter, which they would run in, needs minutes.
    dry = ("--collect-only",) if suite.is_dry else ()
    return _tests(suite, reports.KERNEL_TESTS, "tests/triton", "-m", "not gpu", *dry)


def _tests(suite: Suite, report_name: str, *arguments: str) -> str:
    """Runs pytest. At the deadline pytest gets SIGINT, so that it still writes its report."""
    command = ["-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        # Most tests spend their time in a compiler, which uses one core for each test.
        command += ["-n", "1" if suite.is_dry else str(min(MOST_TEST_WORKERS, os.cpu_count() or 1))]
    report = suite.out / report_name
    report.unlink(missing_ok=True)  # The report of an earlier run would be taken for the report of this one.
    code = suite.run(sys.executable, *command, f"--junitxml={report}", *arguments, interrupt_at=suite.deadline)
    if code == NO_TESTS:
        return "skipped: no such tests"
    return reports.verdict(report, verdict_of(code)) if report.exists() else verdict_of(code)


def sanitizer(suite: Suite) -> str:
    """Every mask on small tensors under compute-sanitizer, which finds accesses beyond the end of an allocation."""
    tool = shutil.which("compute-sanitizer")
    if tool is None and not suite.is_dry:
        raise Skip("compute-sanitizer is not on the PATH")
    command = [
        sys.executable, "-m", "benchmarks", "attention", "--device", suite.device, "--check-only", "--quick",
        "--rivals", OURS, *OUR_BACKENDS, "--tokens", "300", "--lengths", "150", "--head-dim", "64",
        "--directions", "forward+backward",
    ]  # fmt: skip
    checker = [] if tool is None else [tool, "--tool", "memcheck", "--error-exitcode", "9"]
    # With torch's cache, several tensors share one allocation, and an access beyond the end of one goes unnoticed.
    return verdict_of(suite.run(*checker, *command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}))


def bench(*options: str, dry: tuple[str, ...] = ()) -> Callable[[Suite], str]:
    """A stage that runs the attention benchmark with these options, and in a dry run with those of ``dry`` too."""

    def run(suite: Suite) -> str:
        own = (*options, *dry, "--seconds", "0.02") if suite.is_dry else options
        own = (*own, "--refuse", *sorted(suite.red)) if suite.red else own
        for _ in range(MAX_RESTARTS):
            verdict = suite.benchmark("attention", *own, "--resume")
            if verdict != verdict_of(DEVICE_LOST) or time.monotonic() > suite.deadline:
                break
            suite.say("the device was lost: the cases that are left run in a new process")
        return verdict

    return run


def modules(*options: str, command: str = "modules") -> Callable[[Suite], str]:
    """A stage that runs the benchmark of modules, or that of generation, with these options."""

    def run(suite: Suite) -> str:
        if suite.red:  # A module may call the kernels of any backend.
            return f"FAILED: no speed while tests are red ({', '.join(sorted(suite.red))})"
        return suite.benchmark(command, *options, "--resume")

    return run


def memory(suite: Suite) -> str:
    """Measures the memory that each implementation needs, with ``python -m benchmarks memory``."""
    dry = ("--only", "none", "--directions", "forward") if suite.is_dry else ()
    return suite.benchmark("memory", "--resume", *dry)


def tune(suite: Suite) -> str:
    """Compares tile sizes of the Triton kernels, and writes those that beat the table to tuned-*.json."""
    if suite.is_dry:
        return suite.python("-m", "fused_attn", "tune", "--dry-run", "--device", "sm_90")
    if "triton" in suite.red:
        return "FAILED: no tile is tuned while tests of the Triton kernels are red"
    # A cache folder of its own keeps the new tile sizes from changing what later stages measure.
    folder = suite.out / "cache"
    verdict = suite.python("-m", "fused_attn", "tune", *suite.minutes, environment={"XDG_CACHE_HOME": str(folder)})
    for found in (folder / "fused_attn").glob("*.json"):
        shutil.copy(found, suite.out / f"tuned-{found.name}")
    shutil.rmtree(folder, ignore_errors=True)
    return verdict


#: The sizes that are measured first, for every mask.
FIRST = ("--dtype", "bfloat16", "--head-dim", "128", "64", "--seconds", "0.5")
#: Short sequences, as of windows of an image and of sentences. At most 128 keys are one block of them.
SHORT = ("--only", "none", "padded-random", "--lengths", "64", "128")
#: FlexAttention is measured at one length, because it compiles a quarter of a minute for every shape.
FLEX = ("--rivals", OURS, "flex", "--dtype", "bfloat16", "--head-dim", "128", "--lengths", "8192")
DRY_FLEX = ("--lengths", "64", "--only", "causal", "--directions", "forward")

TESTS_NEED = ("pytest", "hypothesis", "numpy")

STAGES = (
    Stage("environment", environment, 0.2),
    Stage("build", build, 0.5, ("cmake", "pybind11")),
    Stage("cuda-tests", cuda_tests, 0.5, TESTS_NEED),
    Stage("check", check, 0.4),
    Stage("tests", gpu_tests, 0.5, TESTS_NEED),
    Stage("sanitizer", sanitizer, 0.3),
    *(Stage(f"bench:{mask}", bench("--only", mask, *FIRST, "--no-compile"), 0.2) for mask in MASKS),
    Stage("bench:short", bench(*SHORT, *FIRST, "--no-compile"), 0.2),
    Stage("overhead", bench("--tables", "overhead"), 0.2),
    Stage("modules", modules("--no-compile"), 0.3),
    Stage("generation", modules(command="generation"), 0.3),
    Stage("memory", memory, 0.3),
    Stage("tune", tune, 0.5, ("triton",)),
    Stage("bench:flex", bench(*FLEX, dry=DRY_FLEX), 0.4, ("triton",)),
    Stage("modules:compiled", modules(), 0.5, ("triton",)),
    Stage("kernel-tests", kernel_tests, 0.3, (*TESTS_NEED, "triton")),
    Stage("bench:rest", bench("--no-compile", dry=("--only", "causal")), 1.0),
)
